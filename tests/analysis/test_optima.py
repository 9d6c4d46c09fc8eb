"""Tests of lmlosses.analysis.optima."""

import math

import pytest
import torch

from lmlosses.analysis.optima import smoothed_optimum
from lmlosses.losses import cross_entropy


@pytest.mark.parametrize("classes", [2, 10, 50_000])
@pytest.mark.parametrize("smoothing", [1e-3, 0.1, 0.9, 1.0])
def test_the_gradient_of_smoothed_cross_entropy_is_zero_at_the_optimum(classes, smoothing):
    best = smoothed_optimum(classes, smoothing=smoothing)
    logits = torch.zeros(classes, dtype=torch.float64)
    logits[1] = best.gap
    logits.requires_grad_()
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(1), label_smoothing=smoothing)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.abs().max() < 1e-12
    assert loss.item() == pytest.approx(best.loss, rel=1e-9)
    probabilities = logits.detach().softmax(0)
    assert probabilities[1].item() == pytest.approx(best.target)
    assert probabilities[0].item() == pytest.approx(best.other)


def test_a_wider_and_a_narrower_gap_cost_more():
    best = smoothed_optimum(5, smoothing=0.1)
    gaps = best.gap + torch.tensor([-0.1, 0.0, 0.1]).double()
    logits = torch.stack([gaps, *4 * [torch.zeros(3).double()]], dim=-1)
    narrow, least, wide = cross_entropy(logits, torch.zeros(3).long(), label_smoothing=0.1)
    assert least < narrow and least < wide
    assert least.item() == pytest.approx(best.loss)


def test_without_smoothing_the_gap_is_infinite_and_with_all_of_it_zero():
    assert smoothed_optimum(3, smoothing=0.0) == (1, 0, math.inf, 0)
    assert smoothed_optimum(4, smoothing=1.0) == (0.25, 0.25, 0, math.log(4))


@pytest.mark.bad_input
def test_one_class_and_shares_out_of_range_are_refused():
    with pytest.raises(ValueError, match="classes must be at least 2; got 1"):
        smoothed_optimum(1, smoothing=0.1)
    with pytest.raises(TypeError, match="classes must be a whole number; got float 2.5"):
        smoothed_optimum(2.5, smoothing=0.1)
    with pytest.raises(ValueError, match=r"smoothing must lie in \[0, 1\]; got 1.5"):
        smoothed_optimum(2, smoothing=1.5)

import math

import pytest
import torch
import torch.nn.functional as F

from lmlosses import TokenStats
from lmlosses.logprobs.statistics import Scaling, linear_logits, reference, scaled

DOUBLE = torch.float64
FORBIDDEN = -math.inf
PLAIN = Scaling(1.0, None)
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def _normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=DOUBLE)


TARGETS = torch.tensor([[0, 4, 2], [6, 3, 3]])
COUNTED = torch.tensor([[True, False, True], [True, True, False]])


def _reference(logits, targets=TARGETS, counted=None, class_weight=None, scaling=PLAIN, both=True):
    return reference(logits, targets, counted, class_weight, scaling, both, both)


# scaled


def test_logits_without_scaling_are_themselves():
    logits = _normal(2, 3, 7)
    assert torch.equal(scaled(logits, PLAIN), logits)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_scaled_in_single(half):
    logits = _normal(2, 3, 7).to(half)
    found = scaled(logits, Scaling(0.7, 5.0))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), 5 * (logits.double() / 5).tanh() / 0.7)


def test_the_cap_comes_before_the_temperature():
    # tanh(log 3) = (9 - 1) / (9 + 1)
    found = scaled(torch.tensor([5 * math.log(3.0)], dtype=DOUBLE), Scaling(0.5, 5.0))
    assert found.item() == pytest.approx(5 * 0.8 / 0.5, rel=1e-12)


def test_a_capped_logit_never_passes_the_cap_and_keeps_its_order():
    logits = torch.linspace(-30, 30, 101, dtype=DOUBLE)
    found = scaled(logits, Scaling(1.0, 10.0))
    assert (found.abs() < 10).all()
    assert (found.diff() > 0).all()
    near_zero = logits.abs() < 1
    torch.testing.assert_close(found[near_zero], logits[near_zero], rtol=4e-3, atol=0)


def test_an_infinite_logit_stands_at_the_cap():
    logits = torch.tensor([FORBIDDEN, math.inf], dtype=DOUBLE)
    assert scaled(logits, Scaling(2.0, 10.0)).tolist() == [-5.0, 5.0]


# reference


def test_the_names_of_the_statistics_are_in_this_order():
    assert TokenStats._fields == ("logps", "log_normalizer", "mean_logp", "entropy")


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("entropy", [False, True])
def test_only_what_is_wanted_is_there(mean, entropy):
    found = reference(_normal(2, 3, 7), TARGETS, None, None, PLAIN, mean, entropy)
    assert [value is None for value in found] == [False, False, not mean, not entropy]


def test_a_three_to_one_model_by_hand():
    low, high = math.log(1 / 4), math.log(3 / 4)
    logits = torch.tensor([[2.0, 2.0 + math.log(3.0)]], dtype=DOUBLE)
    found = _reference(logits, torch.tensor([0]))
    assert found.logps.item() == pytest.approx(low, rel=1e-12)
    assert found.log_normalizer.item() == pytest.approx(2 + math.log(4), rel=1e-12)
    assert found.mean_logp.item() == pytest.approx((low + high) / 2, rel=1e-12)
    assert found.entropy.item() == pytest.approx(-low / 4 - 3 * high / 4, rel=1e-12)


@pytest.mark.parametrize("scaling", [PLAIN, Scaling(0.5, None), Scaling(1.5, 3.0)])
def test_the_reference_agrees_with_torch(scaling):
    logits, weights = _normal(2, 3, 7), torch.linspace(0, 2, 7, dtype=DOUBLE)
    z = logits if scaling.softcap is None else 3 * torch.tanh(logits / 3)
    model = torch.distributions.Categorical(logits=z / scaling.temperature)
    expected = TokenStats(
        model.log_prob(TARGETS),
        torch.logsumexp(z / scaling.temperature, -1),
        (weights * (z / scaling.temperature).log_softmax(-1)).mean(-1),
        model.entropy(),
    )
    found = _reference(logits, class_weight=weights, scaling=scaling)
    torch.testing.assert_close(found, expected, **EXACT)


def test_a_forbidden_class_counts_in_no_mean_and_no_entropy():
    logits, weights = _normal(2, 3, 7), torch.linspace(1, 2, 7, dtype=DOUBLE)
    wide = F.pad(logits, (0, 3), value=FORBIDDEN)
    wide_weights = F.pad(weights, (0, 3), value=9.0)
    torch.testing.assert_close(
        _reference(wide, class_weight=wide_weights),
        _reference(logits, class_weight=weights),
        **EXACT,
    )


def test_the_first_and_second_derivatives_of_the_reference_are_those_of_finite_differences():
    weights = torch.linspace(0, 2, 7, dtype=DOUBLE)

    def stats(logits):
        return tuple(
            _reference(logits, counted=COUNTED, class_weight=weights, scaling=Scaling(0.7, 3.0))
        )

    logits = _normal(2, 3, 7).requires_grad_()
    assert torch.autograd.gradcheck(stats, logits)
    assert torch.autograd.gradgradcheck(stats, logits)


def test_derivatives_beside_a_forbidden_class_are_finite_and_zero_at_it():
    logits = _normal(2, 3, 7)
    logits[..., 1] = FORBIDDEN
    logits.requires_grad_()
    stats = _reference(logits)
    loss = sum(value.sum() for value in stats)
    (first,) = torch.autograd.grad(loss, logits, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), logits)
    for derivative in (first, second):
        assert derivative.isfinite().all()
        assert not derivative[..., 1].any()
        assert derivative[..., 0].all()


@pytest.mark.parametrize("rubbish", [math.nan, math.inf, FORBIDDEN])
def test_positions_that_do_not_count_are_zero_whatever_stands_there(rubbish):
    logits = _normal(2, 3, 7).masked_fill(~COUNTED.unsqueeze(-1), rubbish).requires_grad_()
    wild = TARGETS.masked_fill(~COUNTED, -100)
    stats = _reference(logits, wild, COUNTED)
    for value in stats:
        assert not value[~COUNTED].any()
        assert value[COUNTED].isfinite().all()
        assert value[COUNTED].all()
    (gradient,) = torch.autograd.grad(sum(value.sum() for value in stats), logits)
    assert not gradient[~COUNTED].any()
    assert gradient[COUNTED].isfinite().all()


# linear_logits


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE, torch.bfloat16], ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_linear_logits_are_those_of_torchs_linear_layer(dtype, biased):
    hidden, weight = _normal(2, 3, 5).to(dtype), _normal(7, 5, seed=1).to(dtype)
    bias = _normal(7, seed=2).to(dtype) if biased else None
    found = linear_logits(hidden, weight, bias, None)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    expected = F.linear(hidden.double(), weight.double(), bias.double() if biased else None)
    step = torch.finfo(found.dtype).eps
    torch.testing.assert_close(found.double(), expected, rtol=16 * step, atol=16 * step)


def test_states_that_do_not_count_are_read_as_zero_and_get_no_gradient():
    hidden = _normal(2, 3, 5).masked_fill(~COUNTED.unsqueeze(-1), math.nan).requires_grad_()
    weight, bias = _normal(7, 5, seed=1).requires_grad_(), _normal(7, seed=2)
    found = linear_logits(hidden, weight, bias, COUNTED)
    assert torch.equal(found[~COUNTED], bias.expand(2, 7))
    torch.testing.assert_close(found[COUNTED], F.linear(hidden[COUNTED], weight, bias), **EXACT)
    by_hidden, by_weight = torch.autograd.grad(found.sum(), [hidden, weight])
    assert not by_hidden[~COUNTED].any()
    assert by_weight.isfinite().all()

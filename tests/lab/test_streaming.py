"""Tests of lmlosses.lab.streaming."""

import pytest
import torch

from lmlosses import cpu_generator
from lmlosses.lab.streaming import expected_losses, streaming_regression

CURVATURES = torch.tensor([1.0, 0.3, 0.05], dtype=torch.float64)


def test_one_feature_by_hand():
    # m = 2 at first, since it is 1 / curvature; kept: 1 - 2 * 0.2 + 0.04 * (1 + 1/4) = 0.65
    losses = expected_losses(
        torch.tensor([0.4], dtype=torch.float64),
        torch.tensor([0.5], dtype=torch.float64),
        batch=4,
        noise=3.0,
    )
    m = 0.65 * 2 + 0.4**2 * 0.5 / 4 * (3 + 1)
    assert losses.tolist() == pytest.approx([0.5, 0.25 * m])


def test_an_endless_batch_is_gradient_descent():
    rates = torch.tensor([0.5, 0.2, 1.0], dtype=torch.float64)
    losses = expected_losses(rates, CURVATURES, batch=10**12, noise=5.0)
    shrink = (1 - rates[:, None] * CURVATURES).square().cumprod(dim=0)
    torch.testing.assert_close(losses[1:], shrink.sum(dim=1) / 2, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("batch", "noise"), [(1, 1.0), (3, 4.0)])
def test_simulated_runs_have_the_computed_loss(batch, noise):
    rates = 0.3 * torch.linspace(1, 0, 30, dtype=torch.float64)
    weights, draw_loss = streaming_regression(
        CURVATURES, copies=20_000, batch=batch, noise=noise, generator=cpu_generator(0)
    )
    expected = expected_losses(rates, CURVATURES, batch=batch, noise=noise)
    optimizer = torch.optim.SGD([weights], lr=1.0)
    for step, rate in enumerate(rates.tolist(), start=1):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        draw_loss().backward()
        optimizer.step()
        if step in (1, 10, 30):
            loss = (CURVATURES * weights.detach().square()).sum(dim=1).mean() / 2
            assert loss.item() == pytest.approx(expected[step].item(), rel=0.03)


def test_runs_are_independent_and_a_rate_too_large_diverges():
    rates = torch.stack([torch.full((400,), rate).double() for rate in (0.1, 10.0)])
    losses = expected_losses(rates, CURVATURES, batch=2, noise=1.0)
    torch.testing.assert_close(
        losses[0], expected_losses(rates[0], CURVATURES, batch=2, noise=1.0)
    )
    assert losses[1, -1] == torch.inf and losses[0, -1] < 0.5


def test_values_need_not_be_read():
    losses = expected_losses(
        torch.empty(2, 5, device="meta"), torch.empty(3, device="meta"), batch=1, noise=1.0
    )
    assert losses.shape == (2, 6)


@pytest.mark.bad_input
def test_bad_settings_are_refused():
    rates = torch.ones(3).double()
    with pytest.raises(ValueError, match="batch must be positive; got 0"):
        expected_losses(rates, CURVATURES, batch=0, noise=1.0)
    with pytest.raises(ValueError, match="noise must not be negative; got -1.0"):
        expected_losses(rates, CURVATURES, batch=1, noise=-1.0)
    with pytest.raises(TypeError, match="rates must be a floating-point tensor"):
        expected_losses(torch.ones(3, dtype=int), CURVATURES, batch=1, noise=1.0)
    with pytest.raises(ValueError, match="copies must be positive; got 0"):
        streaming_regression(CURVATURES, copies=0, batch=1, noise=1.0, generator=cpu_generator(0))

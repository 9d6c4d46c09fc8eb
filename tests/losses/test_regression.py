import math

import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from sklearn.metrics import mean_pinball_loss

from lmlosses.losses import (
    absolute_error,
    gaussian_nll,
    half_squared_error,
    huber,
    laplace_nll,
    log_cosh,
    quantile_loss,
    squared_error,
)

DOUBLE = torch.float64


def _pinball(predictions, targets):
    return quantile_loss(predictions, targets, quantile=0.9)


POINT_LOSSES = {
    "squared_error": squared_error,
    "half_squared_error": half_squared_error,
    "absolute_error": absolute_error,
    "huber": huber,
    "log_cosh": log_cosh,
    "quantile_loss": _pinball,
}
DENSITIES = {"gaussian_nll": gaussian_nll, "laplace_nll": laplace_nll}

point_loss = pytest.mark.parametrize("loss", POINT_LOSSES.values(), ids=POINT_LOSSES)
density = pytest.mark.parametrize("loss", DENSITIES.values(), ids=DENSITIES)


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    return 3 * torch.randn(2, 7, 5, generator=generator, dtype=DOUBLE)


def _gradient(loss, predictions, targets, *rest):
    predictions = predictions.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(predictions, targets, *rest).sum(), predictions)
    return gradient


def _best_constant(loss, targets):
    """Position on a fine grid of the constant prediction with the least mean loss."""
    grid = torch.linspace(-1, 12, 1301, dtype=DOUBLE)
    means = torch.stack([loss(at.expand_as(targets), targets).mean() for at in grid])
    return grid[means.argmin()].item()


# values known by hand


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (squared_error, [9.0, 4.0, 0.0, 0.25]),
        (half_squared_error, [4.5, 2.0, 0.0, 0.125]),
        (absolute_error, [3.0, 2.0, 0.0, 0.5]),
        (huber, [2.5, 1.5, 0.0, 0.125]),
        (_pinball, [0.3, 1.8, 0.0, 0.05]),
        (
            log_cosh,
            [math.log(math.cosh(3)), math.log(math.cosh(2)), 0.0, math.log(math.cosh(0.5))],
        ),
    ],
    ids=["squared", "half squared", "absolute", "huber", "quantile", "log cosh"],
)
def test_errors_of_three_minus_two_zero_and_a_half(loss, expected):
    predictions, targets = torch.tensor([4.0, -1.0, 2.0, 0.5]), torch.tensor([1.0, 1.0, 2.0, 0.0])
    torch.testing.assert_close(loss(predictions, targets), torch.tensor(expected))


@pytest.mark.parametrize(
    ("loss", "slope"),
    [
        (squared_error, 2 * 3.0),
        (half_squared_error, 3.0),
        (absolute_error, 1.0),
        (huber, 1.0),
        (log_cosh, math.tanh(3.0)),
        (_pinball, 0.1),
    ],
    ids=["squared", "half squared", "absolute", "huber", "log cosh", "quantile"],
)
def test_a_prediction_that_is_three_too_high_is_pushed_down(loss, slope):
    gradient = _gradient(loss, torch.tensor([5.0]), torch.tensor([2.0]))
    torch.testing.assert_close(gradient, torch.tensor([slope]))


def test_a_wider_huber_loss_turns_linear_later():
    errors = torch.tensor([1.0, 2.0, 3.0, -10.0])
    torch.testing.assert_close(
        huber(errors, torch.zeros(4), delta=2.0), torch.tensor([0.5, 2.0, 4.0, 18.0])
    )


def test_a_perfect_prediction_of_unit_width_costs_the_constant():
    zero = torch.zeros(1)
    torch.testing.assert_close(
        gaussian_nll(zero, zero, zero), torch.tensor([0.5 * math.log(2 * math.pi)])
    )
    torch.testing.assert_close(laplace_nll(zero, zero, zero), torch.tensor([math.log(2)]))


def test_an_error_of_one_width_adds_a_half_for_gaussian_and_one_for_laplace_noise():
    error, log_width = torch.tensor([4.0]), math.log(4.0)
    zero = torch.zeros(1)
    torch.testing.assert_close(
        gaussian_nll(error, zero, torch.tensor([2 * log_width])),
        torch.tensor([0.5 * math.log(2 * math.pi) + log_width + 0.5]),
    )
    torch.testing.assert_close(
        laplace_nll(error, zero, torch.tensor([log_width])),
        torch.tensor([math.log(2) + log_width + 1]),
    )


# agreement with something independent


def test_squared_and_absolute_error_agree_with_torch(pair):
    predictions, targets = pair
    torch.testing.assert_close(
        squared_error(predictions, targets), F.mse_loss(predictions, targets, reduction="none")
    )
    torch.testing.assert_close(
        absolute_error(predictions, targets), F.l1_loss(predictions, targets, reduction="none")
    )


@pytest.mark.parametrize("delta", [0.1, 1.0, 3.0])
def test_huber_agrees_with_torch(pair, delta):
    predictions, targets = pair
    expected = F.huber_loss(predictions, targets, reduction="none", delta=delta)
    torch.testing.assert_close(huber(predictions, targets, delta=delta), expected)


@pytest.mark.parametrize("quantile", [0.05, 0.5, 0.9])
def test_quantile_loss_agrees_with_scikit_learn(pair, quantile):
    predictions, targets = pair
    expected = mean_pinball_loss(
        targets.numpy().ravel(), predictions.numpy().ravel(), alpha=quantile
    )
    loss = quantile_loss(predictions, targets, quantile=quantile).mean()
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_log_cosh_agrees_with_the_series_for_small_and_the_definition_for_larger_errors():
    small = torch.logspace(-18, -2, 33, dtype=DOUBLE)
    series = small**2 / 2 - small**4 / 12 + small**6 / 45
    torch.testing.assert_close(log_cosh(small, 0 * small), series, rtol=1e-13, atol=0)
    single = small.float()
    torch.testing.assert_close(log_cosh(single, 0 * single), series.float(), rtol=1e-6, atol=0)
    larger = torch.linspace(-20, 20, 81, dtype=DOUBLE)
    torch.testing.assert_close(
        log_cosh(larger, 0 * larger), larger.cosh().log(), rtol=1e-11, atol=1e-15
    )


def test_gaussian_and_laplace_nll_are_minus_the_log_densities_of_scipy(pair):
    predictions, targets = pair
    log_width = torch.linspace(-2, 2, 35, dtype=DOUBLE).reshape(7, 5)
    width = log_width.exp().numpy()
    for loss, distribution in (
        (gaussian_nll(predictions, targets, 2 * log_width), scipy.stats.norm),
        (laplace_nll(predictions, targets, log_width), scipy.stats.laplace),
    ):
        expected = -distribution.logpdf(targets.numpy(), loc=predictions.numpy(), scale=width)
        torch.testing.assert_close(loss, torch.from_numpy(expected), rtol=1e-12, atol=1e-12)


# laws


@point_loss
def test_no_error_costs_nothing_and_any_error_something(pair, loss):
    predictions, targets = pair
    assert (loss(targets, targets) == 0).all()
    assert (loss(predictions, targets) > 0).all()


@point_loss
def test_only_the_error_matters(pair, loss):
    predictions, targets = pair
    torch.testing.assert_close(
        loss(predictions + 2, targets + 2), loss(predictions, targets), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize(
    "loss", [squared_error, half_squared_error, absolute_error, huber, log_cosh]
)
def test_errors_of_either_sign_cost_the_same(pair, loss):
    assert torch.equal(loss(*pair), loss(*pair.flip(0)))


def test_high_and_low_predictions_trade_places_with_the_quantile(pair):
    predictions, targets = pair
    torch.testing.assert_close(
        quantile_loss(predictions, targets, quantile=0.8),
        quantile_loss(targets, predictions, quantile=0.2),
    )
    assert torch.equal(
        quantile_loss(predictions, targets, quantile=0.5), absolute_error(*pair) / 2
    )


def test_the_best_constants_are_the_mean_the_median_and_the_quantile():
    targets = torch.tensor([0.0, 1.0, 2.0, 3.0, 10.0], dtype=DOUBLE)
    assert _best_constant(squared_error, targets) == pytest.approx(3.2, abs=1e-6)
    assert _best_constant(half_squared_error, targets) == pytest.approx(3.2, abs=1e-6)
    assert _best_constant(absolute_error, targets) == pytest.approx(2.0, abs=1e-6)
    assert _best_constant(_pinball, targets) == pytest.approx(10.0, abs=1e-6)


def test_huber_is_half_the_squared_error_inside_and_bounds_its_slope_outside(pair):
    predictions, targets = pair
    assert torch.equal(huber(*pair, delta=1e3), half_squared_error(*pair))
    slopes = _gradient(lambda *both: huber(*both, delta=0.5), predictions, targets)
    assert torch.equal(slopes, (predictions - targets).clamp(-0.5, 0.5))


def test_huber_has_the_curvature_of_half_the_squared_error_at_zero():
    zero = torch.zeros((), dtype=DOUBLE)
    hessian = torch.autograd.functional.hessian(lambda at: huber(at, zero), zero)
    assert hessian == 1


def test_the_slope_of_log_cosh_is_the_hyperbolic_tangent():
    errors = torch.linspace(-40, 40, 801, dtype=DOUBLE)
    slopes = _gradient(log_cosh, errors, torch.zeros_like(errors))
    torch.testing.assert_close(slopes, errors.tanh(), rtol=1e-13, atol=1e-15)


def test_log_cosh_has_the_curvature_of_half_the_squared_error_at_zero():
    zero = torch.zeros((), dtype=DOUBLE)
    hessian = torch.autograd.functional.hessian(lambda at: log_cosh(at, zero), zero)
    assert hessian == 1


def test_log_cosh_is_smooth_where_its_two_forms_meet():
    errors = torch.tensor([1 - 1e-9, 1.0, 1 + 1e-9], dtype=DOUBLE)
    losses = log_cosh(errors, torch.zeros(3, dtype=DOUBLE))
    torch.testing.assert_close(
        losses.diff() / 1e-9, torch.full((2,), math.tanh(1.0), dtype=DOUBLE), rtol=1e-5, atol=0
    )


@density
def test_exponentials_of_minus_the_loss_integrate_to_one(loss):
    targets = torch.linspace(-60, 60, 120_001, dtype=DOUBLE)
    log_widths = torch.full_like(targets, 0.8)
    densities = (-loss(torch.full_like(targets, 0.3), targets, log_widths)).exp()
    assert torch.trapezoid(densities, targets).item() == pytest.approx(1.0, abs=1e-6)


def test_the_best_width_is_the_size_of_the_error():
    zero, error = torch.zeros(1, dtype=DOUBLE), torch.tensor([3.0], dtype=DOUBLE)
    for loss, log_width in ((gaussian_nll, math.log(9)), (laplace_nll, math.log(3))):
        width = torch.tensor([log_width], dtype=DOUBLE, requires_grad=True)
        (slope,) = torch.autograd.grad(loss(zero, error, width).sum(), width)
        torch.testing.assert_close(slope, zero)
        (wider, narrower) = (loss(zero, error, width + shift).item() for shift in (0.3, -0.3))
        assert min(wider, narrower) > loss(zero, error, width).item()


def test_at_unit_width_the_gradients_are_those_of_half_squared_and_absolute_error(pair):
    predictions, targets = pair
    unit = torch.zeros_like(targets)
    for nll, plain in ((gaussian_nll, half_squared_error), (laplace_nll, absolute_error)):
        torch.testing.assert_close(
            _gradient(nll, predictions, targets, unit), _gradient(plain, predictions, targets)
        )


@point_loss
@pytest.mark.parametrize("extreme", [1e4, -1e4])
def test_an_extreme_prediction_has_a_finite_loss_and_gradient(loss, extreme):
    predictions, targets = torch.tensor([extreme]), torch.zeros(1)
    assert loss(predictions, targets).isfinite().all()
    gradient = _gradient(loss, predictions, targets)
    assert gradient.isfinite().all()
    assert gradient.sign().item() == math.copysign(1, extreme)


def test_an_infinite_error_still_has_a_bounded_slope():
    predictions = torch.tensor([math.inf, -math.inf])
    for loss in (huber, absolute_error, log_cosh):
        assert loss(predictions, torch.zeros(2)).tolist() == [math.inf, math.inf]
        assert _gradient(loss, predictions, torch.zeros(2)).tolist() == [1.0, -1.0]


@density
@pytest.mark.parametrize("log_width", [-80.0, 80.0])
def test_an_extreme_width_has_a_finite_loss_and_gradient(loss, log_width):
    zero, width = torch.zeros(1), torch.tensor([log_width], requires_grad=True)
    value = loss(zero, zero, width)
    (slope,) = torch.autograd.grad(value.sum(), width)
    assert value.isfinite().all() and slope.isfinite().all()


def test_a_log_variance_of_minus_150_does_not_overflow():
    # exp(150) is infinite in float32 and would make a perfect prediction NaN
    zero = torch.zeros(1)
    loss = gaussian_nll(zero, zero, torch.tensor([-150.0]))
    torch.testing.assert_close(loss, torch.tensor([0.5 * (math.log(2 * math.pi) - 150)]))


# errors

WITH_TWO = POINT_LOSSES
WITH_THREE = {
    name: lambda predictions, targets, loss=loss: loss(predictions, targets, torch.zeros(2, 3))
    for name, loss in DENSITIES.items()
}
any_loss = pytest.mark.parametrize(
    "loss", [*WITH_TWO.values(), *WITH_THREE.values()], ids=[*WITH_TWO, *WITH_THREE]
)


@pytest.mark.bad_input
@any_loss
def test_refuses_targets_of_another_shape(loss):
    for shape in [(2, 1), (3,), (2, 4), ()]:
        with pytest.raises(ValueError) as raised:
            loss(torch.zeros(2, 3), torch.zeros(shape))
        assert str(raised.value) == (
            f"targets must have shape (2, 3), the shape of predictions; got {shape}"
        )


@pytest.mark.bad_input
@any_loss
def test_refuses_what_is_not_a_floating_point_tensor(loss):
    with pytest.raises(
        TypeError, match="predictions must be a floating-point tensor; got torch.i"
    ):
        loss(torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 3))
    with pytest.raises(TypeError, match="targets must be a floating-point tensor; got torch.bool"):
        loss(torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool))
    with pytest.raises(TypeError, match="targets must be a torch.Tensor; got float 0.0"):
        loss(torch.zeros(2, 3), 0.0)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("loss", "name"), [(gaussian_nll, "log_variances"), (laplace_nll, "log_scales")]
)
def test_refuses_widths_of_another_shape_or_kind(loss, name):
    with pytest.raises(
        ValueError, match=rf"{name} must have shape \(2, 3\), the shape of predictions; got \(3,\)"
    ):
        loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(3))
    with pytest.raises(TypeError, match=f"{name} must be a floating-point tensor"):
        loss(torch.zeros(2), torch.zeros(2), torch.zeros(2, dtype=torch.long))


@pytest.mark.parametrize("delta", [0.0, -1.0])
def test_refuses_a_huber_width_that_is_not_positive(delta):
    with pytest.raises(ValueError, match=f"delta must be positive; got {delta}"):
        huber(torch.zeros(2), torch.zeros(2), delta=delta)


@pytest.mark.parametrize("quantile", [0.0, 1.0, -0.1, 50.0])
def test_refuses_a_quantile_outside_the_open_unit_interval(quantile):
    with pytest.raises(ValueError, match=rf"quantile must lie in \(0, 1\); got {quantile}"):
        quantile_loss(torch.zeros(2), torch.zeros(2), quantile=quantile)


@pytest.mark.bad_input
def test_refuses_settings_that_are_no_numbers():
    with pytest.raises(TypeError, match="delta must be a real number; got NoneType None"):
        huber(torch.zeros(2), torch.zeros(2), delta=None)
    with pytest.raises(TypeError, match="quantile must be a real number; got str '0.5'"):
        quantile_loss(torch.zeros(2), torch.zeros(2), quantile="0.5")

"""Tests of lmlosses.analysis.dynamics."""

import builtins
import math

import pytest
import torch

from lmlosses import cpu_generator
from lmlosses.analysis.dynamics import (
    best_lr,
    convex_gap,
    distance_rate,
    flow_gap_rate,
    gap_rate,
    gradient_descent_on_quadratic,
    gradient_flow,
    polyak_lojasiewicz_rate,
)
from lmlosses.lab.training import gradient_descent

MU, L = 0.5, 4.0
CONSTANTS = {"smoothness": L, "strong_convexity": MU}
LRS = [0.05, 1 / L, 2 / (MU + L), 1.9 / L]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=cpu_generator(seed), dtype=torch.float64)


def with_eigenvalues(*eigenvalues, seed=0):
    """A symmetric matrix, its eigenvectors in the columns of the second."""
    directions = torch.linalg.qr(draw(len(eigenvalues), len(eigenvalues), seed=seed)).Q
    values = torch.tensor(eigenvalues, dtype=torch.float64)
    return directions * values @ directions.T, directions


def half_form(hessian):
    return lambda w: 0.5 * w @ hessian @ w


def logistic(seed=0):
    """Penalized logistic regression, its minimum, and constants that hold everywhere."""
    features = draw(30, 3, seed=seed)
    signs = draw(30, seed=seed + 100).sign()

    def loss(w):
        margins = signs * (features @ w)
        return torch.nn.functional.softplus(-margins).mean() + 0.5 * MU * w.square().sum()

    smoothness = MU + torch.linalg.eigvalsh(features.T @ features / len(features))[-1].item() / 4
    minimum = gradient_descent(loss, torch.zeros(3).double(), lr=1 / smoothness, steps=150)[-1]
    return loss, minimum, smoothness


# ---- gradient flow


def test_the_flow_on_a_quadratic_decays_exponentially_along_each_eigenvector():
    hessian, directions = with_eigenvalues(0.0, 0.7, 30.0, -0.2)
    start, times = draw(4, seed=1), torch.tensor([0.0, 0.3, 1.0, 2.5]).double()
    flow = gradient_flow(half_form(hessian), start, times, tolerance=1e-10)
    decay = torch.exp(-times[:, None] * torch.tensor([0.0, 0.7, 30.0, -0.2]))
    torch.testing.assert_close(flow.points, decay * (start @ directions) @ directions.T,
                               rtol=0, atol=1e-7)  # fmt: skip
    assert torch.equal(flow.times, times) and not flow.points.requires_grad


def test_the_flow_of_a_quartic_falls_as_one_over_the_root_of_time():
    def quartic(w):
        return w.square().square().sum() / 4

    times = torch.tensor([1.0, 10.0, 1000.0]).double()
    points = gradient_flow(quartic, torch.tensor([[2.0]]).double(), times, tolerance=1e-9).points
    assert points.shape == (3, 1, 1)
    torch.testing.assert_close(points.reshape(3), (0.25 + 2 * times).rsqrt(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("method", ["Radau", "LSODA"])
def test_stiff_solvers_agree_where_curvatures_differ_by_a_million(method):
    hessian = torch.diag(torch.tensor([1e6, 1.0])).double()
    points = gradient_flow(
        half_form(hessian), torch.ones(2).double(), torch.ones(1).double(), method=method
    ).points
    torch.testing.assert_close(points[0], torch.tensor([0.0, math.exp(-1)]).double(),
                               rtol=1e-5, atol=1e-6)  # fmt: skip


def test_descent_with_short_steps_follows_the_flow_with_an_error_as_long_as_the_step():
    loss, _, _ = logistic()
    start = draw(3, seed=3)
    end = gradient_flow(loss, start, torch.ones(1).double()).points[0]
    errors = [
        (gradient_descent(loss, start, lr=1 / steps, steps=steps)[-1] - end).norm()
        for steps in (50, 100)
    ]
    assert errors[1] / errors[0] == pytest.approx(0.5, abs=0.03)


def test_a_path_that_runs_away_in_finite_time_is_an_error():
    with pytest.raises(RuntimeError, match="gradient flow stopped before time 2.0"):
        gradient_flow(lambda w: -w.pow(3).sum() / 3, torch.ones(1).double(), torch.full((1,), 2.0))


def test_at_time_zero_the_flow_is_at_its_start_in_the_dtype_of_the_start():
    points = gradient_flow(lambda w: w.square().sum(), torch.tensor([3.0]), torch.zeros(1)).points
    assert points.dtype == torch.float32 and points.item() == 3


def test_the_flow_names_the_extra_when_scipy_is_missing(monkeypatch):
    original = builtins.__import__

    def without_scipy(name, *args, **kwargs):
        if name.startswith("scipy"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_scipy)
    with pytest.raises(ImportError, match=r"needs SciPy: pip install 'lmlosses\[analysis\]'"):
        gradient_flow(lambda w: w.sum(), torch.ones(1), torch.ones(1))


@pytest.mark.bad_input
def test_the_flow_refuses_times_out_of_order_and_losses_that_are_not_one_number():
    start = torch.ones(2)
    with pytest.raises(ValueError, match=r"times must increase; got \[1.0, 1.0\]"):
        gradient_flow(lambda w: w.sum(), start, torch.ones(2))
    with pytest.raises(ValueError, match="times must not be negative; got -1.0"):
        gradient_flow(lambda w: w.sum(), start, torch.tensor([-1.0, 1.0]))
    with pytest.raises(ValueError, match="times must have at least one entry"):
        gradient_flow(lambda w: w.sum(), start, torch.ones(0))
    with pytest.raises(ValueError, match=r"loss must return one number; got shape \(2,\)"):
        gradient_flow(lambda w: w * 2, start, torch.ones(1))
    with pytest.raises(ValueError, match="tolerance must be positive; got 0.0"):
        gradient_flow(lambda w: w.sum(), start, torch.ones(1), tolerance=0.0)
    with pytest.raises(TypeError, match="start must be a floating-point tensor"):
        gradient_flow(lambda w: w.sum(), torch.ones(2, dtype=torch.long), torch.ones(1))


# ---- the exact solution


@pytest.mark.parametrize("lr", [0.0, 0.01, 0.3, 0.9, 2.0])  # from rest to divergence
def test_the_exact_solution_is_where_iterated_steps_arrive(lr):
    hessian, _ = with_eigenvalues(0.0, 1e-9, 0.4, 1.0, 3.0, -0.3)
    start, linear = draw(6, seed=1), draw(6, seed=2)
    path = gradient_descent(lambda w: 0.5 * w @ hessian @ w - linear @ w, start, lr=lr, steps=20)
    exact = gradient_descent_on_quadratic(hessian, start, torch.arange(21), lr=lr, linear=linear)
    torch.testing.assert_close(exact, path, rtol=1e-9, atol=1e-9)


def test_after_a_million_steps_the_minimum_is_reached():
    hessian, _ = with_eigenvalues(0.01, 1.0, 3.0)
    linear = draw(3, seed=1)
    end = gradient_descent_on_quadratic(
        hessian, draw(3), torch.tensor(10**6), lr=0.5, linear=linear
    )
    assert end.shape == (3,)
    torch.testing.assert_close(end, torch.linalg.solve(hessian, linear), rtol=1e-9, atol=1e-9)


def test_a_nearly_flat_direction_keeps_its_digits():
    # 1 - (1 - 1e-18) is zero in float64, and the step would be lost
    point = gradient_descent_on_quadratic(
        torch.tensor([[1e-17]]).double(), torch.zeros(1).double(), torch.tensor([7]),
        lr=0.1, linear=torch.ones(1).double(),
    )  # fmt: skip
    assert point.item() == pytest.approx(0.7, rel=1e-12)


@pytest.mark.bad_input
def test_the_exact_solution_refuses_what_is_no_quadratic():
    eye, start, steps = torch.eye(2), torch.ones(2), torch.tensor([1])
    with pytest.raises(
        ValueError, match="hessian must be symmetric; got entries that differ by 1"
    ):
        gradient_descent_on_quadratic(torch.ones(2, 2).triu(), start, steps, lr=0.1)
    with pytest.raises(ValueError, match=r"hessian must have shape \(2, 2\)"):
        gradient_descent_on_quadratic(torch.eye(3), start, steps, lr=0.1)
    with pytest.raises(ValueError, match=r"linear must have shape \(2,\)"):
        gradient_descent_on_quadratic(eye, start, steps, lr=0.1, linear=torch.ones(3))
    with pytest.raises(ValueError, match="hessian must be finite; got nan"):
        gradient_descent_on_quadratic(eye * math.nan, start, steps, lr=0.1)
    with pytest.raises(ValueError, match="steps must not be negative; got -1"):
        gradient_descent_on_quadratic(eye, start, -steps, lr=0.1)
    with pytest.raises(ValueError, match="lr must not be negative; got -0.1"):
        gradient_descent_on_quadratic(eye, start, steps, lr=-0.1)
    with pytest.raises(TypeError, match="steps must be an integer tensor; got torch.float32"):
        gradient_descent_on_quadratic(eye, start, steps.float(), lr=0.1)
    with pytest.raises(ValueError, match="start must have at least one entry"):
        gradient_descent_on_quadratic(torch.zeros(0, 0), torch.zeros(0), steps, lr=0.1)


# ---- rates


def worst_factors(loss, minimum, start, *, lr, steps=25):
    """The largest factor of one step in the distance, and that in the loss above its minimum."""
    path = gradient_descent(loss, start, lr=lr, steps=steps)
    distances = (path - minimum).norm(dim=-1)
    gaps = torch.stack([loss(w) for w in path]) - loss(minimum)
    seen = gaps > 1e-9  # beyond, the difference of losses is rounding
    assert seen.sum() > 3
    factors = [(after / before)[seen[1:]] for before, after in
               ((distances[:-1], distances[1:]), (gaps[:-1], gaps[1:]))]  # fmt: skip
    return [factor.max().item() for factor in factors]


@pytest.mark.parametrize("lr", LRS)
def test_rates_bound_every_step_on_random_quadratics(lr):
    for seed in range(5):
        middle = (MU + (L - MU) * torch.rand(3, generator=cpu_generator(seed))).tolist()
        hessian, _ = with_eigenvalues(MU, *middle, L, seed=seed)
        distance, gap = worst_factors(
            half_form(hessian), torch.zeros(5).double(), draw(5, seed=seed), lr=lr
        )
        assert distance <= distance_rate(lr=lr, **CONSTANTS) * (1 + 1e-9)
        assert gap <= gap_rate(lr=lr, **CONSTANTS) * (1 + 1e-9)
        assert gap <= polyak_lojasiewicz_rate(lr=lr, **CONSTANTS) * (1 + 1e-9)


@pytest.mark.parametrize("share", [0.3, 1.0, 1.9])
def test_rates_bound_every_step_of_penalized_logistic_regression(share):
    for seed in range(3):
        loss, minimum, smoothness = logistic(seed)
        lr, constants = share / smoothness, {"smoothness": smoothness, "strong_convexity": MU}
        start = 5 * draw(3, seed=seed + 50)
        distance, gap = worst_factors(loss, minimum, start, lr=lr)
        assert distance <= distance_rate(lr=lr, **constants) * (1 + 1e-6)
        assert gap <= gap_rate(lr=lr, **constants) * (1 + 1e-6)
        assert gap <= polyak_lojasiewicz_rate(lr=lr, **constants) * (1 + 1e-6)


@pytest.mark.parametrize("lr", LRS)
def test_a_quadratic_moves_by_just_the_distance_rate_and_the_gap_rate(lr):
    factors = [
        worst_factors(lambda w, c=c: 0.5 * c * w.square().sum(), torch.zeros(1).double(),
                      torch.full((1,), 1e6).double(), lr=lr)
        for c in (MU, L)
        if abs(1 - lr * c) > 1e-3  # a step that ends at the minimum leaves nothing to divide by
    ]  # fmt: skip
    assert max(f[0] for f in factors) == pytest.approx(distance_rate(lr=lr, **CONSTANTS))
    assert max(f[1] for f in factors) == pytest.approx(gap_rate(lr=lr, **CONSTANTS))


def test_with_a_longer_step_than_two_over_the_smoothness_the_distance_rate_is_above_one():
    assert distance_rate(lr=2 / L, **CONSTANTS) == 1
    assert distance_rate(lr=2.1 / L, **CONSTANTS) > 1


def test_the_best_rate_contracts_by_the_condition_number_minus_one_over_plus_one():
    kappa, lr = L / MU, best_lr(**CONSTANTS)
    best = distance_rate(lr=lr, **CONSTANTS)
    assert best == pytest.approx((kappa - 1) / (kappa + 1))
    assert distance_rate(lr=1 / L, **CONSTANTS) == pytest.approx(1 - 1 / kappa)
    assert all(distance_rate(lr=lr * f, **CONSTANTS) > best for f in (0.9, 0.99, 1.01, 1.1))


def test_the_textbook_s_factor_belongs_to_one_step_size_and_leaves_room_for_its_square():
    factor = polyak_lojasiewicz_rate(lr=1 / L, **CONSTANTS)
    assert factor == pytest.approx(1 - MU / L)
    assert gap_rate(lr=1 / L, **CONSTANTS) == pytest.approx(factor**2)
    # with other steps it fails, on the quadratic of the smallest curvature or of the largest
    assert gap_rate(lr=0.2 / L, **CONSTANTS) > factor
    assert gap_rate(lr=1.99 / L, **CONSTANTS) > factor


def test_the_inequality_alone_is_enough_where_the_loss_is_not_convex():
    # x^2 + 3 sin(x)^2 is concave in places, with mu = 1/32 and L = 8 (Karimi et al., section 2.2)
    def wavy(w):
        return (w.square() + 3 * w.sin().square()).sum()

    for start in torch.linspace(-9, 9, 13).double():
        if start == 0:
            continue
        path = gradient_descent(wavy, start.reshape(1), lr=1 / 8, steps=30)
        gaps = torch.stack([wavy(w) for w in path])
        bound = polyak_lojasiewicz_rate(lr=1 / 8, smoothness=8.0, strong_convexity=1 / 32)
        assert (gaps[1:] <= bound * gaps[:-1] + 1e-15).all()


def test_least_squares_of_any_rank_has_the_smallest_curvature_that_is_not_zero():
    hessian, _ = with_eigenvalues(0.0, 0.0, MU, 1.0, L)
    path = gradient_descent(half_form(hessian), draw(5), lr=1 / L, steps=20)
    gaps = torch.stack([half_form(hessian)(w) for w in path])
    bound = polyak_lojasiewicz_rate(lr=1 / L, **CONSTANTS)
    assert (gaps[1:] <= bound * gaps[:-1] * (1 + 1e-9)).all()


@pytest.mark.parametrize("share", [0.2, 1.0])
@pytest.mark.parametrize("power", [4, 20])
def test_the_convex_bound_holds_for_smooth_losses_that_are_not_strongly_convex(power, share):
    # |x|^p / p near zero, linear beyond one: flat at its minimum
    def flat(w):
        size = w.abs()
        return torch.where(size < 1, size**power / power, 1 / power + size - 1).sum()

    smoothness = power - 1.0
    lr = share / smoothness
    for start in (0.9, 1.0, 2.0, 10.0):
        path = gradient_descent(flat, torch.tensor([start]).double(), lr=lr, steps=60)
        for k, w in enumerate(path):
            bound = convex_gap(k, lr=lr, smoothness=smoothness, distance=start)
            assert flat(w) <= bound * (1 + 1e-9)


@pytest.mark.parametrize("lr", [0.4 / L, 1 / L])
@pytest.mark.parametrize("steps", [0, 1, 7, 40])
def test_the_convex_bound_is_attained_by_a_loss_that_is_linear_far_out(steps, lr):
    distance = 3.0
    knee = distance / (1 + 2 * steps * lr * L)

    def huber(w):
        size = w.abs()
        return torch.where(size < knee, L / 2 * size**2, L * knee * (size - knee / 2)).sum()

    end = gradient_descent(huber, torch.tensor([distance]).double(), lr=lr, steps=steps)[-1]
    bound = convex_gap(steps, lr=lr, smoothness=L, distance=distance)
    assert huber(end).item() == pytest.approx(bound, rel=1e-9)
    if steps:
        assert bound < distance**2 / (2 * steps * lr)


def test_the_flow_falls_at_least_as_fast_as_its_rate_and_just_so_along_the_flattest_direction():
    hessian, directions = with_eigenvalues(MU, 1.0, L)
    loss, times = half_form(hessian), torch.tensor([0.5, 2.0]).double()
    for start, tight in ((draw(3), False), (directions[:, 0], True)):
        for time, point in zip(*gradient_flow(loss, start, times), strict=True):
            share = (loss(point) / loss(start)).item()
            bound = flow_gap_rate(time.item(), strong_convexity=MU)
            assert share == pytest.approx(bound, rel=1e-6) if tight else share < bound


@pytest.mark.bad_input
def test_rates_refuse_steps_and_constants_for_which_they_say_nothing():
    with pytest.raises(ValueError, match="lr must be at most 0.5, 2 / smoothness; got 0.6"):
        gap_rate(lr=0.6, **CONSTANTS)
    with pytest.raises(ValueError, match="lr must be at most 0.5, 2 / smoothness; got 0.6"):
        polyak_lojasiewicz_rate(lr=0.6, **CONSTANTS)
    with pytest.raises(ValueError, match="lr must be at most 0.25, 1 / smoothness; got 0.3"):
        convex_gap(1, lr=0.3, smoothness=L, distance=1.0)
    with pytest.raises(ValueError, match="strong_convexity must be at most smoothness, 1.0"):
        best_lr(smoothness=1.0, strong_convexity=2.0)
    with pytest.raises(ValueError, match="strong_convexity must be positive; got 0.0"):
        distance_rate(lr=0.1, smoothness=1.0, strong_convexity=0.0)
    with pytest.raises(ValueError, match="smoothness must be positive; got 0.0"):
        gap_rate(lr=0.1, smoothness=0.0, strong_convexity=0.0)
    with pytest.raises(ValueError, match="steps must not be negative; got -1"):
        convex_gap(-1, lr=0.1, smoothness=1.0, distance=1.0)
    with pytest.raises(TypeError, match="steps must be a whole number; got float 1.5"):
        convex_gap(1.5, lr=0.1, smoothness=1.0, distance=1.0)
    with pytest.raises(ValueError, match="time must not be negative; got -1.0"):
        flow_gap_rate(-1.0, strong_convexity=1.0)

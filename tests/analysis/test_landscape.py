"""Tests of lmlosses.analysis.landscape."""

import pytest
import torch

from lmlosses import cpu_generator
from lmlosses.analysis.landscape import (
    convexity_gap,
    gradient_noise_scale,
    loss_plane,
    loss_slice,
    smoothness,
    strong_convexity,
)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=cpu_generator(seed), dtype=torch.float64)


def quadratic(eigenvalues):
    """A rotated quadratic in two parameters."""
    eigenvalues = torch.as_tensor(eigenvalues, dtype=torch.float64)
    rotation = torch.linalg.qr(draw(len(eigenvalues), len(eigenvalues))).Q
    matrix = rotation @ eigenvalues.diag() @ rotation.T
    params = [draw(2, 1, seed=1).requires_grad_(), draw(len(matrix) - 2, seed=2).requires_grad_()]

    def loss():
        w = torch.cat([param.flatten() for param in params])
        return 0.5 * w @ matrix @ w

    return loss, params, matrix


def directions(params, seed=7):
    return [draw(*param.shape, seed=seed + index) for index, param in enumerate(params)]


TICKS = torch.tensor([-2.0, -0.5, 0.0, 1.5], dtype=torch.float64)


# ---- slices


def test_a_slice_of_a_quadratic_is_a_parabola():
    loss, params, matrix = quadratic([1.0, 2.0, 5.0, -3.0])
    direction = directions(params)
    w, u = (torch.cat([t.detach().flatten() for t in each]) for each in (params, direction))
    expected = torch.stack([0.5 * (w + t * u) @ matrix @ (w + t * u) for t in TICKS])
    torch.testing.assert_close(loss_slice(loss, params, direction, TICKS), expected)


def test_a_plane_has_the_slices_in_it():
    loss, params, _ = quadratic([1.0, 2.0, 5.0, -3.0])
    first, second = directions(params), directions(params, seed=20)
    plane = loss_plane(loss, params, first, second, TICKS, TICKS[1:])
    assert plane.shape == (4, 3)
    torch.testing.assert_close(plane[:, 1], loss_slice(loss, params, first, TICKS))
    torch.testing.assert_close(plane[2], loss_slice(loss, params, second, TICKS[1:]))
    diagonal = [u + v for u, v in zip(first, second, strict=True)]
    torch.testing.assert_close(plane[3, 2], loss_slice(loss, params, diagonal, TICKS[3:])[0])


def every_use(loss, params):
    """Each function that moves the parameters."""
    u = directions(params)
    return [
        lambda: loss_slice(loss, params, u, TICKS),
        lambda: loss_plane(loss, params, u, u, TICKS, TICKS),
        lambda: convexity_gap(loss, params, u, u, TICKS.abs() / 2),
        lambda: smoothness(loss, params, radius=0.1, samples=3),
        lambda: strong_convexity(loss, params, radius=0.1, samples=3),
    ]


@pytest.mark.parametrize("use", range(5))
def test_parameters_come_back_to_the_bit(use):
    loss, params, _ = quadratic([1.0, 2.0, 5.0, 3.0])
    before = [param.detach().clone() for param in params]
    every_use(loss, params)[use]()
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))
    assert all(param.requires_grad and param.grad is None for param in params)


@pytest.mark.parametrize("use", range(5))
def test_parameters_come_back_to_the_bit_after_an_error_in_the_loss(use):
    loss, params, _ = quadratic([1.0, 2.0, 5.0, 3.0])
    before = [param.detach().clone() for param in params]
    moved = []

    def failing():
        if not torch.equal(params[0], before[0]):
            moved.append(True)
            raise RuntimeError("no luck")
        return loss()

    with pytest.raises(RuntimeError, match="no luck"):
        every_use(failing, params)[use]()
    assert moved
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))


def test_slices_carry_no_graph_and_take_parameters_without_gradient():
    w = torch.ones(2)
    with torch.no_grad():
        found = loss_slice(lambda: w.sum(), [w], [torch.ones(2)], torch.tensor([0.0, 1.0]))
    assert found.tolist() == [2.0, 4.0] and not found.requires_grad
    empty = loss_slice(lambda: w.sum(), [w], [torch.ones(2)], torch.tensor([]))
    assert empty.shape == (0,)


def test_a_slice_shows_where_the_loss_is_nan():
    w = torch.zeros(1)
    found = loss_slice(lambda: w.sqrt().sum(), [w], [torch.ones(1)], torch.tensor([-1.0, 4.0]))
    assert found.isnan().tolist() == [True, False] and found[1] == 2


def test_the_parameters_themselves_can_be_a_direction_or_a_point():
    loss, params, _ = quadratic([1.0, 2.0, 5.0, -3.0])
    here, half = loss().detach(), torch.tensor([0.5, 1.0], dtype=torch.float64)
    found = loss_slice(loss, params, params, half)  # a quadratic grows with the square
    torch.testing.assert_close(found, here * torch.tensor([2.25, 4.0]).double())
    away = [torch.zeros_like(param) for param in params]
    torch.testing.assert_close(
        convexity_gap(loss, params, params, away, half), here * torch.tensor([0.25, 0.0]).double()
    )


# ---- convexity


def test_the_gap_of_a_quadratic_is_half_its_curvature_times_both_shares():
    loss, params, matrix = quadratic([1.0, 2.0, 5.0, -3.0])
    start, end = directions(params), directions(params, seed=20)
    a, b = (torch.cat([t.flatten() for t in each]) for each in (start, end))
    shares = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    expected = 0.5 * shares * (1 - shares) * ((a - b) @ matrix @ (a - b))
    found = convexity_gap(loss, params, start, end, shares)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_cross_entropy_is_convex_in_the_logits_and_squared_error_of_a_sigmoid_is_not():
    w = torch.zeros(3, dtype=torch.float64)
    shares = torch.linspace(0, 1, 11, dtype=torch.float64)
    start = [torch.tensor([4.0, -4.0, 0.0]).double()]
    end = [torch.tensor([-4.0, 4.0, 0.0]).double()]
    gap = convexity_gap(lambda: -w.log_softmax(0)[1], [w], start, end, shares)
    assert (gap >= -1e-12).all() and gap.max() > 1
    far, near = [torch.full((3,), -8.0).double()], [torch.zeros(3).double()]
    gap = convexity_gap(lambda: (w.sigmoid() - 1).square().sum(), [w], far, near, shares)
    assert gap.min() < -0.1


def test_a_quadratic_has_its_constants_everywhere():
    loss, params, _ = quadratic([0.5, 2.0, 5.0, 3.0])
    assert smoothness(loss, params, radius=3.0, samples=2) == pytest.approx(5.0)
    assert strong_convexity(loss, params, radius=3.0, samples=2) == pytest.approx(0.5)


def test_smoothness_counts_negative_curvature_and_convexity_reports_it():
    loss, params, _ = quadratic([0.5, 2.0, 3.0, -7.0])
    assert smoothness(loss, params, radius=1.0, samples=1) == pytest.approx(7.0)
    assert strong_convexity(loss, params, radius=1.0, samples=1) == pytest.approx(-7.0)


def test_sampled_constants_bound_the_true_ones_and_reach_them_with_the_samples():
    w = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    # the second derivative is w^2: between 0 and 4 in the ball of radius 2
    loss = lambda: (w**4).sum() / 12  # noqa: E731
    few = smoothness(loss, [w], radius=2.0, samples=1)
    many = smoothness(loss, [w], radius=2.0, samples=60, generator=cpu_generator(0))
    assert few == 0 and 3.5 < many <= 4
    w.data.fill_(3.0)  # now between 1 and 25
    least = strong_convexity(loss, [w], radius=2.0, samples=60, generator=cpu_generator(0))
    assert 1 <= least < 1.5


def test_points_are_uniform_in_the_ball():
    w = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    seen = []

    def loss():
        seen.append(w.detach().norm().item())
        return w.square().sum()

    smoothness(loss, [w], radius=2.0, samples=301, generator=cpu_generator(0))
    assert seen[0] == 0 and max(seen) <= 2
    # in a disk the squared distance is uniform: mean 2, standard error 0.07
    assert torch.tensor(seen[1:]).square().mean().item() == pytest.approx(2.0, abs=0.25)


def test_slices_and_gaps_run_without_reading_the_device():
    w, ticks = torch.zeros(3, device="meta"), torch.linspace(0, 1, 4, device="meta")
    u = [torch.ones(3, device="meta")]
    assert loss_plane(lambda: w.sum(), [w], u, u, ticks, ticks).shape == (4, 4)
    assert convexity_gap(lambda: w.sum(), [w], u, u, ticks).shape == (4,)


def test_shares_beyond_the_chord_are_refused():
    w = torch.zeros(1)
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"shares must lie in \[0, 1\]; got \["):
            convexity_gap(lambda: w.sum(), [w], [w], [w], torch.tensor([0.5, share]))


# ---- gradient noise


def noisy_batches(w, samples, batch_size):
    """Linear losses whose gradients are the rows' means."""
    return [lambda rows=rows: (rows.mean(0) * w).sum() for rows in samples.split(batch_size)]


def test_two_batches_of_one_by_hand():
    w = torch.zeros(1, requires_grad=True)
    found = gradient_noise_scale([lambda: 3 * w.sum(), lambda: 5 * w.sum()], [w], batch_size=1)
    # variance of 3 and 5 with one degree of freedom: 2; and 4^2 - 2 / 2 = 15
    assert (found.noise, found.signal) == (2.0, 15.0)
    torch.testing.assert_close(found.value, torch.tensor(2 / 15))


def test_noise_of_batches_of_one_is_the_trace_of_the_sample_covariance():
    w = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    samples = draw(30, 4) + 1
    found = gradient_noise_scale(noisy_batches(w, samples, 1), [w], batch_size=1)
    torch.testing.assert_close(found.noise, samples.T.cov().trace())
    torch.testing.assert_close(
        found.signal, samples.mean(0).square().sum() - samples.T.cov().trace() / 30
    )


@pytest.mark.parametrize("batch_size", [1, 5])
def test_both_parts_are_unbiased_whatever_the_batch(batch_size):
    w = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    runs = []
    for seed in range(300):
        samples = 2 * draw(2 * batch_size, 2, seed=seed) + torch.tensor([1.0, 0.5])
        runs.append(
            gradient_noise_scale(noisy_batches(w, samples, batch_size), [w], batch_size=batch_size)
        )
    for part, truth in (("noise", 8.0), ("signal", 1.25)):
        values = torch.stack([getattr(run, part) for run in runs])
        error = values.std() / 300**0.5
        assert abs(values.mean() - truth) < 3 * error
        assert error < (0.6 if part == "noise" else 0.4)


def test_gradient_noise_runs_without_reading_the_device():
    w = torch.zeros(3, device="meta", requires_grad=True)
    found = gradient_noise_scale([lambda: w.sum(), lambda: w.sum()], [w], batch_size=2)
    assert found.value.device.type == "meta"


# ---- bad input


@pytest.fixture
def w():
    return torch.ones(2, requires_grad=True)


def test_settings_out_of_range_are_refused(w):
    loss = lambda: w.square().sum()  # noqa: E731
    with pytest.raises(ValueError, match="radius must be positive"):
        smoothness(loss, [w], radius=0.0)
    with pytest.raises(ValueError, match="samples must be at least 1; got 0"):
        strong_convexity(loss, [w], radius=1.0, samples=0)
    with pytest.raises(ValueError, match="batch_size must be at least 1; got 0"):
        gradient_noise_scale([loss, loss], [w], batch_size=0)
    with pytest.raises(ValueError, match="losses must hold at least two batches; got 1"):
        gradient_noise_scale([loss], [w], batch_size=1)


def test_tensors_that_do_not_fit_are_refused(w):
    loss = lambda: w.square().sum()  # noqa: E731
    ticks, u = torch.zeros(2), [torch.ones(2)]
    with pytest.raises(ValueError, match=r"direction\[0\] must have shape \(2,\)"):
        loss_slice(loss, [w], [torch.ones(3)], ticks)
    with pytest.raises(ValueError, match=r"second\[0\] must have shape \(2,\)"):
        loss_plane(loss, [w], u, [torch.ones(3)], ticks, ticks)
    with pytest.raises(ValueError, match=r"end must be a list of 1 tensors.*got 0"):
        convexity_gap(loss, [w], u, [], ticks)


@pytest.mark.bad_input
def test_distances_have_one_axis_and_are_numbers(w):
    loss, u = (lambda: w.square().sum()), [torch.ones(2)]
    with pytest.raises(ValueError, match=r"distances must have 1 axes; got shape \(2, 2\)"):
        loss_slice(loss, [w], u, torch.zeros(2, 2))
    with pytest.raises(TypeError, match="distances must be a floating-point tensor"):
        loss_slice(loss, [w], u, torch.zeros(2, dtype=torch.long))
    with pytest.raises(TypeError, match="shares must be a floating-point tensor"):
        convexity_gap(loss, [w], u, u, torch.zeros(2, dtype=torch.long))


def test_losses_that_are_no_single_number_are_refused_and_nothing_stays_moved(w):
    with pytest.raises(ValueError, match=r"loss must return one number"):
        loss_slice(lambda: w, [w], [torch.ones(2)], torch.ones(1))
    assert w.tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match="loss must depend on .*got a constant"):
        gradient_noise_scale([lambda: torch.ones(()), lambda: w.sum()], [w], batch_size=1)


def test_parameters_that_cannot_be_moved_or_differentiated_are_refused(w):
    with pytest.raises(TypeError, match=r"params\[0\] must be a floating-point tensor"):
        loss_slice(lambda: w.sum(), [torch.ones(2).long()], [torch.ones(2)], torch.ones(1))
    with pytest.raises(ValueError, match=r"params\[0\] must require a gradient"):
        smoothness(lambda: w.sum(), [torch.ones(2)], radius=1.0)
    with pytest.raises(ValueError, match="params must hold at least one entry"):
        gradient_noise_scale([lambda: w.sum()] * 2, [], batch_size=1)

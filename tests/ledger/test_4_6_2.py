"""What section 4.6.2 says about descent, schedules and adaptive methods, held to numbers."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lmlosses.analysis.curvature import hessian
from lmlosses.analysis.dynamics import (
    best_lr,
    distance_rate,
    flow_gap_rate,
    gap_rate,
    gradient_descent_on_quadratic,
    gradient_flow,
    polyak_lojasiewicz_rate,
)
from lmlosses.analysis.landscape import smoothness
from lmlosses.lab.models import rotary
from lmlosses.lab.paths import fewest_steps, follow, optimizer_path, valley
from lmlosses.lab.streaming import expected_losses
from lmlosses.lab.training import gradient_descent
from lmlosses.optim import SGD, Adagrad, Adam, RMSprop
from lmlosses.schedules import as_scheduler, cosine, linear, step_decay, warmup

assert_close = torch.testing.assert_close
THREE = (-2.0, 1.0, 1.0)
"""Half the mean squared distance to these has its only critical point, the minimum, at 0."""


def f64(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def weight(*numbers: float) -> torch.nn.Parameter:
    return torch.nn.Parameter(f64(*numbers))


def bent(w: Tensor) -> Tensor:
    """Not a quadratic: its slope is sinh(w) + w."""
    return (w.cosh() + w.square() / 2).sum()


def adam_by_hand(
    gradients: Callable[[float, int], float],
    rate: Callable[[int], float],
    beta1: float,
    beta2: float,
    *,
    steps: int,
    bound: float = math.inf,
    correct: bool = True,
) -> list[float]:
    """(4.6.14) and (4.6.15) in plain numbers, from zero; steps count from 1."""
    w, m, v, path = 0.0, 0.0, 0.0, [0.0]
    for t in range(1, steps + 1):
        g = gradients(w, t)
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        m_hat, v_hat = (m / (1 - beta1**t), v / (1 - beta2**t)) if correct else (m, v)
        w = w - rate(t) * m_hat / (math.sqrt(v_hat) + 1e-8)
        w = max(-bound, min(bound, w))
        path.append(w)
    return path


# ---- flow and descent


def test_def_4_6_4():
    """Short steps of descent come to the flow, at half the distance for half the step."""
    end = gradient_flow(bent, f64(1.5, -0.7), f64(0.5)).points[0]
    distances = []
    for steps in (100, 200, 400):
        w = [1.5, -0.7]
        for _ in range(steps):
            w = [a - 0.5 / steps * (math.sinh(a) + a) for a in w]
        distances.append((f64(*w) - end).norm().item())
    assert distances[-1] < 1e-3
    for coarse, fine in zip(distances, distances[1:], strict=False):
        assert 1.9 < coarse / fine < 2.1


def test_eq_4_6_6():
    """The path's own slope, by central differences, is minus the gradient."""
    times = torch.linspace(0.1, 1, 10, dtype=torch.float64)
    near = torch.stack([times - 1e-3, times, times + 1e-3], dim=1).flatten()
    points = gradient_flow(bent, f64(1.5, -0.7), near, tolerance=1e-11).points.reshape(10, 3, 2)
    assert 0.9 < points[0, 0, 0] < 1.3
    slope = (points[:, 2] - points[:, 0]) / 2e-3
    assert_close(slope, -(points[:, 1].sinh() + points[:, 1]), rtol=1e-4, atol=1e-5)


def test_claim_4_6_mse_flow():
    """The printed right-hand side, as a sum over samples, drives the same path."""
    x, y = normal(7, 3), normal(7, seed=1)

    def printed(w: list[float]) -> list[float]:
        errors = [
            b - sum(p * q for p, q in zip(a, w, strict=True))
            for a, b in zip(x.tolist(), y.tolist(), strict=True)
        ]
        return [
            sum(e * a[i] for e, a in zip(errors, x.tolist(), strict=True)) / 7 for i in (0, 1, 2)
        ]

    w, h = [0.3, -0.2, 0.5], 0.01
    for _ in range(50):  # the midpoint rule
        half = [a + h / 2 * s for a, s in zip(w, printed(w), strict=True)]
        w = [a + h * s for a, s in zip(w, printed(half), strict=True)]
    loss = lambda w: (y - x @ w).square().mean() / 2  # noqa: E731
    path = gradient_flow(loss, f64(0.3, -0.2, 0.5), f64(0.5))
    assert_close(path.points[0], f64(*w), rtol=1e-5, atol=1e-5)


def test_claim_4_6_mse_flow_speed():
    """Along each eigenvector of X'X/N the error decays at the eigenvalue's rate."""
    x, best = normal(7, 3), f64(1, -2, 0.5)
    eigenvalues, directions = torch.linalg.eigh(x.T @ x / 7)
    loss = lambda w: (x @ (best - w)).square().mean() / 2  # noqa: E731
    end = gradient_flow(loss, torch.zeros(3, dtype=torch.float64), f64(2.0)).points[0]
    expected = directions.T @ -best * torch.exp(-2.0 * eigenvalues)
    assert_close(directions.T @ (end - best), expected, rtol=1e-5, atol=1e-6)
    # the slowest of them governs, in the loss twice as fast
    slowest = directions[:, 0] + best
    after = gradient_flow(loss, slowest, f64(2.0)).points[0]
    share = (loss(after) / loss(slowest)).item()
    mu = eigenvalues[0].item()
    assert abs(flow_gap_rate(2.0, strong_convexity=mu) - share) < 1e-6
    assert abs(math.exp(-4 * mu) - share) < 1e-6


def test_eq_4_6_7():
    """Five steps by hand on a quadratic, by the optimizer, and by the closed form."""
    h = f64(2, 0.3, 0.3, 0.5).reshape(2, 2)
    w, path = [1.0, -3.0], []
    for _ in range(5):
        slope = [2 * w[0] + 0.3 * w[1], 0.3 * w[0] + 0.5 * w[1]]
        w = [a - 0.4 * s for a, s in zip(w, slope, strict=True)]
        path.append(w)
    by_hand = torch.tensor(path, dtype=torch.float64)
    taken = follow(SGD([weight(1.0, -3.0)], lr=0.4), lambda w, t: h @ w, steps=5)[1:]
    assert_close(taken, by_hand)
    known = gradient_descent_on_quadratic(h, f64(1.0, -3.0), torch.arange(1, 6), lr=0.4)
    assert_close(known, by_hand)


def test_claim_4_6_discretization_error():
    """At w = 1 and in time 1, the flow of w²/2 is at 1/e; descent is behind by e⁻¹η/2."""
    bowl = lambda w: w.square().sum() / 2  # noqa: E731
    flow = gradient_flow(bowl, f64(1.0), f64(1.0)).points[0].item()
    assert abs(flow - math.exp(-1)) < 1e-6
    for steps in (10, 100):
        end = gradient_descent(bowl, f64(1.0), lr=1 / steps, steps=steps)[-1].item()
        assert abs(end - (1 - 1 / steps) ** steps) < 1e-12
        assert 0.9 < (flow - end) * 2 * steps / math.exp(-1) < 1.15


def test_claim_4_6_step_size_stability():
    """Curvature 4: smooth up to 1/4, oscillating to 1/2, at 1/2 for ever, diverging beyond."""
    steps = torch.arange(21)
    curve = lambda lr: gradient_descent_on_quadratic(  # noqa: E731
        f64(4.0).reshape(1, 1), f64(1.0), steps, lr=lr
    )[:, 0]
    smooth, oscillating, cycling, growing = map(curve, (0.2, 0.4, 0.5, 0.55))
    assert (smooth > 0).all() and abs(smooth[1] - 0.2) < 1e-12
    assert (oscillating[1:] * oscillating[:-1] < 0).all() and oscillating[-1].abs() < 1e-4
    assert_close(cycling, (-1.0) ** steps.double())
    assert_close(growing, (-1.2) ** steps.double())


# ---- the rate


def test_eq_4_6_8():
    """mu = 1, L = 4. Inside: steps from 0.134 to 0.466. Outside: shorter, and longer, ones. The
    bound is above what happens at 1/L, where the factor is its square."""
    printed = 1 - 1 / 4
    quadratic = torch.diag(f64(1, 4))

    def worst(lr: float, steps: int = 60) -> float:
        """The loss's factor a step in the long run, from a start with both directions."""
        at = torch.tensor([0, steps])
        points = gradient_descent_on_quadratic(quadratic, f64(1, 1), at, lr=lr)
        assert points[0].tolist() == [1, 1]
        gaps = (points.square() @ f64(1, 4)) / 2
        return (gaps[1] / gaps[0]).item() ** (1 / steps)

    lower, upper = (1 - math.sqrt(printed)) / 1, (1 + math.sqrt(printed)) / 4
    assert abs(lower - 0.134) < 1e-3 and abs(upper - 0.4665) < 1e-3
    for lr, inside in ((0.1, False), (0.15, True), (0.25, True), (0.46, True), (0.49, False)):
        assert (worst(lr) <= printed) == inside
        tight = gap_rate(lr=lr, smoothness=4, strong_convexity=1)
        assert abs(tight - max((1 - lr) ** 2, (1 - 4 * lr) ** 2)) < 1e-12
        assert tight * 0.95 < worst(lr) <= tight
    assert worst(0.6) > 1.5
    assert abs(worst(0.25, steps=400) - printed**2) < 4e-3
    # without strong convexity, with the inequality of Polyak and Łojasiewicz, it is as printed
    assert polyak_lojasiewicz_rate(lr=0.25, smoothness=4, strong_convexity=1) == printed


def test_claim_4_6_lipschitz_loss():
    """w²/2: no Lipschitz constant on the line; on |w| ≤ 1/2 it is 1/2, and the factor is -1."""
    slopes = [abs((b * b - a * a) / 2 / (b - a)) for a, b in ((0, 1), (10, 11), (1000, 1001))]
    assert slopes == [0.5, 10.5, 1000.5]
    mu, of_the_loss = 1.0, 0.5
    printed = 1 - mu / of_the_loss
    gap = lambda w: w * w / 2  # noqa: E731
    assert gap(0.4 - 0.1 * 0.4) > printed * gap(0.4)  # a gap is never negative
    w = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    bend = smoothness(lambda: bent(w), [w], radius=1e-3)  # the slope's, sinh(w) + w
    assert abs(bend - 2) < 1e-4
    steep = smoothness(lambda: w.square().sum() / 2, [w], radius=0.5)
    corrected = gap_rate(lr=0.5, smoothness=steep, strong_convexity=mu)
    assert abs(corrected - gap(0.4 - 0.5 * 0.4) / gap(0.4)) < 1e-9


def test_claim_4_6_condition_number():
    """L = 1 and three mu: the printed order's ratio grows, and the descent gets faster."""
    ratios, kappas, factors = [], [], []
    for mu in (0.01, 0.1, 0.5):
        lr = best_lr(smoothness=1.0, strong_convexity=mu)
        assert abs(lr - 2 / (1 + mu)) < 1e-12
        factor = distance_rate(lr=lr, smoothness=1.0, strong_convexity=mu)
        assert abs(factor - (1 - mu) / (1 + mu)) < 1e-12
        ratios.append(mu), kappas.append(1 / mu), factors.append(factor)
    faster = sorted(factors, reverse=True) == factors
    assert faster and sorted(ratios) == ratios and sorted(kappas, reverse=True) == kappas
    # a start on one axis alone is faster than the bound
    along = abs(1 - best_lr(smoothness=1.0, strong_convexity=0.01) * 0.5)
    assert along < 0.02 < factors[0]


# ---- schedules


def test_def_4_6_5():
    """Under a constant gradient of 1 the steps taken are the function's values."""
    point = weight(0.0)
    optimizer = torch.optim.SGD([point], lr=2.0)
    values = [1.0, 0.75, 0.5, 0.25, 0.0]
    scheduler = as_scheduler(optimizer, linear(total_steps=4))
    places = [0.0]
    for _ in values:
        point.grad = f64(1.0)
        optimizer.step()
        scheduler.step()
        places.append(point.item())
    steps = [a - b for a, b in zip(places, places[1:], strict=False)]
    assert steps == [2 * value for value in values]


def test_eq_4_6_9():
    """Counted stair by stair."""
    schedule, rate = step_decay(peak=0.3, gamma=0.5, step_size=4), 0.3
    for t in range(20):
        if t > 0 and t % 4 == 0:
            rate *= 0.5
        assert abs(schedule(t) - rate) < 1e-12
        assert abs(rate - 0.3 * 0.5 ** math.floor(t / 4)) < 1e-12


def test_eq_4_6_10():
    """Inside the run: one curve. Outside: the printed one climbs back, ours stays."""
    printed = lambda t: 0.1 + (1 - 0.1) / 2 * (1 + math.cos(math.pi * t / 40))  # noqa: E731
    schedule = cosine(start=1.0, end=0.1, total_steps=40)
    assert all(abs(schedule(t) - printed(t)) < 1e-12 for t in range(41))
    assert abs(printed(80) - 1.0) < 1e-12 and abs(schedule(80) - 0.1) < 1e-12
    assert printed(39) > 0.101  # the last step of forty, numbered from 0


def test_eq_4_6_11():
    """Inside: steps counted from 1. Outside: step 0 does not move; no steps divides by zero."""
    printed = lambda t, w: 0.2 * min(1, t / w)  # noqa: E731
    from_zero = warmup(peak=0.2, warmup_steps=5, start=0.0)
    ours = warmup(peak=0.2, warmup_steps=5)
    assert all(abs(from_zero(t) - printed(t, 5)) < 1e-12 for t in range(12))
    path = follow(SGD([weight(1.0)]), lambda w, t: w, steps=3, lr=from_zero)[:, 0]
    assert path[1] == path[0] != path[2]
    assert [round(ours(t), 9) for t in (0, 4, 5)] == [round(0.2 * k / 6, 9) for k in (1, 5, 6)]
    try:
        printed(0, 0)
        raise AssertionError("0/0 has a value")
    except ZeroDivisionError:
        assert warmup(peak=0.2, warmup_steps=0)(0) == 0.2


def test_claim_4_6_warmup_region():
    """Inside: w⁴/4 from 3, flat where it ends. Outside: a quadratic, and a log-cosh,
    most curved at the end."""
    rates = warmup(peak=0.5, warmup_steps=20)
    by_hand = 3.0
    for t in range(61):
        by_hand -= 0.5 * min(1, (t + 1) / 21) * by_hand**3
    descend = lambda slope, start, lr, steps=61: follow(  # noqa: E731
        SGD([weight(start)]), lambda w, t: slope(w), steps=steps, lr=lr
    )[-1].item()
    warmed = descend(lambda w: w**3, 3.0, rates)
    assert abs(warmed - by_hand) < 1e-9 and 0 < warmed < 0.2
    assert abs(descend(lambda w: w**3, 3.0, lambda t: 0.5, 3)) > 1e6
    quadratic = [descend(lambda w: w, 3.0, lr) for lr in (rates, lambda t: 0.5)]
    assert 0 < quadratic[1] < quadratic[0] / 100
    # flat far out and of curvature 32 at the minimum: the peak, once reached, is too high there
    ends = [descend(lambda w: 4 * (8 * w).tanh(), 3.0, lr) for lr in (rates, lambda t: 0.5)]
    assert min(abs(end) for end in ends) > 0.5


def test_claim_4_6_position_warmup():
    """Scores of four offsets; the right one is the first. Outside: short steps, where with and
    without a warmup the same sum of rates is the same point. Inside: w⁴/4 trained with them."""
    right = f64(1, 0, 0, 0)
    slope = lambda w, power: torch.cat([  # noqa: E731
        (a := w[:4].softmax(dim=0)) * ((a - right) - a @ (a - right)), w[4:] ** power
    ])  # fmt: skip
    path = lambda rate, start, steps, power=1: follow(  # noqa: E731
        SGD([weight(0.0, 0.0, 0.0, 0.0, start)]),
        lambda w, t: slope(w, power),
        steps=steps,
        lr=rate,
    )
    rates = warmup(peak=0.1, warmup_steps=200)
    total = sum(0.1 * min(1, (t + 1) / 201) for t in range(300))
    warm = path(rates, 0.0, 300)[-1]
    constant = path(lambda t: total / 300, 0.0, 300)[-1]
    assert constant[0] > 1 and (warm - constant).norm() < 0.01 * constant.norm()
    first = path(rates, 0.0, 100)[-1], path(lambda t: 0.1, 0.0, 100)[-1]
    assert first[0][0] < 0.5 * first[1][0]  # it only comes later
    saved = path(warmup(peak=0.5, warmup_steps=20), 3.0, 100, 3)[-1]
    lost = path(lambda t: 0.5, 3.0, 3, 3)[-1]
    assert saved.isfinite().all() and saved[0] > 1 and lost[4].abs() > 1e6


def test_claim_4_6_later_larger_rate():
    """Inside: no noise, a larger late rate is faster. Outside: noise, it ends higher."""
    one, ends = torch.ones(1, dtype=torch.float64), {}
    for noise in (0.0, 4.0):
        for late in (0.05, 0.5):
            rates = torch.full((120,), 0.2, dtype=torch.float64)
            rates[60:] = late
            ends[noise, late] = expected_losses(rates, one, batch=4, noise=noise)[-1].item()
            square = 1.0  # of the error, by the recursion
            for rate in rates.tolist():
                kept = 1 - 2 * rate + rate**2 * 1.5
                square = kept * square + rate**2 / 4 * noise
            assert abs(ends[noise, late] - square / 2) < 1e-9
    assert ends[0.0, 0.5] < ends[0.0, 0.05] / 1e6
    assert ends[4.0, 0.5] > 5 * ends[4.0, 0.05]
    # a fixed rate's floor, from the recursion's fixed point
    assert abs(ends[4.0, 0.5] - 0.5 * 0.25 / (2 * 0.5 - 0.25 * 1.5)) < 1e-6


def scores(queries: Tensor, keys: Tensor) -> Tensor:
    return rotary(queries) @ rotary(keys).T


def test_claim_4_6_rope_invariance():
    """A linear map that plain scores do not notice changes RoPE's. A shift does not."""
    q, k, a = normal(5, 4), normal(5, 4, seed=1), normal(4, 4, seed=2)
    mapped = q @ a.T, k @ torch.linalg.inv(a)
    assert_close(mapped[0] @ mapped[1].T, q @ k.T)
    assert (scores(*mapped) - scores(q, k)).abs().max() > 1
    shifted = rotary(q, offset=7) @ rotary(k, offset=7).T
    assert_close(shifted, scores(q, k))
    assert_close(rotary(q).norm(dim=-1), q.norm(dim=-1))
    # a rotation of both planes commutes with it
    turn = torch.eye(4, dtype=torch.float64)
    for i, angle in ((0, 0.3), (2, 1.1)):
        c, d = math.cos(angle), math.sin(angle)
        turn[i : i + 2, i : i + 2] = f64(c, -d, d, c).reshape(2, 2)
    assert_close(scores(q @ turn.T, k @ turn.T), scores(q, k))
    by_hand = complex(*q[2, :2]) * complex(math.cos(2), math.sin(2))
    assert_close(rotary(q)[2, :2], f64(by_hand.real, by_hand.imag))


def test_claim_4_6_rope_larger_rate():
    """Curvature of one head at its own outputs, with RoPE over without: 0.27 and 2.8."""

    def attend(x: Tensor, wq: Tensor, wk: Tensor, turned: bool) -> Tensor:
        q, k = x @ wq.T, x @ wk.T
        if turned:
            assert_close(rotary(q)[0], q[0])  # position 0 is not turned
            q, k = rotary(q), rotary(k)
        return (q @ k.T / math.sqrt(2)).softmax(dim=-1) @ x

    def sharpness(seed: int, turned: bool) -> float:
        generator = torch.Generator().manual_seed(seed)
        x, wq, wk = (
            torch.randn(n, 2, generator=generator, dtype=torch.float64) for n in (3, 2, 2)
        )
        wq, wk = wq.requires_grad_(), wk.requires_grad_()
        target = attend(x, wq, wk, turned).detach()
        loss = lambda: (attend(x, wq, wk, turned) - target).square().sum(-1).mean() / 2  # noqa: E731
        values, vectors = torch.linalg.eigh(hessian(loss, [wq, wk]))
        step = 1e-4 * vectors[:, -1]
        with torch.no_grad():  # the curvature along its direction, from the loss alone
            wq.add_(step[:4].reshape(2, 2)), wk.add_(step[4:].reshape(2, 2))
            assert abs(2 * loss().item() / 1e-8 / values[-1].item() - 1) < 1e-2
        return values[-1].item()

    lower, higher = (sharpness(s, True) / sharpness(s, False) for s in (7, 11))
    assert lower < 0.5 and higher > 2


# ---- adaptive methods


def test_claim_4_6_global_rate():
    """Curvatures 1 and 100: the best single rate keeps 98 % a step, one rate each nothing."""
    rate = best_lr(smoothness=100.0, strong_convexity=1.0)
    kept = distance_rate(lr=rate, smoothness=100.0, strong_convexity=1.0)
    assert abs(kept - 99 / 101) < 1e-12 and abs(rate - 2 / 101) < 1e-12
    for curvature in (1.0, 100.0):
        alone = best_lr(smoothness=curvature, strong_convexity=curvature)
        assert abs(alone - 1 / curvature) < 1e-12 and abs(alone - rate) > 0.009


def test_claim_4_6_adaptive_speed():
    """Inside: a valley along an axis. Outside: the same valley, turned by 45 degrees."""
    steps = {}
    for angle in (0, 45):
        c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        start = f64(c - 0.5 * s, s + 0.5 * c)
        assert abs(valley(angle, 30)(start, 0).item() - (1 + 30 * 0.25) / 2) < 1e-9
        for name, rule, lrs in (("Adagrad", Adagrad, (0.5, 1.0)), ("SGD", SGD, (2 / 31,))):
            make = lambda lr, rule=rule: lambda p: rule(p, lr=lr)  # noqa: E731
            steps[name, angle], _ = fewest_steps(
                make, lrs, valley(angle, 30), start, below=1e-4, most=120
            )
    assert steps["SGD", 0] == steps["SGD", 45]
    assert 2 < steps["Adagrad", 0] < 0.5 * steps["SGD", 0]
    assert steps["Adagrad", 45] > 0.8 * steps["SGD", 45]


def printed_adaptive(
    gradients: list[float], rate: float, eps: float, keep: float, new: float, inside: bool
) -> float:
    """(4.6.12) and (4.6.13), from 0; the constant under the root as printed, or outside."""
    w, total = 0.0, 0.0
    for g in gradients:
        total = keep * total + new * g * g
        w -= rate * g / (math.sqrt(total + eps) if inside else math.sqrt(total) + eps)
    return w


def test_eq_4_6_12():
    """Inside: gradients near 1. Outside: gradients of 1e-5, with the constant 1e-8."""
    for size, agree in ((1.0, True), (1e-5, False)):
        stream = [size * g for g in (1.0, -0.3, 2.0, 0.7, 0.1)]
        point = weight(0.0)
        optimizer = Adagrad([point], lr=0.1, eps=1e-8)
        end = follow(optimizer, lambda w, t, s=stream: f64(s[t]), steps=5)[-1].item()
        paper = printed_adaptive(stream, 0.1, 1e-8, 1, 1, inside=False)
        printed = printed_adaptive(stream, 0.1, 1e-8, 1, 1, inside=True)
        assert abs(end - paper) < 1e-12
        assert (abs(printed / paper - 1) < 1e-6) == agree
        moved = printed_adaptive(stream, 0.1, 1e-4, 1, 1, inside=False)
        assert agree or abs(printed / moved - 1) < 0.25  # as 1e-4 would act outside


def test_claim_4_6_adagrad_sparse():
    """Inside: equal sizes, the rare weight's rate is ten times larger. Outside: a rare weight
    with gradients of 100 has a tenth of the frequent one's."""
    often, rarely = torch.ones(500), (torch.arange(500) % 100 == 0).double()
    stream = torch.stack([often, rarely, 100 * rarely], dim=1).double()
    point = weight(0.0, 0.0, 0.0)
    optimizer = Adagrad([point], lr=1.0)
    path = follow(optimizer, lambda w, t: stream[t], steps=500)
    last = path[400] - path[401]  # a step in which all three have a gradient
    effective = last / stream[400]
    sums = stream[:401].square().sum(dim=0)
    assert_close(effective, 1 / sums.sqrt())
    assert abs(effective[1] / effective[0] - math.sqrt(401 / 5)) < 1e-6
    assert abs(effective[2] / effective[0] - math.sqrt(401 / 5) / 100) < 1e-6


def test_eq_4_6_13():
    """Inside: gradients near 1. Outside: of 1e-5. The first step is 1/sqrt(1-rho) long."""
    ends = {}
    for size in (1.0, 1e-5):
        stream = [size * g for g in (1.0, -0.3, 2.0, 0.7, 0.1)]
        optimizer = RMSprop([weight(0.0)], lr=0.1, alpha=0.9, eps=1e-8)
        path = follow(optimizer, lambda w, t, s=stream: f64(s[t]), steps=5)[:, 0]
        outside = printed_adaptive(stream, 0.1, 1e-8, 0.9, 0.1, inside=False)
        ends[size] = printed_adaptive(stream, 0.1, 1e-8, 0.9, 0.1, inside=True) / outside
        assert abs(path[-1] - outside) < 1e-12
        if size == 1.0:
            assert abs(path[1] + 0.1 / math.sqrt(0.1)) < 1e-6
    assert abs(ends[1.0] - 1) < 1e-6 and ends[1e-5] < 0.5


def test_claim_4_6_rmsprop_repair():
    """Inside: after ten gradients of 100 its steps come back. Outside: on w²/2 it never stops."""
    spike = [100.0] * 10 + [1.0] * 100
    lengths = {}
    for rule in (lambda p: RMSprop(p, lr=1.0, alpha=0.9), lambda p: Adagrad(p, lr=1.0)):
        path = follow(rule([weight(0.0)]), lambda w, t: f64(spike[t]), steps=110)[:, 0]
        lengths[len(lengths)] = (path[-2] - path[-1]).item()
    assert abs(lengths[0] - 1 / math.sqrt(1 + 99.99e2 * 0.9**100 * (1 - 0.9**10))) < 1e-3
    assert abs(lengths[1] - 1 / math.sqrt(1e5 + 100)) < 1e-9
    make = lambda rule: follow(rule([weight(3.0)]), lambda w, t: w, steps=300)[:, 0]  # noqa: E731
    jumping = make(lambda p: RMSprop(p, lr=0.1, alpha=0.9))
    arriving = make(lambda p: Adagrad(p, lr=1.0))
    assert_close(jumping[-2:].abs(), f64(0.05, 0.05), rtol=1e-4, atol=0)
    assert jumping[-1] * jumping[-2] < 0 and arriving[-1].abs() < 1e-12 and arriving[0] == 3


def test_eq_4_6_14():
    """Both running means, kept by hand beside the optimizer's."""
    stream, point = normal(6, 3, seed=3), weight(0.0, 0.0, 0.0)
    optimizer = Adam([point], lr=0.1, betas=(0.8, 0.95))
    follow(optimizer, lambda w, t: stream[t], steps=6)
    weights1 = f64(*(0.2 * 0.8 ** (5 - i) for i in range(6)))
    weights2 = f64(*(0.05 * 0.95 ** (5 - i) for i in range(6)))
    assert_close(optimizer.state[point]["exp_avg"], weights1 @ stream)
    assert_close(optimizer.state[point]["exp_avg_sq"], weights2 @ stream.square())


def test_eq_4_6_15():
    """Thirty steps on a bent loss in plain numbers; at t = 0 the quotients have no value."""
    slope = lambda w, t: math.sinh(w - 1) + w  # noqa: E731
    by_hand = adam_by_hand(slope, lambda t: 0.3, 0.9, 0.99, steps=30)
    optimizer = Adam([weight(0.0)], lr=0.3, betas=(0.9, 0.99))
    path = follow(optimizer, lambda w, t: (w - 1).sinh() + w, steps=30)[:, 0]
    assert_close(path, f64(*by_hand))
    assert 1 - 0.9**0 == 0  # so steps are counted from 1


def test_claim_4_6_adam_combination():
    """No momentum and RMSProp's uncorrected mean: RMSProp. Momentum: the mean of gradients."""
    stream = normal(8, seed=5).tolist()
    pull = lambda w, t: f64(stream[t])  # noqa: E731
    adam = follow(Adam([weight(0.0)], lr=0.1, betas=(0.0, 0.9), eps=0.0), pull, steps=8)
    rms = follow(RMSprop([weight(0.0)], lr=0.1, alpha=0.9, eps=0.0), pull, steps=8)
    correction = (1 - 0.9 ** torch.arange(1, 9, dtype=torch.float64)).sqrt()
    assert_close(adam.diff(dim=0)[:, 0], rms.diff(dim=0)[:, 0] * correction)
    first = -0.1 * math.copysign(1, stream[0])
    assert abs(adam[1].item() - first) < 1e-9
    by_hand = adam_by_hand(lambda w, t: stream[t - 1], lambda t: 0.1, 0.9, 0.9, steps=8)
    both = follow(Adam([weight(0.0)], lr=0.1, betas=(0.9, 0.9)), pull, steps=8)[:, 0]
    assert_close(both, f64(*by_hand))


def test_claim_4_6_adam_verified():
    """Reddi, Kale and Kumar's first problem: 3w, -w, -w in turn on [-1, 1], whose sum is w. Adam
    goes to 1, the worst point, at their rate; AMSGrad to -1."""
    pull = lambda w, t: ((3.0 if t % 3 == 0 else -1.0) * w).sum()  # noqa: E731
    rate = lambda t: 0.5 / math.sqrt(t + 1)  # noqa: E731
    ends = {}
    for amsgrad in (False, True):
        make = lambda p, a=amsgrad: Adam(p, betas=(0.0, 0.1), amsgrad=a)  # noqa: E731
        ends[amsgrad] = optimizer_path(make, pull, f64(0.0), steps=240, lr=rate, bound=1)[:, 0]
    by_hand = adam_by_hand(
        lambda w, t: 3.0 if t % 3 == 1 else -1.0, lambda t: 0.5 / math.sqrt(t), 0.0, 0.1,
        steps=240, bound=1,
    )  # fmt: skip
    assert_close(ends[False], f64(*by_hand))
    assert ends[False][-60:].mean() > 0.95 and ends[True][-60:].mean() < -0.9


def test_claim_4_6_adam_conditions():
    """Three squares whose mean has its minimum at 0, the rates 2/t: SGD stays, Adam leaves."""
    slope = lambda w, t: w - THREE[t % 3]  # noqa: E731
    rate = lambda t: 2 / (t + 1)  # noqa: E731
    adam = follow(Adam([weight(0.0)], betas=(0.0, 0.1)), slope, steps=300, lr=rate)[:, 0]
    by_hand = adam_by_hand(
        lambda w, t: w - THREE[(t - 1) % 3], lambda t: 2 / t, 0.0, 0.1, steps=300
    )
    assert_close(adam, f64(*by_hand))
    assert 0.70 < adam[-3:].mean() < 0.74  # the mean loss's gradient there, too
    sgd = follow(SGD([weight(0.0)]), slope, steps=300, lr=rate)[:, 0]
    by_hand = [0.0]
    for t in range(300):
        by_hand.append(by_hand[-1] - 2 / (t + 1) * (by_hand[-1] - THREE[t % 3]))
    assert_close(sgd, f64(*by_hand))
    assert sgd[-3:].mean().abs() < 0.01


def test_claim_4_6_bias_correction():
    """Inside: gradients that keep their mean. Outside: gradients that grow. The wrong end of the
    run above is the same without any correction."""
    point = weight(0.0)
    optimizer = Adam([point], betas=(0.9, 0.999))
    follow(optimizer, lambda w, t: f64(5.0), steps=3)
    assert_close(optimizer.state[point]["exp_avg"] / (1 - 0.9**3), f64(5.0))
    growing = weight(0.0)
    optimizer = Adam([growing], betas=(0.9, 0.999))
    follow(optimizer, lambda w, t: f64(t + 1.0), steps=150)
    corrected = optimizer.state[growing]["exp_avg"] / (1 - 0.9**150)
    assert abs(150 - corrected.item() - 9) < 1e-3
    slope = lambda w, t: w - THREE[t % 3]  # noqa: E731
    rate = lambda t: 2 / (t + 1)  # noqa: E731
    without = follow(RMSprop([weight(0.0)], alpha=0.1), slope, steps=300, lr=rate)[-3:].mean()
    assert abs(without.item() - 0.723) < 0.01

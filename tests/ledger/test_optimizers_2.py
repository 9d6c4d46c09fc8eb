"""What section 2.1 of the notes says, held to numbers: Adam, weight decay and AdamW."""

import math
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from lmlosses.optim import Adam, AdamW, decay_groups

GRADIENTS = [(1.0, -2.0), (0.5, 4.0), (-3.0, 0.1), (0.2, 0.2)]


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def walk(
    rule: type, gradients: Iterable[tuple[float, ...]], start: tuple[float, ...], **settings
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """All points, the start included, and the state after the last step."""
    param = torch.nn.Parameter(f64(*start))
    optimizer = rule([param], **settings)
    points = [param.detach().clone()]
    for gradient in gradients:
        param.grad = f64(*gradient)
        optimizer.step()
        points.append(param.detach().clone())
    return points, optimizer.state[param]


def by_hand(
    gradients: Iterable[tuple[float, ...]],
    start: tuple[float, ...],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    coupled: float = 0.0,
    decoupled: float = 0.0,
) -> list[float]:
    """The notes' four formulas in plain arithmetic, with the penalty in the gradient or beside."""
    w, m, v = list(start), [0.0] * len(start), [0.0] * len(start)
    for t, gradient in enumerate(gradients, start=1):
        for i, g in enumerate(gradient):
            g += coupled * w[i]
            m[i] = betas[0] * m[i] + (1 - betas[0]) * g
            v[i] = betas[1] * v[i] + (1 - betas[1]) * g * g
            m_hat, v_hat = m[i] / (1 - betas[0] ** t), v[i] / (1 - betas[1] ** t)
            w[i] -= lr * (m_hat / (math.sqrt(v_hat) + eps) + decoupled * w[i])
    return w


def test_notes_2_1_adam_plus_decay():
    """Adam's own displacements, with the old weight shrunk before each of them."""
    settings = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 0.01}
    plain, _ = walk(Adam, GRADIENTS, (0.0, 0.0), **settings)
    decayed, _ = walk(AdamW, GRADIENTS, (3.0, -5.0), weight_decay=0.5, **settings)
    point = f64(3.0, -5.0)
    for before, after, found in zip(plain, plain[1:], decayed[1:], strict=False):
        point = (1 - 0.1 * 0.5) * point + (after - before)
        assert_close(found, point)


def test_notes_2_1_first_moment():
    _, state = walk(AdamW, GRADIENTS, (1.0, 1.0), lr=0.1, betas=(0.8, 0.9))
    m = [0.0, 0.0]
    for gradient in GRADIENTS:
        m = [0.8 * old + 0.2 * new for old, new in zip(m, gradient, strict=True)]
    assert_close(state["exp_avg"], f64(*m))


def test_notes_2_1_second_moment():
    """Squares, not products of the vector with itself, and about zero, not about the mean."""
    _, state = walk(AdamW, GRADIENTS[:2], (1.0, 1.0), lr=0.1, betas=(0.8, 0.9))
    assert_close(state["exp_avg_sq"], f64(0.9 * 0.1 * 1 + 0.1 * 0.25, 0.9 * 0.1 * 4 + 0.1 * 16))


def test_notes_2_1_bias_correction():
    """Weights of past gradients sum to one after it: a constant gradient is met exactly."""
    settings = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 0.0, "weight_decay": 0.0}
    for steps in (1, 2, 9):
        points, state = walk(AdamW, [(0.01, -50.0)] * steps, (0.0, 0.0), **settings)
        assert_close(state["exp_avg"] / (1 - 0.9**steps), f64(0.01, -50.0))
        assert_close(state["exp_avg_sq"] / (1 - 0.99**steps), f64(1e-4, 2500.0))
        assert_close(points[-1], steps * f64(-0.1, 0.1))  # each step is the learning rate
    uncorrected = (1 - 0.9) / math.sqrt(1 - 0.999)
    assert uncorrected > 3  # times the learning rate, at the first step


def test_notes_2_1_adamw_update():
    settings = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 0.3}
    points, _ = walk(AdamW, GRADIENTS, (3.0, -5.0), weight_decay=0.5, **settings)
    assert_close(points[-1], f64(*by_hand(GRADIENTS, (3.0, -5.0), decoupled=0.5, **settings)))
    theirs, _ = walk(torch.optim.AdamW, GRADIENTS, (3.0, -5.0), weight_decay=0.5, **settings)
    assert_close(points[-1], theirs[-1])


def test_notes_2_1_adam_l2():
    settings = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 0.3}
    points, _ = walk(Adam, GRADIENTS, (3.0, -5.0), weight_decay=0.5, **settings)
    assert_close(points[-1], f64(*by_hand(GRADIENTS, (3.0, -5.0), coupled=0.5, **settings)))
    apart = by_hand(GRADIENTS, (3.0, -5.0), decoupled=0.5, **settings)
    assert (points[-1] - f64(*apart)).abs().min() > 0.1


def kept(rule: type, size: float) -> float:
    """Share of a weight left after 401 steps of gradients +size, -size, ... and the opposite."""
    gradients = [(size * (-1) ** step, -size * (-1) ** step) for step in range(401)]
    settings = {"lr": 0.01, "betas": (0.9, 0.95), "weight_decay": 0.01}
    points, _ = walk(rule, gradients, (1.0, 1.0), **settings)
    return points[-1].mean().item()  # the two entries' own steps cancel


def test_notes_2_1_diluted():
    """Diluted at gradients above 1, as said; concentrated below 1; the same at 1."""
    decoupled = math.log(kept(AdamW, 10.0))
    assert abs(decoupled / (401 * math.log(1 - 0.01 * 0.01)) - 1) < 1e-3
    assert abs(math.log(kept(Adam, 10.0)) / decoupled - 1 / 10) < 0.01
    assert abs(math.log(kept(Adam, 1.0)) / decoupled - 1) < 0.05
    assert abs(math.log(kept(Adam, 0.1)) / decoupled - 10) < 1


def test_notes_2_1_order():
    lr, decay, gradient, start = 0.1, 0.5, 4.0, 3.0
    points, _ = walk(AdamW, [(gradient,)], (start,), lr=lr, weight_decay=decay, eps=1.0)
    direction = gradient / (gradient + 1.0)
    stepped = start - lr * direction
    of_the_new = stepped - lr * decay * stepped
    of_the_old = stepped - lr * decay * start
    assert abs(points[-1].item() - of_the_old) < 1e-12
    assert abs((of_the_new - of_the_old) - lr**2 * decay * direction) < 1e-12
    assert abs(of_the_new - of_the_old) > 0.003


def test_notes_2_1_unaffected():
    """Two runs with the same gradients draw together at one rate, whatever the gradients."""
    for size in (1e-5, 1.0, 1e5):
        gradients = [(size * g, size * h) for g, h in GRADIENTS]
        settings = {"lr": 0.1, "weight_decay": 0.5}
        one, _ = walk(AdamW, gradients, (3.0, 3.0), **settings)
        other, _ = walk(AdamW, gradients, (-1.0, -1.0), **settings)
        assert_close(one[-1] - other[-1], f64(4.0, 4.0) * 0.95**4)


class AsPrinted:
    """The notes' class, with settings given; ``m``, ``v`` and ``t`` are never set."""

    def __init__(self, params: list[Tensor]) -> None:
        self.params = params

    def step(self) -> None:
        for p in self.params:
            m = 0.9 * m + (1 - 0.9) * p.grad  # noqa: F821, F841


def moments_in_the_loop(gradients: list[float], shared: bool) -> list[float]:
    """Directions of the first step for each parameter, with one pair of moments or one each."""
    directions, m, v = [], 0.0, 0.0
    for g in gradients:
        if not shared:
            m = v = 0.0
        m, v = 0.9 * m + (1 - 0.9) * g, 0.999 * v + (1 - 0.999) * g * g
        directions.append(m / (1 - 0.9) / math.sqrt(v / (1 - 0.999)))
    return directions


def test_notes_2_1_class():
    with pytest.raises(UnboundLocalError):
        AsPrinted([f64(1.0)]).step()
    points, _ = walk(AdamW, [(1.0, 100.0)], (0.0, 0.0), lr=0.1, eps=0.0)  # entries as parameters
    correct = moments_in_the_loop([1.0, 100.0], shared=False)
    leaked = moments_in_the_loop([100.0, 1.0], shared=True)
    assert_close(points[-1], -0.1 * f64(*correct))
    assert leaked[1] < 0.95 and correct[1] > 0.999
    # moments that are forgotten between steps leave the sign of the gradient
    contrary = [(1.0,), (-0.1,)]
    remembered, _ = walk(AdamW, contrary, (0.0,), lr=0.1, eps=0.0, weight_decay=0.0)
    assert remembered[2] < remembered[1] - 0.01  # goes on down
    forgotten = -0.1 * moments_in_the_loop([-0.1], shared=False)[0]
    assert forgotten > 0.09


def test_notes_2_1_class_line():
    """Subtracting the sum is shrinking first and stepping then."""
    direction, lr, decay = 2.0 / (2.0 + 0.5), 0.1, 0.3
    points, _ = walk(AdamW, [(2.0, 2.0)], (3.0, -5.0), lr=lr, weight_decay=decay, eps=0.5)
    for found, p in zip(points[-1].tolist(), (3.0, -5.0), strict=True):
        assert abs(found - (p - lr * (direction + decay * p))) < 1e-12
        assert abs(found - ((1 - lr * decay) * p - lr * direction)) < 1e-12


def test_notes_2_1_betas():
    """Half of a squared gradient is forgotten after 14 steps at 0.95, after 693 at 0.999."""
    assert AdamW([torch.nn.Parameter(f64(0.0))]).defaults["betas"] == (0.9, 0.999)
    for beta2, before, after in ((0.95, 13, 14), (0.999, 692, 693)):
        shares = [
            walk(AdamW, [(1.0,)] + [(0.0,)] * steps, (0.0,), betas=(0.9, beta2))[1]["exp_avg_sq"]
            / (1 - beta2)
            for steps in (before, after)
        ]
        assert shares[0] > 0.5 > shares[1]
        assert_close(shares[0], f64(beta2**before))


def test_notes_2_1_epsilon():
    for gradient, share in ((1e-5, 1 / 1.001), (1e-8, 0.5), (1e-10, 0.01 / 1.01)):
        points, _ = walk(AdamW, [(gradient,)], (0.0,), lr=1.0, weight_decay=0.0)
        assert abs(-points[-1].item() - share) < 1e-9
    half = torch.tensor(1e-8, dtype=torch.float16)
    assert half == 0 and (torch.zeros(1) / (torch.zeros(1) + half)).isnan()


def test_notes_2_1_weight_decay():
    rates = [3e-4 * (1 + math.cos(math.pi * t / 101)) / 2 for t in range(101)]
    weight = torch.nn.Parameter(f64(2.0))
    optimizer = AdamW([weight], weight_decay=0.1)
    for rate in rates:
        optimizer.param_groups[0]["lr"] = rate
        weight.grad = f64(0.0)
        optimizer.step()
    assert_close(weight.detach(), f64(2 * math.prod(1 - 0.1 * rate for rate in rates)))
    ends = [
        walk(AdamW, [(0.0,)] * 21, (2.0,), lr=lr, weight_decay=decay)[0][-1]
        for lr, decay in ((3e-4, 0.1), (3e-5, 1.0), (3e-3, 0.1))
    ]
    assert_close(ends[0], ends[1])
    assert (ends[0] - ends[2]) > 0.01
    groups = decay_groups(torch.nn.Linear(3, 2), 0.1)
    assert [(group["params"][0].ndim, group["weight_decay"]) for group in groups] == [
        (2, 0.1),
        (1, 0.0),
    ]


def test_notes_2_1_peak_lr():
    """In 500 steps the printed rate reaches a minimum at distance 0.1, and none at distance 1."""

    def rest(distance: float, lr: float) -> float:
        weight = torch.nn.Parameter(f64(0.0))
        optimizer = AdamW([weight], lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
        for _ in range(500):
            weight.grad = weight.detach() - distance
            optimizer.step()
        return abs(distance - weight.item()) / distance

    assert rest(0.1, 3e-4) < 0.05
    assert 0.8 < rest(1.0, 3e-4) < 0.9  # moved by 0.15 = 500 * 3e-4
    assert rest(1.0, 1e-2) < 0.05

"""What textbook subsection 4.6.3 says, held to numbers: regularization and generalization."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.testing import assert_close

from lmlosses.analysis.curvature import hessian
from lmlosses.analysis.dynamics import gradient_descent_on_quadratic
from lmlosses.analysis.optima import smoothed_optimum
from lmlosses.analysis.spectrum import condition_number, sharpness
from lmlosses.lab.models import scaled_dot_product_attention
from lmlosses.lab.training import gradient_descent
from lmlosses.losses import (
    binary_cross_entropy,
    cross_entropy,
    distillation_loss,
    entropy,
)
from lmlosses.optim import SGD, Adam, AdamW


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def draws(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def leaf(*values: float) -> torch.nn.Parameter:
    return torch.nn.Parameter(f64(*values))


def take_steps(
    make: Callable[[list[Tensor]], torch.optim.Optimizer],
    start: Tensor,
    gradient: Callable[[Tensor, int], Tensor],
    steps: int,
) -> Tensor:
    """Where an optimizer is after some steps along given gradients."""
    point = torch.nn.Parameter(start.detach().clone())
    optimizer = make([point])
    for step in range(steps):
        point.grad = gradient(point.detach(), step)
        optimizer.step()
    return point.detach()


def least_squares(inputs: Tensor, targets: Tensor) -> Callable[[Tensor], Tensor]:
    """Equation (4.6.16), the sum of squares."""
    return lambda w: (inputs @ w - targets).square().sum()


# ---- implicit regularization


def test_def_4_6_6():
    """One sample, two weights: descent gives ridge's answer in the limit, not that of lasso."""
    inputs, targets = f64(2, 1).reshape(1, 2), f64(2)
    found = gradient_descent(
        least_squares(inputs, targets), torch.zeros(2, dtype=torch.float64), lr=0.1, steps=200
    )[-1]
    penalty = 1e-8
    gram = inputs.T @ inputs + penalty * torch.eye(2, dtype=torch.float64)
    ridge = torch.linalg.solve(gram, inputs.T @ targets)
    lasso = f64(1, 0)  # the solution with the least sum of absolute values
    assert_close(inputs @ lasso, targets)
    assert lasso.abs().sum() < ridge.abs().sum() - 0.1
    assert_close(found, ridge, rtol=0, atol=1e-6)
    new = f64(0, 1)  # an input on which the two explicit penalties disagree
    assert abs(new @ found - 0.4) < 1e-6 and new @ lasso == 0


def wilson(labels: Tensor) -> Tensor:
    """The data of Wilson et al. (2017), section 3.3: one feature tells, two never do."""
    inputs = torch.zeros(len(labels), 3 + 5 * len(labels), dtype=torch.float64)
    for row, label in enumerate(labels.tolist()):
        inputs[row, 0] = label
        inputs[row, 1:3] = 1
        inputs[row, 3 + 5 * row : 3 + 5 * row + (1 if label > 0 else 5)] = 1
    return inputs


def test_claim_4_6_implicit_generalizes():
    """Both fit the training data; on new points SGD is always right, Adam calls all of them +."""
    labels = f64(1, 1, 1, 1, 1, 1, -1, -1, -1, -1)
    inputs = wilson(labels)
    slope = lambda w, step: inputs.T @ (inputs @ w - labels)  # noqa: E731
    start = torch.zeros(inputs.shape[1], dtype=torch.float64)
    rate = 1 / torch.linalg.matrix_norm(inputs, ord=2).item() ** 2
    plain = take_steps(lambda p: SGD(p, lr=rate), start, slope, 400)
    adaptive = take_steps(
        lambda p: Adam(p, lr=0.01, betas=(0.0, 0.9), eps=1e-30), start, slope, 400
    )
    for found in (plain, adaptive):
        assert ((inputs @ found).sign() == labels).all()
    new = f64(1, -1)  # new points, whose own features were never seen
    scores = [found[0] * new + found[1] + found[2] for found in (plain, adaptive)]
    assert (scores[0].sign() == new).all()
    assert (scores[1] > 0.1).all()
    assert_close(adaptive[0].expand(3), adaptive[:3], rtol=0, atol=1e-9)


def test_eq_4_6_16():
    """Descent on the printed sum has Hessian 2 X^T X and arrives where NumPy's solver does."""
    inputs, targets = draws(12, 3), draws(12, seed=1)
    found = gradient_descent_on_quadratic(
        2 * inputs.T @ inputs,
        torch.zeros(3, dtype=torch.float64),
        torch.tensor([1, 5000]),
        lr=0.01,
        linear=2 * inputs.T @ targets,
    )
    w = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(least_squares(inputs, targets)(w), w)
    assert_close(found[0], -0.01 * slope)
    assert_close(found[1], torch.linalg.lstsq(inputs, targets).solution)


def test_claim_4_6_minimum_norm():
    """From zero, with a step below 1 / s_max^2, the pseudo-inverse; else neither."""
    inputs, targets = draws(3, 6, seed=2), draws(3, seed=3)
    loss = least_squares(inputs, targets)
    shortest = torch.linalg.pinv(inputs.T @ inputs, rtol=1e-9) @ inputs.T @ targets
    assert_close(shortest, torch.linalg.pinv(inputs) @ targets)
    largest = torch.linalg.matrix_norm(inputs, ord=2).item() ** 2
    rate, zero = 0.5 / largest, torch.zeros(6, dtype=torch.float64)
    from_zero = gradient_descent(loss, zero, lr=rate, steps=400)[-1]
    assert_close(from_zero, shortest, rtol=1e-5, atol=1e-5)
    # from elsewhere: what lies across the rows stays for ever
    start = draws(6, seed=4)
    across = start - torch.linalg.pinv(inputs) @ inputs @ start
    elsewhere = gradient_descent(loss, start, lr=rate, steps=400)[-1]
    assert_close(elsewhere, shortest + across, rtol=1e-5, atol=1e-5)
    assert across.norm() > 0.5 and (inputs @ elsewhere - targets).norm() < 1e-5
    # above 2 / L there is no limit
    assert gradient_descent(loss, zero, lr=1.02 / largest, steps=400)[-1].norm() > 100


def test_claim_4_6_minimum_norm_generalizes():
    """Exact if the truth lies in the rows and nothing is noisy; at d = N + 1 worse than zero."""
    risks, exact = [], []
    for seed in range(9):
        inputs, truth = draws(20, 21, seed=seed), draws(21, seed=100 + seed) / 21**0.5
        scale = torch.linalg.matrix_norm(inputs, ord=2).item() ** 2
        in_rows = inputs.T @ torch.linalg.solve(inputs @ inputs.T, inputs @ truth)
        for w, noise, errors in ((in_rows, 0.0, exact), (truth, 0.5, risks)):
            targets = inputs @ w + noise * draws(20, seed=200 + seed)
            found = gradient_descent_on_quadratic(
                inputs.T @ inputs, 0 * w, torch.tensor(10**9), lr=1 / scale,
                linear=inputs.T @ targets,
            )  # fmt: skip
            errors.append(((found - w).square().sum() / w.square().sum()).item())
    assert max(exact) < 1e-4
    assert sorted(risks)[4] > 3  # a model that always says 0 has 1


def test_claim_4_6_sgd_noise_flat():
    """L = (u v - y)^2 / 2: each step shrinks u^2 - v^2 by 1 - (rate * residual)^2."""
    start, rate = f64(3, 1 / 3), 0.1
    noise = torch.where(draws(1000) > 0, 1.0, -1.0).double()

    def ends(level: float) -> Tensor:
        def slope(w: Tensor, step: int) -> Tensor:
            return (w.prod() - 1 - level * noise[step]) * w.flip(0)

        return take_steps(lambda p: SGD(p, lr=rate), start, slope, 1000)

    def sharp(w: Tensor) -> float:
        level = torch.stack([w[0], 1 / w[0]]).requires_grad_()  # the minimum beside it
        return sharpness(lambda: (level.prod() - 1).square() / 2, [level])

    noisy, clean = ends(0.5), ends(0.0)
    assert_close(clean, start)  # a fit without residuals: no noise, no drift
    assert abs(sharp(start) - (9 + 1 / 9)) < 1e-6
    assert abs(sharp(noisy) - 2) < 0.2
    # a linear model: all minima are equally sharp, and single samples lead to the same one
    inputs, targets = draws(3, 6, seed=2), draws(3, seed=3)
    order = torch.randint(3, (1000,), generator=torch.Generator().manual_seed(0))
    single = lambda w, t: (inputs[order[t]] @ w - targets[order[t]]) * inputs[order[t]]  # noqa: E731
    found = take_steps(lambda p: SGD(p, lr=0.1), torch.zeros(6).double(), single, 1000)
    assert_close(found, torch.linalg.pinv(inputs) @ targets, rtol=1e-4, atol=1e-4)


def test_claim_4_6_flat_generalizes():
    """Ten times the incoming weights, a tenth of the outgoing: the same function, sharper."""
    inputs = draws(40, 3, seed=5)
    first, second = draws(4, 3, seed=6), draws(4, seed=7)
    targets = (inputs @ first.T).relu() @ second
    sharp, outputs = [], []
    for scale in (1.0, 10.0, 100.0):
        w = (scale * first).requires_grad_()
        v = (second / scale).requires_grad_()
        predict = lambda x, w=w, v=v: (x @ w.T).relu() @ v  # noqa: E731
        loss = lambda predict=predict: (predict(inputs) - targets).square().mean() / 2  # noqa: E731
        sharp.append(sharpness(loss, [w, v]))
        outputs.append(predict(draws(50, 3, seed=8)).detach())
        hidden = (inputs @ w.detach().T).relu()
    assert_close(outputs[0], outputs[2])
    assert sharp[2] > 500 * sharp[0]
    # in the limit only the outgoing weights matter, and their curvature is known
    expected = torch.linalg.eigvalsh(hidden.T @ hidden / 40)[-1].item()
    assert abs(sharp[2] / expected - 1) < 0.01


def test_claim_4_6_attention_rows():
    """By hand, with plain exponentials."""
    query, key, value = draws(5, 4), draws(6, 4, seed=1), draws(6, 2, seed=2)
    weights = scaled_dot_product_attention(query, key, value).weights
    by_hand = (query @ key.T / 2).exp()
    assert_close(weights, by_hand / by_hand.sum(dim=1, keepdim=True))
    assert_close(weights.sum(dim=1), torch.ones(5, dtype=torch.float64))


def test_claim_4_6_attention_limits_parameters():
    """Rows sum to one for queries and keys of any size, and some moves are not even seen."""
    query, key, value = draws(5, 4), draws(6, 4, seed=1), draws(6, 2, seed=2)
    before = scaled_dot_product_attention(query, key, value).weights
    for size in (1.0, 1e3, 1e6):
        rows = scaled_dot_product_attention(size * query, key, value).weights.sum(dim=1)
        assert_close(rows, torch.ones(5, dtype=torch.float64))
        moved = scaled_dot_product_attention(query, key + size * f64(1, -2, 0.5, 3), value)
        assert_close(moved.weights, before, rtol=1e-6, atol=1e-6)


def test_claim_4_6_softmax_concentration():
    """In [0, 1], and both extremes are reached: all on one key, and the same on all."""
    query, key, value = draws(5, 4), draws(6, 4, seed=1), draws(6, 2, seed=2)
    spread = []
    for size in (0.0, 1.0, 1e4):
        weights = scaled_dot_product_attention(size * query, key, value).weights
        assert ((weights >= 0) & (weights <= 1)).all()
        spread.append(entropy(weights.clamp(min=1e-300).log()))
    assert_close(spread[0], torch.full((5,), math.log(6), dtype=torch.float64))
    assert (spread[1] > 0.05).all() and (spread[1] < math.log(6) - 0.01).all()
    assert_close(spread[2], torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-9)
    assert_close(weights.amax(dim=1), torch.ones(5, dtype=torch.float64))


# ---- weight decay


def test_def_4_6_7():
    """Printed as 6.6.7. The penalty's gradient is the decay times the weight."""
    start, curvature, decay = f64(2, -1), f64(3, 0.5), 0.4
    w = start.clone().requires_grad_()
    penalized = 0.5 * (curvature * w.square()).sum() + decay / 2 * w.square().sum()
    (slope,) = torch.autograd.grad(penalized, w)
    plain = lambda point, step: curvature * point  # noqa: E731
    found = take_steps(lambda p: SGD(p, lr=0.1, weight_decay=decay), start, plain, 1)
    assert_close(found, start - 0.1 * slope)
    assert_close(found, f64(2 - 0.1 * 6.8, -1 + 0.1 * 0.9))


def test_claim_4_6_weight_decay_l2():
    """Minimum 1, curvature h: where each comes to rest. Momentum 0.9 takes nine tenths away."""
    curvature, decay, rate = f64(1, 4), 0.5, 0.04
    slope = lambda w, step: curvature * (w - 1)  # noqa: E731
    penalized = curvature / (curvature + decay)

    def decoupled(momentum: float) -> Tensor:
        w, buffer = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
        for step in range(500):
            buffer = momentum * buffer + slope(w, step)
            w = (1 - rate * decay) * w - rate * buffer
        return w

    zero = torch.zeros(2, dtype=torch.float64)
    for momentum in (0.0, 0.9):
        inside = take_steps(
            lambda p, m=momentum: SGD(p, lr=rate, momentum=m, weight_decay=decay),
            zero, slope, 500,
        )  # fmt: skip
        assert_close(inside, penalized, rtol=1e-5, atol=1e-5)
        weaker = (1 - momentum) * decay
        assert_close(decoupled(momentum), curvature / (curvature + weaker), rtol=1e-5, atol=1e-5)
    settings = {"lr": 0.02, "betas": (0.5, 0.9), "weight_decay": decay}
    coupled = take_steps(lambda p: Adam(p, **settings), zero, slope, 500)
    beside = take_steps(lambda p: AdamW(p, **settings), zero, slope, 500)
    assert (coupled - penalized).abs().max() < 0.02
    assert (beside - 1).abs().max() < 0.03 and beside[0] - coupled[0] > 0.25


def test_eq_4_6_17():
    """The printed sum, term by term."""
    inputs, w = draws(7, 3), draws(3, seed=1)
    labels = f64(1, 0, 0, 1, 1, 0, 1)
    total = 0.0
    for x, y in zip((inputs @ w).tolist(), labels.tolist(), strict=True):
        p = 1 / (1 + math.exp(-x))
        total -= y * math.log(p) + (1 - y) * math.log(1 - p)
    assert abs(binary_cross_entropy(inputs @ w, labels).sum().item() - total) < 1e-9


def saddle(u: float, v: float, decay: float) -> Tensor:
    w = leaf(u, v)
    return hessian(lambda: (w.prod() - 1).square() / 2 + decay / 2 * w.square().sum(), [w])


def test_claim_4_6_decay_smooths():
    """(u v - 1)^2 / 2 at zero: curvatures -1 and 1, all shifted up, the largest included."""
    for decay, still_a_saddle in ((0.0, True), (0.5, True), (1.5, False)):
        values = torch.linalg.eigvalsh(saddle(0.0, 0.0, decay))
        assert_close(values, f64(decay - 1, decay + 1))
        assert bool(values[0] < 0) == still_a_saddle
    for point in ((2.0, 0.5), (-1.0, 3.0)):
        largest = [torch.linalg.eigvalsh(saddle(*point, decay))[-1] for decay in (0.0, 0.5)]
        assert_close(largest[1] - largest[0], f64(0.5).squeeze())


def test_claim_4_6_decay_hessian():
    """Printed: X^T X + lambda I, for the mean squared error whose Hessian was X^T X / N."""
    inputs, targets, decay = draws(10, 3), draws(10, seed=1), 0.3
    w = leaf(0.1, 0.2, 0.3)
    decayed = lambda size: size + decay / 2 * w.square().sum()  # noqa: E731
    errors = lambda: (inputs @ w - targets).square()  # noqa: E731
    identity = torch.eye(3, dtype=torch.float64)
    printed = inputs.T @ inputs + decay * identity
    assert_close(hessian(lambda: decayed(errors().sum() / 2), [w]), printed)
    assert_close(
        hessian(lambda: decayed(errors().mean() / 2), [w]),
        inputs.T @ inputs / 10 + decay * identity,
    )
    for form in (lambda: errors().mean() / 2, lambda: errors().mean(), lambda: errors().sum()):
        assert (hessian(lambda form=form: decayed(form()), [w]) - printed).abs().max() > 1


def test_claim_4_6_decay_min_eigenvalue():
    """With fewer samples than weights it is the decay itself, and infinite without."""
    inputs = draws(4, 6)
    gram = inputs.T @ inputs / 4
    for decay in (0.01, 0.3):
        product = lambda v, d=decay: [gram @ v[0] + d * v[0]]  # noqa: E731
        found = condition_number(product, [torch.zeros(6, dtype=torch.float64)])
        assert abs(found.smallest / decay - 1) < 1e-2
        top = torch.linalg.matrix_norm(inputs, ord=2).item() ** 2 / 4
        assert abs(found.largest / (top + decay) - 1) < 1e-2
    bare = condition_number(lambda v: [gram @ v[0]], [torch.zeros(6, dtype=torch.float64)])
    assert math.isinf(bare.value) and bare.largest > 1


def test_claim_4_6_decay_convergence():
    """Curvatures 1 and 100: decay 1 halves condition number and steps, and moves the end."""
    steps, halves = {}, torch.arange(0, 1500)
    for decay in (0.0, 1.0):
        curvature = f64(1 + decay, 100 + decay)
        found = condition_number(
            lambda v, c=curvature: [c * v[0]], [torch.zeros(2, dtype=torch.float64)]
        )
        assert abs(found.value / ((100 + decay) / (1 + decay)) - 1) < 1e-3
        rest = f64(1, 100) / curvature
        path = gradient_descent_on_quadratic(
            curvature.diag(), torch.zeros(2, dtype=torch.float64), halves,
            lr=2 / (101 + 2 * decay), linear=f64(1, 100),
        )  # fmt: skip
        assert_close(path[-1], rest)
        steps[decay] = int(((path - rest).abs()[:, 0] < 1e-6).nonzero()[0])
    assert 1.8 < steps[0.0] / steps[1.0] < 2.2


def test_claim_4_6_adam_l2_weakens():
    """What 300 steps leave where gradients cancel: more above a size of 1, less below."""
    sizes = f64(0.1, 10)
    mirrored = torch.cat([draws(300, 20), -draws(300, 20)], dim=1).unsqueeze(-1) * sizes
    start = torch.ones(40, 2, dtype=torch.float64)
    settings = {"lr": 0.01, "betas": (0.9, 0.95), "weight_decay": 0.1}
    left = {
        rule: take_steps(lambda p, r=rule: r(p, **settings), start, lambda w, t: mirrored[t], 300)
        .mean(dim=0)
        for rule in (Adam, AdamW)
    }  # fmt: skip
    assert_close(left[AdamW], torch.full((2,), 0.999**300, dtype=torch.float64))
    assert left[Adam][0] < 0.25 and 0.95 < left[Adam][1] < 1


def test_eq_4_6_18():
    """Against torch's own and against the printed line, with both moments written out."""
    gradients = draws(6, 4)
    settings = {"lr": 0.05, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.3}
    found = take_steps(
        lambda p: AdamW(p, **settings), f64(1, -2, 0.5, 3), lambda w, t: gradients[t], 6
    )
    torchs = take_steps(
        lambda p: torch.optim.AdamW(p, **settings),
        f64(1, -2, 0.5, 3), lambda w, t: gradients[t], 6,
    )  # fmt: skip
    w = f64(1, -2, 0.5, 3)
    m = v = torch.zeros(4, dtype=torch.float64)
    for t in range(1, 7):
        m = 0.8 * m + 0.2 * gradients[t - 1]
        v = 0.9 * v + 0.1 * gradients[t - 1] ** 2
        m_hat, v_hat = m / (1 - 0.8**t), v / (1 - 0.9**t)
        w = (1 - 0.05 * 0.3) * w - 0.05 / (v_hat.sqrt() + 1e-6) * m_hat
    assert_close(found, w)
    assert_close(found, torchs)


def test_claim_4_6_adamw_predictable():
    """One rate for gradients of any size; but it is set by the learning rate, and exact
    gradients of a loss whose minimum is in reach cancel all of it."""
    stream = draws(200, 5)
    ends = [
        take_steps(
            lambda p: AdamW(p, lr=0.01, eps=0.0, weight_decay=0.5),
            torch.ones(5, dtype=torch.float64), lambda w, t, c=c: c * stream[t], 200,
        )
        for c in (1e-3, 1.0, 1e3)
    ]  # fmt: skip
    assert_close(ends[0], ends[1])
    assert_close(ends[2], ends[1])
    for rate in (0.01, 0.005):
        idle = take_steps(
            lambda p, r=rate: AdamW(p, lr=r, weight_decay=0.5),
            f64(1), lambda w, t: 0 * w, 200,
        )  # fmt: skip
        assert_close(idle, f64((1 - 0.5 * rate) ** 200))
    rest = take_steps(
        lambda p: AdamW(p, lr=0.002, betas=(0.5, 0.9), weight_decay=0.5),
        f64(0.5), lambda w, t: w - 1, 600,
    )  # fmt: skip
    assert abs(rest.item() - 1) < 0.02  # the penalized minimum is 2 / 3


# ---- label smoothing


def smooth(labels: Tensor, eps: float) -> Tensor:
    """Equation (4.6.19)."""
    return (1 - eps) * labels + eps / labels.shape[-1]


def test_def_4_6_8():
    """Printed as 6.6.8. A soft label is a distribution, and training on it is the setting."""
    logits, targets = draws(6, 5), torch.tensor([0, 1, 2, 3, 4, 0])
    one_hot = torch.nn.functional.one_hot(targets, 5).double()
    for eps in (0.0, 0.1, 0.7):
        soft = smooth(one_hot, eps)
        assert_close(soft.sum(dim=1), torch.ones(6, dtype=torch.float64))
        expected = -(soft * (logits - logits.exp().sum(dim=1, keepdim=True).log())).sum(dim=1)
        assert_close(cross_entropy(logits, soft), expected)
        assert_close(cross_entropy(logits, targets, label_smoothing=eps), expected)


def test_eq_4_6_19():
    """The label that the loss pulls to: the prediction less the gradient."""
    logits = draws(1, 4).requires_grad_()
    loss = cross_entropy(logits, torch.tensor([2]), label_smoothing=0.2)
    (slope,) = torch.autograd.grad(loss.sum(), logits)
    label = logits.detach().softmax(dim=1) - slope
    assert_close(label, f64(0.05, 0.05, 0.85, 0.05).unsqueeze(0))


def test_eq_4_6_20():
    """The two sums as printed, and torch."""
    logits, targets, eps = draws(8, 6), torch.tensor([0, 1, 2, 3, 4, 5, 0, 1]), 0.15
    logps = logits.log_softmax(dim=1)
    printed = [
        -(1 - eps) * logps[n, y].item() - eps * sum(logps[n].tolist()) / 6
        for n, y in enumerate(targets.tolist())
    ]
    found = cross_entropy(logits, targets, label_smoothing=eps)
    assert_close(found, f64(*printed))
    torchs = torch.nn.functional.cross_entropy(
        logits, targets, label_smoothing=eps, reduction="none"
    )
    assert_close(found, torchs)


def at_gap(gap: float, classes: int, eps: float) -> float:
    """Smoothed cross-entropy of logits that set the target apart from all others by a gap."""
    logits = torch.zeros(1, classes, dtype=torch.float64)
    logits[0, 0] = gap
    return cross_entropy(logits, torch.tensor([0]), label_smoothing=eps).item()


def test_claim_4_6_smoothing_overconfidence():
    """Without smoothing a larger gap is always better; with it the best one is finite."""
    assert at_gap(30, 10, 0.0) < at_gap(20, 10, 0.0) < at_gap(10, 10, 0.0)
    best = smoothed_optimum(10, smoothing=0.1)
    assert abs(best.target - 0.91) < 1e-12 and abs(best.other - 0.01) < 1e-12
    assert abs(at_gap(math.log(0.91 / 0.01), 10, 0.1) - best.loss) < 1e-12
    assert at_gap(30, 10, 0.1) > at_gap(10, 10, 0.1) > best.loss + 0.1
    assert math.isinf(smoothed_optimum(10, smoothing=0.0).gap)


def test_claim_4_6_smoothing_limits_logits():
    """Shifted by a million the logits cost the same: no largest absolute value is preferred."""
    logits, targets = draws(6, 5), torch.tensor([0, 1, 2, 3, 4, 0])
    expected = -(
        smooth(torch.nn.functional.one_hot(targets, 5).double(), 0.1) * logits.log_softmax(dim=1)
    ).sum(dim=1)
    for shift in (0.0, 1e3, -1e6):
        shifted = (logits + shift).requires_grad_()
        losses = cross_entropy(shifted, targets, label_smoothing=0.1)
        assert_close(losses.detach(), expected, rtol=0, atol=1e-8)
        (slope,) = torch.autograd.grad(losses.sum(), shifted)
        assert slope.sum(dim=1).abs().max() < 1e-9
        # and any gap can be written down: the price is finite
    assert abs(at_gap(100, 5, 0.1) - 8) < 1e-9


def test_claim_4_6_smoothing_logit_bound():
    """Printed: log((1 - eps) / eps). At the optimum itself the gap is larger, always."""
    for classes, eps in ((2, 0.1), (10, 0.1), (50_257, 0.1), (10, 0.6)):
        best, printed = smoothed_optimum(classes, smoothing=eps), math.log((1 - eps) / eps)
        gap = math.log(((1 - eps) * classes + eps) / eps)
        assert abs(best.gap - gap) < 1e-9 and gap > printed + 0.6
        # the loss falls all the way from the printed bound to the gap, and rises after it
        costs = [at_gap(z, classes, eps) for z in (printed, gap, gap + 1)]
        assert abs(best.loss - costs[1]) < 1e-9 and costs[1] < min(costs[0], costs[2]) - 0.01
    # it is the gap of two classes when eps is what the other class gets
    assert abs(smoothed_optimum(2, smoothing=0.2).gap - math.log(0.9 / 0.1)) < 1e-12


def test_claim_4_6_smoothing_gradient():
    """Right for the one term of class j, which never stops; the gradient at its logit does."""
    eps, classes = 0.2, 4
    logits = f64(2, 0.3, -1, 0.5).unsqueeze(0).requires_grad_()
    (slope,) = torch.autograd.grad(
        cross_entropy(logits, torch.tensor([0]), label_smoothing=eps).sum(), logits
    )
    p = logits.detach().softmax(dim=1)[0]
    assert_close(slope[0], p - smooth(f64(1, 0, 0, 0), eps))
    for j in (1, 2, 3):
        indicator = torch.nn.functional.one_hot(torch.tensor(j), classes).double()
        of_the_term = -eps / classes * (indicator - p)
        assert abs(of_the_term[j] - slope[0, j]) > 0.02
    pushed = f64(2, 5, -1, 0.5).unsqueeze(0).requires_grad_()  # a wrong class is too likely
    (now,) = torch.autograd.grad(
        cross_entropy(pushed, torch.tensor([0]), label_smoothing=eps).sum(), pushed
    )
    q = pushed.detach().softmax(dim=1)[0, 1]
    assert now[0, 1] > 0.8 and -eps / classes * (1 - q) < 0  # the readings differ in sign


def test_claim_4_6_smoothing_uniform_teacher():
    """Hard loss and distillation from equal logits, at temperature 1; log C is a constant."""
    logits, targets, eps = draws(8, 6), torch.tensor([0, 1, 2, 3, 4, 5, 0, 1]), 0.3
    p = logits.log_softmax(dim=1)
    to_uniform = -p.mean(dim=1) - math.log(6)
    taught = distillation_loss(logits, torch.zeros_like(logits), temperature=1.0)
    assert_close(taught, to_uniform)
    hard = -p.gather(1, targets.unsqueeze(1)).squeeze(1)
    smoothed = cross_entropy(logits, targets, label_smoothing=eps)
    assert_close(smoothed, (1 - eps) * hard + eps * (taught + math.log(6)))
    # at a high temperature it is half the variance of the logits instead
    hot = distillation_loss(logits, torch.zeros_like(logits), temperature=1e4)
    assert_close(hot, logits.var(dim=1, correction=0) / 2, rtol=1e-3, atol=1e-3)


def test_claim_4_6_smoothing_similarity():
    """Wrong classes exchanged: the smoothed loss cannot tell, that of a real teacher can."""
    logits = f64(3, 1.5, -2, 0.2)
    target, teacher = torch.tensor([0]), f64(0.7, 0.25, 0.01, 0.04)
    losses, taught = [], []
    for order in ((0, 1, 2, 3), (0, 2, 3, 1), (0, 3, 1, 2)):
        rows = logits[list(order)].unsqueeze(0)
        losses.append(cross_entropy(rows, target, label_smoothing=0.1))
        taught.append(cross_entropy(rows, teacher.unsqueeze(0)).item())
    p = logits.log_softmax(dim=0)
    assert_close(torch.cat(losses), (-0.9 * p[0] - 0.1 * p.mean()).expand(3))
    assert_close(f64(taught[0]), -(teacher * p).sum().unsqueeze(0))
    assert taught[0] < min(taught[1:]) - 0.3


def test_claim_4_6_smoothing_attention():
    """All attention on one key, and the smoothed loss at its minimum: no slope is left."""
    best = smoothed_optimum(4, smoothing=0.1)
    value = torch.zeros(6, 4, dtype=torch.float64)
    value[2, 1] = best.gap
    query = torch.nn.functional.one_hot(torch.tensor([2]), 6).double().mul(1e3).requires_grad_()
    key = torch.eye(6, dtype=torch.float64, requires_grad=True)
    output, weights = scaled_dot_product_attention(query, key, value)
    assert abs(weights[0, 2].item() - 1) < 1e-9
    loss = cross_entropy(output, torch.tensor([1]), label_smoothing=0.1).sum()
    by_hand = -0.925 * math.log(0.925) - 3 * 0.025 * math.log(0.025)
    assert abs(loss.item() - by_hand) < 1e-9 and abs(best.loss - by_hand) < 1e-12
    for slope in torch.autograd.grad(loss, [query, key]):
        assert slope.abs().max() < 1e-9


def test_claim_4_6_smoothing_boundary():
    """A rich model's boundary stays; a line's moves to the middle, or further into the rare."""
    soft = f64(0.5, 0.3, 0.2)
    p = smooth(soft, 0.4).log().unsqueeze(0).requires_grad_()
    least = cross_entropy(p, soft.unsqueeze(0), label_smoothing=0.4).sum()
    assert_close(least, -(smooth(soft, 0.4) * smooth(soft, 0.4).log()).sum())
    (slope,) = torch.autograd.grad(least, p)
    assert slope.abs().max() < 1e-9 and p.argsort().equal(soft.unsqueeze(0).argsort())
    x = torch.linspace(-8, 8, 401, dtype=torch.float64)

    def boundary(rare: float, spread: float, eps: float) -> float:
        left = (1 - rare) * torch.exp(-((x + 1) ** 2) / 2)
        right = rare / spread * torch.exp(-((x - 1) ** 2) / (2 * spread**2))
        mass = (left + right) / (left + right).sum()
        truth = torch.stack([left, right], dim=1) / (left + right).unsqueeze(1)
        w = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        for _ in range(8):  # Newton
            logits = torch.stack([torch.zeros_like(x), w[0] * x + w[1]], dim=1)
            loss = (mass * cross_entropy(logits, truth, label_smoothing=eps)).sum()
            (slope,) = torch.autograd.grad(loss, w)
            p = logits.detach().softmax(dim=1)[:, 1]
            features = torch.stack([x, torch.ones_like(x)], dim=1)
            curvature = features.T @ ((mass * p * (1 - p)).unsqueeze(1) * features)
            w = (w - torch.linalg.solve(curvature, slope)).detach().requires_grad_()
        assert slope.abs().max() < 1e-5
        return (-w[1] / w[0]).item()

    assert abs(boundary(0.5, 2.0, 0.3)) < abs(boundary(0.5, 2.0, 0.0)) - 0.05
    assert abs(boundary(0.1, 1.0, 0.0) - math.log(9) / 2) < 1e-3  # Bayes
    assert boundary(0.1, 1.0, 0.3) > math.log(9) / 2 + 0.5

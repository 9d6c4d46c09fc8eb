"""What textbook subsection 4.6.1 says, held to numbers: convexity, Hessians, saddles."""

import functools
import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from lmlosses import optim
from lmlosses.analysis.curvature import hessian, hessian_product
from lmlosses.analysis.dynamics import best_lr, distance_rate, gradient_descent_on_quadratic
from lmlosses.analysis.geometry import fisher_information
from lmlosses.analysis.landscape import convexity_gap, loss_plane, loss_slice, strong_convexity
from lmlosses.analysis.spectrum import condition_number, sharpness, top_eigenvalues
from lmlosses.lab.models import scaled_dot_product_attention
from lmlosses.lab.paths import optimizer_path
from lmlosses.lab.training import gradient_descent
from lmlosses.losses import (
    binary_cross_entropy,
    cross_entropy,
    entropy,
    half_squared_error,
    kl_divergence,
)
from lmlosses.normalizers import softmax_jacobian
from lmlosses.precision import log_sum_exp


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def leaf(values: Tensor) -> Tensor:
    return values.detach().clone().requires_grad_()


def second_difference(function, point: Tensor, u: Tensor, v: Tensor, step: float = 1e-4) -> float:
    """The mixed second derivative along two directions, from four values."""
    corners = [a * b * function(point + step * (a * u + b * v)) for a in (1, -1) for b in (1, -1)]
    return float(sum(corners) / (4 * step**2))


def regression(features: Tensor, targets: Tensor):
    return lambda w: half_squared_error(features @ w, targets).mean()


# ---- convexity


def test_claim_4_6_chord_above_graph():
    """Below every chord of a convex loss, by the amount that the three values say."""
    w, ends = torch.zeros(1, dtype=torch.float64), (f64(-2), f64(6))
    shares = torch.linspace(0, 1, 9, dtype=torch.float64)
    gaps = convexity_gap(lambda: F.softplus(-w).sum(), [w], [ends[0]], [ends[1]], shares)
    for share, gap in zip(shares.tolist(), gaps.tolist(), strict=True):
        graph = math.log1p(math.exp(-(share * -2 + (1 - share) * 6)))
        chord = share * math.log1p(math.exp(2)) + (1 - share) * math.log1p(math.exp(-6))
        assert abs(gap - (chord - graph)) < 1e-12 and gap > -1e-12


def test_claim_4_6_unique_minimum():
    """Convex, and with a line of minima; convex, and with none."""
    line = regression(f64(1, 1).unsqueeze(0), f64(1))
    for solution in (f64(1, 0), f64(0, 1), f64(3, -2)):
        assert line(solution) == 0
    assert_close(line(f64(0, 0)), torch.tensor(0.5, dtype=torch.float64))
    for weight in (0.0, 5.0, 50.0, 500.0):  # one separable sample
        loss = binary_cross_entropy(f64(weight), f64(1)).item()
        assert abs(loss - math.log1p(math.exp(-weight))) < 1e-12 and loss > 0
    held = lambda w: line(w) + w.square().sum() / 4  # noqa: E731  # strongly convex: only one
    path = gradient_descent(held, f64(3, -2), lr=0.4, steps=40)
    assert_close(path[-1], f64(0.4, 0.4), atol=1e-3, rtol=0)


def test_claim_4_6_local_is_global():
    """A quarter of the labels wrong: descent ends at log 3 wherever it began."""

    def loss(w: Tensor) -> Tensor:
        right, wrong = (binary_cross_entropy(w, torch.full_like(w, y)) for y in (1.0, 0.0))
        return (0.75 * right + 0.25 * wrong).sum()

    ends = gradient_descent(loss, f64(-6, -1, 0, 2, 8), lr=4.0, steps=60)[-1]
    assert_close(ends, torch.full_like(ends, math.log(3)), atol=1e-6, rtol=0)
    least = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    assert abs(loss(ends[:1]).item() - least) < 1e-9


def test_def_4_6_1():
    """It admits |w|, which has no derivative at 0, and refuses a cubic."""
    w, half = torch.zeros(1, dtype=torch.float64), f64(0.5)
    bent = convexity_gap(lambda: w.abs().sum(), [w], [f64(-1)], [f64(1)], half)
    assert_close(bent, f64(1))
    cubic = convexity_gap(lambda: (w**3).sum(), [w], [f64(-2)], [f64(1)], half)
    assert_close(cubic, f64(-3.5 + 0.125))


def test_eq_4_6_1():
    """For a square the difference of the two sides is known in closed form."""
    w, a, b = torch.zeros(3, dtype=torch.float64), gaussian(3, seed=1), gaussian(3, seed=2)
    shares = f64(0, 0.2, 0.5, 0.9, 1)
    target = gaussian(3, seed=3)
    gaps = convexity_gap(lambda: half_squared_error(w, target).sum(), [w], [a], [b], shares)
    assert_close(gaps, shares * (1 - shares) / 2 * (a - b).square().sum())


def test_claim_4_6_squared_error_convex():
    """For predictions linear in the weights; by loops over samples and features."""
    features, targets, w = gaussian(5, 3), gaussian(5, seed=1), leaf(gaussian(3, seed=2))
    curvature = hessian(lambda: regression(features, targets)(w), [w])
    for i, j in itertools.product(range(3), repeat=2):
        assert abs(curvature[i, j] - sum(x[i] * x[j] for x in features) / 5) < 1e-12
    v = gaussian(3, seed=4)
    assert_close(v @ curvature @ v, sum((v @ x) ** 2 for x in features) / 5)


def test_claim_4_6_cross_entropy_convex():
    features, classes = gaussian(6, 2), torch.tensor([0, 1, 2, 2, 1, 0])
    weights, shares = torch.zeros(3, 2, dtype=torch.float64), f64(0.25, 0.5, 0.75)
    for seed in range(4):
        a, b = gaussian(3, 2, seed=seed), 5 * gaussian(3, 2, seed=seed + 10)
        gaps = convexity_gap(
            lambda: cross_entropy(features @ weights.T, classes).mean(),
            [weights],
            [a],
            [b],
            shares,
        )
        at = [F.cross_entropy(features @ W.T, classes) for W in (a, b)]
        for share, gap in zip(shares, gaps, strict=True):
            between = F.cross_entropy(features @ (share * a + (1 - share) * b).T, classes)
            assert_close(gap, share * at[0] + (1 - share) * at[1] - between)
            assert gap > 1e-6


def test_claim_4_6_why_convex():
    """Reversed divergence: as convex in Q, and not convex in w. Log-sum-exp is what decides."""
    p, middle = f64(0.99, 0.01).log(), f64(0.5)
    q = torch.zeros(2, dtype=torch.float64)
    ends = f64(0.9, 0.1), f64(0.2, 0.8)
    in_q = convexity_gap(lambda: kl_divergence(q.log(), p), [q], [ends[0]], [ends[1]], middle)
    mixed = (ends[0] + ends[1]) / 2
    by_hand = [sum(a * (math.log(a) - b) for a, b in zip(e.tolist(), p.tolist(), strict=True))
               for e in (*ends, mixed)]  # fmt: skip
    assert_close(in_q[0].item(), (by_hand[0] + by_hand[1]) / 2 - by_hand[2])
    assert in_q > 0.1
    w = torch.zeros(1, dtype=torch.float64)
    in_w = convexity_gap(
        lambda: kl_divergence(torch.cat([w, 0 * w]).log_softmax(0), p), [w], [f64(-9)], [f64(-1)],
        middle,
    )  # fmt: skip
    assert in_w < -0.3
    z = gaussian(4, seed=1)
    assert_close(cross_entropy(z, torch.tensor(2)), log_sum_exp(z) - z[2])
    assert_close(log_sum_exp(z).item(), math.log(sum(math.exp(s) for s in z.tolist())))


def test_claim_4_6_cross_entropy_decomposition():
    p, logits = f64(0.5, 0.3, 0.2), gaussian(3, seed=5)
    divergence = kl_divergence(p.log(), logits.log_softmax(0))
    by_hand = -(p * p.log()).sum()
    assert_close(entropy(p.log()), by_hand)
    assert_close(cross_entropy(logits, p), by_hand + divergence)
    assert_close(cross_entropy(logits, p), -(p * logits.log_softmax(0)).sum())


# ---- strong convexity


def test_eq_4_6_2():
    """Printed: true of w^2 + 10 sin^2 w with mu = 2 too, which bends down and traps descent."""

    def wavy(w: Tensor) -> Tensor:
        return (w.square() + 10 * w.sin().square()).sum()

    grid = torch.linspace(-6, 6, 241, dtype=torch.float64)
    assert all(wavy(w) >= w**2 for w in grid)  # f(0) = 0
    w = leaf(f64(math.pi / 2))
    bent = strong_convexity(lambda: wavy(w), [w], radius=0.01, samples=2)
    assert abs(bent - (2 + 20 * math.cos(math.pi))) < 0.01
    stuck = gradient_descent(wavy, f64(3.3), lr=0.02, steps=60)[-1]
    assert abs(stuck - 2.85) < 0.05 and wavy(stuck) > 8
    bowl = strong_convexity(lambda: 1.5 * w.square().sum(), [w], radius=1.0, samples=2)
    assert abs(bowl - 3) < 1e-6


def test_claim_4_6_rate_from_strong_convexity():
    """The same mu, other speeds; another mu, the same speed. The ratio decides."""
    rates = {}
    for mu, smooth in ((1.0, 4.0), (1.0, 100.0), (10.0, 1000.0)):
        lr = best_lr(smoothness=smooth, strong_convexity=mu)
        rate = distance_rate(lr=lr, smoothness=smooth, strong_convexity=mu)
        bowl = f64(mu, smooth)
        path = gradient_descent(
            lambda w, bowl=bowl: 0.5 * (bowl * w.square()).sum(), f64(1, 1), lr=lr, steps=5
        )
        assert_close(path[5], f64(rate**5, -(rate**5)))  # the steep one changes sides
        rates[mu, smooth] = rate
    assert abs(rates[1, 4] - 0.6) < 1e-12 and abs(rates[1, 100] - 99 / 101) < 1e-12
    assert abs(rates[10, 1000] - rates[1, 100]) < 1e-12


def test_claim_4_6_strong_convexity_of_squared_error():
    """Printed: the least eigenvalue of X^T X that is not zero, N missing. Two ways to fail."""
    features, w = gaussian(20, 3), gaussian(3, seed=1)
    loss = regression(features, features @ w)  # least at w, where it is 0
    eigenvalues, vectors = torch.linalg.eigh(features.T @ features)
    step = vectors[:, 0]
    assert loss(w + step) < eigenvalues[0] / 2 / 10  # short by the factor 20
    assert_close(loss(w + step), eigenvalues[0] / 2 / 20)
    point = leaf(w)
    found = strong_convexity(lambda: loss(point), [point], radius=1.0, samples=1)
    assert abs(found - eigenvalues[0] / 20) < 1e-6
    short = regression(features[:2], features[:2] @ w)  # two samples, three weights
    values, axes = torch.linalg.eigh(features[:2].T @ features[:2])
    assert values[1] > 0.1 and short(w + axes[:, 0]) < 1e-20  # no growth where values[0] is 0
    for seed in range(5):  # the distance to the nearest minimizer does grow with values[1] / N
        move = gaussian(3, seed=seed)
        across = move - axes[:, 0] * (axes[:, 0] @ move)
        assert short(w + move) >= values[1] / 2 / 2 * across.square().sum() - 1e-12


def test_claim_4_6_correlated_columns():
    steps = []
    for rho in (0.0, 0.8, 0.95):
        root = torch.linalg.cholesky(f64(1, rho, rho, 1).reshape(2, 2))
        features = math.sqrt(2) * root.T  # X^T X / N has ones on its diagonal
        w = leaf(f64(0, 0))
        loss = regression(features, features @ f64(1, 0))
        product = hessian_product(functools.partial(loss, w), [w])
        found = condition_number(product, [w])
        assert abs(found.value - (1 + rho) / (1 - rho)) < 1e-6 * found.value
        path = gradient_descent(loss, f64(0, 0), lr=1 / (1 + rho), steps=150)
        far = (path - f64(1, 0)).norm(dim=-1) > 0.03
        steps.append(int(far.sum()))
    assert steps[0] <= 1 and 20 < steps[1] < 40 and 100 < steps[2] < 150


def test_claim_4_6_fisher_governs_curvature():
    features, classes = gaussian(7, 2), torch.tensor([0, 1, 2, 2, 1, 0, 0])
    w = leaf(gaussian(6, seed=1))
    model = lambda w: features @ w.reshape(2, 3)  # noqa: E731
    curvature = hessian(lambda: cross_entropy(model(w), classes).mean(), [w])
    assert_close(curvature, fisher_information(model, w.detach()))
    for i, j in ((0, 0), (1, 4), (5, 2)):
        unit = torch.eye(6, dtype=torch.float64)
        loss = lambda w: F.cross_entropy(model(w), classes)  # noqa: E731
        assert abs(curvature[i, j] - second_difference(loss, w.detach(), unit[i], unit[j])) < 1e-5


def test_claim_4_6_overlap_flattens():
    """Three groups, a share of each with either wrong label: less overlap, less curvature."""
    eye = torch.eye(3, dtype=torch.float64)
    least, needed = [], []
    for wrong in (2 / 3, 0.2, 0.02):  # at 2/3 the labels say nothing
        labels = (1 - 1.5 * wrong) * eye + wrong / 2

        def loss(W: Tensor, labels: Tensor = labels) -> Tensor:
            return cross_entropy(W, labels).mean()

        best = leaf(labels.log() - labels.log().mean(dim=1, keepdim=True))
        values = torch.linalg.eigvalsh(hessian(functools.partial(loss, best), [best]))
        least.append(values[3].item())  # three are zero: one constant a group
        assert abs(least[-1] - wrong / 2 / 3) < 1e-9  # the printed rule says it should grow
        start = torch.zeros(3, 3, dtype=torch.float64)
        path = gradient_descent(loss, start, lr=6.0, steps=80)
        far = (path - best.detach()).flatten(1).norm(dim=1) > 0.05
        needed.append(int(far.sum()))
    assert needed[0] == 0 < needed[1] < 10 and needed[2] > 50


def test_claim_4_6_networks_non_convex():
    """Two copies of one solution, hidden units exchanged: between them the loss is higher."""
    features = gaussian(9, 2)
    first, last = f64(2, -1, 0.5, 1.5).reshape(2, 2), f64(1, -1)
    targets = torch.tanh(features @ first.T) @ last
    W, v = torch.zeros(2, 2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    gap = convexity_gap(
        lambda: half_squared_error(torch.tanh(features @ W.T) @ v, targets).mean(), [W, v],
        [first, last], [first.flip(0), last.flip(0)], f64(0.5),
    )  # fmt: skip
    between = (targets.square() / 2).mean()  # the mean of the two output weights is 0
    assert_close(gap, -between.unsqueeze(0))
    assert gap < -0.1


def test_claim_4_6_non_convex_many_minima():
    """w^2 + 3 sin^2 w bends down and has one stationary point."""

    def wavy(w: Tensor) -> Tensor:
        return (w.square() + 3 * w.sin().square()).sum()

    w = leaf(f64(math.pi / 2))
    assert_close(hessian(lambda: wavy(w), [w]), f64(2 + 6 * math.cos(math.pi)).unsqueeze(0))
    starts = torch.linspace(-8, 8, 41, dtype=torch.float64)
    slopes = 2 * starts + 3 * torch.sin(2 * starts)
    assert (slopes.sign() == starts.sign()).all()  # towards 0 from everywhere
    ends = gradient_descent(wavy, starts, lr=0.1, steps=80)
    assert ends[-1].abs().max() < 1e-4
    assert_close(ends[1], starts - 0.1 * slopes)


def test_claim_4_6_solutions_differ_on_test():
    """Weights u * v, more of them than samples: two starts, no training loss, other tests."""
    features = gaussian(5, 8, seed=2)
    truth = f64(1, *[0] * 7)
    train = regression(features, features @ truth)
    held_out = []
    fresh, zero = gaussian(100, 8, seed=4), torch.zeros(100, dtype=torch.float64)
    for scale in (0.1, 2.0):
        start = scale * torch.stack([torch.ones(8), torch.zeros(8)]).double()
        path = gradient_descent(lambda uv: train(uv[0] * uv[1]), start, lr=0.1, steps=300)
        assert_close(path[0], start)
        w = path[-1, 0] * path[-1, 1]
        assert train(w) < 0.0005
        held_out.append(half_squared_error(fresh @ (w - truth), zero).mean().item())
    assert 0.001 < held_out[0] < 0.01 < 0.08 < held_out[1]
    assert abs(train(f64(*[0] * 8)) - ((features[:, 0]) ** 2).mean() / 2) < 1e-12


# ---- Hessians


def test_def_4_6_2():
    """Differentiable is not enough: w |w| / 2 has a slope everywhere, no curvature at 0."""
    slope = abs  # of w |w| / 2
    right, left = (slope(1e-6) - slope(0)) / 1e-6, (slope(-1e-6) - slope(0)) / -1e-6
    assert right == 1 and left == -1
    w = leaf(f64(-3, 2))
    assert_close(hessian(lambda: (w * w.abs() / 2).sum(), [w]), torch.diag(f64(-1, 1)))


def test_eq_4_6_3():
    """Entry by entry against differences; but the order of the two derivatives can matter."""

    def smooth(w: Tensor) -> Tensor:
        return (w[0] * w[1]).sin() + w[0].exp() * w[2] ** 2

    w, unit = leaf(f64(0.3, -0.7, 1.2)), torch.eye(3, dtype=torch.float64)
    curvature = hessian(lambda: smooth(w), [w])
    for i, j in itertools.product(range(3), repeat=2):
        assert (
            abs(curvature[i, j] - second_difference(smooth, w.detach(), unit[i], unit[j])) < 1e-5
        )

    def slope(x: float, y: float, axis: int) -> float:  # of x y (x^2 - y^2) / (x^2 + y^2)
        point = leaf(f64(x, y))
        a, b = point
        (a * b * (a**2 - b**2) / (a**2 + b**2)).backward()
        return point.grad[axis].item()

    h = 1e-6  # both slopes are 0 at the origin
    assert abs(slope(0, h, 0) / h + 1) < 1e-9 and abs(slope(h, 0, 1) / h - 1) < 1e-9


def test_claim_4_6_eigenvalues_are_curvatures():
    features, classes = gaussian(6, 2), torch.tensor([0, 1, 2, 2, 1, 0])
    W = leaf(gaussian(3, 2, seed=1))
    loss = lambda: cross_entropy(features @ W.T, classes).mean()  # noqa: E731
    top = top_eigenvalues(hessian_product(loss, [W]), [W], count=2, tolerance=1e-9)
    for value, vector in zip(top.values, top.vectors, strict=True):
        below, here, above = loss_slice(loss, [W], vector, f64(-1e-3, 0, 1e-3))
        assert abs((below - 2 * here + above) / 1e-6 - value) < 1e-4
    assert_close(here.item(), F.cross_entropy(features @ W.T, classes).item())


def test_eq_4_6_4():
    features, targets, w = gaussian(8, 3, seed=7), gaussian(8, seed=8), leaf(gaussian(3))
    curvature = hessian(lambda: half_squared_error(features @ w, targets).mean(), [w])
    outer = sum(torch.outer(x, x) for x in features) / 8
    assert_close(curvature, outer)
    assert_close(curvature, features.T @ features / 8)


def test_claim_4_6_constant_curvature():
    """What descent on it does is known without a step."""
    features, targets = gaussian(8, 3, seed=1), gaussian(8, seed=2)
    path = gradient_descent(regression(features, targets), gaussian(3), lr=0.3, steps=40)
    curvature, linear = features.T @ features / 8, features.T @ targets / 8
    steps = torch.tensor([0, 1, 7, 40])
    predicted = gradient_descent_on_quadratic(curvature, gaussian(3), steps, lr=0.3, linear=linear)
    assert_close(predicted, path[steps])
    assert_close(path[0], gaussian(3))


def test_claim_4_6_principal_directions():
    """True of centered inputs. Else the first eigenvector points at the mean."""
    spread = gaussian(200, 2) * f64(3, 0.5)
    spread = spread - spread.mean(dim=0)
    principal = torch.linalg.svd(spread, full_matrices=False)[2][0]
    for mean, aligned in ((f64(0, 0), True), (f64(0, 20), False)):
        features, w = spread + mean, leaf(f64(0, 0))
        loss = lambda x=features, w=w: half_squared_error(x @ w, x[:, 0]).mean()  # noqa: E731
        curvature = hessian(loss, [w])
        assert_close(curvature, spread.T @ spread / 200 + torch.outer(mean, mean))
        top = torch.linalg.eigh(curvature)[1][:, -1]
        assert ((top @ principal).abs() > 0.99) == aligned
        if not aligned:
            assert top[1].abs() > 0.999


def test_eq_4_6_5():
    """Printed: a product of C x C with d x d. Only the Kronecker product is the Hessian."""
    features, classes = gaussian(5, 2, seed=3), torch.tensor([0, 2, 1, 1, 0])
    W = leaf(gaussian(3, 2, seed=4))
    curvature = hessian(lambda: cross_entropy(features @ W.T, classes).mean(), [W])
    blocks = softmax_jacobian((features @ W.T).detach())
    outer = [torch.outer(x, x) for x in features]
    product = sum(torch.kron(J, xx) for J, xx in zip(blocks, outer, strict=True)) / 5
    assert_close(curvature, product)
    try:
        blocks[0] @ outer[0]
    except RuntimeError as error:
        assert "shapes cannot be multiplied" in str(error)
    else:
        raise AssertionError("a product of 3 x 3 with 2 x 2")
    square = blocks[0] @ (three := torch.outer(gaussian(3), gaussian(3)))
    assert (
        square.shape == (3, 3) and not torch.allclose(square, square.T) and three.shape == (3, 3)
    )


def test_claim_4_6_hessian_depends_on_parameters():
    """Two classes, one input of 2: the curvature falls with the logit."""
    for weight in (0.0, 1.0, 4.0):
        w = leaf(f64(weight))
        logits = lambda w=w: torch.cat([2 * w, 0 * w])  # noqa: E731
        curvature = hessian(lambda: cross_entropy(logits(), torch.tensor(0)), [w])  # noqa: B023
        p = 1 / (1 + math.exp(-2 * weight))
        assert abs(curvature.item() - 4 * p * (1 - p)) < 1e-12
    assert curvature < 0.002


def test_claim_4_6_jacobian_negative():
    """Printed: eigenvalues p (1 - p) and -p. They are 0 and positive, and v^T J v a variance."""
    p = f64(0.6, 0.3, 0.1)
    values = torch.linalg.eigvalsh(softmax_jacobian(p.log()))
    # roots of t^2 - (trace) t + (sum of the principal minors), beside the root 0
    trace, minors = 1 - (p**2).sum().item(), 3 * p.prod().item()
    root = math.sqrt(trace**2 / 4 - minors)
    assert_close(values, f64(0, trace / 2 - root, trace / 2 + root))
    for printed in (p * (1 - p), -p):
        assert min((values - number).abs().min().item() for number in printed) > 0.01
    v = gaussian(3)
    variance = (p * (v - p @ v) ** 2).sum()
    assert_close(v @ softmax_jacobian(p.log()) @ v, variance)


def test_claim_4_6_curvature_for_adaptive_methods():
    """Two losses of one slope and other curvatures move Adam alike; Fisher information differs."""
    paths = []
    for curvature in (0.0, 1.0, -30.0):
        loss = lambda w, t, c=curvature: 2 * w.sum() + c / 2 * (w - 1).square().sum()  # noqa: E731
        make = lambda p: optim.Adam(p, lr=0.125)  # noqa: E731
        paths.append(optimizer_path(make, loss, f64(1, 1), steps=1)[1])
    for end in paths:
        assert_close(end, f64(0.875, 0.875), atol=1e-7, rtol=0)
    model = lambda w: torch.stack([w, 0 * w], dim=-1)  # noqa: E731  # one sample, one weight
    for weight in (0.0, 3.0):
        p = 1 / (1 + math.exp(-weight))
        assert abs(fisher_information(model, f64(weight)).item() - p * (1 - p)) < 1e-12


def test_claim_4_6_attention_hessian():
    """In the scores: a Gauss-Newton part with diag(a) - a a^T twice, and a part with residuals."""
    value, target = gaussian(4, 2), gaussian(2, seed=1)
    scores = leaf(gaussian(4, seed=2))

    def loss() -> Tensor:  # keys of the identity make the query the scores
        keys = torch.eye(4, dtype=torch.float64)
        attended = scaled_dot_product_attention(scores.unsqueeze(0), keys, value, temperature=1.0)
        return half_squared_error(attended.output[0], target).sum()

    exact = hessian(loss, [scores])
    a = scores.detach().softmax(0)
    J = torch.diag(a) - torch.outer(a, a)
    pull = value @ (a @ value - target)  # slope of the loss in each weight a_j
    bend = J @ pull
    second = torch.diag(bend) - torch.outer(bend, a) - torch.outer(a, bend)
    first = J @ value @ value.T @ J
    assert_close(exact, first + second)
    assert (exact - first).norm() > 0.1 * exact.norm()
    best_multiple = (exact * J).sum() / (J * J).sum()
    assert (exact - best_multiple * J).norm() > 0.3 * exact.norm()


def test_claim_4_6_attention_like_classification():
    """A classifier's Hessian has no negative eigenvalue; at zero projections attention's does."""
    x, target = gaussian(5, 3), gaussian(5, 3, seed=1)
    query, key = (leaf(torch.zeros(3, 3, dtype=torch.float64)) for _ in range(2))

    def loss() -> Tensor:
        attended = scaled_dot_product_attention(x @ query, x @ key, x)
        return half_squared_error(attended.output, target).mean()

    slopes = torch.autograd.grad(loss(), [query, key])
    assert max(slope.abs().max() for slope in slopes) == 0
    exact = hessian(loss, [query, key])
    assert exact[:9, :9].abs().max() < 1e-15  # all curvature is between the two
    # there A is uniform: the loss falls along (u, v) as the slope in the scores says
    error = (x.mean(dim=0) - target) / 15
    centered = x - x.mean(dim=0)
    slope_in_scores = error @ (centered / 5).T / math.sqrt(3)
    mixed = torch.einsum("ij,ia,jb->ab", slope_in_scores, x, x)  # along query key^T
    singular = torch.linalg.svdvals(mixed)
    values = torch.linalg.eigvalsh(exact)
    assert_close(values[-3:].flip(0), singular[:1].expand(3))
    assert_close(values[:3], -singular[:1].expand(3))
    logits = leaf(gaussian(4, seed=2))
    classifier = hessian(lambda: cross_entropy(logits, torch.tensor(1)), [logits])
    assert_close(classifier, _softmax_jacobians(logits.detach())[0])
    assert torch.linalg.eigvalsh(classifier)[0] > -1e-12


# ---- saddles and minima


def test_def_4_6_3():
    """Neither a minimum nor a maximum, and yet every straight line leads up."""
    w, straight = leaf(f64(0, 0)), []
    loss = lambda: (w[1] - w[0] ** 2) * (w[1] - 2 * w[0] ** 2)  # noqa: E731
    assert torch.autograd.grad(loss(), w)[0].abs().max() == 0
    for angle in torch.linspace(0, math.pi, 13, dtype=torch.float64):
        direction = torch.stack([angle.cos(), angle.sin()])
        straight.append(loss_slice(loss, [w], [direction], f64(-1e-3, -1e-4, 1e-4, 1e-3)))
    assert torch.stack(straight).min() > 0
    assert_close(straight[0], 2 * f64(1e-12, 1e-16, 1e-16, 1e-12), atol=1e-20, rtol=1e-6)
    curve = [loss_plane(loss, [w], [f64(1, 0)], [f64(0, 1)], f64(h), f64(1.5 * h * h)).item()
             for h in (1e-1, 1e-2, 1e-3)]  # fmt: skip
    for h, height in zip((1e-1, 1e-2, 1e-3), curve, strict=True):
        assert abs(height + h**4 / 4) < 1e-6 * h**4  # lower than at the origin
    assert_close(hessian(loss, [w]), torch.diag(f64(0, 2)))
    cubic = [h**3 for h in (-1e-3, 0, 1e-3)]  # x^3: a saddle by both halves, without curvature
    assert cubic[0] < cubic[1] < cubic[2]


def test_claim_4_6_saddles_everywhere():
    """All weights zero: no slope, and curvature of both signs."""
    features, targets = gaussian(6, 2, seed=2), gaussian(6, seed=3)
    W = leaf(torch.zeros(3, 2, dtype=torch.float64))
    v = leaf(torch.zeros(3, dtype=torch.float64))
    loss = lambda: half_squared_error(torch.tanh(features @ W.T) @ v, targets).mean()  # noqa: E731
    slopes = torch.autograd.grad(loss(), [W, v])
    assert all(slope.abs().max() == 0 for slope in slopes)
    exact = hessian(loss, [W, v])
    assert_close(exact[:2, 6], -features.T @ targets / 6)
    values = torch.linalg.eigvalsh(exact)
    size = (features.T @ targets / 6).norm()  # between a unit's input and its output weight
    expected = torch.cat([-size.expand(3), torch.zeros(3).double(), size.expand(3)])
    assert_close(values, expected, atol=1e-12, rtol=0)


def test_claim_4_6_critical_points():
    """No maxima, as the loss is convex in the last layer. But a random start is not critical."""
    features, classes = gaussian(8, 2), torch.tensor([0, 1, 2, 2, 1, 0, 1, 2])
    hidden = lambda W: torch.tanh(features @ W.T)  # noqa: E731
    for seed in range(3):
        W, V = leaf(gaussian(4, 2, seed=seed)), leaf(gaussian(3, 4, seed=seed + 5))
        loss = lambda W=W, V=V: cross_entropy(hidden(W) @ V.T, classes).mean()  # noqa: E731
        assert torch.autograd.grad(loss(), V)[0].norm() > 0.01
        last = hessian(loss, [V])
        direct = sum(
            torch.kron(J, torch.outer(h, h))
            for J, h in zip(_softmax_jacobians(hidden(W) @ V.T), hidden(W), strict=True)
        ) / 8  # fmt: skip
        assert_close(last, direct.detach())
        assert torch.linalg.eigvalsh(last)[0] > -1e-12 and last.trace() > 0.01


def _softmax_jacobians(logits: Tensor) -> list[Tensor]:
    rows = logits.softmax(-1).reshape(-1, logits.shape[-1])
    return [torch.diag(p) - torch.outer(p, p) for p in rows]


def test_claim_4_6_minima_exponential():
    """2^d in one family, one for every d in another."""
    for dim in (1, 2, 3):
        grid = torch.cartesian_prod(*[f64(-1.7, -0.4, 0.3, 1.2)] * dim).reshape(-1, dim)
        wells = gradient_descent(lambda w: (w**2 - 1).square().sum() / 4, grid, lr=0.3, steps=40)
        assert len({tuple(end) for end in wells[-1].round(decimals=3).tolist()}) == 2**dim
        assert_close(wells[1], grid - 0.3 * grid * (grid**2 - 1))
        bowl = gradient_descent(lambda w: w.square().sum() / 2, grid, lr=0.3, steps=40)
        assert len({tuple(end.abs()) for end in bowl[-1].round(decimals=3)}) >= 1
        assert bowl[-1].abs().max() < 1e-4


def test_claim_4_6_minima_similar():
    """Alike from small starts, not from others; none has a training loss."""
    features, truth = gaussian(6, 12, seed=5), f64(*[1] * 12)
    fresh, zero = gaussian(200, 12, seed=6), torch.zeros(200, dtype=torch.float64)
    train = regression(features, features @ truth)
    found = {}
    for scale in (0.01, 5.0):
        found[scale] = []
        for seed in range(2):
            path = gradient_descent(train, scale * gaussian(12, seed=seed), lr=0.3, steps=100)
            assert train(path[-1]) < 0.02
            found[scale].append(half_squared_error(fresh @ (path[-1] - truth), zero).mean().item())
    assert max(found[0.01]) < 1.1 * min(found[0.01]) < 5
    assert min(found[5.0]) > 5 * max(found[0.01]) > 5


def test_claim_4_6_lottery_ticket():
    """The hypothesis is about a mask that trains alone, and is silent on how minima compare."""
    features, truth = gaussian(12, 20, seed=3), f64(3, -3, *[0] * 18)
    train = regression(features, features @ truth)
    zero = torch.zeros(20, dtype=torch.float64)
    dense = gradient_descent(train, zero, lr=0.15, steps=300)[-1]
    mask = (dense.abs() >= dense.abs().topk(4).values[-1]).double()
    ticket = gradient_descent(lambda w: train(w * mask), zero, lr=0.15, steps=300)[-1] * mask
    assert train(dense) < 1e-3 and (ticket - truth).norm() < 0.01  # four weights suffice
    # the minima of the dense model are far from alike all the same
    flat = torch.linalg.svd(features)[2][-1]
    assert train(dense + 9 * flat) < 1e-3 and (dense + 9 * flat - truth).norm() > 8
    assert (dense - torch.linalg.pinv(features) @ features @ truth).norm() < 0.05


def test_claim_4_6_shape_decides_quality():
    """Weights 1 and 1, or 10 and 0.1: one function, curvatures 2 and 100."""
    for first in (1.0, 10.0):
        w = leaf(f64(first, 1 / first))
        curvature = sharpness(lambda w=w: (w[0] * w[1] - 1) ** 2 / 2, [w], tolerance=1e-9)
        assert abs(curvature - (first**2 + first**-2)) < 1e-6
        assert abs(w.detach().prod() - 1) < 1e-12  # the same model


def test_claim_4_6_almost_all_minima_good():
    """All minima of an over-parameterized model fit; the test loss is unbounded on them."""
    features, truth = gaussian(3, 6, seed=8), gaussian(6, seed=9)
    fresh = gaussian(50, 6, seed=10)
    flat = torch.linalg.svd(features)[2][3:]  # directions that the data do not see
    losses = []
    for size in (1.0, 10.0, 100.0):
        at = truth + size * flat[0]
        assert half_squared_error(features @ at, features @ truth).mean() < 1e-20
        losses.append(half_squared_error(fresh @ at, fresh @ truth).mean().item())
    once = ((fresh @ flat[0]) ** 2).mean().item() / 2
    assert_close(f64(*losses), once * f64(1, 100, 10_000))


def test_claim_4_6_overparameterized_simple():
    """From zero the shortest solution; from elsewhere what the start had stays, to the end."""
    features, targets = gaussian(3, 6, seed=11), gaussian(3, seed=12)
    shortest = torch.linalg.lstsq(features, targets, driver="gelsd").solution
    for start in (torch.zeros(6, dtype=torch.float64), 4 * gaussian(6, seed=13)):
        end = gradient_descent(regression(features, targets), start, lr=0.3, steps=400)[-1]
        unseen = start - torch.linalg.pinv(features) @ features @ start
        assert_close(end, shortest + unseen, atol=1e-4, rtol=0)
    assert end.norm() > 3 * shortest.norm()


# ---- escape


def test_claim_4_6_curvature_decides_escape():
    """Steps from delta to 1: log(1 / delta) over log(1 + eta lambda). From the ridge: never."""
    for curvature, delta in ((0.5, 1e-3), (0.5, 1e-6), (0.05, 1e-3)):
        saddle = torch.diag(f64(1, -curvature))
        needed = math.log(1 / delta) / math.log1p(0.4 * curvature)
        steps = torch.tensor([math.floor(needed), math.ceil(needed)])
        before, after = gradient_descent_on_quadratic(saddle, f64(1, delta), steps, lr=0.4)
        assert before[1] < 1 < after[1]
        assert abs(after[1] / before[1] - (1 + 0.4 * curvature)) < 1e-9
    ridge = gradient_descent_on_quadratic(saddle, f64(1, 0), torch.tensor(3), lr=0.4)
    assert_close(ridge, f64(0.6**3, 0))


def bent_saddle(w: Tensor, curvature: float = 0.2) -> Tensor:
    """A saddle at the origin, curvatures 1 and minus the given, with minima at (0, ±1)."""
    return w[0].square() / 2 + curvature * (w[1].square() - 1).square() / 4


def test_claim_4_6_negative_eigenvalue_escape():
    """Any start but those on the ridge ends in a minimum."""
    ends = [gradient_descent(bent_saddle, f64(1, b), lr=0.5, steps=250)[-1] for b in (1e-6, -1e-3)]
    assert_close(ends[0], f64(0, 1), atol=1e-3, rtol=0)
    assert_close(ends[1], f64(0, -1), atol=1e-3, rtol=0)
    ridge = gradient_descent(bent_saddle, f64(1, 0), lr=0.5, steps=20)[-1]
    assert_close(ridge, f64(0.5**20, 0))


def test_claim_4_6_descent_escapes_slowly():
    """Near the saddle the slope is the curvature times the distance: it grows by a factor."""
    w = leaf(f64(0, 1e-6))
    curvature = hessian(lambda: bent_saddle(w), [w])
    assert_close(curvature, torch.diag(f64(1, -0.2)))
    path = gradient_descent(bent_saddle, w, lr=0.5, steps=100)[:, 1]
    for step in (0, 10, 50):
        assert abs(path[step + 1] / path[step] - 1.1) < 1e-3
    assert path[50] < 2e-4 and 1e-2 < path[100] < 0.05  # the slope at 50 is still below 4e-5


def test_claim_4_6_adam_second_order():
    """Adam without momentum leaves fastest; turned by 45 degrees it is slower than descent."""

    def turned(angle: float):
        c, s = math.cos(angle), math.sin(angle)
        axes = f64(c, s), f64(-s, c)
        return axes, lambda w, t: bent_saddle(torch.stack([w @ axes[0], w @ axes[1]]))

    makers = {
        "descent": lambda p: optim.SGD(p, lr=0.5),
        "momentum": lambda p: optim.SGD(p, lr=0.5, momentum=0.9),
        "Adam": lambda p: optim.Adam(p, lr=0.01, betas=(0.0, 0.999)),
    }
    left = {}
    for angle in (0.0, math.pi / 4):
        axes, loss = turned(angle)
        start = axes[0] + 1e-6 * axes[1]
        for name, make in makers.items():
            steps = 60 if name == "momentum" else 150
            path = optimizer_path(make, loss, start, steps=steps) @ axes[1]
            assert path[:2].min() > 0
            assert_close(path[0].item(), 1e-6)
            left[name, angle] = int((path.abs() < 0.5).sum())
            if name == "Adam" and angle == 0:  # its first step is the rate, whatever the slope
                assert abs(path[1] - 0.01) < 2e-3
    assert left["Adam", 0] < 40 < left["momentum", 0] < 60 < 120 < left["descent", 0] < 150
    assert left["descent", math.pi / 4] == left["descent", 0]
    assert left["momentum", math.pi / 4] == left["momentum", 0]
    assert left["Adam", math.pi / 4] == 151  # still there, and descent is not

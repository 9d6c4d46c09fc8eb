"""The entries of page 4.3.2: convexity, saturation, behavior at the boundary."""

import math

import torch
from torch.autograd.functional import hessian, jacobian

from lmlosses import token_mean
from lmlosses.analysis.geometry import fisher_information
from lmlosses.lab.training import gradient_descent
from lmlosses.losses import (
    binary_cross_entropy,
    cross_entropy,
    entropy,
    half_squared_error,
    huber,
    kl_divergence,
    squared_error,
)
from lmlosses.normalizers import log_softmax, softmax
from lmlosses.optim import Adam


def vec(*values):
    return torch.tensor(values, dtype=torch.float64)


def sigmoid(z):
    return 1 / (1 + math.exp(-z))


def logit(p):
    return math.log(p) - math.log1p(-p)


def squared_behind_sigmoid(z, y):
    """Equation (4.3.13) as a function of the logit, a number."""
    return half_squared_error(vec(sigmoid(z)), vec(y)).item()


def logistic(z, y):
    """Equation (4.3.15) as a function of the logit, a number."""
    return binary_cross_entropy(vec(z), vec(y)).item()


def slope(f, x, step=1e-5):
    return (f(x + step) - f(x - step)) / (2 * step)


def curvature(f, x, step=1e-3):
    return (f(x + step) - 2 * f(x) + f(x - step)) / step**2


def mixed(w, share):
    """Mean cross-entropy of w on samples at ±1, of which a share carries the other's label."""
    return (1 - share) * logistic(w, 1.0) + share * logistic(w, 0.0)


def test_claim_4_3_chord_above_graph():
    a, b = vec(2.0, -1.0, 0.5), vec(-3.0, 1.0, 4.0)
    share = torch.linspace(0, 1, 21, dtype=torch.float64).unsqueeze(-1)
    points = share * a + (1 - share) * b
    graph = cross_entropy(points, torch.zeros(21, dtype=torch.long))
    by_hand = [math.log(sum(math.exp(z) for z in p)) - p[0] for p in points.tolist()]
    torch.testing.assert_close(graph, torch.tensor(by_hand, dtype=torch.float64))
    chord = share.squeeze(-1) * graph[-1] + (1 - share.squeeze(-1)) * graph[0]
    assert (chord - graph >= -1e-12).all()
    assert chord[10] - graph[10] > 0.5


def test_claim_4_3_convex_has_minimum():
    weights = torch.linspace(-5, 30, 36, dtype=torch.float64)
    losses = binary_cross_entropy(weights, torch.ones_like(weights))
    by_hand = [math.log1p(math.exp(-w)) for w in weights.tolist()]
    torch.testing.assert_close(losses, torch.tensor(by_hand, dtype=torch.float64))
    assert (losses.diff().diff() > 0).all(), "convex"
    assert (losses.diff() < 0).all(), "and falling everywhere: printed claim fails"
    assert 0 < losses[-1] < 1e-12, "towards 0, which it never reaches"


def test_claim_4_3_local_is_global():
    def loss(w):  # three samples in four at x=1 are positive: the minimizer is log 3
        positive = binary_cross_entropy(w, torch.ones_like(w))
        return (0.75 * positive + 0.25 * binary_cross_entropy(w, torch.zeros_like(w))).sum()

    ends = gradient_descent(loss, vec(-6.0, 0.0, 9.0), lr=4.0, steps=40)[-1]
    torch.testing.assert_close(ends, torch.full_like(ends, math.log(3)), rtol=0, atol=1e-6)
    lowest = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert abs(loss(vec(math.log(3))).item() - lowest) < 1e-12
    assert all(loss(vec(w)).item() > lowest for w in (-8.0, 0.0, 1.0, 1.2, 8.0))


def test_def_4_3_3():
    grid = [-3.0, -1.0, -0.4, 0.0, 0.3, 1.0, 2.5]
    shares = [0.0, 0.1, 0.5, 0.8, 1.0]

    def is_convex(f):
        return all(
            f(s * a + (1 - s) * b) <= s * f(a) + (1 - s) * f(b) + 1e-12
            for a in grid
            for b in grid
            for s in shares
        )

    def loss(x):
        return huber(vec(x), vec(0.0)).item()

    def by_hand(x):
        return x * x / 2 if abs(x) <= 1 else abs(x) - 0.5

    assert all(abs(loss(x) - by_hand(x)) < 1e-12 for x in grid)
    assert is_convex(loss)
    assert not is_convex(lambda x: -loss(x)) and not is_convex(math.sin)


def test_eq_4_3_11():
    first, second, share = -2.0, 6.0, 0.25

    def f(w):
        return logistic(w, 1.0)

    left = f(share * first + (1 - share) * second)
    right = share * f(first) + (1 - share) * f(second)
    assert abs(left - 0.0181499) < 1e-6
    assert abs(right - 0.5335886) < 1e-6
    assert left <= right


def test_claim_4_3_hessian_outer_product():
    x, y = vec(1.0, 2.0), torch.tensor(3.0, dtype=torch.float64)
    for w in (vec(0.0, 0.0), vec(5.0, -1.0)):
        curved = hessian(lambda w: half_squared_error(w @ x, y), w)
        torch.testing.assert_close(curved, torch.outer(x, x))
    torch.testing.assert_close(torch.linalg.eigvalsh(curved), vec(0.0, 5.0))


def test_claim_4_3_quadratic_form():
    x, v = vec(1.0, 2.0), vec(-1.0, 3.0)
    y = torch.tensor(0.0, dtype=torch.float64)
    curved = hessian(lambda w: half_squared_error(w @ x, y), v)
    number = (-1.0 * 1.0 + 3.0 * 2.0) ** 2  # (v·x)²
    assert not torch.isclose(v, vec(number)).any(), "printed: v = (v·x)², a vector and a number"
    assert abs((v @ curved @ v).item() - number) < 1e-9


def test_claim_4_3_squared_error_convex():
    def linear(w):
        return half_squared_error(vec(w), vec(1.0)).item()

    def behind_sigmoid(w):
        return squared_behind_sigmoid(w, 1.0)

    assert abs(curvature(linear, 0.0) - 1) < 1e-6 and abs(curvature(linear, 5.0) - 1) < 1e-6
    for w in (-6.0, -2.0, 0.0, 1.0):
        s = sigmoid(w)
        assert abs(curvature(behind_sigmoid, w) - s * (1 - s) ** 2 * (3 * s - 1)) < 1e-6
    assert curvature(behind_sigmoid, -2.0) < -0.05
    assert behind_sigmoid(-4.0) > (behind_sigmoid(-8.0) + behind_sigmoid(0.0)) / 2 + 0.1


def test_claim_4_3_cross_entropy_convex():
    x, target = vec(1.0, -2.0), torch.tensor(1)
    weights = vec(0.3, -1.0, 0.5, 2.0, 0.0, -0.7)
    curved = hessian(lambda w: cross_entropy(w.reshape(3, 2) @ x, target), weights)
    exps = (weights.reshape(3, 2) @ x).exp()
    p = exps / exps.sum()
    torch.testing.assert_close(
        curved, torch.kron(torch.diag(p) - torch.outer(p, p), torch.outer(x, x))
    )
    assert torch.linalg.eigvalsh(curved)[0] > -1e-12

    def hidden(w):  # one hidden unit: the logit is the product of two weights
        return cross_entropy(torch.stack([0 * w[0], w[0] * w[1]]), target)

    saddle = torch.linalg.eigvalsh(hessian(hidden, vec(0.0, 0.0)))
    torch.testing.assert_close(saddle, vec(-0.5, 0.5))


def test_claim_4_3_why_convex():
    def component(z):
        return softmax(vec(0.0, z))[1].item()

    for z in (-2.0, -1.0, 0.0, 1.0, 2.0):
        assert abs(component(z) - sigmoid(z)) < 1e-12
    assert component(1.0) > (component(0.0) + component(2.0)) / 2 + 0.04, "not convex"
    assert component(-1.0) < (component(0.0) + component(-2.0)) / 2 - 0.04, "not concave"
    # two convex functions, exp(-t) and x²: their composition is a bell
    assert math.exp(-(0.0**2)) > (math.exp(-(1.0**2)) + math.exp(-((-1.0) ** 2))) / 2 + 0.5

    a, b = vec(3.0, 0.0, -1.0), vec(-2.0, 1.0, 0.5)
    values = [-log_softmax(z)[0].item() for z in (a, (a + b) / 2, b)]
    by_hand = [math.log(sum(map(math.exp, z))) - z[0] for z in map(torch.Tensor.tolist, (a, b))]
    assert abs(values[0] - by_hand[0]) < 1e-12 and abs(values[2] - by_hand[1]) < 1e-12
    assert values[1] < (values[0] + values[2]) / 2


def test_claim_4_3_softmax_dual():
    z, p = vec(1.0, 0.0, -2.0), vec(0.5, 0.3, 0.2)

    def log_partition(z):
        return math.log(sum(math.exp(value) for value in z.tolist()))

    steps = 1e-6 * torch.eye(3, dtype=torch.float64)
    slopes = [(log_partition(z + step) - log_partition(z - step)) / 2e-6 for step in steps]
    torch.testing.assert_close(softmax(z), vec(*slopes), rtol=1e-6, atol=1e-8)

    def under_supremum(z):
        return (p @ z).item() - log_partition(z)

    best = under_supremum(p.log())
    assert abs(best + entropy(p.log()).item()) < 1e-12 and abs(best + 1.0296530) < 1e-6
    assert all(under_supremum(other) < best for other in (z, vec(0.0, 0.0, 0.0), 2 * p.log()))
    assert not torch.isclose(softmax(p.log()), vec(best)).any(), "printed: softmax is the dual"


def test_claim_4_3_divergence_convex_in_model():
    p, q, r = vec(0.5, 0.3, 0.2), vec(0.8, 0.1, 0.1), vec(0.1, 0.2, 0.7)
    models = torch.stack([q, r, (q + r) / 2])
    divergences = kl_divergence(p.log().expand(3, 3), models.log())
    by_hand = [
        sum(a * math.log(a / b) for a, b in zip(p.tolist(), m.tolist(), strict=True))
        for m in models
    ]
    torch.testing.assert_close(divergences, vec(*by_hand))
    assert divergences[2] < (divergences[0] + divergences[1]) / 2 - 0.1


def test_claim_4_3_entropy_is_constant():
    p, x = vec(0.5, 0.3, 0.2), vec(2.0, 1.0)
    gaps = []
    for weights in (vec(0.0, 0.0, 1.0, 0.5, -1.0, 2.0), vec(1.0, -1.0, 0.0, 0.3, 0.2, 0.0)):
        logits = weights.reshape(3, 2) @ x
        logps = logits - logits.exp().sum().log()
        assert abs(cross_entropy(logits, p).item() + (p @ logps).item()) < 1e-12
        gaps.append(cross_entropy(logits, p) - kl_divergence(p.log(), logps))
    torch.testing.assert_close(torch.stack(gaps), entropy(p.log()).expand(2))
    assert abs(gaps[0].item() - 1.0296530) < 1e-6


def test_claim_4_3_convexity_guarantees_existence():
    def separable(w):
        return logistic(w, 1.0)

    def strongly_convex(w, mu=0.1):
        return separable(w) + mu * half_squared_error(vec(w), vec(0.0)).item()

    for w in (0.0, 5.0, 15.0):
        assert abs(slope(separable, w) + sigmoid(-w)) < 1e-8, "printed: some slope would be 0"
    low, high = 0.0, 10.0
    for _ in range(60):  # bisection on the slope, in plain arithmetic
        middle = (low + high) / 2
        low, high = (middle, high) if 0.1 * middle < sigmoid(-middle) else (low, middle)
    assert abs(slope(strongly_convex, low)) < 1e-8
    assert strongly_convex(low) < min(strongly_convex(low - 0.5), strongly_convex(low + 0.5))
    assert abs(strongly_convex(2.0) - (math.log1p(math.exp(-2.0)) + 0.2)) < 1e-12


def test_eq_4_3_12():
    points = [-4.0, -1.5, 0.0, 0.5, math.pi / 2, 3.0]

    def f(w):
        return half_squared_error(vec(w), vec(0.0)).item()

    assert all(abs(f(w) - w * w / 2) < 1e-12 for w in points)
    # inside: at the minimizer, with mu = 1
    assert all(f(w) >= f(0.0) + 0.5 * w**2 - 1e-12 for w in points)
    # outside: the same function, w* = 1 is no minimizer
    assert not f(0.0) >= f(1.0) + 0.5 * (0.0 - 1.0) ** 2

    # outside: it may hold, with mu = 2, where nothing is convex
    def bumpy(w):
        return 2 * f(w) + 3 * math.sin(w) ** 2

    assert all(bumpy(w) >= bumpy(0.0) + w**2 - 1e-12 for w in points)
    assert abs(curvature(bumpy, math.pi / 2) + 4) < 1e-4
    # the definition keeps the slope, and refuses the bumpy function
    for g, holds in ((f, True), (bumpy, False)):
        pairs = [(g(u) - g(w) - slope(g, w) * (u - w), u - w) for u in points for w in points]
        assert all(gap >= 0.5 * d**2 - 1e-6 for gap, d in pairs) == holds


def test_claim_4_3_rate_from_strong_convexity():
    start, condition = vec(1.0, 1.0), 100.0
    rate = (condition - 1) / (condition + 1)
    ends = {}
    for scale in (1.0, 10.0):  # the smallest curvature is this scale

        def loss(w, scale=scale):
            return scale * half_squared_error(w * vec(1.0, 10.0), torch.zeros_like(w)).sum()

        path = gradient_descent(loss, start, lr=2 / (scale * (1 + condition)), steps=50)
        ends[scale] = path[-1]
    torch.testing.assert_close(ends[1.0], vec(rate**50, rate**50))
    torch.testing.assert_close(ends[10.0], ends[1.0])

    def round_bowl(w):  # condition number 1: one step
        return half_squared_error(w, torch.zeros_like(w)).sum()

    assert gradient_descent(round_bowl, start, lr=1.0, steps=1)[-1].abs().max() < 1e-12


def test_claim_4_3_strong_convexity_of_squared_error():
    def curved(inputs, targets):
        point = torch.zeros(inputs.shape[1], dtype=torch.float64)
        return hessian(lambda w: token_mean(half_squared_error(inputs @ w, targets)), point)

    ones, zeros = torch.ones(4, 1, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)

    def loss(w):
        return token_mean(half_squared_error(ones @ vec(w), zeros)).item()

    printed, corrected = 4.0, 4.0 / 4  # the smallest eigenvalue of XᵀX, and that over N
    assert not loss(1.0) >= loss(0.0) + printed / 2
    assert abs(loss(1.0) - (loss(0.0) + corrected / 2)) < 1e-12

    inputs = torch.stack([vec(1.0, 0.0), vec(1.0, 2.0), vec(0.0, 1.0)])  # XᵀX = [[2, 2], [2, 5]]
    smallest = torch.linalg.eigvalsh(curved(inputs, zeros[:3]))[0].item()
    assert abs(smallest - 1.0 / 3) < 1e-9 and abs(smallest - 1.0) > 0.5
    dependent = torch.stack([vec(1.0, 2.0), vec(2.0, 4.0)])
    torch.testing.assert_close(
        torch.linalg.eigvalsh(curved(dependent, zeros[:2])), vec(0.0, 12.5), atol=1e-9, rtol=0
    )


def test_claim_4_3_overlap_flattens():
    curvatures, steps = [], []
    for share in (0.4, 0.1, 0.05):  # of the labels on the wrong side: less and less overlap
        best = logit(1 - share)

        def loss(w, share=share):
            right = binary_cross_entropy(w, torch.ones_like(w))
            return (1 - share) * right + share * binary_cross_entropy(w, torch.zeros_like(w))

        curvatures.append(curvature(lambda w, share=share: mixed(w, share), best))
        path = gradient_descent(loss, torch.zeros((), dtype=torch.float64), lr=1.0, steps=150)
        steps.append(int((path < 0.99 * best).sum()))
        assert abs(path[0].item()) < 1e-12
    torch.testing.assert_close(vec(*curvatures), vec(0.24, 0.09, 0.0475), rtol=1e-4, atol=0)
    assert not curvatures[0] < curvatures[2], "printed: overlap makes it small"
    assert steps[0] < steps[1] < steps[2] < 150, "printed: overlap makes it slow"
    assert slope(lambda w: mixed(w, 0.0), 20.0) < 0, "separable: no minimizer at all"


def test_claim_4_3_fisher_governs_curvature():
    inputs = torch.stack([vec(1.0, 2.0), vec(-1.0, 0.5), vec(0.0, -1.0)])
    targets, weights = torch.tensor([0, 2, 1]), vec(0.2, -0.5, 1.0, 0.3, 0.0, -1.0)

    def logits(w):
        return inputs @ w.reshape(3, 2).T

    by_hand = torch.zeros(6, 6, dtype=torch.float64)
    for x, z in zip(inputs, logits(weights), strict=True):
        p = z.exp() / z.exp().sum()
        by_hand += torch.kron(torch.diag(p) - torch.outer(p, p), torch.outer(x, x)) / 3
    torch.testing.assert_close(fisher_information(logits, weights), by_hand)
    curved = hessian(lambda w: token_mean(cross_entropy(logits(w), targets)), weights)
    torch.testing.assert_close(curved, by_hand)


def test_eq_4_3_13():
    w, x, y = vec(0.3, -0.2), vec(2.0, 1.0), torch.tensor(1.0, dtype=torch.float64)
    loss = half_squared_error(torch.sigmoid(w @ x), y)
    assert abs(loss.item() - 0.5 * (1 - 1 / (1 + math.exp(-0.4))) ** 2) < 1e-12


def test_eq_4_3_14():
    w, x = vec(0.3, -0.2), vec(2.0, 1.0)
    for y in (0.0, 1.0):
        target = torch.tensor(y, dtype=torch.float64)
        found = jacobian(lambda w, t=target: half_squared_error(torch.sigmoid(w @ x), t), w)
        s = sigmoid(0.4)
        factor = -(y - s) * s * (1 - s)
        torch.testing.assert_close(found, vec(2 * factor, factor))


def test_claim_4_3_small_gradient_small_step():
    def steps_taken(start):
        """The first step of gradient descent and of Adam, at the same rate 0.1."""
        w, target = vec(start), vec(1.0)

        def loss(w):
            return half_squared_error(torch.sigmoid(w), target).sum()

        plain = gradient_descent(loss, w, lr=0.1, steps=1)[-1].item() - start
        parameter = torch.nn.Parameter(w)
        loss(parameter).backward()
        Adam([parameter], lr=0.1).step()
        return plain, parameter.item() - start

    for start in (-3.0, -10.0):
        s = sigmoid(start)
        plain, adaptive = steps_taken(start)
        assert abs(plain / (0.1 * s * (1 - s) ** 2) - 1) < 1e-6, "inside: small with the gradient"
        assert abs(adaptive - 0.1) < 1e-4, "outside: Adam's step has the size of its rate"
    plain, adaptive = steps_taken(-25.0)  # a gradient far below Adam's eps of 1e-8
    assert 0 < plain < 1e-10 and 0 < adaptive < 1e-3


def test_claim_4_3_saturated_in_spite_of_error():
    for z, y in ((-7.0, 1.0), (7.0, 0.0)):
        error = abs(sigmoid(z) - y)
        steepness = abs(slope(lambda z, y=y: squared_behind_sigmoid(z, y), z))
        assert error > 0.999 and steepness < 1e-3
        assert abs(steepness - error * sigmoid(7.0) * sigmoid(-7.0)) < 1e-8
    assert squared_behind_sigmoid(-7.0, 1.0) > 0.49 and squared_behind_sigmoid(7.0, 0.0) > 0.49


def test_claim_4_3_sigmoid_derivative_argument():
    output, z = 0.99, logit(0.99)
    found = slope(lambda z: squared_behind_sigmoid(z, 0.0), z)  # error times sigmoid derivative
    read_literally = sigmoid(output) * (1 - sigmoid(output))  # sigmoid'(0.99)
    assert abs(read_literally - 0.1975) < 1e-4
    assert abs(found - output * read_literally) > 0.1
    assert abs(found - output * output * (1 - output)) < 1e-8


def test_claim_4_3_saturation_example():
    def steepness(loss, output):
        return abs(slope(lambda z: loss(z, 1.0), logit(output)))

    # printed example: the error is 0.01, so a small gradient is right
    assert abs(1 - 0.99) < 0.011 and abs(steepness(squared_behind_sigmoid, 0.99) - 9.9e-5) < 1e-6
    assert abs(steepness(squared_behind_sigmoid, 0.01) - 0.99 * 0.0099) < 1e-6
    assert abs(steepness(logistic, 0.01) - 0.99) < 1e-6
    assert slope(lambda z: squared_behind_sigmoid(z, 1.0), logit(0.01)) < 0
    assert slope(lambda z: logistic(z, 1.0), logit(0.01)) < 0


def test_eq_4_3_15():
    outputs, targets = vec(0.8, 0.8, 0.1, 0.6), vec(1.0, 0.0, 0.0, 0.3)
    found = binary_cross_entropy(torch.logit(outputs), targets)
    by_hand = [
        -(y * math.log(p) + (1 - y) * math.log(1 - p))
        for p, y in zip(outputs.tolist(), targets.tolist(), strict=True)
    ]
    torch.testing.assert_close(found, vec(*by_hand))


def test_eq_4_3_16():
    w, x = vec(0.5, -1.0), vec(2.0, 3.0)  # the logit is -2
    for y in (0.0, 1.0, 0.25):
        target = torch.tensor(y, dtype=torch.float64)
        found = jacobian(lambda w, t=target: binary_cross_entropy(w @ x, t), w)
        torch.testing.assert_close(found, (sigmoid(-2.0) - y) * x)


def test_claim_4_3_gradient_at_099():
    x = vec(3.0, 4.0)
    w = logit(0.99) * x / 25
    target = torch.tensor(1.0, dtype=torch.float64)
    found = jacobian(lambda w: binary_cross_entropy(w @ x, target), w)
    assert abs(found.norm().item() - 0.01 * 5) < 1e-9, "read as a size it is right"
    assert not torch.allclose(found, 0.01 * x), "read as a vector its sign is wrong"
    torch.testing.assert_close(found, -0.01 * x)


def test_claim_4_3_hundred_times():
    for output, ratio in ((0.99, 101.01), (0.01, 101.01), (0.9, 11.11), (0.999, 1001.0)):
        z = logit(output)
        ours = slope(lambda z: logistic(z, 1.0), z)
        assert abs(ours - (output - 1)) < 1e-8
        found = ours / slope(lambda z: squared_behind_sigmoid(z, 1.0), z)
        assert abs(found / ratio - 1) < 1e-3
        assert abs(found / 2 - 0.5 / (output * (1 - output))) < 1e-3 * found, "without the half"


def test_claim_4_3_log_derivative():
    output = 0.99

    def surprise(p):  # -log p, from the logits log p and log(1 - p)
        return cross_entropy(torch.log(vec(p, 1 - p)), torch.tensor(0)).item()

    printed = 1 / output
    assert abs(slope(surprise, output) - printed) > 2
    assert abs(slope(surprise, output) + 1 / output) < 1e-6
    product = slope(lambda z: logistic(z, 1.0), logit(output))
    assert abs(product - (1 - output)) > 0.015, "printed product"
    assert abs(product + (1 - output)) < 1e-8


def test_claim_4_3_coincidence():
    def normal_cdf(t):
        return 0.5 * (1 + math.erf(t / math.sqrt(2)))

    for z in (-3.0, 0.0, 2.0):  # the sigmoid: prediction minus target, nothing else
        assert abs(slope(lambda z: logistic(z, 1.0), z) - (sigmoid(z) - 1)) < 1e-8
    for t, expected in ((0.0, -0.797885), (-3.0, -3.283099)):  # the probit: -phi/Phi
        found = slope(lambda t: logistic(logit(normal_cdf(t)), 1.0), t)
        assert abs(found - expected) < 1e-4
        assert abs(found - (normal_cdf(t) - 1)) > 0.25, "a factor stays"


def test_claim_4_3_boundary_of_squared_error():
    for y in (1.0, 0.3):
        towards_zero = half_squared_error(vec(1e-9), vec(y)).item()
        towards_one = half_squared_error(vec(1 - 1e-9), vec(y)).item()
        assert abs(towards_zero - (1 - y) ** 2) > 0.2 and abs(towards_one - y**2) > 0.1, "printed"
        assert abs(towards_zero - y**2 / 2) < 1e-8 and abs(towards_one - (1 - y) ** 2 / 2) < 1e-8


def test_claim_4_3_lower_bound():
    logits = torch.linspace(-40, 40, 81, dtype=torch.float64)
    ones = torch.ones_like(logits)
    squared = half_squared_error(torch.sigmoid(logits), ones)
    surprise = binary_cross_entropy(logits, ones)
    assert (squared >= 0).all() and (surprise >= 0).all()
    assert squared[-1] < 1e-12 and surprise[-1] < 1e-12, "perfect predictions cost 0"
    assert abs(squared[40] - 0.125) < 1e-12 and abs(surprise[40] - math.log(2)) < 1e-12


def test_claim_4_3_cross_entropy_unbounded():
    def surprise(p):
        return cross_entropy(torch.log(vec(p, 1 - p)), torch.tensor(0)).item()

    for p in (0.999999, 0.99, 0.5, 1e-3, 1e-10, 1e-200):
        assert abs(surprise(p) + math.log(p)) < 1e-9
    far = cross_entropy(vec(-1e4, 0.0), torch.tensor(0)).item()
    assert abs(far - 1e4) < 1e-6


def test_claim_4_3_uniform_is_very_large():
    for classes in (2, 10, 1000):
        uniform = cross_entropy(
            torch.zeros(classes, dtype=torch.float64), torch.tensor(classes - 1)
        ).item()
        assert abs(uniform - math.log(classes)) < 1e-9
        # log C is what the average class costs at best; a confident mistake has no ceiling
        mistaken = cross_entropy(
            torch.nn.functional.one_hot(torch.tensor(0), classes) * vec(500.0),
            torch.tensor(classes - 1),
        ).item()
        assert abs(mistaken - 500.0) < 1e-6 and not uniform > mistaken / 10


def test_claim_4_3_attends_to_hard_samples():
    sizes = []
    for p in (0.99, 0.5, 0.01):
        logits = torch.log(vec(p, 0.7 * (1 - p), 0.3 * (1 - p)))
        found = jacobian(lambda z: cross_entropy(z, torch.tensor(0)), logits)
        torch.testing.assert_close(found, vec(p - 1, 0.7 * (1 - p), 0.3 * (1 - p)))
        sizes.append(found.abs().sum().item())
    assert sizes[0] < sizes[1] < sizes[2]


def test_claim_4_3_finite_penalty():
    unit = torch.linspace(0, 1, 11, dtype=torch.float64)
    inside = half_squared_error(unit.repeat(11), unit.repeat_interleave(11))
    assert abs(inside.max().item() - 0.5) < 1e-12 and abs(inside.min().item()) < 1e-12
    outside = half_squared_error(vec(100.0, 1000.0), vec(0.0, 0.0))
    torch.testing.assert_close(outside, vec(5e3, 5e5))


def test_claim_4_3_squared_l2_norm():
    predictions, targets = vec(3.0, 0.0, -1.0), vec(0.0, 4.0, -1.0)
    assert abs(squared_error(predictions, targets).sum().item() - 5.0**2) < 1e-12
    doubled = squared_error(targets + 2 * (predictions - targets), targets).sum().item()
    assert abs(doubled - 4 * 5.0**2) < 1e-12, "quadratic growth"


def test_claim_4_3_blue():
    measured = vec(1.0, 4.0)

    def cost(estimate):
        return squared_error(vec(estimate, estimate), measured).sum().item()

    assert abs(cost(0.0) - 17.0) < 1e-12
    assert all(cost(2.5) < cost(other) for other in (1.0, 2.4, 2.6, 4.0)), "the mean"
    # a y₁ + (1-a) y₂ is every linear unbiased estimator of a common mean; the mean has a = 1/2
    shares = [step / 1000 for step in range(1001)]

    def best_share(first, second):
        return min(shares, key=lambda a: a * a * first + (1 - a) ** 2 * second)

    assert best_share(1.0, 1.0) == 0.5, "inside: equal variances"
    assert best_share(1.0, 9.0) == 0.9, "outside: variance 0.9 where the mean has 2.5"
    assert abs(0.9**2 * 1 + 0.1**2 * 9 - 0.9) < 1e-12 and (1 + 9) / 4 == 2.5


def test_claim_4_3_l0_norm():
    target = vec(1.0, 0.0)
    predictions = torch.stack([vec(0.9, 0.1), vec(0.5, 0.5), vec(0.1, 0.9), vec(1e-9, 1 - 1e-9)])
    counts = (predictions != target).sum(dim=-1)
    assert counts.tolist() == [2, 2, 2, 2], "the count does not see how wrong"
    surprise = cross_entropy(predictions.log(), torch.zeros(4, dtype=torch.long))
    torch.testing.assert_close(surprise, vec(0.1053605, 0.6931472, 2.3025851, 20.7232658))


def test_claim_4_3_sensitive_to_large_errors():
    # as functions of the probability: 13.8 nats against at most a half
    surprise = logistic(logit(1e-6), 1.0)
    assert abs(surprise - 13.815511) < 1e-5
    assert abs(half_squared_error(vec(1e-6), vec(1.0)).item() - 0.499999) < 1e-6
    # as functions of the score: slope 1 against slope 101
    assert abs(logistic(-100.0, 1.0) - 100.0) < 1e-9
    assert abs(half_squared_error(vec(-100.0), vec(1.0)).item() - 5100.5) < 1e-9
    assert abs(slope(lambda s: logistic(s, 1.0), -100.0) + 1.0) < 1e-6
    assert abs(slope(lambda s: half_squared_error(vec(s), vec(1.0)).item(), -100.0) + 101) < 1e-5

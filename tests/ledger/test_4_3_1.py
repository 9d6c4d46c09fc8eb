"""Ledger of page 4.3.1: definitions, gradients and Hessians of squared error and cross-entropy.

Finite differences of plain Python functions are the independent side of most entries.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import hessian

from lmlosses import masked_sum, token_mean
from lmlosses.analysis.geometry import fisher_information
from lmlosses.lab.training import gradient_descent
from lmlosses.losses import (
    binary_cross_entropy,
    brier,
    cross_entropy,
    gaussian_nll,
    half_squared_error,
    kl_divergence,
    squared_error,
)
from lmlosses.normalizers import softmax, softmax_jacobian

# three samples with two features, the rows of a design matrix
INPUTS = [[1.0, 2.0], [0.0, 1.0], [-1.0, 1.0]]
NUMBERS = [1.0, 0.0, 2.0]
LABELS = [1.0, 0.0, 1.0]
WEIGHTS, INTERCEPT = [0.3, -0.2], 0.1


def t(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(actual: object, expected: object, atol: float = 1e-6) -> bool:
    """The same shape and the same numbers."""
    actual, expected = torch.as_tensor(actual), torch.as_tensor(expected)
    if actual.shape != expected.shape:
        return False
    return torch.allclose(actual.double(), expected.double(), rtol=0, atol=atol)


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


def exp_share(z: Sequence[float]) -> list[float]:
    """Softmax of a short list in plain Python."""
    total = sum(math.exp(v) for v in z)
    return [math.exp(v) / total for v in z]


def slope(loss: Callable[[Tensor], Tensor], at: object) -> Tensor:
    """Gradient of a library loss by autograd."""
    at = t(at).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(at).sum(), at)
    return gradient


def differences(f: Callable[[list[float]], float], at: Sequence[float], h: float = 1e-5) -> Tensor:
    """Gradient of a plain function by central differences."""
    found = []
    for i in range(len(at)):
        up, down = list(at), list(at)
        up[i], down[i] = at[i] + h, at[i] - h
        found.append((f(up) - f(down)) / (2 * h))
    return t(found)


def second_differences(f: Callable[[list[float]], float], at: Sequence[float]) -> Tensor:
    """Hessian of a plain function by central differences of its gradient."""
    h, rows = 1e-4, []
    for i in range(len(at)):
        up, down = list(at), list(at)
        up[i], down[i] = at[i] + h, at[i] - h
        rows.append((differences(f, up, h) - differences(f, down, h)) / (2 * h))
    return torch.stack(rows)


def linear(weights: Sequence[float], x: Sequence[float], intercept: float = INTERCEPT) -> float:
    return sum(a * b for a, b in zip(weights, x, strict=True)) + intercept


def plain_cross_entropy(flat: Sequence[float], x: Sequence[float], label: int) -> float:
    """Cross-entropy of logits W x in plain Python, the rows of W one class each."""
    d = len(x)
    z = [linear(flat[i : i + d], x, 0.0) for i in range(0, len(flat), d)]
    return -math.log(exp_share(z)[label])


def test_def_4_3_1():
    """At N = 1 the two forms of one definition differ by a factor of 2."""
    target, prediction = t([1.0]), t([0.0])
    one_sample = half_squared_error(prediction, target)
    batch_of_one = squared_error(prediction, target).mean()
    assert close(one_sample, [0.5])
    assert close(batch_of_one, 1.0)
    with_half_everywhere = half_squared_error(t([0.0, 3.0]), t([1.0, 1.0])).mean()
    assert close(with_half_everywhere, (1 + 4) / (2 * 2))
    without_it = squared_error(t([0.0, 3.0]), t([1.0, 1.0])).mean()
    assert close(without_it, (1 + 4) / 2)


def test_eq_4_3_1():
    target = 1.0
    for prediction in (3.0, -0.5, 1.0):
        loss = half_squared_error(t([prediction]), t([target]))
        assert close(loss, [(target - prediction) ** 2 / 2])
        gradient = slope(lambda p: half_squared_error(p, t([target])), [prediction])
        assert close(gradient, [prediction - target])
        assert close(gradient, differences(lambda p: (target - p[0]) ** 2 / 2, [prediction]))


def test_eq_4_3_2():
    """The mean of squares by itself; not the mean of (4.3.1)."""
    target, prediction = t([1.0, 0.0, 2.0]), t([0.0, 0.0, -1.0])
    per_sample = squared_error(prediction, target)
    printed = token_mean(per_sample)
    assert close(per_sample, [1.0, 0.0, 9.0])
    assert close(printed, F.mse_loss(prediction, target))
    assert close(printed, 10 / 3)
    batch_of_4_3_1 = sum((a - b) ** 2 / 2 for a, b in [(1, 0), (0, 0), (2, -1)]) / 3
    assert abs(printed.item() - 2 * batch_of_4_3_1) < 1e-12


def test_claim_4_3_one_name_many_scales():
    """Prediction (0.8, 0.2) for the first of two classes: 0.04, 0.02, 0.01 and 0.08."""
    prediction, target = t([0.8, 0.2]), t([1.0, 0.0])
    squares = squared_error(prediction, target)
    halves = half_squared_error(prediction, target)
    scales = {
        "half of one square (4.3.1)": halves[0],
        "mean of squares (4.3.2)": squares.mean(),
        "half of the mean (4.3.4)": halves.mean(),
        "sum over classes (4.3.18)": brier(prediction, target),
    }
    by_hand = [0.02, 0.04, 0.02, 0.08]
    assert close(torch.stack(list(scales.values())), by_hand)
    gradients = [
        slope(lambda p: half_squared_error(p, target).mean(), [0.8, 0.2])[0],
        slope(lambda p: squared_error(p, target).mean(), [0.8, 0.2])[0],
        slope(lambda p: squared_error(p, target).sum(), [0.8, 0.2])[0],
    ]
    assert close(torch.stack(gradients), [-0.1, -0.2, -0.4])


def test_claim_4_3_parabolic_cylinder():
    """Flat directions of the graph, by the variable that it is drawn over."""
    over_prediction = hessian(lambda p: half_squared_error(p, t([1.0, 2.0])).sum())
    assert close(torch.linalg.eigvalsh(over_prediction(t([0.0, 0.0]))), [1.0, 1.0])
    one_sample = t([[1.0, 0.0]])
    over_weights = hessian(lambda w: half_squared_error(one_sample @ w, t([1.0])).sum())
    assert close(torch.linalg.eigvalsh(over_weights(t([0.3, 0.4]))), [0.0, 1.0])
    two_samples = t([[1.0, 0.0], [0.0, 1.0]])
    full_rank = hessian(lambda w: half_squared_error(two_samples @ w, t([1.0, 1.0])).sum())
    assert close(torch.linalg.eigvalsh(full_rank(t([0.3, 0.4]))), [1.0, 1.0])


def test_claim_4_3_squared_error_convex_in_prediction():
    target, grid = 0.7, [x / 10 for x in range(-5, 16)]
    values = squared_error(t(grid), t([target] * len(grid)))
    for i in range(len(grid)):
        for j in range(i):
            middle = squared_error(t([(grid[i] + grid[j]) / 2]), t([target]))[0]
            chord = (values[i] + values[j]) / 2
            # the chord's height above a parabola, by hand
            assert close(chord - middle, (grid[i] - grid[j]) ** 2 / 4)
    lowest = values.argmin()
    assert abs(grid[lowest] - target) < 1e-12
    assert close(values[lowest], 0.0)
    assert (values.sort().values[1:] > 1e-3).all(), "one minimizer"


def test_claim_4_3_gradient_linear_in_error():
    for error in (-2.0, 0.5, 1.0, 2.0, 4.0):
        gradient = slope(lambda p: half_squared_error(p, t([3.0])), [3.0 + error])
        assert close(gradient, [error])


def test_claim_4_3_cross_entropy_is_relative_entropy():
    """Reading 1: cross-entropy is the relative entropy. Reading 2: it differs by H(p)."""
    even = t([0.5, 0.5])
    assert close(cross_entropy(even.log(), even), math.log(2))
    assert close(kl_divergence(even.log(), even.log()), 0.0)
    p, q = [0.7, 0.3], [0.4, 0.6]
    crossed = cross_entropy(t(q).log(), t(p))
    relative = kl_divergence(t(p).log(), t(q).log())
    assert close(crossed, -sum(a * math.log(b) for a, b in zip(p, q, strict=True)))
    assert close(relative, sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
    assert close(crossed - relative, -sum(a * math.log(a) for a in p))
    one_hot = t([1.0, 0.0])
    one_hot_crossed = cross_entropy(t(q).log(), one_hot)
    assert close(one_hot_crossed, kl_divergence(one_hot.log(), t(q).log()))


def test_def_4_3_2():
    logits, correct = [1.0, 2.0, 3.0], 1
    expected = -math.log(exp_share(logits)[correct])
    assert abs(expected - 1.4076) < 1e-4
    assert close(cross_entropy(t(logits), torch.tensor(correct)), expected)
    assert close(cross_entropy(t(logits), t([0.0, 1.0, 0.0])), expected)


def test_eq_4_3_3():
    """The two forms agree on a one-hot p, and part on a smoothed one: 0.3618 against 0.2231."""
    p_hat = t([0.8, 0.2])
    one_hot = cross_entropy(p_hat.log(), t([1.0, 0.0]))
    assert close(one_hot, -math.log(0.8))
    smoothed = cross_entropy(p_hat.log(), t([0.9, 0.1]))
    assert close(smoothed, -0.9 * math.log(0.8) - 0.1 * math.log(0.2))
    assert abs(smoothed.item() + math.log(0.8)) > 0.1


def test_claim_4_3_acts_on_a_distribution():
    """How the wrong classes share the rest: invisible to a hard target, not to a soft one."""
    logps = t([[0.6, 0.3, 0.1], [0.6, 0.2, 0.2]]).log()
    hard = cross_entropy(logps, torch.tensor([0, 0]))
    assert close(hard, [-math.log(0.6)] * 2)
    soft = cross_entropy(logps, t([[0.8, 0.1, 0.1]] * 2))
    by_hand = [
        -0.8 * math.log(0.6) - 0.1 * math.log(0.3) - 0.1 * math.log(0.1),
        -0.8 * math.log(0.6) - 0.2 * math.log(0.2),
    ]
    assert close(soft, by_hand) and by_hand[0] - by_hand[1] > 0.02


def test_claim_4_3_cross_entropy_contains_softmax():
    scores = t([2.0, 2.0])
    from_logits = cross_entropy(scores, torch.tensor(0))
    from_scores_as_probabilities = -math.log(2.0)  # (4.3.3) read literally
    assert close(from_logits, math.log(2))
    assert from_scores_as_probabilities < 0
    assert close(softmax(scores), [0.5, 0.5])
    other = t([0.5, -1.0, 2.0])
    assert close(cross_entropy(other, torch.tensor(2)), -softmax(other)[2].log())


def test_claim_4_3_logit_gradient():
    logits = [1.0, 2.0, 3.0]
    one_hot = slope(lambda z: cross_entropy(z, torch.tensor(1)), logits)
    assert close(one_hot, [0.0900, -0.7553, 0.6652], atol=1e-4)
    p, p_hat = [0.2, 0.5, 0.3], exp_share(logits)
    soft = slope(lambda z: cross_entropy(z, t(p)), logits)
    assert close(soft, [a - b for a, b in zip(p_hat, p, strict=True)])
    plain = differences(
        lambda z: -sum(a * math.log(b) for a, b in zip(p, exp_share(z), strict=True)), logits
    )
    assert close(soft, plain)


def test_eq_4_3_4():
    x, y = t(INPUTS), t(NUMBERS)

    def loss(w: Tensor) -> Tensor:
        return token_mean(half_squared_error(x @ w + INTERCEPT, y))

    printed = [0.0, 0.0]
    for row, target in zip(INPUTS, NUMBERS, strict=True):
        error = target - linear(WEIGHTS, row)
        printed = [g - error * v / 3 for g, v in zip(printed, row, strict=True)]
    assert close(slope(loss, WEIGHTS), printed)
    assert close(slope(loss, WEIGHTS), [0.466667, -1.5])


def test_eq_4_3_5():
    """Printed: a minus sign before the last line. The second line is right."""
    x, y = t(INPUTS), t(LABELS)
    truth = slope(lambda w: token_mean(binary_cross_entropy(x @ w + INTERCEPT, y)), WEIGHTS)
    second, corrected = [0.0, 0.0], [0.0, 0.0]
    for row, label in zip(INPUTS, LABELS, strict=True):
        p = sigmoid(linear(WEIGHTS, row))
        for k in range(2):
            second[k] -= (label / p - (1 - label) / (1 - p)) * p * (1 - p) * row[k] / 3
            corrected[k] += (p - label) * row[k] / 3
    printed = [-g for g in corrected]
    assert close(truth, corrected)
    assert close(truth, second)
    assert not close(truth, printed, atol=0.1)
    at_zero = slope(lambda w: binary_cross_entropy(w * t([1.0]), t([1.0])), [0.0])
    assert close(at_zero, [-0.5])


def test_claim_4_3_same_gradient_form():
    """Own link: (prediction - target) x. Squared error behind a sigmoid: a further factor."""
    x, target = 2.0, 1.0
    for w in (-1.5, 0.0, 0.8):
        identity = slope(lambda v: half_squared_error(v * x, t([target])), [w])
        logistic = slope(lambda v: binary_cross_entropy(v * x, t([target])), [w])
        crossed = slope(lambda v: half_squared_error((v * x).sigmoid(), t([target])), [w])
        p = sigmoid(w * x)
        assert close(identity, [(w * x - target) * x])
        assert close(logistic, [(p - target) * x])
        assert close(crossed, [(p - target) * x * p * (1 - p)])
        assert abs(crossed.item() / ((p - target) * x) - 1) > 0.7


def test_eq_4_3_6():
    """Printed at w = 2, x = 1, y = 0: -0.365; the sign alone gives +0.365; the truth is 0.185."""
    x, y, w = t([[1.0]]), t([0.0]), [2.0]
    truth = slope(lambda v: token_mean(squared_error((x @ v).sigmoid(), y)), w)
    out = sigmoid(2.0)
    printed = -2 * (out - 0) * sigmoid(out) * (1 - sigmoid(out))
    corrected = 2 * (out - 0) * out * (1 - out)
    assert close(truth, differences(lambda v: sigmoid(v[0]) ** 2, w))
    assert close(truth, [corrected]) and close(truth, [0.184956])
    assert abs(printed - truth.item()) > 0.5
    assert abs(-printed - truth.item()) > 0.1
    x, y = t(INPUTS), t(LABELS)
    batch = slope(lambda v: token_mean(squared_error((x @ v).sigmoid(), y)), WEIGHTS)

    def plain(v: list[float]) -> float:
        pairs = zip(INPUTS, LABELS, strict=True)
        return sum((sigmoid(linear(v, row, 0.0)) - label) ** 2 for row, label in pairs) / 3

    assert close(batch, differences(plain, WEIGHTS))


def test_claim_4_3_modulation():
    """A factor of 0.0066 behind a sigmoid at z = 5, and none on a linear output."""
    through = slope(lambda z: half_squared_error(z.sigmoid(), t([0.0])), [5.0])
    linear_output = slope(lambda z: half_squared_error(z, t([0.0])), [5.0])
    out = sigmoid(5.0)
    assert close(through, [out * out * (1 - out)])
    assert close(linear_output, [5.0])
    assert through.item() < 0.01 < linear_output.item()


def test_claim_4_3_output_far_from_zero():
    """Printed: small when the output is far from 0. Output 0.5 is steepest, 0.001 is flat."""
    logit_of = {out: math.log(out / (1 - out)) for out in (0.001, 0.5, 0.999)}
    factor = {}
    for out, z in logit_of.items():
        gradient = slope(lambda v: squared_error(v.sigmoid(), t([-1.0])), [z])
        factor[out] = gradient.item() / (2 * (out + 1))  # what multiplies 2 (prediction - target)
    assert close(t(list(factor.values())), [0.000999, 0.25, 0.000999])
    printed = [sigmoid(k / 100) * (1 - sigmoid(k / 100)) for k in range(101)]
    assert 0.196 < min(printed) < 0.197 and max(printed) == 0.25, "never small on (0, 1)"


def test_claim_4_3_root_cause():
    """Inside: a sigmoid that is surely wrong. Outside: linear outputs, wrong by 6."""
    z = math.log(0.01 / 0.99)
    stuck = slope(lambda v: half_squared_error(v.sigmoid(), t([1.0])), [z])
    free = slope(lambda v: binary_cross_entropy(v, t([1.0])), [z])
    assert close(stuck, [-0.99 * 0.01 * 0.99])
    assert close(free, [-0.99])
    linear_output = slope(lambda v: half_squared_error(v, t([1.0])), [-5.0])
    assert close(linear_output, [-6.0])
    # least squares on the labels +1 and -1 separates what a line can separate
    x = np.array([[1, 2.0, 1.0], [1, 1.5, 2.0], [1, -1.0, -2.0], [1, -2.0, 0.5]])
    y = np.array([1.0, 1.0, -1.0, -1.0])
    w = np.linalg.lstsq(x, y, rcond=None)[0]
    assert (np.sign(x @ w) == y).all()
    fitted = slope(lambda v: half_squared_error(t(x) @ v, t(y)), w.tolist())
    assert close(fitted, [0.0, 0.0, 0.0])


def test_claim_4_3_why_no_modulation():
    """Both are differentiated in the logit; only one keeps the sigmoid's derivative."""
    z, out = 5.0, sigmoid(5.0)
    squared = slope(lambda v: half_squared_error(v.sigmoid(), t([0.0])), [z])
    entropy = slope(lambda v: binary_cross_entropy(v, t([0.0])), [z])
    assert close(squared, [out * (out * (1 - out))])
    assert close(squared, [0.006604])
    assert close(entropy, [0.993307])
    # the derivative of -log(1 - p) in p, times the sigmoid's own: the factor cancels
    assert abs(1 / (1 - out) * (out * (1 - out)) - entropy.item()) < 1e-12


def test_claim_4_3_no_vanishing():
    surely_wrong = slope(lambda v: binary_cross_entropy(v, t([1.0])), [math.log(0.001 / 0.999)])
    surely_right = slope(lambda v: binary_cross_entropy(v, t([1.0])), [math.log(0.999 / 0.001)])
    assert close(surely_wrong, [-0.999])
    assert close(surely_right, [-0.001])


def test_eq_4_3_7():
    """Inside: 1/(2N), no intercept. Outside: (4.3.2), or an intercept among the parameters."""
    x, y = t(INPUTS), t(NUMBERS)
    printed = np.array(INPUTS).T @ np.array(INPUTS) / 3
    inside = hessian(lambda w: token_mean(half_squared_error(x @ w, y)))(t(WEIGHTS))
    assert close(inside, printed)
    assert close(inside, [[2 / 3, 1 / 3], [1 / 3, 2.0]])

    def mean_of_squares(w: list[float]) -> float:
        pairs = zip(INPUTS, NUMBERS, strict=True)
        return sum((linear(w, row, 0.0) - target) ** 2 for row, target in pairs) / 3

    without_half = second_differences(mean_of_squares, WEIGHTS)
    assert close(without_half, 2 * printed, atol=1e-4)
    with_intercept = hessian(lambda w: token_mean(half_squared_error(x @ w[:2] + w[2], y)))
    assert close(
        with_intercept(t([0.3, -0.2, 0.1])),
        [[2 / 3, 1 / 3, 0.0], [1 / 3, 2.0, 4 / 3], [0.0, 4 / 3, 1.0]],
    )


def test_claim_4_3_constant_hessian():
    """Inside: linear output, 1 everywhere. Outside: a sigmoid, 0.0625 at 0 and -0.0594 at -2."""
    straight = hessian(lambda w: half_squared_error(w, t(1.0)))
    assert close(straight(t(0.0)), 1.0) and close(straight(t(5.0)), 1.0)
    bent = hessian(lambda w: half_squared_error(w.sigmoid(), t(1.0)))
    assert close(bent(t(0.0)), 0.0625)
    assert close(bent(t(-2.0)), -0.0594, atol=1e-4)
    plain = second_differences(lambda w: (1 - sigmoid(w[0])) ** 2 / 2, [-2.0])
    assert close(bent(t(-2.0)), plain[0, 0], atol=1e-5)


def test_claim_4_3_normal_equations():
    """Inside: X = (1, 1) gives w = 2. Outside: one sample, two weights, a line of minimizers."""
    x, y = np.array([[1.0], [1.0]]), np.array([1.0, 3.0])
    w = np.linalg.solve(x.T @ x, x.T @ y)
    assert abs(w[0] - 2) < 1e-12
    assert close(slope(lambda v: half_squared_error(t(x) @ v, t(y)), w.tolist()), [0.0])
    assert close(half_squared_error(t(x) @ t(w), t(y)), [0.5, 0.5])
    x, y = np.array([[1.0, 1.0]]), np.array([1.0])
    assert abs(np.linalg.det(x.T @ x)) < 1e-12
    for solution in ([1.0, 0.0], [0.0, 1.0], [3.0, -2.0]):
        assert np.allclose(x.T @ x @ solution, x.T @ y)
        assert close(half_squared_error(t(x) @ t(solution), t(y)), [0.0])


def test_claim_4_3_sum_or_mean():
    """Two samples with p = 1/2 and x = 1: the sum's Hessian is 0.5, the printed average 0.25."""

    def losses(w: Tensor) -> Tensor:
        logits = torch.stack([w, torch.zeros_like(w)]).expand(2, 2)
        return cross_entropy(logits, torch.tensor([0, 1]))

    of_sum = hessian(lambda w: masked_sum(losses(w)))(t(0.0))
    of_mean = hessian(lambda w: token_mean(losses(w)))(t(0.0))
    by_hand = [0.5 * (1 - 0.5)] * 2
    assert close(of_sum, sum(by_hand)) and close(of_sum, 0.5)
    assert close(of_mean, sum(by_hand) / 2)
    assert not close(of_sum, sum(by_hand) / 2, atol=0.1)


def test_claim_4_3_softmax_of_a_scalar():
    """Reading 1: w is a vector, the softmax is 1 for any w. Reading 2: W has a row a class."""
    x = [1.0, 1.0]
    for w in ([1.0, 2.0], [-30.0, 4.0]):
        assert close(softmax(t([linear(w, x, 0.0)])), [1.0])
    w = [[1.0, 2.0], [0.0, 2.0]]
    expected = exp_share([linear(row, x, 0.0) for row in w])
    assert close(softmax(t(w) @ t(x)), expected) and abs(expected[0] - sigmoid(1.0)) < 1e-12


def test_eq_4_3_8():
    """As an outer product with four indices it holds; as a matrix product it is not defined."""
    w, x = [0.1, -0.4, 0.7, 0.2, -0.3, 0.5], [1.5, -0.5]
    label = torch.tensor(1)
    four = hessian(lambda m: cross_entropy(m @ t(x), label))(t(w).reshape(3, 2))
    assert four.shape == (3, 2, 3, 2)

    def probability(i: int, flat: list[float]) -> float:
        return exp_share([linear(flat[k : k + 2], x, 0.0) for k in (0, 2, 4)])[i]

    in_weights = torch.stack(
        [differences(lambda v, i=i: probability(i, v), w).reshape(3, 2) for i in range(3)]
    )
    assert close(four, torch.einsum("ijb,a->iajb", in_weights, t(x)))
    with pytest.raises(RuntimeError):
        in_weights @ t(x).reshape(1, 2)
    jacobian = softmax_jacobian(t(w).reshape(3, 2) @ t(x))
    assert close(in_weights, torch.einsum("ij,b->ijb", jacobian, t(x)))


def test_claim_4_3_jacobian_in_w():
    """C = d = 2, W = 0, x = (1, 2): printed (-0.25, 0.25), the truth has eight entries."""
    x, w = t([1.0, 2.0]), torch.zeros(4, dtype=torch.float64)
    truth = torch.autograd.functional.jacobian(lambda m: softmax(m.reshape(2, 2) @ x), w)
    assert close(truth, [[0.25, 0.5, -0.25, -0.5], [-0.25, -0.5, 0.25, 0.5]])
    of_logits = softmax_jacobian(torch.zeros(2, dtype=torch.float64))
    printed = of_logits @ x
    assert close(printed, [-0.25, 0.25]) and printed.shape != truth.shape
    assert close(torch.kron(of_logits, x.reshape(1, 2)), truth)
    with pytest.raises(RuntimeError):
        softmax_jacobian(t([0.0, 0.0, 0.0])) @ x


def test_eq_4_3_9():
    """Printed for C = d = 2, W = 0, x = (1, 2): 2 by 2 and not symmetric. True: 4 by 4."""
    x = t([1.0, 2.0])
    truth = hessian(lambda w: cross_entropy(w.reshape(2, 2) @ x, torch.tensor(0)))(t([0.0] * 4))
    assert close(truth.diagonal(), [0.25, 1.0, 0.25, 1.0])
    jacobian = softmax_jacobian(t([0.0, 0.0]))
    printed = jacobian @ torch.outer(x, x)
    assert printed.shape == (2, 2) and not close(printed, printed.T, atol=0.1)
    assert close(torch.kron(jacobian, torch.outer(x, x)), truth)
    plain = second_differences(lambda w: plain_cross_entropy(w, [1.0, 2.0], 0), [0.0] * 4)
    assert close(truth, plain, atol=1e-5)


def test_eq_4_3_10():
    """Three classes, two features: the printed product of a 3 by 3 and a 2 by 2 does not exist."""
    w, labels = [0.1, -0.4, 0.7, 0.2, -0.3, 0.5], [2, 0, 1]
    x = t(INPUTS)
    total = hessian(
        lambda m: token_mean(cross_entropy(x @ m.reshape(3, 2).T, torch.tensor(labels)))
    )(t(w))
    jacobians = softmax_jacobian(x @ t(w).reshape(3, 2).T)
    outer = torch.einsum("na,nb->nab", x, x)
    corrected = sum(torch.kron(j, o) for j, o in zip(jacobians, outer, strict=True)) / 3
    assert close(total, corrected)

    def plain(flat: list[float]) -> float:
        pairs = zip(INPUTS, labels, strict=True)
        return sum(plain_cross_entropy(flat, row, label) for row, label in pairs) / 3

    assert close(total, second_differences(plain, w), atol=1e-5)
    with pytest.raises(RuntimeError):
        jacobians @ outer


def test_claim_4_3_hessian_depends_on_parameters():
    curvature = hessian(lambda w: binary_cross_entropy(w, t(1.0)))
    assert close(curvature(t(0.0)), 0.25)
    assert close(curvature(t(5.0)), 0.006648)


def test_claim_4_3_negative_semidefinite():
    """Printed: never positive along any v. At (0.5, 0.3, 0.2) along (1, -1, 0) it is 0.76."""
    p, v = [0.5, 0.3, 0.2], t([1.0, -1.0, 0.0])
    jacobian = softmax_jacobian(t(p).log())
    assert close(v @ jacobian @ v, 0.76)
    generator = np.random.default_rng(0)
    for _ in range(20):
        v = generator.normal(size=3)
        variance = np.average((v - np.average(v, weights=p)) ** 2, weights=p)
        assert close(t(v) @ jacobian @ t(v), variance)


def test_claim_4_3_eigenvalues():
    """Printed for (1/2, 1/2): 1/4 and -1/2. True: 0 and 1/2."""
    even = torch.linalg.eigvalsh(softmax_jacobian(t([0.0, 0.0])))
    assert close(even, [0.0, 0.5])
    assert not close(even, [-0.5, 0.25], atol=0.1)
    p = [0.5, 0.3, 0.2]
    jacobian = softmax_jacobian(t(p).log())
    values = torch.linalg.eigvalsh(jacobian)
    assert close(values, [0.0, 0.2319, 0.3881], atol=1e-4)
    assert close(jacobian.diagonal(), [v * (1 - v) for v in p])
    assert not close(values, sorted(v * (1 - v) for v in p), atol=0.05)
    assert close(values.sum(), 1 - sum(v * v for v in p))
    assert close(jacobian @ t([1.0, 1.0, 1.0]), [0.0, 0.0, 0.0])


def test_claim_4_3_same_steepness():
    """Two features of sizes 1 and 10: constant curvature, a hundred times larger one way."""
    x = t([[1.0, 0.0], [0.0, 10.0]])
    curvature = hessian(lambda w: token_mean(half_squared_error(x @ w, t([0.0, 0.0]))))
    for place in ([0.0, 0.0], [3.0, -1.0]):
        assert close(curvature(t(place)), [[0.5, 0.0], [0.0, 50.0]])
    steep = slope(lambda w: token_mean(half_squared_error(x @ w, t([0.0, 0.0]))), [1.0, 1.0])
    assert close(steep, [0.5, 50.0])


def test_claim_4_3_straight_trajectory():
    """From (1, 1) with curvatures 1 and 10 the steps turn; from an eigenvector they do not."""
    root = t([1.0, math.sqrt(10.0)])

    def loss(w: Tensor) -> Tensor:
        return half_squared_error(root * w, t([0.0, 0.0])).sum()

    path = gradient_descent(loss, t([1.0, 1.0]), lr=0.05, steps=3)
    assert close(path, [[1.0, 1.0], [0.95, 0.5], [0.9025, 0.25], [0.857375, 0.125]])
    first, second = (path[1] - path[0]).tolist(), (path[2] - path[1]).tolist()
    turn = first[0] * second[1] - first[1] * second[0]
    assert abs(turn) > 0.01, "steps on a straight path would be parallel"
    on_axis = gradient_descent(loss, t([0.0, 1.0]), lr=0.05, steps=3)
    assert close(on_axis, [[0.0, 0.5**k] for k in range(4)])


def test_claim_4_3_flat_when_confident():
    values = []
    for p in (1 / 3, 0.9, 0.999):
        jacobian = softmax_jacobian(t([p, (1 - p) / 2, (1 - p) / 2]).log())
        values.append(torch.linalg.eigvalsh(jacobian)[-1].item())
    # the largest eigenvalue of three classes whose other two are equal, by hand
    by_hand = [max(3 * p * (1 - p) / 2, (1 - p) / 2) for p in (1 / 3, 0.9, 0.999)]
    assert close(t(values), by_hand)
    assert values[0] > values[1] > 100 * values[2] / 2 > 0


def test_claim_4_3_easy_and_hard():
    """The same curvature for the right and for a wrong label; gradients 0.0012 and 1.413."""
    p = [0.999, 0.0005, 0.0005]
    logits = t(p).log()
    right, wrong = (
        hessian(lambda z, c=c: cross_entropy(z, torch.tensor(c)))(logits) for c in (0, 1)
    )
    expected = [[p[i] * ((i == j) - p[j]) for j in range(3)] for i in range(3)]
    assert close(right, expected, atol=1e-9) and close(wrong, expected, atol=1e-9)
    assert close(softmax_jacobian(logits), expected, atol=1e-9)
    easy = slope(lambda z: cross_entropy(z, torch.tensor(0)), logits.tolist()).norm()
    hard = slope(lambda z: cross_entropy(z, torch.tensor(1)), logits.tolist()).norm()
    assert close(easy, 0.0012247, atol=1e-5) and close(hard, 1.4131, atol=1e-3)
    # outside: an undecided sample is curved though its label is right
    undecided = softmax_jacobian(t([0.5, 0.25, 0.25]).log())
    assert torch.linalg.eigvalsh(undecided)[-1] > 0.3


def test_claim_4_3_attention_jacobian():
    """Inside: row by row. Outside: diag(A) - A A^T taken on the matrix is another object."""
    queries, keys = [[1.0, 0.0], [0.0, 2.0]], [[1.0, 0.0], [0.0, 1.0]]
    root = math.sqrt(2.0)

    def row(q: Sequence[float]) -> list[float]:
        return exp_share([linear(q, k, 0.0) / root for k in keys])

    scores = t(queries) @ t(keys).T / root
    weights = softmax(scores)
    assert close(weights, [row(q) for q in queries])
    by_row = softmax_jacobian(scores)
    for i, q in enumerate(queries):
        plain = torch.stack([differences(lambda v, j=j: row(v)[j], q) for j in range(2)])
        assert close(by_row[i] @ t(keys) / root, plain)
    of_matrix = weights.diagonal().diag() - weights @ weights.T
    for i in range(2):
        assert not close(of_matrix, by_row[i], atol=0.05)


def test_claim_4_3_jacobian_is_fisher():
    a = [0.5, 0.3, 0.2]
    expected = np.zeros((3, 3))
    for draw, probability in enumerate(a):
        score = np.eye(3)[draw] - np.array(a)  # gradient of the log-probability of the draw
        expected += probability * np.outer(score, score)
    assert close(softmax_jacobian(t(a).log()), expected)
    assert close(fisher_information(lambda z: z.unsqueeze(0), t(a).log()), expected)


def test_claim_4_3_different_frameworks():
    """Both are negative log-likelihoods: of unit Gaussian noise and of a categorical draw."""
    for target, prediction in [(1.0, 0.0), (-0.4, 2.0)]:
        density = math.exp(-((target - prediction) ** 2) / 2) / math.sqrt(2 * math.pi)
        squared = half_squared_error(t([prediction]), t([target]))
        assert close(squared + math.log(2 * math.pi) / 2, [-math.log(density)])
        assert close(gaussian_nll(t([prediction]), t([target]), t([0.0])), [-math.log(density)])
    p = [0.5, 0.3, 0.2]
    for draw in range(3):
        assert close(cross_entropy(t(p).log(), torch.tensor(draw)), -math.log(p[draw]))


def test_claim_4_3_more_nonlinear():
    """Reading 1: in the logit cross-entropy grows like a line. Reading 2: in p it is unbounded."""
    for scale in (100.0, 200.0):
        assert close(binary_cross_entropy(t([-scale]), t([1.0])), [scale])
        assert close(squared_error(t([-scale]), t([1.0])), [(scale + 1) ** 2])
    for p in (1e-3, 1e-6):
        entropy = binary_cross_entropy(t([math.log(p / (1 - p))]), t([1.0]))
        assert close(entropy, [-math.log(p)])
        assert entropy.item() > 6 > squared_error(t([p]), t([1.0])).item()

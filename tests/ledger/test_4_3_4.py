"""What textbook subsection 4.3.4 says, held to numbers: choosing a loss, combining losses."""

import math

import torch
from torch import Tensor
from torch.testing import assert_close

from lmlosses.lab.data import noisy_line
from lmlosses.losses import (
    absolute_error,
    binary_cross_entropy,
    brier,
    cross_entropy,
    focal,
    gaussian_nll,
    half_squared_error,
    huber,
    laplace_nll,
    pairwise_auc,
    squared_error,
    zero_one,
)
from lmlosses.metrics import auc, expected_calibration_error
from lmlosses.multitask import mgda, normalized_gradients, weighted_sum


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def grid(low: float, high: float, count: int) -> Tensor:
    return torch.linspace(low, high, count, dtype=torch.float64)


def risk(loss, guesses: Tensor, outcomes: Tensor, chances: Tensor) -> Tensor:
    """Expected loss of each constant guess about an outcome of known distribution."""
    shape = (len(guesses), len(outcomes))
    return loss(guesses[:, None].expand(shape), outcomes.expand(shape)) @ chances


def best(guesses: Tensor, risks: Tensor) -> float:
    return guesses[risks.argmin()].item()


def binary_logits(probability: Tensor) -> Tensor:
    """Logits of two classes where the second has the given probability."""
    return torch.stack([torch.zeros_like(probability), probability.logit()], dim=-1)


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


def test_eq_4_3_29():
    """What is measured is the true value plus noise, sample by sample."""
    noise = f64(0.3, -0.2, 0.0, 1.5, -1.0)
    inputs, targets = noisy_line(5, slope=2.0, intercept=-1.0, noise=noise)
    for n in range(5):
        place = -1 + 2 * n / 4
        assert abs(inputs[n].item() - place) < 1e-12
        assert abs(targets[n].item() - (2.0 * place - 1.0 + noise[n].item())) < 1e-12


def test_eq_4_3_30():
    """The mean is best, and it is the truth of 2 only if the noise has mean zero."""
    guesses = grid(0, 6, 601)
    centered = risk(squared_error, guesses, 2.0 + f64(-1, 1), f64(0.5, 0.5))
    assert abs(best(guesses, centered) - 2.0) < 1e-9
    assert abs(centered.min().item() - 1.0) < 1e-9  # the variance of the noise
    lopsided = risk(squared_error, guesses, 2.0 + f64(0, 3), f64(2 / 3, 1 / 3))
    assert abs(best(guesses, lopsided) - 3.0) < 1e-9  # the mean of the noise is 1
    assert abs(lopsided.min().item() - 2.0) < 1e-9


def test_claim_4_3_natural_match():
    """Under symmetric noise three losses agree on the truth; under lopsided noise they part."""
    guesses, chances = grid(0, 6, 601), f64(0.3, 0.4, 0.3)
    least = {squared_error: 0.6, absolute_error: 0.6, huber: 0.3}
    for loss, by_hand in least.items():
        risks = risk(loss, guesses, f64(1, 2, 3), chances)
        assert abs(best(guesses, risks) - 2.0) < 1e-9
        assert abs(risks.min().item() - by_hand) < 1e-9
    skewed = f64(0.2, 0.4, 0.4)
    lopsided = [best(guesses, risk(loss, guesses, f64(1, 2, 5), skewed)) for loss in least]
    # the mean, the median, and between them where 0.2 + 0.4 (c - 2) = 0.4
    assert_close(f64(*lopsided), f64(3.0, 2.0, 2.5))


def test_eq_4_3_31():
    """Each answer's risk is one minus its probability, so the most probable class is best."""
    chances = f64(0.2, 0.5, 0.3)
    answers = torch.eye(3, dtype=torch.float64)  # row a answers class a
    losses = zero_one(answers.unsqueeze(1).expand(3, 3, 3), torch.arange(3).expand(3, 3))
    risks = losses @ chances
    assert_close(risks, f64(0.8, 0.5, 0.7))
    assert risks.argmin() == 1
    tied = losses @ f64(0.4, 0.4, 0.2)
    assert_close(tied[:2], f64(0.6, 0.6))


def test_claim_4_3_zero_one_not_differentiable():
    """As a score passes its rival the loss is flat, jumps once, and is flat again."""
    scores = grid(-1, 1, 40)  # none is exactly 0
    logits = torch.stack([torch.zeros_like(scores), scores], dim=-1).requires_grad_()
    losses = zero_one(logits, torch.ones(40, dtype=torch.long))
    assert losses.tolist() == [1.0] * 20 + [0.0] * 20
    slopes = losses.diff() / scores.diff()
    assert (slopes != 0).sum() == 1
    assert not losses.requires_grad


def test_claim_4_3_surrogate():
    """Printed: at the minimum of cross-entropy the decision is best. True of a free model."""
    free = grid(0.01, 0.99, 99)
    labels = torch.tensor([0, 1]).expand(99, 2)
    losses = cross_entropy(binary_logits(free).unsqueeze(1).expand(99, 2, 2), labels)
    risks = losses @ f64(0.4, 0.6)
    assert abs(best(free, risks) - 0.6) < 1e-9
    assert abs(risks.min().item() + 0.4 * math.log(0.4) + 0.6 * math.log(0.6)) < 1e-9

    # one weight and no intercept: three samples (1, class 1) and one (10, class 0)
    x, y, weights = f64(1, 1, 1, 10), torch.tensor([1, 1, 1, 0]), grid(-1, 1, 2001)
    scores = weights[:, None] * x
    logits = torch.stack([torch.zeros_like(scores), scores], dim=-1)
    risks = cross_entropy(logits, y.expand(2001, 4)).mean(dim=1)
    errors = zero_one(logits, y.expand(2001, 4)).mean(dim=1)
    w = best(weights, risks)
    assert abs(w + 0.164) < 1e-3
    slope = (3 * -sigmoid(-w) + 10 * sigmoid(10 * w)) / 4  # by hand, about 0 there
    assert abs(slope) < 2e-3
    by_hand = (3 * math.log1p(math.exp(-w)) + math.log1p(math.exp(10 * w))) / 4
    assert abs(risks.min().item() - by_hand) < 1e-9
    assert errors[risks.argmin()] == 0.75 and errors[weights > 1e-6].eq(0.25).all()


def test_claim_4_3_absolute_error_robust():
    """One target of 100 among zeros carries the mean to 20 and leaves the median at 0."""
    outcomes, guesses, chances = f64(0, 0, 0, 0, 100), grid(-10, 110, 1201), f64(*[0.2] * 5)
    squares = risk(squared_error, guesses, outcomes, chances)
    sizes = risk(absolute_error, guesses, outcomes, chances)
    assert abs(best(guesses, squares) - 20) < 1e-9 and abs(squares.min().item() - 1600) < 1e-6
    assert abs(best(guesses, sizes)) < 1e-9 and abs(sizes.min().item() - 20) < 1e-9


def test_claim_4_3_noise_models():
    """With one scale each likelihood is its loss; with two scales it weights the samples."""
    outcomes, guesses, chances = f64(0, 1, 1.5, 7), grid(-1, 8, 901), f64(*[0.25] * 4)
    normal, laplace = torch.distributions.Normal, torch.distributions.Laplace
    wide = outcomes.expand(901, 4)
    predictions, zeros = guesses[:, None].expand(901, 4), torch.zeros(901, 4, dtype=torch.float64)
    gaussian = gaussian_nll(predictions, wide, zeros)
    double = laplace_nll(predictions, wide, zeros)
    assert_close(gaussian, -normal(predictions, 1.0).log_prob(wide))
    assert_close(double, -laplace(predictions, 1.0).log_prob(wide))
    squares = squared_error(predictions, wide)
    sizes = absolute_error(predictions, wide)
    assert_close(gaussian, squares / 2 + math.log(2 * math.pi) / 2)
    assert_close(double, sizes + math.log(2))
    assert abs(best(guesses, gaussian @ chances) - 2.375) < 0.006  # the mean
    assert 1 - 1e-9 <= best(guesses, double @ chances) <= 1.5 + 1e-9  # a median

    # outside: noise of width 1 on the first sample and 3 on the second
    pair, log_widths = f64(0, 4).expand(901, 2), f64(0, math.log(3)).expand(901, 2)
    centers = guesses[:, None].expand(901, 2)
    weighted = gaussian_nll(centers, pair, 2 * log_widths).sum(dim=1)
    assert abs(best(guesses, weighted) - 0.4) < 1e-9  # not the mean, 2
    leaning = laplace_nll(centers, pair, log_widths).sum(dim=1)
    assert abs(best(guesses, leaning)) < 1e-9  # not every point between, as for equal widths


def test_claim_4_3_imbalance():
    """A rare class of probability 0.1: plain cross-entropy says 0.1, the other two do not."""
    shares, labels, chances = grid(0.001, 0.999, 999), torch.tensor([0, 1]), f64(0.9, 0.1)
    logits = binary_logits(shares).unsqueeze(1).expand(999, 2, 2)
    plain = cross_entropy(logits, labels.expand(999, 2)) @ chances
    weighted = cross_entropy(logits, labels.expand(999, 2), weight=f64(1, 9)) @ chances
    focused = focal(logits, labels.expand(999, 2), gamma=2.0) @ chances
    assert abs(best(shares, plain) - 0.1) < 1e-9
    entropy = -0.1 * math.log(0.1) - 0.9 * math.log(0.9)
    assert abs(plain.min().item() - entropy) < 1e-9
    # inside: if missing the rare class costs nine times as much, 1/2 is the point of indifference
    assert abs(best(shares, weighted) - 0.5) < 1e-9
    assert abs(weighted.min().item() - 1.8 * math.log(2)) < 1e-9
    # outside: as probabilities both are off, the focal loss towards 1/2
    p = best(shares, focused)
    assert abs(p - 0.306) < 1e-9
    by_hand = -0.1 * (1 - p) ** 2 * math.log(p) - 0.9 * p**2 * math.log(1 - p)
    assert abs(focused.min().item() - by_hand) < 1e-9


def second_derivative(loss, w: float) -> float:
    point = f64(w).requires_grad_()
    (slope,) = torch.autograd.grad(loss(point).sum(), point, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), point)
    return curvature.item()


def test_claim_4_3_hessian_principle():
    """For input 2 and target 1: constant for a line, negative somewhere behind a sigmoid."""
    one = f64(1.0)
    for w in (-3.0, 0.0, 1.7):
        line = second_derivative(lambda v: half_squared_error(2 * v, one), w)
        assert abs(line - 4.0) < 1e-9
        p = sigmoid(2 * w)
        entropy = second_derivative(lambda v: binary_cross_entropy(2 * v, one), w)
        assert abs(entropy - 4 * p * (1 - p)) < 1e-9 and entropy > 0
    p = sigmoid(-3.0)
    bent = second_derivative(lambda v: half_squared_error((2 * v).sigmoid(), one), -1.5)
    slope = p * (1 - p)
    assert abs(bent - 4 * (slope**2 + (p - 1) * slope * (1 - 2 * p))) < 1e-9 and bent < 0


def descend(loss, start: float, lr: float, steps: int) -> list[float]:
    """Values of the only weight, one a step."""
    path = [f64(start)]
    for _ in range(steps):
        point = path[-1].clone().requires_grad_()
        (slope,) = torch.autograd.grad(loss(point).sum(), point)
        path.append(path[-1] - lr * slope)
    return [point.item() for point in path]


def test_claim_4_3_cross_entropy_trains_more_easily():
    """Input 1, class 1, from a weight of -8: behind a sigmoid the squared error stays there."""
    one, label = f64(1.0), torch.tensor([1])

    def entropy(w: Tensor) -> Tensor:
        return cross_entropy(torch.stack([torch.zeros_like(w), w], dim=-1), label)

    by_entropy = descend(entropy, -8.0, 1.0, 20)
    behind_sigmoid = descend(lambda w: half_squared_error(w.sigmoid(), one), -8.0, 1.0, 20)
    on_the_score = descend(lambda w: half_squared_error(w, one), -8.0, 1.0, 20)
    p = sigmoid(-8.0)
    assert abs(by_entropy[1] - (-8.0 + 1 - p)) < 1e-9  # almost a unit a step
    assert by_entropy[-1] > 2
    assert abs(behind_sigmoid[1] - (-8.0 + (1 - p) * p * (1 - p))) < 1e-9
    assert behind_sigmoid[-1] < -7.9
    # outside: a squared error on the score itself is there after one step
    assert abs(on_the_score[1] - 1.0) < 1e-9 and on_the_score[-1] > 0.5


def test_claim_4_3_calibration():
    """The truth is 0.3. Two losses say so, the absolute error says 0; and what that costs."""
    shares, chances = grid(0.001, 0.999, 999), f64(0.7, 0.3)
    labels = torch.tensor([0, 1]).expand(999, 2)
    logits = binary_logits(shares).unsqueeze(1).expand(999, 2, 2)
    entropy_risk = cross_entropy(logits, labels) @ chances
    brier_risk = brier(logits.softmax(dim=-1), labels) @ chances
    absolute_risk = risk(absolute_error, shares, f64(0, 1), chances)
    assert abs(best(shares, entropy_risk) - 0.3) < 1e-9
    truth = -0.3 * math.log(0.3) - 0.7 * math.log(0.7)
    assert abs(entropy_risk.min().item() - truth) < 1e-9
    assert abs(best(shares, brier_risk) - 0.3) < 1e-9
    assert abs(brier_risk.min().item() - 2 * 0.3 * 0.7) < 1e-9
    assert abs(best(shares, absolute_risk) - 0.001) < 1e-9  # as low as the grid goes
    assert abs(absolute_risk.min().item() - 0.3) < 1e-3

    ten = torch.tensor([0] * 7 + [1] * 3)
    honest = expected_calibration_error(f64(0.7, 0.3).expand(10, 2), ten)
    certain = expected_calibration_error(f64(0.999, 0.001).expand(10, 2), ten)
    assert abs(honest.item()) < 1e-9 and abs(certain.item() - 0.299) < 1e-9


def test_claim_4_3_ranking():
    """Any increasing map keeps the AUC; a common shift keeps its surrogate, a stretch does not."""
    scores, targets = f64(0.1, 0.4, 0.35, 0.8), torch.tensor([0, 0, 1, 1])
    positives, negatives = scores[targets == 1], scores[targets == 0]
    wins = sum(float(p > n) for p in positives for n in negatives) / 4
    assert wins == 0.75
    for moved in (scores, scores.exp(), scores**3 - 7):
        assert abs(auc(moved, targets).item() - wins) < 1e-12
    pairs = pairwise_auc(positives, negatives)
    by_hand = [
        [math.log1p(math.exp(n - p)) for n in negatives.tolist()] for p in positives.tolist()
    ]
    assert_close(pairs, torch.tensor(by_hand, dtype=torch.float64))
    assert_close(pairwise_auc(positives + 5, negatives + 5), pairs)
    assert (pairwise_auc(3 * positives, 3 * negatives) - pairs).abs().max() > 0.1


def test_eq_4_3_32():
    """The value by hand, and the gradient by finite differences: the tasks' own, weighted."""
    weights = f64(2.0, 0.5)

    def losses(w: Tensor) -> Tensor:
        return torch.stack([w[0] ** 2, (w[1] - 3) ** 2])

    point = f64(1.0, 1.0).requires_grad_()
    total = weighted_sum(losses(point), weights)
    assert abs(total.item() - (2.0 * 1 + 0.5 * 4)) < 1e-12
    (gradient,) = torch.autograd.grad(total, point)
    for i in range(2):
        step = torch.zeros(2, dtype=torch.float64)
        step[i] = 1e-6
        ahead, behind = losses(point.detach() + step), losses(point.detach() - step)
        slope = sum(w * (a - b) for w, a, b in zip(weights, ahead, behind, strict=True)) / 2e-6
        assert abs(gradient[i] - slope) < 1e-6


def test_claim_4_3_scale_dominance():
    """Two tasks that want 0 and 1: measured in units a tenth the size, the first takes all."""
    guesses, equal = grid(0, 1, 10_001), f64(1.0, 1.0)
    values = [
        weighted_sum(torch.stack([100 * w**2, (w - 1) ** 2]), equal).item() for w in guesses[::10]
    ]
    at = min(range(len(values)), key=values.__getitem__)
    assert abs(guesses[10 * at].item() - 1 / 101) < 1e-3  # with equal scales it is 1/2
    assert abs(values[500] - 25.25) < 1e-9
    gradients = torch.stack([f64(300, 400), f64(0, -1)])
    summed = equal @ gradients
    assert abs((summed / summed.norm()) @ f64(0.6, 0.8) - 1) < 1e-5  # the first task's direction
    assert_close(normalized_gradients(gradients, equal), f64(0.6, -0.2))


def test_eq_4_3_33():
    """Unit vectors are summed; of a single task's slope only the sign is left, and it hovers."""
    gradients = torch.stack([f64(3, 4), f64(-5, 12)])
    by_hand = [2 * 3 / 5 - 5 / 13, 2 * 4 / 5 + 12 / 13]
    assert_close(normalized_gradients(gradients, f64(2, 1)), f64(*by_hand))
    # outside: a zero gradient has no direction, 0/0 as printed
    zero = torch.zeros(1, 2, dtype=torch.float64)
    assert (zero / zero.norm(dim=1, keepdim=True)).isnan().all()
    with_zero = torch.cat([zero, gradients[:1]])
    assert_close(normalized_gradients(with_zero, f64(1, 1)), f64(0.6, 0.8))
    w, path = f64(1.0), [1.0]
    for _ in range(9):  # descending w^2 / 2, whose gradient is w, at a constant step
        w = w - 0.3 * normalized_gradients(w.reshape(1, 1), f64(1.0))
        path.append(w.item())
    assert_close(f64(*path), f64(1, 0.7, 0.4, 0.1, -0.2, 0.1, -0.2, 0.1, -0.2, 0.1))


def test_claim_4_3_pareto():
    """Tasks that want 0 and 1: between them nothing is dominated, beyond them everything is."""
    points = grid(-2, 3, 51)
    zeros = torch.zeros_like(points)
    pairs = torch.stack([squared_error(points, zeros), squared_error(points, zeros + 1)], dim=1)
    for point, (first, second) in zip(points.tolist(), pairs.tolist(), strict=True):
        assert abs(first - point**2) < 1e-12 and abs(second - (point - 1) ** 2) < 1e-12
    no_worse = (pairs[:, None] <= pairs + 1e-12).all(dim=-1)  # entry (j, i): j against i
    better = (pairs[:, None] < pairs - 1e-12).any(dim=-1)
    dominated = (no_worse & better).any(dim=0)
    assert torch.equal(dominated, (points < -1e-9) | (points > 1 + 1e-9))


def test_claim_4_3_weights_miss_the_front():
    """Printed: some weights give no Pareto-optimal point. Positive ones always do; but the
    middle of a front that bulges outwards is Pareto-optimal and no weights choose it."""
    front = [(1.0, 0.0), (0.8, 0.8), (0.0, 1.0)]  # 0.8 + 0.8 is more than 1
    choices = torch.tensor([*front, (1.0, 1.0), (0.9, 0.8)], dtype=torch.float64)

    def dominated(a: list[float]) -> bool:
        return any(b[0] <= a[0] and b[1] <= a[1] and b != a for b in choices.tolist())

    assert [dominated(choice) for choice in choices.tolist()] == [False] * 3 + [True] * 2
    chosen = set()
    for w in [0.001, *(k / 20 for k in range(1, 20)), 0.999]:
        sums = torch.stack([weighted_sum(losses, f64(w, 1 - w)) for losses in choices])
        for total, (first, second) in zip(sums.tolist(), choices.tolist(), strict=True):
            assert abs(total - w * first - (1 - w) * second) < 1e-12
        winner = choices[sums.argmin()].tolist()
        assert not dominated(winner)  # so the printed sentence is false
        chosen.add(tuple(winner))
    assert chosen == {front[0], front[2]}  # and the middle is out of reach
    # a weight of zero is the exception: it cannot tell (0, 1) from a dominated (0, 2)
    careless = [weighted_sum(f64(0, second), f64(1, 0)).item() for second in (1.0, 2.0)]
    assert careless[0] == careless[1] == 0.0


def test_claim_4_3_multi_gradient_descent():
    """Inside, convex tasks: it stops on the front. Outside: at a dominated local minimum."""

    def descend_both(gradient, w: float, lr: float) -> float:
        for _ in range(150):
            rows = torch.tensor([[g] for g in gradient(w)], dtype=torch.float64)
            weights = mgda(rows, steps=2)
            first, second = rows[:, 0].tolist()
            # two tasks in closed form: the multiple of the difference nearest to the origin
            share = second * (second - first) / (first - second) ** 2 if first != second else 0.5
            share = min(max(share, 0.0), 1.0)
            assert abs((weights @ rows).item() - (share * first + (1 - share) * second)) < 1e-9
            assert abs(weights.sum() - 1) < 1e-9
            w -= lr * (weights @ rows).item()
        return w

    for start in (3.0, 0.4, -2.0):
        stop = descend_both(lambda w: (2 * w, 2 * (w - 1)), start, 0.1)
        assert -1e-6 <= stop <= 1 + 1e-6

    def value(w: float) -> float:
        return w**4 - 2 * w**2 + 0.5 * w

    stop = descend_both(lambda w: [4 * w**3 - 4 * w + 0.5] * 2, 1.5, 0.02)
    assert abs(stop - 0.9304) < 1e-3 and abs(value(stop) + 0.5167) < 1e-3
    assert value(-1.0574) < value(stop) - 0.9  # both tasks are far better off there

"""What InfoNCE and attention share and what they do not, held to numbers."""

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from lmlosses.lab.models import scaled_dot_product_attention
from lmlosses.logprobs import pair_stats
from lmlosses.losses import info_nce
from lmlosses.normalizers import softmax_jacobian

KEYS = torch.tensor(
    [[1.0, 0.5, -0.3], [0.2, -1.0, 0.8], [-0.7, 0.4, 0.6], [0.9, 0.9, 0.1]], dtype=torch.float64
)  # the positive comes first
VALUES = torch.tensor([[2.0, 0.0], [-1.0, 1.0], [0.5, 3.0], [0.0, -2.0]], dtype=torch.float64)
QUERY = torch.tensor([0.8, -0.6, 1.1], dtype=torch.float64)
TAU = 0.4


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def shares(scores: list[float]) -> list[float]:
    """The softmax in plain arithmetic."""
    powers = [math.exp(score - max(scores)) for score in scores]
    return [power / sum(powers) for power in powers]


def by_hand(query: Tensor, keys: Tensor, temperature: float) -> Tensor:
    """Weights of the keys in plain arithmetic."""
    scores = [
        sum(q * k for q, k in zip(query.tolist(), key, strict=True)) / temperature
        for key in keys.tolist()
    ]
    return f64(*shares(scores))


def attend(query: Tensor, keys: Tensor, values: Tensor, temperature: float | None = None):
    """Output and weights of one query."""
    found = scaled_dot_product_attention(query[None], keys, values, temperature=temperature)
    return found.output[0], found.weights[0]


def surprise(query: Tensor, keys: Tensor, temperature: float, similarity="dot") -> Tensor:
    """InfoNCE of one query whose positive is the first key; differentiable twice."""
    return info_nce(
        query, keys[0], keys[1:], temperature=temperature, similarity=similarity
    )  # fmt: skip


def slopes(function, point: Tensor) -> Tensor:
    """Central differences of a scalar function, entry by entry."""
    found = []
    for i in range(len(point)):
        step = torch.zeros_like(point)
        step[i] = 1e-5
        found.append((function(point + step) - function(point - step)) / 2e-5)
    return torch.stack(found)


def gradient(function, point: Tensor) -> Tensor:
    point = point.clone().requires_grad_()
    return torch.autograd.grad(function(point), point)[0]


def test_eq_4_4_19():
    """One softmax: attention averages values under it, InfoNCE takes the log of one entry."""
    p = by_hand(QUERY, KEYS, TAU)
    output, weights = attend(QUERY, KEYS, VALUES, TAU)
    assert_close(weights, p)
    average = [
        sum(w * v[i] for w, v in zip(p.tolist(), VALUES.tolist(), strict=True)) for i in range(2)
    ]
    assert_close(output, f64(*average))
    for positive in range(4):
        others = [j for j in range(4) if j != positive]
        loss = info_nce(
            QUERY, KEYS[positive], KEYS[others], temperature=TAU, similarity="dot"
        )  # fmt: skip
        assert abs(loss.item() + math.log(p[positive])) < 1e-12


def test_eq_4_4_20():
    """The slope of the log-sum-exp over the keys is the output whose values are the keys."""

    def potential(query: Tensor) -> Tensor:
        return TAU * pair_stats(query[None] / TAU, KEYS).log_normalizer[0]

    level = TAU * math.log(sum(math.exp((key @ QUERY).item() / TAU) for key in KEYS))
    assert abs(potential(QUERY).item() - level) < 1e-12
    output, _ = attend(QUERY, KEYS, KEYS, TAU)
    assert_close(output, slopes(potential, QUERY), rtol=0, atol=1e-8)
    assert_close(gradient(potential, QUERY), by_hand(QUERY, KEYS, TAU) @ KEYS)


def test_eq_4_4_21():
    """InfoNCE's slope in the query is attention's output less the positive key, over tau."""
    output, _ = attend(QUERY, KEYS, KEYS, TAU)
    formula = (output - KEYS[0]) / TAU
    found = slopes(lambda query: surprise(query, KEYS, TAU), QUERY)
    assert_close(formula, found, rtol=0, atol=1e-8)


def test_eq_4_4_22():
    """The keys' covariance under the weights: first derivative here, second derivative there."""
    p = by_hand(QUERY, KEYS, TAU)
    mean = p @ KEYS
    covariance = sum(
        share * torch.outer(key - mean, key - mean) for share, key in zip(p, KEYS, strict=True)
    )
    written = KEYS.T @ softmax_jacobian(KEYS @ QUERY, temperature=TAU) @ KEYS
    assert_close(written, covariance / TAU)
    of_attention = slopes(lambda query: attend(query, KEYS, KEYS, TAU)[0], QUERY)
    assert_close(of_attention, covariance / TAU, rtol=0, atol=1e-8)
    of_info_nce = torch.autograd.functional.hessian(
        lambda query: surprise(query, KEYS, TAU), QUERY
    )  # fmt: skip
    assert_close(TAU * of_info_nce, covariance / TAU)


def test_eq_4_4_23():
    """Slopes in the scores: a weight and a covariance in attention, p less one-hot in InfoNCE."""
    eye = torch.eye(4, dtype=torch.float64)  # keys that make the query's entries the scores
    scores, goal = f64(0.3, 1.2, -0.5, 0.1), f64(1.0, -2.0)

    def missed(s: Tensor) -> Tensor:
        return 0.5 * (attend(s, eye, VALUES, TAU)[0] - goal).square().sum()

    p = f64(*shares([s / TAU for s in scores.tolist()]))
    output = p @ VALUES
    formula = p * ((VALUES - output) @ (output - goal)) / TAU
    assert_close(slopes(missed, scores), formula, rtol=0, atol=1e-8)
    assert_close(gradient(missed, scores), formula)
    simple = (p - eye[0]) / TAU
    found = slopes(lambda s: surprise(s, eye, TAU), scores)
    assert_close(found, simple, rtol=0, atol=1e-8)


def energy(state: Tensor, patterns: Tensor, temperature: float) -> Tensor:
    normalizer = pair_stats(state[None] / temperature, patterns).log_normalizer[0]
    return 0.5 * state.square().sum() - temperature * normalizer


def test_eq_4_4_24():
    """A step of attention to the patterns is a step of size 1 down the energy; the energy falls
    by half the square of the way at least."""
    state, moved, values = QUERY, torch.zeros(3, dtype=torch.float64), []
    for _ in range(12):
        output, _ = attend(state, KEYS, KEYS, TAU)
        downhill = slopes(lambda point: energy(point, KEYS, TAU), state)
        assert_close(state - downhill, output, rtol=0, atol=1e-8)
        by_sum = TAU * math.log(sum(math.exp((key @ state).item() / TAU) for key in KEYS))
        values.append(0.5 * (state @ state).item() - by_sum)
        assert abs(energy(state, KEYS, TAU).item() - values[-1]) < 1e-12
        if len(values) > 1:
            assert values[-2] - values[-1] >= 0.5 * moved.square().sum() - 1e-12
        moved, state = output - state, output
    assert values[0] - values[-1] > 0.1


def test_claim_4_4_weights_are_probabilities():
    """Inside: the same inner products and temperature. Outside: InfoNCE's usual cosines, for
    vectors of other lengths than 1 and where a weight can come close to 1."""
    _, weights = attend(QUERY, KEYS, VALUES, TAU)
    assert abs(surprise(QUERY, KEYS, TAU).exp() * weights[0] - 1) < 1e-12
    of_cosines = (-surprise(QUERY, KEYS, TAU, similarity="cosine")).exp()
    unit = torch.nn.functional.normalize
    assert_close(of_cosines, by_hand(unit(QUERY, dim=0), unit(KEYS, dim=1), TAU)[0])
    assert abs(of_cosines / weights[0] - 1) > 0.2
    # ten times the query: attention picks one key, the cosine does not notice
    _, sharp = attend(10 * QUERY, KEYS, VALUES, TAU)
    assert_close(sharp, by_hand(10 * QUERY, KEYS, TAU))
    louder = surprise(10 * QUERY, KEYS, TAU, similarity="cosine")
    assert sharp.max() > 0.99 and abs(louder + of_cosines.log()) < 1e-12
    ceiling = 1 / (1 + 3 * math.exp(-2 / TAU))  # whatever the vectors are
    assert of_cosines < ceiling < 1


def test_claim_4_4_mask():
    """A pair that is left out: weight 0 and no gradient, and the others' shares as without it."""
    keep = torch.tensor([True, False, True, True])
    kept = by_hand(QUERY, KEYS[keep], TAU)
    masked = scaled_dot_product_attention(
        QUERY[None], KEYS, VALUES, mask=keep[None], temperature=TAU
    )
    assert_close(masked.weights[0, keep], kept)
    assert masked.weights[0, 1] == 0 and (masked.weights >= 0).all()
    points = KEYS.clone().requires_grad_()
    loss = info_nce(QUERY, points[0], points[1:], temperature=TAU, mask=keep[1:], similarity="dot")
    assert abs(loss.item() + math.log(kept[0])) < 1e-12
    (pulls,) = torch.autograd.grad(loss, points)
    assert (pulls[1] == 0).all() and (pulls[0] != 0).all()


def test_claim_4_4_attention_contrastive():
    """Inside: one-hot values, and minus the log of the output. Outside: a squared error there,
    which has the same minimum and another gradient, and values that do not tell keys apart."""
    eye = torch.eye(4, dtype=torch.float64)
    scores = f64(-1.0, 2.0, 0.5, 0.0)
    output, _ = attend(scores, eye, eye, 1.0)
    assert abs(surprise(scores, eye, 1.0).item() + math.log(output[0])) < 1e-12
    p = f64(*shares(scores.tolist()))
    assert_close(output, p)
    copying = gradient(lambda s: -attend(s, eye, eye, 1.0)[0][0].log(), scores)
    assert_close(copying, p - eye[0])
    averaging = gradient(
        lambda s: 0.5 * (attend(s, eye, eye, 1.0)[0] - eye[0]).square().sum(), scores
    )
    assert torch.cosine_similarity(averaging, copying, dim=0) < 0.95
    assert averaging.norm() < 0.5 * copying.norm()
    # the second key has the value of the first: nothing tells attention to prefer the first
    twins = eye[[0, 0, 2, 3]]
    even = gradient(lambda s: -attend(s, eye, twins, 1.0)[0][0].log(), 0 * scores)
    assert_close(even, f64(-0.25, -0.25, 0.25, 0.25))
    own = gradient(lambda s: surprise(s, eye, 1.0), 0 * scores)
    assert_close(own, f64(-0.75, 0.25, 0.25, 0.25))


def test_claim_4_4_normalizer_step():
    """Inside: values that are the keys, added to the query, at a step of tau on log-sum-exp.
    Outside: values of their own, whose output is no gradient of any function."""

    def log_normalizer(query: Tensor) -> Tensor:
        return pair_stats(query[None] / TAU, KEYS).log_normalizer[0]

    residual = QUERY + attend(QUERY, KEYS, KEYS, TAU)[0]
    uphill = QUERY + TAU * slopes(log_normalizer, QUERY)
    assert_close(residual, uphill, rtol=0, atol=1e-8)
    assert_close(QUERY + TAU * gradient(log_normalizer, QUERY), residual)
    plain = math.log(sum(math.exp((key @ residual).item() / TAU) for key in KEYS))
    assert abs(log_normalizer(residual).item() - plain) < 1e-12
    assert plain > log_normalizer(QUERY).item() + 1

    mixed = KEYS[:, [1, 2, 0]]  # the same values in other coordinates
    twist = slopes(lambda query: attend(query, KEYS, mixed, TAU)[0], QUERY)
    straight = slopes(lambda query: attend(query, KEYS, KEYS, TAU)[0], QUERY)
    assert_close(straight, straight.T, rtol=0, atol=1e-8)  # a Hessian is symmetric
    assert (twist - twist.T).abs().max() > 0.1


def test_claim_4_4_info_nce_step():
    """A descent step on InfoNCE subtracts the attention output. The residual step adds it, and
    can raise the loss; the plain step puts it in the query's place."""
    output, _ = attend(QUERY, KEYS, KEYS, TAU)
    descent = QUERY - TAU * slopes(lambda query: surprise(query, KEYS, TAU), QUERY)
    assert_close(descent, QUERY + KEYS[0] - output, rtol=0, atol=1e-8)
    assert_close(output, by_hand(QUERY, KEYS, TAU) @ KEYS)
    before = -math.log(by_hand(QUERY, KEYS, TAU)[0])
    assert abs(surprise(QUERY, KEYS, TAU).item() - before) < 1e-12
    for step in (output, QUERY + output):  # of attention, without and with the residual
        assert (step - descent).norm() > 1
    assert surprise(descent, KEYS, TAU) < before - 0.5
    assert surprise(QUERY + output, KEYS, TAU) > before + 0.1


def test_claim_4_4_hopfield_update():
    """Inside: values that are the keys. Outside: values of their own; the energy can rise, and
    the state can go round for ever."""
    start = KEYS[1] + f64(0.3, 0.1, -0.2)
    output, _ = attend(start, KEYS, KEYS, 0.1)
    assert_close(output, by_hand(start, KEYS, 0.1) @ KEYS)
    assert (output - KEYS[1]).norm() < 0.1 < (start - KEYS[1]).norm()

    def plain(state: Tensor) -> float:
        total = sum(math.exp((key @ state).item() / 0.1) for key in KEYS)
        return 0.5 * (state @ state).item() - 0.1 * math.log(total)

    assert plain(output) < plain(start) - 0.05
    assert abs(energy(start, KEYS, 0.1).item() - plain(start)) < 1e-9
    away, _ = attend(start, KEYS, -KEYS, 0.1)
    assert plain(away) > plain(start) + 0.5

    corners = f64(1, 0, 0, 1, -1, 0, 0, -1).reshape(4, 2)
    state, visited = corners[0], []
    for _ in range(40):
        state, _ = attend(state, corners, corners.roll(-1, dims=0), 0.2)
        visited.append(int((corners @ state).argmax()))
    assert visited == [1, 2, 3, 0] * 10 and state.norm() > 0.9


def test_claim_4_4_same_purpose():
    """The root holds the spread of inner products at 1 whatever the width. A temperature of
    cosines widens scores that cannot pass 1: with the root there, no encoder beats chance."""
    draw = torch.Generator().manual_seed(0)
    for width in (16, 256):
        q, k = (torch.randn(64, width, dtype=torch.float64, generator=draw) for _ in "qk")
        found = scaled_dot_product_attention(q, k, k)
        logs = found.weights.log()
        spread = (logs - logs.mean(dim=1, keepdim=True)).std()
        raw = (q @ k.T).std()
        assert abs(spread - 1) < 0.05 and abs(raw / math.sqrt(width) - 1) < 0.05
    # the best cosines there are: the positive along the query, all negatives against it
    query = torch.ones(64, dtype=torch.float64)
    keys = torch.cat([query[None], -query.expand(31, 64)])
    chance = math.log(32)
    at_root = surprise(query, keys, 8.0, similarity="cosine").item()
    assert at_root == pytest.approx(math.log(1 + 31 * math.exp(-2 / 8)), abs=1e-12)
    assert 3.2 < at_root < chance
    assert surprise(query, keys, 0.07, similarity="cosine") < 1e-10
    # half the query undoes half the temperature in attention, and is nothing to a cosine
    once, half = attend(QUERY, KEYS, VALUES, TAU)[1], attend(QUERY / 2, KEYS, VALUES, TAU / 2)[1]
    assert_close(once, by_hand(QUERY, KEYS, TAU))
    assert_close(once, half)
    cosines = [surprise(q, KEYS, t, "cosine") for q, t in ((QUERY, TAU), (QUERY / 2, TAU / 2))]
    assert abs(cosines[0] - cosines[1]) > 0.1


def test_claim_4_4_same_saturation():
    """A wrong key leads by more and more: attention's gradient dies like e to minus the lead,
    InfoNCE's stays at its largest. When the right key leads, both die."""
    eye = torch.eye(4, dtype=torch.float64)

    def pulls(scores: Tensor) -> tuple[Tensor, Tensor]:
        averaging = gradient(
            lambda s: 0.5 * (attend(s, eye, eye, 1.0)[0] - eye[0]).square().sum(), scores
        )
        return averaging, gradient(lambda s: surprise(s, eye, 1.0), scores)

    for lead in (5.0, 10.0, 20.0):
        averaging, contrastive = pulls(f64(0.0, lead, 0.0, 0.0))
        p = f64(*shares([0.0, lead, 0.0, 0.0]))
        jacobian = p.diag() - torch.outer(p, p)
        assert_close(averaging, jacobian @ (p - eye[0]))
        assert_close(contrastive, p - eye[0])
        assert averaging.abs().max() < 8 * math.exp(-lead)
        assert contrastive[0] < -0.98 and contrastive[1] > 0.98
    for pull in pulls(f64(20.0, 0.0, 0.0, 0.0)):
        assert pull.abs().max() < 1e-7

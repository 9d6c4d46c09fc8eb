"""What textbook subsections 4.3.5 and 4.3.6 say, held to numbers: the softmax in attention."""

import math
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from lmlosses.lab.models import rotary, scaled_dot_product_attention, sinusoidal_positions
from lmlosses.losses import (
    brier,
    cross_entropy,
    half_squared_error,
    kl_divergence,
)
from lmlosses.normalizers import softmax


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def matrix(*rows: tuple[float, ...]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def shares(scores: list[float]) -> list[float]:
    """The softmax in plain arithmetic."""
    powers = [math.exp(score) for score in scores]
    return [power / sum(powers) for power in powers]


def gradient(function, point: Tensor) -> Tensor:
    point = point.clone().requires_grad_()
    return torch.autograd.grad(function(point).sum(), point)[0]


QUERY = matrix((1.0, 0.0, 2.0, -1.0), (0.5, 1.0, 0.0, 0.0), (0.0, 0.0, 0.0, 1.0))
KEY = matrix((0.2, 1.0, 0.0, 0.0), (1.0, 1.0, 1.0, 1.0), (-1.0, 0.5, 0.3, 2.0))
VALUE = matrix((1.0, -1.0), (2.0, 0.0), (4.0, 3.0))


def attention_row(query: Tensor, temperature: float) -> tuple[list[float], list[float]]:
    """One row of weights and of output, in plain arithmetic."""
    scores = [
        sum(q * k for q, k in zip(query.tolist(), key, strict=True)) / temperature
        for key in KEY.tolist()
    ]
    row = shares(scores)
    output = [sum(w * v[i] for w, v in zip(row, VALUE.tolist(), strict=True)) for i in range(2)]
    return row, output


def test_eq_4_3_34():
    """Printed: a row equals a matrix. The row is the matrix's row, the softmax along the keys."""
    attention = scaled_dot_product_attention(QUERY, KEY, VALUE)
    right_side = softmax(QUERY @ KEY.T / 2.0) @ VALUE  # d_k = 4
    for i in range(3):
        row, output = attention_row(QUERY[i], 2.0)
        left_side = f64(*output)
        assert left_side.shape != right_side.shape  # the printed equality cannot hold
        assert_close(right_side[i], left_side)
        assert_close(attention.output[i], left_side)
        assert_close(attention.weights[i], f64(*row))
    down_the_columns = softmax((QUERY @ KEY.T / 2.0).T).T @ VALUE
    assert (down_the_columns - right_side).abs().max() > 0.1


def test_eq_4_3_35():
    """Exponentials over their sum: (1, 2, 3) gives 0.090, 0.245, 0.665."""
    probabilities = softmax(f64(1, 2, 3))
    assert_close(probabilities, f64(*shares([1, 2, 3])))
    assert_close(probabilities, f64(0.0900, 0.2447, 0.6652), atol=1e-4, rtol=0)


def test_claim_4_3_only_inputs_differ():
    """One map: a head whose keys are the output embeddings has the classifier's probabilities.
    Two uses: two rows of scores with equal loss have different attention outputs."""
    hidden, embeddings = QUERY[:1], KEY
    head = scaled_dot_product_attention(hidden, embeddings, VALUE, temperature=1.0)
    row, output = attention_row(QUERY[0], 1.0)
    assert_close(head.weights[0], f64(*row))
    assert_close(head.output[0], f64(*output))
    logits = hidden @ embeddings.T
    loss = cross_entropy(logits, torch.tensor([1]))
    assert abs(loss.item() + math.log(row[1])) < 1e-12
    swapped = logits[:, [2, 1, 0]]  # the target's score and the sum of exponentials stay
    assert_close(cross_entropy(swapped, torch.tensor([1])), loss)
    other = f64(*shares(swapped[0].tolist())) @ VALUE
    assert (other - head.output[0]).abs().max() > 0.1


def test_claim_4_3_temperature():
    """All 256 pairs of vectors of +-1 in four dimensions: scores of variance 4, scaled to 1."""
    corners = list(product((-1.0, 1.0), repeat=4))
    scores = [sum(a * b for a, b in zip(q, k, strict=True)) for q in corners for k in corners]
    mean = sum(scores) / len(scores)
    assert mean == 0 and sum(s * s for s in scores) / len(scores) == 4
    scaled = [s / math.sqrt(4) for s in scores]
    assert sum(s * s for s in scaled) / len(scaled) == 1
    # and the library divides by that root, as a softmax of temperature 2 does
    queries, keys = matrix(*corners), matrix(*corners)
    weights = scaled_dot_product_attention(queries, keys, keys).weights
    as_temperature = softmax(queries @ keys.T, temperature=2.0)
    for i in (0, 5, 15):
        by_hand = f64(*shares(scaled[16 * i : 16 * i + 16]))
        assert_close(weights[i], by_hand)
        assert_close(as_temperature[i], by_hand)


def test_claim_4_3_shared_stability():
    """Scores of 1000 and 1001 overflow in plain exponentials; less the largest they do not."""
    with pytest.raises(OverflowError):
        shares([1000.0, 1001.0])
    by_hand = f64(1 / (1 + math.e), math.e / (1 + math.e))
    assert_close(softmax(f64(1000, 1001)), by_hand)
    attention = scaled_dot_product_attention(
        matrix((1000.0,)), matrix((1.0,), (1.001,)), matrix((0.0,), (1.0,))
    )
    assert_close(attention.weights[0], by_hand, atol=1e-9, rtol=0)
    assert_close(attention.output[0], by_hand[1:], atol=1e-9, rtol=0)


def test_claim_4_3_rows_sum_to_one():
    """Rows sum to one, masked or not (columns do not), unless everything is masked: then 0."""
    causal = torch.tensor([[False, False, False], [True, True, False], [True, True, True]])
    attention = scaled_dot_product_attention(QUERY, KEY, VALUE, mask=causal)
    assert_close(attention.weights.sum(dim=1), f64(0, 1, 1))
    assert (attention.weights >= 0).all() and (attention.weights[~causal] == 0).all()
    assert_close(attention.output[0], f64(0, 0))
    row, output = attention_row(QUERY[2], 2.0)
    assert_close(attention.weights[2], f64(*row))
    assert_close(attention.output[2], f64(*output))
    assert (attention.weights.sum(dim=0) - 1).abs().max() > 0.1
    nothing = torch.full((3,), -math.inf, dtype=torch.float64)
    assert torch.softmax(nothing, dim=0).isnan().all()  # the formula as it stands is 0/0


def test_eq_4_3_36():
    """Weights of 1/4 and 3/4: the output is the mean over four equally likely draws of j."""
    score = math.log(3.0)
    attention = scaled_dot_product_attention(
        matrix((1.0,)), matrix((0.0,), (score,)), matrix((1.0, -2.0), (5.0, 6.0))
    )
    draws = [(1.0, -2.0), (5.0, 6.0), (5.0, 6.0), (5.0, 6.0)]
    mean = [sum(draw[i] for draw in draws) / 4 for i in range(2)]
    assert_close(attention.output[0], f64(*mean))
    assert_close(attention.weights[0], f64(0.25, 0.75))


def test_claim_4_3_marginalization():
    """Values that are distributions mix into one, as the sum over j of P(j) P(y|j) does."""
    query, keys = matrix((1.0,)), matrix((0.0,), (math.log(3.0),))
    conditionals = matrix((0.5, 0.5, 0.0), (0.1, 0.1, 0.8))
    mixture = scaled_dot_product_attention(query, keys, conditionals)
    joint = [[0.25 * p for p in (0.5, 0.5, 0.0)], [0.75 * p for p in (0.1, 0.1, 0.8)]]
    marginal = [sum(column) for column in zip(*joint, strict=True)]
    assert_close(mixture.output[0], f64(*marginal))
    assert_close(mixture.weights[0], f64(0.25, 0.75))
    vectors = scaled_dot_product_attention(query, keys, matrix((2.0, -1.0, 0.0), (0.0, 5.0, 1.0)))
    assert_close(vectors.output[0], f64(0.5, 3.5, 0.75))  # no distribution over anything
    assert abs(vectors.output.sum() - 1) > 1


def test_claim_4_3_minimizes_divergence():
    """Cross-entropy is the divergence plus the entropy of the labels, so both fall together."""
    labels, logits = matrix((0.2, 0.5, 0.3)), matrix((0.3, -1.0, 2.0))
    model = shares([0.3, -1.0, 2.0])
    entropy = -sum(p * math.log(p) for p in (0.2, 0.5, 0.3))
    by_hand = sum(p * math.log(p / q) for p, q in zip((0.2, 0.5, 0.3), model, strict=True))

    def divergence(z: Tensor) -> Tensor:
        return kl_divergence(labels.log(), z.log_softmax(dim=-1))

    assert abs(divergence(logits).item() - by_hand) < 1e-12
    assert abs(cross_entropy(logits, labels).item() - by_hand - entropy) < 1e-12
    slope = f64(*model) - labels[0]
    assert_close(gradient(divergence, logits)[0], slope)
    assert_close(gradient(lambda z: cross_entropy(z, labels), logits)[0], slope)
    assert abs(cross_entropy(labels.log(), labels).item() - entropy) < 1e-12  # least at p


def infonce(candidates: int, symbols: int) -> float:
    """Expected loss when x = y is uniform over so many symbols and the critic is the best one.

    The best critic scores log(symbols) where the symbols agree and minus infinity elsewhere, so
    only the number of negatives that happen to agree with the positive matters: binomial.
    """
    rivals, total = candidates - 1, 0.0
    for agreeing in range(rivals + 1):
        chance = math.comb(rivals, agreeing) * (symbols - 1) ** (rivals - agreeing)
        scores = [math.log(symbols)] * (agreeing + 1) + [-math.inf] * (rivals - agreeing)
        loss = cross_entropy(f64(*scores), torch.tensor(0)).item()
        assert abs(loss - math.log(agreeing + 1)) < 1e-9
        total += chance / symbols**rivals * loss
    return total


def test_claim_4_3_infonce_information():
    """Log K minus the loss nears an information of log 2 and cannot reach one of log 4096."""
    little = math.log(16) - infonce(16, 2)
    assert math.log(2) - 0.05 < little < math.log(2)
    much = math.log(16) - infonce(16, 4096)
    assert math.log(16) - 0.01 < much <= math.log(16) < math.log(4096) - 5


def test_claim_4_3_infonce_is_attention():
    """Scores (1, 0): one number against a distribution; neither says what the other is."""
    keys, values = matrix((1.0,), (0.0,), (-math.inf,))[:2], matrix((1.0,), (0.0,))
    attention = scaled_dot_product_attention(matrix((1.0,)), keys, values)
    share = math.e / (1 + math.e)
    assert_close(attention.weights[0], f64(share, 1 - share))
    assert_close(attention.output[0], f64(share))
    loss = cross_entropy(f64(1, 0), torch.tensor(0))
    assert abs(loss.item() - 0.3133) < 1e-4
    # the same loss with other outputs: the rival's weight moves to another value
    three = cross_entropy(matrix((1, 0, -50), (1, -50, 0)), torch.tensor([0, 0]))
    outputs = scaled_dot_product_attention(
        torch.eye(2, dtype=torch.float64),
        matrix((1, 1), (0, -50), (-50, 0)),
        matrix((0.0,), (1.0,), (5.0,)),
        temperature=1.0,
    ).output
    assert_close(three, f64(0.3133, 0.3133), atol=1e-4, rtol=0)
    assert_close(outputs[:, 0], f64(1 - share, 5 * (1 - share)))
    # the same output with another loss: values that do not differ hide the weights
    flat = scaled_dot_product_attention(matrix((3.0,)), keys, matrix((2.0,), (2.0,))).output
    assert_close(flat[0], f64(2.0))
    assert abs(cross_entropy(f64(3, 0), torch.tensor(0)) - loss) > 0.2


def test_claim_4_3_infonce_goal():
    """The loss pushes the positive's score up and every negative's down, by their weights."""
    scores, positive = f64(0.5, 1.0, -0.3), torch.tensor(0)
    slope = gradient(lambda s: cross_entropy(s, positive), scores)
    row = shares([0.5, 1.0, -0.3])
    assert_close(slope, f64(row[0] - 1, row[1], row[2]))
    assert slope[0] < 0 and (slope[1:] > 0).all()
    close = cross_entropy(f64(0, 0), positive) - cross_entropy(f64(1, 0), positive)
    assert abs(close.item() - (math.log(2) - math.log1p(math.exp(-1)))) < 1e-12


def cosines(columns: Tensor) -> Tensor:
    """Between all pairs of different columns, in absolute value."""
    unit = columns / columns.norm(dim=0)
    return (unit.T @ unit).abs().triu(diagonal=1)


def test_claim_4_3_orthogonal_basis():
    """Columns of the encoding are far from orthogonal over 128 positions; harmonics are."""
    positions = sinusoidal_positions(128, 8).double()
    for t, i in ((0, 0), (3, 1), (127, 3)):
        angle = t * 10_000 ** (-2 * i / 8)
        assert abs(positions[t, 2 * i] - math.sin(angle)) < 1e-6
        assert abs(positions[t, 2 * i + 1] - math.cos(angle)) < 1e-6
    found = cosines(positions)
    assert found.max() > 0.99  # the sines of the two slowest pairs
    assert found.argmax() == 4 * 8 + 6
    turns = 2 * math.pi * torch.arange(128, dtype=torch.float64) / 128
    harmonics = torch.stack(
        [wave(k * turns) for k in (1, 2, 5, 9) for wave in (torch.sin, torch.cos)], dim=1
    )
    assert cosines(harmonics).max() < 1e-12


def test_claim_4_3_rotary_relative():
    """Two apart, anywhere: the same score; by hand cos and sin of the distance in radians."""
    query, key = f64(1, 0).expand(9, 2), f64(0, 1).expand(9, 2)
    queries, keys = rotary(query), rotary(key)
    for t in range(9):
        assert_close(queries[t], f64(math.cos(t), math.sin(t)))
        assert_close(keys[t], f64(-math.sin(t), math.cos(t)))
    scores = queries @ keys.T
    assert_close(scores.diagonal(2), f64(*[-math.sin(2.0)] * 7))
    assert_close(scores.diagonal(-3), f64(*[math.sin(3.0)] * 6))
    assert abs(scores[0, 2] - scores[0, 3]) > 0.1


def test_claim_4_3_rotary_linear_invariance():
    """Printed: a linear map changes nothing. It changes the scores, and after the rotation it
    makes them depend on the place. Orthogonal maps are harmless after it, and before it if they
    commute with the rotations."""
    stretch, turn = matrix((1, 0), (0, 2)), matrix((0.6, -0.8), (0.8, 0.6))
    query, key = f64(1, 0).expand(7, 2), f64(0, 1).expand(7, 2)
    assert_close(rotary(query)[1], f64(math.cos(1), math.sin(1)))

    def score(queries: Tensor, keys: Tensor, at: tuple[int, int]) -> float:
        return (queries[at[0]] @ keys[at[1]]).item()

    plain = score(rotary(query), rotary(key), (1, 3))
    assert abs(plain + math.sin(2.0)) < 1e-12
    before = score(rotary(query @ stretch), rotary(key @ stretch), (1, 3))
    assert abs(before + 2 * math.sin(2.0)) < 1e-12
    after = [score(rotary(query) @ stretch, rotary(key) @ stretch, at) for at in ((1, 3), (4, 6))]
    assert_close(f64(*after), f64(-3.4084, -3.0893), atol=1e-4, rtol=0)
    for at in ((1, 3), (4, 6)):
        assert abs(score(rotary(query) @ turn.T, rotary(key) @ turn.T, at) - plain) < 1e-12
        assert abs(score(rotary(query @ turn.T), rotary(key @ turn.T), at) - plain) < 1e-12
    # exchanging two planes is orthogonal and does not commute; by hand, two turns of 2 and 0.02
    pair, other = f64(1, 0, 1, 0).expand(7, 4), f64(1, 0, 0, 1).expand(7, 4)
    exchange = torch.eye(4, dtype=torch.float64)[[2, 3, 0, 1]]
    for at in ((1, 3), (4, 6)):
        later = score(rotary(pair) @ exchange, rotary(other) @ exchange, at)
        assert abs(later - (math.cos(2.0) - math.sin(0.02))) < 1e-12
        sooner = score(rotary(pair @ exchange), rotary(other @ exchange), at)
        assert abs(sooner - (math.cos(0.02) - math.sin(2.0))) < 1e-12


def test_claim_4_3_summary_gradients():
    """With its own link each gradient is prediction minus target; exchanged, neither is."""
    scores, target = matrix((0.5, -1.0, 0.2)), torch.tensor([2])
    one_hot, p = matrix((0.0, 0.0, 1.0)), f64(*shares([0.5, -1.0, 0.2]))
    assert_close(gradient(lambda z: half_squared_error(z, one_hot), scores), scores - one_hot)
    assert_close(gradient(lambda z: cross_entropy(z, target), scores)[0], p - one_hot[0])
    # exchanged: the squared error behind a softmax, cross-entropy of outputs taken as they are
    behind = gradient(lambda z: half_squared_error(z.softmax(dim=-1), one_hot), scores)[0]
    jacobian = p.diag() - torch.outer(p, p)
    assert_close(behind, jacobian @ (p - one_hot[0]))
    assert (behind - (p - one_hot[0])).abs().max() > 0.1
    outputs = p.unsqueeze(0)
    slope = gradient(lambda q: cross_entropy(q.log(), target), outputs)[0]
    assert_close(slope, 1 - one_hot[0] / p)
    assert (slope - (p - one_hot[0])).abs().max() > 0.1


def test_claim_4_3_summary_geometry():
    """On the simplex the divergence curves like the Fisher metric, 1/p; the squared error is
    equally curved everywhere, which is the metric of a Gaussian's mean, not of probabilities."""
    p, step = f64(0.7, 0.2, 0.1), f64(2e-3, -1e-3, -1e-3)

    def bend(function) -> float:
        """Second difference along the simplex."""
        return (function(p + step) - 2 * function(p) + function(p - step)).item()

    fisher = sum(s * s / q for s, q in zip(step.tolist(), p.tolist(), strict=True))
    flat = 2 * sum(s * s for s in step.tolist())
    divergence = bend(lambda q: kl_divergence(p.log(), q.log()))
    squared = bend(lambda q: brier(q, p))
    assert abs(divergence / fisher - 1) < 1e-3
    assert abs(squared / flat - 1) < 1e-6
    assert abs(flat / fisher - 1) > 0.3
    assert abs(kl_divergence(p.log(), (p + step).log()).item() / (fisher / 2) - 1) < 0.02
    assert abs(brier(p + step, p).item() / (flat / 2) - 1) < 1e-9

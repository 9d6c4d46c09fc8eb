"""What section 1 of the notes says, held to numbers: cross-entropy, InfoNCE, DPO."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from lmlosses.logprobs import token_stats
from lmlosses.losses import (
    causal_lm_loss,
    cross_entropy,
    dpo_loss,
    entropy,
    implicit_reward,
    kl_divergence,
    token_cross_entropy,
)
from lmlosses.metrics import perplexity
from lmlosses.reductions import token_mean


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def surprise(logits: list[float], target: int) -> float:
    """One token's cross-entropy in plain arithmetic."""
    return math.log(sum(math.exp(z - logits[target]) for z in logits))


def slopes(function, point: Tensor, step: float = 1e-5) -> Tensor:
    """The gradient of a scalar function by central differences."""
    found = torch.zeros_like(point)
    for index in range(point.numel()):
        nudge = torch.zeros_like(point).flatten()
        nudge[index] = step
        nudge = nudge.view_as(point)
        found.view(-1)[index] = (function(point + nudge) - function(point - nudge)) / (2 * step)
    return found


def gradient(function, point: Tensor) -> Tensor:
    point = point.detach().requires_grad_()
    return torch.autograd.grad(function(point), point)[0]


def info_nce(similarities: Tensor, temperature: float) -> Tensor:
    """Cross-entropy over the similarities, the positive in column 0."""
    first = torch.zeros(similarities.shape[:-1], dtype=torch.long)
    return cross_entropy(similarities / temperature, first)


def bytes_kept(function, *shapes: tuple[int, ...]) -> int:
    """Bytes that autograd keeps for the way back, counted on tensors without storage."""
    inputs = [torch.empty(shape, device="meta", requires_grad=True) for shape in shapes]
    kept = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        function(*inputs)
    return sum(kept)


def broadcast_similarities(a: Tensor, b: Tensor) -> Tensor:
    """As the notes' code has it: every row against every row, broadcast."""
    return F.cosine_similarity(a.unsqueeze(1), b.unsqueeze(0), dim=-1)


def product_similarities(a: Tensor, b: Tensor) -> Tensor:
    return F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T


def two_logps(theta: Tensor, features: Tensor) -> Tensor:
    """Log-probabilities of answers whose logits are ``features`` times one parameter."""
    return (features * theta).log_softmax(dim=-1)


def test_notes_1_1_cross_entropy():
    """With a start token in front, all T tokens have a prediction and share the mean."""
    tokens, logits = torch.tensor([0, 2, 1, 2]), drawn(4, 3)
    losses, mask = causal_lm_loss(logits, tokens)
    by_hand = [surprise(logits[t].tolist(), tokens[t + 1].item()) for t in range(3)]
    assert_close(token_mean(losses, mask), f64(sum(by_hand) / 3).squeeze())
    assert mask.sum() == 3


def test_notes_1_1_measures_difference():
    """Not 0 for the truth itself: the entropy of the text stays, whatever the model."""
    truth, model = f64(0.5, 0.3, 0.2), f64(0.2, 0.5, 0.3)
    loss = cross_entropy(model.log(), truth)
    difference = (truth * (truth / model).log()).sum()
    noise = -(truth * truth.log()).sum()
    assert_close(loss, difference + noise)
    assert_close(kl_divergence(truth.log(), model.log()), difference)
    assert_close(entropy(truth.log()), noise)
    assert abs(cross_entropy(truth.log(), truth) - 1.0297) < 1e-4  # the best there is
    certain = f64(1.0, 0.0, 0.0)  # inside: nothing uncertain about the truth
    assert_close(cross_entropy(model.log(), certain), f64(-math.log(0.2)).squeeze())


def test_notes_1_1_log_probability():
    """The logit of the token less the logarithm of the sum of all exponentials."""
    logits = drawn(5, 7, seed=1)
    for token in range(7):
        stats = token_stats(logits, torch.full((5,), token))
        for row in range(5):
            normalizer = math.log(sum(math.exp(z) for z in logits[row].tolist()))
            expected = logits[row, token].item() - normalizer
            assert abs(stats.logps[row].item() - expected) < 1e-12
            assert abs(stats.log_normalizer[row].item() - normalizer) < 1e-12


def test_notes_1_1_perplexity():
    """The geometric mean of 1/p over all tokens; of batches' means it is not."""
    p = f64(0.5, 0.25, 0.1, 0.8, 0.05)
    expected = math.prod(1 / value for value in p.tolist()) ** (1 / 5)
    assert abs(perplexity(-p.log()).item() - expected) < 1e-12
    in_two = (perplexity(-p[:3].log()) + perplexity(-p[3:].log())) / 2
    assert abs(in_two.item() - (80 ** (1 / 3) + 25 ** (1 / 2)) / 2) < 1e-12
    assert in_two > expected + 0.07


def test_notes_1_1_code():
    """The mean over positions of ``F.cross_entropy(logits.view(B * T, V), targets.view(B * T))``.

    It is the loss of next tokens if the caller has shifted the targets; and the obvious
    shift by slices makes tensors that have no such view.
    """
    tokens = torch.tensor([[0, 2, 1, 2], [1, 1, 0, 2]])
    logits = drawn(2, 4, 3, seed=2)
    shifted = [
        surprise(logits[n, t].tolist(), tokens[n, t + 1].item())
        for n in range(2)
        for t in range(3)
    ]
    right = token_mean(*causal_lm_loss(logits, tokens))
    assert_close(right, f64(sum(shifted) / 6).squeeze())
    # inside: sliced, then copied to be contiguous
    now, then = logits[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    assert_close(F.cross_entropy(now.view(6, 3), then.view(6)), right)
    # outside: sliced only; not shifted; nothing to count
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        logits[:, :-1].view(6, 3)
    unshifted = F.cross_entropy(logits.view(8, 3), tokens.view(8))
    assert abs(unshifted - right) > 0.1
    copies = 50 * F.one_hot(tokens, 3).double()  # repeats the token that it has just read
    assert F.cross_entropy(copies.view(8, 3), tokens.view(8)) < 1e-12
    assert token_mean(*causal_lm_loss(copies, tokens)) > 30
    nothing = torch.full((8,), -100)
    assert F.cross_entropy(logits.view(8, 3), nothing).isnan()
    assert token_mean(*causal_lm_loss(logits[:, :1], tokens[:, :1])) == 0


def test_notes_1_1_code_padding():
    """Only targets that were set to -100 are left out; a tokenizer's padding id is a class."""
    logits, pad = drawn(4, 3, seed=3), 0
    targets = torch.tensor([2, 1, pad, pad])
    by_hand = [surprise(logits[t].tolist(), targets[t].item()) for t in range(4)]
    stats = token_stats(logits, targets, mask=targets != pad)
    counted = token_mean(token_cross_entropy(stats), targets != pad)
    assert_close(counted, f64((by_hand[0] + by_hand[1]) / 2).squeeze())
    as_printed = F.cross_entropy(logits, targets, ignore_index=-100)
    assert_close(as_printed, f64(sum(by_hand) / 4).squeeze())
    assert abs(as_printed - counted) > 0.05
    marked = targets.masked_fill(targets == pad, -100)
    assert_close(F.cross_entropy(logits, marked, ignore_index=-100), counted)


def test_notes_1_1_overflow_reason():
    """Nothing overflows in softmax and log: a probability is rounded to 0, and its log is -inf."""
    logits, target = torch.tensor([1e4, 0.0]), torch.tensor(1)
    p = logits.softmax(dim=0)
    assert torch.equal(p, torch.tensor([1.0, 0.0]))  # finite: the maximum was taken out
    assert p.log()[1] == -math.inf
    assert_close(cross_entropy(logits, target), torch.tensor(1e4))
    # far below any overflow: 88.7 is where exp overflows in float32
    assert torch.tensor([104.0, 0.0]).softmax(dim=0)[1] == 0
    spoiled = gradient(lambda z: -z.softmax(dim=0).log()[1], torch.tensor([104.0, 0.0]))
    assert spoiled.isnan().all()
    sound = gradient(lambda z: cross_entropy(z, target), torch.tensor([104.0, 0.0]))
    assert_close(sound, torch.tensor([1.0, -1.0]))
    # only exponentials written out by hand overflow
    by_hand = logits.exp() / logits.exp().sum()
    assert by_hand[0].isnan()


def test_notes_1_1_log_softmax_implementation():
    """The same number in exact arithmetic; at large logits the difference of two large numbers."""
    for level, worst in ((0.0, 1e-6), (12345.0, math.inf)):
        logits = torch.tensor([0.0, -0.7, -5.0]) + level
        exact = logits.double().log_softmax(dim=0)
        stats = token_stats(logits.expand(3, 3), torch.arange(3))
        assert (stats.logps.double() - exact).abs().max() < 1e-6
        printed = logits - logits.logsumexp(dim=0)
        assert (printed.double() - exact).abs().max() < worst
    assert (printed.double() - exact).abs().max() > 1e-4
    # and the logarithm of the sum is no protection unless the maximum is taken out of it
    assert logits.exp().sum().log() == math.inf


def test_notes_1_2_formula():
    """The positive is one of the K + 1 terms of the sum."""
    q, keys, tau = drawn(6), drawn(5, 6, seed=4), 0.2
    cosines = [
        (q @ k).item() / math.sqrt((q @ q).item() * (k @ k).item()) for k in keys
    ]  # the positive first
    expected = -math.log(math.exp(cosines[0] / tau) / sum(math.exp(s / tau) for s in cosines))
    loss = info_nce(f64(*cosines), tau)
    assert abs(loss.item() - expected) < 1e-12
    without = -math.log(math.exp(cosines[0] / tau) / sum(math.exp(s / tau) for s in cosines[1:]))
    assert abs(expected - without) > 0.01  # the sum from 1 would be another loss


def test_notes_1_2_classification():
    """log(K + 1) when nothing is known, p minus one-hot for a gradient: a classifier's loss."""
    for negatives in (1, 4, 255):
        loss = info_nce(torch.zeros(negatives + 1, dtype=torch.float64), 0.07)
        assert abs(loss.item() - math.log(negatives + 1)) < 1e-12
    s, tau = drawn(4, seed=5), 0.5
    weights = [math.exp(v / tau) for v in s.tolist()]
    expected = f64(*(w / sum(weights) for w in weights)) - f64(1, 0, 0, 0)
    assert_close(gradient(lambda s: info_nce(s, tau), s), expected / tau)
    assert_close(slopes(lambda s: info_nce(s, tau), s), expected / tau, rtol=1e-6, atol=1e-8)


def test_notes_1_2_code_explicit():
    """Positive in column 0, K negatives beside it, label 0: the formula, averaged."""
    query, positive, negatives = drawn(3, 8), drawn(3, 8, seed=6), drawn(3, 5, 8, seed=7)
    near = F.cosine_similarity(query, positive, dim=-1)
    far = F.cosine_similarity(query.unsqueeze(1), negatives, dim=-1)
    assert near.shape == (3,) and far.shape == (3, 5)
    logits = torch.cat([near.unsqueeze(1), far], dim=1) / 0.07
    printed = F.cross_entropy(logits, torch.zeros(3, dtype=torch.long))
    total = 0.0
    for n in range(3):
        terms = [
            math.exp((query[n] @ k / (query[n].norm() * k.norm())).item() / 0.07)
            for k in (positive[n], *negatives[n])
        ]
        total -= math.log(terms[0] / sum(terms))
    assert abs(printed.item() - total / 3) < 1e-10
    assert_close(info_nce(torch.cat([near.unsqueeze(1), far], dim=1), 0.07).mean(), printed)


def test_notes_1_2_code_in_batch():
    """Row n against column n. Equal items are told apart at any price, and one side is unasked."""
    a, b = drawn(4, 8, seed=8), drawn(4, 8, seed=9)
    labels = torch.arange(4)
    similarities = product_similarities(a, b)
    assert_close(similarities, broadcast_similarities(a, b))
    rows = cross_entropy(similarities / 0.07, labels).mean()
    hand = sum(surprise((similarities[n] / 0.07).tolist(), n) for n in range(4)) / 4
    assert abs(rows.item() - hand) < 1e-10
    # the other direction is another loss
    columns = cross_entropy(similarities.T / 0.07, labels).mean()
    assert abs(columns.item() - rows.item()) > 0.1
    # perfect embeddings: nothing lost; with a pair that stands there twice, log 2 on both
    eye = torch.eye(4, dtype=torch.float64)
    assert cross_entropy(product_similarities(eye, eye) / 0.07, labels).max() < 1e-5
    eye[1] = eye[0]
    twice = cross_entropy(product_similarities(eye, eye) / 0.07, labels)
    assert_close(twice, f64(math.log(2), math.log(2), 0, 0), atol=1e-5, rtol=0)


def test_notes_1_2_in_batch_efficient():
    """2B encodings instead of B(K + 2); but the printed similarities hold B x B x D numbers."""
    batch, dim = 512, 256
    broadcast = bytes_kept(broadcast_similarities, (batch, dim), (batch, dim))
    product = bytes_kept(product_similarities, (batch, dim), (batch, dim))
    cube = 4 * batch * batch * dim
    assert broadcast > 2 * cube and product < cube / 40
    a, b = drawn(16, 4), drawn(16, 4, seed=1)
    lean = cross_entropy(product_similarities(a, b) / 0.07, torch.arange(16)).mean()
    assert_close(lean, F.cross_entropy(broadcast_similarities(a, b) / 0.07, torch.arange(16)))


def test_notes_1_2_small_temperature_sharp():
    """The share of the repulsion that falls on the hardest negative goes from a half to all."""
    similarities = f64(0.9, 0.8, 0.3, -0.2)  # the positive, then hard to easy
    shares = []
    for tau in (1.0, 0.2, 0.05):
        push = gradient(lambda s, tau=tau: info_nce(s, tau), similarities)
        p = [math.exp(s / tau) for s in similarities.tolist()]
        assert_close(push[1:], f64(*p[1:]) / sum(p) / tau)
        assert push[0] < 0
        shares.append((push[1] / push[1:].sum()).item())
    assert 0.5 < shares[0] < 0.51 and 0.91 < shares[1] < 0.92 and shares[2] > 0.9999


def test_notes_1_2_small_temperature_explodes():
    """Bounded by 2/tau in all, whatever the batch, and vanishing where the positive leads."""
    for tau in (1.0, 0.07, 0.01):
        wrong = gradient(lambda s, tau=tau: info_nce(s, tau), f64(-1.0, 1.0, -1.0))
        p = 1 / (1 + math.exp(-2 / tau) * 2)  # the hard negative's probability
        assert_close(wrong[1], f64(p / tau).squeeze())
        for seed in range(20):
            cosines = drawn(8, seed=seed).tanh()
            push = gradient(lambda s, tau=tau: info_nce(s, tau), cosines)
            assert push.abs().sum() <= 2 / tau + 1e-9
    # inside, "may explode": in step with 1/tau for a batch that is wrong
    hard = [
        gradient(lambda s, tau=tau: info_nce(s, tau), f64(0.2, 0.6)).abs().sum().item()
        for tau in (0.1, 0.05, 0.01)
    ]
    expected = [2 / tau / (1 + math.exp(-0.4 / tau)) for tau in (0.1, 0.05, 0.01)]
    assert_close(f64(*hard), f64(*expected))
    # outside: the smaller the temperature the smaller the gradient, for a batch that is right
    easy = [
        gradient(lambda s, tau=tau: info_nce(s, tau), f64(0.6, 0.2)).abs().sum().item()
        for tau in (0.1, 0.05, 0.01)
    ]
    assert easy[0] > easy[1] > 100 * easy[2] and easy[2] < 1e-12


def test_notes_1_2_large_temperature():
    """At tau = 10 all negatives weigh the same to a tenth, and the gradient is short."""
    similarities = f64(0.9, 0.8, 0.3, -0.2)
    push = gradient(lambda s: info_nce(s, 10.0), similarities)
    assert (push[1:].max() / push[1:].min() - math.exp(0.1)).abs() < 1e-9
    assert push.abs().sum() < 2 / 10
    p = [math.exp(s / 10) for s in similarities.tolist()]
    assert_close(push[0], f64((p[0] / sum(p) - 1) / 10).squeeze())
    # one step of the same rate gains little: low efficiency, as the notes fear
    step = similarities - 0.05 * push
    assert 0 < (info_nce(similarities, 10.0) - info_nce(step, 10.0)).item() < 0.001


def test_notes_1_2_temperature_range():
    """What decides is K: the least loss of a perfect model whose negatives are orthogonal."""

    def floor(negatives: int, tau: float) -> float:
        perfect = torch.zeros(negatives + 1, dtype=torch.float64)
        perfect[0] = 1.0
        loss = info_nce(perfect, tau).item()
        assert abs(loss - math.log1p(negatives * math.exp(-1 / tau))) < 1e-9
        return loss

    assert floor(4095, 1.0) > 7.3 and floor(4095, 0.2) > 3.3  # hardly below log 4096 = 8.3
    assert floor(4095, 0.1) < 0.2 and floor(4095, 0.05) < 1e-4  # the range of the notes
    assert floor(32767, 0.1) > 0.9  # CLIP's batch: the upper end is too warm
    assert floor(32767, 0.01) < 1e-9  # where CLIP's ends, below the range
    assert floor(1, 0.5) < 0.13  # few negatives: far above the range will do


def test_notes_1_3_loss():
    """Four probabilities by hand."""
    loss = dpo_loss(
        f64(0.3).log(), f64(0.2).log(), f64(0.1).log(), f64(0.4).log(), beta=0.7
    ).item()
    odds = (0.3 / 0.1) ** 0.7 / (0.2 / 0.4) ** 0.7
    assert abs(loss - math.log(1 + 1 / odds)) < 1e-12


def test_notes_1_3_gradient():
    """Sign, weight and beta are right for each pair; over pairs the mean is of the products."""
    beta, ref = 0.5, f64(0.2, 0.3, 0.5).log()
    pairs = ((0, 1), (2, 0))
    theta, one_hot = drawn(3, seed=10), torch.eye(3, dtype=torch.float64)

    def of_pair(theta: Tensor, won: int, lost: int) -> Tensor:
        logps = theta.log_softmax(dim=-1)
        return dpo_loss(logps[won], logps[lost], ref[won], ref[lost], beta=beta)

    weights, brackets = [], []
    for won, lost in pairs:
        p = theta.softmax(dim=-1)
        rewards = beta * (p.log() - ref)
        by_library = implicit_reward(theta.log_softmax(dim=-1), ref, beta=beta)
        assert_close(by_library, rewards)
        weight = 1 / (1 + math.exp((rewards[won] - rewards[lost]).item()))
        bracket = one_hot[won] - one_hot[lost]
        expected = -beta * weight * bracket  # p cancels between the two log-probabilities
        assert_close(
            gradient(lambda t, won=won, lost=lost: of_pair(t, won, lost), theta), expected
        )
        numeric = slopes(lambda t, won=won, lost=lost: of_pair(t, won, lost), theta)
        assert_close(numeric, expected, rtol=1e-6, atol=1e-8)
        weights.append(weight)
        brackets.append(bracket)
    both = gradient(lambda t: (of_pair(t, *pairs[0]) + of_pair(t, *pairs[1])) / 2, theta)
    products = -beta * (weights[0] * brackets[0] + weights[1] * brackets[1]) / 2
    assert_close(both, products)
    apart = -beta * sum(weights) / 2 * (brackets[0] + brackets[1]) / 2
    assert (both - apart).abs().max() > 0.01  # mean weight times mean bracket


def test_notes_1_3_weight():
    """The loss's slope in the margin over beta: from 1 down to 0, a half at a tie."""
    margins, zero = torch.linspace(-30, 30, 61, dtype=torch.float64), torch.zeros(61).double()
    beta = 0.3
    weight = -gradient(lambda h: dpo_loss(h, zero, zero, zero, beta=beta).sum(), margins) / beta
    expected = f64(*(1 / (1 + math.exp(beta * h)) for h in margins.tolist()))
    assert_close(weight, expected)
    rewards = implicit_reward(margins, zero, beta=beta)
    assert_close(rewards, beta * margins)
    assert (weight.diff() < 0).all() and weight.max() < 1 and abs(weight[30] - 0.5) < 1e-12
    assert torch.equal(weight > 0.5, rewards < -1e-12)


def test_notes_1_3_raises_lowers():
    """True of a table with an entry for each answer; shared parameters can lower both."""
    ref = torch.full((3,), -math.log(3), dtype=torch.float64)

    def moves(features: Tensor, theta: Tensor) -> Tensor:
        def loss(theta: Tensor) -> Tensor:
            logps = (features @ theta).log_softmax(dim=-1)
            return dpo_loss(logps[0], logps[1], ref[0], ref[1], beta=1.0)

        after = theta - 0.1 * gradient(loss, theta)
        return (features @ after).log_softmax(dim=-1) - (features @ theta).log_softmax(dim=-1)

    table = moves(torch.eye(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64))
    moved = f64(0.05, -0.05, 0.0)  # a tenth of a step, with the weight of a tie
    assert_close(table, moved - moved.exp().mean().log())
    assert table[0] > 0 > table[1]
    # one parameter; the third answer has more of what sets the chosen apart from the rejected
    shared = moves(f64(1.0, 0.0, 5.0)[:, None], f64(0.0))
    assert shared[0] < -0.04 and shared[1] < shared[0] and shared[2] > 0.1


def test_notes_1_3_wrong_means_large():
    """Wrong against the reference, not wrong; and a large weight on a bracket may be small."""
    # the policy ranks the pair rightly, 0.6 to 0.4; its reference did so more clearly
    logps, ref = f64(0.6, 0.4).log(), f64(0.9, 0.1).log()
    rewards = implicit_reward(logps, ref, beta=1.0)
    assert_close(rewards, f64(math.log(0.6 / 0.9), math.log(4)))
    assert logps[0] > logps[1] and rewards[0] < rewards[1]
    weight = -gradient(lambda w: dpo_loss(w, logps[1], ref[0], ref[1], beta=1.0), logps[0])
    assert abs(weight.item() - 6 / 7) < 1e-12
    # with one logit for the pair, the gradient grows with the weight (inside) ...
    even = f64(0.5, 0.5).log()

    def size(logit: float, beta: float) -> float:
        def loss(theta: Tensor) -> Tensor:
            logps = two_logps(theta, f64(1.0, 0.0))
            return dpo_loss(logps[0], logps[1], even[0], even[1], beta=beta)

        return gradient(loss, f64(logit).squeeze()).item()

    assert abs(size(-4.0, 1.0) + 1 / (1 + math.exp(-4))) < 1e-12
    assert size(-4.0, 1.0) < size(0.0, 1.0) < size(4.0, 1.0) < 0
    # ... but the weight never doubles that of a tie, and at beta = 0.1 it hardly moves
    assert size(-40.0, 1.0) / size(0.0, 1.0) < 2 + 1e-9
    assert size(-4.0, 0.1) / size(0.0, 0.1) < 1.2

    # a policy whose parameter is saturated: the weight is large, the gradient nearly nothing
    def through(u: Tensor) -> Tensor:
        logps = two_logps(10 * torch.tanh(u), f64(1.0, 0.0))
        return dpo_loss(logps[0], logps[1], even[0], even[1], beta=1.0)

    tie, stuck = gradient(through, f64(0.0).squeeze()), gradient(through, f64(-8.0).squeeze())
    assert abs(tie.item() + 5) < 1e-9 and abs(stuck.item()) < 1e-4

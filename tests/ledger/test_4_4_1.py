"""What subsection 4.4.1 says, held to numbers: InfoNCE as a classification of candidates."""

import itertools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from lmlosses.lab.alignment import minimize
from lmlosses.losses import binary_cross_entropy, info_nce, triplet_loss

# two queries, three keys; the last key is popular
JOINT = torch.tensor([[0.24, 0.04, 0.22], [0.02, 0.18, 0.30]], dtype=torch.float64)
MARGINAL = JOINT.sum(dim=0)
GIVEN = JOINT / JOINT.sum(dim=1, keepdim=True)
UNIFORM = torch.full((3,), 1 / 3, dtype=torch.float64)


class Sets(NamedTuple):
    """Every query, positive and row of negatives that can be drawn, with its probability."""

    queries: Tensor
    positives: Tensor
    negatives: Tensor
    weights: Tensor


def all_sets(count: int, drawn_from: Tensor) -> Sets:
    rows = torch.tensor(list(itertools.product(range(2), range(3), *[range(3)] * count)))
    q, k, others = rows[:, 0], rows[:, 1], rows[:, 2:]
    return Sets(q, k, others, JOINT[q, k] * drawn_from[others].prod(dim=1))


def table_losses(table: Tensor, sets: Sets, mask: Tensor | None = None) -> Tensor:
    """InfoNCE of a table of scores: rows are queries, one-hot vectors are keys."""
    one_hot = torch.eye(3, dtype=torch.float64)
    return info_nce(
        table[sets.queries], one_hot[sets.positives], one_hot[sets.negatives],
        temperature=1.0, mask=mask, similarity="dot",
    )  # fmt: skip


def binary_losses(logits: Tensor, sets: Sets) -> Tensor:
    """Each candidate on its own: was it drawn with the query, or as a negative?"""
    q, k, others, _ = sets
    yes = binary_cross_entropy(logits[q, k], torch.ones(len(q), dtype=torch.float64))
    no = logits[q.unsqueeze(1), others]
    return yes + binary_cross_entropy(no, torch.zeros_like(no)).sum(dim=1)


def least(loss) -> tuple[Tensor, float]:
    best = minimize(loss, torch.zeros(2, 3, dtype=torch.float64), steps=60)
    return best, loss(best).item()


def centered(table: Tensor) -> Tensor:
    """What does not depend on a number added to all scores of a query."""
    return table - table.mean(dim=-1, keepdim=True)


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def on_circle(*degrees: float) -> Tensor:
    angles = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


def gradients(loss: Tensor, *inputs: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, inputs))


def test_eq_4_4_1():
    """A slow loop over cosines; and log(K + 1) where all candidates look alike."""
    queries, positives, shared = draw(4, 5), draw(4, 5, seed=1), draw(6, 5, seed=2)
    by_hand = []
    for q, positive in zip(queries.tolist(), positives.tolist(), strict=True):
        terms = []
        for k in (positive, *shared.tolist()):
            lengths = math.hypot(*q) * math.hypot(*k)
            cosine = sum(a * b for a, b in zip(q, k, strict=True)) / lengths
            terms.append(math.exp(cosine / 0.3))
        by_hand.append(-math.log(terms[0] / sum(terms)))
    expected = torch.tensor(by_hand, dtype=torch.float64)
    assert_close(info_nce(queries, positives, shared, temperature=0.3), expected)
    own = shared.expand(4, 6, 5)
    assert_close(info_nce(queries, positives, own, temperature=0.3), expected)
    alike = info_nce(queries, positives, positives.unsqueeze(1).expand(4, 6, 5))
    assert_close(alike, torch.full((4,), math.log(7), dtype=torch.float64))


def test_eq_4_4_2():
    """Scores as a vector against one-hot keys: differences, and softmax less one-hot over tau."""
    scores, keys, tau = draw(5).requires_grad_(), torch.eye(5, dtype=torch.float64), 0.4

    def loss(s: Tensor) -> Tensor:
        return info_nce(s, keys[0], keys[1:], temperature=tau, similarity="dot")

    (slope,) = gradients(loss(scores), scores)
    weights = [math.exp(s / tau) for s in scores.tolist()]
    p = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    assert_close(slope, (p - keys[0]) / tau)
    for j in range(5):
        ahead, behind = (loss(scores.detach() + step * keys[j]) for step in (1e-6, -1e-6))
        assert abs((ahead - behind).item() / 2e-6 - slope[j].item()) < 1e-8
    assert abs(slope.sum()) < 1e-12  # what the positive gains the negatives lose


def test_eq_4_4_3():
    """Inner products: the query against the mean of candidates, each key along the query."""
    query, positive = draw(4).requires_grad_(), draw(4, seed=1).requires_grad_()
    negatives, tau = draw(3, 4, seed=2).requires_grad_(), 0.7
    loss = info_nce(query, positive, negatives, temperature=tau, similarity="dot")
    by_query, by_positive, by_negatives = gradients(loss, query, positive, negatives)
    with torch.no_grad():
        keys = torch.cat([positive.unsqueeze(0), negatives])
        p = ((keys * query).sum(dim=-1) / tau).exp()
        p = p / p.sum()
        assert_close(by_query, ((p.unsqueeze(1) * keys).sum(dim=0) - positive) / tau)
        others = (p[1:].unsqueeze(1) * negatives).sum(dim=0) / p[1:].sum()
        assert_close(by_query, -(1 - p[0]) / tau * (positive - others))  # the second form
        assert_close(by_positive, -(1 - p[0]) / tau * query)
        assert_close(by_negatives, p[1:].unsqueeze(1) / tau * query)


def test_eq_4_4_4():
    """Cosines: at right angles to the vector, and half as large for one twice as long."""
    positive, negatives, tau = draw(4, seed=1), draw(3, 4, seed=2), 0.5
    keys = F.normalize(torch.cat([positive.unsqueeze(0), negatives]), dim=-1)
    found = []
    for length in (1.0, 2.0):
        vector = (length * F.normalize(draw(4), dim=-1)).requires_grad_()
        loss = info_nce(vector, positive, negatives, temperature=tau)
        found.append(gradients(loss, vector)[0])
        unit = vector.detach() / length
        p = (keys @ unit / tau).softmax(dim=0)
        pull = (p @ keys - keys[0]) / tau
        assert_close(found[-1], (pull - unit * (unit @ pull)) / length)
        assert abs(unit @ found[-1]) < 1e-12
    assert_close(found[0], 2 * found[1])


def test_eq_4_4_5():
    """The loss at the log-ratio is Bayes' own uncertainty, and a fit of free scores ends there;
    for one negative and for two, from the marginal and from elsewhere."""
    for count, drawn_from in ((1, MARGINAL), (2, MARGINAL), (2, UNIFORM)):
        sets = all_sets(count, drawn_from)
        ratio = (GIVEN / drawn_from).log()
        bayes = 0.0
        for q, k, others, weight in zip(*(part.tolist() for part in sets), strict=True):
            candidates = (k, *others)
            odds = [GIVEN[q, c].item() / drawn_from[c].item() for c in candidates]
            bayes -= weight * math.log(odds[0] / sum(odds))
        best, value = least(lambda s, sets=sets: (sets.weights * table_losses(s, sets)).sum())
        assert abs((sets.weights * table_losses(ratio, sets)).sum().item() - bayes) < 1e-12
        assert abs(value - bayes) < 1e-9
        assert_close(centered(best), centered(ratio), rtol=0, atol=1e-4)


def test_eq_4_4_6():
    """Yes-or-no questions pin the scores down: PMI less log K, or the log-probability itself."""
    sets, count = all_sets(2, MARGINAL), 2
    offset = (count * MARGINAL).log()
    sampling, value = least(lambda s: (sets.weights * binary_losses(s, sets)).sum())
    assert_close(sampling, (GIVEN / MARGINAL).log() - math.log(2), rtol=0, atol=1e-4)
    estimation, same = least(lambda s: (sets.weights * binary_losses(s - offset, sets)).sum())
    assert_close(estimation, GIVEN.log(), rtol=0, atol=1e-4)  # normalized, though none asked
    by_hand = 0.0
    for q, k in itertools.product(range(2), range(3)):
        is_pair, is_noise = JOINT[q, k].item(), 2 * JOINT[q].sum().item() * MARGINAL[k].item()
        share = is_pair / (is_pair + is_noise)
        by_hand -= is_pair * math.log(share) + is_noise * math.log(1 - share)
    assert abs(value - by_hand) < 1e-9 and abs(same - by_hand) < 1e-9


def test_claim_4_4_density_ratio():
    """Inside: differences of one query's scores. Outside: between queries, and cosines, which
    lack the room."""
    sets = all_sets(1, MARGINAL)
    ratio = (GIVEN / MARGINAL).log()
    best, _ = least(lambda s: (sets.weights * table_losses(s, sets)).sum())
    assert_close(best[:, 0] - best[:, 1], ratio[:, 0] - ratio[:, 1], rtol=0, atol=1e-4)
    shifted = best + torch.tensor([[5.0], [-3.0]], dtype=torch.float64)
    losses = table_losses(best, sets)
    assert_close(table_losses(shifted, sets), losses)  # so nothing can tell them apart
    pairs = (best[sets.queries, sets.negatives[:, 0]] - best[sets.queries, sets.positives]).exp()
    assert_close(losses, torch.log1p(pairs))
    between = (shifted[0] - shifted[1]) - (ratio[0] - ratio[1])  # of two queries
    assert between.min() > 5
    # a ratio of e^4 between two keys, and cosines over a temperature of 1, at most 2 apart
    furthest = info_nce(on_circle(0), on_circle(0), on_circle(180).unsqueeze(1), temperature=1.0)
    assert abs(furthest.item() - math.log1p(math.exp(-2))) < 1e-12
    assert furthest.item() > math.log1p(math.exp(-4)) + 0.1


def test_claim_4_4_range():
    """Printed: between 0 and log(K + 1). Cosines reach neither 0 nor stop at log(K + 1)."""
    count, tau = 10, 0.5
    ends = []
    for positive, other in ((0.0, 180.0), (180.0, 0.0)):
        negatives = on_circle(*[other] * count)
        ends.append(
            info_nce(on_circle(0)[0], on_circle(positive)[0], negatives, temperature=tau).item()
        )
    assert abs(ends[0] - math.log1p(count * math.exp(-2 / tau))) < 1e-12
    assert abs(ends[1] - math.log1p(count * math.exp(2 / tau))) < 1e-12
    assert ends[0] > 0.1 and ends[1] > math.log(count + 1) + 3
    for seed in range(20):
        loss = info_nce(draw(2, seed=seed), draw(2, seed=seed + 50), on_circle(*range(10)),
                        temperature=tau)  # fmt: skip
        assert ends[0] - 1e-12 <= loss.item() <= ends[1] + 1e-12


def test_claim_4_4_marginal_negatives():
    """Inside: PMI wants the marginal. Outside: uniform negatives give the log-probability, with
    another favorite; and a correction of the scores turns either into the other."""
    by_marginal, by_uniform = all_sets(2, MARGINAL), all_sets(2, UNIFORM)
    pmi, _ = least(lambda s: (by_marginal.weights * table_losses(s, by_marginal)).sum())
    logp, value = least(lambda s: (by_uniform.weights * table_losses(s, by_uniform)).sum())
    assert_close(centered(pmi), centered((GIVEN / MARGINAL).log()), rtol=0, atol=1e-4)
    assert_close(centered(logp), centered(GIVEN.log()), rtol=0, atol=1e-4)
    assert pmi[1].argmax() == 1 and logp[1].argmax() == 2  # for the second query
    corrected, _ = least(
        lambda s: (by_marginal.weights * table_losses(s - MARGINAL.log(), by_marginal)).sum()
    )
    assert_close(centered(corrected), centered(GIVEN.log()), rtol=0, atol=1e-4)
    q, k, others, weights = by_uniform
    odds = GIVEN[q, k] / (GIVEN[q, k] + GIVEN[q.unsqueeze(1), others].sum(dim=1))
    assert abs(value + (weights * odds.log()).sum().item()) < 1e-9


def test_claim_4_4_pull_push():
    """Inside: inner products with unit keys, and the positive. Outside: a negative behind the
    positive comes nearer; and on the sphere the query can be driven away from its positive."""

    def cosines(at: Tensor, *others: Tensor) -> list[float]:
        return [(F.normalize(at, dim=-1) @ other).item() for other in others]

    def step(query: Tensor, positive: Tensor, negatives: Tensor, similarity: str) -> Tensor:
        start = query.clone().requires_grad_()
        loss = info_nce(start, positive, negatives, temperature=0.5, similarity=similarity)
        scores = torch.cat([positive.unsqueeze(0), negatives]) @ query / 0.5
        assert abs(loss.item() - (scores.logsumexp(dim=0) - scores[0]).item()) < 1e-9
        return query - 1e-3 * gradients(loss, start)[0]

    query, positive, beyond, hard = on_circle(0, 40, 70, -20)
    for similarity in ("cosine", "dot"):
        after = step(query, positive, torch.stack([beyond, hard]), similarity)
        assert cosines(after, positive)[0] > cosines(query, positive)[0]
        assert cosines(after, hard)[0] < cosines(query, hard)[0]
        assert cosines(after, beyond)[0] > cosines(query, beyond)[0] + 1e-4  # a negative
    positive, between = on_circle(143, 80)
    fled = step(query, positive, between.unsqueeze(0), "cosine")
    assert cosines(fled, positive)[0] < cosines(query, positive)[0] - 1e-4  # the positive
    straight = step(query, positive, between.unsqueeze(0), "dot")
    assert (straight - query) @ positive > 0


def test_claim_4_4_easy_negatives():
    """Inside: one easy negative weighs next to nothing. Outside: ten thousand of them outweigh a
    hard one."""
    tau, s_positive, s_hard, s_easy = 0.1, 0.8, 0.7, 0.0

    def pushes(easy: int) -> Tensor:
        keys = torch.eye(easy + 2, dtype=torch.float64)
        values = [s_positive, s_hard, *[s_easy] * easy]
        scores = torch.tensor(values, dtype=torch.float64).requires_grad_()
        loss = info_nce(scores, keys[0], keys[1:], temperature=tau, similarity="dot")
        total = sum(math.exp(s / tau) for s in values)
        assert abs(loss.item() - math.log(total) + s_positive / tau) < 1e-9
        return gradients(loss, scores)[0][1:] * tau

    few, many = pushes(1), pushes(1200)
    bound = math.exp((s_easy - s_positive) / tau)
    assert few[1] < bound < 4e-4 and few[0] > 500 * few[1]
    crowd = 1200 * math.exp(s_easy / tau) / math.exp(s_hard / tau)
    assert crowd > 1.05
    assert_close(many[1:].sum() / many[0], torch.tensor(crowd, dtype=torch.float64))


def test_claim_4_4_infonce_is_nce():
    """Printed: another name for NCE. The losses differ, and so does what they can know: one is
    blind to a number added to all scores of a query, the other is not."""
    sets = all_sets(2, MARGINAL)
    offset = (2 * MARGINAL).log()
    exact = GIVEN.log()
    shifted = exact + torch.tensor([[1.0], [-2.0]], dtype=torch.float64)
    mean = []
    for table in (exact, shifted):
        by_name = table_losses(table - MARGINAL.log(), sets)
        by_nce = binary_losses(table - offset, sets)
        mean.append([(sets.weights * loss).sum().item() for loss in (by_name, by_nce)])
    assert abs(mean[0][0] - mean[1][0]) < 1e-12 and mean[1][1] > mean[0][1] + 0.1
    q, k, others, weights = sets
    odds = (GIVEN / MARGINAL)[q.unsqueeze(1), torch.cat([k.unsqueeze(1), others], dim=1)]
    softmax = -(odds[:, 0] / odds.sum(dim=1)).log()
    sigmoid = -(odds[:, 0] / (odds[:, 0] + 2)).log() - (2 / (odds[:, 1:] + 2)).log().sum(dim=1)
    assert abs(mean[0][0] - (weights * softmax).sum()) < 1e-12
    assert abs(mean[0][1] - (weights * sigmoid).sum()) < 1e-12
    assert mean[0][1] > mean[0][0] + 0.5


def test_claim_4_4_triplet():
    """Printed: with one negative it is the triplet loss with margin 2 tau. At a tie one is
    log 2, the other would be 1. In the limit of small temperatures the margin is 0."""
    query = on_circle(0)[0]
    for tau in (0.5, 0.05):
        tie = on_circle(30, -30)
        nce = info_nce(query, tie[0], tie[1:], temperature=tau)
        hinge = triplet_loss(query, tie[0], tie[1], margin=2 * tau, distance="squared") / (2 * tau)
        assert abs(nce.item() - math.log(2)) < 1e-12 and abs(hinge.item() - 1) < 1e-12
    for angle in (10.0, 25.0, 35.0, 90.0):
        pair = on_circle(30, angle)
        gap = 2 * (math.cos(math.radians(angle)) - math.cos(math.radians(30)))
        plain = triplet_loss(query, pair[0], pair[1], margin=0.0, distance="squared").item()
        assert abs(plain - max(0.0, gap)) < 1e-12
        for tau in (0.5, 0.05, 0.005):
            scaled = 2 * tau * info_nce(query, pair[0], pair[1:], temperature=tau).item()
            assert abs(scaled - 2 * tau * math.log1p(math.exp(gap / (2 * tau)))) < 1e-9
            assert -1e-12 < scaled - plain < 2 * tau * math.log(2)
    # a lead of more than the margin: the hinge lets go, InfoNCE does not
    lead = on_circle(0, 120)
    assert triplet_loss(query, lead[0], lead[1], margin=1.0, distance="squared") == 0
    assert info_nce(query, lead[0], lead[1:], temperature=0.5).item() > 0.04


def test_claim_4_4_false_negatives():
    """Inside: one negative, copies left out, and the best scores stay. Outside: with three, they
    move to the popular key; and so they do with one negative drawn again."""
    ratio = (GIVEN / MARGINAL).log()
    popular = {}
    for count in (1, 3):
        sets = all_sets(count, MARGINAL)
        mask = sets.negatives != sets.positives.unsqueeze(1)
        with_copies, _ = least(lambda s, sets=sets: (sets.weights * table_losses(s, sets)).sum())
        without, value = least(
            lambda s, sets=sets, mask=mask: (sets.weights * table_losses(s, sets, mask)).sum()
        )
        assert_close(centered(with_copies), centered(ratio), rtol=0, atol=1e-4)
        popular[count] = (centered(without) - centered(ratio))[:, 2]
        if count == 1:  # by hand: pairs of different keys, and nothing for equal ones
            q, k, other = sets.queries, sets.positives, sets.negatives[:, 0]
            odds = (ratio[q, other] - ratio[q, k]).exp()
            by_hand = (sets.weights * torch.log1p(odds) * (k != other)).sum()
            assert abs(value - by_hand.item()) < 1e-9
    assert popular[1].abs().max() < 1e-4 and popular[3].min() > 0.1
    sets = all_sets(1, MARGINAL)
    again = sets.weights * (sets.negatives != sets.positives.unsqueeze(1))[:, 0]
    again = again / (1 - MARGINAL[sets.positives])
    moved, _ = least(lambda s: (again * table_losses(s, sets)).sum())
    assert_close(centered(moved), centered(ratio - (1 - MARGINAL).log()), rtol=0, atol=1e-4)

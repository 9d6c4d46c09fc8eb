"""What page 4.4.2 says, held to numbers: InfoNCE and mutual information."""

import itertools
import math

import torch
from torch import Tensor

from lmlosses.losses import (
    in_batch_info_nce,
    info_nce,
    kl_divergence,
    mutual_information_bound,
)

# how often query (row) and key (column) occur together
JOINT = [[0.20, 0.05, 0.05, 0.02], [0.03, 0.25, 0.02, 0.05], [0.02, 0.05, 0.01, 0.25]]
HALVES = [[0.4, 0.1], [0.1, 0.4]]


def table(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def random_scores(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def copy_of(symbols: int) -> Tensor:
    """The key is the query, one of so many alike."""
    return torch.eye(symbols, dtype=torch.float64) / symbols


def best_scores(joint: Tensor) -> Tensor:
    """Log-ratios of joint and product; an excluded pair scores as good as never."""
    product = joint.sum(dim=1, keepdim=True) * joint.sum(dim=0)
    return (joint / product).log().clamp(min=-80.0)


def information(joint: Tensor) -> float:
    """By hand: the sum over all pairs, in plain numbers."""
    rows, cols = joint.sum(dim=1).tolist(), joint.sum(dim=0).tolist()
    return sum(
        p * math.log(p / (rows[i] * cols[j]))
        for i, row in enumerate(joint.tolist())
        for j, p in enumerate(row)
        if p > 0
    )


def sets(joint: Tensor, candidates: int, negatives: Tensor | None = None):
    """All queries with all lists of candidates, the positive first, and how often each occurs.

    Negatives come from the keys' own distribution, or from that in the query's row.
    """
    if negatives is None:
        negatives = joint.sum(dim=0).expand_as(joint)
    ranges = [torch.arange(size) for size in (len(joint), *[joint.shape[1]] * candidates)]
    query, *keys = torch.cartesian_prod(*ranges).unbind(dim=1)
    weight = joint[query, keys[0]]
    for key in keys[1:]:
        weight = weight * negatives[query, key]
    return query, torch.stack(keys, dim=1), weight


def losses_of(scores: Tensor, query: Tensor, keys: Tensor) -> Tensor:
    """A score is the inner product of its row with a key that is one-hot."""
    one_hot = torch.eye(scores.shape[1], dtype=scores.dtype)[keys]
    return info_nce(
        scores[query], one_hot[:, 0], one_hot[:, 1:], temperature=1.0, similarity="dot"
    )


def bound(
    scores: Tensor, joint: Tensor, candidates: int, negatives: Tensor | None = None
) -> Tensor:
    """The expectation, over everything that can be drawn."""
    query, keys, weight = sets(joint, candidates, negatives)
    losses = losses_of(scores, query, keys)
    return (weight * mutual_information_bound(losses, candidates=candidates)).sum()


def bound_by_hand(scores: Tensor, joint: Tensor, candidates: int) -> float:
    """The same expectation in plain loops, from the exponentials."""
    s, p, marginal = scores.tolist(), joint.tolist(), joint.sum(dim=0).tolist()
    total = 0.0
    for i in range(len(p)):
        for keys in itertools.product(range(len(marginal)), repeat=candidates):
            weight = p[i][keys[0]] * math.prod(marginal[j] for j in keys[1:])
            mean = sum(math.exp(s[i][j]) for j in keys) / candidates
            total += weight * math.log(math.exp(s[i][keys[0]]) / mean)
    return total


def places(joint: Tensor, scores: Tensor, candidates: int) -> tuple[float, float]:
    """With the positive at any place alike: the information of query and list, and how far the
    softmax is, on average, from the probabilities of the places, in plain loops."""
    rows, marginal = joint.sum(dim=1).tolist(), joint.sum(dim=0).tolist()
    s, p = scores.tolist(), joint.tolist()
    of_list = apart = 0.0
    for i in range(len(p)):
        for keys in itertools.product(range(len(marginal)), repeat=candidates):
            drawn = math.prod(marginal[j] for j in keys)
            each = [drawn / marginal[j] * p[i][j] / candidates for j in keys]  # with the place
            both = sum(each)
            of_list += both * math.log(both / (rows[i] * drawn))
            normalizer = sum(math.exp(s[i][j]) for j in keys)
            for j, share in zip(keys, each, strict=True):
                apart += share * math.log(share / both / (math.exp(s[i][j]) / normalizer))
    return of_list, apart


def copy_bound(symbols: float, candidates: int) -> float:
    """By hand for a copy: how many of the negatives happen to equal the positive."""
    p, others = 1 / symbols, candidates - 1
    return math.log(candidates) - sum(
        math.comb(others, b) * p**b * (1 - p) ** (others - b) * math.log(1 + b)
        for b in range(others + 1)
    )


def test_eq_4_4_7():
    """A divergence: against entropies, the other way round, and the closed form of a Gaussian."""
    joint = table(JOINT)
    product = joint.sum(dim=1, keepdim=True) * joint.sum(dim=0)
    found = kl_divergence(joint.log().flatten(), product.log().flatten()).item()
    assert abs(found - information(joint)) < 1e-12
    entropies = [
        -sum(p * math.log(p) for p in each.flatten().tolist())
        for each in (joint.sum(dim=0), joint.sum(dim=1), joint)
    ]
    assert abs(found - (entropies[0] + entropies[1] - entropies[2])) < 1e-12

    x = torch.linspace(-7, 7, 141, dtype=torch.float64)
    normal = (-x.square() / 2).softmax(dim=0)
    rho = 0.8
    pair = -(x[:, None] ** 2 - 2 * rho * x[:, None] * x + x**2) / (2 * (1 - rho**2))
    pair_logps = pair.flatten().log_softmax(dim=0)
    product_logps = (normal[:, None] * normal).flatten().log()
    on_a_grid = kl_divergence(pair_logps, product_logps).item()
    assert abs(on_a_grid - -0.5 * math.log(1 - rho**2)) < 1e-6


def test_eq_4_4_8():
    """In expectation below the information, for any scores; equal to slow loops."""
    joint = table(JOINT)
    truth = information(joint)
    for candidates, seed in ((1, 0), (2, 1), (3, 2), (5, 3)):
        for size in (0.3, 1.0, 5.0):
            scores = size * random_scores(3, 4, seed=seed)
            found = bound(scores, joint, candidates).item()
            assert found < truth
            if candidates <= 3:
                assert abs(found - bound_by_hand(scores, joint, candidates)) < 1e-12
    assert 0.29 < bound(best_scores(joint), joint, 5) < truth < 0.5


def test_eq_4_4_9():
    """Bound, what the list tells, and what the scores miss add up to the information."""
    joint = table(JOINT)
    for candidates in (2, 4):
        for scores in (random_scores(3, 4), 2 * best_scores(joint), best_scores(joint)):
            of_list, apart = places(joint, scores, candidates)
            found = bound(scores, joint, candidates).item()
            assert abs(found - (information(joint) - of_list - apart)) < 1e-10
            assert of_list > 0.01 and apart > -1e-12
        assert apart < 1e-12  # the last scores were the best


def test_eq_4_4_10():
    """No other scores reach as far; a number per query is free, one per key is not."""
    joint = table(JOINT)
    best = best_scores(joint)
    of_list, _ = places(joint, best, 3)
    highest = information(joint) - of_list
    assert abs(bound(best, joint, 3).item() - highest) < 1e-10
    assert abs(bound(best + random_scores(3, 1), joint, 3).item() - highest) < 1e-10
    assert bound(best + random_scores(1, 4), joint, 3) < highest - 0.05
    for seed in range(4):
        assert bound(best + 0.2 * random_scores(3, 4, seed=seed), joint, 3) < highest - 1e-4
    scores = best.clone().requires_grad_()
    (slope,) = torch.autograd.grad(bound(scores, joint, 3), scores)
    assert slope.abs().max() < 1e-12


def test_eq_4_4_11():
    """Never above log N, draw by draw, N with the positive; with little to confuse, almost it."""
    query, keys, _ = sets(table(JOINT), 4)
    for size in (1.0, 30.0):
        losses = losses_of(size * random_scores(3, 4), query, keys)
        found = mutual_information_bound(losses, candidates=4)
        assert found.max() <= math.log(4) + 1e-12
    assert found.max() > math.log(4) - 1e-6 and found.max() > math.log(3) + 0.2

    for symbols, candidates in ((4, 2), (5, 4), (8, 3)):
        joint = copy_of(symbols)
        expected = copy_bound(symbols, candidates)
        assert abs(bound(best_scores(joint), joint, candidates).item() - expected) < 1e-9
        assert expected < math.log(min(symbols, candidates))
    # a thousand symbols, 6.9 nats: 64 candidates show 4.1 of them
    assert math.log(64) - 0.05 < copy_bound(1000, 64) < math.log(64)
    # exp(I) / 2 candidates miss one nat, exp(I) about 0.57, and 5 exp(I) a tenth
    for candidates, missing in ((50, 1.0), (100, 0.57), (500, 0.1)):
        assert abs(math.log(100) - copy_bound(100, candidates) - missing) < 0.01


def test_eq_4_4_12():
    """Negatives from elsewhere: the limit is another divergence, above or below."""
    joint = table(JOINT)
    given = joint / joint.sum(dim=1, keepdim=True)
    elsewhere = table([[0.1, 0.2, 0.6, 0.1]]).expand(3, 4)  # the same for all queries
    harder = (given + joint.sum(dim=0)) / 2  # like the positives of this query
    for negatives, above in ((elsewhere, True), (harder, False)):
        weight = joint.sum(dim=1).tolist()
        limit = sum(
            w * sum(p * math.log(p / n) for p, n in zip(ps, ns, strict=True))
            for w, ps, ns in zip(weight, given.tolist(), negatives.tolist(), strict=True)
        )
        assert (limit > information(joint)) == above
        best = (given / negatives).log()
        found = [bound(best, joint, n, negatives).item() for n in (2, 4, 6)]
        assert found[0] < found[1] < found[2] < limit
        for seed in range(3):
            assert bound(best + random_scores(3, 4, seed=seed), joint, 4, negatives) < found[1]
    marginal = joint.sum(dim=0)
    shift = (marginal * (marginal / elsewhere[0]).log()).sum().item()
    best = (given / elsewhere).log()
    assert bound(best, joint, 6, elsewhere) > information(joint) + 0.1
    apart = (joint * best).sum().item()
    assert abs(apart - information(joint) - shift) < 1e-12
    # two candidates by hand
    by_hand = 0.0
    for i, j, k in itertools.product(range(3), range(4), range(4)):
        ratio = math.exp(best[i, k].item() - best[i, j].item())
        by_hand += (joint[i, j] * elsewhere[i, k]).item() * math.log(2 / (1 + ratio))
    assert abs(bound(best, joint, 2, elsewhere).item() - by_hand) < 1e-12


def test_claim_4_4_oord_derivation():
    """The mean in place of the sum makes the loss larger, so that a bound on the one is none on
    the other; and the last step fails where a key is rarer than usual. The end holds."""
    joint = table(JOINT)
    best, truth = best_scores(joint), information(joint)
    for candidates in (2, 3, 5):
        query, keys, weight = sets(joint, candidates)
        losses = losses_of(best, query, keys)
        replaced = torch.log1p((candidates - 1) * torch.exp(-best[query, keys[:, 0]]))
        last = math.log(candidates) - best[query, keys[:, 0]]
        exact, mean, end = ((weight * each).sum().item() for each in (losses, replaced, last))
        assert exact < mean - 0.01  # "approximately", and from above
        assert mean > end and (replaced < last - 0.1).any()  # in the mean, not term by term
        assert abs(end - (math.log(candidates) - truth)) < 1e-12
        assert exact > end  # the statement, by another way
        found = mutual_information_bound(losses, candidates=candidates)
        assert abs((weight * found).sum().item() - (math.log(candidates) - exact)) < 1e-12
        if candidates < 5:
            by_hand = math.log(candidates) - bound_by_hand(best, joint, candidates)
            assert abs(exact - by_hand) < 1e-12


def test_claim_4_4_tighter_with_n():
    """Inside: the best scores. Outside: the same scores over a third of the temperature."""
    joint = table(JOINT)
    best, truth = best_scores(joint), information(joint)
    growing = [bound(best, joint, n).item() for n in range(1, 7)]
    assert all(a < b for a, b in itertools.pairwise(growing)) and growing[-1] < truth
    assert abs(growing[1] - bound_by_hand(best, joint, 2)) < 1e-12
    falling = [bound(3 * best, joint, n).item() for n in range(1, 7)]
    assert all(a > b + 0.01 for a, b in itertools.pairwise(falling))
    assert abs(falling[1] - bound_by_hand(3 * best, joint, 2)) < 1e-12


def test_claim_4_4_maximizes_mutual_information():
    """Two encoders of sixteen queries: the one that keeps less wins with two candidates, and
    loses with many. Renaming the queries keeps all that they tell, and the bound drops."""
    halves = torch.tensor([0] * 8 + [1] * 8)
    rare = torch.tensor([0, 1, 2, 3] + [4] * 12)  # four told apart, the rest as one

    def encoded(code: Tensor) -> Tensor:
        one_hot = torch.eye(int(code.max()) + 1, dtype=torch.float64)[code]
        return one_hot.t() @ copy_of(16) @ one_hot

    kept = [information(encoded(code)) for code in (halves, rare)]
    assert abs(kept[0] - math.log(2)) < 1e-12
    assert abs(kept[1] - (math.log(16) / 4 + 0.75 * math.log(4 / 3))) < 1e-12
    assert kept[1] > kept[0] + 0.2
    few = [bound(best_scores(encoded(code)), encoded(code), 2).item() for code in (halves, rare)]
    # by hand: log 2 where the two candidates differ, else nothing
    assert abs(few[0] - math.log(2) / 2) < 1e-9
    assert abs(few[1] - math.log(2) * (1 - 4 / 256 - 0.5625)) < 1e-9
    assert few[0] > few[1] + 0.05

    # with more candidates: each symbol is a copy's, as often as it occurs
    def by_hand(shares: list[float], candidates: int) -> float:
        return sum(share * copy_bound(1 / share, candidates) for share in shares)

    shares = [[0.5, 0.5], [1 / 16] * 4 + [0.75]]
    for code, each in zip((halves, rare), shares, strict=True):
        found = bound(best_scores(encoded(code)), encoded(code), 5).item()
        assert abs(found - by_hand(each, 5)) < 1e-9
    many = [by_hand(each, 32) for each in shares]
    assert many[1] > many[0] + 0.1
    # one relabeling of the queries, scores held: the information stays, the bound does not
    joint = table(HALVES)
    assert abs(information(joint.flip(0)) - information(joint)) < 1e-12
    assert (
        bound(best_scores(joint), joint.flip(0), 4)
        < -0.2
        < 0.1
        < bound(best_scores(joint), joint, 4)
    )


def test_claim_4_4_better_representation():
    """Two views share a class and which of eight backgrounds: the code of the background
    certifies three times as much, and tells nothing of the class."""
    world = [(label, place) for label in range(2) for place in range(8)]
    views = torch.eye(16, dtype=torch.float64) / 16

    def code(which: int, size: int) -> tuple[float, float]:
        one_hot = torch.eye(size, dtype=torch.float64)[[pair[which] for pair in world]]
        joint = one_hot.t() @ views @ one_hot
        with_label = one_hot.t() @ torch.eye(2, dtype=torch.float64)[[c for c, _ in world]]
        accuracy = with_label.amax(dim=1).sum().item() / 16  # the best guess from the code
        return bound(best_scores(joint), joint, 4).item(), accuracy

    by_class, by_place = code(0, 2), code(1, 8)
    assert abs(by_class[0] - copy_bound(2, 4)) < 1e-9 and by_class[1] == 1.0
    assert abs(by_place[0] - copy_bound(8, 4)) < 1e-9 and by_place[1] == 0.5
    assert by_place[0] > by_class[0] + 0.5


def test_claim_4_4_hard_negatives_bound():
    """Inside: negatives likelier under the query's positives, scored alike. Outside: keys that
    are no negatives, left out. Two that share nothing then seem to share a bit."""
    joint = table(JOINT)
    best, truth = best_scores(joint), information(joint)
    harder = joint.sum(dim=0) * best.exp() ** 0.5
    harder = harder / harder.sum(dim=1, keepdim=True)
    for candidates in (2, 4):
        plain = bound(best, joint, candidates)
        assert bound(best, joint, candidates, harder) < plain < truth

    nothing = torch.full((4, 4), 1 / 16, dtype=torch.float64)
    others = (1 - torch.eye(4, dtype=torch.float64)) / 3  # never the key of the query's name
    scores = 40 * torch.eye(4, dtype=torch.float64)
    assert information(nothing) == 0
    for candidates in (2, 4):
        found = bound(scores, nothing, candidates, others).item()
        # by hand: a quarter of the positives is known at once, the others are guessed
        assert abs(found - math.log(candidates) / 4) < 1e-9
    assert bound(scores, nothing, 4) < -1  # with the keys' own distribution it holds


def test_claim_4_4_variance():
    """A copy of M symbols, 64 samples: the unbiased estimate of Nguyen, Wainwright and Jordan
    has the variance (e^I - 1) / 64; that of InfoNCE stays small, and its bias grows."""
    n = 64
    for symbols in (16, 256, 4096):
        p, truth = 1 / symbols, math.log(symbols)
        hits = torch.arange(n, dtype=torch.float64)
        log_choose = math.lgamma(n) - torch.lgamma(hits + 1) - torch.lgamma(n - hits)
        weight = torch.exp(log_choose + hits * math.log(p) + (n - 1 - hits) * math.log1p(-p))
        # InfoNCE with the best scores: each equal negative is one more to guess among
        same = torch.arange(n - 1) < hits[:, None]
        losses = info_nce(
            torch.full((n, 1), 60.0, dtype=torch.float64),
            torch.ones(n, 1, dtype=torch.float64),
            same.double().unsqueeze(-1), temperature=1.0, similarity="dot",
        )  # fmt: skip
        assert (losses - torch.log1p(hits)).abs().max() < 1e-12
        value = mutual_information_bound(losses, candidates=n)
        mean = (weight * value).sum().item()
        variance = (weight * (value - mean).square()).sum().item()
        assert abs(mean - copy_bound(symbols, n)) < 1e-9
        # NWJ with its best scores: I + 1 less the mean of the ratio over n draws of the product
        ratio = [(symbols, p), (0, 1 - p)]
        average = sum(r * share for r, share in ratio)
        of_nwj = sum((r - average) ** 2 * share for r, share in ratio) / n
        assert abs(average - 1) < 1e-12  # unbiased
        assert abs(of_nwj - (math.exp(truth) - 1) / n) < 1e-9
        if symbols == 4096:
            assert of_nwj > 60 and variance < 0.01 and truth - mean > 4
    # and for a Gaussian pair the exponent is 2 I: the mean square of the ratio, on a grid
    x = torch.linspace(-10, 10, 201, dtype=torch.float64)
    normal, rho = (-x.square() / 2).softmax(dim=0), 0.6
    log_ratio = -0.5 * math.log(1 - rho**2) + (
        2 * rho * x[:, None] * x - rho**2 * (x[:, None] ** 2 + x**2)
    ) / (2 * (1 - rho**2))
    square = (normal[:, None] * normal * (2 * log_ratio).exp()).sum().item()
    assert abs(square - 1 / (1 - rho**2)) < 1e-6


def test_claim_4_4_mine_lower_bound():
    """All batches of two pairs: the plug-in value is above the information on average, with the
    best scores; InfoNCE of the same batches is not. Inside: the expectation inside the log."""
    joint = table(HALVES)
    best, truth = best_scores(joint), information(joint)
    plug_in = in_batch = 0.0
    one_hot = torch.eye(2, dtype=torch.float64)
    for (i, j), (k, m) in itertools.product(itertools.product(range(2), repeat=2), repeat=2):
        weight = (joint[i, j] * joint[k, m]).item()
        pairs = best[i, j].item(), best[k, m].item()
        crossed = best[i, m].item(), best[k, j].item()
        plug_in += weight * (sum(pairs) / 2 - math.log(sum(map(math.exp, crossed)) / 2))
        losses = in_batch_info_nce(
            best[[i, k]], one_hot[[j, m]], temperature=1.0, similarity="dot"
        )
        in_batch += weight * mutual_information_bound(losses, candidates=2).mean().item()
    assert plug_in > truth + 0.03
    assert abs(in_batch - bound_by_hand(best, joint, 2)) < 1e-12 and in_batch < truth
    for seed in range(5):  # the variational statement, with exact expectations
        scores = random_scores(2, 2, seed=seed)
        product = joint.sum(dim=1, keepdim=True) * joint.sum(dim=0)
        value = (joint * scores).sum() - (product * scores.exp()).sum().log()
        assert value <= truth + 1e-12


def test_claim_4_4_formal_limits():
    """Thirty pairs of equal symbols, none twice: so it is in three of five draws from 900
    symbols and almost surely from a billion. No estimate can tell; more than log 900 would be
    wrong too often. InfoNCE says log 30 at most."""
    n = 30

    def all_different(symbols: int) -> float:
        return math.prod(1 - i / symbols for i in range(n))

    assert 0.6 < all_different(n * n) < 0.63 and all_different(10**9) > 0.999
    generator = torch.Generator().manual_seed(0)
    said = {}
    for symbols in (n * n, 10**9):
        drawn = torch.randint(symbols, (40, n), generator=generator)
        values = set()
        for sample in drawn:
            _, names = sample.unique(return_inverse=True)  # what is left without a dictionary
            if int(names.max()) < n - 1:
                continue
            vectors = torch.eye(n, dtype=torch.float64)[names]
            losses = in_batch_info_nce(5 * vectors, vectors, temperature=1.0, similarity="dot")
            value = mutual_information_bound(losses, candidates=n).mean().item()
            values.add(round(value, 9))
        said[symbols] = values
    by_hand = math.log(n) - math.log1p((n - 1) * math.exp(-5))
    assert said[n * n] == said[10**9] == {round(by_hand, 9)}
    assert math.log(n) < math.log(n * n) < math.log(10**9)

"""Page 4.4.3, held to numbers: temperature, hard negatives, collapse."""

import math

import torch
from torch import Tensor
from torch.testing import assert_close

from lmlosses.losses import (
    alignment,
    in_batch_info_nce,
    info_nce,
    nt_xent,
    triplet_loss,
    uniformity,
)
from lmlosses.nn import LearnedTemperature


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def draws(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def at(degrees: Tensor) -> Tensor:
    """Points of the unit circle."""
    angle = degrees * (math.pi / 180)
    return torch.stack([angle.cos(), angle.sin()], dim=-1)


def loss_of(positive: Tensor, others: Tensor, temperature: float | Tensor) -> Tensor:
    """InfoNCE of given scores: a query along the first axis, one query a row."""
    rows = len(positive)
    query = torch.eye(1, 2, dtype=torch.float64).expand(rows, 2)

    def key(scores: Tensor) -> Tensor:
        return torch.stack([scores, torch.zeros_like(scores)], dim=-1)

    return info_nce(query, key(positive), key(others), temperature=temperature, similarity="dot")


def test_eq_4_4_13():
    """The push on a negative: how surprised the query is, times a softmax over negatives alone."""
    for temperature in (0.05, 0.5, 5.0):
        others = f64(0.9, 0.6, 0.1, -0.8).unsqueeze(0)
        slopes = []
        for j in range(4):
            step = torch.zeros(1, 4, dtype=torch.float64)
            step[0, j] = 1e-6
            up, down = (loss_of(f64(0.7), others + e, temperature) for e in (step, -step))
            slopes.append((up - down).item() / 2e-6)
        odds = [math.exp((s - 0.7) / temperature) for s in others[0].tolist()]
        surprised = sum(odds) / (1 + sum(odds))
        expected = [surprised / temperature * odd / sum(odds) for odd in odds]
        assert_close(f64(*slopes), f64(*expected), rtol=1e-5, atol=1e-9)


def test_eq_4_4_14():
    """Times the temperature it tends to a hinge on the hardest negative, from above."""
    positives, others = draws(50), draws(50, 9, seed=1)
    gap = others.max(dim=1).values - positives
    for temperature in (1.0, 0.1, 0.001):
        scaled = temperature * loss_of(positives, others, temperature)
        above = scaled - gap.clamp(min=0)
        assert (above >= -1e-12).all() and (above <= temperature * math.log(10) + 1e-12).all()
    # the hinge is the triplet loss of cosines with margin 0
    a, p, n = (at(180 * draws(40, seed=seed)) for seed in (2, 3, 4))
    hinge = triplet_loss(a, p, n, margin=0.0, distance="cosine")
    by_hand = ((a * n).sum(-1) - (a * p).sum(-1)).clamp(min=0)
    limit = 1e-4 * info_nce(a, p, n.unsqueeze(1), temperature=1e-4)
    assert_close(hinge, by_hand)
    assert hinge.max() > 0.5 and (limit - by_hand).abs().max() < 1e-4


def test_eq_4_4_15():
    """For a hot softmax only the mean of the negatives is left, all weighted alike."""
    positives, others = draws(50), draws(50, 9, seed=1)
    limit = 9 / 10 * (others.mean(dim=1) - positives)
    for temperature in (1e3, 1e5):
        scaled = temperature * (loss_of(positives, others, temperature) - math.log(10))
        assert_close(scaled, limit, rtol=0, atol=10 / temperature)
    assert limit.abs().max() > 1


def test_eq_4_4_16():
    """The slope in the inverse temperature: expected score under the softmax less the positive's;
    and in the parameter of the module, the logarithm of the inverse, that over the temperature."""
    positives, others = f64(0.7, 0.2), f64(0.9, 0.6, -0.8, 0.1, 0.0, -0.5).reshape(2, 3)
    module = LearnedTemperature(0.25).double()
    (slope,) = torch.autograd.grad(
        loss_of(positives, others, module()).sum(), module.log_inverse
    )  # fmt: skip
    expected = []
    for s, rest in zip(positives.tolist(), others.tolist(), strict=True):
        odds = [math.exp(x / 0.25) for x in (s, *rest)]
        mean = sum(o * x for o, x in zip(odds, (s, *rest), strict=True)) / sum(odds)
        expected.append(mean - s)
    assert expected[0] > 0 > expected[1]  # cooling hurts the first, which is misranked
    assert abs(slope.item() - sum(expected) / 0.25) < 1e-6
    step = [loss_of(positives, others, 1 / (4 + e)) for e in (1e-6, -1e-6)]
    assert_close((step[0] - step[1]) / 2e-6, f64(*expected), rtol=1e-5, atol=1e-8)


def test_eq_4_4_17():
    """A gradient of cosines is orthogonal to its vector, so a step can only lengthen it."""
    vectors, others, lr = 3 * draws(6, 4), draws(6, 4, seed=1), 2.0
    values = in_batch_info_nce(vectors, others, temperature=0.2)
    scores = torch.nn.functional.cosine_similarity(vectors[:, None], others[None], dim=2) / 0.2
    assert_close(values, torch.logsumexp(scores, dim=1) - scores.diagonal())
    for _ in range(3):
        point = vectors.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(
            in_batch_info_nce(point, others, temperature=0.2).sum(), point
        )  # fmt: skip
        moved = vectors - lr * gradient
        grown = vectors.square().sum(-1) + lr**2 * gradient.square().sum(-1)
        assert_close(moved.square().sum(-1), grown)
        assert (gradient.norm(dim=1) > 1e-4).all()
        vectors = moved


def test_eq_4_4_18():
    """Uniform and aligned on the circle: the Bessel function, approached as negatives grow; not
    so for negatives that are not drawn from the keys' own distribution."""
    for temperature in (0.2, 1.0):
        # the mean over the circle, by a sum whose error is far below rounding
        circle = torch.cos(torch.arange(720, dtype=torch.float64) * (math.pi / 360))
        limit = -1 / temperature + (circle / temperature).exp().mean().log().item()
        assert (
            abs(limit - math.log(torch.special.i0(f64(1 / temperature)).item()) + 1 / temperature)
            < 1e-9
        )
        errors = []
        for count in (16, 256):
            query = at(360 * torch.rand(400, generator=torch.Generator().manual_seed(1)).double())
            negatives = at(
                360 * torch.rand(400, count, generator=torch.Generator().manual_seed(2)).double()
            )
            values = info_nce(query, query, negatives, temperature=temperature)
            errors.append(values.mean().item() - math.log(count) - limit)
        assert abs(errors[1]) < 0.03 and abs(errors[1]) < abs(errors[0])
    # all at one point, as aligned: the limit is 0, larger
    same = at(f64(*[30.0] * 8))
    values = info_nce(same, same, same, temperature=0.2)
    assert_close(values - math.log(8), torch.full((8,), math.log(9 / 8), dtype=torch.float64))


def test_claim_4_4_temperature_scales():
    """Gradients at two temperatures are not parallel; times the temperature they are only where
    both are hot."""
    positive, others = f64(0.7), f64(0.9, 0.6, 0.1, -0.8).unsqueeze(0)

    def slope(temperature: float) -> Tensor:
        point = others.clone().requires_grad_()
        return torch.autograd.grad(loss_of(positive, point, temperature).sum(), point)[0][0]

    cold, mild, hot, hotter = (slope(t) for t in (0.05, 0.5, 50.0, 100.0))
    assert cold[0] / cold.sum() > 0.99 and mild[0] / mild.sum() < 0.6
    assert_close(hot * 50, torch.full((4,), 0.2, dtype=torch.float64), rtol=0.05, atol=0)
    assert_close(hot * 50, hotter * 100, rtol=0.02, atol=0)
    assert_close(cold[0] / cold[1], f64(math.exp(0.3 / 0.05))[0])


def moved_gap(query: Tensor, positive: Tensor, negatives: Tensor, temperature: float) -> float:
    """By how much one small step on a query raises its lead: nearer to its own class, at 0
    degrees, than to the other one, at 90."""
    point = query.clone().requires_grad_()
    loss = info_nce(point, positive, negatives, temperature=temperature)
    (gradient,) = torch.autograd.grad(loss.sum(), point)
    after = torch.nn.functional.normalize(query - 1e-3 * gradient / gradient.norm(), dim=-1)
    own, other = at(f64(0.0, 90.0))
    return ((after - query) @ (own - other)).item()


def test_claim_4_4_lower_temperature():
    """A false negative near the query takes the whole gradient of a cold softmax."""
    query, positive = at(f64(40.0)), at(f64(45.0))  # of the class at 0, and so is one negative
    negatives = at(torch.cat([f64(30.0), torch.linspace(80, 100, 20, dtype=torch.float64)]))
    assert moved_gap(query, positive, negatives, 1.0) > 1e-4
    assert moved_gap(query, positive, negatives, 0.02) < -1e-4
    value = info_nce(query, positive, negatives[:1], temperature=0.02).item()
    lead = (math.cos(math.radians(5)) - math.cos(math.radians(10))) / 0.02
    assert abs(value - math.log1p(math.exp(-lead))) < 1e-9


def test_claim_4_4_harder_negatives():
    """Inside: the hardest negative is of another class. Outside: it is of the query's own."""
    query, positive = at(f64(40.0)), at(f64(47.0))
    easy = at(f64(130.0))
    for hardest, helps in ((70.0, True), (35.0, False)):
        hard = at(f64(hardest))
        step = moved_gap(query, positive, hard, 0.1)
        assert (step > 1e-4) == helps and (step < -1e-4) != helps
        harder = info_nce(query, positive, hard, temperature=0.1)
        easier = info_nce(query, positive, easy, temperature=0.1)
        lead = math.cos(math.radians(7)) - math.cos(math.radians(hardest - 40))
        assert harder > easier  # it is the harder one either way
        assert abs(harder.item() - math.log1p(math.exp(-lead / 0.1))) < 1e-9


def learn(positives: Tensor, others: Tensor, smallest: float) -> float:
    module = LearnedTemperature(0.5, smallest=smallest).double()
    optimizer = torch.optim.Adam(module.parameters(), lr=0.3)
    for _ in range(40):
        optimizer.zero_grad()
        loss_of(positives, others, module()).mean().backward()
        optimizer.step()
    return module().item()


def test_claim_4_4_learned_temperature():
    """Inside: one query ranks its positive second, and the best temperature is between the
    bounds. Outside: all rank it first, and the bound is where it ends, whichever that is."""
    positives, others = f64(0.9, 0.9, 0.5), f64(0.1, 0.2, 0.3).unsqueeze(1)
    for smallest in (0.1, 0.03):
        assert abs(learn(positives, others, smallest) - smallest) < 1e-6
    misranked = f64(0.1, 0.2, 0.8).unsqueeze(1)
    grid = torch.linspace(0.05, 0.9, 400, dtype=torch.float64)
    leads = (positives - misranked.squeeze(1)).unsqueeze(1)
    best = grid[torch.log1p(torch.exp(-leads / grid)).mean(dim=0).argmin()].item()
    assert 0.1 < best < 0.9
    at_best = torch.log1p(torch.exp(-leads.squeeze(1) / best))
    assert_close(loss_of(positives, misranked, best), at_best)
    for smallest in (0.1, 0.03):
        assert abs(learn(positives, misranked, smallest) - best) < 0.05


def test_claim_4_4_no_collapse():
    """Collapse is no minimum, yet its gradient is exactly zero; the least push gets away."""
    point = at(f64(*[20.0] * 6)).requires_grad_()
    value = nt_xent(point, point, temperature=0.5).mean()
    (gradient,) = torch.autograd.grad(value, point)
    assert_close(value.item(), math.log(11))
    assert gradient.abs().max() < 1e-12
    spread = at(60 * torch.arange(6, dtype=torch.float64))
    assert nt_xent(spread, spread, temperature=0.5).mean() < math.log(11) - 0.5
    # without negatives it is a minimum
    assert alignment(point, point).max() == 0
    assert (alignment(spread, spread.roll(1, 0)) > 0.99).all()
    vectors = at(20 + 1e-3 * draws(6))
    start = vectors
    for _ in range(40):
        other = vectors.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(nt_xent(other, other, temperature=0.5).sum(), other)
        vectors = torch.nn.functional.normalize(vectors - 0.5 * gradient, dim=1)
    assert start.std(dim=0).max() < 0.01 and vectors.std(dim=0).min() > 0.3


def linear_spectrum(noise: float) -> Tensor:
    """Singular values of a linear encoder of six features, three of which its views distort."""
    generator = torch.Generator().manual_seed(0)
    weights = 0.3 * torch.randn(6, 6, generator=generator, dtype=torch.float64)
    scale = f64(0.05, 0.05, 0.05, noise, noise, noise)
    for _ in range(60):
        inputs = torch.randn(64, 6, generator=generator, dtype=torch.float64)
        views = [
            inputs + scale * torch.randn(64, 6, generator=generator, dtype=torch.float64)
            for _ in range(2)
        ]
        point = weights.clone().requires_grad_()
        loss = nt_xent(views[0] @ point.t(), views[1] @ point.t(), temperature=0.2).mean()
        weights = weights - 0.5 * torch.autograd.grad(loss, point)[0]
    return torch.linalg.svdvals(weights)


def test_claim_4_4_dimensional_collapse():
    """126 negatives and a linear encoder; strong distortion of three inputs leaves a map of
    rank three, weak distortion one of rank six."""
    strong, weak = linear_spectrum(3.0), linear_spectrum(0.05)
    assert strong[2] > 2 and strong[3] < 0.05 * strong[2] and strong[5] < 1e-6
    assert weak[5] > 0.5 * weak[0]
    value = nt_xent(torch.eye(2).double(), torch.eye(2).double(), temperature=1.0)
    assert_close(value, torch.full_like(value, math.log(math.e + 2) - 1))


def test_claim_4_4_norm_irrelevant():
    """Tenfold length: the value stays, the gradient is a tenth, an angle moves a hundredth."""
    query, positive, negatives = draws(1, 5), draws(1, 5, seed=1), draws(7, 5, seed=2)
    results = []
    for length in (1.0, 10.0):
        point = (length * query).requires_grad_()
        loss = info_nce(point, positive, negatives, temperature=0.3)
        (gradient,) = torch.autograd.grad(loss.sum(), point)
        moved = point.detach() - 0.01 * gradient
        turned = torch.nn.functional.cosine_similarity(moved, query).clamp(max=1).acos()
        results.append((loss.item(), gradient.norm().item(), turned.item()))
    cosines = torch.nn.functional.cosine_similarity(query, torch.cat([positive, negatives])) / 0.3
    assert abs(results[0][0] - (cosines.logsumexp(0) - cosines[0]).item()) < 1e-9
    assert abs(results[0][0] - results[1][0]) < 1e-9
    assert abs(results[0][1] / results[1][1] - 10) < 1e-6
    assert abs(results[0][2] / results[1][2] - 100) < 2


def test_claim_4_4_alignment_uniformity_enough():
    """Twelve even points, all aligned; only the names of the classes are dealt differently."""
    order = torch.arange(12)
    points = at(30 * order.double())
    arrangements = {"blocks": order // 6, "mixed": order % 2}
    found = {}
    for name, classes in arrangements.items():
        # one class first, so that the same images are handed over in another order
        rows = classes.argsort(stable=True)
        vectors, labels = points[rows], classes[rows]
        cosines = vectors @ vectors.t() - 2 * torch.eye(12, dtype=torch.float64)
        two = cosines.topk(2, dim=1).indices
        right = (labels[two] == labels[:, None]).double().mean().item()
        found[name] = (
            alignment(vectors, vectors).mean().item(),
            uniformity(vectors).item(),
            right,
        )
    assert_close(f64(*found["blocks"][:2]), f64(*found["mixed"][:2]))
    assert found["blocks"][2] > 0.8 and found["mixed"][2] == 0
    cosines = torch.cos(math.pi / 6 * torch.arange(1, 12, dtype=torch.float64))
    expected = torch.exp(-2 * (2 - 2 * cosines)).mean().log().item()
    assert abs(found["blocks"][1] - expected) < 1e-9
    assert_close(alignment(points, -points), torch.full((12,), 4.0, dtype=torch.float64))

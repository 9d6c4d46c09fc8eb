import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from lmlosses.losses import (
    _similarity,
    alignment,
    info_nce,
    mutual_information_bound,
    triplet_loss,
    uniformity,
)

DOUBLE = torch.float64
HALVES = pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
DISTANCES = ("euclidean", "squared", "cosine")


def _draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def _mask(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < 0.6


def _problem(*batch, count=4, dim=3, shared=False):
    negatives = _draw(count, dim, seed=2) if shared else _draw(*batch, count, dim, seed=2)
    return _draw(*batch, dim), _draw(*batch, dim, seed=1), negatives


# values known by hand


@pytest.mark.parametrize("temperature", [0.01, 1.0])
@pytest.mark.parametrize("shape", [(5, 2), (3, 5, 2)])
def test_equal_similarities_cost_the_logarithm_of_the_number_of_candidates(shape, temperature):
    vectors = torch.ones(3, 2)
    losses = info_nce(vectors, vectors, torch.ones(shape), temperature=temperature)
    torch.testing.assert_close(losses, torch.full((3,), math.log(6)))


def test_an_orthogonal_negative_costs_what_its_temperature_leaves_of_it():
    query = torch.tensor([[2.0, 0.0]])
    losses = info_nce(query, query, torch.tensor([[0.0, 5.0]]), temperature=0.5)
    assert losses.item() == pytest.approx(math.log(1 + math.exp(-2)), rel=1e-6)
    # as it comes, the positive scores 4 and the negative 0
    losses = info_nce(query, query, torch.tensor([[0.0, 5.0]]), temperature=0.5, similarity="dot")
    assert losses.item() == pytest.approx(math.log1p(math.exp(-8)), rel=1e-5)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0, 3)])
def test_without_negatives_the_loss_is_nought(shape):
    queries = _draw(2, 3).requires_grad_()
    losses = info_nce(queries, _draw(2, 3, seed=1), torch.zeros(shape, dtype=DOUBLE))
    assert losses.tolist() == [0.0, 0.0] and not losses.signbit().any()
    assert (torch.autograd.grad(losses.sum(), queries)[0] == 0).all()


@pytest.mark.parametrize("shared", [False, True])
def test_where_every_negative_is_masked_the_loss_is_nought_with_gradient_nought(shared):
    tracked = [tensor.requires_grad_() for tensor in _problem(2, shared=shared)]
    mask = torch.tensor([[False] * 4, [True, False, True, True]])
    losses = info_nce(*tracked, mask=mask)
    assert losses[0] == 0 and not losses[0].signbit() and losses[1] > 0
    by_query, by_positive, _ = torch.autograd.grad(losses.sum(), tracked)
    for gradient in (by_query, by_positive):
        assert (gradient[0] == 0).all() and (gradient[1] != 0).any()


def test_triplets_by_hand():
    anchor, positive, negative = torch.tensor([[[0.0, 1.0]], [[3.0, 5.0]], [[-6.0, 1.0]]])
    expected = {"euclidean": 5 - 6 + 2, "squared": 0, "cosine": (1 - 5 / 34**0.5) - 1 + 2}
    expected["cosine"] += 1 / 37**0.5
    for distance, value in expected.items():
        loss = triplet_loss(anchor, positive, negative, margin=2.0, distance=distance)
        assert loss.tolist() == pytest.approx([value], rel=1e-6)
    assert (
        triplet_loss(anchor, positive, negative, margin=20.0, distance="squared") == 25 - 36 + 20
    )


def test_the_bound_is_the_logarithm_of_the_candidates_at_best_and_nought_at_chance():
    losses = torch.tensor([0.0, math.log(8)])
    bounds = mutual_information_bound(losses, candidates=8)
    torch.testing.assert_close(bounds, torch.tensor([math.log(8), 0.0]))


def test_alignment_of_equal_orthogonal_and_opposite_directions():
    first = torch.tensor([[3.0, 0.0]]).expand(3, 2)
    second = torch.tensor([[0.1, 0.0], [0.0, 7.0], [-2.0, 0.0]])
    for power in (0.5, 1.0, 2.0, 3.0):
        expected = torch.tensor([0.0, 2 ** (power / 2), 2**power])
        torch.testing.assert_close(alignment(first, second, power=power), expected)


def test_uniformity_of_one_point_of_two_poles_and_of_a_square():
    assert uniformity(torch.full((5, 3), 0.3)).item() == pytest.approx(0, abs=1e-6)
    poles = torch.tensor([[1.0, 0.0], [-9.0, 0.0]])
    assert uniformity(poles, scale=3.0).item() == pytest.approx(-12)
    square = torch.cat([torch.eye(2), -torch.eye(2)])
    expected = math.log((2 * math.exp(-4) + math.exp(-8)) / 3)
    assert uniformity(square).item() == pytest.approx(expected, rel=1e-6)


# agreement with something independent


def _slow_info_nce(query, positive, negatives, temperature, allowed):
    def similarity(a, b):
        products = (sum(x * y for x, y in zip(u, v, strict=True)) for u, v in ((a, b), (a, a)))
        product, square = products
        return product / math.sqrt(square * sum(y * y for y in b))

    right = math.exp(similarity(query, positive) / temperature)
    wrong = sum(
        math.exp(similarity(query, negative) / temperature)
        for negative, counts in zip(negatives, allowed, strict=True)
        if counts
    )
    return -math.log(right / (right + wrong))


@pytest.mark.parametrize("shared", [False, True])
def test_info_nce_agrees_with_a_slow_loop(shared):
    queries, positives, negatives = _problem(5, shared=shared)
    mask = _mask(5, 4)
    losses = info_nce(queries, positives, negatives, temperature=0.3, mask=mask)
    for i, loss in enumerate(losses.tolist()):
        own = (negatives if shared else negatives[i]).tolist()
        expected = _slow_info_nce(
            queries[i].tolist(), positives[i].tolist(), own, 0.3, mask[i].tolist()
        )
        assert loss == pytest.approx(expected, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("shared", [False, True])
def test_info_nce_is_torchs_cross_entropy_of_cosines(shared):
    queries, positives, negatives = _problem(5, shared=shared)
    cosines = [
        F.cosine_similarity(queries, positives, dim=-1).unsqueeze(1),
        F.cosine_similarity(queries.unsqueeze(1), negatives, dim=-1),
    ]
    logits = torch.cat(cosines, dim=1) / 0.07
    expected = F.cross_entropy(logits, torch.zeros(5, dtype=torch.long), reduction="none")
    torch.testing.assert_close(info_nce(queries, positives, negatives), expected)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (2, 1, 3), (0,), (2, 0)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_shared_negatives_are_the_same_for_each_query(batch, masked, similarity):
    queries, positives, negatives = _problem(*batch, count=5, shared=True)
    settings = {"mask": _mask(*batch, 5) if masked else None, "similarity": similarity}
    results = []
    for each in (negatives, negatives.expand(*batch, 5, 3)):
        tracked = [queries.clone().requires_grad_(), positives.clone().requires_grad_()]
        shared = each.detach().requires_grad_()
        losses = info_nce(*tracked, shared, temperature=0.2, **settings)
        assert losses.shape == batch
        weights = torch.arange(1, losses.numel() + 1, dtype=DOUBLE).reshape(batch)
        *gradients, by_negatives = torch.autograd.grad(
            (weights * losses).sum(), [*tracked, shared]
        )
        results.append([losses, *gradients, by_negatives.reshape(-1, 5, 3).sum(dim=0)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one.reshape(other.shape), other)


@pytest.mark.parametrize("margin", [0.1, 0.7])
def test_triplets_are_torchs_without_its_epsilon(margin):
    triplet = [tensor.requires_grad_() for tensor in (_draw(9, 3, seed=s) for s in range(3))]
    expected = F.triplet_margin_loss(*triplet, margin=margin, eps=0.0, reduction="none")
    losses = triplet_loss(*triplet, margin=margin)
    torch.testing.assert_close(losses, expected)
    assert 0 < (losses == 0).sum() < 9
    for mine, its in zip(
        torch.autograd.grad(losses.sum(), triplet),
        torch.autograd.grad(expected.sum(), triplet),
        strict=True,
    ):
        torch.testing.assert_close(mine, its)


def test_triplets_of_the_other_distances_are_torchs():
    triplet = [_draw(4, 9, 3, seed=seed) for seed in range(3)]
    distances = {
        "squared": lambda a, b: F.pairwise_distance(a, b, eps=0.0) ** 2,
        "cosine": lambda a, b: 1 - F.cosine_similarity(a, b, dim=-1),
    }
    for name, distance in distances.items():
        expected = F.triplet_margin_with_distance_loss(
            *triplet, distance_function=distance, margin=0.3, reduction="none"
        )
        torch.testing.assert_close(triplet_loss(*triplet, margin=0.3, distance=name), expected)


def test_alignment_and_uniformity_are_the_forms_of_their_paper():
    first, second = _draw(7, 3), _draw(7, 3, seed=1)
    x, y = F.normalize(first, dim=1), F.normalize(second, dim=1)
    for power in (1.0, 2.0, 3.5):
        torch.testing.assert_close(
            alignment(first, second, power=power), (x - y).norm(dim=1).pow(power)
        )
    for scale in (0.5, 2.0):
        expected = torch.pdist(x).square().mul(-scale).exp().mean().log()
        torch.testing.assert_close(uniformity(first, scale=scale), expected)


def _expected_bound(joint, scores, negatives_from, count):
    """Expectation of log N minus InfoNCE, over all draws of a pair and of negatives."""
    total = 0.0
    xs, ys = joint.shape
    for x, y in itertools.product(range(xs), range(ys)):
        for others in itertools.product(range(ys), repeat=count):
            probability = joint[x, y] * negatives_from[list(others)].prod()
            # one axis per y: a query of the scores times the unit vector of y is the score of y
            loss = info_nce(
                scores[x], torch.eye(ys, dtype=DOUBLE)[y], torch.eye(ys, dtype=DOUBLE)[[*others]],
                temperature=1.0, similarity="dot",
            )  # fmt: skip
            total += probability * mutual_information_bound(loss, candidates=count + 1)
    return total.item()


def test_the_bound_holds_in_expectation_for_all_scores_if_negatives_are_of_the_marginal():
    joint = torch.tensor(
        [[0.30, 0.02, 0.01], [0.02, 0.20, 0.05], [0.05, 0.05, 0.30]], dtype=DOUBLE
    )
    of_x, of_y = joint.sum(dim=1, keepdim=True), joint.sum(dim=0)
    information = (joint * (joint / (of_x * of_y)).log()).sum().item()
    best = (joint / (of_x * of_y)).log()
    values = []
    for count in (1, 2, 3):
        values.append(_expected_bound(joint, best, of_y, count))
        assert values[-1] < min(information, math.log(count + 1))
        for seed in range(2):
            assert _expected_bound(joint, 2 * _draw(3, 3, seed=seed), of_y, count) < values[-1]
    assert values == sorted(values)  # more negatives, a closer bound
    # negatives that are never likely positives make a bound of nothing
    rare = torch.tensor([1.0, 0.0, 0.0], dtype=DOUBLE)
    easy = torch.tensor([[0.0, 0, 0], [0.01, 0.49, 0], [0.01, 0, 0.49]], dtype=DOUBLE)
    of_x, of_y = easy.sum(dim=1, keepdim=True), easy.sum(dim=0)
    true = torch.where(easy > 0, easy * (easy / (of_x * of_y)).log(), 0.0).nansum().item()
    scores = torch.tensor([[-9.0, 9, 9]] * 3, dtype=DOUBLE)
    assert _expected_bound(easy, scores, rare, 3) > true + 0.3


# laws


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("shared", [False, True])
def test_derivatives_of_info_nce_match_finite_differences(shared, similarity):
    inputs = [tensor.requires_grad_() for tensor in _problem(2, shared=shared)]
    temperature = torch.tensor(0.4, dtype=DOUBLE, requires_grad=True)
    mask = torch.tensor([[True, True, False, True], [False] * 4])

    def loss(*vectors):
        *vectors, tau = vectors
        return info_nce(*vectors, temperature=tau, mask=mask, similarity=similarity)

    assert torch.autograd.gradcheck(loss, (*inputs, temperature))
    if not shared:  # those in tiles have a first derivative only
        assert torch.autograd.gradgradcheck(loss, (*inputs, temperature))


def test_derivatives_of_the_others_match_finite_differences():
    first, second, third = (_draw(4, 3, seed=seed).requires_grad_() for seed in range(3))
    for distance in DISTANCES:

        def loss(*vectors, distance=distance):
            return triplet_loss(*vectors, distance=distance)

        assert torch.autograd.gradcheck(loss, (first, second, third))
        assert torch.autograd.gradgradcheck(loss, (first, second, third))
    for power in (0.5, 1.0, 2.0):
        assert torch.autograd.gradcheck(
            lambda a, b, power=power: alignment(a, b, power=power), (first, second)
        )
    assert torch.autograd.gradcheck(uniformity, (first,))


def test_second_derivatives_are_refused_in_tiles_and_formed_under_transforms():
    queries, positives, negatives = _problem(2, shared=True)
    tracked = queries.clone().requires_grad_()
    losses = info_nce(tracked, positives, negatives)
    (gradient,) = torch.autograd.grad(losses.sum(), tracked, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        gradient.sum().backward()

    def total(vectors, others):
        return info_nce(vectors, positives, others, temperature=0.4).sum()

    torch.testing.assert_close(
        torch.func.hessian(total)(queries, negatives),
        torch.autograd.functional.hessian(
            lambda vectors: total(vectors, negatives.expand(2, 4, 3)), queries
        ),
    )


def test_the_gradient_pulls_to_the_positive_and_from_negatives_by_their_probability():
    queries, positives, negatives = _problem(3)
    tracked = [tensor.requires_grad_() for tensor in (queries, positives, negatives)]
    losses = info_nce(*tracked, temperature=0.5, similarity="dot")
    by_query, by_positive, by_negatives = torch.autograd.grad(losses.sum(), tracked)
    candidates = torch.cat([positives.unsqueeze(1), negatives], dim=1).detach()
    probabilities = ((candidates @ queries.detach().unsqueeze(2)).squeeze(2) / 0.5).softmax(dim=1)
    missing = (1 - probabilities[:, :1]) / 0.5
    pushed = probabilities[:, 1:, None] / 0.5
    torch.testing.assert_close(by_positive, -missing * queries)
    torch.testing.assert_close(by_negatives, pushed * queries.unsqueeze(1))
    torch.testing.assert_close(by_query, (pushed * negatives).sum(dim=1) - missing * positives)


@pytest.mark.parametrize("shared", [False, True])
def test_the_order_of_negatives_does_not_matter(shared):
    queries, positives, negatives = _problem(3, count=6, shared=shared)
    turned = negatives[..., torch.randperm(6, generator=torch.Generator().manual_seed(0)), :]
    torch.testing.assert_close(
        info_nce(queries, positives, turned), info_nce(queries, positives, negatives)
    )


@pytest.mark.parametrize("shared", [False, True])
def test_a_masked_negative_is_as_good_as_absent_even_if_it_is_nan_or_nought(shared):
    queries, positives, negatives = _problem(3, count=5, shared=shared)
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[:, [1, 4]] = False
    kept = info_nce(queries, positives, negatives[..., [0, 2, 3], :])
    for poison in (math.nan, math.inf, 0.0):
        spoiled = negatives.clone()
        spoiled[..., [1, 4], :] = poison
        spoiled.requires_grad_()
        losses = info_nce(queries, positives, spoiled, mask=mask)
        torch.testing.assert_close(losses, kept)
        (gradient,) = torch.autograd.grad(losses.sum(), spoiled)
        assert (gradient[..., [1, 4], :] == 0).all() and gradient.isfinite().all()


def test_a_negative_that_one_query_may_use_must_be_a_vector():
    queries, positives, negatives = _problem(2, shared=True)
    negatives[1] = 0
    mask = torch.ones(2, 4, dtype=torch.bool)
    mask[0, 1] = False
    with pytest.raises(ValueError, match=r"negatives must have no zero vector.*index \(1,\)"):
        info_nce(queries, positives, negatives, mask=mask)


def test_a_repeated_negative_counts_each_time():
    queries, positives, negatives = _problem(3, count=1)
    odds = info_nce(queries, positives, negatives).expm1()
    losses = info_nce(queries, positives, negatives.expand(3, 4, 3))
    torch.testing.assert_close(losses, (4 * odds).log1p())


def test_dot_products_of_unit_vectors_are_cosines():
    vectors = _problem(3)
    unit = [F.normalize(tensor, dim=-1) for tensor in vectors]
    torch.testing.assert_close(info_nce(*unit, similarity="dot"), info_nce(*vectors))


@pytest.mark.parametrize("size", [1e30, 1e-30])
def test_cosines_do_not_depend_on_the_size_of_vectors_nor_overflow(size):
    vectors = [tensor.float() for tensor in _problem(4, shared=True)]
    large = [(size * tensor).requires_grad_() for tensor in vectors]
    torch.testing.assert_close(info_nce(*large), info_nce(*vectors), rtol=1e-5, atol=1e-6)
    tracked = [tensor.requires_grad_() for tensor in vectors]
    expected = torch.autograd.grad(info_nce(*tracked).sum(), tracked)
    for mine, plain in zip(
        torch.autograd.grad(info_nce(*large).sum(), large), expected, strict=True
    ):
        torch.testing.assert_close(mine * size, plain, rtol=1e-4, atol=1e-5)
    first, second, third = vectors[0].detach(), vectors[1].detach(), vectors[2].detach()
    torch.testing.assert_close(alignment(size * first, second), alignment(first, second))
    torch.testing.assert_close(uniformity(size * first), uniformity(first))
    cosine = {"distance": "cosine"}
    torch.testing.assert_close(
        triplet_loss(size * first, second, third, **cosine),
        triplet_loss(first, second, third, **cosine),
    )
    near, far = first + second, first - 2 * third
    by_size = triplet_loss(size * first, size * near, size * far, margin=0.0) / size
    torch.testing.assert_close(by_size, triplet_loss(first, near, far, margin=0.0))
    assert (by_size > 0).any()


def test_vectors_that_coincide_have_a_gradient_of_nought():
    anchor = _draw(2, 3).requires_grad_()
    for distance in DISTANCES:
        loss = triplet_loss(anchor, anchor.detach(), anchor.detach(), distance=distance)
        assert loss.tolist() == pytest.approx([1.0, 1.0])
        (gradient,) = torch.autograd.grad(loss.sum(), anchor)
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)
    for power in (0.5, 1.0, 2.0):
        (gradient,) = torch.autograd.grad(
            alignment(anchor, 2 * anchor.detach(), power=power).sum(), anchor
        )
        assert (gradient == 0).all()


def test_triplets_that_are_apart_by_the_margin_cost_nothing():
    anchor = torch.zeros(1, 2, requires_grad=True)
    loss = triplet_loss(anchor, torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.5]]))
    assert loss == 0 and (torch.autograd.grad(loss.sum(), anchor)[0] == 0).all()


def test_uniformity_does_not_depend_on_the_order_and_falls_as_points_spread():
    points = _draw(8, 3)
    torch.testing.assert_close(uniformity(points.flip(0)), uniformity(points))
    narrow = uniformity(torch.tensor([0.0, 0.0, 5.0]) + points)
    assert -8 < uniformity(points) < narrow < 0


def test_the_mean_over_queries_bounds_nothing_above_the_logarithm():
    queries, positives, negatives = _problem(50, count=7)
    losses = info_nce(queries, positives, negatives)
    assert (losses > 0).all()
    assert (mutual_information_bound(losses, candidates=8) < math.log(8)).all()


# precision, devices, strides


@HALVES
@pytest.mark.parametrize("shared", [False, True])
def test_half_precision_at_a_temperature_of_a_hundredth_is_computed_in_float32(half, shared):
    vectors = [tensor.to(half) for tensor in _problem(6, count=9, dim=16, shared=shared)]
    exact = info_nce(*(tensor.double() for tensor in vectors), temperature=0.01)
    assert 20 < exact.max() < 100  # scores of up to 100: half precision would be off by 0.4
    tracked = [tensor.requires_grad_() for tensor in vectors]
    losses = info_nce(*tracked, temperature=0.01)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), exact, rtol=1e-6, atol=3e-5)
    for gradient in torch.autograd.grad(losses.sum(), tracked):
        assert gradient.dtype == half and gradient.isfinite().all()


@HALVES
def test_the_other_losses_are_computed_in_float32_too(half):
    first, second, third = (_draw(5, 4, seed=seed).to(half) for seed in range(3))
    every = [
        *(lambda a, b, c, d=d: triplet_loss(a, b, c, distance=d) for d in DISTANCES),
        lambda a, b, c: alignment(a, b),
        lambda a, b, c: uniformity(a),
        lambda a, b, c: mutual_information_bound(a[0], candidates=3),
    ]
    for loss in every:
        exact = loss(first.double(), second.double(), third.double())
        found = loss(first, second, third)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shared", [False, True])
def test_autocast_does_not_round_the_scores(shared):
    vectors = [tensor.float() for tensor in _problem(6, count=9, dim=16, shared=shared)]
    expected = info_nce(*vectors, temperature=0.01)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = info_nce(*vectors, temperature=0.01)
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("finer", range(3))
@pytest.mark.parametrize("shared", [False, True])
def test_of_several_precisions_the_finest_is_used(finer, shared):
    vectors = [tensor.float() for tensor in _problem(3, shared=shared)]
    exact = info_nce(*(tensor.double() for tensor in vectors))
    mixed = [tensor.double() if i == finer else tensor for i, tensor in enumerate(vectors)]
    losses = info_nce(*mixed)
    assert losses.dtype == DOUBLE
    torch.testing.assert_close(losses, exact, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, DOUBLE], ids=str)
def test_a_temperature_of_any_precision_gets_its_gradient(dtype):
    vectors = [tensor.float() for tensor in _problem(3)]
    temperature = torch.tensor(0.5, dtype=dtype, requires_grad=True)
    losses = info_nce(*vectors, temperature=temperature)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, info_nce(*vectors, temperature=0.5))
    (gradient,) = torch.autograd.grad(losses.sum(), temperature)
    assert gradient.dtype == dtype
    step = 1e-3
    slope = [
        info_nce(*(v.double() for v in vectors), temperature=0.5 + s).sum() for s in (step, -step)
    ]
    assert gradient.item() == pytest.approx((slope[0] - slope[1]).item() / (2 * step), rel=1e-2)


@pytest.mark.parametrize("shared", [False, True])
def test_strides_do_not_matter(shared):
    vectors, mask = _problem(3, shared=shared), _mask(3, 4)
    strided = [
        torch.stack([value, torch.full_like(value, poison)], dim=-1)[..., 0]
        for value, poison in ((*((v, math.nan) for v in vectors), (mask, True)))
    ]
    assert not any(value.is_contiguous() for value in strided)
    *spread, spread_mask = strided
    torch.testing.assert_close(
        info_nce(*spread, mask=spread_mask), info_nce(*vectors, mask=mask), rtol=1e-13, atol=0
    )
    for distance in DISTANCES:
        torch.testing.assert_close(
            triplet_loss(spread[0], spread[1], spread[0].flip(0), distance=distance),
            triplet_loss(vectors[0], vectors[1], vectors[0].flip(0), distance=distance),
        )
    torch.testing.assert_close(uniformity(spread[0]), uniformity(vectors[0]))


def _on_meta(*tensors):
    return [tensor.float().to("meta").requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("shared", [False, True])
def test_info_nce_runs_forward_and_backward_without_reading_a_value(shared):
    vectors = _on_meta(*_problem(3, shared=shared))
    temperature = torch.tensor(0.1, device="meta", requires_grad=True)
    losses = info_nce(*vectors, temperature=temperature, mask=_mask(3, 4).to("meta"))
    assert losses.device.type == "meta" and losses.shape == (3,)
    gradients = torch.autograd.grad(losses.sum(), [*vectors, temperature])
    assert [g.shape for g in gradients] == [v.shape for v in [*vectors, temperature]]


def test_the_others_run_forward_and_backward_without_reading_a_value():
    vectors = _on_meta(*(_draw(4, 3, seed=seed) for seed in range(3)))
    every = [
        (3, *(lambda *v, d=d: triplet_loss(*v, distance=d) for d in DISTANCES)),
        (2, alignment, lambda *v: alignment(*v, power=1.0)),
        (1, uniformity, lambda v: mutual_information_bound(v, candidates=3)),
    ]
    for count, *functions in every:
        for function in functions:
            values = function(*vectors[:count])
            gradients = torch.autograd.grad(values.sum(), vectors[:count])
            assert all(gradient.shape == (4, 3) for gradient in gradients)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("shared", [False, True])
def test_never_waits_for_the_gpu_and_agrees_with_the_cpu(shared):
    vectors, mask = _problem(5, shared=shared), _mask(5, 4)
    three = [_draw(5, 3, seed=seed) for seed in range(3)]
    expected = [
        info_nce(*vectors, mask=mask),
        *(triplet_loss(*three, distance=d) for d in DISTANCES),
        alignment(*three[:2], power=1.0),
        uniformity(three[0]),
    ]
    vectors = [tensor.cuda().requires_grad_() for tensor in vectors]
    three = [tensor.cuda().requires_grad_() for tensor in three]
    temperature, mask = torch.tensor(0.07, device="cuda", dtype=DOUBLE), mask.cuda()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = [
            info_nce(*vectors, mask=mask, temperature=temperature),
            *(triplet_loss(*three, distance=d) for d in DISTANCES),
            alignment(*three[:2], power=1.0),
            uniformity(three[0]),
        ]
        torch.autograd.grad(sum(value.sum() for value in found), [*vectors, *three])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for mine, plain in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.cpu(), plain)


def test_where_no_value_is_read_a_zero_vector_scores_nought_and_nan_stays_nan(monkeypatch):
    monkeypatch.setattr(_similarity, "reads_values", lambda *tensors: False)
    monkeypatch.setattr(_similarity, "check_finite", lambda **tensors: None)
    queries, positives, negatives = _problem(3)
    queries[0] = 0
    queries[1, 0] = math.nan
    positives[2, 0] = math.inf
    queries.requires_grad_()
    losses = info_nce(queries, positives, negatives)
    assert losses[0].item() == pytest.approx(math.log(5))
    assert losses[1:].isnan().all()
    (gradient,) = torch.autograd.grad(losses[0], queries)
    assert (gradient[0] == 0).all()


def test_shared_negatives_and_uniformity_keep_no_matrix_of_scores():
    sizes = []

    def note(tensor):
        sizes.append(tensor.numel())
        return tensor

    queries, positives, negatives = (
        _draw(400, 3, seed=seed).float().requires_grad_() for seed in range(3)
    )
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        total = info_nce(queries, positives, negatives).sum() + uniformity(queries)
    total.backward()
    assert 0 < max(sizes) <= 8 * 400


def test_vmap_over_queries_is_the_batched_call():
    vectors, mask = _problem(4), _mask(4, 4)

    def loss(*one):
        *one, allowed = one
        return info_nce(*one, mask=allowed)

    torch.testing.assert_close(
        torch.func.vmap(loss)(*vectors, mask), info_nce(*vectors, mask=mask)
    )
    three = [_draw(4, 3, seed=seed) for seed in range(3)]
    torch.testing.assert_close(torch.func.vmap(triplet_loss)(*three), triplet_loss(*three))
    torch.testing.assert_close(torch.func.vmap(alignment)(*three[:2]), alignment(*three[:2]))


@pytest.mark.compiles
@pytest.mark.parametrize("shared", [False, True])
def test_compiles_into_one_graph(shared):
    vectors = _problem(3, shared=shared)
    compiled = torch.compile(info_nce, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*vectors), info_nce(*vectors))


def test_arguments_are_left_as_they_were():
    vectors, mask = _problem(3, shared=True), _mask(3, 4)
    copies = [value.clone() for value in (*vectors, mask)]
    info_nce(*vectors, mask=mask)
    triplet_loss(vectors[0], vectors[1], vectors[2][:3])
    alignment(vectors[0], vectors[1])
    uniformity(vectors[2])
    assert all(torch.equal(a, b) for a, b in zip((*vectors, mask), copies, strict=True))


# errors


@pytest.mark.bad_input
def test_negatives_must_be_shared_or_each_querys_own():
    queries = torch.ones(2, 3)
    for shape in [(4, 5), (3, 4, 3), (2, 4, 5), (2, 2, 4, 3), (3,)]:
        with pytest.raises(
            ValueError,
            match=r"negatives must have shape \(count, 3\), shared by all queries, or "
            r"\(2, count, 3\), some for each; got ",
        ):
            info_nce(queries, queries, torch.ones(shape))


@pytest.mark.bad_input
def test_what_info_nce_refuses():
    queries, positives, negatives = (torch.ones(2, 3), torch.ones(2, 3), torch.ones(4, 3))
    with pytest.raises(TypeError, match="queries must be a floating-point tensor; got torch.int"):
        info_nce(queries.int(), positives, negatives)
    with pytest.raises(TypeError, match="negatives must be a torch.Tensor; got list"):
        info_nce(queries, positives, [1.0])
    with pytest.raises(ValueError, match=r"queries must have at least 1 axes; got shape \(\)"):
        info_nce(torch.tensor(1.0), torch.tensor(1.0), negatives)
    with pytest.raises(ValueError, match=r"positives must have shape \(2, 3\), the shape of que"):
        info_nce(queries, torch.ones(1, 3), negatives)
    with pytest.raises(TypeError, match="mask must be a boolean tensor"):
        info_nce(queries, positives, negatives, mask=torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"mask must have shape \(2, 4\), one entry per query"):
        info_nce(queries, positives, negatives, mask=torch.ones(4, dtype=torch.bool))
    with pytest.raises(ValueError, match="similarity must be 'cosine' or 'dot'; got 'euclid'"):
        info_nce(queries, positives, negatives, similarity="euclid")
    with pytest.raises(ValueError, match="at least one entry along axis -1"):
        info_nce(queries[:, :0], positives[:, :0], negatives[:, :0])


@pytest.mark.parametrize("temperature", [0.0, -0.1, math.nan, math.inf])
def test_a_temperature_must_be_positive_and_finite(temperature):
    vectors = torch.ones(2, 3), torch.ones(2, 3), torch.ones(4, 3)
    expected = "temperature must be (positive|finite); got "
    with pytest.raises(ValueError, match=expected):
        info_nce(*vectors, temperature=temperature)
    with pytest.raises(ValueError, match=expected):
        info_nce(*vectors, temperature=torch.tensor(temperature))


@pytest.mark.bad_input
def test_a_temperature_must_be_one_number():
    vectors = torch.ones(2, 3), torch.ones(2, 3), torch.ones(4, 3)
    with pytest.raises(ValueError, match=r"temperature must have shape \(\), one number; got"):
        info_nce(*vectors, temperature=torch.ones(1))
    with pytest.raises(TypeError, match="temperature must be a floating-point tensor"):
        info_nce(*vectors, temperature=torch.tensor(1))
    with pytest.raises(TypeError, match="temperature must be a real number; got str"):
        info_nce(*vectors, temperature="0.1")


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("wrong", [0.0, math.nan, math.inf])
def test_vectors_without_a_direction_are_refused_by_name(place, wrong):
    vectors = [torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 4, 3)]
    name = ("queries", "positives", "negatives")[place]
    vectors[place][..., -1, :] = wrong
    problem = (
        "have no zero vector, whose cosine is undefined; got one at" if wrong == 0 else "be f"
    )
    with pytest.raises(ValueError, match=f"{name} must {problem}"):
        info_nce(*vectors)
    if wrong == 0:  # as good a vector as others for dot products
        assert info_nce(*vectors, similarity="dot").isfinite().all()
    else:
        with pytest.raises(ValueError, match=f"{name} must be finite; got"):
            info_nce(*vectors, similarity="dot")


def test_tensors_must_be_on_one_device():
    here, there = torch.ones(2, 3), torch.ones(2, 3, device="meta")
    for name, call in {
        "positives": lambda: info_nce(here, there, here),
        "negatives": lambda: info_nce(here, here, there),
        "mask": lambda: info_nce(
            here, here, here, mask=torch.ones(2, 2, dtype=torch.bool, device="meta")
        ),
        "temperature": lambda: info_nce(
            here, here, here, temperature=torch.tensor(1.0, device="meta")
        ),
        "second": lambda: alignment(here, there),
    }.items():
        with pytest.raises(ValueError, match=f"{name} must be on cpu, the device of .*; got meta"):
            call()
    with pytest.raises(ValueError, match="negatives must be on cpu, the device of anchors"):
        triplet_loss(here, here, there)


@pytest.mark.bad_input
def test_what_triplets_refuse():
    vectors = torch.ones(2, 3)
    with pytest.raises(ValueError, match="margin must not be negative; got -1.0"):
        triplet_loss(vectors, vectors, vectors, margin=-1.0)
    with pytest.raises(ValueError, match="must be 'euclidean', 'squared' or 'cosine'; got 'l2'"):
        triplet_loss(vectors, vectors, vectors, distance="l2")
    with pytest.raises(ValueError, match=r"negatives must have shape \(2, 3\), the shape of anch"):
        triplet_loss(vectors, vectors, vectors[:1])
    with pytest.raises(ValueError, match=r"positives must have shape \(2, 3\), the shape of anch"):
        triplet_loss(vectors, vectors[0], vectors)
    with pytest.raises(TypeError, match="positives must be a floating-point tensor"):
        triplet_loss(vectors, vectors.long(), vectors)
    with pytest.raises(ValueError, match="anchors must have at least 1 axes"):
        triplet_loss(vectors[0, 0], vectors[0, 0], vectors[0, 0])
    with pytest.raises(ValueError, match=r"positives must have no zero vector.*index \(0,\)"):
        triplet_loss(vectors, torch.zeros(2, 3), vectors, distance="cosine")


@pytest.mark.bad_input
def test_what_the_bound_refuses():
    with pytest.raises(ValueError, match="candidates must be positive; got 0"):
        mutual_information_bound(torch.zeros(2), candidates=0)
    with pytest.raises(TypeError, match="candidates must be a whole number; got float 2.0"):
        mutual_information_bound(torch.zeros(2), candidates=2.0)
    with pytest.raises(TypeError, match="losses must be a floating-point tensor"):
        mutual_information_bound(torch.zeros(2, dtype=torch.long), candidates=2)


@pytest.mark.bad_input
def test_what_alignment_and_uniformity_refuse():
    vectors = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"second must have shape \(2, 3\), the shape of first"):
        alignment(vectors, vectors[:1])
    with pytest.raises(ValueError, match="power must be positive; got 0"):
        alignment(vectors, vectors, power=0)
    with pytest.raises(ValueError, match="second must have no zero vector"):
        alignment(vectors, torch.zeros(2, 3))
    with pytest.raises(ValueError, match="first must be finite; got nan"):
        alignment(torch.full((2, 3), math.nan), vectors)
    with pytest.raises(TypeError, match="first must be a floating-point tensor"):
        alignment(vectors.int(), vectors)
    with pytest.raises(ValueError, match="first must have at least 1 axes"):
        alignment(vectors[0, 0], vectors[0, 0])
    with pytest.raises(ValueError, match="embeddings must have at least 2 rows; got 1"):
        uniformity(vectors[:1])
    with pytest.raises(ValueError, match="scale must be positive; got -2"):
        uniformity(vectors, scale=-2)
    with pytest.raises(ValueError, match=r"embeddings must have no zero vector.*index \(1,\)"):
        uniformity(torch.tensor([[1.0], [0.0]]))
    with pytest.raises(ValueError, match=r"embeddings must have 2 axes; got shape \(3,\)"):
        uniformity(vectors[0])
    with pytest.raises(TypeError, match="embeddings must be a floating-point tensor"):
        uniformity(vectors.long())

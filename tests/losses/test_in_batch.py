import itertools
import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from lmlosses import token_mean
from lmlosses.losses import (
    clip_loss,
    in_batch_info_nce,
    info_nce,
    nt_xent,
    siglip_loss,
    supervised_contrastive,
)

DOUBLE = torch.float64
HALVES = pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
LABELS = torch.tensor([3, 0, 3, 7, 0, 3])

# every loss as a function of two sides and a temperature
LOSSES = {
    "in_batch_info_nce": in_batch_info_nce,
    "symmetric": lambda a, b, **kw: in_batch_info_nce(a, b, symmetric=True, **kw),
    "with negatives": lambda a, b, **kw: in_batch_info_nce(a, b, a.flip(0) + 2 * b, **kw),
    "clip_loss": clip_loss,
    "nt_xent": nt_xent,
    "siglip_loss": siglip_loss,
    "supervised_contrastive": lambda a, b, **kw: (
        supervised_contrastive(a + 2 * b, LABELS[: len(a)].to(a.device), **kw).values
    ),
}
every_loss = pytest.mark.parametrize("name", LOSSES)


def _draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def _sides(batch=6, dim=4):
    return _draw(batch, dim), _draw(batch, dim, seed=1)


def _cosines(first, second, temperature=1.0):
    return F.cosine_similarity(first.unsqueeze(1), second.unsqueeze(0), dim=-1) / temperature


def _slow_softmax_loss(scores, target, candidates):
    """Surprise at the target among the candidates, from Python numbers."""
    assert target in candidates
    total = math.fsum(math.exp(scores[j]) for j in candidates)
    return -math.log(math.exp(scores[target]) / total)


# values known by hand


def test_two_orthogonal_pairs_cost_what_the_temperature_leaves():
    for temperature in (0.1, 1.0):
        expected = math.log1p(math.exp(-1 / temperature))
        for loss in (in_batch_info_nce, clip_loss):
            losses = loss(3 * torch.eye(2), torch.eye(2), temperature=temperature)
            assert losses.tolist() == pytest.approx([expected] * 2, rel=1e-5, abs=1e-6)
        # two other views, both orthogonal to the first
        expected = math.log1p(2 * math.exp(-1 / temperature))
        losses = nt_xent(torch.eye(2), torch.eye(2), temperature=temperature)
        assert losses.flatten().tolist() == pytest.approx([expected] * 4, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("temperature", [0.01, 1.0])
def test_equal_similarities_cost_the_logarithm_of_the_candidates(temperature):
    same = torch.ones(5, 3)
    settings = {"temperature": temperature}
    for loss in (in_batch_info_nce, clip_loss):
        torch.testing.assert_close(loss(same, same, **settings), torch.full((5,), math.log(5)))
    torch.testing.assert_close(
        in_batch_info_nce(same, same, torch.ones(2, 3), **settings), torch.full((5,), math.log(7))
    )
    torch.testing.assert_close(nt_xent(same, same, **settings), torch.full((2, 5), math.log(9)))
    losses, mask = supervised_contrastive(same, torch.tensor([0, 0, 1, 1, 1]), **settings)
    torch.testing.assert_close(losses, torch.full((5,), math.log(4)))
    assert mask.all()


def test_siglip_by_hand():
    losses = siglip_loss(torch.eye(2), torch.eye(2), temperature=0.5, bias=-1.0)
    # the own text scores 2 - 1, the other -1
    expected = math.log1p(math.exp(-1)) + math.log1p(math.exp(-1))
    assert losses.tolist() == pytest.approx([expected] * 2)
    # with the paper's first settings nearly all of a large batch is right from the start
    losses = siglip_loss(torch.eye(8), torch.eye(8))
    expected = math.log(2) + 7 * math.log1p(math.exp(-10))
    assert losses.tolist() == pytest.approx([expected] * 8)


def test_a_batch_of_one_has_no_negatives():
    first, second = _draw(1, 3).requires_grad_(), _draw(1, 3, seed=1)
    for loss in (in_batch_info_nce, LOSSES["symmetric"], clip_loss, nt_xent):
        losses = loss(first, second)
        assert (losses == 0).all() and not losses.signbit().any()
        assert (torch.autograd.grad(losses.sum(), first)[0] == 0).all()
    losses, mask = supervised_contrastive(first, torch.tensor([4]))
    assert losses.tolist() == [0.0] and mask.tolist() == [False]
    assert (torch.autograd.grad(losses.sum(), first)[0] == 0).all()
    cosine = _cosines(first, second).item()
    assert siglip_loss(first, second, temperature=0.5, bias=0.1).item() == pytest.approx(
        math.log1p(math.exp(-2 * cosine - 0.1))
    )


def test_who_is_alone_with_a_label_does_not_count_and_is_a_negative_of_the_others():
    embeddings = torch.eye(3, requires_grad=True)
    losses, mask = supervised_contrastive(embeddings, torch.tensor([0, 0, 1]))
    assert mask.tolist() == [True, True, False]
    assert losses.tolist() == pytest.approx([math.log(2), math.log(2), 0.0])
    (gradient,) = torch.autograd.grad(token_mean(losses, mask), embeddings)
    assert gradient.isfinite().all() and (gradient[2] != 0).any()
    losses, mask = supervised_contrastive(embeddings, torch.arange(3))
    assert not mask.any() and (losses == 0).all()
    assert token_mean(losses, mask) == 0
    (gradient,) = torch.autograd.grad(losses.sum(), embeddings)
    assert (gradient == 0).all()


# agreement with something independent


@pytest.mark.parametrize("symmetric", [False, True])
def test_in_batch_info_nce_agrees_with_a_slow_loop(symmetric):
    queries, keys = _sides()
    negatives, ids = _draw(3, 4, seed=2), torch.tensor([5, 1, 5, 2, 1, 9])
    mask = torch.rand(6, 9, generator=torch.Generator().manual_seed(0)) < 0.7
    losses = in_batch_info_nce(
        queries, keys, negatives, temperature=0.3, symmetric=symmetric, ids=ids, mask=mask
    )
    scores = _cosines(queries, torch.cat([keys, negatives]), 0.3).tolist()
    for i, loss in enumerate(losses.tolist()):
        fits = [j == i or (ids[i] != ids[j] and bool(mask[i, j])) for j in range(6)]
        fits += mask[i, 6:].tolist()
        expected = _slow_softmax_loss(scores[i], i, [j for j in range(9) if fits[j]])
        if symmetric:
            column = [row[i] for row in scores]
            fits = [j == i or (ids[i] != ids[j] and bool(mask[j, i])) for j in range(6)]
            expected += _slow_softmax_loss(column, i, [j for j in range(6) if fits[j]])
            expected /= 2
        assert loss == pytest.approx(expected, rel=1e-12)


def test_in_batch_info_nce_is_torchs_cross_entropy_of_the_whole_matrix():
    queries, keys = _sides()
    logits, own = _cosines(queries, keys, 0.07), torch.arange(6)
    rows = F.cross_entropy(logits, own, reduction="none")
    columns = F.cross_entropy(logits.t(), own, reduction="none")
    torch.testing.assert_close(in_batch_info_nce(queries, keys), rows)
    torch.testing.assert_close(clip_loss(queries, keys), (rows + columns) / 2)


@pytest.mark.parametrize("ids", [None, torch.tensor([4, 4, 0, 1, 0, 2])])
def test_nt_xent_agrees_with_a_slow_loop(ids):
    first, second = _sides()
    scores = _cosines(*[torch.cat([first, second])] * 2, 0.5).tolist()
    losses = nt_xent(first, second, ids=ids)
    for view, i in itertools.product(range(2), range(6)):
        row, other = 6 * view + i, 6 * (1 - view) + i
        candidates = [
            j
            for j in range(12)
            if j == other or (j % 6 != i and (ids is None or ids[j % 6] != ids[i]))
        ]
        expected = _slow_softmax_loss(scores[row], other, candidates)
        assert losses[view, i].item() == pytest.approx(expected, rel=1e-12)


def test_siglip_is_the_sum_of_torchs_binary_cross_entropies():
    images, texts = (side.requires_grad_() for side in _sides())
    logits = _cosines(images, texts, 0.1) - 10.0
    each = F.binary_cross_entropy_with_logits(logits, torch.eye(6).double(), reduction="none")
    losses = siglip_loss(images, texts)
    torch.testing.assert_close(losses, each.sum(dim=1))
    for mine, its in zip(
        torch.autograd.grad(losses.sum(), (images, texts)),
        torch.autograd.grad(each.sum(), (images, texts)),
        strict=True,
    ):
        torch.testing.assert_close(mine, its)
    # the loss of the paper is a sum over pairs by the number of images
    paper = 0.0
    for i, j in itertools.product(range(6), range(6)):
        sign = 1 if i == j else -1
        paper -= math.log(1 / (1 + math.exp(-sign * logits[i, j].item()))) / 6
    assert losses.mean().item() == pytest.approx(paper, rel=1e-12)


def test_siglip_leaves_out_pairs_of_equal_ids():
    images, texts = _sides(4)
    ids = torch.tensor([0, 1, 0, 2])
    logits = _cosines(images, texts, 0.1) + 0.2
    each = F.binary_cross_entropy_with_logits(logits, torch.eye(4).double(), reduction="none")
    each[0, 2] = each[2, 0] = 0
    losses = siglip_loss(images, texts, bias=0.2, ids=ids)
    torch.testing.assert_close(losses, each.sum(dim=1))


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_supervised_contrastive_agrees_with_a_slow_loop(similarity):
    embeddings = _draw(6, 4)
    plain = embeddings @ embeddings.t() / 0.4
    scores = (plain if similarity == "dot" else _cosines(embeddings, embeddings, 0.4)).tolist()
    losses, mask = supervised_contrastive(
        embeddings, LABELS, temperature=0.4, similarity=similarity
    )
    for i, loss in enumerate(losses.tolist()):
        others = [j for j in range(6) if j != i]
        positives = [j for j in others if LABELS[j] == LABELS[i]]
        assert mask[i] == bool(positives)
        surprises = [_slow_softmax_loss(scores[i], p, others) for p in positives]
        expected = sum(surprises) / len(surprises) if surprises else 0.0
        assert loss == pytest.approx(expected, rel=1e-12)


def test_a_long_vector_does_not_drown_the_others_of_its_class():
    embeddings = torch.tensor([[3e5, 0.0], [0.7, 2.0], [0.3, 1.0], [0.9, -1.0]])
    labels = torch.tensor([0, 0, 1, 1])
    settings = {"temperature": 1.0, "similarity": "dot"}
    exact = supervised_contrastive(embeddings.double(), labels, **settings).values
    found = supervised_contrastive(embeddings, labels, **settings).values
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-6)


# laws


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("negatives", [False, True])
def test_the_symmetric_loss_is_the_mean_of_both_directions(negatives, similarity):
    queries, keys = _sides()
    ids = torch.tensor([0, 1, 0, 2, 3, 4])
    settings = {"temperature": 0.2, "ids": ids, "similarity": similarity}
    further = _draw(3, 4, seed=2) if negatives else None
    there = in_batch_info_nce(queries, keys, further, **settings)
    back = in_batch_info_nce(keys, queries, **settings)  # negatives are keys, not queries
    both = in_batch_info_nce(queries, keys, further, symmetric=True, **settings)
    torch.testing.assert_close(both, (there + back) / 2)


def test_clip_loss_is_symmetric_and_is_the_symmetric_loss():
    images, texts = _sides()
    ids = torch.tensor([0, 1, 0, 2, 3, 4])
    losses = clip_loss(images, texts, temperature=0.1, ids=ids)
    torch.testing.assert_close(losses, clip_loss(texts, images, temperature=0.1, ids=ids))
    expected = in_batch_info_nce(images, texts, temperature=0.1, symmetric=True, ids=ids)
    assert torch.equal(losses, expected)


@pytest.mark.parametrize("further", [0, 3])
def test_in_batch_negatives_listed_are_the_explicit_ones_of_info_nce(further):
    queries, keys = _sides()
    negatives = _draw(further, 4, seed=2)
    listed = torch.stack([torch.cat([keys[:i], keys[i + 1 :], negatives]) for i in range(6)])
    torch.testing.assert_close(
        in_batch_info_nce(queries, keys, negatives), info_nce(queries, keys, listed)
    )
    # and shared, with the own key masked
    shared = torch.cat([keys, negatives])
    mask = ~torch.eye(6, 6 + further, dtype=torch.bool)
    torch.testing.assert_close(
        in_batch_info_nce(queries, keys, negatives), info_nce(queries, keys, shared, mask=mask)
    )


def test_nt_xent_is_supervised_contrastive_with_each_label_twice():
    first, second = (side.requires_grad_() for side in _sides())
    losses = nt_xent(first, second, temperature=0.2)
    labels = torch.arange(6).repeat(2)
    found, mask = supervised_contrastive(torch.cat([first, second]), labels, temperature=0.2)
    assert mask.all()
    torch.testing.assert_close(losses, found.view(2, 6))
    for mine, its in zip(
        torch.autograd.grad(losses.square().sum(), (first, second)),
        torch.autograd.grad(found.square().sum(), (first, second)),
        strict=True,
    ):
        torch.testing.assert_close(mine, its)


def test_the_two_views_have_equal_roles():
    first, second = _sides()
    torch.testing.assert_close(nt_xent(second, first), nt_xent(first, second).flip(0))


@pytest.mark.parametrize("symmetric", [False, True])
def test_equal_ids_are_a_mask_and_the_own_key_always_counts(symmetric):
    queries, keys = _sides()
    ids = torch.tensor([7, -2, 7, 0, -2, 7])
    mask = ids.unsqueeze(1) != ids  # denies the own key as well
    by_ids = in_batch_info_nce(queries, keys, symmetric=symmetric, ids=ids)
    by_mask = in_batch_info_nce(queries, keys, symmetric=symmetric, mask=mask)
    torch.testing.assert_close(by_ids, by_mask)
    nobody = torch.zeros_like(mask)
    losses = in_batch_info_nce(queries, keys, symmetric=symmetric, mask=nobody)
    torch.testing.assert_close(losses, torch.zeros_like(losses), rtol=0, atol=1e-14)


def test_the_same_pair_twice_under_one_id_costs_as_much_as_once():
    queries, keys = _sides(4)
    again = torch.tensor([0, 1, 2, 3, 1])
    losses = in_batch_info_nce(queries[again], keys[again], ids=again)
    once = in_batch_info_nce(queries, keys)
    torch.testing.assert_close(losses[[1, 4]], once[[1, 1]])
    # without ids it is its own negative
    assert in_batch_info_nce(queries[again], keys[again])[1] > math.log(2)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.int64], ids=str)
def test_ids_of_any_kind_leave_further_negatives_to_all(dtype):
    queries, keys = _sides(3)
    negatives = _draw(2, 4, seed=2)
    ids = torch.tensor([0, 255, 0]).to(dtype)  # one less than 0 is 255 in eight bits
    mask = torch.tensor([[1, 1, 0, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]]).bool()
    torch.testing.assert_close(
        in_batch_info_nce(queries, keys, negatives, ids=ids),
        in_batch_info_nce(queries, keys, negatives, mask=mask),
    )


@pytest.mark.parametrize("name", sorted(LOSSES.keys() - {"supervised_contrastive"}))
def test_exchanging_examples_exchanges_their_losses(name):
    first, second = _sides()
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    losses = LOSSES[name](first, second)
    if name == "with negatives":
        turned = in_batch_info_nce(first[order], second[order], first.flip(0) + 2 * second)
    else:
        turned = LOSSES[name](first[order], second[order])
    torch.testing.assert_close(turned, losses[..., order])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8], ids=str)
def test_only_which_labels_are_equal_matters(dtype):
    embeddings = _draw(6, 4)
    losses, mask = supervised_contrastive(embeddings, LABELS)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    turned, turned_mask = supervised_contrastive(embeddings[order], LABELS[order].to(dtype))
    torch.testing.assert_close(turned, losses[order])
    assert torch.equal(turned_mask, mask[order])
    renamed = torch.tensor([-(2**62), 2**62, -(2**62), 0, 2**62, -(2**62)])
    torch.testing.assert_close(supervised_contrastive(embeddings, renamed).values, losses)


def test_positives_that_share_the_probability_leave_the_logarithm_of_their_number():
    embeddings = torch.eye(3).repeat_interleave(4, dim=0)
    labels = torch.arange(3).repeat_interleave(4)
    losses, _ = supervised_contrastive(embeddings, labels, temperature=0.02)
    torch.testing.assert_close(losses, torch.full((12,), math.log(3)))
    drawn, mask = supervised_contrastive(_draw(40, 3), torch.arange(40) % 10)
    assert (drawn[mask] > math.log(3)).all()


@every_loss
def test_derivatives_match_finite_differences(name):
    first, second = (side.requires_grad_() for side in _sides())
    temperature = torch.tensor(0.4, dtype=DOUBLE, requires_grad=True)

    def loss(first, second, temperature):
        return LOSSES[name](first, second, temperature=temperature)

    assert torch.autograd.gradcheck(loss, (first, second, temperature))


def test_derivatives_with_ids_masks_and_a_learned_bias_match_finite_differences():
    first, second, third = (_draw(4, 3, seed=seed).requires_grad_() for seed in range(3))
    ids = torch.tensor([0, 1, 0, 2])
    mask = torch.rand(4, 8, generator=torch.Generator().manual_seed(0)) < 0.7
    bias = torch.tensor(-0.7, dtype=DOUBLE, requires_grad=True)
    for symmetric in (False, True):

        def loss(*sides, symmetric=symmetric):
            return in_batch_info_nce(
                *sides, temperature=0.5, symmetric=symmetric, ids=ids, mask=mask, similarity="dot"
            )

        assert torch.autograd.gradcheck(loss, (first, second, third))
    assert torch.autograd.gradcheck(
        lambda a, b, c: siglip_loss(a, b, bias=c, ids=ids), (first, second, bias)
    )
    assert torch.autograd.gradcheck(lambda a, b: nt_xent(a, b, ids=ids), (first, second))


@every_loss
def test_second_derivatives_are_refused_in_tiles_and_formed_under_transforms(name):
    first, second = _sides(4, 2)
    tracked = first.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(
        LOSSES[name](tracked, second).sum(), tracked, create_graph=True
    )
    with pytest.raises(RuntimeError, match="second derivatives"):
        gradient.sum().backward()

    def slope(vectors):
        return torch.func.grad(lambda v: LOSSES[name](v, second, temperature=0.5).sum())(vectors)

    found = torch.func.jacrev(slope)(first)
    for place in [(0, 0), (3, 1)]:
        step = torch.zeros_like(first)
        step[place] = 1e-5
        differences = (slope(first + step) - slope(first - step)) / 2e-5
        torch.testing.assert_close(found[:, :, *place], differences, rtol=1e-5, atol=1e-6)


def test_losses_fall_to_nought_and_never_below_it():
    vectors = torch.eye(6).repeat(1, 2)
    for loss in (in_batch_info_nce, clip_loss, nt_xent):
        losses = loss(vectors, 7 * vectors, temperature=0.01)
        assert (losses >= 0).all() and (losses < 1e-4).all()


@pytest.mark.parametrize("size", [1e30, 1e-30])
@every_loss
def test_cosines_do_not_depend_on_the_size_of_vectors_nor_overflow(name, size):
    first, second = (side.float() for side in _sides())
    large = [(size * side).requires_grad_() for side in (first, second)]
    if name == "with negatives":
        found = in_batch_info_nce(*large, large[0].flip(0) + 2 * large[1])
    else:
        found = LOSSES[name](*large)
    torch.testing.assert_close(found, LOSSES[name](first, second), rtol=2e-5, atol=1e-6)
    for gradient in torch.autograd.grad(found.sum(), large):
        assert gradient.isfinite().all() and (gradient != 0).any()


# precision, devices, strides


@HALVES
@every_loss
def test_half_precision_at_a_temperature_of_a_hundredth_is_computed_in_float32(name, half):
    first, second = (side.to(half) for side in _sides(6, 16))
    if name in ("with negatives", "supervised_contrastive"):  # a sum would be rounded to half
        first, second = (first / 2).to(half), torch.zeros_like(second)
        negatives = _draw(6, 16, seed=3).to(half)
        losses = {
            "with negatives": lambda a, b: in_batch_info_nce(
                a, a.roll(1, 0), negatives.to(a.dtype), temperature=0.01
            ),
            "supervised_contrastive": lambda a, b: (
                supervised_contrastive(a, LABELS, temperature=0.01).values
            ),
        }[name]
    else:

        def losses(a, b):
            return LOSSES[name](a, b, temperature=0.01)

    exact = losses(first.double(), second.double())
    assert exact.max() > 20
    tracked = first.clone().requires_grad_()
    found = losses(tracked, second)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=2e-6, atol=4e-5)
    (gradient,) = torch.autograd.grad(found.sum(), tracked)
    assert gradient.dtype == half and gradient.isfinite().all()


@every_loss
def test_autocast_does_not_round_the_scores(name):
    first, second = (side.float() for side in _sides(6, 16))
    expected = LOSSES[name](first, second, temperature=0.01)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = LOSSES[name](first, second, temperature=0.01)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("finer", range(3))
def test_of_several_precisions_the_finest_is_used(finer):
    vectors = [_draw(5, 3, seed=seed).float() for seed in range(3)]
    exact = in_batch_info_nce(*(tensor.double() for tensor in vectors))
    mixed = [tensor.double() if i == finer else tensor for i, tensor in enumerate(vectors)]
    found = in_batch_info_nce(*mixed)
    assert found.dtype == DOUBLE
    torch.testing.assert_close(found, exact, rtol=1e-13, atol=1e-13)
    if finer < 2:
        for loss in (clip_loss, nt_xent, siglip_loss):
            expected = loss(*(tensor.double() for tensor in vectors[:2]))
            torch.testing.assert_close(loss(*mixed[:2]), expected, rtol=1e-13, atol=1e-13)


@every_loss
def test_strides_do_not_matter(name):
    sides = _sides()
    strided = [
        torch.stack([side, torch.full_like(side, math.nan)], dim=-1)[..., 0] for side in sides
    ]
    assert not any(side.is_contiguous() for side in strided)
    torch.testing.assert_close(
        LOSSES[name](*strided), LOSSES[name](*sides), rtol=1e-12, atol=1e-13
    )


@every_loss
def test_runs_forward_and_backward_without_reading_a_value(name):
    sides = [side.float().to("meta").requires_grad_() for side in _sides()]
    temperature = torch.tensor(0.1, device="meta", requires_grad=True)
    losses = LOSSES[name](*sides, temperature=temperature)
    assert losses.device.type == "meta" and losses.shape[-1] == 6
    gradients = torch.autograd.grad(losses.sum(), [*sides, temperature])
    assert [g.shape for g in gradients] == [v.shape for v in [*sides, temperature]]


def test_ids_masks_and_negatives_run_without_reading_a_value():
    sides = [side.float().to("meta").requires_grad_() for side in _sides()]
    ids = torch.zeros(6, dtype=torch.long, device="meta")
    mask = torch.zeros(6, 12, dtype=torch.bool, device="meta")
    for symmetric in (False, True):
        losses = in_batch_info_nce(*sides, sides[0], symmetric=symmetric, ids=ids, mask=mask)
        assert len(torch.autograd.grad(losses.sum(), sides)) == 2
    bias = torch.tensor(0.1, device="meta", requires_grad=True)
    torch.autograd.grad(siglip_loss(*sides, bias=bias, ids=ids).sum(), [*sides, bias])
    torch.autograd.grad(nt_xent(*sides, ids=ids).sum(), sides)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@every_loss
def test_never_waits_for_the_gpu_and_agrees_with_the_cpu(name):
    sides = _sides()
    expected = LOSSES[name](*sides, temperature=0.2)
    labels = LABELS.cuda()
    loss = LOSSES[name]
    if name == "supervised_contrastive":  # its labels are moved beforehand

        def loss(a, b, **settings):
            return supervised_contrastive(a + 2 * b, labels, **settings).values

    moved = [side.cuda().requires_grad_() for side in sides]
    temperature = torch.tensor(0.2, device="cuda", dtype=DOUBLE, requires_grad=True)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = loss(*moved, temperature=temperature)
        torch.autograd.grad(found.sum(), [*moved, temperature])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(found.cpu(), expected)


@every_loss
def test_no_matrix_of_scores_is_kept_for_the_backward_pass(name):
    sizes = []

    def note(tensor):
        sizes.append(tensor.numel())
        return tensor

    batch = 400
    sides = [side.float().requires_grad_() for side in _sides(batch, 3)]
    loss = LOSSES[name]
    if name == "supervised_contrastive":

        def loss(a, b):
            return supervised_contrastive(a + 2 * b, torch.arange(batch) % 7).values

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        total = loss(*sides).sum()
    total.backward()
    # two sides, a few numbers for each; their scores would be 400 times 400
    assert 0 < max(sizes) <= 20 * batch


@pytest.mark.compiles
def test_compiles_into_one_graph():
    for loss in (in_batch_info_nce, clip_loss, nt_xent, siglip_loss):
        compiled = torch.compile(loss, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(*_sides()), loss(*_sides()))
    compiled = torch.compile(supervised_contrastive, fullgraph=True, backend="eager")
    embeddings = _draw(6, 4)
    torch.testing.assert_close(
        compiled(embeddings, LABELS).values, supervised_contrastive(embeddings, LABELS).values
    )


@every_loss
def test_arguments_are_left_as_they_were(name):
    sides = _sides()
    copies = [side.clone() for side in sides]
    LOSSES[name](*sides)
    assert all(torch.equal(side, copy) for side, copy in zip(sides, copies, strict=True))


# a process group


@pytest.fixture
def alone(tmp_path):
    """A group of this process only."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_a_group_of_one_rank_is_as_none(alone):
    sides = [side.requires_grad_() for side in _sides()]
    ids = torch.tensor([0, 1, 0, 2, 3, 4])
    negatives = _draw(3, 4, seed=2)
    for loss in (
        in_batch_info_nce,
        LOSSES["symmetric"],
        lambda *pair, **kw: in_batch_info_nce(*pair, negatives, symmetric=True, **kw),
        clip_loss,
        siglip_loss,
    ):
        for settings in ({}, {"ids": ids}):
            expected, found = loss(*sides, **settings), loss(*sides, **settings, group=alone)
            torch.testing.assert_close(found, expected)
            for mine, its in zip(
                torch.autograd.grad(found.square().sum(), sides),
                torch.autograd.grad(expected.square().sum(), sides),
                strict=True,
            ):
                torch.testing.assert_close(mine, its)


@pytest.mark.parametrize("dtype", [torch.int16, torch.uint8, torch.int32], ids=str)
def test_ids_of_any_kind_are_sent_to_a_group(alone, dtype):
    sides, ids = _sides(4), torch.tensor([0, 1, 0, 2])
    for loss in (clip_loss, siglip_loss):
        found = loss(*sides, ids=ids.to(dtype), group=alone)
        torch.testing.assert_close(found, loss(*sides, ids=ids))


def test_no_pair_on_any_rank_is_refused(alone):
    for loss in (in_batch_info_nce, clip_loss, siglip_loss):
        with pytest.raises(ValueError, match="at least one entry along axis 0"):
            loss(torch.ones(0, 3), torch.ones(0, 3), group=alone)


def test_a_mask_is_refused_in_a_group(alone):
    with pytest.raises(ValueError, match="mask must be None with a group of ranks"):
        in_batch_info_nce(*_sides(), mask=torch.ones(6, 6, dtype=torch.bool), group=alone)


# errors


@pytest.mark.bad_input
def test_the_two_sides_must_be_as_many_rows_of_one_width():
    for second in (torch.ones(3, 3), torch.ones(2, 4)):
        for loss, first_name, second_name in (
            (in_batch_info_nce, "queries", "keys"),
            (clip_loss, "images", "texts"),
            (nt_xent, "first", "second"),
            (siglip_loss, "images", "texts"),
        ):
            with pytest.raises(
                ValueError,
                match=rf"{second_name} must have shape \(2, 3\), the shape of {first_name}; got",
            ):
                loss(torch.ones(2, 3), second)


@pytest.mark.bad_input
@pytest.mark.parametrize("loss", [in_batch_info_nce, clip_loss, nt_xent, siglip_loss])
def test_what_losses_of_a_batch_refuse(loss):
    good = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"must have 2 axes; got shape \(3,\)"):
        loss(good[0], good[0])
    with pytest.raises(ValueError, match=r"at least one entry along axis 0; got shape \(0, 3\)"):
        loss(good[:0], good[:0])
    with pytest.raises(ValueError, match="at least one entry along axis -1"):
        loss(good[:, :0], good[:, :0])
    with pytest.raises(TypeError, match="must be a floating-point tensor; got torch.int64"):
        loss(good, good.long())
    with pytest.raises(TypeError, match="must be a torch.Tensor; got list"):
        loss([1.0], good)
    with pytest.raises(TypeError, match="ids must be a torch.Tensor; got list"):
        loss(good, good, ids=[0, 1])
    with pytest.raises(TypeError, match="ids must be an integer tensor; got torch.float32"):
        loss(good, good, ids=torch.zeros(2))
    with pytest.raises(ValueError, match=r"ids must have shape \(2,\), one entry per pair; got"):
        loss(good, good, ids=torch.zeros(3, dtype=torch.long))
    for wrong, problem in ((0.0, "positive"), (-1.0, "positive"), (math.nan, "finite")):
        for temperature in (wrong, torch.tensor(wrong)):
            with pytest.raises(ValueError, match=f"temperature must be {problem}; got"):
                loss(good, good, temperature=temperature)
    with pytest.raises(ValueError, match="temperature must have shape"):
        loss(good, good, temperature=torch.ones(1))


@pytest.mark.parametrize("loss", [in_batch_info_nce, clip_loss, nt_xent, siglip_loss])
@pytest.mark.parametrize("side", range(2))
def test_vectors_without_a_direction_are_refused_by_name(loss, side):
    names = {
        in_batch_info_nce: ("queries", "keys"), clip_loss: ("images", "texts"),
        nt_xent: ("first", "second"), siglip_loss: ("images", "texts"),
    }  # fmt: skip
    name = names[loss][side]
    for wrong, problem in ((0.0, r"have no zero vector.*index \(1,\)"), (math.inf, "be finite")):
        sides = [torch.ones(2, 3), torch.ones(2, 3)]
        sides[side][1] = wrong
        with pytest.raises(ValueError, match=f"{name} must {problem}"):
            loss(*sides)


def test_zero_vectors_have_dot_products():
    first = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    for loss in (in_batch_info_nce, nt_xent):
        assert loss(first, first, similarity="dot").isfinite().all()
    losses, _ = supervised_contrastive(first, torch.tensor([0, 0]), similarity="dot")
    assert losses.tolist() == [0.0, 0.0]


@pytest.mark.bad_input
def test_what_further_negatives_and_masks_refuse():
    good = torch.ones(2, 3)
    for wrong in (torch.ones(4, 2), torch.ones(1, 2)):
        with pytest.raises(ValueError, match=r"negatives must have shape \(., 3\), with the axis"):
            in_batch_info_nce(good, good, wrong)
    with pytest.raises(ValueError, match=r"negatives must have 2 axes; got shape \(2, 4, 3\)"):
        in_batch_info_nce(good, good, torch.ones(2, 4, 3))
    with pytest.raises(TypeError, match="negatives must be a torch.Tensor; got list"):
        in_batch_info_nce(good, good, [1.0])
    with pytest.raises(ValueError, match="negatives must have no zero vector"):
        in_batch_info_nce(good, good, torch.zeros(1, 3))
    with pytest.raises(ValueError, match="negatives must be on cpu, the device of queries"):
        in_batch_info_nce(good, good, torch.ones(1, 3, device="meta"))
    for further, width in ((None, 2), (torch.ones(1, 3), 3)):
        with pytest.raises(ValueError, match=rf"mask must have shape \(2, {width}\), one entry"):
            in_batch_info_nce(good, good, further, mask=torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(TypeError, match="mask must be a boolean tensor"):
        in_batch_info_nce(good, good, mask=torch.ones(2, 2))
    with pytest.raises(ValueError, match="similarity must be 'cosine' or 'dot'; got 'l2'"):
        in_batch_info_nce(good, good, similarity="l2")
    with pytest.raises(ValueError, match="keys must be on cpu, the device of queries; got meta"):
        in_batch_info_nce(good, torch.ones(2, 3, device="meta"))


@pytest.mark.bad_input
def test_a_bias_must_be_one_finite_number():
    good = torch.ones(2, 3)
    with pytest.raises(TypeError, match="bias must be a real number; got str"):
        siglip_loss(good, good, bias="0")
    with pytest.raises(ValueError, match="bias must be finite; got nan"):
        siglip_loss(good, good, bias=math.nan)
    with pytest.raises(ValueError, match=r"bias must have shape \(\), one number; got \(1,\)"):
        siglip_loss(good, good, bias=torch.zeros(1))


@pytest.mark.bad_input
def test_what_supervised_contrastive_refuses():
    good, labels = torch.ones(2, 3), torch.tensor([0, 0])
    with pytest.raises(ValueError, match=r"labels must have shape \(2,\), one entry per example"):
        supervised_contrastive(good, labels[:1])
    with pytest.raises(TypeError, match="labels must be an integer tensor; got torch.float32"):
        supervised_contrastive(good, labels.float())
    with pytest.raises(TypeError, match="labels must be a torch.Tensor; got list"):
        supervised_contrastive(good, [0, 0])
    with pytest.raises(ValueError, match="labels must be on cpu, the device of embeddings"):
        supervised_contrastive(good, labels.to("meta"))
    with pytest.raises(ValueError, match="embeddings must have 2 axes"):
        supervised_contrastive(good[0], labels)
    with pytest.raises(ValueError, match="embeddings must have at least one entry along axis 0"):
        supervised_contrastive(good[:0], labels[:0])
    with pytest.raises(ValueError, match=r"embeddings must have no zero vector.*index \(0,\)"):
        supervised_contrastive(torch.zeros(2, 3), labels)
    with pytest.raises(ValueError, match="temperature must be positive; got 0"):
        supervised_contrastive(good, labels, temperature=0)
    with pytest.raises(ValueError, match="similarity must be 'cosine' or 'dot'; got 'l2'"):
        supervised_contrastive(good, labels, similarity="l2")

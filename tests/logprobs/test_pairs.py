"""Statistics of pairs: against all scores, over one axis and both, never holding them."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from lmlosses.logprobs import PairStats, pair_stats, tiling
from tests.logprobs.test_chunked import LiveMemory

DOUBLE = torch.float64
COUNT, DIM = 11, 4
# a rounding step of float64 is 2e-16; the worst mistake to catch here is a term left out
EXACT = {"rtol": 1e-12, "atol": 1e-12}

both = pytest.mark.parametrize("implementation", ["reference", "chunked"])


def _generator(seed):
    return torch.Generator().manual_seed(seed)


def _normal(*shape, seed=0, dtype=DOUBLE):
    return torch.randn(*shape, generator=_generator(seed), dtype=DOUBLE).to(dtype)


def _inputs(queries=COUNT, keys=COUNT, dtype=DOUBLE):
    """Queries and keys, which want their gradient."""
    tensors = 2 * _normal(queries, DIM), _normal(keys, DIM, seed=1)
    return [tensor.to(dtype).requires_grad_() for tensor in tensors]


def _targets(queries=COUNT, keys=COUNT):
    return torch.randint(keys, (queries,), generator=_generator(2))


def _ids(queries=COUNT, keys=COUNT):
    return {"query_ids": torch.arange(queries) % 5, "key_ids": torch.arange(keys) % 4}


def _mask(queries=COUNT, keys=COUNT):
    return torch.rand(queries, keys, generator=_generator(3)) < 0.7


def _present(stats):
    return [value for value in stats if value is not None]


def _weighted(values, seed=9):
    """A scalar to which each finite value contributes differently."""
    total = 0.0
    for place, value in enumerate(values):
        weights = _normal(*value.shape, seed=seed + place, dtype=value.dtype).to(value.device)
        total = total + (value.masked_fill(value.isinf(), 0.0) * weights).sum()
    return total


def _values_and_gradients(stats, inputs):
    values = _present(stats)
    return values, torch.autograd.grad(_weighted(values), inputs)


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(tiling, "_TILE_ROWS", 4)
    monkeypatch.setattr(tiling, "_LEAST_COLUMNS", 3)


SETTINGS = {
    " and ".join(name for name, on in zip(("ids", "mask"), chosen, strict=True) if on)
    or "plain": {
        **(_ids() if chosen[0] else {}),
        **({"mask": _mask()} if chosen[1] else {}),
    }
    for chosen in itertools.product([False, True], repeat=2)
}
settings_of = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)


# values known by hand


@both
@pytest.mark.parametrize("count", [1, 2, 7, 1000])
def test_equal_scores_give_minus_the_logarithm_of_the_number_of_candidates(implementation, count):
    found = pair_stats(
        torch.zeros(count, 2), torch.ones(count, 2), torch.arange(count),
        by_key=True, implementation=implementation,
    )  # fmt: skip
    expected = torch.full((count,), math.log(count))
    torch.testing.assert_close(found, PairStats(-expected, expected, -expected, expected))


@both
def test_rows_and_columns_of_two_by_two_by_hand(implementation):
    # scores [[log 3, 0], [log 2, log 6]]
    queries = torch.tensor([[3.0, 1.0], [2.0, 6.0]], dtype=DOUBLE).log()
    found = pair_stats(
        queries, torch.eye(2, dtype=DOUBLE), torch.arange(2),
        by_key=True, implementation=implementation,
    )  # fmt: skip
    expected = [[3 / 4, 6 / 8], [4, 8], [3 / 5, 6 / 7], [5, 7]]
    torch.testing.assert_close(
        torch.stack(found), torch.tensor(expected, dtype=DOUBLE).log(), **EXACT
    )


@both
def test_a_pair_of_equal_ids_is_no_candidate_unless_it_is_the_targets(implementation):
    found = pair_stats(
        torch.zeros(3, 1, dtype=DOUBLE), torch.zeros(3, 1, dtype=DOUBLE), torch.arange(3),
        by_key=True, query_ids=torch.tensor([7, 7, 9]), key_ids=torch.tensor([7, 7, 9]),
        implementation=implementation,
    )  # fmt: skip
    counts = torch.tensor([2.0, 2.0, 3.0], dtype=DOUBLE).log()
    torch.testing.assert_close(found, PairStats(-counts, counts, -counts, counts), **EXACT)


def test_what_is_not_asked_for_is_none():
    found = pair_stats(torch.zeros(2, 3), torch.zeros(4, 3), torch.tensor([0, 3]))
    assert found.key_logps is None
    assert found.key_log_normalizer is None


# agreement with something independent


def _by_hand(scores, targets, settings, keeps):
    """Log-probability and log-normalizer of each row, from sums in plain Python."""
    found = []
    for i, row in enumerate(scores.tolist()):
        candidates = [
            j
            for j in range(len(row))
            if (keeps and j == targets[i])
            or (
                ("mask" not in settings or settings["mask"][i, j])
                and ("query_ids" not in settings
                     or settings["query_ids"][i] != settings["key_ids"][j])
            )
        ]  # fmt: skip
        if not candidates:
            found.append((-math.inf, -math.inf))
            continue
        top = max(row[j] for j in candidates)
        normalizer = top + math.log(math.fsum(math.exp(row[j] - top) for j in candidates))
        target = int(targets[i])
        found.append((row[target] - normalizer if target in candidates else -math.inf, normalizer))
    return torch.tensor(found, dtype=DOUBLE).unbind(1)


def _turned(settings):
    """The same exclusions seen from the keys."""
    turned = {"mask": settings["mask"].t()} if "mask" in settings else {}
    if "query_ids" in settings:
        turned |= {"query_ids": settings["key_ids"], "key_ids": settings["query_ids"]}
    return turned


@both
@settings_of
@pytest.mark.parametrize("given", [True, False])
def test_statistics_agree_with_sums_in_plain_python(implementation, settings, given):
    queries, keys = _inputs()
    own = torch.arange(COUNT)
    found = pair_stats(
        queries, keys, own if given else None,
        by_key=True, implementation=implementation, **settings,
    )  # fmt: skip
    scores = (queries @ keys.t()).detach()
    expected = (
        *_by_hand(scores, own, settings, given),
        *_by_hand(scores.t(), own, _turned(settings), given),
    )
    torch.testing.assert_close(tuple(found), expected, **EXACT)


@both
@pytest.mark.parametrize("count", [3, COUNT, 40])
def test_statistics_and_their_gradients_agree_with_torch(implementation, count):
    inputs, targets = _inputs(COUNT, count), _targets(COUNT, count)
    found = pair_stats(*inputs, targets, implementation=implementation)
    scores = inputs[0] @ inputs[1].t()
    expected = PairStats(
        -F.cross_entropy(scores, targets, reduction="none"), scores.logsumexp(dim=1), None, None
    )
    torch.testing.assert_close(
        _values_and_gradients(found, inputs), _values_and_gradients(expected, inputs), **EXACT
    )


@both
@pytest.mark.parametrize("count", [1, 2, COUNT, 40])
def test_both_directions_and_their_gradients_agree_with_two_of_torchs(
    implementation, count, small_tiles
):
    inputs, own = _inputs(count, count), torch.arange(count)
    found = pair_stats(*inputs, own, by_key=True, implementation=implementation, workspace=1)
    scores = inputs[0] @ inputs[1].t()
    expected = PairStats(
        -F.cross_entropy(scores, own, reduction="none"), scores.logsumexp(dim=1),
        -F.cross_entropy(scores.t(), own, reduction="none"), scores.logsumexp(dim=0),
    )  # fmt: skip
    torch.testing.assert_close(
        _values_and_gradients(found, inputs), _values_and_gradients(expected, inputs), **EXACT
    )


@settings_of
@pytest.mark.parametrize("by_key", [False, True])
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("workspace", [1, 2**26])
def test_chunked_statistics_and_their_gradients_are_the_references(
    settings, by_key, given, workspace, small_tiles
):
    inputs = _inputs()
    own = torch.arange(COUNT) if by_key else _targets()
    found, expected = (
        pair_stats(
            *inputs, own if given else None, by_key=by_key, workspace=workspace,
            implementation=implementation, **settings,
        )
        for implementation in ("chunked", "reference")
    )  # fmt: skip
    torch.testing.assert_close(
        _values_and_gradients(found, inputs), _values_and_gradients(expected, inputs), **EXACT
    )


@pytest.mark.parametrize("queries", [0, 1, 3, 17])
@pytest.mark.parametrize("keys", [1, 2, 9, 33])
def test_there_may_be_more_queries_than_keys_or_fewer(queries, keys, small_tiles):
    inputs, targets = _inputs(queries, keys), _targets(queries, keys)
    settings = {**_ids(queries, keys), "mask": _mask(queries, keys), "workspace": 1}
    found, expected = (
        pair_stats(*inputs, targets, implementation=implementation, **settings)
        for implementation in ("chunked", "reference")
    )
    torch.testing.assert_close(
        _values_and_gradients(found, inputs), _values_and_gradients(expected, inputs), **EXACT
    )
    assert found.logps.shape == (queries,)


@both
@settings_of
@pytest.mark.parametrize("by_key", [False, True])
def test_gradients_agree_with_finite_differences(implementation, settings, by_key, small_tiles):
    own = torch.arange(COUNT)

    def statistics(queries, keys):
        return tuple(
            _present(
                pair_stats(
                    queries, keys, own, by_key=by_key, workspace=1,
                    implementation=implementation, **settings,
                )
            )
        )  # fmt: skip

    assert torch.autograd.gradcheck(statistics, _inputs(), fast_mode=True)


@pytest.mark.parametrize("used", list(itertools.product([False, True], repeat=4))[1:])
def test_a_statistic_that_is_not_used_adds_nothing_to_the_gradient(used):
    inputs, own = _inputs(), torch.arange(COUNT)
    gradients = []
    for implementation in ("chunked", "reference"):
        stats = pair_stats(*inputs, own, by_key=True, implementation=implementation, **_ids())
        some = [value for value, u in zip(stats, used, strict=True) if u]
        gradients.append(torch.autograd.grad(_weighted(some), inputs))
    torch.testing.assert_close(*gradients, **EXACT)


@pytest.mark.parametrize("wanting", [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("by_key", [False, True])
def test_only_the_inputs_that_want_a_gradient_get_one(wanting, by_key):
    inputs, own = _inputs(), torch.arange(COUNT)
    stats = pair_stats(*inputs, own, by_key=by_key)
    expected = torch.autograd.grad(_weighted(_present(stats)), inputs)
    some = [t.detach().requires_grad_(w) for t, w in zip(inputs, wanting, strict=True)]
    stats = pair_stats(*some, own, by_key=by_key)
    assert stats.logps.requires_grad == any(wanting)
    if any(wanting):
        _weighted(_present(stats)).backward()
    for tensor, wanted, gradient in zip(some, wanting, expected, strict=True):
        assert (tensor.grad is not None) == wanted
        if wanted:
            torch.testing.assert_close(tensor.grad, gradient, **EXACT)


# laws


@both
def test_a_common_vector_added_to_all_keys_moves_the_normalizers_alone(implementation):
    queries, keys = (tensor.detach() for tensor in _inputs())
    settings = {"by_key": False, "implementation": implementation}
    plain = pair_stats(queries, keys, _targets(), **settings)
    moved = pair_stats(queries, keys + 100.0, _targets(), **settings)
    torch.testing.assert_close(moved.logps, plain.logps, rtol=1e-10, atol=1e-10)
    by = 100.0 * queries.sum(dim=1)
    torch.testing.assert_close(moved.log_normalizer, plain.log_normalizer + by)


@both
@pytest.mark.parametrize("by_key", [False, True])
def test_a_small_loss_keeps_its_digits_among_scores_of_ten_thousand(implementation, by_key):
    # every score is exact: 10,000, and 10,010 where query and key belong together
    count = 8
    common = torch.full((count, 1), 100.0)
    queries = torch.cat([common, 10 * torch.eye(count)], dim=1).requires_grad_()
    keys = torch.cat([common, torch.eye(count)], dim=1).requires_grad_()
    stats = pair_stats(
        queries, keys, torch.arange(count), by_key=by_key, implementation=implementation
    )
    true = math.log1p((count - 1) * math.exp(-10))  # 3e-4; a step at 10,000 is 1e-3
    for logps in (stats.logps, stats.key_logps) if by_key else (stats.logps,):
        torch.testing.assert_close(-logps, torch.full((count,), true), rtol=1e-3, atol=0)
    wrong = math.exp(-10 - true)
    (by_queries,) = torch.autograd.grad(-stats.logps.sum(), queries)
    expected = wrong * (1 - count * torch.eye(count))
    torch.testing.assert_close(by_queries[:, 1:], expected, rtol=1e-3, atol=0)


@both
@pytest.mark.parametrize("by_key", [False, True])
@pytest.mark.parametrize("where", ["everywhere", "in one row"])
def test_a_query_without_candidates_is_minus_infinity_with_gradient_zero(
    implementation, by_key, where, small_tiles
):
    mask = torch.zeros(COUNT, COUNT, dtype=torch.bool)
    if where == "in one row":
        mask[1:, 1:] = True
    inputs = _inputs()
    stats = pair_stats(
        *inputs, by_key=by_key, mask=mask, implementation=implementation, workspace=1
    )
    alone = ~mask.any(dim=1)
    for value in _present(stats):
        assert (value[alone] == -math.inf).all()
    for value in (stats.log_normalizer, stats.key_log_normalizer) if by_key else ():
        assert value[~alone].isfinite().all()
    # as a user would write it, who multiplies by what counts
    total = sum(value.masked_fill(value == -math.inf, 0.0).sum() for value in _present(stats))
    for gradient in torch.autograd.grad(total, inputs):
        assert gradient.isfinite().all()
        assert not gradient[alone].any()


@both
def test_a_log_probability_of_minus_infinity_passes_no_gradient_on(implementation, small_tiles):
    mask = _mask()
    mask[2] = mask[:, 4] = False  # one without candidates
    inputs = _inputs()
    stats = pair_stats(*inputs, by_key=True, mask=mask, implementation=implementation, workspace=1)
    for logps in (stats.logps, stats.key_logps):
        there = logps > -math.inf
        assert 1 < there.sum() < COUNT - 1
        found = torch.autograd.grad(logps.sum(), inputs, retain_graph=True)
        expected = torch.autograd.grad(logps[there].sum(), inputs, retain_graph=True)
        torch.testing.assert_close(found, expected, **EXACT)
        assert all(gradient.isfinite().all() for gradient in found)


def test_ids_say_the_same_as_a_mask_and_may_be_any_kind_of_whole_number():
    inputs, own, ids = _inputs(), torch.arange(COUNT), _ids()
    differ = ids["query_ids"].unsqueeze(1) != ids["key_ids"]
    expected = pair_stats(*inputs, own, by_key=True, mask=differ)
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
        narrow = {"query_ids": ids["query_ids"].to(dtype), "key_ids": ids["key_ids"]}
        found = pair_stats(*inputs, own.to(dtype), by_key=True, **narrow)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("by_key", [False, True])
def test_half_precision_gives_float32_values_exact_for_the_rounded_inputs(
    implementation, dtype, by_key
):
    inputs, own = _inputs(dtype=dtype), torch.arange(COUNT)
    settings = {"by_key": by_key, "implementation": implementation, **_ids()}
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    values, gradients = _values_and_gradients(pair_stats(*inputs, own, **settings), inputs)
    expected, true = _values_and_gradients(pair_stats(*exact, own, **settings), exact)
    for value, other in zip(values, expected, strict=True):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), other, rtol=2e-6, atol=2e-6)
    for gradient, other in zip(gradients, true, strict=True):
        assert gradient.dtype == dtype
        error = (gradient.double() - other).abs().max() / other.abs().max()
        assert error < (1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps)


@pytest.mark.parametrize("by_key", [False, True])
def test_vectors_may_lie_in_memory_as_they_like(by_key):
    inputs, own = _inputs(), torch.arange(COUNT)
    expected = _values_and_gradients(pair_stats(*inputs, own, by_key=by_key), inputs)
    strided = [t.detach().t().contiguous().t().requires_grad_() for t in inputs]
    wide = [t.detach().repeat_interleave(2, dim=1)[:, ::2].requires_grad_() for t in inputs]
    once = [t.detach()[:1].expand(COUNT, DIM).requires_grad_() for t in inputs]
    for some in (strided, wide):
        assert not some[0].is_contiguous()
        found = _values_and_gradients(pair_stats(*some, own, by_key=by_key), some)
        torch.testing.assert_close(found, expected, **EXACT)
    stats = pair_stats(*once, own, by_key=by_key)
    torch.testing.assert_close(stats.logps, torch.full_like(stats.logps, -math.log(COUNT)))


def test_repeated_runs_give_equal_bits():
    inputs, own = _inputs(), torch.arange(COUNT)
    runs = [
        _values_and_gradients(pair_stats(*inputs, own, by_key=True, **_ids()), inputs)
        for _ in range(2)
    ]
    for first, second in zip(*[(*values, *grads) for values, grads in runs], strict=True):
        assert torch.equal(first, second)


def test_results_may_be_changed_in_place_without_harm_to_the_gradient():
    inputs, own = _inputs(), torch.arange(COUNT)
    expected = torch.autograd.grad(pair_stats(*inputs, own).logps.mul(3.0).sum(), inputs)
    stats = pair_stats(*inputs, own)
    found = torch.autograd.grad(stats.logps.mul_(3.0).sum(), inputs)
    torch.testing.assert_close(found, expected, **EXACT)


def test_single_precision_errs_as_little_as_the_whole_matrix_does():
    count, dim = 300, 64
    vectors = [
        F.normalize(_normal(count, dim, seed=seed), dim=1).float() / scale
        for seed, scale in ((0, 0.05), (1, 1.0))
    ]
    own = torch.arange(count)
    errors = []
    for implementation in ("chunked", "reference"):
        inputs = [vector.clone().requires_grad_() for vector in vectors]
        exact = [vector.double().requires_grad_() for vector in vectors]
        pair = []
        for some in (inputs, exact):
            stats = pair_stats(*some, own, by_key=True, implementation=implementation)
            loss = -(stats.logps + stats.key_logps).mean() / 2
            pair.append((loss, *torch.autograd.grad(loss, some)))
        errors.append(
            [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(*pair, strict=True)]
        )
    for ours, theirs in zip(*errors, strict=True):
        assert ours < max(2 * theirs, 1e-6)


# differentiation of other kinds


def test_transforms_take_the_whole_form():
    queries, keys = (tensor.detach() for tensor in _inputs(5, 5))
    own = torch.arange(5)

    def loss(q, k, mask=None):
        stats = pair_stats(q, k, own, by_key=True, mask=mask)
        return -(stats.logps + stats.key_logps).sum()

    leaf = queries.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf, keys), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(queries, keys), expected, **EXACT)
    direction = _normal(5, DIM, seed=4)
    _, slope = torch.func.jvp(lambda q: loss(q, keys), (queries,), (direction,))
    torch.testing.assert_close(slope, (expected * direction).sum(), **EXACT)
    several = torch.stack([queries, 2 * queries])
    torch.testing.assert_close(
        torch.vmap(loss, in_dims=(0, None))(several, keys),
        torch.stack([loss(q, keys) for q in several]), **EXACT,
    )  # fmt: skip
    masks = torch.stack([_mask(5, 5), _mask(5, 5).t()])
    torch.testing.assert_close(
        torch.vmap(lambda mask: loss(queries, keys, mask))(masks),
        torch.stack([loss(queries, keys, mask) for mask in masks]), **EXACT,
    )  # fmt: skip
    assert torch.func.hessian(loss)(queries, keys).shape == (5, DIM, 5, DIM)


def test_the_whole_form_has_second_derivatives():
    own = torch.arange(4)
    assert torch.autograd.gradgradcheck(
        lambda q, k: pair_stats(q, k, own, by_key=True, implementation="reference")[0],
        _inputs(4, 4),
    )


@pytest.mark.parametrize("by_key", [False, True])
def test_a_second_derivative_of_the_lean_form_is_refused_by_name(by_key):
    queries, keys = _inputs()
    stats = pair_stats(queries, keys, torch.arange(COUNT), by_key=by_key)
    gradients = torch.autograd.grad(stats.logps.sum(), (queries, keys), create_graph=True)
    for gradient in gradients:
        with pytest.raises(RuntimeError, match="pass implementation='reference'"):
            gradient.square().sum().backward(retain_graph=True)


def test_autocast_changes_nothing():
    inputs, own = _inputs(dtype=torch.float32), torch.arange(COUNT)
    for implementation in ("chunked", "reference"):
        settings = {"by_key": True, "implementation": implementation}
        plain = _values_and_gradients(pair_stats(*inputs, own, **settings), inputs)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            stats = pair_stats(*inputs, own, **settings)
        torch.testing.assert_close(_values_and_gradients(stats, inputs), plain, rtol=0, atol=0)


@pytest.mark.compiles
@pytest.mark.parametrize("by_key", [False, True])
@settings_of
def test_a_compiled_step_gives_the_same(by_key, settings):
    inputs, own = _inputs(), torch.arange(COUNT)

    def step(queries, keys):
        stats = pair_stats(queries, keys, own, by_key=by_key, **settings)
        total = -stats.logps.sum() + 2 * stats.log_normalizer.square().sum()
        return total if stats.key_logps is None else total - stats.key_logps.cos().sum()

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    found, expected = (f(*inputs) for f in (compiled, step))
    torch.testing.assert_close(found, expected, **EXACT)
    torch.testing.assert_close(
        torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs), **EXACT
    )


# devices and memory


@both
@settings_of
@pytest.mark.parametrize("by_key", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_reads_values_from_the_device(implementation, settings, by_key, dtype):
    elsewhere = {name: tensor.to("meta") for name, tensor in settings.items()}
    inputs = [t.detach().to("meta").requires_grad_() for t in _inputs(dtype=dtype)]
    own = torch.arange(COUNT, device="meta")
    for targets in (own, None):
        stats = pair_stats(
            *inputs, targets, by_key=by_key, implementation=implementation, **elsewhere
        )
        values = _present(stats)
        assert len(values) == (4 if by_key else 2)
        for value in values:
            assert value.device.type == "meta"
            assert value.shape == (COUNT,)
        gradients = torch.autograd.grad(sum(value.sum() for value in values), inputs)
        for gradient in gradients:
            assert (gradient.shape, gradient.dtype) == ((COUNT, DIM), dtype)


@pytest.mark.parametrize("workspace", [2**16, 2**20, 2**22])
@pytest.mark.parametrize("by_key", [False, True])
def test_both_passes_hold_their_workspace_and_not_the_matrix_of_scores(workspace, by_key):
    count, dim, size = 2000, 8, 4
    queries, keys = (_normal(count, dim, seed=s, dtype=torch.float32) for s in (0, 1))
    ids = torch.arange(count) % 1500
    settings = {"by_key": by_key, "query_ids": ids, "key_ids": ids, "workspace": workspace}
    queries.requires_grad_(), keys.requires_grad_()
    with LiveMemory() as forward:
        stats = pair_stats(queries, keys, torch.arange(count), **settings)
    with LiveMemory() as backward:
        sum(value.sum() for value in _present(stats)).backward()
    per_row = 2 * size * count * 64  # running sums and the like, a few numbers a row
    least_tile = size * tiling._TILE_ROWS * tiling._LEAST_COLUMNS
    assert forward.largest >= min(workspace // 4, size * count * dim)  # tiles were seen at all
    room = max(workspace, 4 * least_tile)
    assert forward.peak <= room + per_row
    assert backward.peak <= room + per_row + 2 * size * count * dim
    assert 4 * max(forward.largest, backward.largest) < size * count**2


# errors

Q, K, OWN = torch.zeros(2, 3), torch.zeros(2, 3), torch.arange(2)
IDS = torch.arange(2)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"queries": Q.long()}, TypeError, "queries must be a floating-point tensor; got torch.i"),
        ({"keys": [1.0]}, TypeError, r"keys must be a torch.Tensor; got list \[1.0\]"),
        ({"keys": K.double()}, TypeError, "keys must have the dtype of queries, torch.float32; "),
        ({"queries": Q[0]}, ValueError, r"queries must have 2 axes; got shape \(3,\)"),
        ({"keys": K[0]}, ValueError, r"keys must have 2 axes; got shape \(3,\)"),
        ({"keys": K[:, :2]}, ValueError, r"keys must have shape \(count, 3\), .*got \(2, 2\)"),
        ({"keys": K[:0]}, ValueError, "keys must have at least one entry along axis 0; got"),
        ({"keys": K.to("meta")}, ValueError, "keys must be on cpu, the device of queries; got m"),
        ({"targets": OWN[:1]}, ValueError, r"targets must have shape \(2,\), one entry per query"),
        ({"targets": [0, 1]}, TypeError, r"targets must be a torch.Tensor; got list \[0, 1\]"),
        ({"targets": OWN.float()}, TypeError, "targets must be an integer tensor; got torch.f"),
        ({"targets": OWN + 1}, ValueError, r"targets must lie in \[0, 2\), the rows of keys; got"),
        ({"targets": OWN.to("meta")}, ValueError, "targets must be on cpu, the device of queries"),
        ({"targets": OWN.flip(0), "by_key": True}, ValueError,
         "targets must be each query's own index with by_key; got 1 for query 0"),
        ({"keys": torch.zeros(4, 3), "by_key": True}, ValueError,
         "keys must be as many as queries, 2, with by_key; got 4"),
        ({"query_ids": IDS}, ValueError, "key_ids must be given, as the ids of the other side"),
        ({"key_ids": IDS}, ValueError, "query_ids must be given, as the ids of the other side"),
        ({"query_ids": IDS, "key_ids": IDS[:1]}, ValueError, r"key_ids must have shape \(2,\)"),
        ({"query_ids": IDS.float(), "key_ids": IDS}, TypeError, "query_ids must be an integer"),
        ({"query_ids": [0, 1], "key_ids": IDS}, TypeError, "query_ids must be a torch.Tensor"),
        ({"query_ids": IDS, "key_ids": IDS.to("meta")}, ValueError, "key_ids must be on cpu, the"),
        ({"mask": torch.ones(2, 2)}, TypeError, r"mask must be a boolean tensor \(True means"),
        ({"mask": torch.ones(2, 1).bool()}, ValueError, r"mask must have shape \(2, 2\), one en"),
        ({"mask": torch.ones(2, 2, device="meta").bool()}, ValueError, "mask must be on cpu, the"),
        ({"implementation": "triton"}, ValueError, "'reference', 'chunked' or None; got 'triton'"),
        ({"workspace": 0}, ValueError, "workspace must be positive; got 0"),
        ({"workspace": 1e6}, TypeError, "workspace must be a whole number; got float"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(change, error, message):
    arguments = {"queries": Q, "keys": K, "targets": OWN}
    with pytest.raises(error, match=message):
        pair_stats(**(arguments | change))

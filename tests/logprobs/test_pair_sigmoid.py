"""Sums of log-sigmoids over pairs: against all scores, never holding them."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from lmlosses.logprobs import pair_log_sigmoid, tiling
from tests.logprobs.test_chunked import LiveMemory

DOUBLE = torch.float64
QUERIES, KEYS, DIM = 9, 11, 4
# a rounding step of float64 is 2e-16; the worst mistake to catch here is a term left out
EXACT = {"rtol": 1e-12, "atol": 1e-12}

both = pytest.mark.parametrize("implementation", ["reference", "chunked"])


def _generator(seed):
    return torch.Generator().manual_seed(seed)


def _normal(*shape, seed=0, dtype=DOUBLE):
    return torch.randn(*shape, generator=_generator(seed), dtype=DOUBLE).to(dtype)


def _inputs(queries=QUERIES, keys=KEYS, dtype=DOUBLE):
    """Queries, keys and bias, which want their gradient."""
    bias = torch.tensor(-1.3, dtype=DOUBLE)
    tensors = (2 * _normal(queries, DIM), _normal(keys, DIM, seed=1), bias)
    return [tensor.to(dtype).requires_grad_() for tensor in tensors]


def _targets(queries=QUERIES, keys=KEYS):
    return torch.randint(keys, (queries,), generator=_generator(2))


def _ids(queries=QUERIES, keys=KEYS):
    return {"query_ids": torch.arange(queries) % 5, "key_ids": torch.arange(keys) % 4}


def _mask(queries=QUERIES, keys=KEYS):
    return torch.rand(queries, keys, generator=_generator(3)) < 0.7


def _sums(inputs, targets, **settings):
    queries, keys, bias = inputs
    return pair_log_sigmoid(queries, keys, targets, bias=bias, **settings)


def _weighted(values):
    return (values * _normal(*values.shape, seed=9, dtype=values.dtype)).sum()


def _values_and_gradients(values, inputs):
    return values, torch.autograd.grad(_weighted(values), inputs)


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(tiling, "_TILE_ROWS", 4)
    monkeypatch.setattr(tiling, "_LEAST_COLUMNS", 3)


SETTINGS = {
    "plain": {},
    "ids": _ids(),
    "mask": {"mask": _mask()},
    "ids and mask": {**_ids(), "mask": _mask()},
}
settings_of = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)


# values known by hand


@both
@pytest.mark.parametrize("keys", [1, 2, 7, 1000])
def test_scores_of_zero_cost_log_two_a_pair(implementation, keys):
    found = pair_log_sigmoid(
        torch.zeros(3, 2), torch.ones(keys, 2), torch.tensor([0, keys - 1, keys // 2]),
        implementation=implementation,
    )  # fmt: skip
    torch.testing.assert_close(found, torch.full((3,), -keys * math.log(2)))


@both
def test_odds_of_three_to_one_by_hand(implementation):
    # the own pair has probability 3/4, that of the other being none is 1 - 2/3
    queries = torch.tensor([[3.0, 2.0]], dtype=DOUBLE).log()
    found = pair_log_sigmoid(
        queries, torch.eye(2, dtype=DOUBLE), torch.tensor([0]), implementation=implementation
    )
    assert found.item() == pytest.approx(math.log(3 / 4 * 1 / 3), rel=1e-12)
    # a bias of log 2 doubles the odds of both
    found = pair_log_sigmoid(
        queries, torch.eye(2, dtype=DOUBLE), torch.tensor([0]), bias=math.log(2),
        implementation=implementation,
    )  # fmt: skip
    assert found.item() == pytest.approx(math.log(6 / 7 * 1 / 5), rel=1e-12)


@both
def test_pairs_of_equal_ids_do_not_count_unless_they_are_the_targets(implementation):
    ids = torch.tensor([7, 7, 9])
    found = pair_log_sigmoid(
        torch.zeros(3, 1, dtype=DOUBLE), torch.zeros(3, 1, dtype=DOUBLE), torch.arange(3),
        query_ids=ids, key_ids=ids, implementation=implementation,
    )  # fmt: skip
    expected = -math.log(2) * torch.tensor([2.0, 2.0, 3.0], dtype=DOUBLE)
    torch.testing.assert_close(found, expected, **EXACT)


# agreement with something independent


@both
@settings_of
def test_sums_agree_with_plain_python(implementation, settings):
    inputs, targets = _inputs(), _targets()
    found = _sums(inputs, targets, implementation=implementation, **settings)
    scores = (inputs[0] @ inputs[1].t() + inputs[2]).tolist()
    expected = []
    for i, row in enumerate(scores):
        terms = []
        for j, score in enumerate(row):
            own = j == targets[i]
            same = "query_ids" in settings and settings["query_ids"][i] == settings["key_ids"][j]
            left_out = same or ("mask" in settings and not settings["mask"][i, j])
            if own or not left_out:
                terms.append(-math.log1p(math.exp(-score if own else score)))
        expected.append(math.fsum(terms))
    torch.testing.assert_close(found, torch.tensor(expected, dtype=DOUBLE), **EXACT)


@both
@pytest.mark.parametrize("keys", [1, 3, 40])
def test_sums_and_their_gradients_agree_with_torchs_binary_cross_entropy(
    implementation, keys, small_tiles
):
    inputs, targets = _inputs(QUERIES, keys), _targets(QUERIES, keys)
    found = _sums(inputs, targets, implementation=implementation, workspace=1)
    scores = inputs[0] @ inputs[1].t() + inputs[2]
    labels = F.one_hot(targets, keys).to(DOUBLE)
    expected = -F.binary_cross_entropy_with_logits(scores, labels, reduction="none").sum(dim=1)
    torch.testing.assert_close(
        _values_and_gradients(found, inputs), _values_and_gradients(expected, inputs), **EXACT
    )


@settings_of
@pytest.mark.parametrize("workspace", [1, 2**26])
@pytest.mark.parametrize("queries", [0, 1, QUERIES])
def test_chunked_sums_and_their_gradients_are_the_references(
    settings, workspace, queries, small_tiles
):
    inputs, targets = _inputs(queries), _targets(queries)
    settings = {k: v if k == "key_ids" else v[:queries] for k, v in settings.items()}
    found, expected = (
        _sums(inputs, targets, implementation=name, workspace=workspace, **settings)
        for name in ("chunked", "reference")
    )
    torch.testing.assert_close(
        _values_and_gradients(found, inputs), _values_and_gradients(expected, inputs), **EXACT
    )
    assert found.shape == (queries,)


@both
@settings_of
def test_gradients_agree_with_finite_differences(implementation, settings, small_tiles):
    def sums(*inputs):
        return _sums(inputs, _targets(), implementation=implementation, workspace=1, **settings)

    assert torch.autograd.gradcheck(sums, _inputs(), fast_mode=True)


@pytest.mark.parametrize("wanting", list(itertools.product([False, True], repeat=3)))
def test_only_the_inputs_that_want_a_gradient_get_one(wanting):
    inputs, targets = _inputs(), _targets()
    expected = torch.autograd.grad(_weighted(_sums(inputs, targets)), inputs)
    some = [t.detach().requires_grad_(w) for t, w in zip(inputs, wanting, strict=True)]
    found = _sums(some, targets)
    assert found.requires_grad == any(wanting)
    if any(wanting):
        _weighted(found).backward()
    for tensor, wanted, gradient in zip(some, wanting, expected, strict=True):
        assert (tensor.grad is not None) == wanted
        if wanted:
            torch.testing.assert_close(tensor.grad, gradient, **EXACT)


# laws


@both
def test_a_bias_is_one_more_dimension(implementation):
    queries, keys, bias = _inputs()
    more = torch.cat([queries, bias.expand(QUERIES, 1)], dim=1)
    ones = torch.cat([keys, torch.ones(KEYS, 1, dtype=DOUBLE)], dim=1)
    found = _sums((queries, keys, bias), _targets(), implementation=implementation)
    expected = pair_log_sigmoid(more, ones, _targets(), implementation=implementation)
    torch.testing.assert_close(found, expected, **EXACT)


@both
def test_a_bias_may_be_a_number_and_by_default_is_zero(implementation):
    queries, keys, _ = _inputs()
    settings = {"implementation": implementation}
    of_number = pair_log_sigmoid(queries, keys, _targets(), bias=-2, **settings)
    of_tensor = pair_log_sigmoid(
        queries, keys, _targets(), bias=torch.tensor(-2.0, dtype=DOUBLE), **settings
    )
    assert torch.equal(of_number, of_tensor)
    plain = pair_log_sigmoid(queries, keys, _targets(), **settings)
    zero = pair_log_sigmoid(queries, keys, _targets(), bias=0.0, **settings)
    assert torch.equal(plain, zero)


@both
@pytest.mark.parametrize("size", [20.0, 1e4])
def test_pairs_that_are_surely_right_or_wrong_keep_their_digits(implementation, size):
    queries = torch.tensor([[size, -size], [-size, size]]).requires_grad_()
    found = pair_log_sigmoid(
        queries, torch.eye(2), torch.zeros(2, dtype=torch.long), implementation=implementation
    )
    # right: two terms of -log(1 + e^-size); wrong: two of -size besides
    small = 2 * math.log1p(math.exp(-size))
    torch.testing.assert_close(found, torch.tensor([-small, -2 * size - small]), rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(found.sum(), queries)
    tail = math.exp(-size) / (1 + math.exp(-size))
    expected = torch.tensor([[tail, -tail], [1 - tail, tail - 1]])
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=0)


@both
def test_with_all_pairs_masked_the_targets_remain(implementation):
    inputs, targets = _inputs(), _targets()
    mask = torch.zeros(QUERIES, KEYS, dtype=torch.bool)
    found = _sums(inputs, targets, mask=mask, implementation=implementation)
    own = (inputs[0] * inputs[1][targets]).sum(dim=1) + inputs[2]
    torch.testing.assert_close(
        _values_and_gradients(found, inputs),
        _values_and_gradients(F.logsigmoid(own), inputs), **EXACT,
    )  # fmt: skip


def test_ids_say_the_same_as_a_mask_and_may_be_any_kind_of_whole_number():
    inputs, targets, ids = _inputs(), _targets(), _ids()
    differ = ids["query_ids"].unsqueeze(1) != ids["key_ids"]
    expected = _sums(inputs, targets, mask=differ)
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32):
        narrow = {name: values.to(dtype) for name, values in ids.items()}
        assert torch.equal(_sums(inputs, targets.to(dtype), **narrow), expected)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_half_precision_gives_float32_values_exact_for_the_rounded_inputs(implementation, dtype):
    inputs, targets = _inputs(dtype=dtype), _targets()
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    settings = {"implementation": implementation, **_ids()}
    values, gradients = _values_and_gradients(_sums(inputs, targets, **settings), inputs)
    expected, true = _values_and_gradients(_sums(exact, targets, **settings), exact)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values.double(), expected, rtol=2e-6, atol=2e-6)
    for gradient, other in zip(gradients, true, strict=True):
        assert gradient.dtype == dtype
        error = (gradient.double() - other).abs().max() / other.abs().max()
        assert error < (2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps)


def test_the_bias_may_be_more_or_less_precise_than_the_vectors():
    queries, keys, bias = _inputs(dtype=torch.float32)
    expected = _sums((queries, keys, bias), _targets())
    for dtype in (torch.float64, torch.bfloat16):
        other = torch.tensor(-1.25, dtype=dtype, requires_grad=True)
        found = _sums((queries, keys, other), _targets())
        assert found.dtype == torch.float32
        torch.autograd.grad(found.sum(), other)
        torch.testing.assert_close(found, expected, rtol=0.1, atol=0)


def test_vectors_may_lie_in_memory_as_they_like():
    inputs, targets = _inputs(), _targets()
    expected = _values_and_gradients(_sums(inputs, targets), inputs)
    strided = [t.detach().t().contiguous().t().requires_grad_() for t in inputs[:2]]
    strided.append(inputs[2].detach().expand(3)[1].requires_grad_())
    found = _values_and_gradients(_sums(strided, targets), strided)
    torch.testing.assert_close(found, expected, **EXACT)


def test_repeated_runs_give_equal_bits():
    inputs, targets = _inputs(), _targets()
    runs = [_values_and_gradients(_sums(inputs, targets, **_ids()), inputs) for _ in range(2)]
    for first, second in zip(*[(value, *grads) for value, grads in runs], strict=True):
        assert torch.equal(first, second)


# differentiation of other kinds


def test_transforms_take_the_whole_form():
    queries, keys, bias = (tensor.detach() for tensor in _inputs(5, 5))
    targets = _targets(5, 5)

    def loss(q, b, mask=None):
        return -pair_log_sigmoid(q, keys, targets, bias=b, mask=mask).sum()

    leaf = bias.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(queries, leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss, argnums=1)(queries, bias), expected, **EXACT)
    one = torch.tensor(1.0, dtype=DOUBLE)
    _, slope = torch.func.jvp(lambda b: loss(queries, b), (bias,), (one,))
    torch.testing.assert_close(slope, expected, **EXACT)
    biases = torch.stack([bias, 2 * bias])
    torch.testing.assert_close(
        torch.vmap(loss, in_dims=(None, 0))(queries, biases),
        torch.stack([loss(queries, b) for b in biases]), **EXACT,
    )  # fmt: skip
    masks = torch.stack([_mask(5, 5), _mask(5, 5).t()])
    torch.testing.assert_close(
        torch.vmap(lambda mask: loss(queries, bias, mask))(masks),
        torch.stack([loss(queries, bias, mask) for mask in masks]), **EXACT,
    )  # fmt: skip


def test_a_second_derivative_of_the_lean_form_is_refused_by_name():
    inputs = _inputs()
    for gradient in torch.autograd.grad(
        _sums(inputs, _targets()).sum(), inputs, create_graph=True
    ):
        with pytest.raises(RuntimeError, match="pass implementation='reference'"):
            gradient.square().sum().backward(retain_graph=True)
    assert torch.autograd.gradgradcheck(
        lambda *some: _sums(some, _targets(3, 4), implementation="reference"), _inputs(3, 4)
    )


def test_autocast_changes_nothing():
    inputs, targets = _inputs(dtype=torch.float32), _targets()
    for implementation in ("chunked", "reference"):
        settings = {"implementation": implementation}
        plain = _values_and_gradients(_sums(inputs, targets, **settings), inputs)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = _sums(inputs, targets, **settings)
        torch.testing.assert_close(_values_and_gradients(found, inputs), plain, rtol=0, atol=0)


@pytest.mark.compiles
@settings_of
def test_a_compiled_step_gives_the_same(settings):
    inputs, targets = _inputs(), _targets()

    def step(*some):
        return _sums(some, targets, **settings).square().sum()

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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_reads_values_from_the_device(implementation, settings, dtype):
    elsewhere = {name: tensor.to("meta") for name, tensor in settings.items()}
    inputs = [t.detach().to("meta").requires_grad_() for t in _inputs(dtype=dtype)]
    targets = _targets().to("meta")
    for bias in (inputs[2], -1.0):
        found = pair_log_sigmoid(
            *inputs[:2], targets, bias=bias, implementation=implementation, **elsewhere
        )
        assert (found.device.type, found.shape) == ("meta", (QUERIES,))
        wanted = inputs if bias is inputs[2] else inputs[:2]
        for gradient, source in zip(torch.autograd.grad(found.sum(), wanted), wanted, strict=True):
            assert (gradient.shape, gradient.dtype) == (source.shape, dtype)


@pytest.mark.parametrize("workspace", [2**16, 2**20, 2**22])
def test_both_passes_hold_their_workspace_and_not_the_matrix_of_scores(workspace):
    count, dim, size = 2000, 8, 4
    queries, keys = (_normal(count, dim, seed=s, dtype=torch.float32) for s in (0, 1))
    ids = torch.arange(count) % 1500
    settings = {"query_ids": ids, "key_ids": ids, "workspace": workspace}
    queries.requires_grad_(), keys.requires_grad_()
    with LiveMemory() as forward:
        sums = pair_log_sigmoid(queries, keys, torch.arange(count), bias=-1.0, **settings)
    with LiveMemory() as backward:
        sums.sum().backward()
    per_row = 2 * size * count * 64
    least_tile = size * tiling._TILE_ROWS * tiling._LEAST_COLUMNS
    room = max(workspace, 4 * least_tile)
    assert forward.peak <= room + per_row
    assert backward.peak <= room + per_row + 2 * size * count * dim
    assert 4 * max(forward.largest, backward.largest) < size * count**2


# errors

Q, K, TARGETS, IDS = torch.zeros(2, 3), torch.zeros(4, 3), torch.tensor([0, 3]), torch.arange(4)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"queries": Q.long()}, TypeError, "queries must be a floating-point tensor; got torch.i"),
        ({"keys": K.half()}, TypeError, "keys must have the dtype of queries, torch.float32; got"),
        ({"queries": Q[0]}, ValueError, r"queries must have 2 axes; got shape \(3,\)"),
        ({"keys": K[:, :2]}, ValueError, r"keys must have shape \(count, 3\), .*got \(4, 2\)"),
        ({"keys": K[:0]}, ValueError, "keys must have at least one entry along axis 0; got"),
        ({"keys": K.to("meta")}, ValueError, "keys must be on cpu, the device of queries; got m"),
        ({"targets": TARGETS[:1]}, ValueError, r"targets must have shape \(2,\), one entry per q"),
        ({"targets": None}, TypeError, "targets must be a torch.Tensor; got NoneType None"),
        ({"targets": TARGETS + 1}, ValueError, r"targets must lie in \[0, 4\), the rows of keys;"),
        ({"bias": torch.zeros(1)}, ValueError, r"bias must have shape \(\), one number; got \(1"),
        ({"bias": torch.tensor(1)}, TypeError, "bias must be a floating-point tensor; got torch"),
        ({"bias": torch.zeros((), device="meta")}, ValueError, "bias must be on cpu, the device"),
        ({"bias": math.nan}, ValueError, "bias must be finite; got nan"),
        ({"bias": None}, TypeError, "bias must be a real number; got NoneType None"),
        ({"query_ids": IDS[:2]}, ValueError, "key_ids must be given, as the ids of the other"),
        ({"query_ids": IDS, "key_ids": IDS}, ValueError, r"query_ids must have shape \(2,\)"),
        ({"mask": torch.ones(2, 4)}, TypeError, r"mask must be a boolean tensor \(True means"),
        ({"mask": torch.ones(4, 2).bool()}, ValueError, r"mask must have shape \(2, 4\), one en"),
        ({"implementation": "fused"}, ValueError, "'reference', 'chunked' or None; got 'fused'"),
        ({"workspace": -1}, ValueError, "workspace must be positive; got -1"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(change, error, message):
    arguments = {"queries": Q, "keys": K, "targets": TARGETS}
    with pytest.raises(error, match=message):
        pair_log_sigmoid(**(arguments | change))

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from lmlosses import TokenStats, linear_token_stats, token_stats

DOUBLE = torch.float64
FORBIDDEN = -math.inf
EVERYTHING = {"mean_logp": True, "entropy": True}
VOCAB, DIM = 11, 4
# a rounding step of float64 is 2e-16; the worst mistake to catch here is a term left out
EXACT = {"rtol": 1e-12, "atol": 1e-12}

both = pytest.mark.parametrize("implementation", ["reference", "chunked"])


def _generator(seed):
    return torch.Generator().manual_seed(seed)


def _normal(*shape, seed=0, dtype=DOUBLE):
    return torch.randn(*shape, generator=_generator(seed), dtype=DOUBLE).to(dtype)


def _targets(*shape, vocab=VOCAB, seed=1):
    return torch.randint(vocab, shape, generator=_generator(seed))


def _inputs(*shape, bias="plain", vocab=VOCAB, dtype=DOUBLE):
    """Hidden states, output matrix and bias, all of which want their gradient."""
    tensors = [_normal(*shape, DIM), _normal(vocab, DIM, seed=2)]
    if bias != "none":
        tensors.append(_normal(vocab, seed=3))
        if bias == "forbidding":
            tensors[2][[1, vocab - 1]] = FORBIDDEN
    return [tensor.to(dtype).requires_grad_() for tensor in tensors]


def _present(stats):
    return [value for value in stats if value is not None]


def _weighted(stats):
    """A scalar to which every statistic of every token contributes differently."""
    total = 0.0
    for place, value in enumerate(_present(stats)):
        steps = torch.arange(value.numel(), dtype=DOUBLE, device=value.device)
        total = total + ((1 + place + 1.7 * steps).cos().view(value.shape) * value).sum()
    return total


def _values_and_gradients(stats, inputs):
    return _present(stats), torch.autograd.grad(_weighted(stats), inputs)


def _linear(inputs, targets, **settings):
    hidden, weight, *bias = inputs
    return linear_token_stats(hidden, weight, targets, *bias, **settings)


def _class_weight(vocab=VOCAB):
    return torch.linspace(0.0, 2.0, vocab, dtype=DOUBLE)


MASK = torch.tensor([[True, False, True], [True, True, False]])
OPTIONS = {
    "nothing more": {},
    "mean": {"mean_logp": True},
    "entropy": {"entropy": True},
    "both": EVERYTHING,
    "class weights": {"mean_logp": True, "class_weight": _class_weight()},
    "temperature": {**EVERYTHING, "temperature": 0.7},
    "softcap": {**EVERYTHING, "softcap": 1.5},
    "mask": {**EVERYTHING, "mask": MASK},
    "ignore index": {**EVERYTHING, "ignore_index": 5},
    "all of them": {
        **EVERYTHING,
        "class_weight": _class_weight(),
        "temperature": 1.3,
        "softcap": 2.0,
        "mask": MASK,
        "ignore_index": 5,
    },
}
options = pytest.mark.parametrize("settings", OPTIONS.values(), ids=OPTIONS)


# values known by hand


@both
@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("vocab", [1, 2, 7, 1000])
def test_a_uniform_model_has_minus_log_vocab_everywhere(implementation, linear, vocab):
    targets = torch.tensor([0, vocab - 1, vocab // 2])
    settings = {**EVERYTHING, "implementation": implementation}
    if linear:
        found = linear_token_stats(torch.ones(3, 2), torch.zeros(vocab, 2), targets, **settings)
    else:
        found = token_stats(torch.zeros(3, vocab), targets, **settings)
    expected = torch.full((3,), math.log(vocab))
    torch.testing.assert_close(found, TokenStats(-expected, expected, -expected, expected))


@both
def test_odds_of_three_to_one_by_hand(implementation):
    logits = torch.tensor([[0.0, math.log(3.0)]] * 2, dtype=DOUBLE)
    found = token_stats(logits, torch.tensor([0, 1]), implementation=implementation, **EVERYTHING)
    low, high = math.log(1 / 4), math.log(3 / 4)
    expected = TokenStats(
        *(
            torch.tensor(values, dtype=DOUBLE)
            for values in (
                [low, high],
                [math.log(4)] * 2,
                [(low + high) / 2] * 2,
                [-0.25 * low - 0.75 * high] * 2,
            )
        )
    )
    torch.testing.assert_close(found, expected, **EXACT)


@both
def test_class_weights_are_divided_by_the_number_of_classes_and_not_by_their_sum(implementation):
    logits = torch.tensor([[0.0, math.log(3.0)]], dtype=DOUBLE)
    found = token_stats(
        logits,
        torch.tensor([0]),
        mean_logp=True,
        class_weight=torch.tensor([1.0, 5.0], dtype=DOUBLE),
        implementation=implementation,
    )
    expected = (math.log(1 / 4) + 5 * math.log(3 / 4)) / 2
    assert found.mean_logp.item() == pytest.approx(expected, rel=1e-12)


@both
def test_temperature_divides_what_the_soft_cap_has_left(implementation):
    # 2 tanh(x / 2) of x = log 3 is 2 (3 - 1) / (3 + 1) = 1; halved by the temperature
    logits = torch.tensor([[0.0, math.log(3.0)]], dtype=DOUBLE)
    found = token_stats(
        logits,
        torch.tensor([1]),
        temperature=2.0,
        softcap=2.0,
        implementation=implementation,
        **EVERYTHING,
    )
    total = 1 + math.exp(0.5)
    p = math.exp(0.5) / total
    assert found.logps.item() == pytest.approx(math.log(p), rel=1e-12)
    assert found.log_normalizer.item() == pytest.approx(math.log(total), rel=1e-12)
    assert found.mean_logp.item() == pytest.approx(0.25 - math.log(total), rel=1e-12)
    entropy = -p * math.log(p) - (1 - p) * math.log(1 - p)
    assert found.entropy.item() == pytest.approx(entropy, rel=1e-12)


def test_what_is_not_asked_for_is_none():
    found = token_stats(torch.zeros(2, 3), torch.tensor([0, 1]))
    assert found.mean_logp is None
    assert found.entropy is None
    found = linear_token_stats(
        torch.zeros(2, 3), torch.zeros(4, 3), torch.tensor([0, 1]), entropy=True
    )
    assert found.mean_logp is None
    assert found.entropy is not None


# agreement with something independent


def _fsum_stats(row, target, class_weight, temperature, softcap):
    """One token's statistics in plain Python."""
    z = [x if softcap is None else softcap * math.tanh(x / softcap) for x in row]
    z = [x / temperature for x in z]
    top = max(z)
    log_normalizer = top + math.log(math.fsum(math.exp(x - top) for x in z))
    logps = [x - log_normalizer for x in z]
    allowed = [v for v, logp in enumerate(logps) if logp > FORBIDDEN]
    return (
        logps[target],
        log_normalizer,
        math.fsum(class_weight[v] * logps[v] for v in allowed) / len(allowed),
        -math.fsum(math.exp(logps[v]) * logps[v] for v in allowed),
    )


@both
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("forbids", "temperature", "softcap"),
    [(False, 1.0, None), (True, 1.0, None), (True, 0.3, None), (False, 1.7, 2.5)],
)
def test_statistics_agree_with_sums_in_plain_python(
    implementation, forbids, weighted, temperature, softcap
):
    logits, targets = 3 * _normal(6, VOCAB), _targets(6)
    if forbids:
        logits[:, 4] = FORBIDDEN
        logits[2, 7:] = FORBIDDEN
    weights = _class_weight() if weighted else torch.ones(VOCAB, dtype=DOUBLE)
    found = token_stats(
        logits,
        targets,
        class_weight=weights if weighted else None,
        temperature=temperature,
        softcap=softcap,
        implementation=implementation,
        **EVERYTHING,
    )
    rows = [
        _fsum_stats(row, target, weights.tolist(), temperature, softcap)
        for row, target in zip(logits.tolist(), targets.tolist(), strict=True)
    ]
    expected = TokenStats(*torch.tensor(rows, dtype=DOUBLE).unbind(1))
    torch.testing.assert_close(found, expected, **EXACT)


@both
def test_statistics_and_their_gradients_agree_with_torch(implementation):
    logits, targets = (3 * _normal(2, 3, VOCAB)).requires_grad_(), _targets(2, 3)
    weights = _class_weight()
    found = token_stats(
        logits, targets, class_weight=weights, implementation=implementation, **EVERYTHING
    )
    all_logps = F.log_softmax(logits, dim=-1)
    expected = TokenStats(
        -F.cross_entropy(logits.movedim(-1, 1), targets, reduction="none"),
        torch.logsumexp(logits, dim=-1),
        all_logps @ weights / VOCAB,
        torch.distributions.Categorical(logits=logits).entropy(),
    )
    torch.testing.assert_close(
        _values_and_gradients(found, [logits]), _values_and_gradients(expected, [logits]), **EXACT
    )


@both
@pytest.mark.parametrize("bias", ["none", "plain"])
def test_statistics_from_hidden_states_agree_with_torchs_linear_layer(implementation, bias):
    inputs, targets = _inputs(2, 3, bias=bias), _targets(2, 3)
    found = _linear(inputs, targets, implementation=implementation, **EVERYTHING)
    logits = F.linear(*inputs)
    expected = TokenStats(
        -F.cross_entropy(logits.movedim(-1, 1), targets, reduction="none"),
        torch.logsumexp(logits, dim=-1),
        F.log_softmax(logits, dim=-1).mean(dim=-1),
        torch.distributions.Categorical(logits=logits).entropy(),
    )
    torch.testing.assert_close(
        _values_and_gradients(found, inputs), _values_and_gradients(expected, inputs), **EXACT
    )


@options
@both
def test_gradients_of_statistics_agree_with_finite_differences(implementation, settings):
    targets = _targets(2, 3)

    def from_logits(logits):
        stats = token_stats(logits, targets, implementation=implementation, **settings)
        return tuple(_present(stats))

    def from_hidden(hidden, weight, bias):
        stats = linear_token_stats(
            hidden, weight, targets, bias, implementation=implementation, workspace=1, **settings
        )
        return tuple(_present(stats))

    assert torch.autograd.gradcheck(from_logits, _normal(2, 3, VOCAB).requires_grad_())
    assert torch.autograd.gradcheck(from_hidden, _inputs(2, 3))


@options
@pytest.mark.parametrize("bias", ["none", "plain", "forbidding"])
@pytest.mark.parametrize("workspace", [1, 2**26])
def test_chunked_statistics_and_their_gradients_are_the_references(settings, bias, workspace):
    inputs, targets = _inputs(2, 3, bias=bias), _targets(2, 3)
    targets[targets == 1] = 2  # forbidden targets have their own test
    found, expected = (
        _linear(inputs, targets, implementation=implementation, workspace=workspace, **settings)
        for implementation in ("chunked", "reference")
    )
    torch.testing.assert_close(
        _values_and_gradients(found, inputs), _values_and_gradients(expected, inputs), **EXACT
    )


@options
@pytest.mark.parametrize("forbids", [False, True])
def test_chunked_statistics_of_logits_and_their_gradient_are_the_references(settings, forbids):
    logits, targets = 3 * _normal(2, 3, VOCAB), _targets(2, 3)
    if forbids:
        logits[..., [1, 10]] = FORBIDDEN
        logits[0, 0, :8] = FORBIDDEN
        targets[0, 0] = 9
        targets[targets == 1] = 2
    logits.requires_grad_()
    found, expected = (
        token_stats(logits, targets, implementation=implementation, **settings)
        for implementation in ("chunked", "reference")
    )
    torch.testing.assert_close(
        _values_and_gradients(found, [logits]), _values_and_gradients(expected, [logits]), **EXACT
    )


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3), (2, 0, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE, torch.bfloat16, torch.float16], ids=str)
def test_every_leading_shape_and_dtype_is_kept_in_results_and_gradients(shape, dtype):
    targets = _targets(*shape)
    inputs = _inputs(*shape, dtype=dtype)
    logits = _normal(*shape, VOCAB).to(dtype).requires_grad_()
    for implementation in ("reference", "chunked"):
        settings = {**EVERYTHING, "implementation": implementation}
        for stats, sources in (
            (_linear(inputs, targets, **settings), inputs),
            (token_stats(logits, targets, **settings), [logits]),
        ):
            at_least_single = torch.promote_types(dtype, torch.float32)
            for value in stats:
                assert value.shape == shape
                assert value.dtype == at_least_single
            for gradient, source in zip(
                torch.autograd.grad(_weighted(stats), sources), sources, strict=True
            ):
                assert gradient.shape == source.shape
                assert gradient.dtype == dtype
                assert gradient.isfinite().all()
                if not targets.numel():
                    assert not gradient.any()


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_leading_axes_are_only_a_way_to_arrange_tokens(shape):
    inputs, targets = _inputs(*shape), _targets(*shape)
    flat = [inputs[0].detach().reshape(-1, DIM).requires_grad_(), *inputs[1:]]
    found = _values_and_gradients(_linear(inputs, targets, **EVERYTHING), inputs)
    expected = _values_and_gradients(_linear(flat, targets.reshape(-1), **EVERYTHING), flat)
    for ours, theirs in zip(itertools.chain(*found), itertools.chain(*expected), strict=True):
        assert torch.equal(ours.reshape(theirs.shape), theirs)


@pytest.mark.parametrize("used", list(itertools.product([False, True], repeat=4))[1:])
def test_a_statistic_that_is_asked_for_but_not_used_adds_nothing_to_the_gradient(used):
    inputs, targets = _inputs(5), _targets(5)

    def gradients(implementation):
        stats = _linear(inputs, targets, implementation=implementation, **EVERYTHING)
        return torch.autograd.grad(
            _weighted([s for s, u in zip(stats, used, strict=True) if u]), inputs
        )

    torch.testing.assert_close(gradients("chunked"), gradients("reference"), **EXACT)
    logits = _normal(5, VOCAB).requires_grad_()
    from_logits = [
        torch.autograd.grad(
            _weighted(
                [
                    s
                    for s, u in zip(
                        token_stats(logits, targets, implementation=i, **EVERYTHING),
                        used,
                        strict=True,
                    )
                    if u
                ]
            ),
            logits,
        )
        for i in ("chunked", "reference")
    ]
    torch.testing.assert_close(*from_logits, **EXACT)


@pytest.mark.parametrize("wanting", list(itertools.product([False, True], repeat=3)))
def test_only_the_inputs_that_want_a_gradient_get_one(wanting):
    inputs, targets = _inputs(5), _targets(5)
    (expected,) = (torch.autograd.grad(_weighted(_linear(inputs, targets)), inputs),)
    some = [t.detach().requires_grad_(w) for t, w in zip(inputs, wanting, strict=True)]
    stats = _linear(some, targets)
    assert stats.logps.requires_grad == any(wanting)
    if any(wanting):
        _weighted(stats).backward()
    for tensor, wanted, gradient in zip(some, wanting, expected, strict=True):
        assert (tensor.grad is not None) == wanted
        if wanted:
            assert torch.equal(tensor.grad, gradient)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_targets_may_be_any_kind_of_whole_number(dtype):
    inputs, targets = _inputs(5), _targets(5)
    logits = _normal(5, VOCAB)
    assert torch.equal(
        token_stats(logits, targets.to(dtype)).logps, token_stats(logits, targets).logps
    )
    assert torch.equal(_linear(inputs, targets.to(dtype)).logps, _linear(inputs, targets).logps)


# masks


@both
@pytest.mark.parametrize("rubbish", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("by_index", [False, True])
def test_what_stands_at_positions_that_do_not_count_changes_nothing(
    implementation, rubbish, by_index
):
    targets = _targets(2, 3)
    if by_index:
        settings = {"ignore_index": -100}
        targets = targets.masked_fill(~MASK, -100)
    else:
        settings = {"mask": MASK}
    settings = {**settings, **EVERYTHING, "implementation": implementation}
    hidden, weight, bias = _inputs(2, 3)
    other = hidden.detach().masked_fill(~MASK.unsqueeze(-1), rubbish).requires_grad_()
    logits = _normal(2, 3, VOCAB)
    other_logits = logits.masked_fill(~MASK.unsqueeze(-1), rubbish).requires_grad_()
    logits.requires_grad_()
    for clean, spoilt, stats in (
        ([hidden, weight, bias], [other, weight, bias], _linear),
        ([logits], [other_logits], lambda inputs, *a, **k: token_stats(*inputs, *a, **k)),
    ):
        found = _values_and_gradients(stats(spoilt, targets, **settings), spoilt)
        expected = _values_and_gradients(stats(clean, targets, **settings), clean)
        for ours, theirs in zip(itertools.chain(*found), itertools.chain(*expected), strict=True):
            assert torch.equal(ours, theirs)
            assert ours.isfinite().all()


@both
def test_positions_that_do_not_count_hold_zero_and_pass_no_gradient(implementation):
    inputs, targets = _inputs(2, 3), _targets(2, 3)
    settings = {**EVERYTHING, "mask": MASK, "implementation": implementation}
    for stats, source in (
        (_linear(inputs, targets, **settings), inputs[0]),
        (
            token_stats(logits := _normal(2, 3, VOCAB).requires_grad_(), targets, **settings),
            logits,
        ),
    ):
        for value in stats:
            assert not value[~MASK].any()
            assert value[MASK].all()
        (gradient,) = torch.autograd.grad(_weighted(stats), source)
        assert not gradient[~MASK].any()
        assert gradient[MASK].all()


@both
def test_a_mask_is_the_same_as_leaving_the_tokens_out(implementation):
    targets, settings = _targets(2, 3), {**EVERYTHING, "implementation": implementation}
    hidden, weight, bias = inputs = _inputs(2, 3)
    masked = _linear(inputs, targets, mask=MASK, **settings)
    left = _linear([hidden[MASK], weight, bias], targets[MASK], **settings)
    expected = TokenStats(*(torch.zeros(2, 3, dtype=DOUBLE).masked_scatter(MASK, s) for s in left))
    torch.testing.assert_close(
        _values_and_gradients(masked, inputs), _values_and_gradients(expected, inputs), **EXACT
    )
    logits = _normal(2, 3, VOCAB).requires_grad_()
    masked = token_stats(logits, targets, mask=MASK, **settings)
    left = token_stats(logits[MASK], targets[MASK], **settings)
    expected = TokenStats(*(torch.zeros(2, 3, dtype=DOUBLE).masked_scatter(MASK, s) for s in left))
    torch.testing.assert_close(
        _values_and_gradients(masked, [logits]), _values_and_gradients(expected, [logits]), **EXACT
    )


@both
@pytest.mark.parametrize("index", [-100, 5, VOCAB])
def test_an_ignored_index_is_the_same_as_a_mask(implementation, index):
    inputs, targets = _inputs(2, 3), _targets(2, 3).masked_fill(~MASK, index)
    mask = targets != index
    settings = {**EVERYTHING, "implementation": implementation}
    for function, sources in (
        (_linear, inputs),
        (lambda inputs, *a, **k: token_stats(*inputs, *a, **k), [_normal(2, 3, VOCAB)]),
    ):
        by_index = function(sources, targets, ignore_index=index, **settings)
        by_mask = function(sources, targets, mask=mask, **settings)
        both_ways = function(sources, targets, mask=mask, ignore_index=index, **settings)
        for left, middle, right in zip(by_index, by_mask, both_ways, strict=True):
            assert torch.equal(left, middle)
            assert torch.equal(left, right)


def test_a_position_counts_only_if_mask_and_index_both_say_so():
    targets = torch.tensor([0, 5, 1, 5])
    mask = torch.tensor([True, True, False, False])
    found = token_stats(torch.zeros(4, VOCAB), targets, mask=mask, ignore_index=5)
    assert (found.logps != 0).tolist() == [True, False, False, False]


@pytest.mark.parametrize(
    ("dtype", "index"), [(torch.uint8, -100), (torch.int8, 200), (torch.int16, 2**16 + 3)], ids=str
)
def test_an_ignored_index_that_the_targets_cannot_hold_ignores_nothing(dtype, index):
    wrapped = torch.tensor([index]).to(dtype)
    assert wrapped.item() != index
    targets = torch.cat([wrapped.clamp(min=0), torch.tensor([3], dtype=dtype)])
    found = token_stats(torch.zeros(2, 200), targets, ignore_index=index)
    assert found.logps.all()


@both
def test_nothing_counted_gives_zeros_and_zero_gradients(implementation):
    inputs = _inputs(2, 3)
    hidden = inputs[0].detach().fill_(math.nan).requires_grad_()
    logits = torch.full((2, 3, VOCAB), math.nan, requires_grad=True)
    targets = torch.full((2, 3), -100)
    settings = {**EVERYTHING, "ignore_index": -100, "implementation": implementation}
    for stats, sources in (
        (_linear([hidden, *inputs[1:]], targets, **settings), [hidden, *inputs[1:]]),
        (token_stats(logits, targets, **settings), [logits]),
    ):
        values, gradients = _values_and_gradients(stats, sources)
        for tensor in itertools.chain(values, gradients):
            assert tensor.numel()
            assert not tensor.any()


@both
def test_targets_that_do_not_count_need_not_be_classes(implementation):
    inputs, targets = _inputs(2, 3), _targets(2, 3)
    wild = targets.masked_fill(~MASK, 10**9)
    settings = {"mask": MASK, "implementation": implementation}
    assert torch.equal(
        _linear(inputs, wild, **settings).logps, _linear(inputs, targets, **settings).logps
    )
    logits = _normal(2, 3, VOCAB)
    assert torch.equal(
        token_stats(logits, -wild, **{**settings, "mask": MASK & (wild == 0)}).logps,
        torch.zeros(2, 3, dtype=DOUBLE).masked_scatter(
            MASK & (wild == 0), token_stats(logits, targets).logps[MASK & (wild == 0)]
        ),
    )


def test_an_infinite_upstream_weight_where_nothing_counts_does_no_harm():
    inputs, targets = _inputs(2, 3), _targets(2, 3)
    weights = torch.ones(2, 3, dtype=DOUBLE).masked_fill(~MASK, 1e300)
    for sources, stats in (
        (inputs, _linear(inputs, targets, mask=MASK)),
        (
            [logits := _normal(2, 3, VOCAB).requires_grad_()],
            token_stats(logits, targets, mask=MASK),
        ),
    ):
        spoilt = torch.autograd.grad((weights * stats.logps).sum(), sources, retain_graph=True)
        clean = torch.autograd.grad(stats.logps.sum(), sources)
        for ours, theirs in zip(spoilt, clean, strict=True):
            assert torch.equal(ours, theirs)


# laws


@both
@pytest.mark.parametrize("constant", [1.0, 1e4, -1e4])
def test_shifting_every_logit_changes_only_the_log_normalizer(implementation, constant):
    (hidden, weight, bias), targets = _inputs(2, 3), _targets(2, 3)
    settings = {**EVERYTHING, "implementation": implementation}
    # adding 1e4 rounds a logit by 1e-12
    near = {"rtol": 1e-11, "atol": 1e-11}
    before = _linear([hidden, weight, bias], targets, **settings)
    after = _linear([hidden, weight, bias + constant], targets, **settings)
    shifted = before._replace(log_normalizer=before.log_normalizer + constant)
    torch.testing.assert_close(after, shifted, **near)
    logits = F.linear(hidden, weight, bias)
    torch.testing.assert_close(
        token_stats(logits + constant, targets, **settings), shifted, **near
    )


@both
def test_logits_near_ten_thousand_lose_nothing_in_single_precision(implementation):
    exact = _normal(50, 97).mul(8).round().div(8)  # steps that single precision keeps at 1e4
    targets = _targets(50, vocab=97)
    expected = token_stats(exact, targets, **EVERYTHING)
    for constant in (1e4, -1e4):
        found = token_stats(
            (exact + constant).float(), targets, implementation=implementation, **EVERYTHING
        )
        for name in ("logps", "mean_logp", "entropy"):
            torch.testing.assert_close(
                getattr(found, name).double(), getattr(expected, name), rtol=0, atol=3e-6
            )


@both
def test_logits_scaled_to_ten_thousand_give_finite_values_and_gradients(implementation):
    logits = (1e4 * _normal(6, VOCAB)).float().requires_grad_()
    stats = token_stats(logits, _targets(6), implementation=implementation, **EVERYTHING)
    values, gradients = _values_and_gradients(stats, [logits])
    for tensor in itertools.chain(values, gradients):
        assert tensor.isfinite().all()
    # one class takes all
    assert stats.entropy.abs().max() < 1e-6
    torch.testing.assert_close(
        stats.logps, logits.gather(1, _targets(6).unsqueeze(1)).squeeze(1) - logits.amax(1)
    )


@both
@pytest.mark.parametrize("statistic", ["logps", "mean_logp", "entropy", "log_normalizer"])
def test_gradients_sum_to_zero_over_the_vocabulary_but_to_one_for_the_log_normalizer(
    implementation, statistic
):
    logits = (3 * _normal(6, VOCAB)).requires_grad_()
    stats = token_stats(logits, _targets(6), implementation=implementation, **EVERYTHING)
    (gradient,) = torch.autograd.grad(getattr(stats, statistic).sum(), logits)
    expected = 1.0 if statistic == "log_normalizer" else 0.0
    torch.testing.assert_close(
        gradient.sum(dim=-1), torch.full((6,), expected, dtype=DOUBLE), **EXACT
    )


@both
def test_the_gradient_of_a_log_probability_is_one_hot_minus_softmax(implementation):
    logits, targets = _normal(6, VOCAB).requires_grad_(), _targets(6)
    stats = token_stats(logits, targets, implementation=implementation)
    (gradient,) = torch.autograd.grad(stats.logps.sum(), logits)
    torch.testing.assert_close(gradient, F.one_hot(targets, VOCAB) - logits.softmax(-1), **EXACT)


@both
@pytest.mark.parametrize("scale", [0.0, 0.1, 1.0, 30.0])
def test_entropy_lies_between_zero_and_log_vocab_and_surprise_is_positive(implementation, scale):
    stats = token_stats(
        scale * _normal(200, VOCAB),
        _targets(200),
        implementation=implementation,
        **EVERYTHING,
    )
    slack = 1e-12
    assert (stats.entropy >= -slack).all()
    assert (stats.entropy <= math.log(VOCAB) + slack).all()
    assert (stats.logps <= slack).all()
    # Gibbs: the mean surprise is at least that of the uniform model
    assert (stats.mean_logp <= -math.log(VOCAB) + slack).all()


def test_the_log_probabilities_of_all_targets_sum_to_one():
    (hidden, weight, bias) = _inputs(1)
    stats = linear_token_stats(hidden.expand(VOCAB, DIM), weight, torch.arange(VOCAB), bias)
    torch.testing.assert_close(stats.logps.exp().sum(), torch.tensor(1.0, dtype=DOUBLE))


@both
def test_the_order_of_tokens_and_of_classes_does_not_matter(implementation):
    (hidden, weight, bias), targets = _inputs(6), _targets(6)
    settings = {**EVERYTHING, "implementation": implementation}
    stats = _linear([hidden, weight, bias], targets, **settings)
    order = torch.randperm(6, generator=_generator(5))
    permuted = _linear([hidden[order], weight, bias], targets[order], **settings)
    torch.testing.assert_close(permuted, TokenStats(*(s[order] for s in stats)), **EXACT)
    classes = torch.randperm(VOCAB, generator=_generator(6))
    permuted = _linear(
        [hidden, weight[classes], bias[classes]], classes.argsort()[targets], **settings
    )
    torch.testing.assert_close(permuted, stats, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_repeated_runs_give_equal_bits(dtype):
    inputs, targets = _inputs(40, vocab=300, dtype=dtype), _targets(40, vocab=300)

    def run():
        stats = _linear(inputs, targets, workspace=1, **EVERYTHING)
        return itertools.chain(*_values_and_gradients(stats, inputs))

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("workspace", [1, 10**4, 10**5, 10**6])
def test_the_workspace_changes_results_by_rounding_only(workspace):
    inputs, targets = _inputs(40, vocab=1003), _targets(40, vocab=1003)
    found, expected = (
        _values_and_gradients(_linear(inputs, targets, workspace=size, **EVERYTHING), inputs)
        for size in (workspace, 2**30)
    )
    torch.testing.assert_close(found, expected, **EXACT)


@both
def test_temperature_is_a_division_of_the_logits(implementation):
    (hidden, weight, bias), targets = _inputs(6), _targets(6)
    settings = {**EVERYTHING, "implementation": implementation}
    torch.testing.assert_close(
        _linear([hidden, weight, bias], targets, temperature=0.3, **settings),
        _linear([hidden / 0.3, weight, bias / 0.3], targets, **settings),
        **EXACT,
    )


@both
def test_a_high_soft_cap_is_none_and_a_low_one_bounds_the_distance_of_log_probabilities(
    implementation,
):
    logits, targets = 100 * _normal(6, VOCAB), _targets(6)
    settings = {**EVERYTHING, "implementation": implementation}
    torch.testing.assert_close(
        token_stats(logits, targets, softcap=1e9, **settings),
        token_stats(logits, targets, **settings),
        rtol=1e-9,
        atol=1e-9,
    )
    bounded = token_stats(logits, targets, softcap=0.5, **settings)
    # logits within +-0.5: no class is further than 1 from uniform
    assert (bounded.logps >= -math.log(VOCAB) - 1).all()
    assert (bounded.logps <= -math.log(VOCAB) + 1).all()


@both
@pytest.mark.parametrize("linear", [False, True])
def test_a_forbidden_class_is_the_same_as_none(implementation, linear):
    hidden, weight, bias = inputs = _inputs(2, 3)
    targets = _targets(2, 3)
    settings = {**EVERYTHING, "class_weight": _class_weight(), "implementation": implementation}
    wide_settings = {**settings, "class_weight": F.pad(_class_weight(), (0, 2), value=7.0)}
    if linear:
        wide = [
            hidden,
            F.pad(weight.detach(), (0, 0, 0, 2), value=3.0).requires_grad_(),
            F.pad(bias.detach(), (0, 2), value=FORBIDDEN).requires_grad_(),
        ]
        found, gradients = _values_and_gradients(_linear(wide, targets, **wide_settings), wide)
        expected, plain = _values_and_gradients(_linear(inputs, targets, **settings), inputs)
        plain = (plain[0], F.pad(plain[1], (0, 0, 0, 2)), F.pad(plain[2], (0, 2)))
    else:
        logits = F.linear(*inputs).detach().requires_grad_()
        wide = [F.pad(logits.detach(), (0, 2), value=FORBIDDEN).requires_grad_()]
        found, gradients = _values_and_gradients(
            token_stats(wide[0], targets, **wide_settings), wide
        )
        expected, plain = _values_and_gradients(token_stats(logits, targets, **settings), [logits])
        plain = (F.pad(plain[0], (0, 2)),)
    torch.testing.assert_close(found, expected, **EXACT)
    torch.testing.assert_close(gradients, plain, **EXACT)


@both
def test_a_forbidden_target_costs_infinitely_much_without_nan(implementation):
    inputs, targets = _inputs(3, bias="forbidding"), torch.tensor([1, 2, VOCAB - 1])
    settings = {**EVERYTHING, "implementation": implementation}
    logits = F.linear(*inputs).detach().requires_grad_()
    for stats, sources in (
        (_linear(inputs, targets, **settings), inputs),
        (token_stats(logits, targets, **settings), [logits]),
    ):
        assert (stats.logps == FORBIDDEN).tolist() == [True, False, True]
        for value in stats[1:]:
            assert value.isfinite().all()
        for gradient in torch.autograd.grad(_weighted(stats), sources):
            assert gradient.isfinite().all()


@both
def test_half_precision_is_computed_in_single(implementation):
    for half in (torch.bfloat16, torch.float16):
        logits, targets = (3 * _normal(6, VOCAB)).to(half), _targets(6)
        found = token_stats(logits, targets, implementation=implementation, **EVERYTHING)
        exact = token_stats(logits.double(), targets, implementation="reference", **EVERYTHING)
        for ours, theirs in zip(found, exact, strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded"])
def test_inputs_need_not_be_contiguous(layout):
    hidden, weight, bias = _inputs(2, 3)
    targets = _targets(2, 3)

    def relaid(tensor):
        if layout == "transposed":
            return tensor.transpose(0, -1).contiguous().transpose(0, -1)
        if layout == "strided":
            return torch.stack([tensor, tensor + 1], dim=-1)[..., 0]
        return tensor[:1].expand(tensor.shape)

    others = [relaid(hidden), relaid(weight), relaid(bias)]
    assert not all(tensor.is_contiguous() for tensor in others)
    plain = [tensor.contiguous() for tensor in others]
    for implementation in ("chunked", "reference"):
        settings = {**EVERYTHING, "implementation": implementation}
        found = _values_and_gradients(
            _linear(others, targets.t().contiguous().t(), **settings), [hidden, weight, bias]
        )
        expected = _values_and_gradients(
            _linear(plain, targets, **settings), [hidden, weight, bias]
        )
        torch.testing.assert_close(found, expected, **EXACT)
        logits = _normal(2, 3, VOCAB)
        torch.testing.assert_close(
            token_stats(relaid(logits), targets, **settings),
            token_stats(relaid(logits).contiguous(), targets, **settings),
            **EXACT,
        )


def test_inputs_and_their_class_weights_are_left_as_they_were():
    inputs, targets, weights = _inputs(2, 3), _targets(2, 3), _class_weight()
    logits = _normal(2, 3, VOCAB).requires_grad_()
    kept = [tensor.detach().clone() for tensor in (*inputs, logits, targets, weights)]
    settings = {**OPTIONS["all of them"], "class_weight": weights}
    _weighted(_linear(inputs, targets, **settings)).backward()
    _weighted(token_stats(logits, targets, **settings)).backward()
    for tensor, before in zip((*inputs, logits, targets, weights), kept, strict=True):
        assert torch.equal(tensor.detach(), before)


@both
def test_a_layer_without_dimensions_is_its_bias_alone(implementation):
    bias, targets = _normal(VOCAB).requires_grad_(), _targets(2, 3)
    found = linear_token_stats(
        torch.zeros(2, 3, 0, dtype=DOUBLE),
        torch.zeros(VOCAB, 0, dtype=DOUBLE),
        targets,
        bias,
        implementation=implementation,
        **EVERYTHING,
    )
    expected = token_stats(bias.expand(2, 3, VOCAB), targets, **EVERYTHING)
    torch.testing.assert_close(
        _values_and_gradients(found, [bias]), _values_and_gradients(expected, [bias]), **EXACT
    )


@both
@pytest.mark.parametrize("size", [1e30, 1e38])
def test_logits_of_any_finite_size_give_no_nan(implementation, size):
    logits = torch.tensor([[size, -size, 0.0], [-size, -size, -size]], requires_grad=True)
    stats = token_stats(logits, torch.tensor([0, 1]), implementation=implementation, **EVERYTHING)
    values, gradients = _values_and_gradients(stats, [logits])
    assert stats.logps.tolist() == pytest.approx([0.0, -math.log(3)])
    assert stats.entropy.tolist() == pytest.approx([0.0, math.log(3)])
    for tensor in itertools.chain(values, gradients):
        assert tensor.isfinite().all()


# automatic differentiation and transforms


@pytest.mark.parametrize("masked", [False, True])
def test_functional_gradients_are_those_of_autograd(masked):
    targets = _targets(2, 3)
    settings = {**EVERYTHING, **({"mask": MASK} if masked else {})}
    hidden, weight, bias = inputs = _inputs(2, 3)

    def loss(hidden, weight, bias):
        return _weighted(linear_token_stats(hidden, weight, targets, bias, **settings))

    expected = torch.autograd.grad(loss(*inputs), inputs)
    plain = [tensor.detach() for tensor in inputs]
    torch.testing.assert_close(torch.func.grad(loss, (0, 1, 2))(*plain), expected, **EXACT)
    logits = F.linear(*plain)

    def of_logits(logits):
        return _weighted(token_stats(logits, targets, **settings))

    (expected,) = torch.autograd.grad(of_logits(leaf := logits.clone().requires_grad_()), leaf)
    torch.testing.assert_close(torch.func.grad(of_logits)(logits), expected, **EXACT)


def test_mapped_gradients_are_those_of_each_example():
    hidden, weight, bias = (tensor.detach() for tensor in _inputs(4, 3))
    targets = _targets(4, 3)
    mask = torch.tensor([[True, True, True], [True, False, True], [False] * 3, [True] * 3])

    def loss(weight, hidden, targets, mask):
        stats = linear_token_stats(hidden, weight, targets, bias, mask=mask, **EVERYTHING)
        return sum(value.sum() for value in stats)

    mapped = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0, 0))
    found = mapped(weight, hidden, targets, mask)
    for ours, *example in zip(found, hidden, targets, mask, strict=True):
        leaf = weight.clone().requires_grad_()
        (expected,) = torch.autograd.grad(loss(leaf, *example), leaf)
        torch.testing.assert_close(ours, expected, **EXACT)

    def from_logits(logits, targets):
        stats = token_stats(logits, targets, ignore_index=5, **EVERYTHING)
        return sum(value.sum() for value in stats)

    logits = F.linear(hidden, weight, bias)
    found = torch.func.vmap(torch.func.grad(from_logits))(logits, targets)
    leaf = logits.clone().requires_grad_()
    (expected,) = torch.autograd.grad(from_logits(leaf, targets), leaf)
    torch.testing.assert_close(found, expected, **EXACT)


def test_functional_hessians_and_jacobians_are_the_references():
    hidden, weight, bias = (tensor.detach() for tensor in _inputs(2))
    targets = _targets(2)

    def loss(hidden, implementation=None):
        stats = linear_token_stats(
            hidden, weight, targets, bias, implementation=implementation, **EVERYTHING
        )
        return _weighted(stats)

    expected = torch.autograd.functional.hessian(
        lambda hidden: loss(hidden, implementation="reference"), hidden
    )
    torch.testing.assert_close(torch.func.hessian(loss)(hidden), expected, **EXACT)

    def logps(hidden):
        return tuple(linear_token_stats(hidden, weight, targets, bias, **EVERYTHING))

    expected = torch.autograd.functional.jacobian(logps, hidden)
    torch.testing.assert_close(torch.func.jacfwd(logps)(hidden), expected, **EXACT)
    torch.testing.assert_close(torch.func.jacrev(logps)(hidden), expected, **EXACT)

    def of_logits(logits):
        return tuple(token_stats(logits, targets, **EVERYTHING))

    logits = F.linear(hidden, weight, bias)
    expected = torch.autograd.functional.jacobian(of_logits, logits)
    torch.testing.assert_close(torch.func.jacfwd(of_logits)(logits), expected, **EXACT)


def test_forward_mode_differentiation_gives_the_directional_derivative():
    inputs, targets = _inputs(3), _targets(3)
    directions = [_normal(*tensor.shape, seed=20 + i) for i, tensor in enumerate(inputs)]
    stats = _linear(inputs, targets, **EVERYTHING)
    logits = F.linear(*inputs).detach().requires_grad_()
    of_logits = token_stats(logits, targets, **EVERYTHING)
    along = _normal(3, VOCAB, seed=30)
    expected = [
        sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))
        for value in stats
        for gradients in [torch.autograd.grad(value.sum(), inputs, retain_graph=True)]
    ]
    expected_of_logits = [
        (torch.autograd.grad(value.sum(), logits, retain_graph=True)[0] * along).sum()
        for value in of_logits
    ]
    with forward_ad.dual_level():
        duals = [
            forward_ad.make_dual(tensor.detach(), direction)
            for tensor, direction in zip(inputs, directions, strict=True)
        ]
        for dual_stats, wanted in (
            (_linear(duals, targets, **EVERYTHING), expected),
            (
                token_stats(forward_ad.make_dual(logits.detach(), along), targets, **EVERYTHING),
                expected_of_logits,
            ),
        ):
            for value, derivative in zip(dual_stats, wanted, strict=True):
                tangent = forward_ad.unpack_dual(value).tangent
                torch.testing.assert_close(tangent.sum(), derivative, **EXACT)


@options
def test_statistics_of_logits_can_be_differentiated_twice(settings):
    targets = _targets(2, 3)
    direction = _normal(2, 3, VOCAB, seed=8)

    def second(implementation):
        logits = _normal(2, 3, VOCAB).requires_grad_()
        stats = token_stats(logits, targets, implementation=implementation, **settings)
        loss = sum((value**2).sum() for value in _present(stats))
        (first,) = torch.autograd.grad(loss, logits, create_graph=True)
        return torch.autograd.grad((first * direction).sum(), logits)

    torch.testing.assert_close(second("chunked"), second("reference"), **EXACT)


@pytest.mark.parametrize("settings", [OPTIONS["both"], OPTIONS["all of them"]])
def test_second_derivatives_of_statistics_agree_with_finite_differences(settings):
    targets = _targets(2, 3)[..., :2]
    mask = settings.get("mask")
    settings = {**settings, **({} if mask is None else {"mask": mask[..., :2]})}

    def stats(logits):
        return tuple(token_stats(logits, targets, **settings))

    assert torch.autograd.gradgradcheck(stats, _normal(2, 2, VOCAB).requires_grad_())


def test_a_learned_temperature_and_a_learned_class_weight_get_their_gradients():
    logits, targets = _normal(6, VOCAB), _targets(6)
    scale = torch.tensor(1.3, dtype=DOUBLE, requires_grad=True)
    weights = _class_weight().requires_grad_()

    def found(implementation):
        stats = token_stats(
            logits / scale,
            targets,
            class_weight=weights,
            implementation=implementation,
            **EVERYTHING,
        )
        return torch.autograd.grad(_weighted(stats), [scale, weights])

    torch.testing.assert_close(found(None), found("reference"), **EXACT)


REFUSED = "for second derivatives pass implementation='reference'"


@pytest.mark.parametrize("first", [0, 1, 2])
@pytest.mark.parametrize("second", [0, 1, 2])
def test_a_second_derivative_of_the_lean_form_is_refused_and_not_silently_zero(first, second):
    inputs, targets = _inputs(3), _targets(3)
    stats = _linear(inputs, targets, **EVERYTHING)
    (gradient,) = torch.autograd.grad(_weighted(stats), inputs[first], create_graph=True)
    with pytest.raises(RuntimeError, match=REFUSED):
        torch.autograd.grad(gradient.square().sum(), inputs[second], allow_unused=True)


def test_a_second_derivative_in_what_multiplies_the_statistics_is_refused_too():
    inputs, targets = _inputs(3), _targets(3)
    factor = torch.ones(3, dtype=DOUBLE, requires_grad=True)
    stats = _linear(inputs, targets)
    (gradient,) = torch.autograd.grad((factor * stats.logps).sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match=REFUSED):
        torch.autograd.grad(gradient.sum(), factor, allow_unused=True)


def test_keeping_the_graph_is_allowed_while_only_first_derivatives_are_taken():
    inputs, targets = _inputs(3), _targets(3)
    stats = _linear(inputs, targets, **EVERYTHING)
    kept = torch.autograd.grad(_weighted(stats), inputs, create_graph=True)
    plain = torch.autograd.grad(_weighted(stats), inputs)
    for ours, theirs in zip(kept, plain, strict=True):
        assert torch.equal(ours, theirs)


def test_the_reference_from_hidden_states_can_be_differentiated_twice():
    targets = _targets(2)

    def stats(*inputs):
        found = _linear(inputs, targets, implementation="reference", **EVERYTHING)
        return sum(value.square().sum() for value in found)

    assert torch.autograd.gradgradcheck(stats, _inputs(2))


def test_backward_twice_gives_the_same_gradient_twice():
    inputs, targets = _inputs(2, 3), _targets(2, 3)
    logits = _normal(2, 3, VOCAB).requires_grad_()
    for loss, sources in (
        (_weighted(_linear(inputs, targets, **EVERYTHING)), inputs),
        (_weighted(token_stats(logits, targets, **EVERYTHING)), [logits]),
    ):
        first = torch.autograd.grad(loss, sources, retain_graph=True)
        second = torch.autograd.grad(loss, sources)
        for ours, theirs in zip(first, second, strict=True):
            assert torch.equal(ours, theirs)


def test_a_changed_input_is_noticed_before_the_backward_pass():
    inputs, targets = _inputs(3), _targets(3)
    loss = _weighted(_linear(inputs, targets))
    with torch.no_grad():
        inputs[1].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_values_are_the_same(context):
    inputs, targets = _inputs(2, 3), _targets(2, 3)
    expected = _linear(inputs, targets, mask=MASK, **EVERYTHING)
    logits = F.linear(*inputs)
    of_logits = token_stats(logits, targets, mask=MASK, **EVERYTHING)
    with context():
        for found, wanted in (
            (_linear(inputs, targets, mask=MASK, **EVERYTHING), expected),
            (token_stats(logits, targets, mask=MASK, **EVERYTHING), of_logits),
        ):
            for ours, theirs in zip(found, wanted, strict=True):
                assert not ours.requires_grad
                assert torch.equal(ours, theirs)


def test_checkpointing_gives_equal_gradients():
    inputs, targets = _inputs(2, 3), _targets(2, 3)

    def loss(hidden, weight, bias):
        hidden = (2 * hidden).tanh()
        return _weighted(
            linear_token_stats(hidden, weight, targets, bias, mask=MASK, **EVERYTHING)
        ) + _weighted(token_stats(F.linear(hidden, weight, bias), targets, **EVERYTHING))

    expected = torch.autograd.grad(loss(*inputs), inputs)
    found = torch.autograd.grad(checkpoint(loss, *inputs, use_reentrant=False), inputs)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


@both
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_is_the_same_as_casting_by_hand(implementation, half):
    inputs, targets = _inputs(2, 3, dtype=torch.float32), _targets(2, 3)
    settings = {**EVERYTHING, "mask": MASK, "implementation": implementation}
    with torch.autocast("cpu", dtype=half):
        stats = _linear(inputs, targets, **settings)
    found = _values_and_gradients(stats, inputs)  # backward outside of the context
    by_hand = _linear([tensor.to(half) for tensor in inputs], targets, **settings)
    expected = _values_and_gradients(by_hand, inputs)
    for ours, theirs in zip(itertools.chain(*found), itertools.chain(*expected), strict=True):
        assert ours.dtype == theirs.dtype == torch.float32
        assert torch.equal(ours, theirs)


@both
def test_autocast_lets_half_precision_states_meet_a_single_precision_matrix(implementation):
    (hidden, weight, bias), targets = _inputs(2, 3, dtype=torch.float32), _targets(2, 3)
    halves = [tensor.bfloat16() for tensor in (hidden, weight, bias)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = _linear([halves[0], weight, bias], targets, implementation=implementation)
    expected = _linear(halves, targets, implementation=implementation)
    assert torch.equal(found.logps, expected.logps)


@both
def test_autocast_leaves_logits_and_double_precision_as_they_are(implementation):
    inputs, targets = _inputs(2, 3), _targets(2, 3)
    logits = _normal(2, 3, VOCAB, dtype=torch.float32)
    settings = {**EVERYTHING, "implementation": implementation}
    plain = _linear(inputs, targets, **settings), token_stats(logits, targets, **settings)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = _linear(inputs, targets, **settings), token_stats(logits, targets, **settings)
    torch.testing.assert_close(cast, plain, rtol=0, atol=0)


@pytest.mark.skipif(
    hasattr(token_stats, "__wrapped__"),
    reason="a type checker around a function cannot be traced",
)
def test_compiled_statistics_of_logits_are_those_of_eager():
    logits, targets = _normal(2, 3, VOCAB).requires_grad_(), _targets(2, 3)

    def loss(logits, targets, mask):
        stats = token_stats(logits, targets, mask=mask, softcap=2.0, temperature=0.7, **EVERYTHING)
        return sum((value * (1 + i)).sum() for i, value in enumerate(stats))

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found, expected = (f(logits, targets, MASK) for f in (compiled, loss))
    torch.testing.assert_close(found, expected, **EXACT)
    torch.testing.assert_close(
        torch.autograd.grad(found, logits), torch.autograd.grad(expected, logits), **EXACT
    )


@pytest.mark.parametrize("settings", [{}, OPTIONS["all of them"]], ids=["plain", "everything"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_reads_values_from_the_device(settings, dtype):
    settings = {
        name: value.to("meta") if isinstance(value, torch.Tensor) else value
        for name, value in settings.items()
    }
    inputs = [t.detach().to("meta").requires_grad_() for t in _inputs(2, 3, dtype=dtype)]
    logits = torch.zeros(2, 3, VOCAB, dtype=dtype, device="meta", requires_grad=True)
    targets = _targets(2, 3).to("meta")
    for stats, sources in (
        (_linear(inputs, targets, **settings), inputs),
        (token_stats(logits, targets, **settings), [logits]),
    ):
        for value in _present(stats):
            assert value.device.type == "meta"
            assert value.shape == (2, 3)
        loss = sum(value.sum() for value in _present(stats))
        for gradient, source in zip(torch.autograd.grad(loss, sources), sources, strict=True):
            assert gradient.device.type == "meta"
            assert gradient.shape == source.shape
            assert gradient.dtype == dtype


# errors

LOGITS, HIDDEN, WEIGHT = torch.zeros(2, 3), torch.zeros(2, 5), torch.zeros(3, 5)
TARGETS = torch.tensor([0, 2])


def _of_logits(targets=TARGETS, logits=LOGITS, **settings):
    return token_stats(logits, targets, **settings)


def _of_hidden(targets=TARGETS, hidden=HIDDEN, weight=WEIGHT, bias=None, **settings):
    return linear_token_stats(hidden, weight, targets, bias, **settings)


of_either = pytest.mark.parametrize(
    ("stats", "first"), [(_of_logits, "logits"), (_of_hidden, "hidden")], ids=["logits", "hidden"]
)


@pytest.mark.bad_input
@of_either
@pytest.mark.parametrize("shape", [(3,), (2, 1), (1,), ()])
def test_refuses_targets_of_another_shape(stats, first, shape):
    with pytest.raises(ValueError) as raised:
        stats(torch.zeros(shape, dtype=torch.long))
    assert str(raised.value) == (
        f"targets must have shape (2,), the shape of {first} without its last axis; got {shape}"
    )


@pytest.mark.bad_input
@of_either
def test_refuses_targets_of_another_kind(stats, first):
    for dtype in (torch.float32, torch.bool, torch.complex64):
        with pytest.raises(TypeError, match=f"targets must be an integer tensor; got {dtype}"):
            stats(TARGETS.to(dtype))


@of_either
@pytest.mark.parametrize("implementation", ["reference", "chunked", None])
@pytest.mark.parametrize("wrong", [[0, 3], [-1, 0], [-100, 2]])
def test_refuses_a_counted_target_that_is_no_class(stats, first, implementation, wrong):
    with pytest.raises(ValueError) as raised:
        stats(torch.tensor(wrong), implementation=implementation)
    assert str(raised.value) == (
        f"targets must lie in [0, 3), the vocabulary; got values from {min(wrong)} to {max(wrong)}"
    )
    with pytest.raises(ValueError, match="targets must lie in"):
        stats(torch.tensor(wrong), mask=torch.tensor([True, True]), implementation=implementation)


@pytest.mark.bad_input
@of_either
def test_refuses_a_mask_that_is_not_boolean_or_does_not_fit(stats, first):
    with pytest.raises(
        TypeError, match=r"mask must be a boolean tensor \(True means counted\); got torch.float32"
    ):
        stats(mask=torch.ones(2))
    with pytest.raises(
        ValueError, match=r"mask must have shape \(2,\), the shape of targets; got \(2, 1\)"
    ):
        stats(mask=torch.ones(2, 1, dtype=torch.bool))


@pytest.mark.bad_input
@of_either
@pytest.mark.parametrize("index", [1.0, True, "0"])
def test_refuses_an_ignored_index_that_is_no_whole_number(stats, first, index):
    with pytest.raises(TypeError, match=f"ignore_index must be a whole number; got .*{index}"):
        stats(ignore_index=index)


@pytest.mark.bad_input
@of_either
def test_refuses_class_weights_of_another_shape_or_kind(stats, first):
    with pytest.raises(
        ValueError, match=r"class_weight must have shape \(3,\), one entry per class; got \(2,\)"
    ):
        stats(class_weight=torch.ones(2))
    with pytest.raises(
        TypeError, match="class_weight must be a floating-point tensor; got torch.int64"
    ):
        stats(class_weight=torch.ones(3, dtype=torch.long))
    with pytest.raises(TypeError, match=r"class_weight must be a torch.Tensor; got list \[1.0"):
        stats(class_weight=[1.0, 1.0, 1.0])


@pytest.mark.bad_input
@of_either
@pytest.mark.parametrize("name", ["temperature", "softcap"])
def test_refuses_a_temperature_or_soft_cap_that_is_not_positive(stats, first, name):
    for value in (0.0, -1.0):
        with pytest.raises(ValueError, match=f"{name} must be positive; got {value}"):
            stats(**{name: value})
    for value in (math.inf, math.nan):
        with pytest.raises(ValueError, match=f"{name} must be finite; got {value}"):
            stats(**{name: value})
    with pytest.raises(TypeError, match=f"{name} must be a real number; got str '1'"):
        stats(**{name: "1"})
    with pytest.raises(TypeError, match=f"{name} must be a real number; got a tensor"):
        stats(**{name: torch.tensor(1.0)})


@pytest.mark.bad_input
@of_either
def test_refuses_an_implementation_that_it_does_not_know(stats, first):
    with pytest.raises(ValueError) as raised:
        stats(implementation="fused")
    assert str(raised.value) == (
        "implementation must be 'reference', 'chunked', 'triton' or None; got 'fused'"
    )


@of_either
def test_refuses_triton_where_its_kernels_cannot_run(stats, first, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="implementation='triton' needs CUDA tensors .*'chunked'"):
        stats(implementation="triton")


@pytest.mark.bad_input
def test_refuses_logits_that_are_not_floating_point_or_hold_no_class():
    with pytest.raises(TypeError, match="logits must be a floating-point tensor; got torch.int64"):
        _of_logits(logits=LOGITS.long())
    with pytest.raises(TypeError, match=r"logits must be a torch.Tensor; got list \[\]"):
        _of_logits(logits=[])
    with pytest.raises(ValueError, match="logits must have at least one entry along axis -1"):
        _of_logits(logits=torch.zeros(2, 0))
    with pytest.raises(ValueError, match=r"logits must have at least 1 axes; got shape \(\)"):
        _of_logits(logits=torch.zeros(()))


@pytest.mark.bad_input
@pytest.mark.parametrize("name", ["hidden", "weight", "bias"])
def test_refuses_a_layer_that_is_not_floating_point(name):
    whole = {"hidden": HIDDEN, "weight": WEIGHT, "bias": torch.zeros(3)}[name].long()
    with pytest.raises(
        TypeError, match=f"{name} must be a floating-point tensor; got torch.int64"
    ):
        _of_hidden(**{name: whole})
    if name != "bias":
        with pytest.raises(TypeError, match=f"{name} must be a torch.Tensor; got NoneType None"):
            _of_hidden(**{name: None})


@pytest.mark.bad_input
def test_refuses_a_layer_whose_shapes_do_not_fit():
    with pytest.raises(ValueError) as raised:
        _of_hidden(weight=torch.zeros(3, 4))
    assert str(raised.value) == (
        "weight must have shape (vocab, 5), one row per class with the last axis of hidden; "
        "got (3, 4)"
    )
    with pytest.raises(ValueError, match=r"weight must have 2 axes; got shape \(5,\)"):
        _of_hidden(weight=torch.zeros(5))
    with pytest.raises(ValueError, match="weight must have at least one entry along axis 0"):
        _of_hidden(weight=torch.zeros(0, 5))
    with pytest.raises(ValueError, match=r"hidden must have at least 1 axes; got shape \(\)"):
        _of_hidden(hidden=torch.zeros(()))
    with pytest.raises(
        ValueError, match=r"bias must have shape \(3,\), one entry per row of weight; got \(1,\)"
    ):
        _of_hidden(bias=torch.zeros(1))


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
@pytest.mark.parametrize("name", ["hidden", "weight", "bias"])
def test_refuses_dtypes_that_differ_outside_of_autocast(implementation, name):
    layer = {"hidden": HIDDEN, "weight": WEIGHT, "bias": torch.zeros(3)}
    layer[name] = layer[name].bfloat16()
    with pytest.raises(TypeError, match=r"torch.autocast makes them agree") as raised:
        _of_hidden(**layer, implementation=implementation)
    for dtype in ("torch.float32", "torch.bfloat16"):
        assert dtype in str(raised.value)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_refuses_a_layer_on_two_devices(name):
    layer = {"hidden": HIDDEN, "weight": WEIGHT, "bias": torch.zeros(3)}
    layer[name] = layer[name].to("meta")
    with pytest.raises(ValueError) as raised:
        _of_hidden(**layer)
    assert str(raised.value) == f"{name} must be on cpu, the device of hidden; got meta"


@of_either
@pytest.mark.parametrize("name", ["targets", "mask", "class_weight"])
def test_refuses_targets_masks_and_class_weights_on_another_device(stats, first, name):
    other = {"targets": TARGETS, "mask": TARGETS > 0, "class_weight": torch.ones(3)}[name]
    with pytest.raises(ValueError, match=f"{name} must be on cpu, the device of .*; got meta"):
        stats(**{name: other.to("meta")}, mean_logp=True)


@pytest.mark.bad_input
def test_refuses_a_workspace_that_is_no_positive_number_of_bytes():
    for workspace in (0, -1):
        with pytest.raises(ValueError, match=f"workspace must be positive; got {workspace}"):
            _of_hidden(workspace=workspace)
    for workspace in (1e6, True, None):
        with pytest.raises(
            TypeError, match=f"workspace must be a whole number; got .*{workspace}"
        ):
            _of_hidden(workspace=workspace)

"""Tests of lmlosses.precision."""

import math

import pytest
import torch
from torch.distributed.tensor import DTensor, Shard

from lmlosses import cpu_generator
from lmlosses.precision import (
    DynamicLossScaler,
    StaticLossScaler,
    breaking_points,
    clip_by_global_norm,
    clip_by_value,
    global_norm,
    log_sum_exp,
)


def params_with(*grads):
    """One parameter for each gradient, and one without."""
    params = [torch.nn.Parameter(torch.zeros_like(grad)) for grad in grads]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad.clone()
    return [*params, torch.nn.Parameter(torch.ones(2))]


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=cpu_generator(seed)).to(dtype)


# ---- the global norm


def test_a_triangle_of_sides_three_and_four_across_two_tensors_has_norm_five():
    assert global_norm([torch.tensor([3.0]), torch.tensor([[4.0]])]) == 5


@pytest.mark.parametrize(
    ("dtype", "entry"),
    [
        (torch.float32, 1e30),
        (torch.float32, 1e-30),
        (torch.bfloat16, 1e30),
        (torch.float16, 6e4),
        (torch.float64, 1e200),
        (torch.float64, 1e-200),
    ],
)
def test_squares_that_leave_the_range_do_no_harm_to_the_norm(dtype, entry):
    tensor = torch.full((100,), entry, dtype=dtype)
    norm = global_norm([tensor, torch.zeros(3, dtype=dtype)])
    assert norm.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(norm.double() / tensor[0].double(), torch.tensor(10.0).double(),
                               rtol=1e-6, atol=0)  # fmt: skip


def test_the_norm_of_many_half_numbers_is_summed_in_more_digits():
    # in float16 a running sum of ones stops at 2048
    assert global_norm(torch.ones(10_000, dtype=torch.float16)) == 100


def test_the_norm_of_nothing_is_zero():
    assert global_norm([]) == 0
    assert global_norm([torch.zeros(0)]) == 0


# ---- clipping by norm


@pytest.mark.parametrize("max_norm", [0.5, 1e3])
def test_ordinary_gradients_are_clipped_as_by_torch(max_norm):
    grads = draw(4, 3), draw(5, seed=1, dtype=torch.float64), draw(2, seed=2)
    ours, theirs = params_with(*grads), params_with(*grads)
    norm = clip_by_global_norm(ours, max_norm=max_norm)
    reference = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
    assert norm.item() == pytest.approx(reference.item(), rel=1e-6)
    for our, their in zip(ours[:-1], theirs[:-1], strict=True):
        torch.testing.assert_close(our.grad, their.grad, rtol=1e-6, atol=0)
    assert ours[-1].grad is None


def test_a_clipped_gradient_has_the_largest_norm_even_where_that_is_tiny():
    (ours, _), (theirs, _) = params_with(torch.tensor([1e-7])), params_with(torch.tensor([1e-7]))
    clip_by_global_norm(ours, max_norm=1e-8)
    assert ours.grad.item() == pytest.approx(1e-8, rel=1e-6)
    torch.nn.utils.clip_grad_norm_(theirs, 1e-8)  # 1e-6 is added to the norm
    assert theirs.grad.item() < 1e-9


def test_gradients_of_1e30_are_clipped_where_torch_makes_them_zero():
    huge = torch.full((100,), 1e30)
    ours, theirs = params_with(huge), params_with(huge)
    assert clip_by_global_norm(ours, max_norm=1.0).item() == pytest.approx(1e31, rel=1e-6)
    torch.testing.assert_close(ours[0].grad, torch.full((100,), 0.1))
    torch.nn.utils.clip_grad_norm_(theirs, 1.0)
    assert (theirs[0].grad == 0).all()


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("clip", [
    lambda params: clip_by_global_norm(params, max_norm=0.1),
    lambda params: clip_by_value(params, max_value=0.1),
])  # fmt: skip
def test_one_wrong_entry_is_reported_and_no_gradient_changes(clip, wrong):
    grads = draw(3), torch.tensor([1.0, wrong], dtype=torch.float16)
    params = params_with(*grads)
    norm = clip(params)
    assert not norm.isfinite() and math.isnan(norm) == math.isnan(wrong)
    for param, grad in zip(params, grads, strict=False):
        torch.testing.assert_close(param.grad, grad, rtol=0, atol=0, equal_nan=True)


def test_gradients_of_several_dtypes_share_one_factor():
    dtypes = torch.float16, torch.bfloat16, torch.float32, torch.float64
    params = params_with(*(torch.full((4,), 2.0, dtype=dtype) for dtype in dtypes))
    assert clip_by_global_norm(params, max_norm=4.0) == 8
    for param, dtype in zip(params, dtypes, strict=False):
        assert param.grad.dtype == dtype and (param.grad == 1).all()


def test_many_small_gradients_of_several_dtypes_are_clipped_as_one_by_one():
    dtypes = torch.float32, torch.bfloat16, torch.float64, torch.float16
    grads = [draw(3, seed=seed, dtype=dtypes[seed % 4]) for seed in range(200)]
    grads[8] = grads[8][:0]
    params = params_with(*grads)
    expected = math.sqrt(sum(grad.double().square().sum().item() for grad in grads))
    norm = clip_by_global_norm(params, max_norm=2.0)
    assert norm.item() == pytest.approx(expected, rel=1e-6)
    for param, grad in zip(params, grads, strict=False):
        factor = torch.tensor(2.0 / expected, dtype=torch.promote_types(grad.dtype, torch.float32))
        # half precision is multiplied in float32 and rounded once
        torch.testing.assert_close(param.grad, grad * factor.item(), rtol=1e-6, atol=0)


def test_norms_of_a_batch_of_lists_are_those_of_each_list():
    rows = draw(5, 4), draw(5, 2, 3, seed=1)
    norms = torch.vmap(lambda *tensors: global_norm(tensors))(*rows)
    expected = torch.stack([global_norm([row[i] for row in rows]) for i in range(5)])
    torch.testing.assert_close(norms, expected)


def test_nothing_to_clip_has_norm_zero_and_zeros_stay_zeros():
    assert clip_by_global_norm([], max_norm=1.0) == 0
    assert clip_by_global_norm(params_with(), max_norm=1.0) == 0
    params = params_with(torch.zeros(3))
    assert clip_by_global_norm(params, max_norm=0.0) == 0
    assert (params[0].grad == 0).all()


def test_one_tensor_and_an_iterator_are_taken_too():
    (param, _) = params_with(torch.tensor([3.0, 4.0]))
    assert clip_by_global_norm(param, max_norm=9.0) == 5
    assert clip_by_global_norm(iter([param]), max_norm=9.0) == 5


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_clipping_waits_for_no_device(dtype):
    params = params_with(torch.empty(3, dtype=dtype, device="meta"))
    assert clip_by_global_norm(params, max_norm=1.0).device.type == "meta"
    assert clip_by_value(params, max_value=1.0).device.type == "meta"
    optimizer = torch.optim.SGD(params)
    assert StaticLossScaler().unscale(optimizer).device.type == "meta"


def test_the_way_without_looking_agrees_with_the_quick_one(monkeypatch):
    grads = draw(50), draw(20, seed=1, dtype=torch.float64), torch.full((9,), 1e30)
    quick = global_norm(grads)
    monkeypatch.setattr("lmlosses.precision.reads_values", lambda *tensors: False)
    torch.testing.assert_close(global_norm(grads), quick, rtol=1e-7, atol=0)


@pytest.mark.compiles
def test_clipping_is_traced_in_one_piece():
    params = params_with(draw(3), draw(5, seed=1, dtype=torch.bfloat16))
    expected = global_norm([param.grad for param in params[:-1]])
    whole = torch.compile(
        lambda: clip_by_global_norm(params, max_norm=0.5), backend="eager", fullgraph=True
    )
    torch.testing.assert_close(whole(), expected)
    clipped = global_norm([param.grad for param in params[:-1]])
    torch.testing.assert_close(clipped, torch.tensor(0.5), rtol=1e-2, atol=0)  # bfloat16 rounds


@pytest.fixture
def mesh(tmp_path):
    store = f"file://{tmp_path / 'meeting'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_sharded_gradients_are_clipped_beside_whole_ones(mesh):
    whole = torch.tensor([3.0, 0.0, 4.0])
    sharded = torch.nn.Parameter(DTensor.from_local(torch.zeros(3), mesh, [Shard(0)]))
    sharded.grad = DTensor.from_local(whole.clone(), mesh, [Shard(0)])
    params = [sharded, *params_with(torch.tensor([12.0]))]
    norm = clip_by_global_norm(params, max_norm=6.5)
    assert not isinstance(norm, DTensor) and norm == 13
    torch.testing.assert_close(sharded.grad.full_tensor(), whole / 2)
    clip_by_value(params, max_value=1.8)
    torch.testing.assert_close(sharded.grad.full_tensor(), torch.tensor([1.5, 0.0, 1.8]))


# ---- clipping by value


def test_values_are_clipped_as_by_torch():
    grads = draw(4, 3), draw(5, seed=1, dtype=torch.float64), draw(2, seed=2, dtype=torch.float16)
    ours, theirs = params_with(*grads), params_with(*grads)
    assert clip_by_value(ours, max_value=0.5).item() == pytest.approx(global_norm(grads).item())
    torch.nn.utils.clip_grad_value_(theirs, 0.5)
    for our, their in zip(ours[:-1], theirs[:-1], strict=True):
        assert torch.equal(our.grad, their.grad)


def test_a_bound_that_half_precision_cannot_hold_clips_nothing():
    params = params_with(torch.tensor([6e4], dtype=torch.float16))
    clip_by_value(params, max_value=1e30)
    assert params[0].grad == torch.tensor(6e4, dtype=torch.float16)


@pytest.mark.bad_input
def test_clipping_refuses_what_it_cannot_clip():
    with pytest.raises(ValueError, match="max_norm must not be negative; got -1"):
        clip_by_global_norm([], max_norm=-1.0)
    with pytest.raises(ValueError, match="max_norm must be finite; got inf"):
        clip_by_global_norm([], max_norm=math.inf)
    with pytest.raises(ValueError, match="max_value must be finite; got nan"):
        clip_by_value([], max_value=math.nan)
    with pytest.raises(TypeError, match=r"params\[0\] must be a torch.Tensor; got str"):
        clip_by_global_norm("w", max_norm=1.0)
    with pytest.raises(TypeError, match=r"tensors\[1\] must be a floating-point tensor"):
        global_norm([torch.ones(1), torch.ones(1, dtype=torch.long)])
    with pytest.raises(TypeError, match=r"gradients\[0\] must be dense; got torch.sparse_coo"):
        param = torch.nn.Parameter(torch.zeros(2))
        param.grad = torch.eye(2)[0].to_sparse()
        clip_by_global_norm([param], max_norm=1.0)


# ---- loss scaling

PATTERNS = ["ffffffffff", "iiiii", "ffifffiffffff", "fnffffifnffff", "iffffffffff"]
ENTRIES = {"f": 1.0, "i": math.inf, "n": math.nan}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("growth", [2.0, 1.7])
def test_decisions_are_those_of_torch(pattern, growth):
    settings = {"growth_factor": growth, "backoff_factor": 0.3, "growth_interval": 3}
    theirs = torch.amp.GradScaler("cpu", init_scale=2.0**16, **settings)
    ours = DynamicLossScaler(2.0**16, **settings, min_scale=1e-30)
    sides = []
    for scaler in (ours, theirs):
        w = torch.nn.Parameter(torch.tensor([1.0]))
        optimizer = torch.optim.SGD([w], lr=0.1)
        seen = []
        for letter in pattern:
            before = w.item()
            optimizer.zero_grad()
            scaler.scale(w.sum() * ENTRIES[letter]).backward()
            scaler.step(optimizer)
            scaler.update()
            seen.append((scaler.get_scale(), w.item(), w.item() != before, w.grad.item()))
        sides.append(seen)
    for our, their in zip(*sides, strict=True):
        assert our == pytest.approx(their, rel=1e-7, nan_ok=True)


def test_the_factor_never_grows_past_the_largest_number_as_in_torch():
    theirs = torch.amp.GradScaler("cpu", init_scale=2.0**126, growth_interval=1)
    ours = DynamicLossScaler(2.0**126, growth_interval=1)
    w = torch.nn.Parameter(torch.tensor([1.0]))
    optimizer = torch.optim.SGD([w], lr=0.0)
    for scaler in (ours, theirs):
        for _ in range(3):
            optimizer.zero_grad()
            scaler.scale(w.sum() * 1e-3).backward()
            scaler.step(optimizer)
            scaler.update()
    assert ours.get_scale() == theirs.get_scale() == 2.0**127


def iterate(scaler, w, optimizer, factor=1.0):
    optimizer.zero_grad()
    scaler.scale(w.sum() * factor).backward()
    stepped = scaler.step(optimizer)
    scaler.update()
    return stepped


def weight(dtype=torch.float32):
    w = torch.nn.Parameter(torch.tensor([1.0], dtype=dtype))
    return w, torch.optim.SGD([w], lr=0.5)


def test_the_factor_stops_at_its_floor_where_torch_goes_on_to_zero():
    w, optimizer = weight()
    scaler = DynamicLossScaler(8.0, min_scale=2.0)
    scales = []
    for _ in range(4):
        assert not iterate(scaler, w, optimizer, math.inf)
        scales.append(scaler.get_scale())
    assert scales == [4, 2, 2, 2]
    assert w.item() == 1


def test_a_static_factor_stays_and_its_steps_are_still_left_out():
    w, optimizer = weight()
    scaler = StaticLossScaler(128.0)
    assert [iterate(scaler, w, optimizer, f) for f in (1.0, math.nan, 1.0)] == [True, False, True]
    assert scaler.get_scale() == 128 and w.item() == 0


def test_float16_parameters_train_on_a_processor_once_the_factor_fits():
    w, optimizer = weight(torch.float16)
    scaler = DynamicLossScaler(2.0**17)
    assert [iterate(scaler, w, optimizer) for _ in range(3)] == [False, False, True]
    assert w.item() == 0.5 and w.dtype == torch.float16


def test_a_gradient_below_half_precision_reaches_float32_parameters_only_when_scaled():
    w, optimizer = weight()
    ((w.half() * 6e-5) * 2e-4).sum().backward()
    assert w.grad.item() == 0
    w.grad = None
    scaler = StaticLossScaler(2.0**14)
    scaler.scale(((w.half() * 6e-5) * 2e-4).sum()).backward()
    scaler.unscale(optimizer)
    assert w.grad.item() == pytest.approx(1.2e-8, rel=1e-2)


def test_gradients_are_divided_once_and_can_be_clipped_in_between():
    w, optimizer = weight()
    scaler = StaticLossScaler(1024.0)
    scaler.scale(w.sum() * 3.0).backward()
    assert scaler.unscale(optimizer) == 1
    assert clip_by_global_norm([w], max_norm=1.0) == 3
    assert scaler.step(optimizer)
    assert w.item() == 0.5 and w.grad.item() == 1


def test_two_optimizers_are_judged_apart_and_one_wrong_gradient_lowers_the_factor():
    (v, first), (w, second) = weight(), weight()
    scaler = DynamicLossScaler(4.0)
    scaler.scale(v.sum() + w.sum() * math.inf).backward()
    assert scaler.step(first) and not scaler.step(second)
    scaler.update()
    assert scaler.get_scale() == 2 and v.item() == 0.5 and w.item() == 1


def test_a_large_finite_gradient_is_no_reason_to_skip():
    w = torch.nn.Parameter(torch.zeros(100))
    w.grad = torch.full((100,), 1e30)
    assert StaticLossScaler(1.0).step(torch.optim.SGD([w], lr=0.1))


def test_parameters_without_gradients_are_finite():
    w, optimizer = weight()
    assert StaticLossScaler().step(optimizer)


def test_a_half_loss_is_scaled_in_float32():
    scaled = StaticLossScaler(2.0**16).scale(torch.tensor(8.0, dtype=torch.float16))
    assert scaled.dtype == torch.float32 and scaled == 2.0**19


def test_a_resumed_run_makes_the_same_decisions():
    (v, first), (w, second) = weight(), weight()
    scaler = DynamicLossScaler(64.0, 4.0, 0.25, 3, min_scale=0.5)
    for factor in (1.0, math.inf, 1.0, 1.0):
        iterate(scaler, v, first, factor)
    resumed = DynamicLossScaler()
    resumed.load_state_dict(scaler.state_dict())
    assert resumed.state_dict() == scaler.state_dict()
    for factor in (1.0, math.inf, math.inf, 1.0, 1.0, 1.0):
        iterate(scaler, v, first, factor)
        iterate(resumed, w, second, factor)
        assert resumed.get_scale() == scaler.get_scale()


def test_calls_out_of_order_are_refused():
    w, optimizer = weight()
    scaler = StaticLossScaler()
    with pytest.raises(RuntimeError, match="update must come after step or unscale"):
        scaler.update()
    scaler.unscale(optimizer)
    with pytest.raises(RuntimeError, match="unscale must come once .* got two"):
        scaler.unscale(optimizer)
    scaler.step(optimizer)
    with pytest.raises(RuntimeError, match="step must come once .* got two"):
        scaler.step(optimizer)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init_scale": 0.0}, "init_scale must be positive; got 0.0"),
        ({"init_scale": 1e300}, "init_scale must be a number in float32; got 1e[+]300"),
        ({"growth_factor": 1.0}, "growth_factor must be above 1; got 1.0"),
        ({"backoff_factor": 1.0}, r"backoff_factor must lie in \(0, 1\); got 1.0"),
        ({"growth_interval": 0}, "growth_interval must be at least 1; got 0"),
        ({"min_scale": 1e9}, "min_scale must be at most init_scale, 65536.0; got 1000000000.0"),
    ],
)
def test_scaler_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DynamicLossScaler(**settings)


def test_the_state_of_another_kind_of_scaler_is_refused():
    with pytest.raises(ValueError, match="state_dict must have entries .*'growth_factor'"):
        DynamicLossScaler().load_state_dict(StaticLossScaler().state_dict())


# ---- log-sum-exp


def test_log_sum_exp_is_that_of_torch_and_so_is_its_gradient():
    logits = (100 * draw(5, 4)).double().requires_grad_()
    ours, theirs = log_sum_exp(logits), torch.logsumexp(logits, -1)
    torch.testing.assert_close(ours, theirs)
    (gradient,) = torch.autograd.grad(ours.sum(), logits)
    torch.testing.assert_close(gradient, logits.softmax(-1))


def test_log_sum_exp_of_infinite_logits_is_infinite_rather_than_nan():
    rows = torch.tensor([[-math.inf, -math.inf], [-math.inf, 2.0], [math.inf, 0.0]])
    assert log_sum_exp(rows).tolist() == [-math.inf, 2.0, math.inf]


@pytest.mark.bad_input
def test_log_sum_exp_refuses_whole_numbers_and_empty_rows():
    with pytest.raises(TypeError, match="logits must be a floating-point tensor; got torch.int64"):
        log_sum_exp(torch.ones(2, dtype=torch.long))
    with pytest.raises(ValueError, match="logits must have at least one entry"):
        log_sum_exp(torch.ones(2, 0))


# ---- where naive forms break


def points(form):
    return {point.dtype: point for point in breaking_points() if point.form == form}


def test_the_exponential_overflows_at_the_logarithm_of_the_largest_number():
    for dtype, point in points("exp(x)").items():
        info = torch.finfo(dtype)
        # beyond the largest number by half a rounding step, it rounds to infinity
        last = math.log(info.max) + info.eps / 4
        assert point.x - 2 * info.eps * point.x <= last <= point.x * (1 + info.eps)
        assert point.naive == math.inf


def test_adding_one_loses_every_digit_at_the_logarithm_of_the_rounding_step():
    for dtype, point in points("log(1 + exp(-x))").items():
        info = torch.finfo(dtype)
        assert point.x == pytest.approx(-math.log(info.eps / 2), rel=3 * info.eps)
        assert point.naive == 0 and point.exact == pytest.approx(info.eps / 2, rel=0.1)


def test_every_form_works_one_number_before_and_fails_ever_after():
    from lmlosses.precision import _FORMS

    for point in breaking_points():
        naive = _FORMS[point.form][0]
        x = torch.tensor(point.x, dtype=point.dtype)
        before = torch.nextafter(x.cpu(), torch.zeros_like(x))
        value = naive(before)
        assert value.isfinite() and value != 0, point
        for times in (1, 1.01, 1.5, 4, 50):
            value = naive(x * times)
            assert not value.isfinite() or value == 0, (point, times)


def test_what_the_stable_forms_give_is_right_where_the_naive_ones_fail():
    for point in breaking_points():
        if point.form.startswith("log"):
            x = point.x
            tail = math.log1p(math.exp(-x))
            known = {
                "log(softmax([x, 0]))[0]": -tail,
                "log(softmax([-x, 0]))[0]": -x - tail,
                "log(sum(exp([x, x])))": x + math.log(2),
                "log(sum(exp([-x, -x])))": math.log(2) - x,
                "log(1 + exp(x))": x + tail,
                "log(1 + exp(-x))": tail,
                "log1p(exp(x))": x + tail,
                "log(sigmoid(x))": -tail,
                "log(sigmoid(-x))": -x - tail,
            }
            assert point.exact == pytest.approx(known[point.form], rel=1e-12)

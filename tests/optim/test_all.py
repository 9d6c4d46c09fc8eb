"""What every optimizer promises, whatever its rule: one table, many laws."""

import copy
import inspect
import io
import math
import pickle
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from lmlosses.optim import _elementwise as engine
from lmlosses.optim._base import UpdateRule
from lmlosses.optim.adafactor import Adafactor
from lmlosses.optim.adagrad import Adagrad
from lmlosses.optim.adam import Adam, AdamW
from lmlosses.optim.adopt import ADOPT
from lmlosses.optim.cautious import cautious
from lmlosses.optim.lion import Lion
from lmlosses.optim.manifolds import Manifold, Simplex, Sphere
from lmlosses.optim.muon import Muon
from lmlosses.optim.natural import NaturalGradient
from lmlosses.optim.riemannian import RiemannianAdam, RiemannianSGD
from lmlosses.optim.rmsprop import RMSprop
from lmlosses.optim.schedule_free import ScheduleFreeAdamW
from lmlosses.optim.sgd import SGD, SignSGD
from lmlosses.optim.soap import SOAP
from lmlosses.optim.sophia import SophiaG, SophiaH

DOUBLE = torch.float64
STEPS = 4  # some rules move nothing at first, some change their state every second step


class Case(NamedTuple):
    """An optimizer and settings with which everything it can remember is in use."""

    rule: type[UpdateRule]
    settings: dict[str, Any]

    @property
    def manifold(self) -> Manifold | None:
        return self.settings.get("manifold")

    def takes(self, name: str) -> bool:
        return name in inspect.signature(self.rule).parameters

    def build(self, params: Sequence[Tensor], **settings: Any) -> UpdateRule:
        settings = {**self.settings, **settings}
        if self.rule is not Muon:
            return self.rule(params, **settings)
        matrices = [param for param in params if param.ndim == 2]
        others = [param for param in params if param.ndim != 2]
        companion = {name: settings[name] for name in ("lr", "weight_decay") if name in settings}
        groups = [{"params": matrices}, {"params": others, "companion": True, **companion}]
        return Muon([group for group in groups if group["params"]], **settings)


CASES = {
    "SGD": Case(SGD, {"lr": 0.05, "momentum": 0.9, "dampening": 0.1}),
    "SignSGD": Case(SignSGD, {"lr": 0.05, "momentum": 0.5}),
    "Adagrad": Case(Adagrad, {"lr": 0.05, "lr_decay": 0.1}),
    "RMSprop": Case(RMSprop, {"lr": 0.01, "momentum": 0.5, "centered": True}),
    "Adam": Case(Adam, {"lr": 0.05, "amsgrad": True}),
    "AdamW": Case(AdamW, {"lr": 0.05}),
    "Lion": Case(Lion, {"lr": 0.05}),
    "SophiaG": Case(SophiaG, {"lr": 0.05, "update_every": 3, "weight_decay": 0.0}),
    "SophiaH": Case(SophiaH, {"lr": 0.05, "update_every": 3, "weight_decay": 0.0}),
    "Adafactor": Case(Adafactor, {"lr": 0.05}),
    "Muon": Case(Muon, {"lr": 0.05, "weight_decay": 0.0}),
    "SOAP": Case(SOAP, {"lr": 0.05, "precondition_frequency": 2}),
    "ScheduleFreeAdamW": Case(ScheduleFreeAdamW, {"lr": 0.05, "warmup_steps": 2}),
    "ADOPT": Case(ADOPT, {"lr": 0.05}),
    "cautious(AdamW)": Case(cautious(AdamW), {"lr": 0.05}),
    "cautious(Lion)": Case(cautious(Lion), {"lr": 0.05}),
    "NaturalGradient": Case(NaturalGradient, {"lr": 0.05, "iterations": 40, "tolerance": 1e-14}),
    "RiemannianSGD": Case(RiemannianSGD, {"lr": 0.05, "momentum": 0.9, "manifold": Sphere()}),
    "RiemannianSGD-simplex": Case(
        RiemannianSGD, {"lr": 0.05, "momentum": 0.9, "manifold": Simplex()}
    ),
    "RiemannianAdam": Case(RiemannianAdam, {"lr": 0.05, "amsgrad": True, "manifold": Sphere()}),
    "RiemannianAdam-simplex": Case(RiemannianAdam, {"lr": 0.05, "manifold": Simplex()}),
}

FLAT = {name: case for name, case in CASES.items() if case.manifold is None}


def which(wanted: Callable[[Case], bool] = lambda case: True) -> Any:
    chosen = {name: case for name, case in CASES.items() if wanted(case)}
    return pytest.mark.parametrize("case", chosen.values(), ids=chosen)


every = which()
elementwise = which(lambda case: case.takes("foreach"))
rounding = which(lambda case: case.takes("stochastic_rounding"))


SHAPES = ((4, 3), (3,), (2, 3, 2))


def start(
    case: Case,
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    dtype: torch.dtype = DOUBLE,
    device: str = "cpu",
) -> list[nn.Parameter]:
    """Parameters on the manifold, the same at every call."""
    generator = torch.Generator().manual_seed(7)
    values = [torch.randn(shape, generator=generator, dtype=DOUBLE) for shape in shapes]
    if case.manifold is not None:
        values = [case.manifold.project(value.abs()) for value in values]
    # bfloat16 holds them, so that all dtypes start at the same point
    if case.manifold is None:
        values = [value.bfloat16() for value in values]
    return [nn.Parameter(value.to(device, dtype)) for value in values]


def gradients(params: Sequence[Tensor], step: int) -> list[Tensor]:
    """Gradients of a step, exact in every dtype."""
    generator = torch.Generator().manual_seed(100 + step)
    drawn = [torch.randn(param.shape, generator=generator) for param in params]
    return [
        grad.bfloat16().to(param.device, param.dtype)
        for grad, param in zip(drawn, params, strict=True)
    ]


def curvature(params: Sequence[Tensor], rule: type[Any]) -> Tensor:
    """Something for Sophia to differentiate, that reaches every entry alone."""
    if issubclass(rule, SophiaH):
        return sum((param.float().square() * 0.7).sum() for param in params)  # type: ignore  # sum starts at 0
    scores = torch.arange(3.0, device=params[0].device)
    return torch.cat([param.float().reshape(-1, 1) * scores for param in params])


def take_step(optimizer: Any, closure: Callable[[], Any] | None = None, sign: int = 1) -> Any:
    """One step as each kind of optimizer wants it."""
    if isinstance(optimizer, SophiaG | SophiaH):
        if optimizer.needs_curvature:
            params = [p for group in optimizer.param_groups for p in group["params"]]
            source = curvature(params, type(optimizer))
            generator = torch.Generator().manual_seed(11)
            sign = sign if isinstance(optimizer, SophiaH) else 1
            if source.device.type == "cpu":
                optimizer.update_curvature(sign * source, generator=generator)
            else:
                optimizer.update_curvature(source)
        return optimizer.step(closure)
    if isinstance(optimizer, NaturalGradient):
        return optimizer.step(closure, fisher_product=lambda vectors: [2 * v for v in vectors])
    return optimizer.step(closure)


def run(
    optimizer: Any, params: Sequence[Tensor], steps: Sequence[int] = range(STEPS), sign: int = 1
) -> list[Tensor]:
    """Take steps with the gradients that belong to them; where that leads."""
    for step in steps:
        for param, grad in zip(params, gradients(params, step), strict=True):
            param.grad = sign * grad
        take_step(optimizer, sign=sign)
    return [param.detach().clone() for param in params]


def states(optimizer: Any) -> list[dict[str, Tensor]]:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    return [dict(optimizer.state[param]) for param in params]


def assert_same_bits(left: Sequence[Tensor], right: Sequence[Tensor]) -> None:
    for one, other in zip(left, right, strict=True):
        assert torch.equal(one, other)


def assert_close(left: Sequence[Tensor], right: Sequence[Tensor], tolerance: float) -> None:
    for one, other in zip(left, right, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance, check_stride=False)


# what a step may touch


@every
def test_every_parameter_moves(case):
    params = start(case)
    before = [param.detach().clone() for param in params]
    for param, old in zip(run(case.build(params), params), before, strict=True):
        assert (param - old).abs().max() > 1e-3 and param.isfinite().all()


@every
def test_ascending_is_descending_the_negated_loss(case):
    up, down = start(case), start(case)
    climbed = run(case.build(up, maximize=True), up)
    fell = run(case.build(down), down, sign=-1)
    assert_close(climbed, fell, 1e-13)


@every
@pytest.mark.parametrize("maximize", [False, True])
def test_gradients_are_never_written_to(case, maximize):
    params = start(case)
    settings = {"weight_decay": 0.1} if case.takes("weight_decay") else {}
    optimizer = case.build(params, maximize=maximize, **settings)
    for step in range(STEPS):
        given = gradients(params, step)
        for param, grad in zip(params, given, strict=True):
            param.grad = grad
        versions = [grad._version for grad in given]
        take_step(optimizer)
        assert [param.grad._version for param in params] == versions
        assert all(param.grad is grad for param, grad in zip(params, given, strict=True))
        assert_same_bits(given, gradients(params, step))


@every
def test_a_parameter_without_gradient_neither_moves_nor_is_remembered(case):
    params = start(case)
    before = params[1].detach().clone()
    optimizer = case.build(params)
    for step in range(STEPS):
        for param, grad in zip(params, gradients(params, step), strict=True):
            param.grad = grad
        params[1].grad = None
        take_step(optimizer)
    assert torch.equal(params[1], before)
    if case.rule not in (SophiaG, SophiaH):  # these remember its curvature
        assert not optimizer.state.get(params[1])


@every
def test_a_parameter_that_gets_gradients_late_starts_like_a_new_one(case):
    late, fresh = start(case, SHAPES[:2]), start(case, SHAPES[:2])
    optimizer = case.build(late)
    other = case.build(fresh[1:])
    late[0].grad, late[1].grad = gradients(late, 0)[0], None
    if case.rule is ScheduleFreeAdamW:
        pytest.skip("its average counts the steps of the group")
    take_step(optimizer)
    for step in range(1, 4):
        late[0].grad, late[1].grad = gradients(late, step)
        fresh[1].grad = late[1].grad.clone()
        if case.rule not in (SophiaG, SophiaH):
            take_step(optimizer)
            take_step(other)
    assert_close([late[1].detach()], [fresh[1].detach()], 1e-13)


# settings


@every
def test_groups_keep_their_own_settings(case):
    own = [{"lr": 0.1}, {"lr": 0.02}]
    if case.takes("weight_decay"):
        own = [{"lr": 0.1, "weight_decay": 0.3}, {"lr": 0.02, "weight_decay": 0.0}]
    shapes = ((4, 3), (3, 3))
    together, apart = start(case, shapes), start(case, shapes)
    both = case.rule(
        [{"params": [p], **settings} for p, settings in zip(together, own, strict=True)],
        **case.settings,
    )
    alone = [case.build([p], **settings) for p, settings in zip(apart, own, strict=True)]
    for step in range(STEPS):
        for params in (together, apart):
            for param, grad in zip(params, gradients(params, step), strict=True):
                param.grad = grad
        if case.rule is SophiaG:  # labels are drawn for all parameters at once
            continue
        for optimizer in (both, *alone):
            take_step(optimizer)
    assert_close([p.detach() for p in together], [p.detach() for p in apart], 1e-12)


@every
@pytest.mark.bad_input
def test_settings_are_checked_at_the_start_and_in_the_middle(case):
    wrong = {"lr": -1.0}
    if case.takes("weight_decay"):
        wrong["weight_decay"] = -0.1
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=f"{name} must not be negative; got {value}"):
            case.build(start(case), **{name: value})
        params = start(case, ((4, 3), (2, 3)))
        optimizer = case.build(params[:1])
        run(optimizer, params[:1])
        with pytest.raises(ValueError, match=f"{name} must not be negative; got {value}"):
            optimizer.add_param_group({"params": [params[1]], name: value})
        assert len(optimizer.param_groups) == 1
    with pytest.raises(TypeError, match="lr must be a real number; got str 'fast'"):
        case.build(start(case), lr="fast")
    with pytest.raises(ValueError, match="lr must be finite; got nan"):
        case.build(start(case), lr=math.nan)


@every
def test_a_group_added_in_the_middle_moves_with_its_settings(case):
    params = start(case, ((4, 3), (2, 3)))
    before = params[1].detach().clone()
    optimizer = case.build(params[:1])
    run(optimizer, params[:1])
    optimizer.add_param_group({"params": [params[1]], "lr": 0.01})
    run(optimizer, params)
    assert (params[1] - before).abs().max() > 0
    assert optimizer.param_groups[1]["lr"] == 0.01


@every
def test_no_rate_no_move(case):
    params = start(case)
    before = [param.detach().clone() for param in params]
    settings = {"weight_decay": 0.5} if case.takes("weight_decay") else {}
    after = run(case.build(params, lr=0.0, **settings), params)
    if case.manifold is None:
        assert_same_bits(after, before)
    else:
        assert_close(after, before, 1e-15)


@every
@pytest.mark.parametrize("shape", [(), (1,)])
def test_the_rate_may_be_a_tensor_which_is_read_at_every_step_and_never_written(case, shape):
    shapes = SHAPES if case.manifold else (*SHAPES, ())
    with_tensor, with_float = start(case, shapes), start(case, shapes)
    lr = torch.full(shape, 0.05, dtype=DOUBLE)
    settings = {"weight_decay": 0.1} if case.takes("weight_decay") else {}
    tensor_kind = case.build(with_tensor, lr=lr, **settings)
    float_kind = case.build(with_float, lr=0.05, **settings)
    run(tensor_kind, with_tensor, range(2))
    run(float_kind, with_float, range(2))
    assert_close([p.detach() for p in with_tensor], [p.detach() for p in with_float], 1e-13)
    lr.fill_(0.01)
    version = lr._version
    for group in float_kind.param_groups:
        group["lr"] = 0.01
    run(tensor_kind, with_tensor, range(2, 4))
    run(float_kind, with_float, range(2, 4))
    assert_close([p.detach() for p in with_tensor], [p.detach() for p in with_float], 1e-13)
    assert lr._version == version and lr.shape == shape


@every
@pytest.mark.bad_input
def test_a_rate_of_many_numbers_is_refused(case):
    with pytest.raises(TypeError, match="lr must be a number or a floating-point tensor of one"):
        case.build(start(case), lr=torch.tensor([0.1, 0.2]))


@every
def test_a_scheduler_of_torch_sets_the_rate(case):
    params = start(case)
    optimizer = case.build(params)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    run(optimizer, params, range(1))
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == case.settings["lr"] / 2


# how torch is used


@every
def test_a_closure_is_evaluated_with_gradients_before_the_step(case):
    params = start(case)
    optimizer = case.build(params)
    calls = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = sum((param**2 * torch.arange(1, param.shape[-1] + 1)).sum() for param in params)
        loss.backward()
        calls.append(loss.item())
        return loss

    if case.rule in (SophiaG, SophiaH):
        closure()
        take_step(optimizer)
    for _ in range(STEPS):
        returned = take_step(optimizer, closure)
        assert returned.item() == calls[-1]
    assert calls[-1] != calls[-3]


@every
def test_parameters_may_come_with_their_names(case):
    params, others = start(case, ((4, 3), (2, 3))), start(case, ((4, 3), (2, 3)))
    named = case.rule([("first", params[0]), ("second", params[1])], **case.settings)
    assert named.state_dict()["param_groups"][0]["param_names"] == ["first", "second"]
    expected = run(case.build(others), others)
    assert_same_bits(run(named, params), expected)


@every
@pytest.mark.parametrize("set_to_none", [False, True])
def test_gradients_are_cleared_as_torch_clears_them(case, set_to_none):
    params = start(case)
    optimizer = case.build(params)
    run(optimizer, params)
    optimizer.zero_grad(set_to_none=set_to_none)
    cleared = [param.grad is None if set_to_none else not param.grad.any() for param in params]
    assert all(cleared)


@every
@pytest.mark.bad_input
def test_sparse_and_complex_gradients_are_refused(case):
    if case.rule in (SophiaG, SophiaH):
        pytest.skip("the curvature comes first; see their own tests")
    table = start(case, ((4, 3),))[0]
    table.grad = torch.ones(4, 3, dtype=DOUBLE).to_sparse()
    optimizer = case.build([table])
    with pytest.raises(TypeError, match="takes dense real gradients; got torch.sparse_coo"):
        take_step(optimizer)
    assert not optimizer.state.get(table)
    waves = nn.Parameter(torch.ones(4, 3, dtype=torch.complex64))
    waves.grad = torch.ones_like(waves)
    optimizer = case.build([waves])
    with pytest.raises(TypeError, match="takes dense real gradients; got torch.strided, torch.co"):
        take_step(optimizer)


@every
def test_the_class_can_be_copied_and_pickled_in_the_middle(case):
    params = start(case)
    optimizer = case.build(params)
    run(optimizer, params, range(2))
    twins = [copy.deepcopy((params, optimizer)), pickle.loads(pickle.dumps((params, optimizer)))]
    expected = run(optimizer, params, range(2, 5))
    for others, twin in twins:
        assert type(twin) is type(optimizer)
        assert_same_bits(run(twin, others, range(2, 5)), expected)


# layouts and shapes


def laid_out(case: Case, layout: str) -> tuple[list[Tensor], list[Tensor]]:
    """Twice the same parameters and, under ``.grad``, gradients; the first in an odd layout."""
    shape = (2, 3, 4, 3) if layout == "channels_last" else (4, 3)
    plain = start(case, (shape,))[0]
    if layout == "channels_last":
        odd = plain.detach().to(memory_format=torch.channels_last)
    elif layout == "strided":
        odd = torch.stack([plain.detach(), plain.detach()], dim=-1)[..., 0]
    else:
        odd = plain.detach().T.contiguous().T
    assert not odd.is_contiguous()
    return [nn.Parameter(odd)], [plain]


@every
@pytest.mark.parametrize("layout", ["transposed", "channels_last", "strided"])
@pytest.mark.parametrize("grad_too", [True, False])
def test_layout_in_memory_does_not_matter(case, layout, grad_too):
    odd, plain = laid_out(case, layout)
    optimizer = case.build(odd)
    strides = odd[0].stride()
    for step in range(STEPS):
        grad = gradients(odd, step)[0]
        odd[0].grad = torch.empty_like(odd[0]).copy_(grad) if grad_too else grad
        take_step(optimizer)
    expected = run(case.build(plain), plain)
    assert odd[0].stride() == strides
    assert_close([odd[0].detach()], expected, 1e-13)


@every
def test_a_contiguous_parameter_takes_a_transposed_gradient(case):
    params, others = start(case, ((4, 3),)), start(case, ((4, 3),))
    optimizer = case.build(params)
    for step in range(STEPS):
        params[0].grad = gradients(params, step)[0].T.contiguous().T
        take_step(optimizer)
    assert_close([params[0].detach()], run(case.build(others), others), 1e-13)


@every
@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (1, 1)])
def test_scalars_and_empty_tensors_are_parameters_too(case, shape):
    if case.manifold is not None and len(shape) < 2:
        pytest.skip("no point on this manifold")
    params = start(case, (shape, (2, 3)))
    other = start(case, (shape, (2, 3)))[1:]
    before = params[0].detach().clone()
    moved = run(case.build(params), params, range(3))  # an odd number, or signs may cancel
    assert moved[0].shape == shape and moved[0].isfinite().all()
    if shape in ((), (1, 1)) and case.manifold is None:
        assert not torch.equal(moved[0], before)
    if case.rule is not SophiaG:  # its labels are drawn for both at once
        optimizer = case.build(other)
        for step in range(3):
            other[0].grad = gradients(params, step)[1]
            take_step(optimizer)
        assert_close(moved[1:], [other[0].detach()], 1e-12)


@elementwise
def test_a_large_tensor_in_slices_moves_like_the_whole(case, monkeypatch):
    params, others = start(case, ((7, 11),)), start(case, ((7, 11),))
    whole = run(case.build(others), others)
    monkeypatch.setattr(engine, "SLICE", 10)
    assert_close(run(case.build(params), params), whole, 1e-15)


# dtypes


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_and_remembered_in_single(case, dtype):
    params, others = start(case, dtype=dtype), start(case, dtype=torch.float32)
    optimizer = case.build(params)
    moved, expected = run(optimizer, params), run(case.build(others), others)
    for state in states(optimizer):
        assert all(tensor.dtype == torch.float32 for tensor in state.values())
    rounding_step = torch.finfo(dtype).eps
    for half, single in zip(moved, expected, strict=True):
        assert half.dtype == dtype
        off = (half.float() - single).abs()
        assert (off <= (STEPS + 1) * rounding_step * single.abs().clamp(min=0.25)).all()


@every
@pytest.mark.skipif(not hasattr(Tensor, "grad_dtype"), reason="torch casts gradients")
@pytest.mark.parametrize(
    ("dtype", "grad_dtype"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (DOUBLE, torch.float32)],
)
def test_a_gradient_may_have_another_dtype_than_its_parameter(case, dtype, grad_dtype):
    params, others = start(case, dtype=dtype), start(case, dtype=dtype)
    optimizer = case.build(params)
    for param in params:
        param.grad_dtype = grad_dtype
    for step in range(STEPS):
        for param, grad in zip(params, gradients(params, step), strict=True):
            param.grad = grad.to(grad_dtype)
        take_step(optimizer)
    assert_same_bits([p.detach() for p in params], run(case.build(others), others))


def with_small_steps(case: Case, dtype: torch.dtype, **settings: Any) -> Tensor:
    """Where 64 x 64 entries go from 1.5 with gradients of one size and always the same signs."""
    params = [nn.Parameter(torch.full((64, 64), 1.5, dtype=dtype))]
    optimizer = case.build(params, **settings)
    signs = 2.0 * torch.randint(2, (64, 64), generator=torch.Generator().manual_seed(0)) - 1
    for _ in range(STEPS):
        params[0].grad = signs.to(dtype)
        take_step(optimizer)
    return params[0].detach().float()


@rounding
def test_rounding_at_random_is_right_on_average_and_loses_no_small_step(case):
    settings = {"weight_decay": 0.0} if case.takes("weight_decay") else {}
    resolved = 2.0**-7  # by bfloat16 between one and two
    tried = with_small_steps(case, torch.float32, lr=1e-3, **settings)
    settings["lr"] = 0.6 * 1e-3 * resolved / (tried - 1.5).abs().max().item()

    expected = with_small_steps(case, torch.float32, **settings) - 1.5
    nearest = with_small_steps(case, torch.bfloat16, **settings) - 1.5
    with torch.random.fork_rng():
        torch.manual_seed(0)
        random = with_small_steps(case, torch.bfloat16, stochastic_rounding=True, **settings).sub_(
            1.5
        )
    assert expected.abs().max() > 0.5 * resolved
    assert not nearest.any()  # every single step is lost
    assert set((random / resolved).unique().tolist()) <= set(range(-STEPS, STEPS + 1))
    # rounding once is off by half a step at most, in standard deviations
    error = STEPS**0.5 * resolved / 2
    assert (random - expected).mean().abs() < 4 * error / 64
    followed = (random * expected).sum() / expected.square().sum()
    assert (followed - 1).abs() < 4 * error / expected.norm()
    assert error / expected.norm() < 0.1  # and a tenth is what that can see


@rounding
def test_rounding_at_random_changes_nothing_in_single_precision(case):
    params, others = start(case, dtype=torch.float32), start(case, dtype=torch.float32)
    moved = run(case.build(params, stochastic_rounding=True), params)
    assert_same_bits(moved, run(case.build(others), others))


@rounding
@pytest.mark.bad_input
def test_rounding_at_random_is_for_bfloat16(case):
    params = start(case, dtype=torch.float16)
    with pytest.raises(ValueError, match="goes from float32 to bfloat16; .* to torch.float16"):
        run(case.build(params, stochastic_rounding=True), params)


# checkpoints


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, DOUBLE])
def test_a_run_continues_from_a_file_to_the_bit(case, dtype, tmp_path):
    params = start(case, dtype=dtype)
    optimizer = case.build(params)
    middle = run(optimizer, params, range(3))
    torch.save({"params": middle, "optimizer": optimizer.state_dict()}, tmp_path / "saved.pt")
    expected = run(optimizer, params, range(3, 6))

    saved = torch.load(tmp_path / "saved.pt")
    resumed = [nn.Parameter(value) for value in saved["params"]]
    second = case.build(resumed)
    second.load_state_dict(saved["optimizer"])
    assert_same_bits(run(second, resumed, range(3, 6)), expected)
    for mine, theirs in zip(states(second), states(optimizer), strict=True):
        assert list(mine) == list(theirs)
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
        assert all(mine[name].dtype == theirs[name].dtype for name in mine)


@every
def test_a_checkpoint_stays_what_it_was(case):
    params, others = start(case), start(case)
    optimizer, second = case.build(params), case.build(others)
    run(optimizer, params, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    kept = copy.deepcopy(saved)
    second.load_state_dict(saved)
    run(second, others, range(2, 4))
    buffers = [io.BytesIO(), io.BytesIO()]
    for buffer, value in zip(buffers, (saved, kept), strict=True):
        torch.save(value, buffer)
    for key, state in kept["state"].items():
        assert all(torch.equal(state[name], saved["state"][key][name]) for name in state)


@every
@pytest.mark.parametrize("dtype", [DOUBLE, torch.bfloat16])
def test_a_checkpoint_loads_into_parameters_of_another_dtype(case, dtype):
    params = start(case, dtype=torch.float32)
    optimizer = case.build(params)
    run(optimizer, params)
    others = [nn.Parameter(param.detach().to(dtype)) for param in params]
    second = case.build(others)
    second.load_state_dict(optimizer.state_dict())
    counters = ("step", "curvature_age")
    for mine, theirs in zip(states(second), states(optimizer), strict=True):
        for name, tensor in mine.items():
            expected = torch.promote_types(dtype, torch.float32)
            assert tensor.dtype == (torch.float32 if name in counters else expected), name
            assert torch.equal(tensor.to(theirs[name].dtype), theirs[name])
    run(second, others)


@which(lambda case: case.rule is not NaturalGradient)
@pytest.mark.bad_input
def test_a_checkpoint_of_other_names_or_shapes_is_refused_and_nothing_loaded(case):
    params = start(case)
    optimizer = case.build(params)
    run(optimizer, params)
    right = copy.deepcopy(optimizer.state_dict())
    before = copy.deepcopy(states(optimizer))
    first, last = right["state"][0], right["state"][len(params) - 1]
    name = next(name for name in last if name not in ("step", "curvature_age"))

    wrong = copy.deepcopy(right)
    wrong["state"][len(params) - 1][name] = torch.zeros(9, 9)
    with pytest.raises(ValueError, match=rf"{name} of parameter .* must have shape .*\(9, 9\)"):
        optimizer.load_state_dict(wrong)
    wrong = copy.deepcopy(right)
    wrong["state"][0]["velocity"] = wrong["state"][0].pop(next(n for n in first if n != "step"))
    with pytest.raises(ValueError, match="state of parameter 0 must hold .*velocity"):
        optimizer.load_state_dict(wrong)
    wrong = copy.deepcopy(right)
    wrong["param_groups"] = wrong["param_groups"][:1] * 3
    with pytest.raises(ValueError, match="must hold the groups that this optimizer holds"):
        optimizer.load_state_dict(wrong)
    for mine, theirs in zip(states(optimizer), before, strict=True):
        assert all(torch.equal(mine[key], theirs[key]) for key in theirs)


# ways to compute the same


@elementwise
@pytest.mark.parametrize("settings", [{}, {"maximize": True}, {"lr": torch.tensor(0.03)}])
def test_lists_of_tensors_move_like_one_after_the_other(case, settings):
    if case.takes("weight_decay"):
        settings = {**settings, "weight_decay": 0.1}
    one_by_one, together = start(case), start(case)
    eager = run(case.build(one_by_one, foreach=False, **settings), one_by_one)
    listed = run(case.build(together, foreach=True, **settings), together)
    assert_close(listed, eager, 1e-14)


@elementwise
def test_lists_of_half_precision_tensors_move_like_one_after_the_other(case):
    one_by_one, together = (start(case, dtype=torch.bfloat16) for _ in range(2))
    eager = run(case.build(one_by_one, foreach=False), one_by_one)
    listed = run(case.build(together, foreach=True), together)
    assert_close([p.float() for p in listed], [p.float() for p in eager], 2.0**-8)


@which(lambda case: case.takes("foreach") and case.rule not in (SophiaG, SophiaH))
def test_lists_are_of_parameters_at_the_same_step(case):
    ends = []
    for foreach in (False, True):
        params = start(case)
        optimizer = case.build(params, foreach=foreach)
        for step in range(5):
            for param, grad in zip(params, gradients(params, step), strict=True):
                param.grad = grad
            if step < 2:
                params[1].grad = None
            take_step(optimizer)
        ends.append([param.detach() for param in params])
    assert_close(*ends, 1e-14)


@elementwise
@pytest.mark.bad_input
def test_only_one_way_to_compute_can_be_chosen(case):
    with pytest.raises(ValueError, match="at most one of foreach, compiled and fused"):
        case.build(start(case), foreach=True, compiled=True)


def test_a_group_cannot_ask_for_a_kernel_that_torch_does_not_have():
    with pytest.raises(ValueError, match="fused must be false: torch has no kernel for Lion"):
        Lion([{"params": [nn.Parameter(torch.ones(3))], "fused": True}])


@pytest.mark.parametrize(
    ("cls", "setting", "value"),
    [(SGD, "momentum", 0.9), (Adam, "amsgrad", True), (RMSprop, "centered", True)],
)
def test_a_setting_that_needs_state_cannot_be_switched_on_later(cls, setting, value):
    param = nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    optimizer = cls([param], lr=0.1)
    optimizer.step()
    optimizer.param_groups[0][setting] = value
    with pytest.raises(ValueError, match=f"{setting} must be on from a parameter's first step"):
        optimizer.step()


COMPILED = ("AdamW", "Lion", "SophiaG")  # a compilation takes seconds


@pytest.mark.compiles
@pytest.mark.parametrize("name", COMPILED)
def test_a_compiled_rule_moves_like_the_eager_one_and_is_compiled_once(name):
    case = CASES[name]
    compiled, plain = start(case), start(case)
    quick = case.build(compiled, compiled=True, weight_decay=0.1)
    eager = case.build(plain, weight_decay=0.1)
    run(quick, compiled, range(1))
    with torch.compiler.set_stance("fail_on_recompile"):  # nor when the step counts on
        run(quick, compiled, range(1, 4))
        quick.param_groups[0].update(lr=0.01, weight_decay=0.2)
        run(quick, compiled, range(4, 6))
    run(eager, plain, range(4))
    eager.param_groups[0].update(lr=0.01, weight_decay=0.2)
    assert_close([p.detach() for p in compiled], run(eager, plain, range(4, 6)), 1e-12)


@pytest.mark.compiles
@pytest.mark.filterwarnings("ignore:Profiler")
@pytest.mark.parametrize("name", ["AdamW", "Lion"])
def test_a_whole_step_can_be_compiled_by_the_caller(name):
    case = CASES[name]
    compiled, plain = start(case), start(case)
    quick = case.build(compiled, lr=torch.tensor(0.05, dtype=DOUBLE), weight_decay=0.1)
    eager = case.build(plain, weight_decay=0.1)
    step = torch.compile(quick.step, fullgraph=True)

    def run_compiled(steps: Sequence[int]) -> None:
        for number in steps:
            for param, grad in zip(compiled, gradients(compiled, number), strict=True):
                param.grad = grad
            step()

    run_compiled(range(2))  # the first step makes the state, the second finds it
    with torch.compiler.set_stance("fail_on_recompile"):
        run_compiled(range(2, 4))
        quick.param_groups[0]["lr"].fill_(0.01)
        run_compiled(range(4, 6))
    run(eager, plain, range(4))
    eager.param_groups[0]["lr"] = 0.01
    assert_close([p.detach() for p in compiled], run(eager, plain, range(4, 6)), 1e-12)


# devices


@every
def test_a_step_waits_for_no_value_on_the_meta_device(case):
    params = [nn.Parameter(torch.empty(shape, device="meta")) for shape in SHAPES]
    optimizer = case.build(params)
    for _ in range(STEPS):
        for param in params:
            param.grad = torch.empty_like(param)
        take_step(optimizer)


@every
@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_waits_for_no_value_on_a_gpu_and_goes_where_the_processor_goes(case):
    params, others = start(case, device="cuda"), start(case)
    optimizer = case.build(params)
    if case.rule in (SophiaG, SophiaH):
        pytest.skip("labels and signs are drawn on the device; see their own tests")
    drawn = [gradients(params, step) for step in range(STEPS)]
    torch.cuda.synchronize()
    try:
        # SOAP's eigenvectors and QR wait for the device
        torch.cuda.set_sync_debug_mode("default" if case.rule is SOAP else "error")
        for grads in drawn:
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad
            take_step(optimizer)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    moved = [param.detach().cpu() for param in params]
    assert_close(moved, run(case.build(others), others), 1e-9)

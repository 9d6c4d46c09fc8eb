"""Optimizers in which each entry goes its own way: one rule, run in slices, as lists, or compiled.

The few lines of a rule run on slices that stay in the cache, on lists of tensors (``foreach``),
or as one compiled pass. What is common to them, decay, descent and half precision, stands in
`_move`.
"""

import functools
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Hashable
from inspect import unwrap
from types import FunctionType
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lmlosses._checks import check_non_negative
from lmlosses.optim._base import Ready, UpdateRule, state_dtype
from lmlosses.optim._tensors import Entries, TensorList, round_to

Quotient = tuple[Entries, Entries]

# entries a thread works on at a time: few enough for the operands of a rule to stay in the cache,
# many enough that calls cost little; torch does not split smaller tensors among threads
SLICE = 131072


def local(tensor: Entries) -> Entries:
    """This rank's part of a sharded tensor; any other tensor as it is."""
    if isinstance(tensor, TensorList) or not hasattr(tensor, "to_local"):
        return tensor
    return cast(Tensor, tensor.to_local())


class ElementwiseRule(UpdateRule):
    r"""An optimizer in which each entry goes its own way.

    A subclass names its state in `state_names`, computes the numbers that all entries share in
    `numbers`, and says in `direction` what the learning rate multiplies:

    .. math:: \theta \gets (1 - \eta \lambda) \, \theta - \eta \, \text{direction}

    with the weight decay :math:`\lambda` beside the direction where `decoupled` is true, and
    :math:`\lambda \theta` added to the gradient where it is false.

    Half precision is computed in float32, and the state is kept in float32.

    Args:
        params: Parameters, or groups of parameters with settings of their own.
        defaults: Settings, ``lr`` and ``weight_decay`` among them, and ``maximize``.
        foreach: Work on lists of tensors: few launches, more memory. None means on CUDA only.
        compiled: Compile the rule with `torch.compile`, once for all tensors of a dtype; the
            first step waits for the compiler.
        fused: Hand over to torch's fused kernel; only where the subclass has `fused_step`.
        stochastic_rounding: Round bfloat16 parameters up or down at random, so that the mean is
            right and small steps are not lost; the noise comes from torch's default generator.
    """

    state_names: ClassVar[tuple[str, ...]] = ()
    # settings that need a state of their own, with its name: they cannot be switched on later
    remembered: ClassVar[dict[str, str]] = {}
    decoupled: ClassVar[bool] = True
    sliced: ClassVar[bool] = True  # False: the direction reads a whole tensor

    def __init__(
        self,
        params: ParamsT,
        defaults: dict[str, Any],
        *,
        foreach: bool | None = None,
        compiled: bool = False,
        fused: bool = False,
        stochastic_rounding: bool = False,
    ) -> None:
        ways = {"foreach": foreach, "compiled": compiled, "fused": fused}
        super().__init__(params, {**defaults, **ways, "stochastic_rounding": stochastic_rounding})

    def numbers(self, group: dict[str, Any], step: Any) -> dict[str, Any]:
        """What the direction needs besides tensors, for step ``step``, counted from 1.

        Numbers, or None and booleans to choose between forms; ``lr`` here replaces the group's.
        """
        return {}

    @staticmethod
    @abstractmethod
    def direction(
        param: Entries, grad: Entries, state: dict[str, Entries], n: Any
    ) -> Entries | Quotient:
        """What the learning rate multiplies, or numerator and denominator of it.

        Updates ``state`` in place and leaves ``grad`` alone. Written with methods of tensors,
        since ``foreach`` hands in lists in their place. A quotient saves a pass over the entries:
        the base divides and descends in one.
        """

    def init_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """Zeros under each name."""
        dtype = state_dtype(param)
        return {name: torch.zeros_like(param, dtype=dtype) for name in self.state_names}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """See `UpdateRule.add_param_group`."""
        group = {**self.defaults, **param_group}
        check_non_negative(weight_decay=group["weight_decay"])
        if sum(bool(group[way]) for way in ("foreach", "compiled", "fused")) > 1:
            raise ValueError("at most one of foreach, compiled and fused may be true")
        if group["fused"] and type(self).fused_step is ElementwiseRule.fused_step:
            raise ValueError(f"fused must be false: torch has no kernel for {type(self).__name__}")
        super().add_param_group(param_group)

    def update_group(self, ready: list[Ready], group: dict[str, Any]) -> None:
        """Parameter by parameter, or all of one kind at once, or compiled, or by torch."""
        if not ready:
            return
        for setting, name in self.remembered.items():
            if group[setting] and any(name not in state for _, _, state in ready):
                raise ValueError(
                    f"{setting} must be on from a parameter's first step; got {group[setting]!r} "
                    f"after steps that kept no {name}"
                )
        if group["fused"]:
            check_fusible(ready, group)
            self.fused_step(ready, group)
            return
        if group["compiled"]:
            known: dict[Any, dict[str, Any]] = {}
            for param, grad, state in ready:
                count = _count(state["step"])
                if count not in known:
                    known[count] = _as_tensors(self._all_numbers(group, count))
                self._move(param, grad, state, group, known[count], way=_compiled_move)
            return
        kinds: dict[Any, list[Ready]] = defaultdict(list)
        for param, grad, state in ready:
            if param.is_cuda if group["foreach"] is None else group["foreach"]:
                kind = (param.device, param.dtype, grad.dtype, _count(state["step"]))
                kinds[kind].append((param, grad, state))
            else:
                self.update(param, grad, state, group)
        for kind, alike in kinds.items():
            params, grads, states = zip(*alike, strict=True)
            names = [name for name in states[0] if name not in self.counters]
            joined: Any = {name: TensorList([local(s[name]) for s in states]) for name in names}
            lists: Any = [TensorList([local(t) for t in tensors]) for tensors in (params, grads)]
            numbers = self._all_numbers(group, kind[-1])
            self._move(lists[0], lists[1], joined, group, numbers, way=_move)

    def update(
        self, param: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        """Move one parameter, slice after slice."""
        whole = not self.sliced or torch.compiler.is_compiling()
        numbers = self._all_numbers(group, _count(state["step"]))
        self._move(param, grad, state, group, numbers, way=_move if whole else _sliced_move)

    def fused_step(self, ready: list[Ready], group: dict[str, Any]) -> None:
        """Torch's own kernel on the same state; groups of a rule without one cannot ask for it."""
        raise NotImplementedError

    def _all_numbers(self, group: dict[str, Any], step: Any) -> dict[str, Any]:
        shared = {"lr": group["lr"], "weight_decay": group["weight_decay"]}
        return {**shared, **self.numbers(group, step)}

    def _move(
        self,
        param: Entries,
        grad: Entries,
        state: dict[str, Any],
        group: dict[str, Any],
        numbers: dict[str, Any],
        *,
        way: Callable[..., None],
    ) -> None:
        tensors = {name: local(state[name]) for name in state if name not in self.counters}
        way(
            self.direction, local(param), local(grad), tensors, numbers,
            (group["maximize"], self.decoupled, group["stochastic_rounding"]),
        )  # fmt: skip


def check_fusible(ready: list[Ready], group: dict[str, Any]) -> None:
    """Refuse what torch's fused kernels would not compute as the rule does.

    Raises:
        ValueError: If a parameter is in half precision, whose state is float32 here.
    """
    for param, _, _ in ready:
        if param.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"fused takes float32 or float64 parameters; got {param.dtype}")


def _count(step: Tensor) -> Any:
    """The number of a step; it is kept on the CPU, so reading it waits for nothing."""
    # in a compiled step it stays a tensor, of which 1 - 0.999**step needs more digits than single
    return step.double() if torch.compiler.is_compiling() else step.item()


def _move(
    direction: Callable[..., Entries | Quotient],
    param: Entries,
    grad: Entries,
    state: dict[str, Entries],
    n: dict[str, Any],
    chosen: tuple[bool, bool, bool],
) -> None:
    """Decay, direction and descent, on tensors or on lists of them."""
    dtype = torch.promote_types(param.dtype, torch.float32)
    entries, grad = param.to(dtype), grad.to(dtype)
    maximize, decoupled, stochastic = chosen
    if maximize:
        grad = grad.neg()
    lr, decay = n["lr"], n["weight_decay"]
    if _differs_from_zero(decay):
        if decoupled:
            entries = entries.mul_(1 - lr * decay)
        else:
            grad = grad.add(entries.mul(decay))
    step = direction(entries, grad, state, n)
    if isinstance(lr, Tensor):
        step = step[0].div(step[1]) if isinstance(step, tuple) else step
        entries.sub_(step.mul(lr))
    elif isinstance(step, tuple):
        entries.addcdiv_(step[0], step[1], value=-lr)
    else:
        entries.add_(step, alpha=-lr)
    if param.dtype != dtype:
        param.copy_(round_to(param.dtype, entries) if stochastic else entries)


def _differs_from_zero(number: Any) -> bool:
    return isinstance(number, Tensor) or number != 0


def _sliced_move(
    direction: Callable[..., Entries | Quotient],
    param: Entries,
    grad: Entries,
    state: dict[str, Entries],
    n: dict[str, Any],
    chosen: tuple[bool, bool, bool],
) -> None:
    """The same in slices, so that what one operation writes the next one finds in the cache."""
    size = SLICE * torch.get_num_threads()
    tensors = (param, grad, *state.values())
    if not param.is_cpu or param.numel() <= size or not all(t.is_contiguous() for t in tensors):
        _move(direction, param, grad, state, n, chosen)
        return
    slices = zip(*(tensor.view(-1).split(size) for tensor in tensors), strict=True)  # type: ignore[no-untyped-call]  # torch's own
    for entries, slope, *rest in slices:
        _move(direction, entries, slope, dict(zip(state, rest, strict=True)), n, chosen)


def _as_tensors(numbers: dict[str, Any]) -> dict[str, Any]:
    """The numbers that are not zero as tensors, so that the compiler takes none for a constant."""
    return {
        name: torch.tensor(value, dtype=torch.float64)
        if isinstance(value, float) and value
        else value
        for name, value in numbers.items()
    }


@functools.cache
def _compiler(direction: Callable[..., Entries | Quotient], form: Hashable) -> Callable[..., None]:
    # the compiler limits the variants of a code object, so each form of a rule has its own
    code = unwrap(_move).__code__.replace(co_name=f"_move_{direction.__qualname__}")
    rule = FunctionType(code, unwrap(_move).__globals__, code.co_name)
    return cast(Callable[..., None], torch.compile(rule, dynamic=True, fullgraph=True))


def _compiled_move(
    direction: Callable[..., Entries | Quotient],
    param: Entries,
    grad: Entries,
    state: dict[str, Entries],
    n: dict[str, Any],
    chosen: tuple[bool, bool, bool],
) -> None:
    """The same through the compiler, on flat tensors of any length."""
    if all(tensor.is_contiguous() for tensor in (param, grad, *state.values())):
        param, grad = param.view(-1), grad.view(-1)
        state = {name: tensor.view(-1) for name, tensor in state.items()}
    fixed = tuple((name, value) for name, value in n.items() if not isinstance(value, Tensor))
    form = (fixed, chosen, tuple(state), param.dtype, grad.dtype, param.ndim)
    _compiler(direction, form)(direction, param, grad, state, n, chosen)

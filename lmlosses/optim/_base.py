"""What all optimizers share: a rule says what to remember and how to move, the base does the rest.

`UpdateRule` owns the loop over groups and parameters, the checks, and checkpoints.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lmlosses._checks import check_non_negative

Ready = tuple[Tensor, Tensor, dict[str, Any]]  # a parameter, its gradient and its state


def check_rate(lr: float | Tensor) -> None:
    """Refuse a learning rate that is negative or no number; a tensor's value is not read.

    Raises:
        TypeError: If ``lr`` is neither a number nor a tensor of one floating-point number.
        ValueError: If it is negative or not finite.
    """
    if not isinstance(lr, Tensor):
        check_non_negative(lr=lr)
    elif lr.numel() != 1 or not lr.is_floating_point():
        raise TypeError(
            f"lr must be a number or a floating-point tensor of one; got {lr.dtype} of shape "
            f"{tuple(lr.shape)}"
        )


class UpdateRule(torch.optim.Optimizer):
    """An optimizer given by its state and its update of one parameter.

    The base walks over groups and parameters, leaves those without a gradient alone, refuses
    sparse and complex gradients, negates the gradient under ``maximize``, and counts steps in a
    CPU tensor so that nothing waits for a device. It never writes to a gradient.

    Args:
        params: Parameters, or groups of parameters with settings of their own.
        defaults: Settings of groups that do not give their own; ``lr`` among them.
    """

    counters: ClassVar[tuple[str, ...]] = ("step",)  # numbers in the state, kept on the CPU

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        super().__init__(params, {"maximize": False, **defaults})

    @abstractmethod
    def check_settings(self, group: dict[str, Any]) -> None:
        """Refuse settings of a group that are outside their ranges (``lr`` is checked before).

        Raises:
            ValueError: With the name of the setting and what came.
        """

    @abstractmethod
    def init_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """What is remembered about a parameter before its first step."""

    @abstractmethod
    def update(
        self, param: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        """Move ``param`` in place; ``state["step"]`` already counts this step."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: Re-evaluates the model and returns the loss; optional.

        Returns:
            What the closure returned, or None.

        Raises:
            TypeError: If a gradient is sparse or complex.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self.update_group(list(self._ready(group)), group)
        return loss

    def update_group(self, ready: list[Ready], group: dict[str, Any]) -> None:
        """Move all parameters of a group that have a gradient, given with gradient and state."""
        for param, grad, state in ready:
            self.update(param, -grad if group["maximize"] else grad, state, group)

    def _ready(self, group: dict[str, Any]) -> Iterator[Ready]:
        for param in group["params"]:
            grad = param.grad
            if grad is None:
                continue
            if grad.layout != torch.strided or grad.is_complex():
                raise TypeError(
                    f"{type(self).__name__} takes dense real gradients; "
                    f"got {grad.layout}, {grad.dtype}"
                )
            state = self.state[param]
            if not state:
                state.update({"step": _counter(param, group), **self.init_state(param, group)})
            if not group.get("fused"):  # torch's kernels count for themselves
                state["step"] += 1
            yield param, grad, state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, also in the middle of a run; they start with fresh state.

        Args:
            param_group: ``params`` and settings that differ from the defaults.

        Raises:
            ValueError: If a setting is out of range or a parameter is already there.
            TypeError: If a setting is not a number.
        """
        group = {**self.defaults, **param_group}
        lr = group["lr"]
        check_rate(lr)
        self.check_settings(group)
        if isinstance(lr, Tensor) and lr.ndim > 0:  # would not fit a parameter without axes
            param_group = {**param_group, "lr": lr.view(())}
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a checkpoint, to the bit.

        Each tensor of the state takes the dtype and device that this optimizer would give it,
        whatever those of the checkpoint; torch's own loading would round it to its parameter's.

        Args:
            state_dict: What `state_dict` of an optimizer of the same kind returned.

        Raises:
            ValueError: If groups, names or shapes are not those of this optimizer; nothing is
                loaded then.
        """
        fresh = list(self._fresh_states(state_dict))
        super().load_state_dict(cast(Any, state_dict))
        for param, saved, likes in fresh:
            for name, (dtype, device) in likes.items():
                self.state[param][name] = saved[name].to(device, dtype, copy=True)

    def _fresh_states(
        self, state_dict: Mapping[str, Any]
    ) -> Iterator[tuple[Tensor, dict[str, Tensor], dict[str, Any]]]:
        """Each parameter with its saved state and its dtypes and devices, once checked."""
        saved_groups = state_dict["param_groups"]
        if [len(g["params"]) for g in saved_groups] != [
            len(g["params"]) for g in self.param_groups
        ]:
            raise ValueError("state_dict must hold the groups that this optimizer holds")
        for saved_group, group in zip(saved_groups, self.param_groups, strict=True):
            for key, param in zip(saved_group["params"], group["params"], strict=True):
                saved = state_dict["state"].get(key)
                if not saved:
                    continue
                like = torch.empty_like(param, device="meta", requires_grad=False)
                merged = {**group, **saved_group}
                counter = _counter(param, merged)
                fresh = {"step": counter, **self.init_state(like, merged)}
                if set(saved) != set(fresh):
                    raise ValueError(
                        f"state of parameter {key} must hold {sorted(fresh)}, as "
                        f"{type(self).__name__} does; got {sorted(saved)}"
                    )
                for name, tensor in fresh.items():
                    if saved[name].shape != tensor.shape:
                        raise ValueError(
                            f"{name} of parameter {key} must have shape {tuple(tensor.shape)}; "
                            f"got {tuple(saved[name].shape)}"
                        )
                likes = {
                    name: (tensor.dtype, counter.device if name in self.counters else param.device)
                    for name, tensor in fresh.items()
                }
                yield param, saved, likes

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Give groups of an older checkpoint the settings that they do not know."""
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)


def _counter(param: Tensor, group: dict[str, Any]) -> Tensor:
    """Steps so far: on the CPU, but for torch's fused kernels, which count where they work."""
    device = param.device if group.get("fused") else "cpu"
    return torch.zeros((), dtype=torch.float32, device=device)


def state_dtype(param: Tensor) -> torch.dtype:
    """The dtype a parameter is computed in and remembered in: at least float32."""
    return torch.promote_types(param.dtype, torch.float32)

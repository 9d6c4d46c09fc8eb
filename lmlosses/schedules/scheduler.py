"""From a schedule to torch's interface: an object that sets an optimizer's rates."""

from collections.abc import Callable
from typing import Any
from weakref import WeakMethod

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


def _set_rate(group: dict[str, Any], rate: float | Tensor) -> None:
    """A rate that is a tensor is filled: a captured or compiled step reads that very tensor."""
    if not isinstance(group["lr"], Tensor):
        group["lr"] = float(rate)
    elif isinstance(rate, Tensor):
        group["lr"].copy_(rate)
    else:
        group["lr"].fill_(rate)


class _Scheduler(LRScheduler):
    """Sets every group's rate to its own rate times the schedule at the steps taken.

    A group's own rate is kept in the group, under torch's name ``initial_lr``, so that it
    travels with the optimizer's state too. Rates are always computed from it, never from the
    last rate: what is loaded in which order, or how often, makes no difference.
    """

    def __init__(self, optimizer: Optimizer, schedule: Callable[[int], float]) -> None:
        self.schedule = schedule
        super().__init__(optimizer)
        adopt = WeakMethod(self._adopt)

        def before_step(*_: object) -> None:
            method = adopt()
            if method is not None:
                method()

        optimizer.register_step_pre_hook(before_step)

    def _own_rates(self) -> list[float | Tensor]:
        for group in self.optimizer.param_groups:
            rate = group["lr"]
            group.setdefault("initial_lr", rate.clone() if isinstance(rate, Tensor) else rate)
        self.base_lrs = [group["initial_lr"] for group in self.optimizer.param_groups]
        return self.base_lrs

    def _adopt(self) -> None:
        """Put groups that were added since the last step on the schedule."""
        if any("initial_lr" not in group for group in self.optimizer.param_groups):
            self._set_rates()

    def get_lr(self) -> list[float | Tensor]:
        """The rate of each group at the steps taken so far."""
        factor = self.schedule(self.last_epoch)
        return [own * factor for own in self._own_rates()]

    def _set_rates(self) -> None:
        for group, rate in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            _set_rate(group, rate)
        rates = [group["lr"] for group in self.optimizer.param_groups]
        self._last_lr = [rate.clone() if isinstance(rate, Tensor) else rate for rate in rates]

    def state_dict(self) -> dict[str, Any]:
        """Steps taken and each group's own rate; numbers and tensors, not the schedule."""
        own = [group.get("initial_lr", group["lr"]) for group in self.optimizer.param_groups]
        return {
            "last_epoch": self.last_epoch,
            "_step_count": self._step_count,
            "base_lrs": [rate.clone() if isinstance(rate, Tensor) else rate for rate in own],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go to the saved step, and set the rates that the schedule has there.

        Args:
            state_dict: What `state_dict` returned. That of torch's ``LambdaLR`` will do.
        """
        self.last_epoch = state_dict["last_epoch"]
        self._step_count = state_dict["_step_count"]
        for group, own in zip(self.optimizer.param_groups, state_dict["base_lrs"], strict=False):
            if not isinstance(group["lr"], Tensor):
                group["initial_lr"] = float(own)
            else:
                group["initial_lr"] = own.clone() if isinstance(own, Tensor) else own
        self._set_rates()


def as_scheduler(optimizer: Optimizer, schedule: Callable[[int], float]) -> LRScheduler:
    r"""Let a schedule set the rates of an optimizer, in torch's interface.

    With :math:`\eta_g` the rate that group :math:`g` was given and :math:`f` the schedule, step
    :math:`t` is taken with

    .. math:: \eta_{g, t} = \eta_g \, f(t)

    Call its ``step`` once after each ``optimizer.step``. To resume, load the states of the
    optimizer and of the scheduler, in either order, and construct the scheduler before or after
    the optimizer's state is loaded: the rates are those of a run that was never interrupted. A
    rate that is a tensor stays the same tensor. A group that is added later joins at the step
    where the others are.

    To continue from a checkpoint under another schedule, load the optimizer first and the
    scheduler last.

    Args:
        optimizer: Its groups' rates are what the schedule's values multiply.
        schedule: A function of the number of steps taken, such as `wsd` makes.

    Returns:
        The scheduler. Its ``state_dict`` holds numbers and tensors only, not the schedule.

    Raises:
        TypeError: If ``optimizer`` is no optimizer or ``schedule`` cannot be called.

    Example:
        >>> import torch
        >>> from lmlosses.schedules import as_scheduler, linear
        >>> point = torch.nn.Parameter(torch.zeros(1))
        >>> optimizer = torch.optim.SGD([point], lr=0.5)
        >>> scheduler = as_scheduler(optimizer, linear(total_steps=4))
        >>> for step in range(3):
        ...     print(optimizer.param_groups[0]["lr"])
        ...     optimizer.step()
        ...     scheduler.step()
        0.5
        0.375
        0.25
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer; got {optimizer!r}")
    if not callable(schedule):
        raise TypeError(f"schedule must be a function of the step; got {schedule!r}")
    return _Scheduler(optimizer, schedule)

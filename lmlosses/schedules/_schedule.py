"""What a schedule is, and what its pieces share."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, overload, runtime_checkable

import torch
from torch import Tensor

from lmlosses._checks import check_non_negative, check_whole, reads_values


@dataclass(frozen=True, repr=False)
class Schedule:
    """A function from a step to a value; made by the functions of this module.

    Its settings can be read off its name, and it can be pickled.

    Attributes:
        rule: Takes a whole number, or a float64 tensor without negative entries.

    Example:
        >>> import torch
        >>> from lmlosses.schedules import linear
        >>> schedule = linear(start=1.0, end=0.0, total_steps=4)
        >>> schedule
        linear(start=1.0, end=0.0, total_steps=4)
        >>> schedule(1), schedule(9)
        (0.75, 0.0)
        >>> schedule(torch.arange(3))
        tensor([1.0000, 0.7500, 0.5000], dtype=torch.float64)
    """

    rule: Callable[..., Any]

    @overload
    def __call__(self, step: int) -> float: ...
    @overload
    def __call__(self, step: Tensor) -> Tensor: ...
    def __call__(self, step: int | Tensor) -> float | Tensor:
        """The value at a step, or at each of several."""
        if isinstance(step, Tensor):
            value: Tensor = self.rule(as_steps(step))
            return value
        check_whole(step=step)
        check_non_negative(step=step)
        return float(self.rule(int(step)))

    def __repr__(self) -> str:
        if not isinstance(self.rule, partial):
            return f"Schedule({self.rule!r})"
        settings = ", ".join(f"{name}={value!r}" for name, value in self.rule.keywords.items())
        return f"{self.rule.func.__name__.removeprefix('_')}({settings})"


@runtime_checkable
class Phase(Protocol):
    """Makes the way from one value to another: `linear`, `cosine`, `one_minus_sqrt`."""

    def __call__(self, *, start: float, end: float, total_steps: int) -> Schedule: ...


def as_steps(step: Tensor) -> Tensor:
    if step.dtype == torch.bool or step.is_complex():
        raise TypeError(f"step must be an integer or floating-point tensor; got {step.dtype}")
    if reads_values(step) and bool((step < 0).any()):
        raise ValueError(f"step must not be negative; got {step.min().item()}")
    return step.to(torch.float64).clamp(min=0)


def progress(step: Any, total_steps: int) -> Any:
    """How far a phase has come, from 0 to 1; a phase of no steps is over."""
    if isinstance(step, Tensor):
        done = step.clamp(max=total_steps)
        return done / total_steps if total_steps else torch.ones_like(done)
    return min(step, total_steps) / total_steps if total_steps else 1.0


def check_fit(*, total_steps: int, **phases: int) -> None:
    check_whole(total_steps=total_steps, **phases)
    check_non_negative(total_steps=total_steps, **phases)
    if sum(phases.values()) > total_steps:
        names, took = " + ".join(phases), " + ".join(str(steps) for steps in phases.values())
        raise ValueError(
            f"{names} must not exceed total_steps, which is {total_steps}; got {took}"
        )

"""What optimizers that read whole tensors share: the last line of a step, and what they refuse."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lmlosses.optim._base import state_dtype
from lmlosses.optim._tensors import round_to


def descend(
    param: Tensor,
    direction: Tensor,
    lr: float | Tensor,
    *,
    weight_decay: float | Tensor = 0.0,
    stochastic_rounding: bool = False,
) -> None:
    r"""Move a parameter, :math:`\theta \gets (1 - \lambda) \theta - \eta \, \text{direction}`.

    Half precision is computed in float32.

    Args:
        param: The parameter, changed in place.
        direction: What the rate multiplies; of any floating dtype.
        lr: The rate :math:`\eta`; a tensor is never read.
        weight_decay: The share :math:`\lambda` of the parameter that is taken off, not multiplied
            by the rate.
        stochastic_rounding: Round a bfloat16 parameter up or down at random.
    """
    entries = param.to(state_dtype(param))
    if isinstance(weight_decay, Tensor) or weight_decay != 0:
        entries = entries.mul_(1 - weight_decay)
    if isinstance(lr, Tensor):
        entries.sub_(direction.to(entries.dtype).mul(lr))
    else:
        entries.add_(direction, alpha=-lr)
    if entries.dtype != param.dtype:
        param.copy_(round_to(param.dtype, entries) if stochastic_rounding else entries)


def named(params: Any) -> tuple[list[Any], list[tuple[str, Tensor]]]:
    """The parameters of a group as torch takes them, and each with a name to complain by.

    Args:
        params: A tensor, tensors, or pairs of name and tensor; an iterator is used up.
    """
    given = [params] if isinstance(params, Tensor) else list(params)
    pairs = [
        (str(item[0]), item[1]) if isinstance(item, tuple) else (f"parameter {place}", item)
        for place, item in enumerate(given)
    ]
    return given, pairs


def check_whole_tensors(optimizer: str, params: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse sharded tensors, of whose rows and columns a rank sees a part.

    Raises:
        TypeError: If a parameter is a DTensor.
    """
    for name, param in params:
        if hasattr(param, "to_local"):
            raise TypeError(
                f"{optimizer} reads whole tensors and takes no sharded ones; got a DTensor for "
                f"{name}"
            )


def multiple(lr: float | Tensor, factor: float) -> float | Tensor:
    """A rate times a number, whatever the rate is."""
    return torch.mul(lr, factor) if isinstance(lr, Tensor) else lr * factor

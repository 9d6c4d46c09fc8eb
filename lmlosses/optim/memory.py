"""What an optimizer remembers, counted in bytes."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor


class StateBytes(NamedTuple):
    """Bytes held in an optimizer's state.

    Args:
        by_name: Bytes of each kind of state, summed over parameters; ``step`` among them.
        parameters: Entries of all parameters in the optimizer's groups, with state or without.
    """

    by_name: dict[str, int]
    parameters: int

    @property
    def total(self) -> int:
        """Bytes of all kinds together."""
        return sum(self.by_name.values())

    @property
    def per_parameter(self) -> float:
        """Bytes for each entry of a parameter; zero where there are no entries."""
        return self.total / max(self.parameters, 1)


def state_bytes(optimizer: torch.optim.Optimizer) -> StateBytes:
    r"""Bytes that an optimizer's state tensors hold, counted.

    Neither parameters nor gradients are counted, and nothing is estimated: it is the storage
    behind every tensor in ``optimizer.state``, of which nothing is there before the first step.
    Step counters are counted like the rest. They cost four bytes for a whole tensor, so AdamW
    holds eight bytes for each number it trains and, with large tensors, next to nothing more.

    Args:
        optimizer: Any optimizer of torch's kind, ours or not.

    Returns:
        Bytes by name, in total and per parameter.

    Example:
        >>> import torch
        >>> from lmlosses.optim import AdamW
        >>> from lmlosses.optim.memory import state_bytes
        >>> w = torch.nn.Parameter(torch.zeros(1000))
        >>> w.grad = torch.ones(1000)
        >>> optimizer = AdamW([w])
        >>> _ = optimizer.step()
        >>> held = state_bytes(optimizer)
        >>> held.by_name
        {'step': 4, 'exp_avg': 4000, 'exp_avg_sq': 4000}
        >>> held.per_parameter
        8.004
    """
    by_name: dict[str, int] = {}
    for state in optimizer.state.values():
        for name, value in state.items():
            held = sum(tensor.untyped_storage().nbytes() for tensor in _tensors(value))
            by_name[name] = by_name.get(name, 0) + held
    params = [param for group in optimizer.param_groups for param in group["params"]]
    return StateBytes(by_name, sum(param.numel() for param in params))


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in nested containers; this rank's part of sharded ones."""
    if isinstance(value, Tensor):
        yield value.to_local() if hasattr(value, "to_local") else value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)

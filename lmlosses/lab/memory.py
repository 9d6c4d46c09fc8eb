"""How much memory a calculation holds, by counting instead of watching the machine."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["largest_tensor"]


def _tensors(made: Any) -> Iterable[Tensor]:
    if isinstance(made, Tensor):
        yield made
    elif isinstance(made, tuple | list):
        for part in made:
            yield from _tensors(part)


class _Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own
    """Sees what every operation makes, those inside of other operations too."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self.bytes: int = 0

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run the operation and look at its results."""
        made = func(*args, **(kwargs or {}))
        for tensor in _tensors(made):
            self.bytes = max(self.bytes, int(tensor.untyped_storage().nbytes()))
        return made


def largest_tensor(calculation: Callable[[], object]) -> int:
    """Bytes of the largest tensor that a calculation makes or makes use of in place.

    The same on every machine, and no measure of all that is held at one time.

    Args:
        calculation: Runs what is to be counted, forward and backward.

    Returns:
        Bytes of storage; 0 where no tensor is made.

    Example:
        >>> import torch
        >>> from lmlosses.lab.memory import largest_tensor
        >>> column = torch.ones(1000, 1)
        >>> largest_tensor(lambda: (column * column.t()).sum())
        4000000
    """
    with _Largest() as counter:
        calculation()
    return int(counter.bytes)  # the mode is untyped

"""Lists of tensors that are used like one, and rounding that is right on average."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor


class TensorList:
    """Tensors of one dtype whose methods act on all of them, with torch's foreach kernels.

    A method of `torch.Tensor` by its name; arguments are numbers, tensors of one number, or lists
    of the same length. What has no foreach kernel is done one by one.

    Args:
        tensors: The tensors, which are not copied; or numbers, where a method gave one for each.
    """

    def __init__(self, tensors: list[Any]) -> None:
        self.tensors = tensors

    @property
    def dtype(self) -> torch.dtype:
        """That of all of them."""
        dtype: torch.dtype = self.tensors[0].dtype
        return dtype

    def __getattr__(self, name: str) -> Callable[..., "TensorList"]:
        if name.startswith("__"):
            raise AttributeError(name)
        together = getattr(torch, f"_foreach_{name}", None)

        def call(*arguments: Any, **settings: Any) -> "TensorList":
            given = [a.tensors if isinstance(a, TensorList) else a for a in arguments]
            if together is not None:
                found = together(self.tensors, *given, **settings)
            else:
                found = [
                    getattr(tensor, name)(
                        *(a[i] if isinstance(a, list) else a for a in given), **settings
                    )
                    for i, tensor in enumerate(self.tensors)
                ]
            return self if name.endswith("_") else TensorList(list(found))

        return call


# what rules are written for: to their text a list of tensors is one tensor
if TYPE_CHECKING:
    Entries = Tensor
else:
    Entries = Tensor | TensorList


def round_to(dtype: torch.dtype, values: Any) -> Any:
    """Float32 rounded to bfloat16 up or down at random, so that the mean is the value.

    Infinities and NaN stay what they are.

    Args:
        dtype: bfloat16; for tensors of any other dtype use ``to``.
        values: A float32 tensor, or a `TensorList` of them.

    Raises:
        ValueError: If ``dtype`` is not bfloat16 or ``values`` not float32.
    """
    if isinstance(values, TensorList):
        return TensorList([round_to(dtype, tensor) for tensor in values.tensors])
    if dtype != torch.bfloat16 or values.dtype != torch.float32:
        raise ValueError(
            f"stochastic rounding goes from float32 to bfloat16; got {values.dtype} to {dtype}"
        )
    bits = values.view(torch.int32)
    noise = torch.randint_like(bits, 1 << 16)
    rounded = ((bits + noise) & -(1 << 16)).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values).to(dtype)

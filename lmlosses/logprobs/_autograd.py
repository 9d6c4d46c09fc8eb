"""What the lean paths need of automatic differentiation, and how they refuse the rest."""

from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.autograd.forward_ad
from torch import Tensor

_NO_SECOND_DERIVATIVE = (
    "the gradient of lean token statistics is formed by hand and has no derivative of its own; "
    "for second derivatives pass implementation='reference', which holds the whole matrix of "
    "logits"
)


class _NoSecondDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *sources: Tensor | None) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        raise RuntimeError(_NO_SECOND_DERIVATIVE)


def no_second_derivative(gradient: Tensor | None, *sources: Tensor | None) -> Tensor | None:
    """The gradient itself, as a function of the sources that has no derivative."""
    if gradient is None:
        return None
    result: Tensor = _NoSecondDerivative.apply(gradient, *sources)  # type: ignore[no-untyped-call]  # torch's apply
    return result


def transformed(*tensors: Tensor | None) -> bool:
    """Whether a transform of torch.func, or forward-mode differentiation, is at work on these.

    Both differentiate by rules that a hand-written backward pass does not follow.
    """
    if torch.compiler.is_compiling():
        return False
    for tensor in tensors:
        if tensor is None:
            continue
        if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            return True
        dual = torch.autograd.forward_ad.unpack_dual(tensor)  # type: ignore[no-untyped-call]  # torch's
        if dual.tangent is not None:
            return True
    return False


def without_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """Keep the dtypes that the lean path chose for itself."""
    device = tensor.device.type
    return torch.autocast(device if device in ("cpu", "cuda") else "cpu", enabled=False)

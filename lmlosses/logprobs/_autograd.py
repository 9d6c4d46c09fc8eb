"""What the lean paths need of automatic differentiation, and how they refuse the rest."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
import torch.autograd.forward_ad
from torch import Tensor

_NO_SECOND_DERIVATIVE = (
    "the gradient of lean statistics is formed by hand and has no derivative of its own; for "
    "second derivatives pass implementation='reference' to the statistics, which holds the whole "
    "matrix of logits or scores, or take them with torch.func"
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


def operator(
    name: str,
    forward: Callable[..., tuple[Tensor, ...]],
    gradients: Callable[..., tuple[Tensor, ...]],
    *,
    like_forward: Callable[..., tuple[Tensor, ...]],
    like_gradients: Callable[..., tuple[Tensor, ...]],
    keep: Callable[..., None],
    backward: Callable[..., Any],
) -> Callable[..., tuple[Tensor, ...]]:
    """Two functions over tensors as one differentiable operation, run as it is or compiled.

    Args:
        name: Under which a compiled graph knows the operation.
        forward: From inputs to outputs.
        gradients: What ``backward`` calls to form gradients.
        like_forward: Empty outputs of the right shapes, which is all that a compiler asks for.
        like_gradients: The same for the gradients.
        keep: Saves for the backward pass, ``keep(ctx, inputs, output)``.
        backward: ``backward(gradients, ctx, *upstream)``.
    """
    # torch.compile takes an operator of torch's own kind as it is; traced through, every tile
    # would become part of the graph
    compiled = torch.library.custom_op(name, forward, mutates_args=())
    compiled.register_fake(like_forward)
    compiled_gradients = torch.library.custom_op(f"{name}_backward", gradients, mutates_args=())
    compiled_gradients.register_fake(like_gradients)
    compiled.register_autograd(partial(backward, compiled_gradients), setup_context=keep)

    # the same without a compiler, whose import alone takes seconds
    eager = type(
        "Eager",
        (torch.autograd.Function,),
        {
            "forward": staticmethod(forward),
            "setup_context": staticmethod(keep),
            "backward": staticmethod(partial(backward, gradients)),
        },
    )

    def call(*inputs: Any) -> tuple[Tensor, ...]:
        chosen: Any = compiled if torch.compiler.is_compiling() else eager.apply  # type: ignore[attr-defined]  # torch's apply
        found: tuple[Tensor, ...] = chosen(*inputs)
        return found

    return call

"""Parameters and vectors as lists of tensors: what is asked of them, and one vector of all."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lmlosses._checks import check_floating, check_same_device, check_same_shape


def check_params(params: Iterable[Tensor]) -> list[Tensor]:
    """Require floating-point tensors, each once, with at least one entry among them."""
    if isinstance(params, Tensor):
        raise TypeError(
            f"params must be a list of tensors; got one tensor of shape {tuple(params.shape)}"
        )
    found = list(params)
    seen: dict[int, int] = {}
    for index, param in enumerate(found):
        check_floating(**{f"params[{index}]": param})
        if id(param) in seen:
            raise ValueError(
                f"params must hold each tensor once; got params[{seen[id(param)]}] again as "
                f"params[{index}]"
            )
        seen[id(param)] = index
    if sum(param.numel() for param in found) == 0:
        raise ValueError(
            f"params must hold at least one entry; got {len(found)} tensors without any"
        )
    return found


def check_variables(params: Iterable[Tensor]) -> list[Tensor]:
    """Require parameters that can be differentiated by."""
    found = check_params(params)
    for index, param in enumerate(found):
        if not param.requires_grad:
            raise ValueError(
                f"params[{index}] must require a gradient; got one with requires_grad=False: "
                "leave it out, it is held constant then"
            )
    return found


def check_one_device(params: list[Tensor]) -> None:
    """Require parameters that fit into one vector."""
    for index, param in enumerate(params):
        check_same_device(of="params[0]", reference=params[0], **{f"params[{index}]": param})


def check_vectors(name: str, vectors: Sequence[Tensor], params: list[Tensor]) -> list[Tensor]:
    """Require one tensor for each parameter, of its shape and device; in its dtype."""
    if isinstance(vectors, Tensor) or len(vectors) != len(params):
        came = f"{len(vectors)}" if not isinstance(vectors, Tensor) else "a single tensor"
        raise ValueError(
            f"{name} must be a list of {len(params)} tensors, one for each parameter; got {came}"
        )
    for index, (vector, param) in enumerate(zip(vectors, params, strict=True)):
        each = f"{name}[{index}]"
        check_floating(**{each: vector})
        check_same_shape(each, vector, of=f"params[{index}]", reference=param)
        check_same_device(of=f"params[{index}]", reference=param, **{each: vector})
    return [vector.detach().to(param.dtype) for vector, param in zip(vectors, params, strict=True)]


def check_loss(value: Tensor) -> Tensor:
    """Require a single number."""
    check_floating(loss=value)
    if value.ndim != 0:
        raise ValueError(
            f"loss must return one number, a tensor of shape (): reduce it first; "
            f"got shape {tuple(value.shape)}"
        )
    return value


def check_differentiable(name: str, value: Tensor) -> Tensor:
    """Refuse what was computed without its graph, whose derivatives would all read zero."""
    if not value.requires_grad:
        raise ValueError(
            f"{name} must depend on what it is differentiated by; got a constant, as after "
            "detach or under no_grad"
        )
    return value


def flatten(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """All entries in one new vector."""
    return torch.cat([tensor.detach().reshape(-1).to(dtype) for tensor in tensors])


def unflatten(vector: Tensor, params: list[Tensor]) -> list[Tensor]:
    """The entries of a vector in the shapes of the parameters, as views."""
    parts = torch.split(vector, [param.numel() for param in params])
    return [part.view(param.shape) for part, param in zip(parts, params, strict=True)]

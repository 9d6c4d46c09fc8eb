"""Rows of all ranks of a process group, with exact gradients."""

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor
from torch.autograd.function import once_differentiable

from lmlosses._checks import check_min_ndim

__all__ = ["gather_rows"]

_MOST_AXES = 64  # of a tensor of torch


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        everyone = local.new_empty(dist.get_world_size(group) * len(local), *local.shape[1:])
        parts = list(everyone.chunk(dist.get_world_size(group)))
        dist.all_gather(parts, local.contiguous(), group=group)
        return everyone

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        # every rank used these rows: their gradient is the sum over ranks
        size, rank = dist.get_world_size(ctx.group), dist.get_rank(ctx.group)
        total = upstream.clone(memory_format=torch.contiguous_format)
        rows = len(total) // size
        if dist.get_backend(ctx.group) == "gloo":  # which learned to reduce_scatter late
            dist.all_reduce(total, group=ctx.group)
            return total[rank * rows : (rank + 1) * rows], None
        mine = total.new_empty(rows, *total.shape[1:])
        dist.reduce_scatter(mine, list(total.chunk(size)), group=ctx.group)
        return mine, None


def _check_even(name: str, local: Tensor, group: dist.ProcessGroup) -> None:
    """Require the same shape on all ranks, or raise on all of them."""
    padding = [-1] * (_MOST_AXES - local.ndim)  # what is gathered must be of one length
    shape = torch.tensor([*local.shape, *padding], device=local.device)
    shapes = [torch.empty_like(shape) for _ in range(dist.get_world_size(group))]
    dist.all_gather(shapes, shape, group=group)
    found = [tuple(size for size in each.tolist() if size >= 0) for each in shapes]
    if len(set(found)) > 1:
        raise ValueError(
            f"{name} must have the same shape on all ranks; got {', '.join(map(str, found))} "
            f"on ranks 0 to {len(found) - 1}"
        )


def gather_rows(
    local: Shaped[Tensor, "rows *rest"], group: dist.ProcessGroup, *, name: str = "local"
) -> Shaped[Tensor, "all_rows *rest"]:
    r"""The rows of all ranks, in the order of ranks; its gradient is the sum over ranks.

    With :math:`L_r` the loss of rank :math:`r` and the rows :math:`x` of this one,

    .. math:: \frac{\partial}{\partial x} \sum_r L_r

    arrives at ``local``. Averaged over ranks afterwards, as ``DistributedDataParallel`` does,
    gradients of parameters are those of the mean of the :math:`L_r`. The shapes of all ranks are
    compared first, for which a GPU is waited for.

    Args:
        local: This rank's rows; every rank has as many.
        group: The ranks.
        name: What an error calls ``local``.

    Returns:
        The rows of rank 0, then those of rank 1, and so on.

    Raises:
        ValueError: On all ranks, if the shapes differ or have no axis.
        RuntimeError: When a second derivative is taken.

    Example:
        >>> import tempfile, torch
        >>> import torch.distributed as dist
        >>> from lmlosses.logprobs import gather_rows
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     dist.init_process_group(
        ...         "gloo", init_method=f"file://{folder}/meeting", rank=0, world_size=1
        ...     )
        ...     gather_rows(torch.tensor([[1.0, 2.0]]), dist.group.WORLD)
        ...     dist.destroy_process_group()
        tensor([[1., 2.]])
    """
    _check_even(name, local, group)
    check_min_ndim(name, local, 1)
    gathered: Tensor = _GatherRows.apply(local, group)  # type: ignore[no-untyped-call]  # torch's apply
    return gathered

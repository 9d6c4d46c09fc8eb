"""The sum over a query's pairs of log-sigmoids, without the matrix of their scores."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from lmlosses._checks import (
    check_floating,
    check_number,
    check_same_device,
    check_shape,
    compute_dtype,
)
from lmlosses.logprobs._arguments import WORKSPACE, check_workspace
from lmlosses.logprobs._autograd import no_second_derivative, operator, without_autocast
from lmlosses.logprobs._pairs import (
    Excluded,
    Implementation,
    candidate_tiles,
    check_excluded,
    check_pairs,
    checked_targets,
    chosen,
    gradients_as_inputs,
    whole,
)
from lmlosses.logprobs.tiling import Block, LinearTiles

__all__ = ["pair_log_sigmoid"]


def _reference(queries: Tensor, keys: Tensor, bias: Tensor, excluded: Excluded) -> Tensor:
    dtype = compute_dtype(queries, keys)
    scores = queries.to(dtype) @ keys.to(dtype).t() + bias.to(dtype)
    signs = torch.full_like(scores, -1.0).scatter(1, excluded.targets.unsqueeze(1), 1.0)
    found = F.logsigmoid(signs * scores)
    denied = excluded.denied(whole(queries, keys), queries.device)
    return (found if denied is None else found.masked_fill(denied, 0.0)).sum(dim=1)


def _flip_targets_(tile: Tensor, block: Block, targets: Tensor) -> None:
    """Change the sign of the scores of all pairs that are no targets."""
    place = targets[block.rows] - block.cols.start
    inside = (place >= 0) & (place < tile.shape[1])
    place = place.clamp(0, tile.shape[1] - 1).unsqueeze(1)
    factor = torch.where(inside, -1.0, 1.0).to(tile.dtype).unsqueeze(1)
    tile.neg_().scatter_(1, place, tile.gather(1, place) * factor)


def _forward(
    queries: Tensor,
    keys: Tensor,
    bias: Tensor,
    targets: Tensor,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    mask: Tensor | None,
    workspace: int,
) -> tuple[Tensor]:
    excluded = Excluded(query_ids, key_ids, mask, targets, True)
    with without_autocast(queries):
        tiles = LinearTiles(queries, keys, None, workspace)
        total = queries.new_zeros(len(queries), dtype=tiles.dtype)
        for block, tile in candidate_tiles(tiles, excluded):
            _flip_targets_(tile.add_(bias), block, targets)
            total[block.rows] += F.logsigmoid(tile).sum(dim=1)
    return (total,)


def _gradients(
    queries: Tensor,
    keys: Tensor,
    bias: Tensor,
    targets: Tensor,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    mask: Tensor | None,
    upstream: Tensor,
    wants_queries: bool,
    wants_keys: bool,
    workspace: int,
) -> tuple[Tensor, Tensor, Tensor]:
    excluded = Excluded(query_ids, key_ids, mask, targets, True)
    with without_autocast(queries):
        tiles = LinearTiles(
            queries, keys, None, workspace, gradients=(wants_queries, wants_keys, False)
        )
        by_bias = bias.new_zeros((), dtype=tiles.dtype)
        for block, tile in candidate_tiles(tiles, excluded):
            _flip_targets_(tile.add_(bias), block, targets)
            # the derivative of log sigma(y z) in z is y sigma(-y z)
            tile.neg_().sigmoid_()
            _flip_targets_(tile, block, targets)
            tile.mul_(upstream[block.rows].unsqueeze(1))
            by_bias += tile.sum()
            tiles.absorb(block, tile)
        tiles.finish()
    return (*gradients_as_inputs(tiles, queries, keys), by_bias)


def _like_forward(
    queries: Tensor,
    keys: Tensor,
    bias: Tensor,
    targets: Tensor,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    mask: Tensor | None,
    workspace: int,
) -> tuple[Tensor]:
    return (queries.new_empty(len(queries), dtype=compute_dtype(queries)),)


def _like_gradients(
    queries: Tensor,
    keys: Tensor,
    bias: Tensor,
    targets: Tensor,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    mask: Tensor | None,
    upstream: Tensor,
    wants_queries: bool,
    wants_keys: bool,
    workspace: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        queries.new_empty(queries.shape if wants_queries else 0),
        keys.new_empty(keys.shape if wants_keys else 0),
        bias.new_empty((), dtype=compute_dtype(queries)),
    )


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor]) -> None:
    *tensors, workspace = inputs
    ctx.save_for_backward(*tensors)
    ctx.workspace = workspace


def _backward(
    gradients_of: Callable[..., tuple[Tensor, ...]], ctx: Any, upstream: Tensor
) -> tuple[Tensor | None, ...]:
    wants = ctx.needs_input_grad[:3]
    with torch.no_grad():
        found = gradients_of(*ctx.saved_tensors, upstream, *wants[:2], ctx.workspace)
    gradients = [g if wanted else None for g, wanted in zip(found, wants, strict=True)]
    if torch.is_grad_enabled():
        sources = (*ctx.saved_tensors[:3], upstream)
        gradients = [no_second_derivative(gradient, *sources) for gradient in gradients]
    return (*gradients, *[None] * 5)


_pair_log_sigmoids = operator(
    "lmlosses::pair_log_sigmoid",
    _forward,
    _gradients,
    like_forward=_like_forward,
    like_gradients=_like_gradients,
    keep=_keep_for_backward,
    backward=_backward,
)


def pair_log_sigmoid(
    queries: Float[Tensor, "queries dim"],
    keys: Float[Tensor, "keys dim"],
    targets: Integer[Tensor, " queries"],
    *,
    bias: float | Float[Tensor, ""] = 0.0,
    query_ids: Integer[Tensor, " queries"] | None = None,
    key_ids: Integer[Tensor, " keys"] | None = None,
    mask: Bool[Tensor, "queries keys"] | None = None,
    implementation: Implementation | None = None,
    workspace: int = WORKSPACE,
) -> Float[Tensor, " queries"]:
    r"""Log-probability, per query, that all of its pairs are judged rightly one by one, in nats.

    .. math:: \sum_j \log \sigma(y_{ij} s_{ij}) , \qquad s_{ij} = q_i^\top k_j + b , \qquad
        y_{ij} = \begin{cases} 1 & j = t_i \\ -1 & \text{otherwise} \end{cases}

    Scores are formed in tiles, as in `lmlosses.logprobs.pair_stats`.

    Args:
        queries: One row each. Half precision is multiplied and computed in float32.
        keys: One row each, of the queries' dtype.
        targets: Index of each query's key.
        bias: Added to each score; a scalar tensor if it is learned.
        query_ids: A pair of equal ids does not count, unless it is the target's.
        key_ids: The ids of the keys.
        mask: True where a pair counts; as large as the scores. Targets always do.
        implementation: ``"reference"`` (holds all scores) or ``"chunked"``. By default chunked;
            under transforms of ``torch.func`` and forward-mode differentiation the reference.
        workspace: Bytes that each pass may hold beyond its inputs, results and gradients, in
            round terms.

    Returns:
        One sum per query, never positive, differentiable in queries, keys and bias.

    Raises:
        TypeError: If a tensor has the wrong kind of dtype, the dtypes differ, or ``bias`` is no
            number.
        ValueError: If shapes or devices disagree, there is no key, the ids of one side are
            missing, the implementation is unknown, or (read on the CPU) a target is no key.
        RuntimeError: When a second derivative is taken through the lean implementation.

    Example:
        >>> import torch
        >>> from lmlosses.logprobs import pair_log_sigmoid
        >>> pair_log_sigmoid(torch.zeros(2, 3), torch.ones(4, 3), torch.tensor([0, 1]))
        tensor([-2.7726, -2.7726])

    References:
        Zhai et al. (2023), Sigmoid loss for language image pre-training, arXiv:2303.15343.
    """
    check_pairs(queries, keys)
    found_targets = checked_targets(targets, queries, keys)
    check_excluded(query_ids, key_ids, mask, queries, keys)
    check_workspace(workspace)
    if not isinstance(bias, Tensor):
        bias = queries.new_full((), check_number("bias", bias), dtype=compute_dtype(queries))
    check_floating(bias=bias)
    check_same_device(of="queries", reference=queries, bias=bias)
    check_shape("bias", bias, (), meaning="one number")
    dtype = compute_dtype(queries)
    tensors = (queries, keys, bias, targets, query_ids, key_ids, mask)
    if chosen(implementation, *tensors) == "reference":
        excluded = Excluded(query_ids, key_ids, mask, found_targets, True)
        with without_autocast(queries):
            return _reference(queries, keys, bias, excluded)
    return _pair_log_sigmoids(
        queries.to(dtype), keys.to(dtype), bias.to(dtype), found_targets, query_ids, key_ids,
        mask, workspace,
    )[0]  # fmt: skip

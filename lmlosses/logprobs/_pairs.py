"""What statistics of pairs share: which pairs are candidates, tiles of scores, and the checks."""

import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lmlosses._checks import (
    check_bool,
    check_floating,
    check_indices,
    check_integer,
    check_ndim,
    check_not_empty_axis,
    check_same_device,
    check_shape,
    check_tensor,
)
from lmlosses.logprobs._autograd import transformed
from lmlosses.logprobs.tiling import Block, LinearTiles

__all__: list[str] = []  # how it is done; what is done is in the other modules

Implementation = Literal["reference", "chunked"]


class Excluded(NamedTuple):
    """Which pairs are no candidates: those of equal ids, and those the mask denies.

    The target of a query is a candidate whatever they say, unless there are no targets.
    """

    query_ids: Tensor | None
    key_ids: Tensor | None
    mask: Tensor | None
    targets: Tensor
    keeps_targets: bool

    def denied(self, block: Block, device: torch.device) -> Tensor | None:
        """Which pairs of a block are no candidates; None if all are."""
        if self.query_ids is None and self.mask is None:
            return None
        found = torch.zeros((), dtype=torch.bool, device=device)
        if self.query_ids is not None and self.key_ids is not None:
            found = self.query_ids[block.rows].unsqueeze(1) == self.key_ids[block.cols]
        if self.mask is not None:
            found = found | ~self.mask[block.rows, block.cols]
        if self.keeps_targets:
            columns = torch.arange(block.cols.start, block.cols.stop, device=device)
            found = found & (self.targets[block.rows].unsqueeze(1) != columns)
        return found


def whole(queries: Tensor, keys: Tensor) -> Block:
    """All queries and all keys."""
    return Block(slice(0, len(queries)), slice(0, len(keys)))


def candidate_tiles(tiles: LinearTiles, excluded: Excluded) -> Iterator[tuple[Block, Tensor]]:
    """Tiles of scores, with what is no candidate at minus infinity."""
    for block in tiles.blocks():
        tile, denied = tiles.tile(block), excluded.denied(block, tiles.hidden.device)
        yield block, tile if denied is None else tile.masked_fill_(denied, -math.inf)


def gradients_as_inputs(
    tiles: LinearTiles, queries: Tensor, keys: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of queries and keys in their dtype, empty where none was asked for."""
    return tuple(  # type: ignore[return-value]  # two
        like.new_empty(0) if gradient is None else gradient.to(like.dtype)
        for gradient, like in zip(tiles.gradients()[:2], (queries, keys), strict=True)
    )


def check_pairs(queries: Tensor, keys: Tensor) -> None:
    """Queries and keys of one kind that can be multiplied, and at least one key."""
    check_floating(queries=queries, keys=keys)
    for name, tensor in {"queries": queries, "keys": keys}.items():
        check_ndim(name, tensor, 2)
    if keys.shape[1] != queries.shape[1]:
        raise ValueError(
            f"keys must have shape (count, {queries.shape[1]}), with the last axis of queries; "
            f"got {tuple(keys.shape)}"
        )
    check_not_empty_axis("keys", keys, 0)
    if keys.dtype != queries.dtype:
        raise TypeError(f"keys must have the dtype of queries, {queries.dtype}; got {keys.dtype}")
    check_same_device(of="queries", reference=queries, keys=keys)


def checked_targets(targets: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    """One key for each query, as 64-bit indices."""
    check_tensor(targets=targets)
    check_same_device(of="queries", reference=queries, targets=targets)
    check_shape("targets", targets, (len(queries),), meaning="one entry per query")
    check_indices("targets", targets, len(keys), of="the rows of keys")
    return targets.long()


def check_excluded(
    query_ids: Tensor | None, key_ids: Tensor | None, mask: Tensor | None,
    queries: Tensor, keys: Tensor,
) -> None:  # fmt: skip
    """Ids of both sides or of none, and a mask of all pairs."""
    given = {"query_ids": query_ids, "key_ids": key_ids, "mask": mask}
    check_tensor(**{name: tensor for name, tensor in given.items() if tensor is not None})
    if (query_ids is None) != (key_ids is None):
        missing = "query_ids" if query_ids is None else "key_ids"
        raise ValueError(f"{missing} must be given, as the ids of the other side are; got None")
    check_same_device(of="queries", reference=queries, **given)
    for name, ids, like in (("query_ids", query_ids, queries), ("key_ids", key_ids, keys)):
        if ids is not None:
            check_integer(**{name: ids})
            check_shape(name, ids, (len(like),), meaning="one entry per row")
    if mask is not None:
        check_bool(mask=mask)
        check_shape("mask", mask, (len(queries), len(keys)), meaning="one entry per pair")


def chosen(implementation: Implementation | None, *tensors: Tensor | None) -> Implementation:
    """The implementation asked for, or else the one that suits the tensors."""
    if implementation is None:
        return "reference" if transformed(*tensors) else "chunked"
    if implementation not in ("reference", "chunked"):
        raise ValueError(
            f"implementation must be 'reference', 'chunked' or None; got {implementation!r}"
        )
    return implementation

"""Statistics of all pairs of queries and keys, without the matrix of their scores.

A batch of contrastive learning scores each query against each key. `pair_stats` is what
`lmlosses.logprobs.linear_token_stats` is for language models, with two additions: it normalizes
over the queries of a key as well, from the same tiles, and leaves out pairs that are no
candidates.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from lmlosses._checks import compute_dtype, reads_values
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
from lmlosses.logprobs.chunked import (
    BY_TARGET,
    STATE,
    TARGET,
    TOTAL,
    Upstream,
    Wanted,
    coefficients,
    differentiate,
    finish,
    merge,
    new_state,
)
from lmlosses.logprobs.statistics import Scaling
from lmlosses.logprobs.tiling import Buffer, LinearTiles

__all__ = ["PairStats", "pair_stats"]

_PLAIN = Scaling(1.0, None)
_WANTED = Wanted(mean=False, entropy=False)


class PairStats(NamedTuple):
    r"""What in-batch losses need to know of each query and each key, in nats.

    With scores :math:`s_{ij} = q_i^\top k_j` and the target :math:`t_i` of each query,

    Attributes:
        logps: :math:`s_{i t_i} - \log \sum_j e^{s_{ij}}` of each query, over its candidates.
        log_normalizer: :math:`\log \sum_j e^{s_{ij}}` of each query.
        key_logps: The same with the roles exchanged, of each key; None unless asked for.
        key_log_normalizer: :math:`\log \sum_i e^{s_{ij}}` of each key; None unless asked for.
    """

    logps: Float[Tensor, " queries"]
    log_normalizer: Float[Tensor, " queries"]
    key_logps: Float[Tensor, " keys"] | None
    key_log_normalizer: Float[Tensor, " keys"] | None


def _reference(
    queries: Tensor, keys: Tensor, excluded: Excluded, by_key: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All statistics from the whole matrix of scores."""
    dtype = compute_dtype(queries, keys)
    scores = queries.to(dtype) @ keys.to(dtype).t()
    denied = excluded.denied(whole(queries, keys), queries.device)
    if denied is not None:
        scores = scores.masked_fill(denied, -math.inf)
    normalizer = scores.logsumexp(dim=1)
    logps = scores.log_softmax(dim=1).gather(1, excluded.targets.unsqueeze(1)).squeeze(1)
    key_logps, key_normalizer = scores.new_empty(0), scores.new_empty(0)
    if by_key:
        key_logps, key_normalizer = scores.log_softmax(dim=0).diagonal(), scores.logsumexp(dim=0)
    if not excluded.keeps_targets:
        chosen = scores.detach().gather(1, excluded.targets.unsqueeze(1)).squeeze(1)
        logps = torch.where(chosen > -math.inf, logps, -math.inf)
        key_logps = torch.where(chosen > -math.inf, key_logps, -math.inf) if by_key else key_logps
    return logps, normalizer, key_logps, key_normalizer


def _where_chosen(values: Tensor, state: Tensor, otherwise: float, keeps_targets: bool) -> Tensor:
    """The values, or something else where a target may be no candidate and is none."""
    return values if keeps_targets else values.masked_fill(state[TARGET] == -math.inf, otherwise)


def _forward(
    queries: Tensor,
    keys: Tensor,
    targets: Tensor,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    mask: Tensor | None,
    keeps_targets: bool,
    by_key: bool,
    workspace: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    excluded = Excluded(query_ids, key_ids, mask, targets, keeps_targets)
    with without_autocast(queries):
        tiles = LinearTiles(queries, keys, None, workspace)
        columns = torch.arange(len(keys) if by_key else 0, device=keys.device)
        state, key_state = new_state(targets, tiles.dtype), new_state(columns, tiles.dtype)
        scratch, copy = Buffer(queries, tiles.dtype), Buffer(queries, tiles.dtype)
        for block, tile in candidate_tiles(tiles, excluded):
            rows, cols = block
            if by_key:
                turned = copy.take(*tile.shape).copy_(tile).t()
                merge(
                    turned, rows, columns[cols], key_state[:, cols],
                    None, _PLAIN, _WANTED, scratch,
                )  # fmt: skip
            merge(tile, cols, targets[rows], state[:, rows], None, _PLAIN, _WANTED, scratch)
        found, of_keys = finish(state, _WANTED), finish(key_state, _WANTED)
    return (
        _where_chosen(found.logps, state, -math.inf, keeps_targets), found.log_normalizer,
        _where_chosen(of_keys.logps, key_state, -math.inf, keeps_targets), of_keys.log_normalizer,
        state, key_state,
    )  # fmt: skip


def _gradients(
    queries: Tensor,
    keys: Tensor,
    targets: Tensor,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    mask: Tensor | None,
    state: Tensor,
    key_state: Tensor,
    by_logps: Tensor | None,
    by_normalizer: Tensor | None,
    by_key_logps: Tensor | None,
    by_key_normalizer: Tensor | None,
    keeps_targets: bool,
    by_key: bool,
    wants_queries: bool,
    wants_keys: bool,
    workspace: int,
) -> tuple[Tensor, Tensor]:
    excluded = Excluded(query_ids, key_ids, mask, targets, keeps_targets)
    with without_autocast(queries):
        tiles = LinearTiles(
            queries, keys, None, workspace, gradients=(wants_queries, wants_keys, False)
        )
        columns = torch.arange(key_state.shape[1], device=keys.device)
        if by_logps is not None:
            by_logps = _where_chosen(by_logps, state, 0.0, keeps_targets)
        if by_key_logps is not None:
            by_key_logps = _where_chosen(by_key_logps, key_state, 0.0, keeps_targets)
        # who has no candidate at all has no gradient either
        state, key_state = (held.clone() for held in (state, key_state))
        for held in (state, key_state):
            held[TOTAL].masked_fill_(held[TOTAL] == 0, 1.0)
        factors = coefficients(state, Upstream(by_logps, by_normalizer, None, None), _PLAIN)
        key_factors = coefficients(
            key_state, Upstream(by_key_logps, by_key_normalizer, None, None), _PLAIN
        )
        at_targets = factors[BY_TARGET].clone()
        if by_key:
            at_targets += key_factors[BY_TARGET]
        if tiles.take_targets(targets, at_targets):
            factors[BY_TARGET] = 0
            key_factors[BY_TARGET] = 0
        copy = Buffer(queries, tiles.dtype)
        scratch = (Buffer(queries, tiles.dtype), Buffer(queries, tiles.dtype))
        for block, tile in candidate_tiles(tiles, excluded):
            rows, cols = block
            turned = copy.take(*tile.shape).copy_(tile).t() if by_key else None
            differentiate(
                tile, cols, targets[rows], state[:, rows], factors[:, rows],
                None, _PLAIN, _WANTED, scratch,
            )  # fmt: skip
            if turned is not None:
                differentiate(
                    turned, rows, columns[cols], key_state[:, cols], key_factors[:, cols],
                    None, _PLAIN, _WANTED, scratch,
                )  # fmt: skip
                tile.add_(turned.t())
            tiles.absorb(block, tile)
        tiles.finish()
    return gradients_as_inputs(tiles, queries, keys)


def _like_forward(
    queries: Tensor,
    keys: Tensor,
    targets: Tensor,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    mask: Tensor | None,
    keeps_targets: bool,
    by_key: bool,
    workspace: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, cols = len(queries), len(keys) if by_key else 0
    dtype = compute_dtype(queries)
    vectors = [queries.new_empty(size, dtype=dtype) for size in (rows, rows, cols, cols)]
    states = [queries.new_empty(STATE, size, dtype=dtype) for size in (rows, cols)]
    return (*vectors, *states)  # type: ignore[return-value]  # four and two


def _like_gradients(
    queries: Tensor,
    keys: Tensor,
    targets: Tensor,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    mask: Tensor | None,
    state: Tensor,
    key_state: Tensor,
    by_logps: Tensor | None,
    by_normalizer: Tensor | None,
    by_key_logps: Tensor | None,
    by_key_normalizer: Tensor | None,
    keeps_targets: bool,
    by_key: bool,
    wants_queries: bool,
    wants_keys: bool,
    workspace: int,
) -> tuple[Tensor, Tensor]:
    return tuple(  # type: ignore[return-value]  # two
        like.new_empty(like.shape if wanted else 0)
        for like, wanted in ((queries, wants_queries), (keys, wants_keys))
    )


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, keeps_targets, by_key, workspace = inputs
    ctx.save_for_backward(*tensors, *output[4:])
    ctx.settings = (keeps_targets, by_key, workspace)
    ctx.set_materialize_grads(False)


def _backward(
    gradients_of: Callable[..., tuple[Tensor, ...]], ctx: Any, *upstream: Tensor | None
) -> tuple[Tensor | None, ...]:
    keeps_targets, by_key, workspace = ctx.settings
    arriving = [g if by_key or i < 2 else None for i, g in enumerate(upstream[:4])]
    wants = ctx.needs_input_grad[:2]
    with torch.no_grad():
        found = gradients_of(
            *ctx.saved_tensors, *arriving, keeps_targets, by_key, *wants, workspace
        )
    gradients = [g if wanted else None for g, wanted in zip(found, wants, strict=True)]
    if torch.is_grad_enabled():
        sources = (*ctx.saved_tensors[:2], *arriving)
        gradients = [no_second_derivative(gradient, *sources) for gradient in gradients]
    return (*gradients, *[None] * 7)


def _targets(targets: Tensor | None, queries: Tensor, keys: Tensor, by_key: bool) -> Tensor:
    """The key of each query: its own with ``by_key``, else the first where none is given."""
    own = torch.arange(len(queries), device=queries.device)
    if targets is not None:
        found = checked_targets(targets, queries, keys)
        if by_key and reads_values(found) and not torch.equal(found, own):
            place = int((found != own).nonzero()[0])
            raise ValueError(
                f"targets must be each query's own index with by_key; got {int(found[place])} "
                f"for query {place}"
            )
        targets = found
    if by_key:
        return own
    return torch.zeros_like(own) if targets is None else targets


_pair_statistics = operator(
    "lmlosses::pair_stats",
    _forward,
    _gradients,
    like_forward=_like_forward,
    like_gradients=_like_gradients,
    keep=_keep_for_backward,
    backward=_backward,
)


def pair_stats(
    queries: Float[Tensor, "queries dim"],
    keys: Float[Tensor, "keys dim"],
    targets: Integer[Tensor, " queries"] | None = None,
    *,
    by_key: bool = False,
    query_ids: Integer[Tensor, " queries"] | None = None,
    key_ids: Integer[Tensor, " keys"] | None = None,
    mask: Bool[Tensor, "queries keys"] | None = None,
    implementation: Implementation | None = None,
    workspace: int = WORKSPACE,
) -> PairStats:
    r"""Log-probabilities and log-normalizers of all queries against all keys, in nats.

    .. math:: \log p_i = s_{i t_i} - \log \sum_{j \in C_i} e^{s_{ij}} , \qquad
        s_{ij} = q_i^\top k_j

    Scores are formed in tiles, forward and once more backward: the memory grows with the number
    of queries and keys, and not with their product. Divide the queries by a temperature; if it is
    learned, its gradient follows from theirs.

    Args:
        queries: One row each. Half precision is multiplied and computed in float32.
        keys: One row each, of the queries' dtype.
        targets: Index of each query's key. Without targets ``query_ids`` and ``mask`` spare no
            pair, and ``logps`` is that of the first key, ``-inf`` where it is no candidate.
        by_key: Whether to normalize over queries as well. Query ``i`` and key ``i`` are then each
            other's targets, so that there must be as many of both.
        query_ids: A pair of equal ids is no candidate, unless it is the target's. For examples
            that occur twice in a batch, and for queries that are keys themselves.
        key_ids: The ids of the keys.
        mask: True where a pair is a candidate; as large as the scores. Targets always are.
        implementation: ``"reference"`` (holds all scores) or ``"chunked"``. By default chunked;
            under transforms of ``torch.func`` and forward-mode differentiation the reference.
        workspace: Bytes that each pass may hold beyond its inputs, results and gradients, in
            round terms.

    Returns:
        The statistics, differentiable in queries and keys. Where there is no candidate the
        log-normalizer is ``-inf``, with gradient zero.

    Raises:
        TypeError: If a tensor has the wrong kind of dtype, or the dtypes differ.
        ValueError: If shapes or devices disagree, there is no key, the ids of one side are
            missing, the implementation is unknown, or (read on the CPU) a target is no key or,
            with ``by_key``, not that of its query.
        RuntimeError: When a second derivative is taken through the lean implementation.

    Example:
        >>> import torch
        >>> from lmlosses.logprobs import pair_stats
        >>> stats = pair_stats(torch.zeros(2, 3), torch.ones(4, 3), torch.tensor([0, 1]))
        >>> stats.logps
        tensor([-1.3863, -1.3863])

    References:
        Tiles with running sums in both directions: Cheng et al. (2024), Breaking the memory
        barrier: near infinite batch size scaling for contrastive loss, arXiv:2410.17243.
    """
    check_pairs(queries, keys)
    if by_key and len(queries) != len(keys):
        raise ValueError(
            f"keys must be as many as queries, {len(queries)}, with by_key; got {len(keys)}"
        )
    found_targets = _targets(targets, queries, keys, by_key)
    check_excluded(query_ids, key_ids, mask, queries, keys)
    check_workspace(workspace)
    keeps = targets is not None
    found: tuple[Tensor, ...]
    tensors = (queries, keys, targets, query_ids, key_ids, mask)
    if chosen(implementation, *tensors) == "reference":
        excluded = Excluded(query_ids, key_ids, mask, found_targets, keeps)
        with without_autocast(queries):
            found = _reference(queries, keys, excluded, by_key)
    else:
        dtype = compute_dtype(queries)
        found = _pair_statistics(
            queries.to(dtype), keys.to(dtype), found_targets, query_ids, key_ids, mask, keeps,
            by_key, workspace,
        )[:4]  # fmt: skip
    logps, normalizer, key_logps, key_normalizer = found
    if not by_key:
        return PairStats(logps, normalizer, None, None)
    return PairStats(logps, normalizer, key_logps, key_normalizer)

r"""Contrastive losses with explicit negatives, and what they leave in an embedding.

One value per query, unreduced. Vectors are compared by their cosine unless ``similarity="dot"``
says otherwise, and the similarity is divided by a temperature, a number or a scalar tensor that
is learned. Losses whose negatives are the other examples of the batch are in
`lmlosses.losses.in_batch`.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from lmlosses._checks import (
    check_bool,
    check_floating,
    check_min_ndim,
    check_ndim,
    check_non_negative,
    check_not_empty_axis,
    check_positive,
    check_same_device,
    check_same_shape,
    check_shape,
    check_whole,
    compute_dtype,
)
from lmlosses.logprobs import pair_stats
from lmlosses.logprobs._autograd import without_autocast
from lmlosses.losses._similarity import (
    Similarity,
    check_similarity,
    check_temperature,
    lengths,
    over_temperature,
    prepared,
    unit_vectors,
)

Distance = Literal["euclidean", "squared", "cosine"]


def _check_negatives(negatives: Tensor, queries: Tensor) -> None:
    check_floating(negatives=negatives)
    check_same_device(of="queries", reference=queries, negatives=negatives)
    dim, batch = queries.shape[-1], tuple(queries.shape[:-1])
    shared = negatives.ndim == 2 and negatives.shape[1] == dim
    own = negatives.ndim == queries.ndim + 1 and (
        tuple(negatives.shape[:-2]) == batch and negatives.shape[-1] == dim
    )
    if not (shared or own):
        each = ", ".join(map(str, (*batch, "count", dim)))
        raise ValueError(
            f"negatives must have shape (count, {dim}), shared by all queries, or ({each}), "
            f"some for each; got {tuple(negatives.shape)}"
        )


def _log_sum_of_allowed(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Log-sum-exp over the last axis; ``-inf`` with gradient zero where nothing is allowed."""
    if scores.shape[-1] == 0:
        return scores.sum(dim=-1) - math.inf
    if mask is None:
        return scores.logsumexp(dim=-1)
    nothing = ~mask.any(dim=-1)
    allowed = mask | nothing.unsqueeze(-1)
    return (
        scores.masked_fill(~allowed, -math.inf).logsumexp(dim=-1).masked_fill(nothing, -math.inf)
    )


def info_nce(
    queries: Float[Tensor, "*batch dim"],
    positives: Float[Tensor, "*batch dim"],
    negatives: Float[Tensor, "*negatives count dim"],
    *,
    temperature: float | Float[Tensor, ""] = 0.07,
    mask: Bool[Tensor, "*batch count"] | None = None,
    similarity: Similarity = "cosine",
) -> Float[Tensor, "*batch"]:
    r"""Surprise at the positive among a query's negatives, in nats.

    .. math:: \ell = -\log \frac{e^{s^+ / \tau}}{e^{s^+ / \tau} + \sum_{j=1}^{K} e^{s_j / \tau}}

    the cross-entropy of a classifier with :math:`K + 1` classes whose scores are similarities.
    Where all similarities are equal it is :math:`\log(K + 1)`. Negatives that all queries share,
    such as a queue, are scored in tiles: memory grows with queries and negatives, not with their
    product.

    Args:
        queries: Vectors to compare from. Half precision is computed in float32.
        positives: The vector that belongs to each query.
        negatives: Vectors that do not, either ``[count, dim]``, shared by all queries, or
            ``[*batch, count, dim]``, some for each. None at all (a count of 0) gives the loss 0.
        temperature: Divides the similarities, a positive number or a scalar tensor.
        mask: True where a negative counts; all do without it. A false negative is left out here,
            and so is padding: a vector that counts for no query may be anything, even NaN.
        similarity: ``"cosine"`` or ``"dot"``.

    Returns:
        One loss per query.

    Raises:
        TypeError: If a tensor has the wrong kind of dtype.
        ValueError: If shapes disagree, the temperature is not positive, or (read on the CPU) a
            vector is not finite, or is zero where cosines are asked for.
        RuntimeError: When a second derivative is taken outside of ``torch.func``, through shared
            negatives.

    Example:
        >>> import torch
        >>> from lmlosses.losses import info_nce
        >>> query, positive = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0]])
        >>> info_nce(query, positive, torch.tensor([[0.0, 1.0]]), temperature=1.0)
        tensor([0.3133])

    References:
        van den Oord, Li and Vinyals (2018), Representation learning with contrastive predictive
        coding, arXiv:1807.03748, equation (4). Book equation (4.4.1).
    """
    check_floating(queries=queries, positives=positives)
    check_min_ndim("queries", queries, 1)
    check_same_shape("positives", positives, of="queries", reference=queries)
    check_same_device(of="queries", reference=queries, positives=positives)
    _check_negatives(negatives, queries)
    check_temperature(temperature, queries)
    check_similarity(similarity)
    batch, count = queries.shape[:-1], negatives.shape[-2]
    own = negatives.ndim == queries.ndim + 1
    if mask is not None:
        check_bool(mask=mask)
        check_shape("mask", mask, (*batch, count), meaning="one entry per query and negative")
        check_same_device(of="queries", reference=queries, mask=mask)
        used = mask if own else mask.reshape(-1, count).any(dim=0)
        negatives = negatives.masked_fill(~used.unsqueeze(-1), 1.0)
    dtype = compute_dtype(queries, positives, negatives)
    query, positive, negative = (
        prepared(name, vectors.to(dtype), similarity)
        for name, vectors in (
            ("queries", queries), ("positives", positives), ("negatives", negatives)
        )
    )  # fmt: skip
    query = over_temperature(query, temperature)
    if own or count == 0:
        with without_autocast(query):
            scores = (negative.expand(*batch, count, -1) @ query.unsqueeze(-1)).squeeze(-1)
        others = _log_sum_of_allowed(scores, mask)
    else:
        flat = query.reshape(-1, query.shape[-1])
        flat_mask = None if mask is None else mask.reshape(-1, count)
        others = pair_stats(flat, negative, mask=flat_mask).log_normalizer.reshape(batch)
    # subtracted from 0, since the negative of 0 would be shown as -0
    return 0.0 - F.logsigmoid((query * positive).sum(dim=-1) - others)


def triplet_loss(
    anchors: Float[Tensor, "*batch dim"],
    positives: Float[Tensor, "*batch dim"],
    negatives: Float[Tensor, "*batch dim"],
    *,
    margin: float = 1.0,
    distance: Distance = "euclidean",
) -> Float[Tensor, "*batch"]:
    r"""By how much a positive is not nearer than a negative, plus a margin.

    .. math:: \ell = \max(0, d(a, p) - d(a, n) + m)

    In the unit of the distance. Zero, with gradient zero, once the negative is farther by the
    margin; where two vectors coincide the gradient of their distance is zero. Vectors are taken
    as they come: FaceNet's have length 1.

    Args:
        anchors: Vectors to compare from. Half precision is computed in float32.
        positives: The vector that belongs to each anchor.
        negatives: A vector that does not.
        margin: Wanted difference of the distances, not negative.
        distance: ``"euclidean"`` as in torch, ``"squared"`` as in FaceNet, or ``"cosine"``, one
            less the cosine.

    Returns:
        One loss per anchor.

    Raises:
        TypeError: If a tensor has the wrong kind of dtype.
        ValueError: If shapes disagree, the margin is negative, the distance is unknown, or (read
            on the CPU, for cosines) a vector is zero or not finite.

    Example:
        >>> import torch
        >>> from lmlosses.losses import triplet_loss
        >>> anchor, near, far = torch.tensor([[[0.0]], [[0.5]], [[1.0]]])
        >>> triplet_loss(anchor, near, far)
        tensor([0.5000])

    References:
        Schroff, Kalenichenko and Philbin (2015), FaceNet, arXiv:1503.03832, section 3.1.
    """
    check_floating(anchors=anchors, positives=positives, negatives=negatives)
    check_not_empty_axis("anchors", anchors)
    check_same_shape("positives", positives, of="anchors", reference=anchors)
    check_same_shape("negatives", negatives, of="anchors", reference=anchors)
    check_same_device(of="anchors", reference=anchors, positives=positives, negatives=negatives)
    check_non_negative(margin=margin)
    if distance not in ("euclidean", "squared", "cosine"):
        raise ValueError(f"distance must be 'euclidean', 'squared' or 'cosine'; got {distance!r}")
    dtype = compute_dtype(anchors, positives, negatives)
    anchor, positive, negative = (
        unit_vectors(name, vectors.to(dtype)) if distance == "cosine" else vectors.to(dtype)
        for name, vectors in (
            ("anchors", anchors), ("positives", positives), ("negatives", negatives)
        )
    )  # fmt: skip

    def apart(other: Tensor) -> Tensor:
        if distance == "cosine":
            return 1 - (anchor * other).sum(dim=-1)
        if distance == "squared":
            return (anchor - other).square().sum(dim=-1)
        return lengths(anchor - other)

    return F.relu(apart(positive) - apart(negative) + margin)


def mutual_information_bound(
    losses: Float[Tensor, "*batch"], *, candidates: int
) -> Float[Tensor, "*batch"]:
    r"""What InfoNCE says of the mutual information of queries and keys, in nats.

    .. math:: I(q; k) \ge \log N - \mathbb{E}\, \ell

    Its mean is a lower bound in expectation, for any scores, if the negatives are drawn from the
    keys' own distribution; and it never exceeds :math:`\log N`, whatever the information is.

    Args:
        losses: Values of an InfoNCE loss.
        candidates: How many keys each query chose from, the positive included.

    Returns:
        One value per loss; take the mean.

    Raises:
        TypeError: If ``losses`` is not floating point or ``candidates`` not whole.
        ValueError: If there is no candidate.

    Example:
        >>> import torch
        >>> from lmlosses.losses import mutual_information_bound
        >>> mutual_information_bound(torch.zeros(1), candidates=8)
        tensor([2.0794])

    References:
        van den Oord, Li and Vinyals (2018), arXiv:1807.03748, section 2.3, whose appendix A.1
        approximates; proved by Poole et al. (2019), On variational bounds of mutual information,
        arXiv:1905.06922, section 2.3.
    """
    check_floating(losses=losses)
    check_whole(candidates=candidates)
    check_positive(candidates=candidates)
    return math.log(candidates) - losses.to(compute_dtype(losses))


def alignment(
    first: Float[Tensor, "*batch dim"], second: Float[Tensor, "*batch dim"], *, power: float = 2.0
) -> Float[Tensor, "*batch"]:
    r"""How far apart the two vectors of a pair are on the unit sphere.

    .. math:: \lVert x - y \rVert^\alpha

    0 for equal directions, with gradient zero, and :math:`2^\alpha` for opposite ones.

    Args:
        first: One vector of each pair; its direction counts. Half precision is computed in
            float32.
        second: The other.
        power: The exponent.

    Returns:
        One value per pair; their mean is the alignment.

    Raises:
        TypeError: If a tensor is not floating point.
        ValueError: If shapes disagree, the power is not positive, or (read on the CPU) a vector
            is zero or not finite.

    Example:
        >>> import torch
        >>> from lmlosses.losses import alignment
        >>> alignment(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 3.0]]))
        tensor([2.])

    References:
        Wang and Isola (2020), Understanding contrastive representation learning through alignment
        and uniformity on the hypersphere, arXiv:2005.10242, section 4.1.1.
    """
    check_floating(first=first, second=second)
    check_min_ndim("first", first, 1)
    check_same_shape("second", second, of="first", reference=first)
    check_same_device(of="first", reference=first, second=second)
    check_positive(power=power)
    dtype = compute_dtype(first, second)
    apart = unit_vectors("first", first.to(dtype)) - unit_vectors("second", second.to(dtype))
    if power == 2:
        return apart.square().sum(dim=-1)
    norms: Tensor = torch.linalg.vector_norm(apart, dim=-1)
    equal = norms == 0  # where a power below 1 has no derivative
    return norms.masked_fill(equal, 1.0).pow(power).masked_fill(equal, 0.0)


def uniformity(embeddings: Float[Tensor, "batch dim"], *, scale: float = 2.0) -> Float[Tensor, ""]:
    r"""How evenly vectors cover the unit sphere; the lower, the more evenly.

    .. math:: \log \frac{1}{B (B - 1)} \sum_{i \ne j} e^{-t \lVert x_i - x_j \rVert^2}

    0 if all directions are equal, and never below :math:`-4 t`, which two opposite vectors
    reach. Pairs are scored in tiles: memory grows with the batch, not with its square.

    Args:
        embeddings: At least two vectors; their directions count. Half precision is computed in
            float32.
        scale: The factor :math:`t` in the exponent.

    Returns:
        One number, the logarithm of a mean over pairs.

    Raises:
        TypeError: If ``embeddings`` is not floating point.
        ValueError: If there are fewer than two rows, the scale is not positive, or (read on the
            CPU) a vector is zero or not finite.
        RuntimeError: When a second derivative is taken outside of ``torch.func``.

    Example:
        >>> import torch
        >>> from lmlosses.losses import uniformity
        >>> uniformity(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
        tensor(-8.)

    References:
        Wang and Isola (2020), arXiv:2005.10242, section 4.1.2.
    """
    check_floating(embeddings=embeddings)
    check_ndim("embeddings", embeddings, 2)
    if len(embeddings) < 2:
        raise ValueError(f"embeddings must have at least 2 rows; got {len(embeddings)}")
    check_positive(scale=scale)
    vectors = unit_vectors("embeddings", embeddings)
    own = torch.arange(len(vectors), device=vectors.device)
    # the squared distance of unit vectors is 2 - 2 cos
    rows = pair_stats(2 * scale * vectors, vectors, query_ids=own, key_ids=own).log_normalizer
    return rows.logsumexp(dim=0) - 2 * scale - math.log(len(vectors) * (len(vectors) - 1))

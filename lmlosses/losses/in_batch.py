r"""Contrastive losses whose negatives are the other examples of the batch.

One value per example, unreduced. Vectors are compared by their cosine unless
``similarity="dot"`` says otherwise, and the similarity is divided by a temperature, a number or a
scalar tensor that is learned. The matrix of all similarities is never held: memory grows with the
batch, not with its square. Examples of equal ``ids`` are no negatives of each other. Where a
process group is given, candidates come from all its ranks.
"""

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from lmlosses._checks import (
    check_floating,
    check_integer,
    check_ndim,
    check_not_empty_axis,
    check_same_device,
    check_same_shape,
    check_shape,
    compute_dtype,
)
from lmlosses.logprobs import gather_rows, pair_log_sigmoid, pair_stats
from lmlosses.losses._similarity import (
    Similarity,
    check_similarity,
    check_temperature,
    over_temperature,
    prepared,
)
from lmlosses.reductions import Counted


def _pairs(
    names: tuple[str, str],
    first: Tensor,
    second: Tensor,
    temperature: float | Tensor,
    ids: Tensor | None,
    similarity: Similarity,
    negatives: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Both sides of a batch of pairs, checked, ready to be multiplied with each other and more.

    That one rank has no pairs is for `gather_rows` to refuse, on all ranks: the others would wait.
    """
    for name, vectors in zip(names, (first, second), strict=True):
        check_floating(**{name: vectors})
        check_ndim(name, vectors, 2)
        if group is None:
            check_not_empty_axis(name, vectors, 0)
    check_same_shape(names[1], second, of=names[0], reference=first)
    check_temperature(temperature, first)
    check_similarity(similarity)
    if ids is not None:
        check_integer(ids=ids)
        check_shape("ids", ids, (len(first),), meaning="one entry per pair")
    check_same_device(of=names[0], reference=first, **{names[1]: second, "ids": ids})
    dtype = compute_dtype(first, second, first if negatives is None else negatives)
    return (
        prepared(names[0], first.to(dtype), similarity),
        prepared(names[1], second.to(dtype), similarity),
    )


def _surprise(logps: Tensor) -> Tensor:
    """The negative, by a subtraction: the negative of 0 would be shown as -0."""
    return 0.0 - logps


def _everywhere(
    vectors: Tensor, ids: Tensor | None, group: dist.ProcessGroup | None, name: str
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The keys of all ranks with their ids, and which of them are this rank's."""
    # one dtype on all ranks, one that can be sent, and with numbers below 0
    ids = None if ids is None else ids.long()
    own = torch.arange(len(vectors), device=vectors.device)
    if group is None:
        return vectors, ids, own
    everyone = gather_rows(vectors, group, name=name)
    everyones = None if ids is None else gather_rows(ids, group, name="ids")
    return everyone, everyones, own + dist.get_rank(group) * len(vectors)


def _with_negatives(
    keys: Tensor, ids: Tensor | None, negatives: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Further candidates after the keys, with an id that is nobody's."""
    if ids is None:
        return torch.cat([keys, negatives]), None
    nobody = (ids.min() - 1).expand(len(negatives))
    return torch.cat([keys, negatives]), torch.cat([ids, nobody])


def _in_batch(
    names: tuple[str, str],
    queries: Tensor,
    keys: Tensor,
    negatives: Tensor | None,
    temperature: float | Tensor,
    symmetric: bool,
    ids: Tensor | None,
    mask: Tensor | None,
    similarity: Similarity,
    group: dist.ProcessGroup | None,
) -> Tensor:
    """What `in_batch_info_nce` computes, of two sides that errors call by these names."""
    if negatives is not None:
        check_floating(negatives=negatives)
    queries, keys = _pairs(names, queries, keys, temperature, ids, similarity, negatives, group)
    if group is not None and mask is not None:
        raise ValueError("mask must be None with a group of ranks (give ids instead); got one")
    if negatives is not None:
        check_ndim("negatives", negatives, 2)
        check_shape(
            "negatives",
            negatives,
            (len(negatives), keys.shape[1]),
            meaning=f"with the axis of {names[1]}",
        )
        check_same_device(of=names[0], reference=queries, negatives=negatives)
        negatives = prepared("negatives", negatives.to(keys.dtype), similarity)
    scored = over_temperature(queries, temperature)
    if group is None and negatives is None:
        own = torch.arange(len(queries), device=queries.device)
        stats = pair_stats(
            scored, keys, own, by_key=symmetric, query_ids=ids, key_ids=ids, mask=mask
        )
        if stats.key_logps is None:
            return _surprise(stats.logps)
        return _surprise((stats.logps + stats.key_logps) / 2)
    candidates, candidate_ids, own = _everywhere(keys, ids, group, names[1])
    if negatives is not None:
        further = _everywhere(negatives, None, group, "negatives")[0]
        candidates, candidate_ids = _with_negatives(candidates, candidate_ids, further)
    logps = pair_stats(
        scored, candidates, own, query_ids=ids, key_ids=candidate_ids, mask=mask
    ).logps
    if not symmetric:
        return _surprise(logps)
    candidates, candidate_ids, own = _everywhere(scored, ids, group, names[0])
    turned = None if mask is None else mask[:, : len(keys)].t()
    key_logps = pair_stats(
        keys, candidates, own, query_ids=ids, key_ids=candidate_ids, mask=turned
    ).logps
    return _surprise((logps + key_logps) / 2)


def in_batch_info_nce(
    queries: Float[Tensor, "batch dim"],
    keys: Float[Tensor, "batch dim"],
    negatives: Float[Tensor, "count dim"] | None = None,
    *,
    temperature: float | Float[Tensor, ""] = 0.07,
    symmetric: bool = False,
    ids: Integer[Tensor, " batch"] | None = None,
    mask: Bool[Tensor, "batch candidates"] | None = None,
    similarity: Similarity = "cosine",
    group: dist.ProcessGroup | None = None,
) -> Float[Tensor, " batch"]:
    r"""Surprise at a query's own key among the keys of the batch, in nats.

    .. math:: \ell_i = -\log \frac{e^{s_{ii} / \tau}}{\sum_j e^{s_{ij} / \tau}}

    and, where it is symmetric, the mean of that and of the surprise at a key's own query among
    the queries, for two sides from one pass over the similarities. Where all are equal it is
    :math:`\log B`; a batch of one pair gives 0.

    Args:
        queries: One vector per pair. Half precision is computed in float32.
        keys: The vector that belongs to each query; candidates of all others.
        negatives: Further candidates of all queries, such as hard negatives. Keys choose among
            queries alone.
        temperature: Divides the similarities, a positive number or a scalar tensor.
        symmetric: Whether keys choose among queries as well.
        ids: Pairs of equal ids are no negatives of each other: false negatives, or the same
            example twice.
        mask: True where a candidate counts, one column per key and then per negative. It is as
            large as the similarities. The own key always counts.
        similarity: ``"cosine"`` or ``"dot"``.
        group: Ranks whose keys and negatives are candidates too; each has as many of them. The
            values are of this rank's pairs. The mean over ranks of the gradients, which
            ``DistributedDataParallel`` takes, is that of one process with all pairs.

    Returns:
        One loss per pair.

    Raises:
        TypeError: If a tensor has the wrong kind of dtype.
        ValueError: If shapes disagree, on one rank or between ranks, there is no pair, the
            temperature is not positive, a mask is given with several ranks, or (read on the CPU)
            a vector is not finite, or is zero where cosines are asked for.
        RuntimeError: When a second derivative is taken outside of ``torch.func``.

    Example:
        >>> import torch
        >>> from lmlosses.losses import in_batch_info_nce
        >>> in_batch_info_nce(torch.eye(2), torch.eye(2), temperature=1.0)
        tensor([0.3133, 0.3133])

    References:
        Negatives from the batch: Sohn (2016), Improved deep metric learning with multi-class
        N-pair loss objective, NeurIPS, section 3.2. Book equation (4.4.25).
    """
    return _in_batch(
        ("queries", "keys"), queries, keys, negatives,
        temperature, symmetric, ids, mask, similarity, group,
    )  # fmt: skip


def clip_loss(
    images: Float[Tensor, "batch dim"],
    texts: Float[Tensor, "batch dim"],
    *,
    temperature: float | Float[Tensor, ""] = 0.07,
    ids: Integer[Tensor, " batch"] | None = None,
    group: dist.ProcessGroup | None = None,
) -> Float[Tensor, " batch"]:
    r"""Surprise of images and texts at each other's partner in the batch, in nats.

    .. math:: \ell_i = -\frac{1}{2} \left( \log \frac{e^{s_{ii} / \tau}}{\sum_j e^{s_{ij} / \tau}}
        + \log \frac{e^{s_{ii} / \tau}}{\sum_j e^{s_{ji} / \tau}} \right)

    The symmetric `in_batch_info_nce` of cosines, under the name that it is known by.

    Args:
        images: One vector per pair. Half precision is computed in float32.
        texts: The other side of each pair.
        temperature: Divides the cosines; CLIP learns it, see `lmlosses.nn.LearnedTemperature`.
        ids: Pairs of equal ids are no negatives of each other.
        group: Ranks whose pairs are negatives too, as in `in_batch_info_nce`.

    Returns:
        One loss per pair.

    Raises:
        TypeError: As `in_batch_info_nce`.
        ValueError: As `in_batch_info_nce`.
        RuntimeError: As `in_batch_info_nce`.

    Example:
        >>> import torch
        >>> from lmlosses.losses import clip_loss
        >>> clip_loss(torch.eye(2), torch.eye(2), temperature=1.0)
        tensor([0.3133, 0.3133])

    References:
        Radford et al. (2021), Learning transferable visual models from natural language
        supervision, arXiv:2103.00020, figure 3. Book equation (4.4.26).
    """
    return _in_batch(
        ("images", "texts"), images, texts, None, temperature, True, ids, None, "cosine", group
    )


def nt_xent(
    first: Float[Tensor, "batch dim"],
    second: Float[Tensor, "batch dim"],
    *,
    temperature: float | Float[Tensor, ""] = 0.5,
    ids: Integer[Tensor, " batch"] | None = None,
    similarity: Similarity = "cosine",
) -> Float[Tensor, "views batch"]:
    r"""Surprise at the other view of an example among all other views of the batch, in nats.

    .. math:: \ell_i = -\log \frac{e^{s_{i, p(i)} / \tau}}{\sum_{j \ne i} e^{s_{ij} / \tau}}

    over the :math:`2 B` views, :math:`p(i)` being the other view of the same example. Where all
    similarities are equal it is :math:`\log(2 B - 1)`; a batch of one example gives 0.

    Args:
        first: One view of each example. Half precision is computed in float32.
        second: Another.
        temperature: Divides the similarities, a positive number or a scalar tensor.
        ids: Examples of equal ids are no negatives of each other.
        similarity: ``"cosine"`` or ``"dot"``.

    Returns:
        One loss per view, ``[2, batch]``; SimCLR takes their mean.

    Raises:
        TypeError: If a tensor has the wrong kind of dtype.
        ValueError: If shapes disagree, there is no example, the temperature is not positive, or
            (read on the CPU) a vector is not finite, or is zero where cosines are asked for.
        RuntimeError: When a second derivative is taken outside of ``torch.func``.

    Example:
        >>> import torch
        >>> from lmlosses.losses import nt_xent
        >>> nt_xent(torch.eye(2), torch.eye(2), temperature=1.0)
        tensor([[0.5514, 0.5514],
                [0.5514, 0.5514]])

    References:
        Chen et al. (2020), A simple framework for contrastive learning of visual representations,
        arXiv:2002.05709, equation (1).
    """
    first, second = _pairs(("first", "second"), first, second, temperature, ids, similarity)
    batch, views = len(first), torch.cat([first, second])
    own = torch.arange(2 * batch, device=views.device)
    groups = own if ids is None else ids.repeat(2)
    logps = pair_stats(
        over_temperature(views, temperature), views, own.roll(batch),
        query_ids=groups, key_ids=groups,
    ).logps  # fmt: skip
    return _surprise(logps).view(2, batch)


def siglip_loss(
    images: Float[Tensor, "batch dim"],
    texts: Float[Tensor, "batch dim"],
    *,
    temperature: float | Float[Tensor, ""] = 0.1,
    bias: float | Float[Tensor, ""] = -10.0,
    ids: Integer[Tensor, " batch"] | None = None,
    group: dist.ProcessGroup | None = None,
) -> Float[Tensor, " batch"]:
    r"""Surprise of an image at which texts of the batch are its own, asked one by one, in nats.

    .. math:: \ell_i = -\sum_j \log \sigma\left(y_{ij} (s_{ij} / \tau + b)\right) , \qquad
        y_{ij} = \begin{cases} 1 & i = j \\ -1 & \text{otherwise} \end{cases}

    A binary classification of each pair, without a normalizer that ties them together. The mean
    over images is the loss of the paper.

    Args:
        images: One vector per pair. Half precision is computed in float32.
        texts: The other side of each pair.
        temperature: Divides the cosines. The paper multiplies by :math:`t = 1 / \tau`, learned
            as :math:`e^{t'}` from 10 on.
        bias: Added to each; the paper learns it from -10 on, because most pairs are negative.
        ids: Pairs of equal ids are no negatives of each other.
        group: Ranks whose texts are candidates too, as in `in_batch_info_nce`.

    Returns:
        One loss per image.

    Raises:
        TypeError: If a tensor has the wrong kind of dtype.
        ValueError: If shapes disagree, on one rank or between ranks, there is no pair, the
            temperature is not positive, or (read on the CPU) a vector is zero or not finite.
        RuntimeError: When a second derivative is taken outside of ``torch.func``.

    Example:
        >>> import torch
        >>> from lmlosses.losses import siglip_loss
        >>> siglip_loss(torch.eye(2), torch.eye(2), temperature=1.0, bias=0.0)
        tensor([1.0064, 1.0064])

    References:
        Zhai et al. (2023), Sigmoid loss for language image pre-training, arXiv:2303.15343,
        algorithm 1. Book equation (4.4.27).
    """
    images, texts = _pairs(
        ("images", "texts"), images, texts, temperature, ids, "cosine", group=group
    )
    candidates, candidate_ids, own = _everywhere(texts, ids, group, "texts")
    scored = over_temperature(images, temperature)
    return _surprise(
        pair_log_sigmoid(scored, candidates, own, bias=bias, query_ids=ids, key_ids=candidate_ids)
    )


def supervised_contrastive(
    embeddings: Float[Tensor, "batch dim"],
    labels: Integer[Tensor, " batch"],
    *,
    temperature: float | Float[Tensor, ""] = 0.1,
    similarity: Similarity = "cosine",
) -> Counted:
    r"""Mean surprise at the examples of the same label among all other examples, in nats.

    .. math:: \ell_i = -\frac{1}{|P_i|} \sum_{p \in P_i}
        \log \frac{e^{s_{ip} / \tau}}{\sum_{j \ne i} e^{s_{ij} / \tau}} , \qquad
        P_i = \{p \ne i : y_p = y_i\}

    With two examples of each label it is `nt_xent`. It cannot reach 0 with more: the
    :math:`|P_i|` positives share the probability, which leaves :math:`\log |P_i|`.

    Args:
        embeddings: One vector per example. Half precision is computed in float32.
        labels: The class of each, any whole numbers.
        temperature: Divides the similarities, a positive number or a scalar tensor.
        similarity: ``"cosine"`` or ``"dot"``.

    Returns:
        One loss per example, and which of them count: an example that is alone with its label
        has no positive and does not.

    Raises:
        TypeError: If a tensor has the wrong kind of dtype.
        ValueError: If shapes disagree, there is no example, the temperature is not positive, or
            (read on the CPU) a vector is not finite, or is zero where cosines are asked for.
        RuntimeError: When a second derivative is taken outside of ``torch.func``.

    Example:
        >>> import torch
        >>> from lmlosses import token_mean
        >>> from lmlosses.losses import supervised_contrastive
        >>> embeddings, labels = torch.eye(3), torch.tensor([0, 0, 1])
        >>> token_mean(*supervised_contrastive(embeddings, labels))
        tensor(0.6931)

    References:
        Khosla et al. (2020), Supervised contrastive learning, arXiv:2004.11362, equation (2),
        the mean outside the logarithm.
    """
    check_floating(embeddings=embeddings)
    check_ndim("embeddings", embeddings, 2)
    check_not_empty_axis("embeddings", embeddings, 0)
    check_integer(labels=labels)
    check_shape("labels", labels, (len(embeddings),), meaning="one entry per example")
    check_same_device(of="embeddings", reference=embeddings, labels=labels)
    check_temperature(temperature, embeddings)
    check_similarity(similarity)
    vectors = prepared("embeddings", embeddings, similarity)
    scored = over_temperature(vectors, temperature)
    own = torch.arange(len(vectors), device=vectors.device)
    normalizer = pair_stats(scored, vectors, query_ids=own, key_ids=own).log_normalizer
    # the sum over positives is one product with the sum of their vectors
    place, counts = _classes(labels)
    # less its own, which may be far longer than theirs: hence double
    exact = vectors.double()
    totals = torch.zeros_like(exact).index_add(0, place, exact)
    theirs = (totals[place] - exact).to(vectors.dtype)
    positives = (scored * theirs).sum(dim=-1)
    others = counts[place] - 1
    mask = others > 0
    mean = positives / others.clamp(min=1).to(vectors.dtype)
    return Counted(torch.where(mask, normalizer - mean, 0.0), mask)


def _classes(labels: Tensor) -> tuple[Tensor, Tensor]:
    """A small index for each label, and how many examples each index has; nothing waits."""
    order = labels.long().argsort()
    ordered = labels.long()[order]
    new = torch.ones_like(ordered)
    new[1:] = (ordered[1:] != ordered[:-1]).to(new.dtype)
    place = torch.empty_like(order).scatter(0, order, new.cumsum(0).long() - 1)
    counts = torch.zeros_like(order).index_add(0, place, torch.ones_like(order))
    return place, counts

"""Losses of an order: they compare scores with each other, never with a number."""

import math

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lmlosses._checks import (
    check_floating,
    check_ndim,
    check_non_negative,
    check_not_empty_axis,
    check_same_shape,
    compute_dtype,
    reads_values,
)


def pairwise_auc(
    positive_scores: Float[Tensor, " positives"], negative_scores: Float[Tensor, " negatives"]
) -> Float[Tensor, "positives negatives"]:
    r"""Smooth cost of each pair of a positive and a negative sample, in nats.

    With :math:`s^+` the score of the positive and :math:`s^-` that of the negative sample,

    .. math:: L_{ij} = \log\bigl(1 + \exp(-(s^+_i - s^-_j))\bigr) .

    The area under the ROC curve is the share of pairs in the right order. Divided by
    :math:`\log 2` this loss is at least 1 for every pair in the wrong order, so its mean over
    :math:`\log 2` bounds one minus that area from above. A tied pair costs :math:`\log 2`.

    Args:
        positive_scores: Scores of the positive samples. Half precision is computed in float32.
        negative_scores: Scores of the negative samples.

    Returns:
        One loss per pair, unreduced, in at least float32.

    Raises:
        TypeError: If an argument is not a floating-point tensor.
        ValueError: If an argument does not have one axis.

    Example:
        >>> import torch
        >>> from lmlosses.losses import pairwise_auc
        >>> pairwise_auc(torch.tensor([1.0, 0.0]), torch.tensor([0.0]))
        tensor([[0.3133],
                [0.6931]])

    References:
        Burges et al. (2005), Learning to rank using gradient descent, ICML, section 3, with
        every positive sample preferred to every negative one.
    """
    check_floating(positive_scores=positive_scores, negative_scores=negative_scores)
    check_ndim("positive_scores", positive_scores, 1)
    check_ndim("negative_scores", negative_scores, 1)
    dtype = compute_dtype(positive_scores, negative_scores)
    leads = positive_scores.to(dtype).unsqueeze(1) - negative_scores.to(dtype).unsqueeze(0)
    return -F.logsigmoid(leads)


def margin_ranking(
    first: Float[Tensor, "*batch"],
    second: Float[Tensor, "*batch"],
    targets: Float[Tensor, "*batch"],
    *,
    margin: float = 0.0,
) -> Float[Tensor, "*batch"]:
    r"""How far the better of two scores falls short of leading by a margin.

    With the target :math:`t = 1` where the first should be higher and :math:`t = -1` where the
    second should,

    .. math:: L = \max\bigl(0,\; m - t (s_1 - s_2)\bigr) .

    At a margin of 0 a pair in the right order costs nothing, however close.

    Args:
        first: Scores of the first of each pair. Half precision is computed in float32.
        second: Scores of the second of each pair.
        targets: 1 or -1, floating point.
        margin: The lead :math:`m` that is wanted, at least 0, in the unit of the scores.

    Returns:
        One loss per pair, unreduced, in at least float32.

    Raises:
        TypeError: If a tensor is not floating point or ``margin`` not a number.
        ValueError: If the shapes differ, ``margin`` is negative, or (read on the CPU) a target
            is neither 1 nor -1.

    Example:
        >>> import torch
        >>> from lmlosses.losses import margin_ranking
        >>> first, second = torch.tensor([2.0, 2.0]), torch.tensor([1.5, 1.5])
        >>> margin_ranking(first, second, torch.tensor([1.0, -1.0]), margin=1.0)
        tensor([0.5000, 1.5000])
    """
    check_floating(first=first, second=second, targets=targets)
    check_same_shape("second", second, of="first", reference=first)
    check_same_shape("targets", targets, of="first", reference=first)
    check_non_negative(margin=margin)
    if reads_values(targets):
        wrong = targets.detach()[targets.detach().abs() != 1]
        if wrong.numel() > 0:
            raise ValueError(f"targets must be 1 or -1; got {wrong[0].item():.3g}")
    dtype = compute_dtype(first, second, targets)
    leads = targets.to(dtype) * (first.to(dtype) - second.to(dtype))
    return (margin - leads).clamp(min=0.0)


def listnet(
    scores: Float[Tensor, "*batch items"], relevances: Float[Tensor, "*batch items"]
) -> Float[Tensor, "*batch"]:
    r"""Cross-entropy between which item should and which would come first, in nats.

    The probability that an item is ranked first is the softmax over its list, of the relevances
    :math:`r` for the truth and of the scores :math:`s` for the model:

    .. math:: L = -\sum_i \operatorname{softmax}(r)_i \log \operatorname{softmax}(s)_i

    The least it can be is the entropy of the truth, where scores and relevances differ by a
    constant; equal scores in a list of :math:`n` cost :math:`\log n`.

    Args:
        scores: What the model gives each item. Half precision is computed in float32. Pad a
            short list with ``-inf`` in both arguments.
        relevances: What each item is worth, on a logarithmic scale: an item worth 1 more is
            :math:`e` times as likely to come first.

    Returns:
        One loss per list, unreduced, in at least float32.

    Raises:
        TypeError: If an argument is not a floating-point tensor.
        ValueError: If the shapes differ or a list has no item.

    Example:
        >>> import torch
        >>> from lmlosses.losses import listnet
        >>> listnet(torch.zeros(4), torch.tensor([3.0, 2.0, 0.0, 0.0]))
        tensor(1.3863)

    References:
        Cao et al. (2007), Learning to rank: from pairwise approach to listwise approach, ICML,
        sections 4.2 and 5.
    """
    check_floating(scores=scores, relevances=relevances)
    check_not_empty_axis("scores", scores)
    check_same_shape("relevances", relevances, of="scores", reference=scores)
    dtype = compute_dtype(scores, relevances)
    truth = relevances.to(dtype).softmax(dim=-1)
    logps = scores.to(dtype).log_softmax(dim=-1)
    return -(truth * logps.masked_fill((truth == 0) & (logps == -math.inf), 0.0)).sum(dim=-1)

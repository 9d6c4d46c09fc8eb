"""How good a classifier is, as people ask it: how often right, how well ranked, how honest.

These are measurements, not losses: they return one number for a whole batch, and none of them
is meant to be differentiated.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Real
from torch import Tensor

from lmlosses._checks import (
    check_floating,
    check_indices,
    check_leading_shape,
    check_ndim,
    check_not_empty_axis,
    check_positive,
    check_probabilities,
    check_same_shape,
    check_tensor,
    check_whole,
    compute_dtype,
    reads_values,
)
from lmlosses.reductions import token_mean


def accuracy(
    scores: Float[Tensor, "*batch classes"], targets: Int[Tensor, "*batch"]
) -> Float[Tensor, ""]:
    r"""Share of samples whose highest score is the target's, between 0 and 1.

    .. math:: A = \frac{1}{N} \sum_n \mathbb{1}\{\arg\max_c s_{nc} = y_n\}

    One minus the mean zero-one loss. A tie goes to the first of the highest classes.

    Args:
        scores: Logits, log-probabilities or probabilities: only their order counts.
        targets: Index of the correct class.

    Returns:
        The share, in at least float32; 0 for an empty batch.

    Raises:
        TypeError: If ``scores`` is not floating point or ``targets`` not integer.
        ValueError: If the shapes disagree, there are no classes or a target is out of range.

    Example:
        >>> import torch
        >>> from lmlosses.metrics import accuracy
        >>> scores = torch.tensor([[2.0, 1.0], [0.0, 3.0], [5.0, 4.0], [1.0, 0.0]])
        >>> accuracy(scores, torch.tensor([0, 1, 1, 0]))
        tensor(0.7500)
    """
    check_floating(scores=scores)
    check_not_empty_axis("scores", scores)
    check_leading_shape("targets", targets, of="scores", reference=scores)
    check_indices("targets", targets, scores.shape[-1], of="the number of classes")
    correct = scores.argmax(dim=-1) == targets
    return token_mean(correct.to(compute_dtype(scores)))


def _check_binary(targets: Tensor) -> None:
    """Refuse labels other than 0 and 1, and batches where one of the two is missing."""
    if not reads_values(targets):
        return
    ones, zeros = int((targets == 1).sum()), int((targets == 0).sum())
    if ones + zeros != targets.numel():
        raise ValueError("targets must be 0 or 1 everywhere; got other values")
    if not ones or not zeros:
        raise ValueError(
            "targets must contain both classes, since AUC compares positives with negatives; "
            f"got {ones} positives and {zeros} negatives"
        )


def auc(
    scores: Float[Tensor, "samples"],
    targets: Real[Tensor, "samples"] | Bool[Tensor, "samples"],
) -> Float[Tensor, ""]:
    r"""Probability that a positive sample scores above a negative one; a tie counts half.

    With :math:`P` positives and :math:`N` negatives,

    .. math:: \mathrm{AUC} = \frac{1}{PN} \sum_{i \in +} \sum_{j \in -}
        \left( \mathbb{1}\{s_i > s_j\} + \tfrac{1}{2} \mathbb{1}\{s_i = s_j\} \right)

    This is the area under the ROC curve. It is counted exactly, in integers, from the ranks
    (Mann-Whitney), without forming the pairs. Scores that say nothing give 1/2.

    Args:
        scores: Anything that should be higher for positives. Infinite scores may tie.
        targets: 1 for positives, 0 for negatives, of any dtype.

    Returns:
        The probability, in at least float32. With one class only the question has no answer:
        an error on the CPU, NaN on other devices, where values are not read.

    Raises:
        TypeError: If ``scores`` is not floating point or ``targets`` not a tensor.
        ValueError: If the shapes disagree or are not one-dimensional, a score is NaN, or the
            targets are not 0 and 1 with both present.

    Example:
        >>> import torch
        >>> from lmlosses.metrics import auc
        >>> auc(torch.tensor([0.9, 0.4, 0.4, 0.1]), torch.tensor([1, 1, 0, 0]))
        tensor(0.8750)

    References:
        Hanley and McNeil (1982), The meaning and use of the area under a ROC curve.
    """
    check_floating(scores=scores)
    check_tensor(targets=targets)
    check_ndim("scores", scores, 1)
    check_same_shape("targets", targets, of="scores", reference=scores)
    if reads_values(scores) and bool(scores.isnan().any()):
        raise ValueError("scores must not be NaN; got NaN")
    _check_binary(targets)

    positive = targets == 1
    scores = scores.contiguous()  # searchsorted warns about anything else
    ordered = scores.sort().values
    below = torch.searchsorted(ordered, scores)
    not_above = torch.searchsorted(ordered, scores, right=True)
    # twice the rank, ties sharing the middle one: whole numbers, so the count is exact
    twice_rank_sum = (below + not_above + 1).masked_fill(~positive, 0).sum()
    positives, negatives = positive.sum(), (~positive).sum()
    twice_wins = twice_rank_sum - positives * (positives + 1)
    dtype = compute_dtype(scores)
    return twice_wins.to(dtype) / (2 * positives * negatives).to(dtype)


class ReliabilityCurve(NamedTuple):
    """Per bin of confidence: its mean, the share that was right, the share of samples in it."""

    confidence: Float[Tensor, "bins"]
    accuracy: Float[Tensor, "bins"]
    weight: Float[Tensor, "bins"]


def reliability_curve(
    probabilities: Float[Tensor, "*batch classes"],
    targets: Int[Tensor, "*batch"],
    *,
    bins: int = 15,
) -> ReliabilityCurve:
    r"""How often a model is right when it says it is, say, 80 % sure.

    Samples are sorted into bins of equal width by the probability of their top class; bin
    :math:`b` of :math:`B` holds confidences in :math:`(b/B, (b+1)/B]`.

    .. math:: \mathrm{conf}(b) = \frac{1}{n_b} \sum_{n \in b} \max_c p_{nc} , \quad
        \mathrm{acc}(b) = \frac{1}{n_b} \sum_{n \in b}
        \mathbb{1}\{\arg\max_c p_{nc} = y_n\} , \quad
        w_b = \frac{n_b}{\sum_{b'} n_{b'}}

    A calibrated model has :math:`\mathrm{acc}(b) = \mathrm{conf}(b)`, up to chance.

    Args:
        probabilities: Predicted probabilities, not logits.
        targets: Index of the correct class.
        bins: Number of bins :math:`B` on (0, 1].

    Returns:
        Three tensors, one entry per bin, in at least float32. An empty bin has zeros.

    Raises:
        TypeError: If ``probabilities`` is not floating point or ``targets`` not integer.
        ValueError: If the shapes disagree, there are no classes, a target is out of range,
            ``bins`` is not positive or the probabilities do not sum to one.

    Example:
        >>> import torch
        >>> from lmlosses.metrics import reliability_curve
        >>> probabilities = torch.tensor([[0.75, 0.25], [0.25, 0.75], [0.75, 0.25], [1.0, 0.0]])
        >>> curve = reliability_curve(probabilities, torch.tensor([0, 1, 1, 0]), bins=2)
        >>> curve.confidence
        tensor([0.0000, 0.8125])
        >>> curve.accuracy
        tensor([0.0000, 0.7500])

    References:
        Guo et al. (2017), On Calibration of Modern Neural Networks, arXiv:1706.04599,
        section 2.
    """
    check_floating(probabilities=probabilities)
    check_not_empty_axis("probabilities", probabilities)
    check_probabilities("probabilities", probabilities)
    check_leading_shape("targets", targets, of="probabilities", reference=probabilities)
    check_indices("targets", targets, probabilities.shape[-1], of="the number of classes")
    check_whole(bins=bins)
    check_positive(bins=bins)

    confidence, prediction = probabilities.to(compute_dtype(probabilities)).max(dim=-1)
    confidence, correct = confidence.flatten(), (prediction == targets).flatten()
    # the edges k / bins are rounded once, so that a confidence of exactly k / bins stays below
    inner_edges = torch.arange(1, bins, device=confidence.device).to(confidence.dtype) / bins
    bin_of_sample = torch.bucketize(confidence, inner_edges)

    def total_per_bin(values: Tensor) -> Tensor:
        return values.new_zeros(bins).index_add(0, bin_of_sample, values)

    counts = total_per_bin(torch.ones_like(confidence))
    filled = counts.clamp(min=1)
    return ReliabilityCurve(
        confidence=total_per_bin(confidence) / filled,
        accuracy=total_per_bin(correct.to(confidence.dtype)) / filled,
        weight=counts / max(confidence.numel(), 1),
    )


def expected_calibration_error(
    probabilities: Float[Tensor, "*batch classes"],
    targets: Int[Tensor, "*batch"],
    *,
    bins: int = 15,
) -> Float[Tensor, ""]:
    r"""Mean gap between how sure a model is of its top class and how often it is right.

    .. math:: \mathrm{ECE} = \sum_b w_b \, |\mathrm{acc}(b) - \mathrm{conf}(b)|

    with the bins of `reliability_curve`. Between 0 and 1, and an estimate that chance biases
    upwards: with few samples a bin, a perfectly calibrated model does not score 0.

    Args:
        probabilities: Predicted probabilities, not logits.
        targets: Index of the correct class.
        bins: Number of equal bins on (0, 1].

    Returns:
        The error, in at least float32; 0 for an empty batch.

    Raises:
        TypeError: If ``probabilities`` is not floating point or ``targets`` not integer.
        ValueError: If the shapes disagree, there are no classes, a target is out of range,
            ``bins`` is not positive or the probabilities do not sum to one.

    Example:
        >>> import torch
        >>> from lmlosses.metrics import expected_calibration_error
        >>> probabilities = torch.tensor([[0.75, 0.25], [0.25, 0.75], [0.75, 0.25], [1.0, 0.0]])
        >>> expected_calibration_error(probabilities, torch.tensor([0, 1, 1, 0]), bins=2)
        tensor(0.0625)

    References:
        Guo et al. (2017), On Calibration of Modern Neural Networks, arXiv:1706.04599,
        equation (3).
    """
    curve = reliability_curve(probabilities, targets, bins=bins)
    return (curve.weight * (curve.accuracy - curve.confidence).abs()).sum()

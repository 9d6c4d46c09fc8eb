"""Losses of a predicted class: one value per sample, unreduced.

Classes are the last axis. Losses that want a distribution take logits and normalize them
themselves, since the logarithm of a rounded probability loses what the logits still hold; `brier`
takes probabilities because it is bounded there, `zero_one` and the hinges take scores in any unit.
A logit of ``-inf`` forbids its class, and gradients stay finite as long as the target is allowed.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer
from torch import Tensor

from lmlosses._checks import (
    check_floating,
    check_in_unit_interval,
    check_indices,
    check_leading_shape,
    check_non_negative,
    check_not_empty_axis,
    check_open_unit_interval,
    check_probabilities,
    check_same_shape,
    check_shape,
    check_tensor,
    compute_dtype,
    reads_values,
)
from lmlosses.logprobs import token_stats
from lmlosses.losses.language import token_cross_entropy


def _check_class_indices(targets: Tensor, *, of: str, scores: Tensor) -> None:
    check_floating(**{of: scores})
    check_not_empty_axis(of, scores)
    check_leading_shape("targets", targets, of=of, reference=scores)
    check_indices("targets", targets, scores.shape[-1], of=f"the classes of {of}")


def _check_class_targets(targets: Tensor, *, of: str, scores: Tensor) -> None:
    """Indices or probabilities of the classes: the dtype decides which."""
    check_tensor(targets=targets)
    if not targets.is_floating_point():
        _check_class_indices(targets, of=of, scores=scores)
        return
    check_floating(**{of: scores})
    check_not_empty_axis(of, scores)
    check_same_shape("targets", targets, of=of, reference=scores)
    check_probabilities("targets", targets)


def _check_class_weight(weight: Tensor, classes: int) -> None:
    check_floating(weight=weight)
    check_shape("weight", weight, (classes,), meaning="one entry per class")


def _check_binary(targets: Tensor, *, of: str, scores: Tensor) -> None:
    """Targets of the scores' shape in [0, 1]."""
    check_floating(**{of: scores}, targets=targets)
    check_same_shape("targets", targets, of=of, reference=scores)
    if not reads_values(targets) or targets.numel() == 0:
        return
    low, high = (bound.item() for bound in targets.detach().aminmax())
    if not (low >= 0 and high <= 1):
        raise ValueError(f"targets must lie in [0, 1]; got values from {low:.3g} to {high:.3g}")


def _check_broadcasts(name: str, tensor: Tensor, *, of: str, reference: Tensor) -> None:
    """Require a shape that broadcasts to the reference's without enlarging it."""
    check_floating(**{name: tensor})
    extra = reference.ndim - tensor.ndim
    if extra < 0 or any(
        size not in (1, wanted)
        for size, wanted in zip(tensor.shape, reference.shape[extra:], strict=True)
    ):
        raise ValueError(
            f"{name} must broadcast to {tuple(reference.shape)}, the shape of {of}; "
            f"got {tuple(tensor.shape)}"
        )


def _is_target(targets: Tensor, classes: int) -> Tensor:
    """True at each sample's target class; works where values cannot be read."""
    return targets.unsqueeze(-1) == torch.arange(classes, device=targets.device)


def _soft_cross_entropy_terms(
    logps: Tensor, targets: Tensor, label_smoothing: float, weight: Tensor | None
) -> Tensor:
    """What each class adds to the cross-entropy with target probabilities."""
    allowed = logps != -math.inf
    targets = targets.to(logps.dtype)
    if label_smoothing > 0:
        share = label_smoothing / allowed.sum(dim=-1, keepdim=True).to(logps.dtype)
        targets = (1 - label_smoothing) * targets + share * allowed
    # a forbidden class costs nothing unless the target gives it probability: 0 log 0 = 0
    terms = torch.where((targets == 0) & ~allowed, 0.0, -logps) * targets
    return terms if weight is None else terms * weight


def cross_entropy(
    logits: Float[Tensor, "*batch classes"],
    targets: Integer[Tensor, "*batch"] | Float[Tensor, "*batch classes"],
    *,
    label_smoothing: float = 0.0,
    weight: Float[Tensor, " classes"] | None = None,
) -> Float[Tensor, "*batch"]:
    r"""Surprise of the model at the target class, in nats.

    With :math:`\hat p` the softmax of the logits, :math:`p` the target distribution (all of it on
    one class when the targets are indices), :math:`\epsilon` the smoothing, :math:`w` the class
    weights and :math:`K` the number of classes not forbidden by a logit of ``-inf``,

    .. math:: L = -\sum_i w_i \Bigl((1 - \epsilon) p_i + \frac{\epsilon}{K}\Bigr) \log \hat p_i

    where a forbidden class takes no share of the smoothing and costs nothing unless the target
    names it. A uniform model scores :math:`\log K`. Divide by :math:`\log 2` for bits. The
    gradient in the logits, without weights and smoothing, is :math:`\hat p - p`.

    Args:
        logits: Unnormalized log-probabilities. Half precision is computed in float32. At least
            one class of each row must be allowed.
        targets: Index of the correct class, in ``[0, classes)``, or a probability for each
            class: the dtype decides. There is no ignore index: leave samples out in the
            reduction instead.
        label_smoothing: Share of the target mass that is spread evenly over the classes.
        weight: Factor on the surprise of each class. A mean that divides by the weights is
            `lmlosses.weighted_mean`.

    Returns:
        One loss per sample, unreduced, in at least float32. The numbers are those of
        ``torch.nn.functional.cross_entropy(..., reduction="none")``, except that there smoothing
        over a forbidden class is infinite and a target probability of 0 on it gives NaN.

    Raises:
        TypeError: If ``logits`` or ``weight`` is not floating point, or ``targets`` neither
            floating point nor integer.
        ValueError: If the shapes disagree, there is no class, ``label_smoothing`` is outside
            ``[0, 1)``, or (read on the CPU) a target is not a class or not a distribution.

    Example:
        >>> import torch
        >>> from lmlosses.losses import cross_entropy
        >>> logits = torch.zeros(2, 4)  # a uniform model of four classes
        >>> cross_entropy(logits, torch.tensor([0, 3]))
        tensor([1.3863, 1.3863])

    References:
        Textbook equation (4.3.3). Label smoothing: Szegedy et al. (2016), arXiv:1512.00567,
        section 7.
    """
    _check_class_targets(targets, of="logits", scores=logits)
    check_in_unit_interval(label_smoothing=label_smoothing)
    if weight is not None:
        _check_class_weight(weight, logits.shape[-1])
    if targets.is_floating_point():
        dtype = compute_dtype(logits, targets)
        logps = logits.to(dtype).log_softmax(dim=-1)
        weight = None if weight is None else weight.to(dtype)
        return _soft_cross_entropy_terms(logps, targets, label_smoothing, weight).sum(dim=-1)
    stats = token_stats(logits, targets, mean_logp=label_smoothing > 0, class_weight=weight)
    return token_cross_entropy(
        stats,
        label_smoothing=label_smoothing,
        target_weight=None if weight is None else weight.to(stats.logps.dtype)[targets.long()],
    )


def binary_cross_entropy(
    logits: Float[Tensor, "*batch"],
    targets: Float[Tensor, "*batch"],
    *,
    pos_weight: float | Float[Tensor, "..."] | None = None,
) -> Float[Tensor, "*batch"]:
    r"""Surprise of the model at a yes-or-no answer, in nats.

    With :math:`\hat y = \sigma(z)` the sigmoid of the logit and :math:`w` the weight of the
    positive class,

    .. math:: L = -\bigl[w \, y \log \hat y + (1 - y) \log (1 - \hat y)\bigr] .

    A logit of 0 costs :math:`\log 2` either way. Without weight the derivative in the logit is
    :math:`\hat y - y`, however saturated the sigmoid.

    Args:
        logits: Log-odds of the positive class. Half precision is computed in float32.
        targets: Probability of the positive class, floating point: 0, 1 or between.
        pos_weight: Factor on the positive term: a number, or a tensor that broadcasts to the
            logits, such as one entry per label.

    Returns:
        One loss per entry, unreduced, in at least float32. As accurate for a confident no as for
        a confident yes.

    Raises:
        TypeError: If a tensor is not floating point.
        ValueError: If the shapes disagree, ``pos_weight`` is a negative number, or (read on the
            CPU) a target lies outside ``[0, 1]``.

    Example:
        >>> import torch
        >>> from lmlosses.losses import binary_cross_entropy
        >>> binary_cross_entropy(torch.tensor([0.0, 2.0]), torch.tensor([1.0, 0.0]))
        tensor([0.6931, 2.1269])

    References:
        Textbook equation (4.3.15).
    """
    _check_binary(targets, of="logits", scores=logits)
    dtype = compute_dtype(logits, targets)
    logits, targets = logits.to(dtype), targets.to(dtype)
    # -log sigmoid(z) and -log(1 - sigmoid(z)); a logit of -inf or inf is free where its
    # probability is asked for nothing
    yes = -F.logsigmoid(logits).masked_fill((targets == 0) & (logits == -math.inf), 0.0)
    no = -F.logsigmoid(-logits).masked_fill((targets == 1) & (logits == math.inf), 0.0)
    if isinstance(pos_weight, Tensor):
        _check_broadcasts("pos_weight", pos_weight, of="logits", reference=logits)
        yes = yes * pos_weight.to(dtype)
    elif pos_weight is not None:
        check_non_negative(pos_weight=pos_weight)
        yes = yes * pos_weight
    return targets * yes + (1 - targets) * no


def _binary_cross_entropy_as_torch(
    logits: Tensor, targets: Tensor, pos_weight: Tensor | None
) -> Tensor:
    """Binary cross-entropy in torch's order of operations, to the last bit.

    For a confident no it subtracts two numbers near the logit and keeps only their rounding.
    """
    dtype = compute_dtype(logits, targets)
    logits, targets = logits.to(dtype), targets.to(dtype)
    if pos_weight is None:
        return (1 - targets) * logits - F.logsigmoid(logits)
    log_weight = (pos_weight.to(dtype) - 1) * targets + 1
    return (1 - targets) * logits - log_weight * F.logsigmoid(logits)


def brier(
    probabilities: Float[Tensor, "*batch classes"],
    targets: Integer[Tensor, "*batch"] | Float[Tensor, "*batch classes"],
) -> Float[Tensor, "*batch"]:
    r"""Squared Euclidean distance from the predicted to the true distribution.

    .. math:: L = \sum_i (\hat p_i - p_i)^2

    Between 0 and 2, and 2 only for certainty in the wrong class. Of two classes each counts: for
    a probability :math:`\hat p` of the right one the score is :math:`2 (1 - \hat p)^2`, twice the
    form that looks at one class alone.

    Args:
        probabilities: Predicted distribution over the classes, normalized: not logits. Half
            precision is computed in float32.
        targets: Index of the correct class, in ``[0, classes)``, or a probability for each
            class: the dtype decides.

    Returns:
        One score per sample, unreduced, in at least float32.

    Raises:
        TypeError: If ``probabilities`` is not floating point, or ``targets`` neither floating
            point nor integer.
        ValueError: If the shapes disagree, there is no class, or (read on the CPU) a row is not
            a distribution or a target not a class.

    Example:
        >>> import torch
        >>> from lmlosses.losses import brier
        >>> brier(torch.tensor([[0.8, 0.2], [0.0, 1.0]]), torch.tensor([0, 0]))
        tensor([0.0800, 2.0000])

    References:
        Brier (1950), Verification of forecasts expressed in terms of probability, Monthly
        Weather Review 78(1), for one forecast. Textbook equation (4.3.18).
    """
    _check_class_targets(targets, of="probabilities", scores=probabilities)
    check_probabilities("probabilities", probabilities)
    if not targets.is_floating_point():
        targets = _is_target(targets, probabilities.shape[-1]).to(probabilities.dtype)
    dtype = compute_dtype(probabilities, targets)
    return (probabilities.to(dtype) - targets.to(dtype)).square().sum(dim=-1)


def zero_one(
    scores: Float[Tensor, "*batch classes"], targets: Integer[Tensor, "*batch"]
) -> Float[Tensor, "*batch"]:
    r"""One where the highest score is not the target's, zero where it is.

    .. math:: L = \mathbb{1}\{\arg\max_i s_i \ne y\}

    Its mean is the error rate. Its gradient is zero everywhere, so it cannot be trained on: the
    other losses of this module stand in for it.

    Args:
        scores: Logits, probabilities or anything else whose largest entry is the decision.
            Between equal scores the decision is ``torch.argmax``'s.
        targets: Index of the correct class, in ``[0, classes)``.

    Returns:
        One loss per sample, in at least float32. It has no gradient function.

    Raises:
        TypeError: If ``scores`` is not floating point or ``targets`` not integer.
        ValueError: If the shapes disagree, there is no class, or (read on the CPU) a target is
            not a class.

    Example:
        >>> import torch
        >>> from lmlosses.losses import zero_one
        >>> zero_one(torch.tensor([[0.1, 0.9], [0.8, 0.2]]), torch.tensor([1, 1]))
        tensor([0., 1.])

    References:
        The loss of which textbook equation (4.3.31) is the best decision.
    """
    check_tensor(scores=scores, targets=targets)
    _check_class_indices(targets, of="scores", scores=scores)
    return (scores.argmax(dim=-1) != targets).to(compute_dtype(scores))


def _focal(log_odds: Tensor, gamma: float) -> Tensor:
    """``-(1 - p)^gamma log p`` from the log-odds of p.

    Both logarithms come from the log-odds, so nothing is lost near 0 or 1, and a power of an
    exponential has no infinite slope where 1 - p vanishes, as (1 - p)^gamma has for gamma < 1.
    """
    return -(gamma * F.logsigmoid(-log_odds)).exp() * F.logsigmoid(log_odds)


def focal(
    logits: Float[Tensor, "*batch classes"],
    targets: Integer[Tensor, "*batch"],
    *,
    gamma: float = 2.0,
    weight: Float[Tensor, " classes"] | None = None,
) -> Float[Tensor, "*batch"]:
    r"""Cross-entropy that looks away from samples already classified well, in nats.

    With :math:`\hat p_y` the softmax probability of the target :math:`y`, :math:`\gamma` the
    focusing exponent and :math:`w` the class weights,

    .. math:: L = -w_y (1 - \hat p_y)^\gamma \log \hat p_y .

    At :math:`\gamma = 0` it is `cross_entropy`. At :math:`\gamma = 2` a sample with
    :math:`\hat p_y = 0.9` costs a hundredth of its cross-entropy. It is not proper: its minimum
    is not at the true probabilities.

    Args:
        logits: Unnormalized log-probabilities. Half precision is computed in float32.
        targets: Index of the correct class, in ``[0, classes)``.
        gamma: Focusing exponent, at least 0; below 1 is safe too.
        weight: Factor on the loss of each class.

    Returns:
        One loss per sample, unreduced, in at least float32.

    Raises:
        TypeError: If ``logits`` or ``weight`` is not floating point, ``targets`` not integer or
            ``gamma`` not a number.
        ValueError: If the shapes disagree, there is no class, ``gamma`` is negative, or (read
            on the CPU) a target is not a class.

    Example:
        >>> import math
        >>> import torch
        >>> from lmlosses.losses import focal
        >>> logits = torch.tensor([[math.log(9.0), 0.0], [0.0, 0.0]])  # 0.9 and 0.5
        >>> focal(logits, torch.tensor([0, 0]))
        tensor([0.0011, 0.1733])

    References:
        Lin et al. (2017), arXiv:1708.02002, equations (4) and (5), for several classes.
    """
    check_non_negative(gamma=gamma)
    check_tensor(targets=targets)
    _check_class_indices(targets, of="logits", scores=logits)
    logits = logits.to(compute_dtype(logits))
    # the log-odds of the target are its logit minus the log-sum-exp of the others; the lowest
    # finite number stands for "no other", since -inf would make 0 * inf of gamma = 0
    left_out = _is_target(targets, logits.shape[-1]) | (logits == -math.inf)
    others = logits.masked_fill(left_out, torch.finfo(logits.dtype).min).logsumexp(dim=-1)
    target_logits = logits.gather(-1, targets.long().unsqueeze(-1)).squeeze(-1)
    loss = _focal(target_logits - others, gamma)
    if weight is not None:
        _check_class_weight(weight, logits.shape[-1])
        loss = loss * weight.to(logits.dtype)[targets.long()]
    return loss


def binary_focal(
    logits: Float[Tensor, "*batch"],
    targets: Float[Tensor, "*batch"],
    *,
    gamma: float = 2.0,
    alpha: float | None = None,
) -> Float[Tensor, "*batch"]:
    r"""Binary cross-entropy that looks away from entries already classified well, in nats.

    With :math:`\hat y = \sigma(z)`, :math:`\gamma` the focusing exponent and :math:`\alpha` the
    weight of the positive class,

    .. math::
        L = -\alpha \, y (1 - \hat y)^\gamma \log \hat y
            - (1 - \alpha)(1 - y) \, \hat y^\gamma \log (1 - \hat y) .

    Without ``alpha`` both classes weigh 1, and at :math:`\gamma = 0` this is
    `binary_cross_entropy`.

    Args:
        logits: Log-odds of the positive class. Half precision is computed in float32.
        targets: 0 or 1, floating point; a target between mixes the two losses.
        gamma: Focusing exponent, at least 0; below 1 is safe too.
        alpha: Weight of the positive class in ``(0, 1)``; the negative class weighs the rest.

    Returns:
        One loss per entry, unreduced, in at least float32.

    Raises:
        TypeError: If a tensor is not floating point, or ``gamma`` or ``alpha`` not a number.
        ValueError: If the shapes differ, ``gamma`` is negative, ``alpha`` is outside ``(0, 1)``,
            or (read on the CPU) a target lies outside ``[0, 1]``.

    Example:
        >>> import torch
        >>> from lmlosses.losses import binary_focal
        >>> binary_focal(torch.tensor([0.0, 3.0]), torch.tensor([1.0, 1.0]), alpha=0.25)
        tensor([4.3322e-02, 2.7321e-05])

    References:
        Lin et al. (2017), arXiv:1708.02002, equations (4) and (5).
    """
    check_non_negative(gamma=gamma)
    _check_binary(targets, of="logits", scores=logits)
    dtype = compute_dtype(logits, targets)
    logits, targets = logits.to(dtype), targets.to(dtype)
    yes, no = targets, 1 - targets
    if alpha is not None:
        check_open_unit_interval(alpha=alpha)
        yes, no = alpha * yes, (1 - alpha) * no
    # an infinite logit is no surer than the largest finite one, and would make 0 * inf
    limit = torch.finfo(dtype).max
    logits = logits.clamp(-limit, limit)
    return yes * _focal(logits, gamma) + no * _focal(-logits, gamma)


def hinge(
    scores: Float[Tensor, "*batch"], targets: Float[Tensor, "*batch"]
) -> Float[Tensor, "*batch"]:
    r"""How far a yes-or-no answer falls short of a margin of 1, in the unit of the scores.

    .. math:: L = \max\bigl(0,\; 1 - (2y - 1) s\bigr)

    A score of 0 costs 1; beyond the margin, on the right side, the loss and its gradient are 0.

    Args:
        scores: Positive for yes. Half precision is computed in float32.
        targets: 0 or 1, floating point (not -1 and 1), as for `binary_cross_entropy`; a target
            between shrinks the margin.

    Returns:
        One loss per entry, unreduced, in at least float32.

    Raises:
        TypeError: If an argument is not a floating-point tensor.
        ValueError: If the shapes differ or (read on the CPU) a target lies outside ``[0, 1]``.

    Example:
        >>> import torch
        >>> from lmlosses.losses import hinge
        >>> hinge(torch.tensor([0.5, 2.0, -1.0]), torch.tensor([1.0, 1.0, 1.0]))
        tensor([0.5000, 0.0000, 2.0000])
    """
    _check_binary(targets, of="scores", scores=scores)
    dtype = compute_dtype(scores, targets)
    signs = 2 * targets.to(dtype) - 1
    return (1 - signs * scores.to(dtype)).clamp(min=0.0)


def multiclass_hinge(
    scores: Float[Tensor, "*batch classes"], targets: Integer[Tensor, "*batch"]
) -> Float[Tensor, "*batch"]:
    r"""How far the target's lead over the best other class falls short of 1.

    .. math:: L = \max\bigl(0,\; 1 + \max_{j \ne y} s_j - s_y\bigr)

    Equal scores cost 1. Only the strongest rival is pushed down, unlike in
    ``torch.nn.MultiMarginLoss``, which sums over all of them.

    Args:
        scores: One score per class. Half precision is computed in float32. A score of ``-inf``
            takes its class out of the contest.
        targets: Index of the correct class, in ``[0, classes)``.

    Returns:
        One loss per sample, unreduced, in at least float32; 0 when there is no rival.

    Raises:
        TypeError: If ``scores`` is not floating point or ``targets`` not integer.
        ValueError: If the shapes disagree, there is no class, or (read on the CPU) a target is
            not a class.

    Example:
        >>> import torch
        >>> from lmlosses.losses import multiclass_hinge
        >>> scores = torch.tensor([[3.0, 2.5, 0.0], [3.0, 1.0, 0.0]])
        >>> multiclass_hinge(scores, torch.tensor([0, 0]))
        tensor([0.5000, 0.0000])

    References:
        Crammer and Singer (2001), JMLR 2, section 3.
    """
    check_tensor(targets=targets)
    _check_class_indices(targets, of="scores", scores=scores)
    scores = scores.to(compute_dtype(scores))
    is_target = _is_target(targets, scores.shape[-1])
    rival = scores.masked_fill(is_target, -math.inf).amax(dim=-1)
    own = scores.gather(-1, targets.long().unsqueeze(-1)).squeeze(-1)
    return (1 + rival - own).clamp(min=0.0)

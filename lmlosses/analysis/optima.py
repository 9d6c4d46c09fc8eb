"""Where losses have their minimum, in closed form."""

import math
from typing import NamedTuple

from lmlosses._checks import check_in_unit_interval, check_whole


class SmoothedOptimum(NamedTuple):
    """What label smoothing pulls a model's prediction to."""

    target: float
    """Probability of the correct class."""
    other: float
    """Probability of each other class."""
    gap: float
    """Logit of the correct class minus that of another; infinite without smoothing."""
    loss: float
    """Smoothed cross-entropy there, in nats, which nothing goes below."""


def smoothed_optimum(classes: int, *, smoothing: float) -> SmoothedOptimum:
    r"""The prediction that label smoothing likes best, and the gap between its logits.

    .. math::
        p_y = 1 - \epsilon + \frac{\epsilon}{C} , \qquad p_j = \frac{\epsilon}{C} , \qquad
        z_y - z_j = \log\left(1 + C \, \frac{1 - \epsilon}{\epsilon}\right)

    Cross-entropy is least where the prediction is the soft label, and its value there is the
    label's entropy. The gap grows with the number of classes. No prediction is ruled out: beyond
    the gap the loss rises again, and it pulls back.

    Args:
        classes: The number of classes :math:`C`.
        smoothing: The share :math:`\epsilon` of the target spread evenly over all classes, from
            0, where the gap is infinite, to 1, where it is zero.

    Returns:
        Probabilities, gap and loss, as Python numbers.

    Raises:
        TypeError: If ``classes`` is not a whole number or ``smoothing`` not a number.
        ValueError: If there are fewer than two classes or ``smoothing`` is outside ``[0, 1]``.

    Example:
        >>> from lmlosses.analysis.optima import smoothed_optimum
        >>> best = smoothed_optimum(10, smoothing=0.1)
        >>> round(best.target, 4), round(best.other, 4), round(best.gap, 4)
        (0.91, 0.01, 4.5109)

    References:
        Szegedy et al. (2016), arXiv:1512.00567, section 7. Textbook equations (4.6.19) and
        (4.6.20).
    """
    check_whole(classes=classes)
    if classes < 2:
        raise ValueError(f"classes must be at least 2; got {classes}")
    check_in_unit_interval(open_right=False, smoothing=smoothing)
    other = smoothing / classes
    target = 1 - smoothing + other
    if other == 0:
        return SmoothedOptimum(target, other, math.inf, 0.0)
    loss = -target * math.log(target) - (classes - 1) * other * math.log(other)
    return SmoothedOptimum(target, other, math.log1p((1 - smoothing) / other), loss)

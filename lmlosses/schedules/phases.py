"""Schedules of several pieces, each of which counts its own steps from 0."""

from bisect import bisect_right
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lmlosses._checks import check_non_negative, check_positive, check_whole
from lmlosses.schedules._schedule import Phase, Schedule, check_fit
from lmlosses.schedules.curves import constant, cosine, linear


def _join(step: Any, *, schedules: tuple[Schedule, ...], boundaries: tuple[int, ...]) -> Any:
    if not isinstance(step, Tensor):
        place = bisect_right(boundaries, step)
        return schedules[place](step - boundaries[place - 1] if place else step)
    value = schedules[0](step)
    for schedule, boundary in zip(schedules[1:], boundaries, strict=True):
        value = torch.where(step >= boundary, schedule((step - boundary).clamp(min=0)), value)
    return value


def join(schedules: Sequence[Schedule], *, boundaries: Sequence[int]) -> Schedule:
    """One schedule after the other, each counting its steps from 0.

    Args:
        schedules: The pieces, in order.
        boundaries: The first step of each piece but the first. Of two equal boundaries the
            piece between them has no steps.

    Raises:
        ValueError: If there is not one piece more than there are boundaries, or boundaries are
            negative or decrease.

    Example:
        >>> from lmlosses.schedules import cosine, join, linear
        >>> up, down = linear(start=0.0, end=1.0, total_steps=2), cosine(total_steps=2)
        >>> schedule = join([up, down], boundaries=[2])
        >>> [round(schedule(step), 3) for step in range(6)]
        [0.0, 0.5, 1.0, 0.5, 0.0, 0.0]

    References:
        The curve of ``torch.optim.lr_scheduler.SequentialLR``.
    """
    if len(schedules) != len(boundaries) + 1:
        raise ValueError(
            f"schedules must be one more than boundaries, of which there are {len(boundaries)}; "
            f"got {len(schedules)}"
        )
    for boundary in boundaries:
        check_whole(boundaries=boundary)
        check_non_negative(boundaries=boundary)
    if any(later < former for former, later in zip(boundaries, boundaries[1:], strict=False)):
        raise ValueError(f"boundaries must not decrease; got {list(boundaries)}")
    return Schedule(partial(_join, schedules=tuple(schedules), boundaries=tuple(boundaries)))


def _climb(step: Any, *, peak: float, warmup_steps: int) -> Any:
    return peak * (step + 1) / (warmup_steps + 1)


def _warmed(after: Schedule, *, peak: float, warmup_steps: int, start: float | None) -> Schedule:
    """What follows a linear warmup, with the warmup before it."""
    if start is None:
        before = Schedule(partial(_climb, peak=peak, warmup_steps=warmup_steps))
    else:
        before = linear(start=start, end=peak, total_steps=warmup_steps)
    return join([before, after], boundaries=[warmup_steps])


def warmup(*, warmup_steps: int, peak: float = 1.0, start: float | None = None) -> Schedule:
    r"""A line up to the peak, which then stays.

    With :math:`w` the steps of warmup,

    .. math:: \eta_t = \eta \, \frac{t + 1}{w + 1} \quad (t < w) , \qquad \eta_t = \eta
        \quad (t \ge w)

    Args:
        warmup_steps: Number of steps :math:`w` below the peak.
        peak: The value :math:`\eta` of step ``warmup_steps`` and all later ones.
        start: Value at step 0, from which the line then goes straight to the peak; by default
            :math:`\eta / (w + 1)`. With 0.0 the warmup is :math:`\eta \, t / w`.

    Raises:
        ValueError: If a setting is negative.

    Example:
        >>> from lmlosses.schedules import warmup
        >>> [warmup(warmup_steps=3)(step) for step in range(5)]
        [0.25, 0.5, 0.75, 1.0, 1.0]
        >>> [warmup(warmup_steps=2, start=0.0)(step) for step in range(5)]
        [0.0, 0.5, 1.0, 1.0, 1.0]

    References:
        Goyal et al. (2017), arXiv:1706.02677, section 2.2. With ``start=0.0`` the curve of
        Hugging Face's ``get_constant_schedule_with_warmup``.
    """
    check_whole(warmup_steps=warmup_steps)
    check_non_negative(warmup_steps=warmup_steps, peak=peak)
    return _warmed(constant(value=peak), peak=peak, warmup_steps=warmup_steps, start=start)


def warmup_cosine(
    *,
    warmup_steps: int,
    total_steps: int,
    peak: float = 1.0,
    end: float = 0.0,
    start: float | None = None,
) -> Schedule:
    r"""A line up to the peak and half a cosine down.

    With :math:`w` the steps of warmup among :math:`n`, and :math:`b` the end,

    .. math:: \eta_t = \eta \, \frac{t + 1}{w + 1} \quad (t < w) , \qquad
        \eta_t = b + \frac{\eta - b}{2} \left( 1 + \cos \frac{\pi (t - w)}{n - w} \right)
        \quad (w \le t \le n)

    and :math:`\eta_t = b` later.

    Args:
        warmup_steps: Number of steps :math:`w` below the peak at the start.
        total_steps: Number of steps :math:`n`, warmup included.
        peak: The largest value :math:`\eta`, at step ``warmup_steps``.
        end: Value :math:`b` at step ``total_steps`` and after it.
        start: Value at step 0. See `warmup`.

    Raises:
        ValueError: If a setting is negative, or the warmup is longer than the whole.

    Example:
        >>> from lmlosses.schedules import warmup_cosine
        >>> schedule = warmup_cosine(warmup_steps=1, total_steps=3)
        >>> [round(schedule(step), 3) for step in range(5)]
        [0.5, 1.0, 0.5, 0.0, 0.0]

    References:
        Notes 3.1, with ``start=0.0``; then, up to step ``total_steps``, also the curve of Hugging
        Face's ``get_cosine_schedule_with_warmup``.
    """
    check_fit(total_steps=total_steps, warmup_steps=warmup_steps)
    check_non_negative(peak=peak)
    down = cosine(start=peak, end=end, total_steps=total_steps - warmup_steps)
    return _warmed(down, peak=peak, warmup_steps=warmup_steps, start=start)


def wsd(
    *,
    warmup_steps: int,
    decay_steps: int,
    total_steps: int,
    peak: float = 1.0,
    end: float = 0.0,
    start: float | None = None,
    decay: Phase = linear,
) -> Schedule:
    r"""Warmup, stable, decay: a line up, the peak for long, a fast way down.

    With :math:`w` the steps of warmup, :math:`d` those of the decay and :math:`n` all of them,

    .. math:: \eta_t = \eta \, \frac{t + 1}{w + 1} \quad (t < w) , \qquad
        \eta_t = \eta \quad (w \le t \le n - d) , \qquad
        \eta_t = b + (\eta - b) \, f\!\left( \frac{t - (n - d)}{d} \right) \quad (n - d < t \le n)

    and :math:`\eta_t = b` later, where :math:`f` falls from 1 to 0. The values before the decay
    depend on neither :math:`n` nor :math:`d`, so a run can be extended, or ended early, from
    any checkpoint of the stable phase.

    Args:
        warmup_steps: Number of steps :math:`w` below the peak at the start.
        decay_steps: Number of steps :math:`d` of the last phase.
        total_steps: Number of steps :math:`n` of all three phases.
        peak: The value :math:`\eta` of the stable phase.
        end: Value :math:`b` at step ``total_steps`` and after it.
        start: Value at step 0. See `warmup`.
        decay: Makes the last phase from ``start``, ``end`` and ``total_steps``: `linear`,
            `cosine`, `one_minus_sqrt`, or a function of one's own.

    Raises:
        ValueError: If a setting is negative, or warmup and decay are longer than the whole.

    Example:
        >>> from lmlosses.schedules import wsd
        >>> schedule = wsd(warmup_steps=1, decay_steps=2, total_steps=5)
        >>> [schedule(step) for step in range(7)]
        [0.5, 1.0, 1.0, 1.0, 0.5, 0.0, 0.0]

    References:
        Hu et al. (2024), arXiv:2404.06395, section 4.3; decay shapes: Hägele et al. (2024),
        arXiv:2405.18392, section 3. Notes 3.2, with ``start=0.0``. With ``start=end`` the curve
        of Hugging Face's ``get_wsd_schedule``.
    """
    check_fit(total_steps=total_steps, warmup_steps=warmup_steps, decay_steps=decay_steps)
    check_non_negative(peak=peak)
    stable = total_steps - warmup_steps - decay_steps
    down = decay(start=peak, end=end, total_steps=decay_steps)
    flat_and_down = join([constant(value=peak), down], boundaries=[stable])
    return _warmed(flat_and_down, peak=peak, warmup_steps=warmup_steps, start=start)


def _inverse_sqrt(step: Any, *, peak: float, timescale: int) -> Any:
    return peak * (timescale / (timescale + step)) ** 0.5


def inverse_sqrt(
    *,
    warmup_steps: int,
    timescale: int | None = None,
    peak: float = 1.0,
    start: float | None = None,
) -> Schedule:
    r"""A line up to the peak, then down like one over the square root, without an end.

    With :math:`w` the steps of warmup and :math:`\tau` the time scale, by default :math:`w`,

    .. math:: \eta_t = \eta \, \frac{t + 1}{w + 1} \quad (t < w) , \qquad
        \eta_t = \eta \, \sqrt{\frac{\tau}{t - w + \tau}} \quad (t \ge w)

    With the default, four times as many steps after the start halve the value.

    Args:
        warmup_steps: Number of steps :math:`w` below the peak.
        timescale: The scale :math:`\tau`, in steps. By default ``warmup_steps``, or 1 without a
            warmup.
        peak: The largest value :math:`\eta`, at step ``warmup_steps``.
        start: Value at step 0. See `warmup`.

    Raises:
        ValueError: If a setting is negative or ``timescale`` not positive.

    Example:
        >>> from lmlosses.schedules import inverse_sqrt
        >>> schedule = inverse_sqrt(warmup_steps=4)
        >>> schedule(4), schedule(16), schedule(400)
        (1.0, 0.5, 0.1)

    References:
        Vaswani et al. (2017), arXiv:1706.03762, section 5.3, with ``start=0.0`` and ``peak``
        :math:`(d w)^{-1/2}`; time scale: Zhai et al. (2022), arXiv:2106.04560. Notes 3.3. With
        ``start=0.0`` the curve of Hugging Face's ``get_inverse_sqrt_schedule``, whose time scale
        without a warmup is 10 000.
    """
    scale = (warmup_steps or 1) if timescale is None else timescale
    check_whole(warmup_steps=warmup_steps, timescale=scale)
    check_non_negative(warmup_steps=warmup_steps, peak=peak)
    check_positive(timescale=scale)
    down = Schedule(partial(_inverse_sqrt, peak=peak, timescale=scale))
    return _warmed(down, peak=peak, warmup_steps=warmup_steps, start=start)


def one_cycle(
    *,
    warmup_steps: int,
    total_steps: int,
    peak: float = 1.0,
    start: float | None = None,
    end: float | None = None,
    anneal: Phase = cosine,
) -> Schedule:
    r"""Up from a small value to the peak and down to almost nothing.

    Args:
        warmup_steps: Steps on the way up; often 30 % of all.
        total_steps: Steps of both ways.
        peak: The largest value, at step ``warmup_steps``.
        start: Value at step 0; by default ``peak / 25``.
        end: Value at step ``total_steps`` and after it; by default ``start / 10_000``.
        anneal: Makes each way from ``start``, ``end`` and ``total_steps``: `cosine`, `linear`,
            or a function of one's own.

    Raises:
        ValueError: If a setting is negative, or the warmup is longer than the whole.

    Example:
        >>> from lmlosses.schedules import one_cycle
        >>> schedule = one_cycle(warmup_steps=2, total_steps=6)
        >>> [round(schedule(step), 3) for step in range(8)]
        [0.04, 0.52, 1.0, 0.854, 0.5, 0.146, 0.0, 0.0]

    References:
        Smith and Topin (2018), arXiv:1708.07120. The curve of
        ``torch.optim.lr_scheduler.OneCycleLR``, whose settings are counted differently: its
        ``total_steps=n, pct_start=p`` are ``total_steps=n - 1, warmup_steps=p * n - 1`` here.
    """
    check_fit(total_steps=total_steps, warmup_steps=warmup_steps)
    check_non_negative(peak=peak)
    low = peak / 25 if start is None else start
    last = low / 10_000 if end is None else end
    up = anneal(start=low, end=peak, total_steps=warmup_steps)
    down = anneal(start=peak, end=last, total_steps=total_steps - warmup_steps)
    return join([up, down], boundaries=[warmup_steps])

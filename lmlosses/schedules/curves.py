"""Schedules of one piece: stairs, lines, waves."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lmlosses._checks import (
    check_in_unit_interval,
    check_non_negative,
    check_positive,
    check_whole,
)
from lmlosses.schedules._schedule import Schedule, progress


def _constant(step: Any, *, value: float) -> Any:
    return torch.full_like(step, value) if isinstance(step, Tensor) else value


def constant(*, value: float = 1.0) -> Schedule:
    """The same value at every step.

    Args:
        value: The value.

    Raises:
        ValueError: If it is negative.

    Example:
        >>> from lmlosses.schedules import constant
        >>> constant()(1000)
        1.0
    """
    check_non_negative(value=value)
    return Schedule(partial(_constant, value=value))


def _step_decay(step: Any, *, step_size: int, gamma: float, peak: float) -> Any:
    return peak * gamma ** (step // step_size)


def step_decay(*, step_size: int, gamma: float = 0.1, peak: float = 1.0) -> Schedule:
    r"""Stairs: a drop every so many steps.

    .. math:: \eta_t = \eta \, \gamma^{\lfloor t / s \rfloor}

    Args:
        step_size: Steps :math:`s` between two drops.
        gamma: Factor :math:`\gamma` of each drop, in [0, 1].
        peak: The first value :math:`\eta`.

    Raises:
        ValueError: If a setting is outside its range.

    Example:
        >>> from lmlosses.schedules import step_decay
        >>> schedule = step_decay(step_size=30, gamma=0.5)
        >>> schedule(29), schedule(30), schedule(60)
        (1.0, 0.5, 0.25)

    References:
        The curve of ``torch.optim.lr_scheduler.StepLR``.
    """
    check_whole(step_size=step_size)
    check_positive(step_size=step_size)
    check_in_unit_interval(open_right=False, gamma=gamma)
    check_non_negative(peak=peak)
    return Schedule(partial(_step_decay, step_size=step_size, gamma=gamma, peak=peak))


def _multi_step(step: Any, *, milestones: tuple[int, ...], gamma: float, peak: float) -> Any:
    if isinstance(step, Tensor):
        passed: Any = sum((step >= milestone).to(step) for milestone in milestones)
        return peak * gamma ** (torch.zeros_like(step) + passed)
    return peak * gamma ** bisect_right(milestones, step)


def multi_step(*, milestones: Sequence[int], gamma: float = 0.1, peak: float = 1.0) -> Schedule:
    r"""Stairs: a drop at each of the given steps.

    .. math:: \eta_t = \eta \, \gamma^{k} , \qquad k = \text{number of milestones} \le t

    Args:
        milestones: Steps that are the first after a drop, in any order. One that is named twice
            drops twice.
        gamma: Factor :math:`\gamma` of each drop, in [0, 1].
        peak: The first value :math:`\eta`.

    Raises:
        ValueError: If a setting is outside its range.

    Example:
        >>> from lmlosses.schedules import multi_step
        >>> schedule = multi_step(milestones=[80, 90], gamma=0.316)  # as DeepSeek LLM, of 100
        >>> [round(schedule(step), 3) for step in (79, 80, 90)]
        [1.0, 0.316, 0.1]

    References:
        The curve of ``torch.optim.lr_scheduler.MultiStepLR``. DeepSeek-AI (2024),
        arXiv:2401.02954, section 2.3.
    """
    for milestone in milestones:
        check_whole(milestones=milestone)
        check_non_negative(milestones=milestone)
    check_in_unit_interval(open_right=False, gamma=gamma)
    check_non_negative(peak=peak)
    ordered = tuple(sorted(milestones))
    return Schedule(partial(_multi_step, milestones=ordered, gamma=gamma, peak=peak))


def _exponential(step: Any, *, gamma: float, peak: float) -> Any:
    return peak * gamma**step


def exponential(*, gamma: float, peak: float = 1.0) -> Schedule:
    r"""The same relative drop at every step.

    .. math:: \eta_t = \eta \, \gamma^t

    Args:
        gamma: Factor :math:`\gamma` of a step, in [0, 1].
        peak: The first value :math:`\eta`.

    Raises:
        ValueError: If a setting is outside its range.

    Example:
        >>> from lmlosses.schedules import exponential
        >>> exponential(gamma=0.5)(3)
        0.125

    References:
        The curve of ``torch.optim.lr_scheduler.ExponentialLR``.
    """
    check_in_unit_interval(open_right=False, gamma=gamma)
    check_non_negative(peak=peak)
    return Schedule(partial(_exponential, gamma=gamma, peak=peak))


def _linear(step: Any, *, start: float, end: float, total_steps: int) -> Any:
    return end + (start - end) * (1 - progress(step, total_steps))


def linear(*, start: float = 1.0, end: float = 0.0, total_steps: int) -> Schedule:
    r"""A straight line, up or down.

    With :math:`a` the start, :math:`b` the end and :math:`n` the number of steps,

    .. math:: \eta_t = b + (a - b) (1 - s) , \qquad s = \min(t, n) / n

    Args:
        start: Value at step 0.
        end: Value at step ``total_steps`` and after it.
        total_steps: Steps from one to the other; with none, the value is ``end`` at once.

    Raises:
        ValueError: If a setting is negative.

    Example:
        >>> from lmlosses.schedules import linear
        >>> schedule = linear(total_steps=4)
        >>> [schedule(step) for step in range(6)]
        [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]

    References:
        The curve of ``torch.optim.lr_scheduler.LinearLR``. Notes 3.3.
    """
    check_whole(total_steps=total_steps)
    check_non_negative(start=start, end=end, total_steps=total_steps)
    return Schedule(partial(_linear, start=start, end=end, total_steps=total_steps))


def _cosine(step: Any, *, start: float, end: float, total_steps: int) -> Any:
    angle = math.pi * progress(step, total_steps)
    wave = angle.cos() if isinstance(angle, Tensor) else math.cos(angle)
    return end + (start - end) * (1 + wave) / 2


def cosine(*, start: float = 1.0, end: float = 0.0, total_steps: int) -> Schedule:
    r"""Half a wave of the cosine: level, steep, level.

    With :math:`a` the start, :math:`b` the end and :math:`n` the number of steps,

    .. math:: \eta_t = b + \frac{a - b}{2} \left( 1 + \cos \pi s \right) ,
        \qquad s = \min(t, n) / n

    Args:
        start: Value at step 0.
        end: Value at step ``total_steps`` and after it.
        total_steps: Steps from one to the other; with none, the value is ``end`` at once.

    Raises:
        ValueError: If a setting is negative.

    Example:
        >>> from lmlosses.schedules import cosine
        >>> schedule = cosine(total_steps=4)
        >>> [round(schedule(step), 3) for step in range(6)]
        [1.0, 0.854, 0.5, 0.146, 0.0, 0.0]

    References:
        Loshchilov and Hutter (2017), arXiv:1608.03983, equation (5), one period. Within it the
        curve of ``torch.optim.lr_scheduler.CosineAnnealingLR``, which climbs again after it.
    """
    check_whole(total_steps=total_steps)
    check_non_negative(start=start, end=end, total_steps=total_steps)
    return Schedule(partial(_cosine, start=start, end=end, total_steps=total_steps))


def _one_minus_sqrt(step: Any, *, start: float, end: float, total_steps: int) -> Any:
    return end + (start - end) * (1 - progress(step, total_steps) ** 0.5)


def one_minus_sqrt(*, start: float = 1.0, end: float = 0.0, total_steps: int) -> Schedule:
    r"""Down like one minus a square root: steep at first, then ever slower.

    With :math:`a` the start, :math:`b` the end and :math:`n` the number of steps,

    .. math:: \eta_t = b + (a - b) (1 - \sqrt s) , \qquad s = \min(t, n) / n

    Args:
        start: Value at step 0.
        end: Value at step ``total_steps`` and after it.
        total_steps: Steps from one to the other; with none, the value is ``end`` at once.

    Raises:
        ValueError: If a setting is negative.

    Example:
        >>> from lmlosses.schedules import one_minus_sqrt
        >>> schedule = one_minus_sqrt(total_steps=4)
        >>> [round(schedule(step), 3) for step in range(6)]
        [1.0, 0.5, 0.293, 0.134, 0.0, 0.0]

    References:
        Hägele et al. (2024), arXiv:2405.18392, section 3.
    """
    check_whole(total_steps=total_steps)
    check_non_negative(start=start, end=end, total_steps=total_steps)
    return Schedule(partial(_one_minus_sqrt, start=start, end=end, total_steps=total_steps))

"""Exercises of page 2 on optimizers and schedules."""

import math

import torch
from torch import Tensor

from lmlosses.lab.exercises._exercise import Exercise


def _forgotten() -> int:
    share, steps = 1.0, 0
    while share >= 0.01:
        share, steps = share * 0.95, steps + 1
    return steps


def _what_is_left(rates: Tensor, weight_decay: float) -> Tensor:
    return (1 - rates * weight_decay).prod()


def _rests_at(minimum: Tensor, weight_decay: float) -> Tensor:
    return minimum.clamp(-1 / weight_decay, 1 / weight_decay)


_RATES = torch.tensor([0.9, 0.5, 0.1])
_MINIMUM = torch.tensor([-7.0, -0.5, 0.0, 1.5, 3.0])

EXERCISES: dict[str, Exercise] = {
    "optimizers.2-a": Exercise(
        solution=_forgotten,
        mistakes=[
            (math.ceil(math.log(0.01) / math.log(0.999)), "That is for a rate of 0.999."),
            (
                math.ceil(math.log(0.01) / math.log(0.9)),
                "That is for a rate of 0.9, the first moment's.",
            ),
            (20, "1 / (1 - 0.95) steps leave 36 percent, not one."),
            (89, "Almost: after 89 steps a little more than one percent is left."),
        ],
        tolerance=1e-6,
    ),
    "optimizers.2-b": Exercise(
        solution=lambda: _what_is_left,
        mistakes=[
            (
                lambda rates, weight_decay: torch.full((), 1 - weight_decay) ** len(rates),
                "In AdamW the decay of a step is multiplied by its learning rate.",
            ),
            (
                lambda rates, weight_decay: 1 - weight_decay * rates.sum(),
                "Each step takes a share of what is left, not of what was there at first.",
            ),
            (
                lambda rates, weight_decay: (-weight_decay * rates.sum()).exp(),
                "Close while the rates are small; the steps are finite, so take the product.",
            ),
            (
                lambda rates, weight_decay: (1 - rates.mean() * weight_decay) ** len(rates),
                "The steps are not alike: each has a rate of its own.",
            ),
        ],
        probes=[(_RATES, 0.4), (torch.linspace(1, 0, 11), 0.9)],
    ),
    "optimizers.2-c": Exercise(
        solution=lambda: _rests_at,
        mistakes=[
            (
                lambda minimum, weight_decay: minimum / (1 + weight_decay),
                "That is where Adam with L2 rests if the curvature is 1.",
            ),
            (
                lambda minimum, weight_decay: minimum,
                "Inside the box, yes; but Adam's step is no longer than 1, and the decay of a "
                "large weight is.",
            ),
            (
                lambda minimum, weight_decay: minimum.sign() / weight_decay,
                "That is where a gradient that never changes would push it.",
            ),
            (
                lambda minimum, weight_decay: minimum.clamp(-weight_decay, weight_decay),
                "More decay makes the box smaller.",
            ),
        ],
        probes=[(_MINIMUM, 0.5), (_MINIMUM, 2.5)],
    ),
}

"""Exercises of page 4.3.3."""

import math

import torch
from torch import Tensor

from lmlosses.analysis.geometry import (
    empirical_fisher,
    fisher_information,
    fisher_rao_distance,
    natural_gradient_step,
)
from lmlosses.lab.exercises._exercise import Exercise


def _to_a_corner() -> Tensor:
    uniform = torch.full((3,), 1 / 3, dtype=torch.float64)
    return fisher_rao_distance(uniform, torch.eye(3, dtype=torch.float64)[0])


def _half_form_in_logits(logits: Tensor, step: Tensor) -> Tensor:
    fisher = fisher_information(lambda point: point[None], logits)
    return 0.5 * step @ fisher @ step


def _half_second_moment(logits: Tensor, step: Tensor) -> Tensor:
    return 0.5 * (logits.softmax(dim=-1) * step.square()).sum()


def _half_form_of_probabilities(logits: Tensor, step: Tensor) -> Tensor:
    return 0.5 * (step.square() / logits.softmax(dim=-1)).sum()


def _coin_of_probability(p: Tensor) -> Tensor:
    return torch.stack([p.log(), (1 - p).log()], dim=-1)


def _natural_step_of_a_coin(p: float, frequency: float, lr: float) -> Tensor:
    point = torch.tensor([p], dtype=torch.float64)
    gradient = (point - frequency) / (point * (1 - point))
    fisher = fisher_information(_coin_of_probability, point)
    return natural_gradient_step(point, gradient, fisher, lr=lr)[0]


def _stretched_by_the_empirical_fisher() -> float:
    coin = torch.tensor([math.log(9)], dtype=torch.float64)

    def model(log_odds: Tensor) -> Tensor:
        return torch.stack([log_odds, torch.zeros_like(log_odds)], dim=-1)

    heads = torch.tensor([0])
    return (fisher_information(model, coin) / empirical_fisher(model, coin, heads)).item()


_LOGITS = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64)
_STEPS = (
    torch.tensor([0.1, -0.2, 0.3], dtype=torch.float64),
    torch.tensor([0.5, 0.5, 0.5], dtype=torch.float64),
)

EXERCISES: dict[str, Exercise] = {
    "4.3.3-a": Exercise(
        solution=_to_a_corner,
        mistakes=[
            (
                math.acos(1 / math.sqrt(3)),
                "That is the angle on the unit sphere; Fisher's sphere has radius two.",
            ),
            (math.sqrt(2 / 3), "That is the straight line through the triangle."),
            (math.log(3), "That is the divergence of the center from the corner, in nats."),
        ],
    ),
    "4.3.3-b": Exercise(
        solution=lambda: _half_form_in_logits,
        mistakes=[
            (
                lambda logits, step: 2 * _half_form_in_logits(logits, step),
                "The right matrix; the expansion carries a half.",
            ),
            (
                _half_second_moment,
                "Adding one number to all logits changes no probability, so it must cost 0.",
            ),
            (
                _half_form_of_probabilities,
                "That is the matrix for a step in the probabilities; this step is in the logits.",
            ),
        ],
        probes=[(_LOGITS, step) for step in _STEPS],
        tolerance=1e-6,
    ),
    "4.3.3-c": Exercise(
        solution=lambda: _natural_step_of_a_coin,
        mistakes=[
            (
                lambda p, frequency, lr: p - lr * (p - frequency) / (p * (1 - p)),
                "That is the plain gradient step: nothing has been divided by the metric.",
            ),
            (
                lambda p, frequency, lr: p - lr * (p - frequency) / (p * (1 - p)) ** 2,
                "You divided by p (1 - p), the metric of the log-odds. In p it is the inverse.",
            ),
            (
                lambda p, frequency, lr: p + lr * (p - frequency),
                "Downhill is the other way: check the sign.",
            ),
        ],
        probes=[(0.9, 0.25, 1.0), (0.01, 0.25, 0.1), (0.5, 0.75, 0.5)],
        tolerance=1e-6,
    ),
    "4.3.3-d": Exercise(
        solution=_stretched_by_the_empirical_fisher,
        mistakes=[
            (1 / 9, "The other way round: a smaller matrix, inverted, makes a longer step."),
            (1.0, "The two agree only on average over labels drawn from the model."),
            (0.09, "That is the Fisher information; divide it by the empirical one."),
        ],
    ),
}

"""Exercises of page 4.4.4."""

import math

import torch
from torch import Tensor

from lmlosses.lab.exercises._exercise import Exercise
from lmlosses.lab.models import scaled_dot_product_attention
from lmlosses.losses.contrastive import info_nce


def _pull_on_positive() -> float:
    scores = torch.tensor([1.0, 3.0, 2.0], dtype=torch.float64, requires_grad=True)
    eye = torch.eye(3, dtype=torch.float64)
    loss = info_nce(scores, eye[0], eye[1:], temperature=2.0, similarity="dot")
    (pulls,) = torch.autograd.grad(loss, scores)
    return pulls[0].item()


def _share() -> float:
    return math.exp(0.5) / (math.exp(0.5) + math.exp(1.5) + math.exp(1.0))


def _slope(query: Tensor, keys: Tensor, positive: int, temperature: float) -> Tensor:
    output = scaled_dot_product_attention(query[None], keys, keys, temperature=temperature).output
    return (output[0] - keys[positive]) / temperature


def _uphill(query: Tensor, keys: Tensor, positive: int, temperature: float) -> Tensor:
    return -_slope(query, keys, positive, temperature)


def _undivided(query: Tensor, keys: Tensor, positive: int, temperature: float) -> Tensor:
    return temperature * _slope(query, keys, positive, temperature)


def _of_log_normalizer(query: Tensor, keys: Tensor, positive: int, temperature: float) -> Tensor:
    return _slope(query, keys, positive, temperature) + keys[positive] / temperature


def _floor(count: int, temperature: float) -> float:
    return math.log1p(count * math.exp(-2 / temperature))


def _floor_of_right_angles(count: int, temperature: float) -> float:
    return math.log1p(count * math.exp(-1 / temperature))


def _floor_without_positive(count: int, temperature: float) -> float:
    return math.log(count) - 2 / temperature


def _chance(count: int, temperature: float) -> float:
    return math.log(count + 1)


_KEYS = torch.tensor([[1.0, 0.0], [0.5, -1.0], [-2.0, 0.3]])

EXERCISES: dict[str, Exercise] = {
    "4.4.4-a": Exercise(
        solution=_pull_on_positive,
        mistakes=[
            (_share() - 1, "That is the pull on the score over the temperature; one more step."),
            ((1 - _share()) / 2, "Descent raises the positive's score: its slope is negative."),
            (_share() / 2, "That would be the pull if it were a negative."),
            (
                (math.exp(1) / (math.exp(1) + math.exp(3) + math.exp(2)) - 1) / 2,
                "The scores go over the temperature before the softmax too.",
            ),
        ],
    ),
    "4.4.4-b": Exercise(
        solution=lambda: _slope,
        mistakes=[
            (_uphill, "With the sign turned around: a step along the negative gradient descends."),
            (_undivided, "The chain rule leaves a factor of one over the temperature."),
            (_of_log_normalizer, "That is the slope of log-sum-exp alone: where is the positive?"),
        ],
        probes=[
            (torch.tensor([0.3, 0.8]), _KEYS, 0, 0.5),
            (torch.tensor([-1.0, 0.2]), _KEYS, 2, 2.0),
        ],
    ),
    "4.4.4-c": Exercise(
        solution=lambda: _floor,
        mistakes=[
            (_floor_of_right_angles, "A negative can be worse than at a right angle."),
            (_floor_without_positive, "The positive stands in the denominator too."),
            (_chance, "That is the loss at chance; a good encoder does better."),
        ],
        probes=[(31, 8.0), (127, 0.5), (7, 0.07)],
    ),
}

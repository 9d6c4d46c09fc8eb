"""Exercises of page 4.4.3."""

import math

import torch
from torch import Tensor

from lmlosses.lab.exercises._exercise import Exercise


def _harder_share() -> float:
    return torch.tensor([6.0, 4.0]).softmax(dim=0)[0].item()


def _hardest_share(gap: Tensor, count: Tensor, temperature: Tensor) -> Tensor:
    return (1 + count * torch.exp(-gap / temperature)).reciprocal()


def _two_poles(temperature: Tensor) -> Tensor:
    inverse = temperature.reciprocal()
    return inverse.cosh().log() - inverse


def _circle(temperature: Tensor) -> Tensor:
    inverse = temperature.reciprocal()
    value: Tensor = torch.special.i0(inverse).log() - inverse
    return value


EXERCISES: dict[str, Exercise] = {
    "4.4.3-a": Exercise(
        solution=_harder_share,
        mistakes=[
            (
                math.exp(6) / (math.exp(6) + math.exp(4) + math.exp(8)),
                "That is its probability, among three; the share is among the negatives.",
            ),
            (0.6, "The weights are exponentials of the scores over the temperature."),
            (1 / (1 + math.exp(-0.2)), "That is at temperature 1; here it is 0.1."),
            (1 / (1 + math.exp(2)), "That is the share of the easier one."),
        ],
    ),
    "4.4.3-b": Exercise(
        solution=lambda: _hardest_share,
        mistakes=[
            (
                lambda gap, count, temperature: 1 / (1 + torch.exp(-gap / temperature)),
                "That is beside one easy negative; there are more of them.",
            ),
            (
                lambda gap, count, temperature: 1 / (1 + count * torch.exp(-gap * temperature)),
                "A temperature divides the scores.",
            ),
            (
                lambda gap, count, temperature: 1 - _hardest_share(gap, count, temperature),
                "That is what the easy negatives have together.",
            ),
        ],
        probes=[
            (torch.tensor(0.5), torch.tensor(100.0), torch.tensor([0.05, 0.1, 0.5, 2.0])),
            (torch.tensor([0.1, 0.9]), torch.tensor(3.0), torch.tensor(0.2)),
        ],
    ),
    "4.4.3-c": Exercise(
        solution=lambda: _two_poles,
        mistakes=[
            (_circle, "That is the value on the whole circle."),
            (
                lambda temperature: torch.cosh(1 / temperature).log(),
                "The positive is missing: its score is 1, over the temperature.",
            ),
            (
                lambda temperature: -1 / temperature,
                "The mean stands inside of the logarithm: the exponentials do not cancel.",
            ),
        ],
        probes=[(torch.tensor([0.2, 0.5, 1.0, 3.0]),)],
        tolerance=1e-4,
    ),
}

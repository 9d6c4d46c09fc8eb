"""Exercises of page 4.6.5."""

import math

import torch
from torch import Tensor

from lmlosses.lab.exercises._exercise import Exercise


def _stalls() -> float:
    """Bisection on the slope, which rises from minus infinity up to its largest."""
    low, high = -12.0, -2.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        p = 1 / (1 + math.exp(-middle))
        low, high = (low, middle) if 2 * p * (1 - p) ** 2 >= 1e-3 else (middle, high)
    return high


def _rate(x: Tensor) -> Tensor:
    eigenvalues = torch.linalg.eigvalsh(2 * x.T @ x / len(x))
    found: Tensor = 2 / (eigenvalues[0] + eigenvalues[-1])
    return found


def _limit(x: Tensor) -> Tensor:
    found: Tensor = 2 / torch.linalg.eigvalsh(2 * x.T @ x / len(x))[-1]
    return found


def _floor(temperature: float, negatives: int) -> float:
    return math.log1p(negatives * math.exp(-2 / temperature))


_PROBES = [
    (torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]]),),
    (torch.tensor([[2.0, 0.5], [-1.0, 1.0], [0.0, 3.0], [1.0, -1.0]]),),
]

EXERCISES: dict[str, Exercise] = {
    "4.6.5-a": Exercise(
        solution=_stalls,
        mistakes=[
            (math.log(0.001), "Almost: the derivative of a square brings a factor of two."),
            (
                -math.log(0.0005),
                "There the answer is right; the sigmoid saturates on both sides.",
            ),
        ],
        tolerance=2e-3,
    ),
    "4.6.5-b": Exercise(
        solution=lambda: _rate,
        mistakes=[
            (_limit, "That is where descent begins to diverge; the best rate is below it."),
            (lambda x: _limit(x) / 2, "One over the largest curvature is safe, not best."),
            (
                lambda x: 2 * _rate(x),
                "The mean squared error without a half has twice that curvature.",
            ),
            (
                lambda x: _rate(x) / len(x),
                "The mean divides the curvature by the number of samples.",
            ),
        ],
        probes=_PROBES,
    ),
    "4.6.5-c": Exercise(
        solution=lambda: _floor,
        mistakes=[
            (lambda temperature, negatives: 0.0, "That would need an infinite margin."),
            (
                lambda temperature, negatives: math.log1p(negatives * math.exp(-1 / temperature)),
                "Negatives at a right angle can still be moved away.",
            ),
            (
                lambda temperature, negatives: math.log(negatives + 1),
                "That is the loss of a model that cannot tell the keys apart.",
            ),
            (
                lambda temperature, negatives: math.log1p(negatives * math.exp(-2 * temperature)),
                "The temperature divides.",
            ),
        ],
        probes=[(0.5, 7), (1.0, 1), (0.2, 1000)],
        tolerance=1e-5,
    ),
}

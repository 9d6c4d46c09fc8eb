"""Exercises of page 4 on optimizers and schedules."""

import torch
from torch import Tensor

from lmlosses.lab.exercises._exercise import Exercise


def _stepped(m: Tensor, h: Tensor, gamma: float, eps: float) -> Tensor:
    return (m / (gamma * h).clamp(min=eps)).clamp(-1, 1)


def _warm(beta2: float, every: int, step: int) -> float:
    estimates = 1 + (step - 1) // every
    return float(1 - beta2**estimates)


def _without_batch_factor() -> float:
    # 8 labels of a coin with p = 0.9: the variance of one is p (1 - p), of their mean an eighth
    return 0.9 * 0.1 / 8


EXERCISES: dict[str, Exercise] = {
    "optimizers.4-a": Exercise(
        solution=lambda: torch.tensor([1e-3 * 0.04, 0.04, 0.1 / 0.04]),
        mistakes=[
            (
                torch.tensor([1e-3 * 0.04, 0.04, 0.1]),
                "The decay is multiplied by the rate, and the rate has changed.",
            ),
            (
                torch.tensor([1e-3, 0.04, 0.1]),
                "An entry moves by at most lr in version 4, and by at most lr times rho in 1.",
            ),
            (
                torch.tensor([1e-3 * 0.04, 1 / 0.04, 0.1 / 0.04]),
                "clip(x, rho) = rho clip(x / rho, 1): rho goes to the denominator, beside h.",
            ),
        ],
        tolerance=1e-6,
    ),
    "optimizers.4-b": Exercise(
        solution=lambda: _stepped,
        mistakes=[
            (
                lambda m, h, gamma, eps: (m / (gamma * h + eps)).clamp(-1, 1),
                "Where h is negative this points uphill.",
            ),
            (
                lambda m, h, gamma, eps: (m / (gamma * h.abs()).clamp(min=eps)).clamp(-1, 1),
                "A negative curvature says nothing about a good length: the floor takes over.",
            ),
            (
                lambda m, h, gamma, eps: m / (gamma * h).clamp(min=eps),
                "Without a bound the flat entries leap.",
            ),
            (
                lambda m, h, gamma, eps: m.clamp(-1, 1) / (gamma * h).clamp(min=eps),
                "The quotient is clipped, not the momentum.",
            ),
        ],
        probes=[
            (
                torch.tensor([0.3, -0.3, 0.001, 2.0, 0.0]),
                torch.tensor([2.0, -2.0, 0.0, 9.0, 0.0]),
                0.5,
                1e-12,
            ),
            (torch.tensor([0.1, -5.0]), torch.tensor([1.0, -0.1]), 1.0, 1e-3),
        ],
    ),
    "optimizers.4-c": Exercise(
        solution=lambda: _warm,
        mistakes=[
            (
                lambda beta2, every, step: 1 - beta2**step,
                "The average takes a new value every few steps only.",
            ),
            (
                lambda beta2, every, step: 1 - beta2 ** (step // every),
                "The first estimate comes before the first step, not after the first k.",
            ),
            (
                lambda beta2, every, step: beta2 ** (1 + (step - 1) // every),
                "That is the share that is still missing.",
            ),
        ],
        probes=[(0.99, 10, 1), (0.99, 10, 10), (0.99, 10, 11), (0.95, 4, 101), (0.9, 1, 5)],
        tolerance=1e-6,
    ),
    "optimizers.4-d": Exercise(
        solution=_without_batch_factor,
        mistakes=[
            (0.9 * 0.1, "That is the curvature itself, after the factor B."),
            (0.9 * 0.1 * 8, "The mean of eight labels varies less than one label, not more."),
            (
                0.1**2,
                "That is the square with the true labels: nothing is drawn, nothing varies.",
            ),
        ],
        tolerance=1e-6,
    ),
}

"""Exercises of page 5 on optimizers and schedules."""

import math

import torch
from torch import Tensor

from lmlosses.lab.exercises._exercise import Exercise
from lmlosses.lab.paths import state_per_parameter
from lmlosses.optim import SOAP


def _factored(square: Tensor) -> Tensor:
    rows, columns = square.mean(dim=1, keepdim=True), square.mean(dim=0, keepdim=True)
    return rows * columns / square.mean()


def _not_normalized(square: Tensor) -> Tensor:
    return square.mean(dim=1, keepdim=True) * square.mean(dim=0, keepdim=True)


def _sums_over_mean(square: Tensor) -> Tensor:
    return square.sum(dim=1, keepdim=True) * square.sum(dim=0, keepdim=True) / square.mean()


def _arithmetic(square: Tensor) -> Tensor:
    return (square.mean(dim=1, keepdim=True) + square.mean(dim=0, keepdim=True)) / 2


def _soap_bytes() -> float:
    counted = state_per_parameter(SOAP, [(4096, 1024)], dtype=torch.float32)
    return round(counted, 3)


_ROOT = math.sqrt(400)

EXERCISES: dict[str, Exercise] = {
    "optimizers.5-a": Exercise(
        solution=lambda: (_ROOT - 1) / (_ROOT + 1),
        mistakes=[
            (399 / 401, "That is gradient descent; momentum puts a root over the 400."),
            (
                ((_ROOT - 1) / (_ROOT + 1)) ** 2,
                "That is the momentum itself; the error shrinks by its square root.",
            ),
            (1 - 1 / _ROOT, "That is near it, and of Nesterov's kind; take Polyak's settings."),
        ],
    ),
    "optimizers.5-b": Exercise(
        solution=lambda: _factored,
        mistakes=[
            (_not_normalized, "The means of your estimate are not the means you started from."),
            (_sums_over_mean, "With sums of rows and columns, divide by the sum of all."),
            (_arithmetic, "A product of the two, so that an exact product is met exactly."),
        ],
        probes=[
            (torch.tensor([[1.0, 2.0, 3.0], [4.0, 0.5, 1.0]]),),
            (torch.outer(torch.tensor([1.0, 9.0]), torch.tensor([4.0, 0.25, 1.0])),),
        ],
    ),
    "optimizers.5-c": Exercise(
        solution=_soap_bytes,
        mistakes=[
            (8.0, "Those are Adam's two moments; SOAP also holds the axes and what they are of."),
            (25.0, "The eigenvectors are kept beside the correlations, and are as large."),
            (24.0, "That is a square matrix; the long axis here has four times the short one's."),
            (10.5, "Those are numbers; in float32 each has four bytes."),
        ],
        tolerance=1e-2,
    ),
}

"""Exercises of page 4.6.3."""

import torch
from torch import Tensor

from lmlosses.lab.exercises._exercise import Exercise


def _limit(inputs: Tensor, targets: Tensor, start: Tensor) -> Tensor:
    found: Tensor = start + torch.linalg.pinv(inputs) @ (targets - inputs @ start)
    return found


def _shortest(inputs: Tensor, targets: Tensor, start: Tensor) -> Tensor:
    found: Tensor = torch.linalg.pinv(inputs) @ targets
    return found


def _added(inputs: Tensor, targets: Tensor, start: Tensor) -> Tensor:
    found: Tensor = start + torch.linalg.pinv(inputs) @ targets
    return found


def _smoothing(gap: Tensor, classes: int) -> Tensor:
    return classes / (classes + torch.expm1(gap))


def _as_printed(gap: Tensor, classes: int) -> Tensor:
    return (-gap).sigmoid()


def _to_the_others(gap: Tensor, classes: int) -> Tensor:
    return (classes - 1) / (classes - 1 + gap.exp())


def _imbalance(steps: int, factor: float) -> float:
    return (9 - 1 / 9) * factor**steps


EXERCISES: dict[str, Exercise] = {
    "4.6.3-a": Exercise(
        solution=lambda: _limit,
        mistakes=[
            (_shortest, "That is the limit from zero. What of a start that is not in the rows?"),
            (_added, "Of the start only the part that is orthogonal to the rows stays."),
        ],
        probes=[
            (torch.tensor([[2.0, 1.0]]), torch.tensor([2.0]), torch.tensor([1.6, 0.2])),
            (
                torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, -1.0]]),
                torch.tensor([1.0, 3.0]),
                torch.tensor([1.0, -1.0, 0.5]),
            ),
        ],
    ),
    "4.6.3-b": Exercise(
        solution=lambda: _smoothing,
        mistakes=[
            (_as_printed, "That inverts the bound as printed, in which the classes are missing."),
            (
                _to_the_others,
                "That spreads epsilon over the wrong classes only; here all of them, the true one "
                "included, get their share.",
            ),
        ],
        probes=[
            (torch.tensor([1.0, 4.5, 10.0]), 10),
            (torch.tensor(10.0), 50_257),
        ],
    ),
    "4.6.3-c": Exercise(
        solution=lambda: _imbalance(50, 1 - 0.1**2 * 0.5**2),
        mistakes=[
            (9 - 1 / 9, "That is where it starts; residuals shrink it."),
            (_imbalance(50, 1 - 0.1 * 0.5), "What is first order in the rate cancels."),
            (_imbalance(50, 1 + 0.1**2 * 0.5**2), "It shrinks: look at the sign of the square."),
            (_imbalance(50, 1 - 0.1 * 0.5**2), "The rate is squared as well."),
        ],
    ),
}

"""Exercises of page 4.4.5."""

import math

import torch
from torch import Tensor

from lmlosses.lab.exercises._exercise import Exercise


def _symmetric_gradient(scores: Tensor) -> Tensor:
    batch = len(scores)
    own = torch.eye(batch, dtype=scores.dtype)
    return (scores.softmax(dim=1) + scores.softmax(dim=0) - 2 * own) / (2 * batch)


def _rows_alone(scores: Tensor) -> Tensor:
    return (scores.softmax(dim=1) - torch.eye(len(scores), dtype=scores.dtype)) / len(scores)


def _own_once(scores: Tensor) -> Tensor:
    own = torch.eye(len(scores), dtype=scores.dtype)
    return (scores.softmax(dim=1) + scores.softmax(dim=0) - own) / (2 * len(scores))


def _not_averaged(scores: Tensor) -> Tensor:
    return _symmetric_gradient(scores) * len(scores)


_GENERATOR = torch.Generator().manual_seed(0)

EXERCISES: dict[str, Exercise] = {
    "4.4.5-a": Exercise(
        solution=lambda: -math.log(511),
        mistakes=[
            (-10.0, "That is where the paper starts; it suits a batch of 22,000."),
            (math.log(511), "Most pairs are negative: the logit must say no."),
            (-math.log(512), "That is the logarithm of the share; the logit is that of the odds."),
            (0.0, "That gives both answers one half, and 511 of 512 pairs are negative."),
        ],
        tolerance=1e-4,
    ),
    "4.4.5-b": Exercise(
        solution=lambda: torch.logaddexp,
        mistakes=[
            (
                lambda first, second: first + second,
                "Normalizers add up; their logarithms do not.",
            ),
            (torch.maximum, "The larger one dominates, but the smaller counts as well."),
            (
                lambda first, second: torch.logaddexp(first, second) - math.log(2),
                "That is the mean of the two sums.",
            ),
            (
                lambda first, second: (first.exp() + second.exp()).log(),
                "On paper yes. But try it at a score of 1000.",
            ),
        ],
        probes=[
            (torch.tensor([0.0, 2.0, -1.0]), torch.tensor([0.0, 0.5, 3.0])),
            (torch.tensor([1000.0]), torch.tensor([999.0])),
        ],
    ),
    "4.4.5-c": Exercise(
        solution=lambda: _symmetric_gradient,
        mistakes=[
            (_rows_alone, "That is the gradient of the loss of the rows alone."),
            (_own_once, "Both directions pull at the own pair."),
            (_not_averaged, "The loss is a mean over pairs."),
            (lambda scores: -_symmetric_gradient(scores), "That is the way down."),
        ],
        probes=[
            (torch.zeros(3, 3),),
            (torch.randn(4, 4, generator=_GENERATOR),),
        ],
    ),
}

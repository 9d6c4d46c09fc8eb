"""Exercises of page 4.3.5."""

import math

import torch
from torch import Tensor

from lmlosses.lab.exercises._exercise import Exercise
from lmlosses.normalizers import softmax

_MASK = torch.tensor([True, True, False, True])


def _masked_weights(scores: Tensor, mask: Tensor) -> Tensor:
    return softmax(scores, mask=mask)


EXERCISES: dict[str, Exercise] = {
    "4.3.5-a": Exercise(
        solution=lambda: math.sqrt(64 * 1.0 * 4.0),
        mistakes=[
            (8.0, "That is the root of the width, right when keys have variance 1."),
            (256.0, "That is the variance of the scores; they are divided by its root."),
            (32.0, "Doubling a key doubles the score; a variance of 4 is a doubling, not more."),
        ],
    ),
    "4.3.5-b": Exercise(
        solution=lambda: _masked_weights,
        mistakes=[
            (
                lambda scores, mask: scores.softmax(dim=-1) * mask,
                "Zeroing weights after the softmax leaves a row that sums to less than one.",
            ),
            (
                lambda scores, mask: (scores * mask).softmax(dim=-1),
                "A score of 0 is not a weight of 0: its exponential is 1.",
            ),
            (
                lambda scores, mask: scores.masked_fill(mask, -math.inf).softmax(dim=-1),
                "The mask is true where a key may be seen.",
            ),
        ],
        probes=[
            (torch.tensor([0.5, -1.0, 2.0, 0.0]), _MASK),
            (
                torch.tensor([3.0, 3.0, 9.0, -2.0]),
                ~_MASK | torch.tensor([True, False, False, True]),
            ),
        ],
    ),
    "4.3.5-c": Exercise(
        solution=lambda: math.ceil(math.exp(10.0)),
        mistakes=[
            (10, "The ceiling is the logarithm of the number of candidates, not the number."),
            (1024, "That is 10 bits; a nat is larger."),
            (math.floor(math.exp(10.0)), "One fewer than needed: its logarithm is below 10."),
        ],
        tolerance=1e-6,
    ),
}

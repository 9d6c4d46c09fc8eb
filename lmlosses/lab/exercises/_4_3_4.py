"""Exercises of page 4.3.4."""

import math

import torch
from torch import Tensor

from lmlosses.lab.exercises._exercise import Exercise
from lmlosses.multitask import mgda


def _honest(logits: Tensor, weight: Tensor) -> Tensor:
    probabilities = logits.softmax(dim=-1) / weight
    return probabilities / probabilities.sum(dim=-1, keepdim=True)


def _share(first: Tensor, second: Tensor) -> Tensor:
    return mgda(torch.stack([first, second]))[0]


def _unclamped(first: Tensor, second: Tensor) -> Tensor:
    gap = second - first
    return second @ gap / (gap @ gap)


def _by_length(first: Tensor, second: Tensor) -> Tensor:
    first_length, second_length = first.square().sum().sqrt(), second.square().sum().sqrt()
    return second_length / (first_length + second_length)


EXERCISES: dict[str, Exercise] = {
    "4.3.4-a": Exercise(
        solution=lambda: 2 - math.log(1 - 0.9),
        mistakes=[
            (3.0, "That is the mean, the answer to the squared error."),
            (2 + math.log(2), "That is the median, the answer to the quantile 0.5."),
            (math.log(10), "That is the noise alone: the truth of 2 is still to be added."),
            (2 - math.log(0.9), "That many outcomes stay above; nine in ten should stay below."),
        ],
        tolerance=0.003,
    ),
    "4.3.4-b": Exercise(
        solution=lambda: _honest,
        mistakes=[
            (lambda logits, weight: logits.softmax(dim=-1), "These are the weighted answers."),
            (
                lambda logits, weight: (logits + weight.log()).softmax(dim=-1),
                "That applies the weights a second time instead of taking them back.",
            ),
            (
                lambda logits, weight: logits.softmax(dim=-1) / weight,
                "Nearly: the result has to sum to one.",
            ),
            (
                lambda logits, weight: (logits / weight).softmax(dim=-1),
                "Weights multiply probabilities; what does that do to a logit?",
            ),
        ],
        probes=[
            (torch.tensor([0.5, -1.0, 2.0]), torch.tensor([1.0, 9.0, 3.0])),
            (torch.tensor([[0.0, 1.0], [2.0, -2.0]]), torch.tensor([0.5, 4.0])),
        ],
    ),
    "4.3.4-c": Exercise(
        solution=lambda: _share,
        mistakes=[
            (_unclamped, "Right while the lowest point lies between the two; it need not."),
            (_by_length, "That balances the lengths; the angle between them counts as well."),
            (
                lambda first, second: 1 - _share(first, second),
                "That is the weight of the second gradient.",
            ),
        ],
        probes=[
            (torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])),
            (torch.tensor([1.0, 0.5, -1.0]), torch.tensor([0.2, 2.0, 1.0])),
            (torch.tensor([1.0, 1.0]), torch.tensor([4.0, 5.0])),
            (torch.tensor([3.0, 0.0]), torch.tensor([0.5, 0.2])),
        ],
    ),
}

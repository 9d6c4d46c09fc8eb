"""Exercises of page 1 on optimizers and schedules."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lmlosses.lab.exercises._exercise import Exercise
from lmlosses.losses.classification import cross_entropy


def _length() -> float:
    return math.sqrt((3 / 4) ** 2 + 3 * (1 / 4) ** 2)


def _push(similarities: Tensor, temperature: float) -> Tensor:
    weights = (similarities / temperature).softmax(dim=-1)
    return (weights - F.one_hot(torch.tensor(0), len(similarities))) / temperature


def _cosines(a: Tensor, b: Tensor) -> Tensor:
    return F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T


def _surprise(logits: Tensor) -> Tensor:
    return cross_entropy(logits, torch.arange(len(logits))).mean()


def _both_directions(a: Tensor, b: Tensor, temperature: float) -> Tensor:
    logits = _cosines(a, b) / temperature
    return (_surprise(logits) + _surprise(logits.T)) / 2


_QUERY = torch.tensor([0.6, 0.5, 0.1, -0.3])
_A = torch.tensor([[1.0, 0.2], [0.3, 2.0], [-1.0, 0.5]])
_B = torch.tensor([[0.9, 0.4], [0.1, 0.7], [-3.0, -1.0]])

EXERCISES: dict[str, Exercise] = {
    "optimizers.1-a": Exercise(
        solution=_length,
        mistakes=[
            (0.75, "That is the entry at the target; the other three are not zero."),
            (1.5, "That is the sum of the sizes; the length is the root of the sum of squares."),
            (0.0, "The entries sum to zero, but their squares do not."),
            (math.log(4), "That is the loss, not its gradient."),
            (1.0, "That is the limit for a large vocabulary; here there are four tokens."),
        ],
    ),
    "optimizers.1-b": Exercise(
        solution=lambda: _push,
        mistakes=[
            (
                lambda similarities, temperature: _push(similarities, temperature) * temperature,
                "The similarities are divided by the temperature: so is their gradient.",
            ),
            (
                lambda similarities, temperature: -_push(similarities, temperature),
                "That is the direction of descent; the gradient is predicted less right.",
            ),
            (
                lambda similarities, temperature: _push(similarities, 1.0) / temperature,
                "The weights themselves depend on the temperature.",
            ),
            (
                lambda similarities, temperature: (
                    (similarities / temperature).softmax(dim=-1) / temperature
                ),
                "The positive is the right one: subtract 1 there.",
            ),
        ],
        probes=[(_QUERY, 0.2), (_QUERY, 1.0), (torch.tensor([-0.2, 0.9]), 0.07)],
    ),
    "optimizers.1-c": Exercise(
        solution=lambda: _both_directions,
        mistakes=[
            (
                lambda a, b, temperature: _surprise(_cosines(a, b) / temperature),
                "Those are the rows alone; ask the columns as well.",
            ),
            (
                lambda a, b, temperature: 2 * _both_directions(a, b, temperature),
                "That is the sum of the two directions, not their mean.",
            ),
            (
                lambda a, b, temperature: (
                    (_surprise(a @ b.T / temperature) + _surprise(b @ a.T / temperature)) / 2
                ),
                "Those are dot products: normalize the embeddings first.",
            ),
            (
                lambda a, b, temperature: _both_directions(a, b, 1 / temperature),
                "The temperature divides the cosines.",
            ),
        ],
        probes=[(_A, _B, 0.2), (_A, _B, 1.0)],
    ),
    "optimizers.1-d": Exercise(
        solution=lambda: math.log(9) / 0.1,
        mistakes=[
            (math.log(9), "That is the lead at beta = 1; at 0.1 it takes ten times as much."),
            (-math.log(9) / 0.1, "With that the chosen answer is behind, and the weight is 0.9."),
            (math.log(10) / 0.1, "The weight is 1 / (1 + e to the beta h), not e to the -beta h."),
            (0.1 * math.log(9), "A smaller beta needs a larger lead: divide by it."),
        ],
    ),
}

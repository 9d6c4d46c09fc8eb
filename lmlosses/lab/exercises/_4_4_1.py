"""Exercises of page 4.4.1."""

import math

import torch
from torch import Tensor

from lmlosses.lab.exercises._exercise import Exercise
from lmlosses.losses import info_nce


def _a_clear_lead() -> float:
    scores = torch.tensor([0.3, *[0.0] * 15], dtype=torch.float64)
    keys = torch.eye(16, dtype=torch.float64)
    return info_nce(scores, keys[0], keys[1:], temperature=0.1, similarity="dot").item()


def _pull(u: Tensor, keys: Tensor, tau: float) -> Tensor:
    point = u.clone().requires_grad_()
    loss = info_nce(point, keys[0], keys[1:], temperature=tau)
    (slope,) = torch.autograd.grad(loss, point)
    return -slope


def _without_sphere(u: Tensor, keys: Tensor, tau: float) -> Tensor:
    weights = (keys @ u / u.norm() / tau).softmax(dim=0)
    direction: Tensor = keys[0] - weights @ keys
    return direction / tau


def _without_length(u: Tensor, keys: Tensor, tau: float) -> Tensor:
    length: Tensor = u.norm()
    return length * _pull(u, keys, tau)


def _without_temperature(u: Tensor, keys: Tensor, tau: float) -> Tensor:
    return tau * _pull(u, keys, tau)


def _uphill(u: Tensor, keys: Tensor, tau: float) -> Tensor:
    return -_pull(u, keys, tau)


def _centered(table: Tensor) -> Tensor:
    return table - table.mean(dim=1, keepdim=True)


def _best(joint: Tensor, drawn_from: Tensor) -> Tensor:
    return _centered((joint / joint.sum(dim=1, keepdim=True) / drawn_from).log())


_UNIT = torch.tensor([[0.6, 0.8], [1.0, 0.0], [-0.6, 0.8]], dtype=torch.float64)
_JOINT = torch.tensor([[0.30, 0.05, 0.15], [0.10, 0.20, 0.20]], dtype=torch.float64)

EXERCISES: dict[str, Exercise] = {
    "4.4.1-a": Exercise(
        solution=_a_clear_lead,
        mistakes=[
            (math.log(16), "That is chance: a lead of 0."),
            (math.log1p(math.exp(-3)), "That is the loss with one negative; here there are 15."),
            (math.log1p(15 * math.exp(-0.3)), "The lead is divided by the temperature first."),
            (math.log1p(15 * math.exp(3)), "That is the loss if the positive were behind by 0.3."),
            (math.log(15) - 3, "The positive itself is one of the terms of the sum."),
        ],
    ),
    "4.4.1-b": Exercise(
        solution=lambda: _pull,
        mistakes=[
            (_without_sphere, "That is for inner products; the part along the query must go."),
            (_without_length, "The longer the vector, the less a step turns it."),
            (_without_temperature, "The scores are divided by tau, and so is their gradient."),
            (_uphill, "That is the gradient; descent goes the other way."),
        ],
        probes=[
            (torch.tensor([3.0, -1.0], dtype=torch.float64), _UNIT, 0.5),
            (torch.tensor([0.1, 0.4], dtype=torch.float64), _UNIT, 0.1),
        ],
    ),
    "4.4.1-c": Exercise(
        solution=lambda: _best,
        mistakes=[
            (
                lambda joint, drawn_from: _centered(joint.log()),
                "That is for negatives drawn evenly; divide by their distribution.",
            ),
            (
                lambda joint, drawn_from: _centered((joint / joint.sum(dim=0)).log()),
                "That is for negatives from the marginal, whatever drawn_from is.",
            ),
            (
                lambda joint, drawn_from: (
                    joint / joint.sum(dim=1, keepdim=True) / drawn_from
                ).log(),
                "One of the best tables; the one with rows of mean zero is asked for.",
            ),
            (
                lambda joint, drawn_from: _centered((joint * drawn_from).log()),
                "A frequent negative must push a key down, not up.",
            ),
        ],
        probes=[
            (_JOINT, torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)),
            (_JOINT, torch.tensor([0.6, 0.1, 0.3], dtype=torch.float64)),
        ],
    ),
}

"""Exercises of page 4.6.1."""

import math

import torch
from torch import Tensor

from lmlosses.lab.exercises._exercise import Exercise


def _constant(X: Tensor) -> Tensor:
    found: Tensor = torch.linalg.eigvalsh(X.T @ X / len(X))[0]
    return found


def _without_the_mean(X: Tensor) -> Tensor:
    found: Tensor = torch.linalg.eigvalsh(X.T @ X)[0]
    return found


def _not_zero(X: Tensor) -> Tensor:
    values = torch.linalg.eigvalsh(X.T @ X / len(X))
    found: Tensor = values[values > 1e-4 * values[-1]][0]
    return found


def _largest(X: Tensor) -> Tensor:
    found: Tensor = torch.linalg.eigvalsh(X.T @ X / len(X))[-1]
    return found


def _parts(scores: Tensor, value: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    a = scores.softmax(0)
    jacobian = torch.diag(a) - torch.outer(a, a)
    h = jacobian @ value @ (a @ value - target)
    bent = torch.diag(h) - torch.outer(h, a) - torch.outer(a, h)
    return jacobian, jacobian @ value @ value.T @ jacobian, bent


def _curvature(scores: Tensor, value: Tensor, target: Tensor) -> Tensor:
    _, tangent, bent = _parts(scores, value, target)
    return tangent + bent


def _of_a_classifier(scores: Tensor, value: Tensor, target: Tensor) -> Tensor:
    return _parts(scores, value, target)[0]


def _tangent_only(scores: Tensor, value: Tensor, target: Tensor) -> Tensor:
    return _parts(scores, value, target)[1]


_TALL = torch.tensor([[1.0, 2.0], [0.0, 1.0], [3.0, -1.0], [1.0, 1.0]])
_WIDE = torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, 1.0]])
_VALUE = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-1.0, 1.0]])

EXERCISES: dict[str, Exercise] = {
    "4.6.1-a": Exercise(
        solution=lambda: _constant,
        mistakes=[
            (_without_the_mean, "The loss is a mean over N samples, and so is its curvature."),
            (_not_zero, "With an eigenvalue of zero there is a direction without any growth."),
            (_largest, "That bounds the curvature from above: it is the smoothness constant."),
        ],
        probes=[(_TALL,), (_WIDE,)],
    ),
    "4.6.1-b": Exercise(
        solution=lambda: math.ceil(math.log(1e8) / math.log1p(0.5 * 0.4)),
        mistakes=[
            (
                math.ceil(math.log(1e8) / (0.5 * 0.4)),
                "That is gradient flow, where the distance grows by exp(0.2); a step multiplies "
                "it by 1.2.",
            ),
            (5e8, "The slope does not stay what it is at the start: it grows with the distance."),
            (
                math.ceil(math.log(1e8) / math.log1p(0.4)),
                "That is for a rate of 1; the step counts half.",
            ),
        ],
    ),
    "4.6.1-c": Exercise(
        solution=lambda: _curvature,
        mistakes=[
            (_of_a_classifier, "That is cross-entropy's Hessian: here the values stand between."),
            (
                _tangent_only,
                "That is the Gauss-Newton part. The softmax bends too: where is the residual?",
            ),
        ],
        probes=[
            (torch.tensor([0.5, -1.0, 0.2]), _VALUE, torch.tensor([1.0, -1.0])),
            (torch.tensor([2.0, 0.0, 0.0]), _VALUE, torch.tensor([0.0, 3.0])),
        ],
    ),
}

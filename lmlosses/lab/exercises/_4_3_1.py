"""Exercises of page 4.3.1: the gradient behind a sigmoid, curvature, rates."""

import torch
from torch import Tensor

from lmlosses.lab.exercises._exercise import Exercise
from lmlosses.normalizers import softmax_jacobian

_INPUTS = torch.tensor([[1.0, 2.0], [0.0, 1.0], [-1.0, 1.0]], dtype=torch.float64)
_TARGETS = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
_WEIGHTS = torch.tensor([0.3, -0.2], dtype=torch.float64)


def _gradient(weights: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
    """Gradient of the mean squared error of sigmoid outputs."""
    outputs = (inputs @ weights).sigmoid()
    factors = 2 * (outputs - targets) * outputs * (1 - outputs)
    return factors @ inputs / len(targets)


def _factor_at_output(weights: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
    """Equation (4.3.6) with its sign repaired and nothing else."""
    outputs = (inputs @ weights).sigmoid()
    factors = 2 * (outputs - targets) * outputs.sigmoid() * (1 - outputs.sigmoid())
    return factors @ inputs / len(targets)


def _as_printed(weights: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
    return -_factor_at_output(weights, inputs, targets)


def _uphill(weights: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
    return -_gradient(weights, inputs, targets)


def _of_half(weights: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
    return _gradient(weights, inputs, targets) / 2


def _largest_curvature() -> float:
    """Hessian of ten classes at W = 0 for one input of length 3."""
    jacobian = softmax_jacobian(torch.zeros(10, dtype=torch.float64))
    x = torch.tensor([1.0, 2.0, 2.0], dtype=torch.float64)
    return float(torch.linalg.eigvalsh(torch.kron(jacobian, torch.outer(x, x))).max())


def _positive_eigenvalues() -> int:
    """Rank of the mean Hessian of three classes and two features, weights at 0."""
    jacobian = softmax_jacobian(torch.zeros(3, dtype=torch.float64))
    mean = torch.kron(jacobian, _INPUTS.T @ _INPUTS / len(_INPUTS))
    return int(torch.linalg.matrix_rank(mean))


def _rate_limit() -> float:
    hessian = _INPUTS.T @ _INPUTS / len(_INPUTS)
    return 2 / float(torch.linalg.eigvalsh(hessian).max())


EXERCISES: dict[str, Exercise] = {
    "4.3.1-a": Exercise(
        solution=lambda: _gradient,
        mistakes=[
            (_as_printed, "This is (4.3.6) as printed. Compare it with autograd at one point."),
            (_factor_at_output, "The sign is right. At what is the sigmoid's slope taken?"),
            (_uphill, "The size is right. Does a step against it make the loss smaller?"),
            (_of_half, "This is the gradient with the half of (4.3.1); (4.3.2) has none."),
        ],
        probes=[
            (_WEIGHTS, _INPUTS, _TARGETS),
            (-5 * _WEIGHTS, 2 * _INPUTS, 1 - _TARGETS),
        ],
    ),
    "4.3.1-b": Exercise(
        solution=_largest_curvature,
        mistakes=[
            (0.81, "The p (1 - p) are the diagonal of the Jacobian, not its eigenvalues."),
            (2.25, "A quarter is the slope of a sigmoid at 0: that is two classes, not ten."),
            (0.1, "That is the Jacobian's eigenvalue; the other factor of the product is x x^T."),
            (0.3, "The curvature grows with the square of the input's length."),
        ],
    ),
    "4.3.1-c": Exercise(
        solution=_positive_eigenvalues,
        mistakes=[
            (6, "Add the same vector to all three rows of W: which probability changes?"),
            (2, "That is the number for a single sample; other samples bend other directions."),
            (3, "Count pairs: the eigenvalues of a Kronecker product are products."),
        ],
    ),
    "4.3.1-d": Exercise(
        solution=_rate_limit,
        mistakes=[
            (_rate_limit() / 2, "The error shrinks as long as |1 - rate * curvature| < 1."),
            (_rate_limit() / 3, "The loss is a mean: the Hessian has the factor 1/N."),
        ],
    ),
}

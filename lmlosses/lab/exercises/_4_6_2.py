"""Exercises of page 4.6.2."""

import math

import torch

from lmlosses.lab.exercises._exercise import Exercise


def _curvatures() -> torch.Tensor:
    samples = torch.tensor([[1.0, 2.0], [2.0, 1.0], [0.0, 2.0]], dtype=torch.float64)
    found: torch.Tensor = torch.linalg.eigvalsh(samples.T @ samples / 3)
    return found


def _largest_rate() -> float:
    return 2 / _curvatures()[-1].item()


def _steps(mu: float, smoothness: float) -> tuple[float, float]:
    root = math.sqrt(1 - mu / smoothness)
    return (1 - root) / mu, (1 + root) / smoothness


EXERCISES: dict[str, Exercise] = {
    "4.6.2-a": Exercise(
        solution=_largest_rate,
        mistakes=[
            (
                _largest_rate() / 2,
                "There descent in the most curved direction is fastest; it still converges.",
            ),
            (_largest_rate() / 3, "The loss is a mean over three samples, not a sum."),
            (
                2 / _curvatures()[0].item(),
                "There the least curved direction diverges; the most curved one did long before.",
            ),
        ],
    ),
    "4.6.2-b": Exercise(
        solution=lambda: _steps,
        mistakes=[
            (
                lambda mu, smoothness: (0.0, 2 / smoothness),
                "There descent converges; for short steps not as fast as printed.",
            ),
            (
                lambda mu, smoothness: (1 / smoothness, 1 / smoothness),
                "It holds there, and around there as well.",
            ),
            (
                lambda mu, smoothness: (1 / smoothness, 2 / (mu + smoothness)),
                "From 1/L to the best rate the factor even falls; look for where it is 1 - mu/L.",
            ),
            (
                lambda mu, smoothness: (1 / smoothness, (2 - mu / smoothness) / smoothness),
                "The gap is a square of the distance: its factor has to be at most 1 - mu/L.",
            ),
        ],
        probes=[(1.0, 5.0), (0.2, 3.0), (0.01, 1.0)],
        tolerance=1e-4,
    ),
    "4.6.2-c": Exercise(
        solution=lambda: 1.0,
        mistakes=[
            (2.0, "That is the mean, the minimum, where SGD would go."),
            (5.0, "The far number has one vote of three."),
            (0.0, "Below 1 two of the three numbers pull upward."),
            (2.5, "The middle between the extremes plays no part: count the votes at a point."),
        ],
    ),
}

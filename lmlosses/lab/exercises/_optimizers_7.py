"""Exercises of page 7 on optimizers and schedules."""

import math

import torch
from torch import Tensor

from lmlosses.lab.exercises._exercise import Exercise

STUDENT = 2.776  # 97.5 % point with four degrees of freedom


def _best_of_ten() -> float:
    """Expectation of the largest of ten standard normal numbers, by quadrature."""
    x = torch.linspace(-10, 10, 20_001, dtype=torch.float64)
    density = torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)
    below = torch.special.ndtr(x)
    return torch.trapezoid(x * 10 * density * below**9, x).item()


def _interval(values: Tensor, factor: float = STUDENT) -> Tensor:
    half = factor * values.std(dim=-1) / math.sqrt(values.shape[-1])
    return torch.stack([values.mean(dim=-1) - half, values.mean(dim=-1) + half], dim=-1)


def _paired(ours: Tensor, theirs: Tensor) -> Tensor:
    return _interval(ours - theirs)


def _unpaired(ours: Tensor, theirs: Tensor) -> Tensor:
    mean = ours.mean() - theirs.mean()
    half = STUDENT * ((ours.var() + theirs.var()) / len(ours)).sqrt()
    return torch.stack([mean - half, mean + half])


def _of_one(ours: Tensor, theirs: Tensor) -> Tensor:
    gaps = ours - theirs
    half = STUDENT * gaps.std()
    return torch.stack([gaps.mean() - half, gaps.mean() + half])


_OURS = torch.tensor([2.05, 2.11, 2.02, 2.09, 2.07], dtype=torch.float64)
_THEIRS = torch.tensor([2.06, 2.13, 2.02, 2.11, 2.09], dtype=torch.float64)

EXERCISES: dict[str, Exercise] = {
    "optimizers.7-a": Exercise(
        solution=_best_of_ten,
        mistakes=[
            (0.0, "That is one trial; the best of ten is better than the mean."),
            (1.3522, "That is the best of seven."),
            (1.2816, "That is the point with a tenth above it, not the mean of the best."),
        ],
        tolerance=0.01,
    ),
    "optimizers.7-b": Exercise(
        solution=lambda: _paired,
        mistakes=[
            (
                _unpaired,
                "Runs that share a seed share their luck: take differences first, pair by pair.",
            ),
            (
                lambda ours, theirs: _interval(ours - theirs, 1.96),
                "1.96 is for a spread that is known; from five runs it is 2.776.",
            ),
            (_of_one, "That is where a single run may fall; a mean of n spreads less."),
            (lambda ours, theirs: _paired(theirs, ours), "The sign is turned around."),
        ],
        probes=[(_OURS, _THEIRS), (_THEIRS + 0.01 * _OURS, _OURS.flip(0))],
    ),
    "optimizers.7-c": Exercise(
        solution=lambda: 400 / (310 * 1.4),
        mistakes=[
            (400 / 310, "That counts steps; each of them costs 1.4 times as much."),
            (310 * 1.4 / 400, "That is its time over AdamW's; how many times as fast is it?"),
            (400 * 1.4 / 310, "A step that costs more makes it slower, not faster."),
        ],
    ),
}

"""Exercises of page 4.6.4."""

import torch
from torch import Tensor

from lmlosses.lab.exercises._exercise import Exercise
from lmlosses.precision import clip_by_global_norm


def _clipped_too_early() -> float:
    weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    weight.grad = torch.full_like(weight, 0.5 * 1024)
    clip_by_global_norm(weight, max_norm=1.0)
    return weight.grad.item() / 1024


def _step_length(norm: Tensor, lr: float, max_norm: float) -> Tensor:
    return lr * norm.clamp(max=max_norm)


def _printed(norm: Tensor, lr: float, max_norm: float) -> Tensor:
    return (max_norm / norm).clamp(max=lr) * norm


def _scale_after(finite: list[bool], scale: float, interval: int) -> float:
    in_a_row = 0
    for all_finite in finite:
        in_a_row = in_a_row + 1 if all_finite else 0
        if not all_finite:
            scale /= 2
        elif in_a_row == interval:
            scale, in_a_row = 2 * scale, 0
    return scale


def _never_forgets(finite: list[bool], scale: float, interval: int) -> float:
    """The count of finite steps goes on through an overflow."""
    count = 0
    for all_finite in finite:
        count += all_finite
        if not all_finite:
            scale /= 2
        elif count % interval == 0:
            scale *= 2
    return scale


def _grows_ever_on(finite: list[bool], scale: float, interval: int) -> float:
    """The count is not set back after the factor has grown."""
    count = 0
    for all_finite in finite:
        count = count + 1 if all_finite else 0
        scale *= 0.5 if not all_finite else (2.0 if count >= interval else 1.0)
    return scale


def _only_shrinks(finite: list[bool], scale: float, interval: int) -> float:
    return scale * 0.5 ** finite.count(False)


_Y, _N = True, False

EXERCISES: dict[str, Exercise] = {
    "4.6.4-a": Exercise(
        solution=_clipped_too_early,
        mistakes=[
            (0.5, "That is what should be left: 0.5 is below the bound. But 512 is not."),
            (1.0, "That is the norm after clipping; it is still to be divided by S."),
            (0.5 / 1024, "The clipped gradient has norm 1, not 0.5."),
        ],
        tolerance=1e-5,
    ),
    "4.6.4-b": Exercise(
        solution=lambda: _step_length,
        mistakes=[
            (_printed, "That is the textbook's rate, which compares a rate with a plain number."),
            (
                lambda norm, lr, max_norm: lr * (max_norm / norm).clamp(max=1.0),
                "That is the effective rate; the length of the step is the rate times the norm.",
            ),
            (
                lambda norm, lr, max_norm: lr * max_norm * torch.ones_like(norm),
                "A gradient shorter than the bound is left as it is.",
            ),
        ],
        probes=[
            (torch.tensor([0.1, 1.0, 3.0, 50.0]), 0.1, 2.0),
            (torch.tensor([0.5, 8.0]), 3.0, 1.0),
        ],
    ),
    "4.6.4-c": Exercise(
        solution=lambda: _scale_after,
        mistakes=[
            (_never_forgets, "An overflow ends the row of finite steps: the count starts again."),
            (_grows_ever_on, "After the factor has grown, the count starts again."),
            (_only_shrinks, "After enough finite steps in a row the factor doubles."),
        ],
        probes=[
            ([_Y, _Y, _N, _Y], 1024.0, 3),
            ([_Y] * 8, 16.0, 2),
            ([_N, _N, _Y, _Y, _N, _Y, _Y, _Y, _Y], 256.0, 4),
            ([], 2.0, 5),
        ],
    ),
}

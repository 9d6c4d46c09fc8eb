"""Exercises of page 3 on optimizers and schedules."""

import torch
from torch import Tensor

from lmlosses.lab.exercises._exercise import Exercise


def _steps_in_the_old_direction() -> int:
    return sum(2 * 0.9 * 0.99 ** (k - 1) > 1 for k in range(1, 1000))


def _way(mean: Tensor, noise: Tensor, batch: Tensor) -> Tensor:
    return (mean / noise * (batch / 2).sqrt()).erf()


def _ends(minimum: Tensor, weight_decay: float) -> Tensor:
    return minimum.clamp(-1 / weight_decay, 1 / weight_decay)


EXERCISES: dict[str, Exercise] = {
    "optimizers.3-a": Exercise(
        solution=_steps_in_the_old_direction,
        mistakes=[
            (
                69,
                "The memory changes its sign after 69; the step looks at the newest gradient too.",
            ),
            (58, "Count the first of these steps too: it sees the memory as it was."),
            (60, "The sixtieth goes the new way already."),
            (1, "A sign remembers: c holds nine tenths of the memory."),
            (7, "That is a memory with the rate 0.9; Lion's has 0.99."),
        ],
    ),
    "optimizers.3-b": Exercise(
        solution=lambda: _way,
        mistakes=[
            (
                lambda mean, noise, batch: (1 + _way(mean, noise, batch)) / 2,
                "That is the probability of a right sign; wrong ones lead back.",
            ),
            (
                lambda mean, noise, batch: _way(mean, noise, batch**2),
                "The noise of a mean falls like the root of the batch.",
            ),
            (
                lambda mean, noise, batch: torch.special.erf(mean / noise * batch.sqrt()),
                "erf(x) belongs to a noise of one over the root of two.",
            ),
            (
                lambda mean, noise, batch: mean + 0 * noise * batch,
                "That is the step of gradient descent; a sign forgets the size.",
            ),
        ],
        probes=[
            (torch.tensor([0.1, 0.5]), torch.tensor([1.0, 2.0]), torch.tensor([4.0, 64.0])),
            (torch.tensor(0.02), torch.tensor(1.0), torch.tensor(1000.0)),
        ],
    ),
    "optimizers.3-c": Exercise(
        solution=lambda: _ends,
        mistakes=[
            (
                lambda minimum, weight_decay: minimum / (1 + weight_decay),
                "That is where an L2 penalty leads; here the decay is not part of the gradient.",
            ),
            (
                lambda minimum, weight_decay: minimum,
                "The decay pulls as hard as a sign where a weight is one over it.",
            ),
            (
                lambda minimum, weight_decay: minimum.clamp(-weight_decay, weight_decay),
                "More decay makes the box smaller: its side is the reciprocal.",
            ),
        ],
        probes=[
            (torch.tensor([0.2, -0.3, 2.0, -5.0]), 4.0),
            (torch.tensor([0.2, -0.3, 2.0, -5.0]), 0.5),
        ],
    ),
}  # fmt: skip

"""Exercises of page 8 on optimizers and schedules."""

import math

from lmlosses.lab.exercises._exercise import Exercise


def _saved(beside: float) -> float:
    return 4 / (beside + 8)


def _rest(a: float, s: float, decay: float) -> float:
    return a / (a + s * decay)


EXERCISES: dict[str, Exercise] = {
    "optimizers.8-a": Exercise(
        solution=lambda: (1 - 0.02) / (1 - 1 / 3),
        mistakes=[
            ((1 / 3) / 0.02, "That compares the probabilities; the gradient is what they lack."),
            (
                (1 - 1 / 3) / (1 - 0.02),
                "That is the other way round: the wrong model's is larger.",
            ),
            (0.98 / 0.5, "That would be for two classes; a third each is left here."),
            (1.0, "They differ: only the probability of the target counts."),
            (math.log(50) / math.log(3), "That compares the losses, not the gradients."),
        ],
    ),
    "optimizers.8-b": Exercise(
        solution=lambda: _saved,
        mistakes=[
            (lambda beside: 0.5, "That is the share of the state alone."),
            (lambda beside: 1 / 3, "That is right for four bytes beside the state only."),
            (
                lambda beside: 4 / (beside + 4),
                "Divide by what AdamW holds, not by what Lion does.",
            ),
            (lambda beside: (beside + 4) / (beside + 8), "That is the share that is left."),
        ],
        probes=[(0.0,), (4.0,), (8.0,), (40.0,)],
    ),
    "optimizers.8-c": Exercise(
        solution=lambda: _rest,
        mistakes=[
            (
                lambda a, s, decay: a / (a + decay),
                "That is where Adam with L2 rests; here the gradient alone is divided by s.",
            ),
            (
                lambda a, s, decay: s * decay / (a + s * decay),
                "That is how far it stays from 1.",
            ),
            (
                lambda a, s, decay: a / (a + decay / s),
                "More noise weakens the gradient, not the decay.",
            ),
        ],
        probes=[(0.5, 1.0, 0.5), (0.5, 4.0, 0.5), (2.0, 10.0, 0.1)],
    ),
}

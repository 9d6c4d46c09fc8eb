"""Exercises of page 6 on optimizers and schedules."""

import math

from lmlosses.lab.exercises._exercise import Exercise
from lmlosses.schedules import cosine, linear


def _last_step() -> float:
    return 1e6 * cosine(total_steps=1000)(999)


def _distance() -> float:
    plateau_and_decay = 0.9 + 0.1 * linear(total_steps=2)(1)
    return plateau_and_decay / cosine(total_steps=2)(1)


def _noisy_step(step: int, beta: float) -> float:
    kept = beta**step
    return math.sqrt((1 - beta) / (1 + beta) * (1 + kept) / (1 - kept))


EXERCISES: dict[str, Exercise] = {
    "optimizers.6-a": Exercise(
        solution=_last_step,
        mistakes=[
            (0.0, "That is step 1000, the first that is not taken. The last one is step 999."),
            (1e3, "That is a straight line's. The cosine is level at its end."),
            (4 * _last_step(), "Two steps before the end; count from 0."),
        ],
    ),
    "optimizers.6-b": Exercise(
        solution=_distance,
        mistakes=[
            (0.95 - 0.5, "That is the difference, as a share of the peak; the ratio is asked."),
            (1.8, "The decay moves the weights too: half as far as the plateau would."),
            (2.0, "That is a rate that never decays."),
            (1 / 1.9, "Turned around: WSD goes further."),
        ],
    ),
    "optimizers.6-c": Exercise(
        solution=lambda: _noisy_step,
        mistakes=[
            (
                lambda step, beta: math.sqrt((1 - beta) / (1 + beta)),
                "That is where it settles after many steps.",
            ),
            (
                lambda step, beta: math.sqrt((1 - beta) / (1 + beta) * (1 - beta ** (2 * step))),
                "That is the length without the bias correction: divide by one minus beta to "
                "the power of the step.",
            ),
            (
                lambda step, beta: _noisy_step(step + 1, beta),
                "Count the steps from 1: the first one has length 1.",
            ),
        ],
        probes=[(1, 0.9), (2, 0.9), (10, 0.95), (500, 0.8)],
    ),
}

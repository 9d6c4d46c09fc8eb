"""Exercises of page 4.3.2."""

import math

from lmlosses.lab.exercises._exercise import Exercise


def _sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


def _inflection() -> float:
    """Where the curvature of (1 - σ(z))² changes its sign, by bisection, as a probability."""

    def loss(z: float) -> float:
        return (1 - _sigmoid(z)) ** 2

    low, high, step = -5.0, 2.0, 1e-3
    for _ in range(60):
        middle = (low + high) / 2
        bends_down = loss(middle + step) + loss(middle - step) < 2 * loss(middle)
        low, high = (middle, high) if bends_down else (low, middle)
    return _sigmoid(low)


def _curvature(share: float) -> float:
    """Curvature at the minimizer, where the model's probability is the share of right labels."""
    return share * (1 - share)


def _regularized_minimizer() -> float:
    """The root of 0.1 w = σ(-w), by bisection."""
    low, high = 0.0, 10.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if 0.1 * middle < _sigmoid(-middle) else (low, middle)
    return low


def _escape_time(start: float) -> float:
    """The integral of 1 / (ŷ (1 - ŷ)²) over the logit, from the start to 0."""
    growing, decaying = math.exp(-start), math.exp(start)
    return growing - 1 - 3 * start + 3 * (1 - decaying) + (1 - decaying**2) / 2


EXERCISES: dict[str, Exercise] = {
    "4.3.2-a": Exercise(
        solution=_inflection,
        mistakes=[
            (0.5, "At ½ the sigmoid bends the other way; the loss squares it and bends earlier."),
            (-math.log(2), "That is the logit of the place; the question asks for the output."),
            (2 / 3, "That is the error 1 - ŷ at the place."),
        ],
    ),
    "4.3.2-b": Exercise(
        solution=lambda: _curvature,
        mistakes=[
            (lambda share: 0.25, "That is the curvature at w = 0. Where is the minimizer?"),
            (
                lambda share: (1 - 2 * share) ** 2 / 4,
                "Yours grows as the classes separate. What is it when half the labels are wrong?",
            ),
            (
                lambda share: math.log(1 / share - 1),
                "That is where the minimizer stands, not how curved the loss is there.",
            ),
        ],
        probes=[(0.5,), (0.3,), (0.1,), (0.01,)],
    ),
    "4.3.2-c": Exercise(
        solution=_regularized_minimizer,
        mistakes=[
            (math.inf, "That is the answer without the penalty."),
            (0.0, "The penalty alone would stop there; at 0 the data still pull with slope ½."),
            (math.log(9), "The penalty is not a wrong label: its pull grows with w."),
        ],
    ),
    "4.3.2-d": Exercise(
        solution=lambda: _escape_time,
        mistakes=[
            (
                lambda start: 1 - start - math.exp(start),
                "That is the time cross-entropy needs. What is the squared error's slope?",
            ),
            (
                lambda start: math.exp(-start),
                "Right for starts far out; near 0 the other terms of the integral count.",
            ),
        ],
        probes=[(-1.0,), (-3.0,), (-8.0,)],
        tolerance=0.02,
    ),
}

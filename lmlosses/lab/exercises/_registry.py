"""All exercises by name, collected from one module a page, and the check that pages call."""

from typing import Any

from lmlosses.lab.exercises import (
    _4_3_1,
    _4_3_2,
    _4_3_3,
    _4_3_4,
    _4_3_5,
    _4_4_1,
    _4_4_2,
    _4_4_3,
    _4_4_4,
    _4_4_5,
    _4_5_1,
    _4_5_2,
    _4_5_3,
    _4_5_4,
    _4_5_5,
    _4_5_6,
    _4_6_1,
    _4_6_2,
    _4_6_3,
    _4_6_4,
    _4_6_5,
    _optimizers_1,
    _optimizers_2,
    _optimizers_3,
    _optimizers_4,
    _optimizers_5,
    _optimizers_6,
    _optimizers_7,
    _optimizers_8,
)
from lmlosses.lab.exercises._exercise import Exercise, WrongAnswer

EXERCISES: dict[str, Exercise] = {
    name: exercise
    for page in (
        *(_4_3_1, _4_3_2, _4_3_3, _4_3_4, _4_3_5),
        *(_4_4_1, _4_4_2, _4_4_3, _4_4_4, _4_4_5),
        *(_4_5_1, _4_5_2, _4_5_3, _4_5_4, _4_5_5, _4_5_6),
        *(_4_6_1, _4_6_2, _4_6_3, _4_6_4, _4_6_5),
        *(_optimizers_1, _optimizers_2, _optimizers_3, _optimizers_4),
        *(_optimizers_5, _optimizers_6, _optimizers_7, _optimizers_8),
    )
    for name, exercise in page.EXERCISES.items()
}


def check(name: str, answer: Any) -> None:
    """Compare an answer with the solution of an exercise.

    Prints a line when the answer is right.

    Args:
        name: The exercise, for example ``"4.3.1-a"``.
        answer: What you found.

    Raises:
        KeyError: If there is no such exercise.
        WrongAnswer: If the answer is missing or wrong; likely mistakes get a hint.

    Example:
        >>> from lmlosses.lab import exercises
        >>> exercises.check("4.3.1-a", None)
        Traceback (most recent call last):
            ...
        lmlosses.lab.exercises._exercise.WrongAnswer: 4.3.1-a: no answer yet
    """
    if name not in EXERCISES:
        raise KeyError(f"no exercise {name!r}; there are {', '.join(sorted(EXERCISES))}")
    exercise = EXERCISES[name]
    if answer is None:
        raise WrongAnswer(f"{name}: no answer yet")
    if exercise.agrees(answer, exercise.solution()):
        print(f"{name}: right.")
        return
    for mistake, hint in exercise.mistakes:
        if exercise.agrees(answer, mistake):
            raise WrongAnswer(f"{name}: not yet. {hint}")
    raise WrongAnswer(f"{name}: not yet.")

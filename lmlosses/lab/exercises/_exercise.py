"""What an exercise is, and when an answer agrees with its solution."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch


class WrongAnswer(ValueError):
    """The answer is missing or not right; the message says what can be said without telling."""


@dataclass(frozen=True)
class Exercise:
    """A question with one right answer and the wrong ones that people give.

    Attributes:
        solution: Computes the right answer: a number, a tensor, a string, a truth value, or a
            function that is compared on ``probes``.
        mistakes: Likely wrong answers, each with the hint that it earns.
        probes: Arguments on which an answer that is a function is called, one tuple a call.
        tolerance: Largest absolute or relative difference that counts as equal.
    """

    solution: Callable[[], Any]
    mistakes: Sequence[tuple[Any, str]]
    probes: Sequence[tuple[Any, ...]] = ()
    tolerance: float = 1e-3

    def agrees(self, answer: Any, with_: Any) -> bool:
        """Whether two answers are the same to the exercise's tolerance."""
        if self.probes:
            if not callable(answer):
                return False
            return all(
                _close(answer(*probe), with_(*probe), self.tolerance) for probe in self.probes
            )
        return _close(answer, with_, self.tolerance)


def _close(answer: Any, expected: Any, tolerance: float) -> bool:
    if isinstance(expected, bool | str):
        return type(answer) is type(expected) and answer == expected
    try:
        given = torch.as_tensor(answer, dtype=torch.float64).detach()
    except (TypeError, ValueError, RuntimeError):
        return False
    wanted = torch.as_tensor(expected, dtype=torch.float64).detach()
    return given.shape == wanted.shape and bool(
        torch.isclose(given, wanted, rtol=tolerance, atol=tolerance).all()
    )

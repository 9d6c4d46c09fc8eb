"""Exercises that say whether an answer is right, and why a likely wrong one is not."""

from lmlosses.lab.exercises._exercise import Exercise, WrongAnswer
from lmlosses.lab.exercises._registry import EXERCISES, check

__all__ = ["EXERCISES", "Exercise", "WrongAnswer", "check"]

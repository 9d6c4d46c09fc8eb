"""Exercises of page 4.3.2."""

from lmlosses.lab.exercises._exercise import Exercise

EXERCISES: dict[str, Exercise] = {}

"""Exercises of page 4.3.4."""

from lmlosses.lab.exercises._exercise import Exercise

EXERCISES: dict[str, Exercise] = {}

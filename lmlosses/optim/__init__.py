"""Optimizers: one file an algorithm, each its paper's update rule on one common base."""

from lmlosses.optim.adam import Adam

__all__ = ["Adam"]

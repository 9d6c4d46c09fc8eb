"""Losses, optimizers and schedules of language models, each equation checked."""

from lmlosses.device import cpu_generator, default_device
from lmlosses.reductions import (
    fixed_length_mean,
    masked_sum,
    sequence_mean,
    token_mean,
    weighted_mean,
)

__all__ = [
    "cpu_generator",
    "default_device",
    "fixed_length_mean",
    "masked_sum",
    "sequence_mean",
    "token_mean",
    "weighted_mean",
]

"""Exercises of page 4.4.2."""

import math

import torch
from torch import Tensor

from lmlosses.lab.exercises._exercise import Exercise
from lmlosses.losses.contrastive import mutual_information_bound


def _certified_bits() -> float:
    nats = mutual_information_bound(torch.tensor(1.2, dtype=torch.float64), candidates=256)
    return nats.item() / math.log(2)


def _best_scores(joint: Tensor) -> Tensor:
    return (joint / (joint.sum(dim=1, keepdim=True) * joint.sum(dim=0))).log()


def _of_two(symbols: float) -> float:
    return (1 - 1 / symbols) * math.log(2)


_JOINT = torch.tensor([[0.3, 0.1, 0.1], [0.1, 0.1, 0.3]])

EXERCISES: dict[str, Exercise] = {
    "4.4.2-a": Exercise(
        solution=_certified_bits,
        mistakes=[
            (math.log(256) - 1.2, "That is in nats; bits were asked for."),
            (
                (math.log(255) - 1.2) / math.log(2),
                "The positive is a candidate too: there are 256.",
            ),
            (8 - 1.2, "The loss is in nats, the logarithm of 256 in bits: convert both."),
            ((math.log(256) - 1.2) * math.log(2), "A bit is less than a nat: divide."),
            (1.2 / math.log(2), "That is the loss, in bits."),
        ],
        tolerance=1e-4,
    ),
    "4.4.2-b": Exercise(
        solution=lambda: _best_scores,
        mistakes=[
            (lambda joint: joint.log(), "That still knows how common each query and key is."),
            (
                lambda joint: (joint / joint.sum(dim=1, keepdim=True)).log(),
                "That is the probability of a key given the query: a popular key would score "
                "high with every query, and the negatives are popular too.",
            ),
            (
                lambda joint: (joint / joint.sum(dim=0)).log(),
                "That differs by a number for each query, log p(q). As scores it is just as "
                "good, but here c(q) is 0.",
            ),
            (lambda joint: -_best_scores(joint), "With the sign turned around."),
        ],
        probes=[(_JOINT,), (torch.tensor([[0.1, 0.2], [0.3, 0.4]]),)],
    ),
    "4.4.2-c": Exercise(
        solution=lambda: _of_two,
        mistakes=[
            (lambda symbols: math.log(symbols), "That is the truth, which two candidates hide."),
            (lambda symbols: math.log(2), "That is the ceiling; sometimes the two are equal."),
            (
                lambda symbols: math.log(2) - math.log(1 + 1 / symbols),
                "The expectation of a logarithm is not the logarithm of the expectation.",
            ),
            (lambda symbols: math.log(2) / symbols, "That is what is missing from log 2."),
        ],
        probes=[(2.0,), (10.0,), (100.0,)],
    ),
}

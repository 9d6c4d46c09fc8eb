"""Time two ways of doing one thing, interleaved, and give their ratio."""

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any


def ratio(ours: Callable[[], Any], theirs: Callable[[], Any], *, rounds: int = 25) -> float:
    """Median over rounds of our process time divided by theirs, measured in pairs.

    Each round runs both, in alternating order, so that a slow moment of the machine hits both.
    """
    for warm_up in (ours, theirs):
        warm_up()
    quotients = []
    gc.disable()
    try:
        for position in range(rounds):
            pair = (ours, theirs) if position % 2 else (theirs, ours)
            seconds = {}
            for way in pair:
                start = time.process_time()
                way()
                seconds[way] = time.process_time() - start
            quotients.append(seconds[ours] / seconds[theirs])
    finally:
        gc.enable()
    return statistics.median(quotients)

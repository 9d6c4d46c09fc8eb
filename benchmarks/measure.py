"""Time several ways of doing one thing, interleaved; measure the memory of each by itself."""

import gc
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]


def _clock(device: str) -> Callable[[], float]:
    """Process seconds; on a GPU wall seconds, when it is done."""
    if not device.startswith("cuda"):
        return time.process_time

    def clock() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return clock


def seconds(
    ways: dict[str, Callable[[], Any]],
    *,
    rounds: int = 25,
    warm_up: bool = True,
    device: str = "cpu",
) -> dict[str, list[float]]:
    """Seconds that each way takes, round by round.

    Each round runs all of them, every other round in reverse, so that a slow moment of the
    machine hits all.
    """
    clock = _clock(device)
    found: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values() if warm_up else ():
        way()
    gc.collect()
    gc.disable()
    try:
        for position in range(rounds):
            for name in list(ways) if position % 2 else list(ways)[::-1]:
                start = clock()
                ways[name]()
                found[name].append(clock() - start)
    finally:
        gc.enable()
    return found


def median_ratio(ours: list[float], theirs: list[float]) -> float:
    """Median over rounds of one time divided by another."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def ratio(ours: Callable[[], Any], theirs: Callable[[], Any], *, rounds: int = 25) -> float:
    """Median over rounds of our process time divided by theirs, measured in pairs."""
    found = seconds({"ours": ours, "theirs": theirs}, rounds=rounds)
    return median_ratio(found["ours"], found["theirs"])


def peak(prepare: Callable[[], Callable[[], Any]], *, device: str = "cpu") -> int:
    """Bytes held at the worst moment of a step beyond what its preparation left behind.

    On a processor this is resident memory, and a process is good for one measurement only: what
    an earlier step left with the allocator would not be counted.
    """
    step = prepare()
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated() - before)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    step()
    return resident("VmHWM") - before


def resident(field: str) -> int:
    """Bytes of this process that are in memory (``VmRSS``), or were at most (``VmHWM``)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in /proc/self/status: this measurement needs Linux")


def in_new_process(module: str, *arguments: str) -> str:
    """Run a module of the benchmarks by itself and give what it prints."""
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[2:])} failed:\n{done.stderr}")
    return done.stdout.strip()

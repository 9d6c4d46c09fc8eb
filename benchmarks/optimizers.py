"""Time of an optimizer's step, as a ratio to moving the bytes that it has to move.

The floor is an in-place multiplication of the same tensors, which reads and writes 4 bytes an
entry; a step that moves 28 bytes an entry cannot take less than 3.5 of them where memory is what
it waits for.
"""

import gc
from collections.abc import Callable
from typing import Any, NamedTuple

import lion_pytorch
import pytorch_optimizer
import schedulefree
import torch

from benchmarks.measure import median_ratio, seconds
from lmlosses import optim

Parameters = list[torch.nn.Parameter]
Make = Callable[[Parameters], torch.optim.Optimizer]


class Case(NamedTuple):
    """One optimizer: bytes that a step moves per entry, our forms, and what others do."""

    bytes: int
    ours: dict[str, Make]
    peers: dict[str, Make]


def parameters(matrices_only: bool = False, scale: int = 1, device: str = "cpu") -> Parameters:
    """Those of a language model of 20 million weights, with gradients."""
    generator = torch.Generator().manual_seed(0)
    width = 512 // scale
    layer = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
    shapes: list[tuple[int, ...]] = [(16 * width, width), *layer * 5]
    if not matrices_only:
        shapes += [(width,)] * 24
    drawn = [torch.randn(shape, generator=generator).to(device) for shape in shapes]
    found = [torch.nn.Parameter(value * 0.02) for value in drawn]
    for parameter, value in zip(found, drawn, strict=True):
        parameter.grad = value.flip(0) * 0.01
    return found


def three_ways(cls: Any, **settings: Any) -> dict[str, Make]:
    return {
        "eager": lambda p: cls(p, lr=1e-6, **settings),
        "compiled": lambda p: cls(p, lr=1e-6, compiled=True, **settings),
    }


def fused(cls: Any, **settings: Any) -> dict[str, Make]:
    return three_ways(cls, **settings) | {
        "fused": lambda p: cls(p, lr=1e-6, fused=True, **settings)
    }


def peer(cls: Any, **settings: Any) -> Make:
    return lambda p: cls(p, lr=1e-6, **settings)


def sophia(compiled: bool) -> Make:
    """With a curvature that never ages; what it costs to estimate is not the step's."""

    def make(p: Parameters) -> torch.optim.Optimizer:
        optimizer = optim.SophiaG(p, lr=1e-6, update_every=10**9, compiled=compiled)
        slope = sum((q * q.grad).sum() for q in p)
        optimizer.update_curvature(torch.stack([slope, -slope])[None], retain_graph=False)
        return optimizer

    return make


def their_sophia(p: Parameters) -> torch.optim.Optimizer:
    """The same step behind another estimate, which is given here and then never renewed."""
    optimizer = pytorch_optimizer.SophiaH(p, lr=1e-6, update_period=10**9)
    optimizer.step(hessian=[torch.zeros_like(q) if q.grad is None else q.grad**2 for q in p])
    return optimizer


def free(cls: Any, **settings: Any) -> Make:
    def make(p: Parameters) -> torch.optim.Optimizer:
        optimizer = cls(p, lr=1e-6, **settings)
        optimizer.train()
        return optimizer

    return make


def elementwise() -> dict[str, Case]:
    """Optimizers in which no entry looks at another."""
    theirs, other = torch.optim, pytorch_optimizer
    cautious = optim.cautious(optim.AdamW)
    return {
        "SGD, momentum": Case(20, fused(optim.SGD, momentum=0.9), {
            "torch, fused": peer(theirs.SGD, momentum=0.9, fused=True),
            "torch, loop": peer(theirs.SGD, momentum=0.9, foreach=False),
        }),
        "Adagrad": Case(20, fused(optim.Adagrad), {
            "torch, fused": peer(theirs.Adagrad, fused=True),
            "torch, loop": peer(theirs.Adagrad, foreach=False),
        }),
        "Adam": Case(28, fused(optim.Adam), {
            "torch, fused": peer(theirs.Adam, fused=True),
            "torch, loop": peer(theirs.Adam, foreach=False),
        }),
        "AdamW": Case(28, fused(optim.AdamW), {
            "torch, fused": peer(theirs.AdamW, fused=True),
            "torch, loop": peer(theirs.AdamW, foreach=False),
            "torch, foreach": peer(theirs.AdamW, foreach=True),
        }),
        "SignSGD, momentum": Case(20, three_ways(optim.SignSGD, momentum=0.9), {
            "pytorch_optimizer": peer(other.SignSGD, momentum=0.9),
        }),
        "RMSprop": Case(20, three_ways(optim.RMSprop), {
            "torch, loop": peer(theirs.RMSprop, foreach=False),
        }),
        "Lion": Case(20, three_ways(optim.Lion), {
            "lion_pytorch": peer(lion_pytorch.Lion),
            "pytorch_optimizer": peer(other.Lion),
        }),
        "SophiaG": Case(24, {"eager": sophia(False), "compiled": sophia(True)}, {
            "pytorch_optimizer, SophiaH": their_sophia,
        }),
        "ADOPT": Case(28, three_ways(optim.ADOPT), {
            "pytorch_optimizer": peer(other.ADOPT),
        }),
        "Schedule-Free AdamW": Case(
            28,
            {
                "eager": free(optim.ScheduleFreeAdamW),
                "compiled": free(optim.ScheduleFreeAdamW, compiled=True),
            },
            {"schedulefree": free(schedulefree.AdamWScheduleFree, foreach=False)},
        ),
        "cautious AdamW": Case(28, three_ways(cautious), {}),  # no peer is at hand
    }  # fmt: skip


def of_matrices() -> dict[str, Case]:
    """Optimizers that multiply matrices; a floor of bytes says nothing about them."""
    bfloat16 = {"ns_dtype": torch.bfloat16}
    return {
        "Muon": Case(0, {"float32": peer(optim.Muon, ns_dtype=torch.float32),
                         "bfloat16": peer(optim.Muon, **bfloat16)},
                     {"torch, bfloat16": peer(torch.optim.Muon)}),
        "SOAP": Case(0, {"eager": peer(optim.SOAP)}, {
            "pytorch_optimizer": peer(pytorch_optimizer.SOAP),
        }),
        "Adafactor": Case(0, {"eager": peer(optim.Adafactor)}, {
            "torch, loop": peer(torch.optim.Adafactor, foreach=False),
        }),
    }  # fmt: skip


def measure(
    name: str, case: Case, *, rounds: int, threads: int, **shape: Any
) -> list[dict[str, Any]]:
    """Every way in turns, and the floor beside them in the same rounds."""
    torch.set_num_threads(threads)
    held = parameters(**shape)
    makes = case.ours | case.peers
    steps: dict[str, Callable[[], Any]] = {}
    for way, make in makes.items():
        steps[way] = make(held).step
        steps[way]()  # compiles, where it compiles
        steps[way]()
    values = [p.detach() for p in held]

    def floor() -> None:
        for value in values:
            value.mul_(1.0)

    found = seconds({**steps, "floor": floor}, rounds=rounds, device=shape.get("device", "cpu"))
    return compared(name, case, found)


def compared(name: str, case: Case, found: dict[str, list[float]]) -> list[dict[str, Any]]:
    """One row a way: its time in floors, and beside the fastest peer of its kind."""
    rows = []
    for way in case.ours | case.peers:
        row: dict[str, Any] = {"optimizer": name, "way": way}
        if case.bytes:
            row["floors"] = round(median_ratio(found[way], found["floor"]) / (case.bytes / 8), 2)
        rivals = [peer for peer in case.peers if "fused" not in peer or "fused" in way]
        if way not in case.peers and rivals:
            row["against"] = min(rivals, key=lambda peer: sum(found[peer]))
            row["ratio"] = round(median_ratio(found[way], found[row["against"]]), 2)
        rows.append(row)
    return rows


def beside(
    rows: list[dict[str, Any]], later: list[dict[str, Any]], suffix: str
) -> list[dict[str, Any]]:
    """Rows with what another measurement of the same ways gave, under names of its own."""
    found = {(row["optimizer"], row["way"]): row for row in later}
    added = []
    for row in rows:
        other = found.get((row["optimizer"], row["way"]), {})
        keys = [key for key in ("floors", "ratio") if key in row]
        known = {f"{key}_{suffix}": row.get(f"{key}_{suffix}") for key in keys}
        added.append(row | known | {f"{key}_{suffix}": other[key] for key in keys if key in other})
    return added


def rows(*, full: bool, device: str = "cpu") -> list[dict[str, Any]]:
    """Every optimizer with one thread; with ``full`` with two as well, and more rounds."""
    before = torch.get_num_threads()
    found: dict[int, list[dict[str, Any]]] = {1: [], 2: []}
    for threads in (1, 2) if full and device == "cpu" else (1,):
        for name, case in (elementwise() | of_matrices()).items():
            settings: dict[str, Any] = {"device": device, "matrices_only": not case.bytes}
            if name == "SOAP":  # its eigenvectors of the full shapes would take minutes
                settings["scale"] = 2
            rounds = (15 if full else 5) if case.bytes else (5 if full else 2)
            found[threads] += measure(name, case, rounds=rounds, threads=threads, **settings)
            gc.collect()
    torch.set_num_threads(before)
    return beside(found[1], found[2], "two")


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text, one line each."""
    lines = [f"{'optimizer':22} {'way':28} {'floors':>7} {'ratio':>6}  against"]
    for row in rows:
        floors, ratio = (f"{row[key]:.2f}" if key in row else "" for key in ("floors", "ratio"))
        lines.append(
            f"{row['optimizer']:22} {row['way']:28} {floors:>7} {ratio:>6}  "
            f"{row.get('against', '')}"
        )
    return "\n".join(lines)

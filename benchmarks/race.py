"""A race of optimizers on a small language model, each tuned over the same number of trials.

python -m benchmarks.race            three quarters of an hour on one thread
python -m benchmarks.race_results    summarize and draw what is stored

Every run is a line of ``results/race.jsonl`` as soon as it ends, and one that stands there is not
run again: an interrupted race goes on where it stopped. What the lines say is told by
`benchmarks.race_results`.
"""

import argparse
import copy
import json
import math
import multiprocessing
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.measure import median_ratio, seconds
from lmlosses import cpu_generator, optim, schedules, token_mean
from lmlosses.lab.text import batches, shakespeare, windows
from lmlosses.lab.transformer import TinyTransformer
from lmlosses.losses.next_token import causal_lm_loss, next_tokens
from lmlosses.optim import groups

RESULTS = Path(__file__).parent / "results"
RUNS = RESULTS / "race.jsonl"

MODEL = {"dim": 64, "layers": 2, "heads": 4}
STEPS, BATCH, LENGTH, WARMUP = 400, 16, 64, 20
TRIALS, SEEDS = 7, 5
DECAY = 0.1  # of AdamW; what steps k times shorter decays k times as much
ANYTIME = (100, 200, 400)  # steps after which a stable phase is left
COOLDOWN = 0.2  # the share of a run that its decay takes
BATCHES, BATCH_STEPS = (4, 16, 64), 160
HALVED = ("AdamW", "SophiaG", "Muon", "SOAP")  # raced over half the steps as well
SAME_PACE = 0.05  # steps whose cost differs by less take the same time

Make = Callable[[TinyTransformer, float], torch.optim.Optimizer]


class Entrant(NamedTuple):
    """An optimizer with the learning rate in the middle of its grid."""

    make: Make
    middle: float
    schedule: str = "cosine"


def _all(cls: Any, **settings: Any) -> Make:
    """All parameters alike, but for the decay, which vectors are spared."""

    def make(model: TinyTransformer, lr: float) -> torch.optim.Optimizer:
        decay = settings.get("weight_decay", DECAY)
        rest = {name: value for name, value in settings.items() if name != "weight_decay"}
        return cls(groups.decay_groups(model, weight_decay=decay), lr=lr, **rest)

    return make


BETAS = (0.9, 0.95)


def _muon(model: TinyTransformer, lr: float) -> torch.optim.Optimizer:
    """Matrices of the layers by Muon, the rest by AdamW, both at one rate."""
    hidden = [p for p in model.layers.parameters() if p.ndim == 2]
    inside = {id(p) for p in hidden}
    rest = [p for p in model.parameters() if id(p) not in inside]
    companion = {"companion": True, "lr": lr, "betas": BETAS, "weight_decay": DECAY}
    return optim.Muon(
        [{"params": hidden}, {"params": rest, **companion}],
        lr=lr, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw",
    )  # fmt: skip


ENTRANTS = {
    "SGD": Entrant(_all(optim.SGD, momentum=0.9, weight_decay=1e-4), 0.3),
    "Adafactor": Entrant(_all(optim.Adafactor), 0.06),
    "AdamW": Entrant(_all(optim.AdamW, betas=BETAS), 0.012),
    "AdamW, WSD": Entrant(_all(optim.AdamW, betas=BETAS), 0.012, "wsd"),
    "cautious AdamW": Entrant(_all(optim.cautious(optim.AdamW), betas=BETAS), 0.016),
    "ADOPT": Entrant(_all(optim.ADOPT, betas=BETAS, decouple=True), 0.012),
    "Schedule-Free": Entrant(_all(optim.ScheduleFreeAdamW, betas=BETAS), 0.016, "warmup"),
    "Lion": Entrant(_all(optim.Lion, weight_decay=3 * DECAY), 0.004),
    # gamma such that a tenth to a quarter of the entries are not clipped; an average of
    # estimates as short as the run
    "SophiaG": Entrant(_all(optim.SophiaG, betas=(0.96, 0.9), gamma=0.3), 0.004),
    "Muon": Entrant(_muon, 0.048),
    "SOAP": Entrant(_all(optim.SOAP), 0.016),
}


def grid(name: str) -> list[float]:
    """Rates that are tried, each twice the one before."""
    middle = ENTRANTS[name].middle
    return [middle * 2.0 ** (k - TRIALS // 2) for k in range(TRIALS)]


def schedule(kind: str, steps: int) -> Callable[[int], float]:
    """Factor of the rate at each step; all climb alike."""
    warmup = min(WARMUP, steps // 5)
    if kind == "cosine":
        return schedules.warmup_cosine(warmup_steps=warmup, total_steps=steps)
    if kind == "wsd":
        down = round(COOLDOWN * steps)
        return schedules.wsd(warmup_steps=warmup, decay_steps=down, total_steps=steps)
    return schedules.warmup(warmup_steps=warmup)


class Run:
    """A model in training; everything it does follows from its settings and its seed."""

    def __init__(self, name: str, lr: float, seed: int, *, batch: int = BATCH) -> None:
        self.model = TinyTransformer(256, **MODEL, generator=cpu_generator(1000 + seed))
        self.optimizer = ENTRANTS[name].make(self.model, lr)
        text = shakespeare()
        self.places, self.draws = cpu_generator(2000 + seed), cpu_generator(3000 + seed)
        self.stream = batches(text.train, batch=batch, length=LENGTH, generator=self.places)
        self.again = partial(Run, name, lr, seed, batch=batch)
        self.count = 0

    def fork(self) -> "Run":
        """Another run that stands where this one does and goes on by itself."""
        twin = self.again()
        twin.model.load_state_dict(self.model.state_dict())
        twin.optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        twin.places.set_state(self.places.get_state())
        twin.draws.set_state(self.draws.get_state())
        twin.count = self.count
        return twin

    def step(self) -> None:
        """One batch; every tenth of Sophia's is differentiated twice."""
        tokens = next(self.stream)
        self.optimizer.zero_grad()
        logits = self.model(tokens)
        if isinstance(self.optimizer, optim.SophiaG) and self.optimizer.needs_curvature:
            mask = next_tokens(tokens).mask
            self.optimizer.update_curvature(logits, mask, generator=self.draws)
        token_mean(*causal_lm_loss(logits, tokens)).backward()
        self.optimizer.step()
        self.count += 1

    def follow(self, rate: Callable[[int], float], steps: int) -> None:
        """``steps`` steps under a schedule that begins at its step 0."""
        scheduler = schedules.as_scheduler(self.optimizer, rate)
        for _ in range(steps):
            self.step()
            scheduler.step()

    @torch.no_grad()
    def losses(self) -> tuple[float, float]:
        """Held-out nats a byte: of the half that rates are chosen by, and of the other."""
        if isinstance(self.optimizer, optim.ScheduleFreeAdamW):
            self.optimizer.eval()
        cut = windows(shakespeare().validation, length=LENGTH)
        found = [token_mean(*causal_lm_loss(self.model(part), part)) for part in cut.split(128)]
        if isinstance(self.optimizer, optim.ScheduleFreeAdamW):
            self.optimizer.train()
        half = len(found) // 2
        parts = (torch.stack(found[:half]), torch.stack(found[half:]))
        first, second = (round(part.mean().item(), 4) for part in parts)
        return first, second

    def state_bytes(self) -> float:
        """Bytes that the optimizer holds for each parameter, counted."""
        return round(optim.state_bytes(self.optimizer).per_parameter, 2)


def raced(task: dict[str, Any]) -> dict[str, Any]:
    """One run to its end; a loss that is no number is stored as None."""
    torch.set_num_threads(1)
    start = time.process_time()
    run = Run(task["name"], task["lr"], task["seed"], batch=task["batch"])
    run.follow(schedule(ENTRANTS[task["name"]].schedule, task["steps"]), task["steps"])
    chosen_by, reported = run.losses()
    took = round(time.process_time() - start, 1)
    found = {"chosen_by": chosen_by, "loss": reported}
    return task | {k: _finite(v) for k, v in found.items()} | {"seconds": took}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def anytime(task: dict[str, Any]) -> dict[str, Any]:
    """A stable phase, left by a decay at several lengths, and the same lengths without one."""
    torch.set_num_threads(1)
    start = time.process_time()
    run = Run("AdamW, WSD", task["lr"], task["seed"])
    found = []
    stable = schedules.warmup(warmup_steps=WARMUP)
    scheduler = schedules.as_scheduler(run.optimizer, stable)
    for steps in sorted({s for n in ANYTIME for s in (n, left_at(n))}):
        while run.count < steps:
            run.step()
            scheduler.step()
        if steps in ANYTIME:  # the stable phase, gone on with for as long
            found.append({"steps": steps, "way": "no decay", "loss": run.losses()[1]})
        for total in (n for n in ANYTIME if left_at(n) == steps):
            branch = run.fork()
            down = total - steps
            branch.follow(schedules.linear(start=1.0, end=0.0, total_steps=down), down)
            found.append({"steps": total, "way": "left and decayed", "loss": branch.losses()[1]})
            found.append({"steps": steps, "way": "as it was left", "loss": run.losses()[1]})
    took = round(time.process_time() - start, 1)
    return task | {"found": found, "seconds": took}


def left_at(total: int) -> int:
    """The step at which a run of so many steps begins its decay."""
    return round((1 - COOLDOWN) * total)


def pace(rounds: int = 12) -> dict[str, Any]:
    """Process time of a training step as a ratio to AdamW's, in turns; bytes of state."""
    torch.set_num_threads(1)
    runs = {name: Run(name, ENTRANTS[name].middle / 100, 0) for name in ENTRANTS}
    for run in runs.values():
        for _ in range(3):
            run.step()

    def ten_steps(run: Run) -> Callable[[], None]:
        def take() -> None:  # one estimate of Sophia's curvature, one turn of SOAP's axes
            for _ in range(10):
                run.step()

        return take

    found = seconds({name: ten_steps(run) for name, run in runs.items()}, rounds=rounds)
    ratios = {name: round(median_ratio(found[name], found["AdamW"]), 3) for name in runs}
    return {
        "paces": ratios,
        "state_bytes": {name: run.state_bytes() for name, run in runs.items()},
    }


# -- what is run, in order: each stage reads the results of those before it


def tuning() -> list[dict[str, Any]]:
    """Every entrant, every rate of its grid, one seed."""
    return [_task("tune", name, lr, 0) for name in ENTRANTS for lr in grid(name)]


def finals(best: dict[str, float], paces: dict[str, float]) -> list[dict[str, Any]]:
    """The best rate with fresh seeds: at equal steps, at equal time, at half the steps."""
    seeds = range(1, SEEDS + 1)
    equal_steps = [_task("steps", n, lr, seed) for n, lr in best.items() for seed in seeds]
    equal_time = [
        _task("time", n, lr, seed, steps=round(STEPS / paces[n]))
        for n, lr in best.items() if abs(paces[n] - 1) > SAME_PACE for seed in seeds
    ]  # fmt: skip
    half = [_task("half", n, best[n], s, steps=STEPS // 2) for n in HALVED for s in seeds]
    return equal_steps + equal_time + half


def anytimes(best: dict[str, float]) -> list[dict[str, Any]]:
    """Stable phases left at several lengths, and cosines that were made for these lengths."""
    seeds = range(1, SEEDS + 1)
    name = "AdamW, WSD"
    stable = [{"stage": "anytime", "name": name, "lr": best[name], "seed": seed} for seed in seeds]
    short = [
        _task("short", "AdamW", best["AdamW"], seed, steps=steps)
        for steps in ANYTIME if steps < STEPS for seed in seeds
    ]  # fmt: skip
    return stable + short


def by_batch() -> list[dict[str, Any]]:
    """AdamW and Lion at three sizes of the batch, each size tuned over the whole grid."""
    return [
        _task("batch", name, lr, 0, steps=BATCH_STEPS, batch=batch)
        for batch in BATCHES for name in ("AdamW", "Lion") for lr in grid(name)
    ]  # fmt: skip


def by_batch_finals(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The best rate of each size with fresh seeds."""
    return [
        _task(
            "batch final", name, best_rate(runs, name, stage="batch", batch=batch), seed,
            steps=BATCH_STEPS, batch=batch,
        )
        for batch in BATCHES for name in ("AdamW", "Lion") for seed in range(1, SEEDS + 1)
    ]  # fmt: skip


def _task(
    stage: str, name: str, lr: float, seed: int, *, steps: int = STEPS, batch: int = BATCH
) -> dict[str, Any]:
    return {"stage": stage, "name": name, "lr": lr, "seed": seed, "steps": steps, "batch": batch}


def _is(run: dict[str, Any], **wanted: Any) -> bool:
    return all(run.get(key) == value for key, value in wanted.items())


def best_rate(runs: list[dict[str, Any]], name: str, **which: Any) -> float:
    """The rate with the least loss on the half that is not reported.

    Raises:
        RuntimeError: If a rate has not been tried, or the best is at the edge of its grid: the
            race would not be fair.
    """
    tried = {
        run["lr"]: math.inf if run["chosen_by"] is None else run["chosen_by"]
        for run in runs if _is(run, name=name, **which)
    }  # fmt: skip
    rates = grid(name)
    if missing := set(rates) - set(tried):
        raise RuntimeError(f"{name}: {sorted(missing)} of {rates} not tried, {which}")
    best = min(rates, key=lambda rate: tried[rate])
    if best in (rates[0], rates[-1]):
        raise RuntimeError(f"{name}: {best} is at the edge of {rates}, {which}")
    return best


def best_rates(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Of each entrant. See `best_rate`."""
    return {name: best_rate(runs, name, stage="tune") for name in ENTRANTS}


def stored() -> list[dict[str, Any]]:
    """All runs so far."""
    lines = RUNS.read_text("utf-8").splitlines() if RUNS.exists() else []
    return [json.loads(line) for line in lines]


def carry_out(tasks: list[dict[str, Any]], workers: int) -> list[dict[str, Any]]:
    """Run what has not been run, each result stored as it comes, and give all that is stored."""
    runs = stored()
    todo = [task for task in tasks if not any(_is(run, **task) for run in runs)]
    context = multiprocessing.get_context("spawn")
    with context.Pool(workers) as pool, RUNS.open("a", encoding="utf-8") as file:
        for run in pool.imap_unordered(_carry_out_one, todo):
            print(json.dumps(run, allow_nan=False), file=file, flush=True)
            print({k: v for k, v in run.items() if k != "found"}, flush=True)
    return stored()


def _carry_out_one(task: dict[str, Any]) -> dict[str, Any]:
    if task["stage"] == "pace":
        return task | pace()
    return anytime(task) if task["stage"] == "anytime" else raced(task)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=1)
    workers = parser.parse_args().workers
    runs = carry_out(tuning(), workers)
    best = best_rates(runs)
    runs = carry_out([{"stage": "pace"}], 1)
    paces = next(run["paces"] for run in runs if run["stage"] == "pace")
    runs = carry_out(finals(best, paces) + anytimes(best) + by_batch(), workers)
    carry_out(by_batch_finals(runs), workers)


if __name__ == "__main__":
    main()

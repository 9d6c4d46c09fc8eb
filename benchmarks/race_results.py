"""What the runs of the race say: means over seeds with their intervals, tables and figures.

python -m benchmarks.race_results    summarize what `benchmarks.race` has stored, and draw it
"""

import json
import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from benchmarks import race
from lmlosses import cpu_generator
from lmlosses.lab import plotting
from lmlosses.lab.text import shakespeare, windows
from lmlosses.lab.transformer import TinyTransformer

RESULTS = Path(__file__).parent / "results"

STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}
"""97.5 % points of Student's t by degrees of freedom."""

Runs = list[dict[str, Any]]
Losses = dict[int, float]  # by seed


def interval(values: Iterable[float]) -> tuple[float, float]:
    """Mean, and half the width of the 95 % interval that Student's t gives for it."""
    found = list(values)
    spread = statistics.stdev(found) / math.sqrt(len(found))
    return statistics.fmean(found), STUDENT[len(found) - 1] * spread


def mean_loss(losses: Losses) -> dict[str, Any]:
    """Mean loss over seeds with its interval, as numbers and as one text."""
    mean, half = interval(losses.values())
    text = f"{mean:.3f}\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}{half:.3f}"
    return {"loss": round(mean, 4), "half_width": round(half, 4), "loss_text": text}


def difference(ours: Losses, theirs: Losses) -> dict[str, Any]:
    """Ours minus theirs, in pairs of runs that share a seed; a word for what is known of it."""
    mean, half = interval(ours[seed] - theirs[seed] for seed in sorted(ours))
    found = "lower" if mean + half < 0 else "higher" if mean - half > 0 else "none"
    shown = f"{round(mean, 3) + 0.0:+.3f}".replace("-", "−")  # no negative zero
    text = f"{shown}\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}{half:.3f}"
    return {
        "difference": round(mean, 4), "difference_half_width": round(half, 4),
        "difference_text": text, "difference_found": found,
    }  # fmt: skip


def by_seed(runs: Runs, **which: Any) -> Losses:
    """Reported losses of these runs.

    Raises:
        RuntimeError: If a seed is missing or a run ended without a loss.
    """
    found = {r["seed"]: r["loss"] for r in runs if which.items() <= r.items()}
    if sorted(found) != list(range(1, race.SEEDS + 1)) or None in found.values():
        raise RuntimeError(f"{which} has {found}")
    return found


def settings(runs: Runs) -> dict[str, Any]:
    """What all runs share, and how many there are."""
    model = TinyTransformer(256, **race.MODEL, generator=cpu_generator(0))
    held_out = windows(shakespeare().validation, length=race.LENGTH)
    return race.MODEL | {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "steps": race.STEPS, "batch": race.BATCH, "length": race.LENGTH, "warmup": race.WARMUP,
        "bytes_read": race.STEPS * race.BATCH * race.LENGTH,
        "train_bytes": len(shakespeare().train),
        "held_out_bytes": held_out[:, 1:].numel(),
        "entrants": len(race.ENTRANTS), "trials": race.TRIALS, "seeds": race.SEEDS,
        "tuning_runs": len(race.tuning()), "batch_steps": race.BATCH_STEPS,
        "runs": sum(run["stage"] != "pace" for run in runs),
        "minutes": round(sum(run.get("seconds", 0.0) for run in runs) / 60),
    }  # fmt: skip


def tuning(runs: Runs, **which: Any) -> Runs:
    """Every trial of a grid: rate, loss it was judged by, whether it was the best."""
    names = list(dict.fromkeys(run["name"] for run in runs if which.items() <= run.items()))
    best = {name: race.best_rate(runs, name, **which) for name in names}
    tried = {(r["name"], r["lr"]): r["chosen_by"] for r in runs if which.items() <= r.items()}
    return [
        {"name": name, "lr": lr, "chosen_by": tried[name, lr], "best": lr == best[name]}
        for name in names for lr in race.grid(name)
    ]  # fmt: skip


def entrants(runs: Runs) -> Runs:
    """Final losses at equal steps, beside what a step and its state cost, the least loss first."""
    (paced,) = (run for run in runs if run["stage"] == "pace")
    best, rows = race.best_rates(runs), []
    adamw = by_seed(runs, stage="steps", name="AdamW")
    for name, lr in best.items():
        losses = by_seed(runs, stage="steps", name=name)
        costs = {"pace": paced["paces"][name], "state_bytes": paced["state_bytes"][name]}
        rates = {"lr": lr, "rate": f"{lr:g}", "adamw_over_rate": round(best["AdamW"] / lr, 4)}
        compared = difference(losses, adamw) if name != "AdamW" else {}
        rows.append({"name": name} | rates | mean_loss(losses) | compared | costs)
    return sorted(rows, key=lambda row: row["loss"])


def against_adamw(runs: Runs, stage: str) -> Runs:
    """Runs of another length against AdamW's whole ones, the least loss first."""
    adamw, rows = by_seed(runs, stage="steps", name="AdamW"), []
    under_wsd = by_seed(runs, stage="steps", name="AdamW, WSD")
    for name in race.ENTRANTS:
        which = {"stage": stage, "name": name}
        steps = {run["steps"] for run in runs if which.items() <= run.items()}
        if steps:
            (count,) = steps
            losses = by_seed(runs, **which)
            row = {"name": name, "steps": count} | mean_loss(losses)
            other = {f"wsd_{k}": v for k, v in difference(losses, under_wsd).items()}
            rows.append(row | difference(losses, adamw) | other)
    return sorted(rows, key=lambda row: row["loss"])


def stops(runs: Runs) -> dict[int, dict[str, Losses]]:
    """Losses at the end of runs of each length, by the way they end and by seed."""
    found: dict[int, dict[str, Losses]] = {}
    for steps in race.ANYTIME:
        stage = "steps" if steps == race.STEPS else "short"
        found[steps] = {"cosine": by_seed(runs, stage=stage, name="AdamW", steps=steps)}
    whole = {race.left_at(total): total for total in race.ANYTIME}
    for run in runs:
        for end in run.get("found", []):
            steps = whole[end["steps"]] if end["way"] == "as it was left" else end["steps"]
            found[steps].setdefault(end["way"], {})[run["seed"]] = end["loss"]
    return found


def anytime(runs: Runs) -> Runs:
    """Lengths by ways to end there; differences are from the cosine made for that length."""
    return [
        {"steps": steps, "way": way}
        | mean_loss(losses)
        | (difference(losses, ways["cosine"]) if way != "cosine" else {})
        for steps, ways in stops(runs).items() for way, losses in ways.items()
    ]  # fmt: skip


def decays(runs: Runs) -> Runs:
    """What the decay over the last fifth is worth, against the held rate, at each length."""
    return [
        {"steps": steps} | difference(ways["left and decayed"], ways["no decay"])
        for steps, ways in stops(runs).items()
    ]


def batches(runs: Runs) -> Runs:
    """Lion against AdamW at each size of the batch, both tuned there."""
    rows, gaps = [], {}
    for batch in race.BATCHES:
        row: dict[str, Any] = {"batch": batch}
        losses = {}
        for name, key in (("AdamW", "adamw"), ("Lion", "lion")):
            row[f"{key}_lr"] = race.best_rate(runs, name, stage="batch", batch=batch)
            losses[name] = by_seed(runs, stage="batch final", name=name, batch=batch)
            row[f"{key}_rate"] = f"{row[f'{key}_lr']:g}"
            row[f"{key}_loss"] = mean_loss(losses[name])["loss_text"]
        row["rate_ratio"] = round(row["adamw_lr"] / row["lion_lr"], 4)
        gaps[batch] = {s: losses["Lion"][s] - losses["AdamW"][s] for s in losses["Lion"]}
        rows.append(row | difference(losses["Lion"], losses["AdamW"]))
    first, last = race.BATCHES[0], race.BATCHES[-1]
    grown = {"batch": f"{last} against {first}"} | difference(gaps[last], gaps[first])
    return [*rows, grown]


def summary(runs: Runs) -> dict[str, Any]:
    """All that the page shows, from the runs alone."""
    sizes = [
        {"batch": batch} | row
        for batch in race.BATCHES for row in tuning(runs, stage="batch", batch=batch)
    ]  # fmt: skip
    return {
        "settings": [settings(runs)],
        "entrants": entrants(runs),
        "tuning": tuning(runs, stage="tune"),
        "equal_time": against_adamw(runs, "time"),
        "half_steps": against_adamw(runs, "half"),
        "anytime": anytime(runs),
        "decays": decays(runs),
        "batches": batches(runs),
        "batch_tuning": sizes,
    }


# -- figures


def finals_figure(found: dict[str, Any]) -> str:
    """Mean loss and interval of each entrant, at equal steps and at equal time, as SVG."""
    plotting.use_style()
    rows = found["entrants"][::-1]
    timed = {row["name"]: row for row in found["equal_time"]}
    drawing, axes = plt.subplots(figsize=(6.4, 4.4))
    (adamw,) = (row["loss"] for row in rows if row["name"] == "AdamW")
    axes.axvline(adamw, color=plotting.INK, linewidth=0.9, linestyle=(0, (4, 3)))
    for height, row in enumerate(rows):
        marks = [(row, 0, "o", plotting.COLORS[0])]
        if row["name"] in timed:
            marks.append((timed[row["name"]], -0.28, "D", plotting.COLORS[1]))
        for mark, shift, marker, color in marks:
            axes.errorbar(
                mark["loss"], height + shift, xerr=mark["half_width"], fmt=marker, color=color,
                markersize=5, capsize=3, linewidth=1.4,
            )  # fmt: skip
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes.tick_params(axis="y", length=0)
    axes.set(xlabel="loss on held-out text, nats a byte", ylim=(-0.7, len(rows) - 0.4))
    right = axes.get_xlim()[1]
    for words, height, color in (("equal steps", 0, 0), ("time of AdamW's steps", -0.9, 1)):
        place = len(rows) - 1.6 + height
        axes.text(right, place, words, color=plotting.COLORS[color], ha="right", va="center")
    return plotting.svg(drawing)


def grids_figure(found: dict[str, Any]) -> str:
    """Loss against learning rate, a panel for each entrant, the chosen rate marked, as SVG."""
    plotting.use_style()
    drawing, panels = plt.subplots(4, 3, figsize=(6.4, 6.6), sharex=True, sharey=True)
    for axes, name in zip(panels.flat, race.ENTRANTS, strict=False):
        rows = [row for row in found["tuning"] if row["name"] == name]
        points = [(r["lr"], r["chosen_by"]) for r in rows if r["chosen_by"] is not None]
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3)
        for row in rows:
            if row["best"]:
                axes.plot(row["lr"], row["chosen_by"], "o", markersize=7, color=plotting.COLORS[1])
            if row["chosen_by"] is None or row["chosen_by"] > TOP:
                axes.plot(row["lr"], TOP - 0.03, "x", markersize=5, color=plotting.INK)
        axes.set_title(name)
    for axes in panels.flat[len(race.ENTRANTS) :]:
        axes.set_axis_off()
    low = min(row["chosen_by"] for row in found["tuning"] if row["best"])
    panels[0, 0].set(xscale="log", ylim=(math.floor(10 * low - 0.5) / 10, TOP))
    panels[0, 0].minorticks_off()
    panels[0, 0].set_xticks([1e-3, 1e-2, 1e-1, 1])
    for axes in panels[2, len(race.ENTRANTS) % 3 :]:
        axes.tick_params(labelbottom=True)
    drawing.supxlabel("peak learning rate", color=plotting.INK, fontsize=10)
    drawing.supylabel("loss that chose the rate, nats a byte", color=plotting.INK, fontsize=10)
    return plotting.svg(drawing)


TOP = 2.8  # of the grids' figure; losses above are crosses at its edge


def anytime_figure(found: dict[str, Any]) -> str:
    """Loss against length for four ways to end there, as SVG."""
    plotting.use_style()
    drawing, axes = plt.subplots(figsize=(6.4, 3.8))
    names = {
        "as it was left": "the checkpoint as it is",
        "no decay": "rate held to the end",
        "left and decayed": "checkpoint, then decay",
        "cosine": "cosine for this length",
    }
    ends = {}
    for position, (way, words) in enumerate(names.items()):
        rows = [row for row in found["anytime"] if row["way"] == way]
        shift, color = 1 + 0.02 * (position - 1.5), plotting.COLORS[position]
        axes.errorbar(
            [row["steps"] * shift for row in rows], [row["loss"] for row in rows],
            yerr=[row["half_width"] for row in rows], color=color, marker="o", markersize=4,
            capsize=3, linewidth=1.4,
        )  # fmt: skip
        ends[words] = (rows[-1]["loss"], color)
    low, high = axes.get_ylim()
    height = -math.inf
    for words, (loss, color) in sorted(ends.items(), key=lambda end: end[1][0]):
        height = max(loss, height + 0.07 * (high - low))  # labels keep their distance
        plotting.label_line(axes, 450, height, words, color)
    axes.set(xscale="log", xlabel="steps of the whole run", ylabel="held-out loss, nats a byte")
    axes.set_xticks(race.ANYTIME, [str(steps) for steps in race.ANYTIME])
    axes.minorticks_off()
    axes.set_xlim(88, 1100)
    return plotting.svg(drawing)


FIGURES = {
    "race": finals_figure,
    "race_grids": grids_figure,
    "race_anytime": anytime_figure,
}


def draw() -> None:
    """Draw all figures from what is stored."""
    found = json.loads((RESULTS / "race.json").read_text("utf-8"))
    for name, figure in FIGURES.items():
        (RESULTS / f"{name}.svg").write_text(figure(found), "utf-8")


def store() -> None:
    """Summarize all runs that are stored, and draw the summary."""
    from benchmarks.__main__ import store as store_results  # it imports all benchmarks

    store_results("race", summary(race.stored()))
    draw()


if __name__ == "__main__":
    store()

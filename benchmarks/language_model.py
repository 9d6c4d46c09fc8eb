"""A language model trained for minutes, beside what counting bytes would reach.

python -m benchmarks.language_model    some five minutes on one thread: train, store, draw
"""

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from lmlosses import cpu_generator, token_mean
from lmlosses.lab import plotting
from lmlosses.lab.text import (
    VOCAB_SIZE,
    batches,
    bigram_entropy,
    shakespeare,
    unigram_entropy,
    windows,
)
from lmlosses.lab.training import train
from lmlosses.lab.transformer import TinyTransformer
from lmlosses.losses.next_token import causal_lm_loss
from lmlosses.optim import Adam
from lmlosses.schedules import warmup_cosine

RESULTS = Path(__file__).parent / "results"

MODEL = {"dim": 128, "layers": 4, "heads": 4}
TRAINING = {"steps": 2000, "batch": 8, "length": 128, "peak": 4e-3, "warmup_steps": 100}
CHECKPOINTS = (0, 10, 30, 100, 200, 350, 550, 800, 1100, 1400, 1700, 2000)

BASELINES = {
    "uniform": "every byte alike",
    "unigram": "frequencies of bytes",
    "bigram": "frequencies of pairs",
}


def loss(model: TinyTransformer, tokens: Tensor) -> Tensor:
    return token_mean(*causal_lm_loss(model(tokens), tokens))


@torch.no_grad()
def surprises(model: TinyTransformer, cut: Tensor, *, batch: int = 32) -> Tensor:
    """Nats of every byte but the first of every window, [windows, length - 1]."""
    found = [causal_lm_loss(model(rows), rows).values[:, :-1] for rows in cut.split(batch)]
    return torch.cat(found)


def trained(
    model: TinyTransformer, text: Tensor, checkpoints: tuple[int, ...], training: dict[str, Any]
) -> Iterator[tuple[int, float]]:
    """Trains in place; at each checkpoint the step, and the mean loss since the last one."""
    stream = batches(
        text, batch=training["batch"], length=training["length"], generator=cpu_generator(1)
    )
    optimizer = Adam(model.parameters())
    rate = warmup_cosine(
        peak=training["peak"],
        warmup_steps=training["warmup_steps"],
        total_steps=training["steps"],
    )
    for start, end in zip((0, *checkpoints), checkpoints, strict=False):
        losses = train(
            lambda: loss(model, next(stream)),
            optimizer,
            steps=end - start,
            lr=lambda step, start=start: rate(start + step),
        )
        yield end, losses.mean().item()


def row(what: str, nats: float) -> dict[str, Any]:
    """One model's price for a byte, in the three units."""
    return {
        "what": what,
        "nats": round(nats, 4),
        "bits_per_byte": round(nats / math.log(2), 4),
        "perplexity": round(math.exp(nats), 3),
    }


def measure(
    model_settings: dict[str, int] = MODEL,
    training: dict[str, Any] = TRAINING,
    checkpoints: tuple[int, ...] = CHECKPOINTS,
) -> dict[str, Any]:
    """Train, and compare on the held-out play, each byte of it but the first predicted once."""
    text = shakespeare()
    cut = windows(text.validation, length=training["length"])
    held_out = torch.cat([cut[0, :1], cut[:, 1:].flatten()])  # what the windows predict
    model = TinyTransformer(VOCAB_SIZE, **model_settings, generator=cpu_generator(0))
    start, curve = time.process_time(), []
    for step, recent in trained(model, text.train, checkpoints, training):
        found = surprises(model, cut)
        point = {"step": step, "train": round(recent, 4) if step else None}
        curve.append(point | {"validation": round(found.mean().item(), 4)})
        print(curve[-1], f"{time.process_time() - start:.0f} s", flush=True)
    by_context = found.mean(dim=0)
    settings = model_settings | training | {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "bytes_read": training["steps"] * training["batch"] * training["length"],
        "train_bytes": len(text.train),
        "predicted_bytes": found.numel(),
        "minutes": round((time.process_time() - start) / 60, 1),
    }  # fmt: skip
    edges = [2**k for k in range(20) if 2**k < training["length"]] + [training["length"]]
    return {
        "settings": [settings],
        "rows": [
            row("uniform", math.log(VOCAB_SIZE)),
            row("unigram", unigram_entropy(text.train, held_out[1:]).item()),
            row("bigram", bigram_entropy(text.train, held_out).item()),
            row("transformer", found.double().mean().item()),
        ],
        "contexts": [
            {
                "context": str(low) if high == low + 1 else f"{low} to {high - 1}",
                "nats": round(by_context[low - 1 : high - 1].mean().item(), 4),
            }
            for low, high in zip(edges, edges[1:], strict=False)
        ],
        "curve": curve,
    }


def figure(found: dict[str, Any]) -> str:
    """Held-out surprise against the bytes read so far, between lines of counting, as SVG."""
    plotting.use_style()
    drawing, axes = plt.subplots(figsize=(6.4, 3.8))
    curve = [point for point in found["curve"] if point["step"]]
    (settings,) = found["settings"]
    read = [point["step"] * settings["batch"] * settings["length"] for point in curve]
    for name, color in (("train", plotting.COLORS[1]), ("validation", plotting.COLORS[0])):
        heights = [point[name] for point in curve]
        axes.plot(read, heights, color=color, marker="o", markersize=3)
    ends = {"held out": (curve[-1]["validation"], 0), "training text": (curve[-1]["train"], 1)}
    for name, (height, index) in ends.items():
        plotting.label_line(axes, read[-1] * 1.15, height, name, plotting.COLORS[index])
    for line in found["rows"]:
        if line["what"] in BASELINES:
            axes.axhline(line["nats"], color=plotting.INK, linewidth=0.9, linestyle=(0, (4, 3)))
            label = BASELINES[line["what"]]
            axes.text(read[-1] * 8, line["nats"] + 0.05, label, ha="right", va="bottom")
    axes.set(xscale="log", xlabel="bytes read in training", ylabel="surprise, nats a byte")
    axes.set_xlim(read[0] * 0.8, read[-1] * 9)
    axes.set_ylim(1.0, 6.0)
    axes.minorticks_off()
    return plotting.svg(drawing)


def draw() -> None:
    found = json.loads((RESULTS / "language_model.json").read_text("utf-8"))
    (RESULTS / "language_model.svg").write_text(figure(found), "utf-8")


def main() -> None:
    from benchmarks.__main__ import store  # it imports all benchmarks

    torch.set_num_threads(1)
    store("language_model", measure())
    draw()


if __name__ == "__main__":
    main()

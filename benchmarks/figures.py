"""The figures of the performance page, drawn from the stored results."""

import json
from pathlib import Path

import matplotlib.pyplot as plt

from lmlosses.lab import plotting

RESULTS = Path(__file__).parent / "results"

NAMES = {
    "naive": "naive",
    "torch, automatic chunks": "torch, chunked",
    "linear_cross_entropy": "linear_cross_entropy",
    "linear_token_stats, two": "linear_token_stats",
}


def memory(growth: list[dict]) -> str:
    """Peak memory against the vocabulary, one line a way, as SVG."""
    plotting.use_style()
    figure, axes = plt.subplots(figsize=(6.4, 3.8))
    vocabularies = sorted({row["vocab"] for row in growth})
    height = 0.0
    lines = {way: [row["peak_mib"] for row in growth if row["what"] == way] for way in NAMES}
    for way in sorted(NAMES, key=lambda way: lines[way][-1]):
        color = plotting.COLORS[list(NAMES).index(way)]
        axes.plot(vocabularies, lines[way], color=color, marker="o", markersize=3)
        height = max(lines[way][-1], 1.35 * height)  # labels keep their distance
        plotting.label_line(axes, vocabularies[-1] * 1.1, height, NAMES[way], color)
    needed = [row["gradients_mib"] for row in growth if row["what"] == "naive"]
    axes.fill_between(vocabularies, needed, color=plotting.INK, alpha=0.25, linewidth=0)
    axes.text(vocabularies[4], needed[4] * 0.25, "the gradients themselves", ha="center")
    axes.set(xscale="log", yscale="log", xlabel="vocabulary", ylabel="peak beyond inputs, MiB")
    axes.set_xticks(vocabularies, [f"{size // 1024} k" for size in vocabularies])
    axes.set_xlim(vocabularies[0] * 0.9, vocabularies[-1] * 6)
    axes.minorticks_off()
    return plotting.svg(figure)


def draw() -> None:
    growth = json.loads((RESULTS / "linear.json").read_text("utf-8"))["growth"]
    (RESULTS / "memory.svg").write_text(memory(growth), "utf-8")

"""Curvature of a language model's loss at the start, in the middle and at the end of training.

python -m benchmarks.spectrum    some three minutes on one thread: train, measure, store, draw

The run is one of the race: AdamW at its best rate. Curvature is that of the mean loss over one
batch of the training text, the same at every point.
"""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import race
from lmlosses import cpu_generator, token_mean
from lmlosses.analysis.curvature import Product, gauss_newton_product, hessian_product
from lmlosses.analysis.landscape import gradient_noise_scale
from lmlosses.analysis.spectrum import (
    Eigenpairs,
    Estimate,
    SpectralDensity,
    spectral_average,
    spectral_density,
    top_eigenvalues,
    trace_estimate,
)
from lmlosses.lab import plotting
from lmlosses.lab.text import batches, shakespeare
from lmlosses.lab.transformer import TinyTransformer
from lmlosses.losses.next_token import causal_lm_loss
from lmlosses.precision import global_norm

RESULTS = Path(__file__).parent / "results"

LR, SEED = 0.012, 1
WHEN = {0: "start", race.STEPS // 2: "middle", race.STEPS: "end"}
CURVED = 0.5
"""Eigenvalues beyond this, on either side, are counted."""
WIDTH = 0.15
"""Standard deviation of the bumps by which the figure smooths the density."""


class Effort(NamedTuple):
    """How much is measured."""

    windows: int = 16  # in the batch whose loss it is
    ends: int = 5  # eigenvalues at either end
    products: int = 150  # that either end may take
    probes: int = 6
    steps: int = 80
    trace_probes: int = 32
    noise_batches: int = 128  # of four windows each
    between: tuple[int, ...] = (10, 20, 50, 100, 300)  # besides WHEN, where only ends are found


def digits(value: float | Tensor, count: int = 4) -> float:
    """Significant ones: more would differ from machine to machine."""
    return float(f"{float(torch.as_tensor(value).detach()):.{count}g}")


def estimated(name: str, found: Estimate) -> dict[str, Any]:
    """A mean, its standard error, and both as one text."""
    value, error = float(found.value), float(found.standard_error)
    decimals = max(0, -math.floor(math.log10(error))) if error > 0 else 3
    gap = "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}"
    text = f"{value:.{decimals}f}{gap}{error:.{decimals}f}".replace("-", "−")
    return {name: digits(value), f"{name}_error": digits(error), f"{name}_text": text}


# ---- the run, and the matrices at its points


def mean_loss(model: TinyTransformer, tokens: Tensor) -> Tensor:
    return token_mean(*causal_lm_loss(model(tokens), tokens))


def drawn(seed: int, count: int) -> Tensor:
    """Windows of the training text, [count, length]."""
    text, generator = shakespeare().train, cpu_generator(seed)
    return next(batches(text, batch=count, length=race.LENGTH, generator=generator))


def hessian_of(model: TinyTransformer, tokens: Tensor) -> Product:
    with sdpa_kernel(SDPBackend.MATH):  # the backend that can be differentiated twice
        return hessian_product(lambda: mean_loss(model, tokens), model.parameters())


def gauss_newton_of(model: TinyTransformer, tokens: Tensor) -> Product:
    def loss(logits: Tensor) -> Tensor:
        return token_mean(*causal_lm_loss(logits, tokens))

    with sdpa_kernel(SDPBackend.MATH):
        return gauss_newton_product(lambda: model(tokens), loss, model.parameters())


def as_adam_sees_it(
    product: Product, params: list[Tensor], optimizer: torch.optim.Optimizer
) -> Product:
    r"""The matrix in coordinates in which Adam is plain descent, :math:`P^{-1/2} H P^{-1/2}`.

    :math:`P` is what Adam divides its averaged gradient by, corrections of both averages included.
    """
    (beta1, beta2), eps = race.BETAS, optimizer.param_groups[0]["eps"]
    factors = []
    for param in params:
        state = optimizer.state[param]
        step = float(state["step"])
        root = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt()
        factors.append(((1 - beta1**step) * (root + eps)).rsqrt())

    def scaled(vectors: list[Tensor]) -> list[Tensor]:
        images = product([f * v for f, v in zip(factors, vectors, strict=True)])
        return [f * image for f, image in zip(factors, images, strict=True)]

    return scaled


# ---- what is measured

Ends = tuple[Eigenpairs, Eigenpairs]


def ends(product: Product, params: list[Tensor], *, count: int, products: int) -> Ends:
    """The largest and the smallest eigenvalues; these as the largest of the negated matrix."""

    def negated(vectors: list[Tensor]) -> list[Tensor]:
        return [-image for image in product(vectors)]

    settings: dict[str, Any] = {"count": count, "max_products": products, "block_size": 1}
    return (
        top_eigenvalues(product, params, generator=cpu_generator(5), **settings),
        top_eigenvalues(negated, params, generator=cpu_generator(6), **settings),
    )


def on_the_way(
    run: race.Run, tokens: Tensor, product: Product, found: Ends, lr: float
) -> dict[str, Any]:
    """Both ends of the spectrum at a step, and what the rate would allow them to be."""
    params, beta1 = list(run.model.parameters()), race.BETAS[0]
    row = {
        "step": run.count,
        "nats": digits(mean_loss(run.model, tokens)),
        "lr": digits(lr),
        "largest": digits(found[0].values[0]),
        "smallest": digits(-found[1].values[0]),
        "plain_limit": digits(2 / lr),
        "adam_largest": None,
        "adam_limit": digits(2 * (1 + beta1) / ((1 - beta1) * lr)),
    }
    if run.count:  # before the first step Adam has no rates of its own
        seen = as_adam_sees_it(product, params, run.optimizer)
        top = top_eigenvalues(seen, params, tolerance=1e-2, generator=cpu_generator(7))
        row["adam_largest"] = digits(top.values[0])
    return row


def counted(name: str, density: SpectralDensity, dim: int, sign: int) -> dict[str, Any]:
    """How many eigenvalues lie beyond `CURVED` on one side."""

    def beyond(nodes: Tensor) -> Tensor:
        return dim * (sign * nodes > CURVED).to(nodes.dtype)

    return estimated(name, spectral_average(density, beyond))


def spread(product: Product, params: list[Tensor], effort: Effort) -> tuple[dict[str, Any], ...]:
    """What the density says: counts beyond `CURVED`, also from half the steps; and itself."""
    half, whole = (
        spectral_density(
            product, params, probes=effort.probes, steps=steps, generator=cpu_generator(8)
        )
        for steps in (effort.steps // 2, effort.steps)
    )
    row: dict[str, Any] = {}
    dim = sum(param.numel() for param in params)
    for name, sign in (("above", 1), ("below", -1)):
        row |= counted(name, whole, dim, sign)
        row[f"{name}_half"] = counted(name, half, dim, sign)[name]

    def negative(nodes: Tensor) -> Tensor:
        return (-nodes).clamp(min=0) * (nodes < -CURVED)

    def either(nodes: Tensor) -> Tensor:
        return nodes.abs() * (nodes.abs() > CURVED)

    parts = [spectral_average(whole, function).value for function in (negative, either)]
    row["negative_share"] = digits(parts[0] / parts[1])
    stored = {
        "nodes": [[digits(node, 6) for node in probe] for probe in whole.nodes],
        "weights": [[digits(weight) for weight in probe] for probe in whole.weights],
    }
    return row, stored


def point(
    run: race.Run, tokens: Tensor, product: Product, found: Ends, effort: Effort
) -> dict[str, list[dict[str, Any]]]:
    """All that is measured at one point, and the density itself."""
    params, model = list(run.model.parameters()), run.model
    when = WHEN.get(run.count, str(run.count))
    tangent = gauss_newton_of(model, tokens)
    elsewhere = hessian_of(model, drawn(3, effort.windows))
    other, convex = (
        top_eigenvalues(matrix, params, generator=cpu_generator(5)).values[0]
        for matrix in (elsewhere, tangent)
    )
    trace, tangent_trace = (
        trace_estimate(
            matrix, params, probes=effort.trace_probes, generator=cpu_generator(9)
        )
        for matrix in (product, tangent)
    )  # fmt: skip
    parts = drawn(4, 4 * effort.noise_batches).split(4)
    noise = gradient_noise_scale(
        (lambda part=part: mean_loss(model, part) for part in parts), params, batch_size=4
    )
    loss = mean_loss(model, tokens)
    counts, stored = spread(product, params, effort)
    row = {
        "when": when,
        "step": run.count,
        "nats": digits(loss),
        "gradient": digits(global_norm(torch.autograd.grad(loss, params))),
        "largest": digits(found[0].values[0]),
        "smallest": digits(-found[1].values[0]),
        "residual": digits(max(end.residuals[0] for end in found), 1),
        "other_batch": digits(other),
        "gauss_newton": digits(convex),
        **estimated("trace", trace),
        **estimated("gauss_newton_trace", tangent_trace),
        **counts,
        "noise_scale": digits(noise.value, 2),
        "noise": digits(noise.noise),
        "signal": digits(noise.signal),
    }
    listed = [
        {"when": when, "end": name, "rank": rank, "value": digits(sign * value),
         "residual": digits(residual, 1)}
        for name, sign, end in (("top", 1, found[0]), ("bottom", -1, found[1]))
        for rank, (value, residual) in enumerate(zip(end.values, end.residuals, strict=True), 1)
    ]  # fmt: skip
    return {"points": [row], "eigenvalues": listed, "density": [{"when": when} | stored]}


FULL = Effort()


def measure(steps: int = race.STEPS, effort: Effort = FULL) -> dict[str, Any]:
    """Train, and stop to measure."""
    run, rate = race.Run("AdamW", LR, SEED), race.schedule("cosine", steps)
    tokens, params = drawn(2, effort.windows), list(run.model.parameters())
    settings = race.MODEL | {
        "parameters": sum(param.numel() for param in params), "steps": steps, "lr": LR,
        "batch": race.BATCH, "length": race.LENGTH, "windows": effort.windows,
        "bytes": effort.windows * race.LENGTH, "probes": effort.probes,
        "products": effort.steps, "trace_probes": effort.trace_probes,
        "noise_windows": 4 * effort.noise_batches, "curved": CURVED, "width": WIDTH,
    }  # fmt: skip
    found: dict[str, Any] = {
        "settings": [settings], "points": [], "eigenvalues": [], "density": [], "path": [],
    }  # fmt: skip
    for step in sorted(step for step in {*WHEN, *effort.between} if step <= steps):
        run.follow(lambda k, start=run.count: rate(start + k), step - run.count)
        product = hessian_of(run.model, tokens)
        count = effort.ends if step in WHEN else 1
        both = ends(product, params, count=count, products=effort.products)
        # the rate of the step to come; at the end that of the last one
        lr = LR * rate(min(step, steps - 1))
        found["path"].append(on_the_way(run, tokens, product, both, lr))
        print(found["path"][-1], flush=True)
        if step in WHEN:
            for name, rows in point(run, tokens, product, both, effort).items():
                found[name] += rows
    settings["held_out_nats"] = run.losses()[1]
    return found


# ---- the figure


def smoothed(density: dict[str, Any], places: Tensor) -> Tensor:
    """Share of all eigenvalues in a unit of curvature around each place."""
    found = SpectralDensity(
        *(torch.tensor(density[part], dtype=torch.float64) for part in ("nodes", "weights"))
    )

    def bumps(nodes: Tensor) -> Tensor:
        gap = (nodes - places[:, None, None]) / WIDTH
        return torch.exp(-gap.square() / 2) / (WIDTH * math.sqrt(2 * math.pi))

    return spectral_average(found, bumps).value


def figure(found: dict[str, Any]) -> str:
    """Eigenvalues in a unit of curvature at the three points, below zero and above, as SVG."""
    plotting.use_style()
    drawing, panels = plt.subplots(3, 1, figsize=(6.4, 5.4), sharex=True, sharey=True)
    (settings,) = found["settings"]
    ends_of = [row["value"] for row in found["eigenvalues"]]
    low, high = math.floor(min(ends_of)) - 0.5, math.ceil(max(ends_of)) + 0.5
    places = torch.arange(round(12 * low), round(12 * high) + 1, dtype=torch.float64) / 12
    for axes, density, point in zip(panels, found["density"], found["points"], strict=True):
        heights = settings["parameters"] * smoothed(density, places)
        for side, color in ((places <= 0, plotting.COLORS[1]), (places >= 0, plotting.COLORS[0])):
            x = plotting.rounded(places[side], 3)
            y = plotting.rounded(heights[side].clamp(min=FLOOR), 2)
            axes.fill_between(x, FLOOR, y, color=color, alpha=0.35, linewidth=0)
            axes.plot(x, y, color=color, linewidth=1.4)
        outer = [row for row in found["eigenvalues"] if row["when"] == density["when"]]
        for row in outer:
            color = plotting.COLORS[row["end"] == "bottom"]
            axes.plot(row["value"], FLOOR * 1.8, "|", color=color, markersize=8)
        label = f"{point['when']}: {point['nats']:.2f} nats a byte"
        axes.text(1.0, 0.95, label, transform=axes.transAxes, ha="right", va="top")
    panels[0].set(yscale="log", ylim=(FLOOR, 3e6), xlim=(low, high))
    panels[0].set_yticks([1, 1e2, 1e4, 1e6])
    panels[0].minorticks_off()
    drawing.supylabel("eigenvalues in a unit of curvature", color=plotting.INK, fontsize=10)
    panels[-1].set_xlabel("curvature: eigenvalue of the Hessian")
    return plotting.svg(drawing)


FLOOR = 0.3  # of the figure; a single eigenvalue makes a bump of almost three


def draw() -> None:
    found = json.loads((RESULTS / "spectrum.json").read_text("utf-8"))
    (RESULTS / "spectrum.svg").write_text(figure(found), "utf-8")


def main() -> None:
    from benchmarks.__main__ import store  # it imports all benchmarks

    torch.set_num_threads(1)
    store("spectrum", measure())
    draw()


if __name__ == "__main__":
    main()

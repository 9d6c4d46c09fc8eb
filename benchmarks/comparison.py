"""The table of textbook section 4.6.5, measured cell by cell on small problems.

``python -m benchmarks.comparison``: one thread, less than three minutes. Stores
``results/comparison.json`` and draws ``results/comparison.svg`` from it. What is stored are
slopes, curvatures, inputs and counts of steps, never times, so that other load does no harm.
"""

import json
import math
from collections.abc import Callable
from typing import Any

import matplotlib.pyplot as plt
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.figures import RESULTS
from lmlosses import cpu_generator
from lmlosses.analysis.curvature import hessian
from lmlosses.analysis.landscape import convexity_gap
from lmlosses.lab import plotting
from lmlosses.lab.alignment import finite_task, minimize, token_logps
from lmlosses.losses import binary_cross_entropy, cross_entropy, squared_error
from lmlosses.losses.policy import ppo_clip_loss, reinforce_loss
from lmlosses.losses.preference import dpo_loss
from lmlosses.losses.reward import bradley_terry_loss, kl_regularized_objective
from lmlosses.precision import breaking_points

LOSSES = ("squared error", "cross-entropy", "InfoNCE", "RLHF")
PRINTED = {  # the textbook's table, in English
    "squared error": ("convex", "severe", "good", "low"),
    "cross-entropy": ("convex", "none", "needs care", "medium"),
    "InfoNCE": ("not convex", "none", "depends on the implementation", "high"),
    "RLHF": ("not convex", "possible", "complicated", "very high"),
}
CLASSES, SAMPLES, SEEDS, STARTS = 3, 60, 5, 20
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # 95 %, by the number of values
STRETCH = 3.0  # of one feature
WIDTH = 8  # hidden units of the network
TEMPERATURE, BETA = 0.1, 0.3
CHORDS, POINTS = 200, 12  # for convexity
SHARES = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9], dtype=torch.float64)
MARGINS = (-1.0, -5.0, -10.0, -20.0)
RATES = 10 ** torch.linspace(-3, 3, 37, dtype=torch.float64)
STEPS, WITHIN = 400, 2.0
TARGET = {"linear": 0.01, "two layers": 0.2}  # share of the first excess that may be left
TEMPERATURES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
NEGATIVES = (1, 3, 15, 63)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

Objective = Callable[[Tensor], Tensor]

# ---- the small problem


def problem(seed: int) -> tuple[Tensor, Tensor]:
    """Three overlapping clouds in the plane, stretched; features with a constant, and labels."""
    generator = cpu_generator(seed)
    labels = torch.arange(SAMPLES) % CLASSES
    angles = labels * (2 * math.pi / CLASSES)
    centers = 1.2 * torch.stack([angles.cos(), angles.sin()], dim=-1)
    points = centers + torch.randn(SAMPLES, 2, generator=generator, dtype=torch.float64)
    points = points * torch.tensor([1.0, STRETCH], dtype=torch.float64)
    return torch.cat([points, torch.ones(SAMPLES, 1, dtype=torch.float64)], dim=-1), labels


def info_nce(similarities: Tensor, positives: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of similarities over a temperature: which key belongs to each query."""
    return cross_entropy(similarities / temperature, positives)


def from_scores(name: str, scores: Tensor, labels: Tensor) -> Tensor:
    """Mean loss of scores [..., samples, classes]: one number for each leading index."""
    one_hot = F.one_hot(labels, CLASSES).to(scores.dtype).expand_as(scores)
    targets = labels.expand(scores.shape[:-1])
    even = torch.full_like(scores, -math.log(CLASSES))
    match name:
        case "squared error":
            return squared_error(scores, one_hot).sum(-1).mean(-1)
        case "squared error behind a softmax":
            return squared_error(scores.softmax(-1), one_hot).sum(-1).mean(-1)
        case "cross-entropy":
            return cross_entropy(scores, targets).mean(-1)
        case "policy, KL-regularized":
            value = kl_regularized_objective(scores.log_softmax(-1), even, one_hot, beta=BETA)
            return -value.mean(-1)
        case "reward model":
            right = (scores * one_hot).sum(-1, keepdim=True).expand_as(scores)
            pairs = bradley_terry_loss(right, scores) * (1 - one_hot)
            return pairs.sum(-1).mean(-1) / (CLASSES - 1)
        case "DPO":
            logps = scores.log_softmax(-1)
            right = (logps * one_hot).sum(-1, keepdim=True).expand_as(scores)
            pairs = dpo_loss(right, logps, even, even, beta=BETA) * (1 - one_hot)
            return pairs.sum(-1).mean(-1) / (CLASSES - 1)
    raise ValueError(name)


def outputs(model: str, params: Tensor, x: Tensor) -> Tensor:
    """Scores of a linear model or of two layers, for each leading index of the parameters."""
    features = x.shape[-1]
    if model == "linear":
        return x @ params.unflatten(-1, (features, CLASSES))
    inner, outer = params.split([features * WIDTH, WIDTH * CLASSES], dim=-1)
    hidden = (x @ inner.unflatten(-1, (features, WIDTH))).tanh()
    return hidden @ outer.unflatten(-1, (WIDTH, CLASSES))


def size(name: str, model: str) -> int:
    count = 3 * CLASSES if model == "linear" else 3 * WIDTH + WIDTH * CLASSES
    return count + (CLASSES * CLASSES if name == "InfoNCE" else 0)


def mean_loss(name: str, model: str, params: Tensor, x: Tensor, labels: Tensor) -> Tensor:
    """The loss as a function of one flat vector of parameters for each leading index."""
    if name != "InfoNCE":
        return from_scores(name, outputs(model, params, x), labels)
    weights, keys = params[..., : -CLASSES * CLASSES], params[..., -CLASSES * CLASSES :]
    queries = F.normalize(outputs(model, weights, x), dim=-1)  # one key a class, learned
    keys = F.normalize(keys.unflatten(-1, (CLASSES, CLASSES)), dim=-1)
    similarities = queries @ keys.transpose(-1, -2)
    return info_nce(similarities, labels.expand(similarities.shape[:-1]), TEMPERATURE).mean(-1)


# ---- convexity


def variables() -> list[tuple[str, str, Objective, Callable[[torch.Generator], Tensor]]]:
    """Loss, variable, the loss as a function of it, and a source of random points."""
    x, labels = problem(0)
    few_labels = labels[:6]

    def normal(*shape: int, scale: float = 2.0) -> Callable[[torch.Generator], Tensor]:
        return lambda g: scale * torch.randn(*shape, generator=g, dtype=torch.float64)

    def weights(name: str, model: str) -> tuple[Objective, Callable[[torch.Generator], Tensor]]:
        return (lambda v: mean_loss(name, model, v, x, labels)), normal(size(name, model))

    def scores(name: str) -> tuple[Objective, Callable[[torch.Generator], Tensor]]:
        return (lambda v: from_scores(name, v, few_labels)), normal(6, CLASSES)

    def probabilities(g: torch.Generator) -> Tensor:
        times = -torch.rand(6, CLASSES, generator=g, dtype=torch.float64).log()
        return (times / times.sum(-1, keepdim=True))[:, :-1]

    def whole(free: Tensor) -> Tensor:
        return torch.cat([free, 1 - free.sum(-1, keepdim=True)], dim=-1).log()

    def cosine(queries: Tensor, keys: Tensor) -> Tensor:
        return F.normalize(queries, dim=-1) @ F.normalize(keys, dim=-1).T

    at = torch.arange(6)
    fixed = torch.randn(6, 3, generator=cpu_generator(5), dtype=torch.float64)
    task = finite_task()
    everything = [
        part.flatten() for part in torch.meshgrid(*[torch.arange(27)] * 2, indexing="ij")
    ]

    def by_pairs(logps: Tensor) -> Tensor:  # each answer against each, the better one chosen
        first, second = everything
        better = task.rewards[0, first] > task.rewards[0, second]
        chosen, rejected = first[better], second[better]
        reference = task.ref_logps[0].double()
        return dpo_loss(
            logps[chosen], logps[rejected], reference[chosen], reference[rejected], beta=1.0
        ).mean()

    def letters(table: Tensor) -> Tensor:
        tables = table.expand(3, *table.shape)
        return token_logps(task, tables)[0].sum(-1)

    surrogate = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0], dtype=torch.float64)

    def clipped(ratios: Tensor) -> Tensor:
        return ppo_clip_loss(ratios.log(), torch.zeros_like(ratios), surrogate).mean()

    return [
        ("squared error", "output", *scores("squared error")),
        ("squared error", "weights, linear", *weights("squared error", "linear")),
        ("squared error", "logits behind a softmax", *scores("squared error behind a softmax")),
        ("squared error", "weights, two layers", *weights("squared error", "two layers")),
        ("cross-entropy", "logits", *scores("cross-entropy")),
        ("cross-entropy", "weights, linear", *weights("cross-entropy", "linear")),
        ("cross-entropy", "weights, two layers", *weights("cross-entropy", "two layers")),
        ("InfoNCE", "similarities",
         lambda s: info_nce(s, at, TEMPERATURE).mean(), normal(6, 6, scale=0.3)),
        ("InfoNCE", "queries, dot product",
         lambda q: info_nce(q @ fixed.T, at, 1.0).mean(), normal(6, 3)),
        ("InfoNCE", "queries, cosine",
         lambda q: info_nce(cosine(q, fixed), at, TEMPERATURE).mean(), normal(6, 3)),
        ("InfoNCE", "queries and keys",
         lambda v: info_nce(v[0] @ v[1].T, at, 1.0).mean(), normal(2, 6, 3)),
        ("RLHF", "policy's probabilities",
         lambda p: -kl_regularized_objective(
             whole(p), whole(torch.full_like(p, 1 / CLASSES)),
             F.one_hot(few_labels, CLASSES).double(), beta=BETA).mean(), probabilities),
        ("RLHF", "policy's logits", *scores("policy, KL-regularized")),
        ("RLHF", "rewards (Bradley–Terry)", *scores("reward model")),
        ("RLHF", "ratios (PPO)", clipped,
         lambda g: 0.05 + 3 * torch.rand(6, generator=g, dtype=torch.float64)),
        ("RLHF", "logits of answers (DPO)",
         lambda s: by_pairs(s.log_softmax(-1)), normal(27)),
        ("RLHF", "logits of tokens (DPO)",
         lambda s: by_pairs(letters(s)), normal(13, 3)),
    ]  # fmt: skip


def convexity() -> list[dict[str, Any]]:
    rows = []
    for loss, variable, objective, draw in variables():
        generator = cpu_generator(1)
        point = draw(generator).requires_grad_()
        value = lambda f=objective, p=point: f(p)  # noqa: E731
        gaps, least, largest = [], [], []
        with torch.no_grad():
            for _ in range(CHORDS):
                ends = [draw(generator)], [draw(generator)]
                gaps.append(convexity_gap(value, [point], *ends, SHARES))
        for _ in range(POINTS):
            with torch.no_grad():
                point.copy_(draw(generator))
            found = torch.linalg.eigvalsh(hessian(value, [point]))
            least.append(found[0])
            largest.append(found.abs().max())
        gap = torch.stack(gaps)
        lowest = (gap.min() / gap.abs().max()).item()
        curvature = (torch.stack(least).min() / torch.stack(largest).max().clamp(min=1e-6)).item()
        violated = lowest < -1e-9 or curvature < -1e-9
        rows.append({
            "loss": loss, "printed": PRINTED[loss][0], "variable": variable,
            "below_chord": (gap > -1e-9 * gap.abs().max()).all(dim=1).double().mean().item(),
            "gap": 0.0 if abs(lowest) < 1e-9 else lowest,
            "curvature": 0.0 if abs(curvature) < 1e-9 else curvature,
            "convex": "no" if violated else "yes",
        })  # fmt: skip
    return rows


# ---- saturation


def slopes(loss: Callable[[Tensor], Tensor]) -> list[float]:
    margins = torch.tensor(MARGINS, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(loss(margins).sum(), margins)
    return slope.abs().tolist()


def saturation() -> list[dict[str, Any]]:
    def two(m: Tensor) -> Tensor:
        return torch.stack([m, torch.zeros_like(m)], dim=-1)

    def first(m: Tensor) -> Tensor:
        return torch.zeros(m.shape, dtype=torch.long)

    one_hot = torch.tensor([1.0, 0.0], dtype=torch.float64).expand(len(MARGINS), 2)
    even = torch.full_like(one_hot, -math.log(2))
    zero, one = torch.zeros(2, len(MARGINS), dtype=torch.float64) + torch.tensor([[0.0], [1.0]])

    def along_circle(m: Tensor) -> Tensor:
        """From the margin to the angle between a query and its key, whose opposite is wrong."""
        angle = (m.detach() * TEMPERATURE / 2).clamp(-1, 1).arccos()
        turned = angle + (m - m.detach())  # its slope in the margin is that in the angle
        return info_nce(torch.stack([turned.cos(), -turned.cos()], dim=-1), first(m), TEMPERATURE)

    places: list[tuple[str, str, Callable[[Tensor], Tensor]]] = [
        ("squared error", "output, no squashing", lambda m: squared_error(m, zero)),
        ("squared error", "logit behind a sigmoid", lambda m: squared_error(m.sigmoid(), one)),
        ("squared error", "logits behind a softmax",
         lambda m: squared_error(two(m).softmax(-1), one_hot).sum(-1)),
        ("cross-entropy", "logit", lambda m: binary_cross_entropy(m, one)),
        ("InfoNCE", "score (similarity over temperature)",
         lambda m: cross_entropy(two(m), first(m))),
        ("InfoNCE", "angle of the query", along_circle),
        ("RLHF", "policy's logit",
         lambda m: -kl_regularized_objective(two(m).log_softmax(-1), even, one_hot, beta=BETA)),
        ("RLHF", "reward (Bradley–Terry)", lambda m: bradley_terry_loss(m, zero)),
        ("RLHF", "log-ratio (DPO)", lambda m: dpo_loss(m, zero, zero, zero, beta=BETA)),
        ("RLHF", "log-ratio (PPO)", lambda m: ppo_clip_loss(m, zero, one)),
    ]  # fmt: skip
    rows = []
    for loss, place, function in places:
        found = slopes(function)
        row: dict[str, Any] = {"loss": loss, "printed": PRINTED[loss][1], "place": place}
        for margin, slope in zip(MARGINS, found, strict=True):
            row[f"at{-margin:.0f}"] = slope
            row[f"shown{-margin:.0f}"] = few_digits(slope)
        least = min(found)
        row["vanishes"] = "yes" if least < 1e-3 * max(found) else "no"
        rows.append(row)
    return rows


def few_digits(value: float) -> str:
    if abs(value) < 1e-12:  # rounding
        return "0"
    if 0.0095 <= abs(value) < 1000:
        return f"{value:.2g}" if abs(value) < 10 else f"{value:.0f}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}".replace("-", "−")


# ---- stability


def first_infinite(naive: Callable[[Tensor], Tensor], dtype: torch.dtype) -> float:
    """Smallest number of at least one for which the form is infinite or NaN, to the last bit."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    works, fails = (int(torch.tensor(end, dtype=dtype).view(bits))
                    for end in (1.0, torch.finfo(dtype).max))  # fmt: skip
    while fails - works > 1:
        middle = (works + fails) // 2
        fine = naive(torch.tensor(middle, dtype=bits).view(dtype)).isfinite().all()
        works, fails = (middle, fails) if fine else (works, middle)
    return torch.tensor(fails, dtype=bits).view(dtype).item()


def stability() -> list[dict[str, Any]]:
    stored = {(point.form, point.dtype): point.x for point in breaking_points()}

    def contrast(scale: Tensor) -> Tensor:  # cosines of 1 and 0, naively
        similarities = torch.stack([scale, 0 * scale])
        return -(similarities.exp()[0] / similarities.exp().sum()).log()

    # naive form, what x is, where it breaks, the library's form, its value in exact arithmetic
    forms: list[tuple[str, str, str, Callable[[torch.dtype], float], Objective, Objective]] = [
        ("squared error", "e · e", "error",
         lambda d: first_infinite(lambda x: x * x, d),
         lambda x: squared_error(x, torch.zeros_like(x)), lambda x: x * x),
        ("cross-entropy", "−log(softmax(z)[y])", "wrong margin",
         lambda d: stored["log(softmax([-x, 0]))[0]", d],
         lambda x: cross_entropy(torch.stack([-x, 0 * x]), torch.tensor(0)),
         lambda x: x + (-x).exp().log1p()),
        ("InfoNCE", "−log(exp(s/τ) / Σ exp(s/τ))", "1/τ",
         lambda d: first_infinite(contrast, d),
         lambda x: cross_entropy(torch.stack([0 * x, x]), torch.tensor(0)),
         lambda x: x + (-x).exp().log1p()),
        ("RLHF", "−log(σ(h)): reward model, DPO", "wrong margin",
         lambda d: stored["log(sigmoid(-x))", d],
         lambda x: bradley_terry_loss(-x, torch.zeros_like(x)),
         lambda x: x + (-x).exp().log1p()),
        ("RLHF", "exp(log π − log π_old): PPO", "log-ratio",
         lambda d: stored["exp(x)", d],
         lambda x: ppo_clip_loss(x, torch.zeros_like(x), torch.ones_like(x)),
         lambda x: torch.full_like(x, -1.2)),
        ("RLHF", "π(y) as a product over tokens", "nats an answer",
         lambda d: stored["exp(-x)", d],
         lambda x: -reinforce_loss(-x, torch.ones_like(x)), lambda x: -x),
    ]  # fmt: skip
    rows = []
    for loss, form, unit, breaks, stable, exact in forms:
        row: dict[str, Any] = {"loss": loss, "printed": PRINTED[loss][2], "form": form, "x": unit}
        for dtype in DTYPES:
            name = str(dtype).removeprefix("torch.")
            row[name] = breaks(dtype)
            row["shown_" + name] = (
                few_digits(row[name]) if row[name] >= 1e4 else f"{row[name]:.1f}"
            )
        for dtype in (torch.float16, torch.float32):  # the library's form at the same input
            name = str(dtype).removeprefix("torch.")
            at = torch.tensor(row[name], dtype=dtype)
            wanted, got = exact(at.double()), stable(at).double()
            error = ((got - wanted) / wanted).abs().item()
            row["stable_" + name] = "works" if error < 1e-5 else "fails"
        rows.append(row)
    return rows


# ---- learning rates and speed


def best_loss(name: str, model: str, x: Tensor, labels: Tensor, starts: list[Tensor]) -> Tensor:
    """The least loss that L-BFGS finds from several starts."""
    found = [
        minimize(lambda v: mean_loss(name, model, v, x, labels), start, steps=200)
        for start in starts
    ]
    with torch.no_grad():
        return torch.stack([mean_loss(name, model, end, x, labels) for end in found]).min()


def descend(
    name: str, model: str, x: Tensor, labels: Tensor, start: Tensor, adam: bool = False
) -> Tensor:
    """Losses [steps, rates, seeds] of descent at every rate; infinite once it diverged."""
    params = start.expand(len(RATES), *start.shape).clone()
    alive = torch.ones(params.shape[:2], dtype=torch.bool)
    rates = RATES[:, None, None]
    first, second = torch.zeros_like(params), torch.zeros_like(params)
    history = []
    for step in range(STEPS + 1):
        params.requires_grad_()
        losses = mean_loss(name, model, params, x, labels)
        (gradient,) = torch.autograd.grad(losses.sum(), params)
        losses = losses.detach()
        params = params.detach()
        history.append(losses.where(alive & losses.isfinite(), math.inf))
        if adam:
            first = first.lerp(gradient, 0.1)
            second = second.lerp(gradient.square(), 0.001)
            hat = second / (1 - 0.999 ** (step + 1))
            gradient = first / (1 - 0.9 ** (step + 1)) / (hat.sqrt() + 1e-8)
        moved = params - rates * gradient
        alive = alive & (moved.abs() < 1e12).all(-1)
        params = moved.where(alive[..., None], start)
    return torch.stack(history)


def reached(history: Tensor, target: Tensor) -> Tensor:
    """First step from which the loss stays at or below the target: [rates, seeds]."""
    above = history > target
    last = torch.where(above, torch.arange(len(history))[:, None, None], -1).amax(0)
    return torch.where(last < len(history) - 1, (last + 1).double(), math.inf)


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % interval, by Student's t."""
    tensor = torch.tensor(values, dtype=torch.float64)
    half = STUDENT[len(values)] * (tensor.std() / math.sqrt(len(values))).item()
    return tensor.mean().item(), half


def window(steps: Tensor) -> tuple[int, int, int]:
    """Positions of the best rate and of the ends of those that need at most twice its steps."""
    best = int(steps.argmin())
    low = high = best
    while low > 0 and steps[low - 1] <= WITHIN * steps[best]:
        low -= 1
    while high < len(steps) - 1 and steps[high + 1] <= WITHIN * steps[best]:
        high += 1
    return best, low, high


RACES = (
    ("squared error", "squared error"),
    ("squared error", "squared error behind a softmax"),
    ("cross-entropy", "cross-entropy"),
    ("InfoNCE", "InfoNCE"),
    ("RLHF", "policy, KL-regularized"),
    ("RLHF", "reward model"),
)


def sensitivity() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    data = [problem(seed) for seed in range(SEEDS)]
    x, labels = torch.stack([d[0] for d in data]), data[0][1]  # the labels are the same for all
    rows, curves = [], []
    for model in ("linear", "two layers"):
        for loss, name in RACES:
            start = torch.stack([
                random_start(name, model, 100 + seed) for seed in range(SEEDS)
            ])  # fmt: skip
            least = torch.stack([
                best_loss(name, model, x[s], labels, [start[s]] if model == "linear" else [
                    start[s], *(random_start(name, model, 200 + 10 * s + i) for i in range(3))])
                for s in range(SEEDS)
            ])  # fmt: skip
            runs = [("descent", start), ("Adam", start)]
            if model == "linear":
                runs.append(("descent, wrong start", torch.stack([
                    wrong_start(name, x[s], labels) for s in range(SEEDS)
                ])))  # fmt: skip
            for optimizer, begin in runs:
                history = descend(name, model, x, labels, begin, adam=optimizer == "Adam")
                if optimizer == "descent":
                    first = history[0, 0]
                floor = torch.minimum(least, history.amin((0, 1)))
                target = floor + TARGET[model] * (first - floor)
                steps = reached(history, target)
                rows.append(race_row(loss, name, model, optimizer, steps))
                if optimizer == "descent":
                    rows[-1] |= shape_of(name, model, x, labels, start, target)
                middle = steps.quantile(0.5, dim=1, interpolation="lower")
                curves += [
                    {"what": name, "model": model, "optimizer": optimizer, "rate": rate,
                     "steps": step if math.isfinite(step) else None}
                    for rate, step in zip(RATES.tolist(), middle.tolist(), strict=True)
                ]  # fmt: skip
    return rows, curves


def random_start(name: str, model: str, seed: int) -> Tensor:
    generator = cpu_generator(seed)
    return 0.5 * torch.randn(size(name, model), generator=generator, dtype=torch.float64)


def wrong_start(name: str, x: Tensor, labels: Tensor) -> Tensor:
    """Four times what cross-entropy learns, turned around: wrong about most samples, and sure."""
    learned = minimize(
        lambda v: mean_loss("cross-entropy", "linear", v, x, labels),
        torch.zeros(size("cross-entropy", "linear"), dtype=torch.float64),
    )
    if name != "InfoNCE":
        return -4 * learned
    return torch.cat([-4 * learned, torch.eye(CLASSES, dtype=torch.float64).flatten()])


def race_row(loss: str, name: str, model: str, optimizer: str, steps: Tensor) -> dict[str, Any]:
    best, widths, rooms, rates = [], [], [], []
    for mine in steps.unbind(dim=1):
        if not mine.isfinite().any():
            continue
        position, low, high = window(mine)
        best.append(mine[position].clamp(min=1).log10().item())
        widths.append((RATES[high] / RATES[low]).log10().item())
        beyond = [i for i in range(position, len(RATES)) if not mine[i].isfinite()]
        end = beyond[0] if beyond else len(RATES) - 1
        rooms.append((RATES[end] / RATES[position]).log10().item())
        rates.append(RATES[position].log10().item())
    row: dict[str, Any] = {
        "loss": loss, "printed": PRINTED[loss][3], "what": name, "model": model,
        "optimizer": optimizer, "reached": f"{len(best)} of {SEEDS}",
    }  # fmt: skip
    if len(best) < 2:
        return row | dict.fromkeys(("steps", "width", "room"))
    for key, logs in (("steps", best), ("width", widths), ("room", rooms), ("rate", rates)):
        middle, half = interval(logs)
        row |= {key: 10**middle, key + "_text": spread(middle, half)}
    return row


def spread(log: float, half: float) -> str:
    """A factor with its interval, from the mean of its logarithm."""
    low, high = (few_digits(10 ** (log + side * half)) for side in (-1, 1))
    return f"{few_digits(10**log)} ({low} to {high})" if low != high else few_digits(10**log)


def shape_of(
    name: str, model: str, x: Tensor, labels: Tensor, start: Tensor, target: Tensor
) -> dict[str, Any]:
    """Largest curvature at the start and the end, condition there; how many starts get there."""
    before, after, condition, hits = [], [], [], []
    for s in range(SEEDS):
        function = lambda v, s=s: mean_loss(name, model, v, x[s], labels)  # noqa: E731
        end = minimize(function, start[s], steps=150)
        with torch.no_grad():
            hits.append(float(function(end) <= target[s]))
        if model != "linear":
            continue
        for point, into in ((start[s], before), (end, after)):
            here = point.clone().requires_grad_()
            found = torch.linalg.eigvalsh(hessian(lambda p=here, f=function: f(p), [here]))
            into.append(found[-1].log10().item())
        curved = found[found > 1e-6 * found[-1]]
        condition.append((curved[-1] / curved[0]).log10().item())
    row: dict[str, Any] = {"hits": sum(hits) / SEEDS}
    if model == "linear":
        logs = (("curvature_start", before), ("curvature_end", after), ("condition", condition))
        row |= {key: 10 ** (sum(values) / SEEDS) for key, values in logs}
    return row


# ---- InfoNCE's own knobs


def views(seed: int, count: int) -> tuple[Tensor, Tensor]:
    """Pairs that share four hidden numbers, each seen through its own mixture and noise."""
    mixing = cpu_generator(1000 + seed)
    maps = torch.randn(2, 4, 8, generator=mixing, dtype=torch.float64)
    generator = cpu_generator(2000 + seed + count)
    hidden = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    noise = torch.randn(2, count, 8, generator=generator, dtype=torch.float64)
    first, second = hidden @ maps + 0.4 * noise
    return first, second


def retrieval(seed: int, temperature: float, negatives: int, steps: int = 200) -> float:
    """Share of fresh queries whose own key is the nearest of 256, after training two encoders."""
    first, second = views(seed, 1024)
    generator = cpu_generator(seed)
    encoders = 0.3 * torch.randn(2, 8, 4, generator=generator, dtype=torch.float64)
    encoders.requires_grad_()
    optimizer = torch.optim.Adam([encoders], lr=0.02)
    at = torch.arange(64)
    others = (at[:, None] + torch.arange(negatives + 1)) % 64  # its own key, and some of the rest
    for _ in range(steps):
        batch = torch.randint(1024, (64,), generator=generator)
        queries = F.normalize(first[batch] @ encoders[0], dim=-1)
        keys = F.normalize(second[batch] @ encoders[1], dim=-1)
        similarities = (queries @ keys.T).gather(1, others)
        loss = info_nce(similarities, torch.zeros_like(at), temperature).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        first, second = views(seed, 256)
        queries = F.normalize(first @ encoders[0], dim=-1)
        keys = F.normalize(second @ encoders[1], dim=-1)
        return ((queries @ keys.T).argmax(-1) == torch.arange(256)).double().mean().item()


def knobs() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Accuracy for each setting, and as a share of what the best setting reaches on that seed."""
    found: list[list[dict[str, Any]]] = []
    for settings in (
        [(temperature, max(NEGATIVES)) for temperature in TEMPERATURES],
        [(TEMPERATURE, negatives) for negatives in NEGATIVES],
    ):
        accuracy = torch.tensor(
            [[retrieval(seed, *setting) for seed in range(SEEDS)] for setting in settings]
        )
        rows = []
        for setting, mine in zip(settings, accuracy / accuracy.amax(0), strict=True):
            share, half = interval(mine.tolist())
            rows.append({
                "temperature": setting[0], "negatives": setting[1],
                "accuracy": accuracy[len(rows)].mean().item(),
                "share": share, "text": f"{share:.2f} ± {half:.2f}",
            })  # fmt: skip
        found.append(rows)
    return found[0], found[1]


def minima() -> list[dict[str, Any]]:
    """Where descent on free pairs of vectors ends: in how many different losses."""
    rows = []
    for pairs, dim in ((6, 2), (12, 3)):
        at, ends = torch.arange(pairs), []

        def loss(v: Tensor, at: Tensor = at) -> Tensor:
            queries, keys = F.normalize(v, dim=-1)
            return info_nce(queries @ keys.T, at, TEMPERATURE).mean()

        for seed in range(STARTS):
            generator = cpu_generator(seed)
            start = torch.randn(2, pairs, dim, generator=generator, dtype=torch.float64)
            end = minimize(loss, start, steps=1000).requires_grad_()
            curvatures = torch.linalg.eigvalsh(hessian(lambda p=end, f=loss: f(p), [end]))
            (slope,) = torch.autograd.grad(loss(end), end)
            if slope.abs().max() < 1e-3 and curvatures[0] > -1e-3 * curvatures[-1]:
                ends.append(loss(end).item())
        values = torch.tensor(ends, dtype=torch.float64).sort().values
        rows.append({
            "pairs": pairs, "dim": dim, "runs": STARTS, "minima": len(ends),
            "levels": 1 + int((values.diff() > 1e-3).sum()),
            "best": values[0].item(), "worst": values[-1].item(),
        })  # fmt: skip
    return rows


# ---- the sixteen cells


def cells(stored: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The textbook's table cell by cell: what is printed, and what the other parts say of it."""
    rows = []
    for loss in LOSSES:
        mine = {part: [row for row in stored[part] if row["loss"] == loss]
                for part in ("convexity", "saturation", "stability", "race")}  # fmt: skip
        convex, not_convex = (
            "; ".join(row["variable"] for row in mine["convexity"] if row["convex"] == verdict)
            for verdict in ("yes", "no")
        )
        gone, kept = (
            "; ".join(row["place"] for row in mine["saturation"] if row["vanishes"] == verdict)
            for verdict in ("yes", "no")
        )
        breaks = "; ".join(
            f"{row['x']} {row['shown_float16']} in float16, {row['shown_float32']} in float32"
            for row in mine["stability"]
        )
        plain = [row for row in mine["race"]
                 if row["model"] == "linear" and row["optimizer"] == "descent"]  # fmt: skip
        steps = "; ".join(
            f"{few_digits(row['steps'])} steps, rates within a factor {few_digits(row['width'])}"
            + (f" ({row['what']})" if row["what"] != loss else "")
            for row in plain
        )
        measured = (
            f"in: {convex}. Not in: {not_convex}.",
            (f"gone: {gone}. " if gone else "") + f"Not gone: {kept}.",
            f"naive form breaks at: {breaks}.",
            f"{steps}.",
        )
        for column, printed, text in zip(
            ("convexity", "saturation", "stability", "difficulty"), PRINTED[loss], measured,
            strict=True,
        ):  # fmt: skip
            rows.append({"loss": loss, "column": column, "printed": printed, "measured": text})
    return rows


# ---- all of it


def measure() -> dict[str, list[dict[str, Any]]]:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    race, curves = sensitivity()
    temperatures, negatives = knobs()
    stored = {
        "settings": [{
            "samples": SAMPLES, "classes": CLASSES, "seeds": SEEDS, "width": WIDTH,
            "rates": len(RATES), "steps": STEPS, "within": WITHIN, "chords": CHORDS,
            "points": POINTS, "temperature": TEMPERATURE, "beta": BETA, "starts": STARTS,
            "left_linear": TARGET["linear"], "left_two_layers": TARGET["two layers"],
        }],
        "convexity": convexity(),
        "saturation": saturation(),
        "stability": stability(),
        "race": race,
        "curves": curves,
        "temperatures": temperatures,
        "negatives": negatives,
        "minima": minima(),
    }  # fmt: skip
    return {"cells": cells(stored)} | stored


NAMES = {
    "squared error": "squared error",
    "cross-entropy": "cross-entropy",
    "reward model": "reward model",
    "InfoNCE": "InfoNCE",
    "squared error behind a softmax": "squared error, softmax",
    "policy, KL-regularized": "policy",
}
PLACES = {  # of the labels, in rates over the best one and steps
    "squared error": (0.011, 14),
    "cross-entropy": (0.011, 34),
    "reward model": (0.011, 22),
    "InfoNCE": (30, 60),
    "squared error behind a softmax": (1.4, 29),
    "policy, KL-regularized": (1.7, 16),
}


def figure(stored: dict[str, list[dict[str, Any]]]) -> str:
    """Steps to the target against the rate over the best one, as SVG."""
    plotting.use_style()
    picture, axes = plt.subplots(figsize=(6.0, 3.6))
    for color, (what, name) in zip(plotting.COLORS, NAMES.items(), strict=True):
        rows = [row for row in stored["curves"]
                if (row["what"], row["model"], row["optimizer"]) == (what, "linear", "descent")
                and row["steps"] is not None]  # fmt: skip
        if not rows:
            continue
        best = min(rows, key=lambda row: row["steps"])["rate"]
        rates = plotting.rounded([row["rate"] / best for row in rows], 4)
        axes.plot(rates, [row["steps"] for row in rows], color=color, marker="o", markersize=3)
        plotting.label_line(axes, *PLACES[what], name, color, fontsize=9)
    axes.set(xscale="log", yscale="log", xlim=(0.008, 2000), ylim=(1, 500),
             xlabel="learning rate over the best one", ylabel="steps to the target")  # fmt: skip
    return plotting.svg(picture)


def draw() -> None:
    stored = json.loads((RESULTS / "comparison.json").read_text("utf-8"))
    (RESULTS / "comparison.svg").write_text(figure(stored), "utf-8")


if __name__ == "__main__":
    (RESULTS / "comparison.json").write_text(json.dumps(measure(), indent=1) + "\n", "utf-8")
    draw()

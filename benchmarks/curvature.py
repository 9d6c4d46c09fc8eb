"""Products with the Hessian as ratios to a gradient, memory of Lanczos, clipping against torch."""

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.measure import in_new_process, median_ratio, peak, seconds
from lmlosses import cpu_generator, token_mean
from lmlosses.analysis.curvature import (
    Loss,
    gauss_newton_product,
    gauss_newton_vp,
    hessian_product,
    hvp,
)
from lmlosses.analysis.spectrum import spectral_density
from lmlosses.lab.transformer import TinyTransformer
from lmlosses.losses.next_token import causal_lm_loss
from lmlosses.precision import clip_by_global_norm

MODEL = {"dim": 128, "layers": 4, "heads": 4}
TOKENS = (8, 128)
LARGE = {"dim": 320, "layers": 4, "heads": 4}  # five million weights
LANCZOS_STEPS = 50
GRADIENTS = ((20, 1_000_000), (2000, 10_000), (2000, 2000))  # tensors, and entries of each

Row = dict[str, Any]
Ways = dict[str, Callable[[], Any]]

WANTED = {"hvp": 3.3, "clip_by_global_norm": 1.05}


def problem(
    model: dict[str, int], tokens: tuple[int, ...]
) -> tuple[list[Tensor], Callable[[], Tensor], Callable[[Tensor], Tensor], Loss]:
    """Parameters of a language model, its logits, their loss, and the one after the other."""
    network = TinyTransformer(256, **model, generator=cpu_generator(0))
    rows = torch.randint(256, tokens, generator=cpu_generator(1))

    def logits() -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):  # the backend that can be differentiated twice
            return network(rows)

    def loss(scores: Tensor) -> Tensor:
        return token_mean(*causal_lm_loss(scores, rows))

    return list(network.parameters()), logits, loss, lambda: loss(logits())


def products(model: dict[str, int], tokens: tuple[int, ...], rounds: int) -> list[Row]:
    """Time of products with matrices of second derivatives, in gradients of the same loss."""
    params, logits, loss, whole = problem(model, tokens)
    vectors = [torch.randn(param.shape, generator=cpu_generator(2)) for param in params]
    hessian = hessian_product(whole, params)
    gauss_newton = gauss_newton_product(logits, loss, params)
    ways: Ways = {
        "gradient": lambda: torch.autograd.grad(whole(), params),
        "hvp": lambda: hvp(whole, params, vectors),
        "hessian_product, each product": lambda: hessian(vectors),
        "gauss_newton_vp": lambda: gauss_newton_vp(logits, loss, params, vectors),
        "gauss_newton_product, each product": lambda: gauss_newton(vectors),
    }
    return compared("gradient", seconds(ways, rounds=rounds))


def gradients(tensors: int, entries: int) -> list[torch.nn.Parameter]:
    """Parameters that have one."""
    generator = cpu_generator(3)
    params = [torch.nn.Parameter(torch.zeros(entries)) for _ in range(tensors)]
    for param in params:
        param.grad = torch.randn(entries, generator=generator)
    return params


def clipping(tensors: int, entries: int, rounds: int) -> list[Row]:
    """Clipping that shortens every time, since the bound shrinks; and one that finds all short."""
    params = gradients(tensors, entries)
    ours, theirs = "clip_by_global_norm", "torch, clip_grad_norm_"
    limit = 1.0

    def shrinking() -> float:
        nonlocal limit
        limit *= 0.999
        return limit

    clipped: Ways = {
        ours: lambda: clip_by_global_norm(params, max_norm=shrinking()),
        theirs: lambda: torch.nn.utils.clip_grad_norm_(params, shrinking()),
    }
    short: Ways = {
        ours: lambda: clip_by_global_norm(params, max_norm=10.0),
        theirs: lambda: torch.nn.utils.clip_grad_norm_(params, 10.0),
    }
    of = f"{tensors:,} × {entries:,}"
    return [
        row | {"of": of, "case": case}
        for case, ways in (("clipped", clipped), ("short enough", short))
        for row in compared(theirs, seconds(ways, rounds=rounds))
    ]


def compared(against: str, found: dict[str, list[float]]) -> list[Row]:
    """One row for each way but the one it is compared with."""
    return [
        {
            "what": name,
            "against": against,
            "of": None,
            "case": None,
            "ratio": round(median_ratio(found[name], found[against]), 2),
            "wanted": WANTED.get(name),
        }
        for name in found
        if name != against
    ]


def rows(*, rounds: int = 7) -> list[Row]:
    """Times, on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    found = products(MODEL, TOKENS, rounds)
    for tensors, entries in GRADIENTS:
        found += clipping(tensors, entries, 2 * rounds)
    torch.set_num_threads(before)
    return found


def lanczos_bytes(model: dict[str, int], steps: int) -> tuple[int, int]:
    """Entries of the parameters; the peak of Lanczos, with the graph of the gradient, in bytes."""
    params, _, _, whole = problem(model, (1, 16))

    def density(loss: Loss, params: list[Tensor], steps: int) -> Any:
        product, generator = hessian_product(loss, params), cpu_generator(4)
        return spectral_density(product, params, probes=1, steps=steps, generator=generator)

    def prepare() -> Callable[[], Any]:
        small, _, _, loss = problem({"dim": 8, "layers": 1, "heads": 2}, (1, 16))
        density(loss, small, 4)  # what libraries load and set up once is not counted
        return lambda: density(whole, params, steps)

    return sum(param.numel() for param in params), peak(prepare)


def memory(model: dict[str, int] = LARGE, steps: int = LANCZOS_STEPS) -> list[Row]:
    """Memory of the Lanczos method in copies of the parameters; in a process of its own."""
    settings = json.dumps({"model": model, "steps": steps})
    printed = in_new_process("benchmarks.curvature", "--peak", settings)
    parameters, held = json.loads(printed)
    copies, basis = held / (4 * parameters), steps + 1
    return [
        {
            "what": "spectral_density, one probe",
            "parameters": parameters,
            "steps": steps,
            "basis": basis,
            "copies": round(copies, 1),
            "beyond_basis": round(copies - basis, 2),
            "wanted": 4,
        }
    ]


def table(rows: list[Row], memory: list[Row]) -> str:
    """The rows as text, one line each."""
    lines = [f"{'what':36} {'against':24} {'of':>16} {'':>13} {'ratio':>6} {'wanted':>7}"]
    for row in rows:
        wanted = f"≤ {row['wanted']}" if row["wanted"] else ""
        lines.append(
            f"{row['what']:36} {row['against']:24} {row['of'] or '':>16} {row['case'] or '':>13} "
            f"{row['ratio']:6.2f} {wanted:>7}"
        )
    for row in memory:
        lines.append(
            f"{row['what']}: {row['steps']} products, {row['parameters']:,} weights: "
            f"{row['beyond_basis']} copies of them beyond the basis of {row['basis']} "
            f"(wanted < {row['wanted']})"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser()
    parser.add_argument("--peak", type=json.loads, required=True)
    torch.set_num_threads(1)
    print(json.dumps(lanczos_bytes(**parser.parse_args().peak)))

"""Process time of losses, forward and backward, as a ratio to torch's own.

What our form costs over torch's fused one is the price of one value per sample and of checks.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import lmlosses
from benchmarks.measure import ratio

Loss = Callable[[Tensor], Tensor]


def _step(loss: Loss, inputs: Tensor) -> Callable[[], None]:
    def run() -> None:
        inputs.grad = None
        loss(inputs).backward()

    return run


def cases() -> list[tuple[str, str, Loss, Loss, Tensor]]:
    """What is compared: our loss, torch's, and the input that both differentiate."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1024, 8192, generator=generator).requires_grad_()
    targets = torch.randint(8192, (1024,), generator=generator)
    scores = torch.randn(1_000_000, generator=generator).requires_grad_()
    values = torch.rand(1_000_000, generator=generator)
    return [
        (
            "token_mean(cross_entropy)", "F.cross_entropy",
            lambda x: lmlosses.token_mean(lmlosses.cross_entropy(x, targets)),
            lambda x: F.cross_entropy(x, targets), logits,
        ),
        (
            "token_mean(cross_entropy), smoothed", "F.cross_entropy, smoothed",
            lambda x: lmlosses.token_mean(lmlosses.cross_entropy(x, targets, label_smoothing=0.1)),
            lambda x: F.cross_entropy(x, targets, label_smoothing=0.1), logits,
        ),
        (
            "token_mean(binary_cross_entropy)", "F.binary_cross_entropy_with_logits",
            lambda x: lmlosses.token_mean(lmlosses.binary_cross_entropy(x, values)),
            lambda x: F.binary_cross_entropy_with_logits(x, values), scores,
        ),
        (
            "token_mean(squared_error)", "F.mse_loss",
            lambda x: lmlosses.token_mean(lmlosses.squared_error(x, values)),
            lambda x: F.mse_loss(x, values), scores,
        ),
        (
            "token_mean(huber)", "F.huber_loss",
            lambda x: lmlosses.token_mean(lmlosses.huber(x, values)),
            lambda x: F.huber_loss(x, values), scores,
        ),
    ]  # fmt: skip


def rows() -> list[dict[str, str | int | float]]:
    """One row a case and number of threads."""
    found: list[dict[str, str | int | float]] = []
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for what, against, ours, theirs, inputs in cases():
            measured = ratio(_step(ours, inputs), _step(theirs, inputs))
            found.append(
                {"what": what, "against": against, "threads": threads, "ratio": round(measured, 2)}
            )
    torch.set_num_threads(before)
    return found


def table(rows: list[dict[str, str | int | float]]) -> str:
    """The rows as text, one line each."""
    lines = [f"{'what':48} {'against':34} {'threads':>7} {'ratio':>7}"]
    for row in rows:
        lines.append(
            f"{row['what']:48} {row['against']:34} {row['threads']:7d} {row['ratio']:7.2f}"
        )
    return "\n".join(lines)

"""What the notes call the default and the usual choice, held to the race and to small problems."""

import json
import math

import torch

from lmlosses.lab.streaming import expected_losses
from lmlosses.optim import AdamW, Muon
from lmlosses.schedules import linear, warmup_cosine, wsd
from tests.ledger.rows import ROOT

RACE = json.loads((ROOT / "benchmarks" / "results" / "race.json").read_text("utf-8"))


def entrant(name):
    (found,) = [row for row in RACE["entrants"] if row["name"] == name]
    return found


def end(cls, lr, steps=40):
    """Loss of a linear map learned from inputs of very different size, after a linear decay."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    inputs = torch.linalg.qr(draw(8, 8))[0] * torch.logspace(0, -2, 8, dtype=torch.float64)
    target, weight = draw(8, 8), torch.nn.Parameter(torch.zeros(8, 8, dtype=torch.float64))
    optimizer = cls([weight], lr=lr, weight_decay=0.0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * linear(total_steps=steps)(step)
        weight.grad = (weight - target).detach() @ inputs @ inputs.T
        optimizer.step()
    loss = ((weight - target).detach() @ inputs).square().mean().item()
    return loss if math.isfinite(loss) else math.inf


def test_notes_2_1_default():
    """Where curvature lies across the entries, the tuned default is beaten; so in the race."""
    rates = [0.05 * 2.0**k for k in range(6)]
    adamw = [end(AdamW, rate) for rate in rates]
    muon = [end(Muon, 4 * rate) for rate in rates]
    for ends in (adamw, muon):
        assert min(ends) < min(ends[0], ends[-1])  # inside the grid
    assert 1e-4 < min(adamw) < 0.02
    assert min(muon) < min(adamw) / 2
    for name in ("Muon", "SOAP"):
        assert entrant(name)["difference_found"] == "lower"
    assert (
        entrant("Lion")["difference_found"] == entrant("SophiaG")["difference_found"] == "higher"
    )


def test_notes_3_1_most_used():
    """At its best peak the cosine loses to WSD where there is little noise; with much it wins."""
    steps, peaks = torch.arange(600), torch.logspace(-0.8, 0.4, 25)
    curvatures = torch.logspace(0, -3, 20)
    best = {}
    for noise in (0.2, 60.0):
        for shape in (warmup_cosine, wsd):
            rest = {"decay_steps": 120} if shape is wsd else {}
            rate = shape(warmup_steps=20, total_steps=600, **rest)(steps)
            assert rate[20] == 1 and rate[-1] < 0.01
            ends = expected_losses(peaks[:, None] * rate, curvatures, batch=4, noise=noise)[:, -1]
            best[noise, shape] = ends.min().item()
    assert best[0.2, wsd] < 0.9 * best[0.2, warmup_cosine]
    assert best[60.0, warmup_cosine] < 0.9 * best[60.0, wsd]
    assert entrant("AdamW, WSD")["difference_found"] == "lower"

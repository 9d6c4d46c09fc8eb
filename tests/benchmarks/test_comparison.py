"""What is stored of the measured table of page 4.6.5 was measured, and is what is shown."""

import json
import math

import pytest
import torch

from benchmarks import comparison
from tests.book.site import ROOT

RESULTS = ROOT / "benchmarks" / "results"
STORED = json.loads((RESULTS / "comparison.json").read_text("utf-8"))


@pytest.fixture(autouse=True)
def double():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def race(what, model="linear", optimizer="descent"):
    (found,) = [
        row
        for row in STORED["race"]
        if (row["what"], row["model"], row["optimizer"]) == (what, model, optimizer)
    ]
    return found


def test_figure_is_drawn_from_the_stored_results():
    assert (RESULTS / "comparison.svg").read_text("utf-8") == comparison.figure(STORED)


def test_cells_are_written_from_the_other_parts():
    assert STORED["cells"] == comparison.cells(STORED)
    assert len(STORED["cells"]) == 16


def test_slopes_and_breaking_points_are_measured_again_to_the_digit():
    assert comparison.stability() == STORED["stability"]
    for again, stored in zip(comparison.saturation(), STORED["saturation"], strict=True):
        assert (again["place"], again["vanishes"]) == (stored["place"], stored["vanishes"])
        assert again["at10"] == pytest.approx(stored["at10"], rel=1e-9)


def test_scores_are_convex_and_squashed_scores_are_not():
    verdicts = {(row["loss"], row["variable"]): row["convex"] for row in STORED["convexity"]}
    assert len(verdicts) == len(comparison.variables())
    for (loss, variable), verdict in verdicts.items():
        composed = ("softmax", "two layers", "cosine", "queries and keys", "tokens", "policy's l")
        assert verdict == ("no" if any(part in variable for part in composed) else "yes"), loss


def test_squared_error_of_outputs_diverges_just_above_its_limit():
    x, labels = comparison.problem(0)
    largest = torch.linalg.eigvalsh(2 * x.T @ x / len(x))[-1].item()
    point = torch.ones(9)
    for factor, grows in ((0.98, False), (1.02, True)):
        end = point.clone()
        for _ in range(400):
            end.requires_grad_()
            loss = comparison.mean_loss("squared error", "linear", end, x, labels)
            (gradient,) = torch.autograd.grad(loss, end)
            end = end.detach() - factor * 2 / largest * gradient
        assert (end.norm() > 1e3).item() == grows


def test_race_is_as_long_and_as_wide_as_it_says():
    (settings,) = STORED["settings"]
    assert settings["steps"] == comparison.STEPS and settings["seeds"] == comparison.SEEDS
    assert len(STORED["curves"]) == len(STORED["race"]) * len(comparison.RATES)
    for row in STORED["race"]:
        if row["steps"] is not None:
            assert 1 <= row["steps"] <= comparison.STEPS and row["width"] >= 1 <= row["room"]


def test_findings_of_the_page_stand_in_the_results():
    plain = race("squared error")
    assert plain["width"] < 2 and plain["room"] < 2
    assert plain["curvature_start"] == pytest.approx(plain["curvature_end"], rel=1e-6)
    assert race("InfoNCE")["room"] > 50 and race("InfoNCE")["condition"] > 1e4
    assert race("squared error", optimizer="Adam")["width"] > 20
    assert race("reward model")["steps"] < 2 * race("cross-entropy")["steps"]
    assert all(row["levels"] == 1 and row["minima"] == row["runs"] for row in STORED["minima"])


def test_window_holds_the_rates_that_need_at_most_twice_the_best_steps():
    steps = torch.tensor([math.inf, 30.0, 19.0, 10.0, 20.0, math.inf, 12.0])
    assert comparison.window(steps) == (3, 2, 4)


def test_a_run_that_comes_back_up_has_not_arrived():
    history = torch.tensor([5.0, 1.0, 5.0, 1.0, 0.5]).view(5, 1, 1)
    assert comparison.reached(history, torch.tensor([2.0])).item() == 3
    assert comparison.reached(history, torch.tensor([0.1])).item() == math.inf

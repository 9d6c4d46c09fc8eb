"""The stored spectra are those of the run that they name, agree with each other, and are drawn."""

import json

import pytest
import torch

from benchmarks import race, spectrum
from lmlosses.analysis.spectrum import SpectralDensity, spectral_average
from lmlosses.precision import global_norm
from tests.book.site import ROOT

RESULTS = ROOT / "benchmarks" / "results"
STORED = json.loads((RESULTS / "spectrum.json").read_text("utf-8"))
POINTS = {row["when"]: row for row in STORED["points"]}
SMALL = spectrum.Effort(
    windows=1, ends=2, products=4, probes=2, steps=4, trace_probes=2, noise_batches=2, between=(2,)
)


def ends_of(when, end):
    rows = [row for row in STORED["eigenvalues"] if (row["when"], row["end"]) == (when, end)]
    return sorted(rows, key=lambda row: row["rank"])


def test_figure_is_drawn_from_the_stored_results():
    assert (RESULTS / "spectrum.svg").read_text("utf-8") == spectrum.figure(STORED)


def test_what_is_stored_was_measured_with_the_settings_of_the_script():
    (settings,) = STORED["settings"]
    assert race.MODEL.items() <= settings.items()
    assert (settings["steps"], settings["lr"]) == (race.STEPS, spectrum.LR)
    assert settings["windows"] == spectrum.FULL.windows
    assert list(POINTS) == list(spectrum.WHEN.values())
    steps = [row["step"] for row in STORED["path"]]
    assert steps == sorted({*spectrum.WHEN, *spectrum.FULL.between})


def test_the_run_is_the_race_s_and_ends_where_that_did():
    stored = race.stored()
    (raced,) = (
        run for run in stored
        if (run["stage"], run.get("name"), run.get("seed")) == ("steps", "AdamW", spectrum.SEED)
    )  # fmt: skip
    assert raced["lr"] == spectrum.LR
    # kernels changed in the last digits since it was run, and training magnifies that
    assert STORED["settings"][0]["held_out_nats"] == pytest.approx(raced["loss"], abs=0.02)


def test_the_start_can_be_computed_again():
    run = race.Run("AdamW", spectrum.LR, spectrum.SEED)
    tokens = spectrum.drawn(2, spectrum.FULL.windows)
    loss = spectrum.mean_loss(run.model, tokens)
    assert loss.item() == pytest.approx(POINTS["start"]["nats"], rel=1e-3)
    gradient = global_norm(torch.autograd.grad(loss, list(run.model.parameters())))
    assert gradient.item() == pytest.approx(POINTS["start"]["gradient"], rel=1e-3)


@pytest.mark.parametrize("when", POINTS)
def test_lanczos_quadrature_and_traces_agree(when):
    (stored,) = (row for row in STORED["density"] if row["when"] == when)
    density = SpectralDensity(*(torch.tensor(stored[part]).double() for part in
                                ("nodes", "weights")))  # fmt: skip
    torch.testing.assert_close(density.weights.sum(dim=-1), torch.ones(6).double(), rtol=1e-3,
                               atol=0)  # fmt: skip
    row = POINTS[when]
    # the outermost eigenvalues, found from other starts
    assert density.nodes.max().item() == pytest.approx(row["largest"], rel=2e-3)
    assert density.nodes.min().item() == pytest.approx(row["smallest"], rel=2e-3)
    parameters = STORED["settings"][0]["parameters"]
    trace = spectral_average(density, lambda nodes: parameters * nodes)
    gap = abs(trace.value.item() - row["trace"])
    assert gap < 4 * (trace.standard_error.item() + row["trace_error"])
    for side in ("above", "below"):
        assert row[f"{side}_half"] == pytest.approx(row[side], rel=0.15)


@pytest.mark.parametrize("when", POINTS)
def test_eigenvalues_are_in_order_and_the_outermost_are_converged(when):
    top, bottom = ends_of(when, "top"), ends_of(when, "bottom")
    assert [row["rank"] for row in top] == [row["rank"] for row in bottom] == [1, 2, 3, 4, 5]
    assert top[0]["value"] == POINTS[when]["largest"]
    assert bottom[0]["value"] == POINTS[when]["smallest"]
    values = [row["value"] for row in [*bottom, *top[::-1]]]
    assert values == sorted(values)
    assert POINTS[when]["residual"] < 1e-5


def test_what_the_text_says_of_the_spectra_is_so():
    start, middle, end = POINTS.values()
    assert start["smallest"] < -2 * start["largest"]  # far from convex
    assert abs(start["trace"]) < 2 * start["trace_error"]
    assert end["smallest"] < 0 and end["negative_share"] < 0.05 < middle["negative_share"] < 0.2
    assert start["below"] > 10 * middle["below"] > 20 * end["below"]
    assert start["gauss_newton"] < 0.3 * start["largest"]
    assert middle["gauss_newton"] == pytest.approx(middle["largest"], rel=0.05)
    assert start["noise_scale"] < race.BATCH < middle["noise_scale"] < end["noise_scale"]
    for row in STORED["path"]:
        assert row["largest"] < row["plain_limit"] / 10
        assert row["adam_largest"] is None or row["adam_largest"] < row["adam_limit"]


def test_adams_view_of_a_matrix_has_the_stability_that_its_steps_have():
    """On a quadratic, with averages that no longer change, a step is one of momentum."""
    param = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
    optimizer = torch.optim.AdamW([param], lr=0.1, betas=race.BETAS, weight_decay=0.0)
    param.grad = torch.tensor([0.5, 4.0])
    for _ in range(300):
        optimizer.step()
    product = spectrum.as_adam_sees_it(lambda v: v, [param], optimizer)
    (scaled,) = product([torch.ones(2)])
    torch.testing.assert_close(scaled, torch.tensor([2.0, 0.25]), rtol=1e-4, atol=0)


def test_both_ends_are_those_of_the_whole_matrix():
    diagonal = torch.tensor([-3.0, -1.0, 0.5, 2.0, 5.0, 6.0], dtype=torch.float64)
    point = torch.zeros(6, dtype=torch.float64)
    top, bottom = spectrum.ends(lambda v: [diagonal * v[0]], [point], count=2, products=6)
    torch.testing.assert_close(top.values, diagonal.flip(0)[:2])
    torch.testing.assert_close(-bottom.values, diagonal[:2])


def test_a_short_run_gives_the_same_fields(monkeypatch):
    monkeypatch.setattr(race, "MODEL", {"dim": 8, "layers": 1, "heads": 2})
    monkeypatch.setattr(race, "LENGTH", 16)
    monkeypatch.setattr(spectrum, "WHEN", {0: "start", 2: "middle", 4: "end"})
    monkeypatch.setattr(race.Run, "losses", lambda run: (0.0, 0.0))
    found = spectrum.measure(4, SMALL)
    assert {*STORED} - {*found} == {"torch", "machine"}
    for name, rows in found.items():
        assert rows[0].keys() == STORED[name][0].keys()
    assert [row["when"] for row in found["points"]] == ["start", "middle", "end"]

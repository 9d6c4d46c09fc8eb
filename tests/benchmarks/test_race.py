"""The race was run by its rules, what is stored of it follows from its runs, and is drawn."""

import json
import math

import pytest

from benchmarks import race, race_results
from lmlosses.lab.text import Text, shakespeare
from tests.book.site import ROOT

RESULTS = ROOT / "benchmarks" / "results"
RUNS = race.stored()
STORED = json.loads((RESULTS / "race.json").read_text("utf-8"))


def rows(part, **which):
    return [row for row in STORED[part] if which.items() <= row.items()]


def row(part, **which):
    (found,) = rows(part, **which)
    return found


@pytest.mark.parametrize("name", race_results.FIGURES)
def test_figure_is_drawn_from_the_stored_results(name):
    drawn = race_results.FIGURES[name](STORED)
    assert (RESULTS / f"{name}.svg").read_text("utf-8") == drawn


def test_summary_follows_from_the_runs():
    found = json.loads(json.dumps(race_results.summary(RUNS), allow_nan=False))
    assert found == {name: part for name, part in STORED.items() if name in found}
    assert set(STORED) - set(found) == {"torch", "machine"}


def test_no_run_was_made_twice():
    keys = ("stage", "name", "lr", "seed", "steps", "batch")
    made = [tuple(run.get(key) for key in keys) for run in RUNS]
    assert len(set(made)) == len(made)


def test_every_entrant_was_tuned_over_the_same_number_of_rates_and_none_is_best_at_an_edge():
    for name in race.ENTRANTS:
        tried = rows("tuning", name=name)
        assert [trial["lr"] for trial in tried] == race.grid(name) and len(tried) == race.TRIALS
        (best,) = (trial for trial in tried if trial["best"])
        assert best not in (tried[0], tried[-1])
        known = [trial["chosen_by"] for trial in tried if trial["chosen_by"] is not None]
        assert best["chosen_by"] == min(known)
        assert row("entrants", name=name)["lr"] == best["lr"]


def test_every_size_of_the_batch_was_tuned_over_whole_grids():
    for batch in race.BATCHES:
        for name in ("AdamW", "Lion"):
            tried = rows("batch_tuning", batch=batch, name=name)
            assert [trial["lr"] for trial in tried] == race.grid(name)
            assert not tried[0]["best"] and not tried[-1]["best"]


def test_all_tasks_were_carried_out():
    best = race.best_rates(RUNS)
    (paced,) = (run for run in RUNS if run["stage"] == "pace")
    tasks = race.tuning() + race.finals(best, paced["paces"]) + race.anytimes(best)
    tasks += race.by_batch() + race.by_batch_finals(RUNS)
    for task in tasks:
        assert any(task.items() <= run.items() for run in RUNS), task
    assert len(tasks) + 1 == len(RUNS) == STORED["settings"][0]["runs"] + 1


def test_no_seed_that_chose_a_rate_is_in_a_result():
    tuned = {run["seed"] for run in RUNS if run["stage"] in ("tune", "batch")}
    judged = {run["seed"] for run in RUNS if run["stage"] not in ("tune", "batch", "pace")}
    assert tuned == {0} and judged == set(range(1, race.SEEDS + 1))


def test_interval_of_five_numbers_is_that_of_student():
    mean, half = race_results.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3.0 and half == pytest.approx(2.776 * math.sqrt(2.5 / 5))


def test_difference_is_taken_in_pairs_and_called_none_where_its_interval_holds_zero():
    theirs = {seed: 2.0 + 0.1 * seed for seed in range(1, 6)}
    lower = {seed: loss - 0.01 * (1 + 0.1 * seed) for seed, loss in theirs.items()}
    found = race_results.difference(lower, theirs)
    assert found["difference_found"] == "lower" and found["difference_half_width"] < 0.01
    assert race_results.difference(theirs, lower)["difference_found"] == "higher"
    mixed = {seed: loss + 0.01 * (-1) ** seed for seed, loss in theirs.items()}
    assert race_results.difference(mixed, theirs)["difference_found"] == "none"


def test_a_missing_seed_or_an_edge_is_refused():
    short = [run for run in RUNS if run.get("seed") != 3]
    with pytest.raises(RuntimeError, match="AdamW"):
        race_results.by_seed(short, stage="steps", name="AdamW")
    cut = [
        run for run in RUNS if not (run["stage"] == "tune" and run["lr"] == race.grid("Lion")[0])
    ]
    with pytest.raises(RuntimeError, match="not tried"):
        race.best_rate(cut, "Lion", stage="tune")
    first = [dict(run) for run in RUNS if run["stage"] == "tune" and run["name"] == "Muon"]
    first[0]["chosen_by"] = 0.0
    with pytest.raises(RuntimeError, match="edge"):
        race.best_rate(first, "Muon", stage="tune")


@pytest.fixture
def tiny(monkeypatch):
    text = Text(*(half[:20_000] for half in shakespeare()))
    monkeypatch.setattr(race, "shakespeare", lambda: text)
    monkeypatch.setattr(race, "MODEL", {"dim": 8, "layers": 1, "heads": 2})
    monkeypatch.setattr(race, "ANYTIME", (10, 20))
    monkeypatch.setattr(race, "WARMUP", 2)


@pytest.mark.parametrize("name", race.ENTRANTS)
def test_every_entrant_learns_and_repeats_itself(name, tiny):
    task = race._task("steps", name, race.ENTRANTS[name].middle, 1, steps=12, batch=4)
    first, second = race.raced(task), race.raced(task)
    assert first["loss"] == second["loss"] < math.log(256) - 0.05


def test_a_run_that_diverges_is_stored_as_none(tiny):
    assert race.raced(race._task("steps", "SGD", 1e6, 1, steps=5))["loss"] is None


def test_a_decay_from_the_stable_phase_is_the_run_that_was_planned(tiny):
    task = {"stage": "anytime", "name": "AdamW, WSD", "lr": 0.01, "seed": 1}
    found = {(end["steps"], end["way"]): end["loss"] for end in race.anytime(task)["found"]}
    planned = race.raced(race._task("steps", "AdamW, WSD", 0.01, 1, steps=20))
    assert found[20, "left and decayed"] == planned["loss"]
    assert len(found) == 6


def test_so_it_is_in_the_stored_runs():
    for run in RUNS:
        if run["stage"] == "anytime":
            left = {e["steps"]: e["loss"] for e in run["found"] if e["way"] == "left and decayed"}
            which = {"stage": "steps", "name": "AdamW, WSD", "seed": run["seed"]}
            (planned,) = (r["loss"] for r in RUNS if which.items() <= r.items())
            assert left[race.STEPS] == pytest.approx(planned, abs=2e-3)


# -- what the page says


def known(part, **which):
    return row(part, **which)["difference_found"]


def loss(name):
    return row("entrants", name=name)["loss"]


def test_page_names_the_order_at_equal_steps():
    order = [entrant["name"] for entrant in STORED["entrants"]]
    assert order[:2] == ["Muon", "SOAP"]
    assert set(order[2:5]) == {"Schedule-Free", "cautious AdamW", "AdamW, WSD"}
    assert all(known("entrants", name=name) == "lower" for name in order[:5])
    assert all(known("entrants", name=name) == "none" for name in ("Adafactor", "ADOPT"))
    assert all(known("entrants", name=name) == "higher" for name in ("Lion", "SophiaG", "SGD"))
    assert len(order) - 1 == 10 and STORED["settings"][0]["entrants"] == 11


def test_page_says_which_seeds_of_lion_and_sophia_went_badly():
    for name in ("Lion", "SophiaG"):
        losses = race_results.by_seed(RUNS, stage="steps", name=name)
        worst = sorted(losses, key=losses.__getitem__)[-2:]
        assert set(worst) == {1, 5}
        assert row("entrants", name=name)["half_width"] > 0.05
    assert all(
        r["half_width"] < 0.03 for r in STORED["entrants"] if r["name"] not in ("Lion", "SophiaG")
    )


def test_page_compares_rates():
    assert row("entrants", name="AdamW")["lr"] == 2 * row("entrants", name="AdamW, WSD")["lr"]
    assert row("entrants", name="Lion")["adamw_over_rate"] == 1.5  # outside of 3 to 10
    assert row("entrants", name="SophiaG")["adamw_over_rate"] == 6
    beside = row("tuning", name="Lion", lr=0.004)["chosen_by"]
    assert 0 < beside - row("tuning", name="Lion", lr=0.008)["chosen_by"] < 0.02


def test_page_compares_batches():
    sizes = [row("batches", batch=batch) for batch in race.BATCHES]
    assert [size["rate_ratio"] for size in sizes] == [1.5, 1.5, 1.5]
    assert known("batches", batch="64 against 4") == "none"
    widths = [size["difference_half_width"] for size in sizes]
    assert widths[-1] < min(widths[:-1]) / 2


def test_page_compares_at_equal_time():
    ahead = {r["name"] for r in STORED["equal_time"] if r["difference_found"] == "lower"}
    behind = {r["name"] for r in STORED["equal_time"] if r["difference_found"] == "higher"}
    assert ahead == {"Muon", "SOAP"} and behind == {"Adafactor", "SophiaG"}
    same = {r["name"] for r in STORED["entrants"] if abs(r["pace"] - 1) <= race.SAME_PACE}
    assert {"Schedule-Free", "cautious AdamW"} <= same
    muon, soap = (row("equal_time", name=name)["loss"] for name in ("Muon", "SOAP"))
    assert muon < min(loss("Schedule-Free"), soap) and soap > loss("Schedule-Free")
    assert abs(soap - loss("cautious AdamW")) < 0.005


def test_page_says_who_is_twice_as_fast():
    assert known("half_steps", name="Muon") == "none"
    assert row("half_steps", name="Muon")["wsd_difference_found"] == "higher"
    assert known("half_steps", name="SophiaG") == known("half_steps", name="SOAP") == "higher"
    lost = row("half_steps", name="AdamW")["difference"]
    assert 0.4 < row("half_steps", name="SOAP")["difference"] / lost < 0.6


def test_page_says_what_a_decay_is_worth():
    for steps in race.ANYTIME:
        assert known("anytime", steps=steps, way="left and decayed") == "lower"
        assert known("anytime", steps=steps, way="as it was left") == "higher"
        assert known("anytime", steps=steps, way="no decay") == "none"
    assert [known("decays", steps=steps) for steps in race.ANYTIME] == ["none", "lower", "lower"]
    worth = row("decays", steps=400)["difference"]
    assert worth == pytest.approx(row("entrants", name="Schedule-Free")["difference"], abs=0.01)


def test_page_says_what_soap_remembers():
    held = 2 * (256**2 + 64**2) / (256 * 64)
    assert held == 8.5
    assert row("entrants", name="SOAP")["state_bytes"] > 30


def test_task_is_half_a_pass_over_the_text():
    (settings,) = STORED["settings"]
    assert 0.45 < settings["bytes_read"] / settings["train_bytes"] < 0.55
    assert (settings["steps"], settings["batch"], settings["length"]) == (400, 16, 64)
    assert (settings["trials"], settings["seeds"], settings["warmup"]) == (7, 5, 20)
    assert (
        800 < 130e6 / settings["parameters"] < 1300
    )  # a thousandth of the smallest of 2509.02046

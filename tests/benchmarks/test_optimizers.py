"""The table of optimizer steps: complete, and made by code that runs."""

import json

import pytest

from benchmarks import optimizers
from benchmarks.figures import RESULTS

STORED = json.loads((RESULTS / "optimizers.json").read_text("utf-8"))["rows"]
CASES = optimizers.elementwise() | optimizers.of_matrices()


def test_every_way_of_every_optimizer_was_measured_on_one_and_two_threads():
    wanted = [(name, way) for name, case in CASES.items() for way in case.ours | case.peers]
    assert [(row["optimizer"], row["way"]) for row in STORED] == wanted
    for row in STORED:
        if CASES[row["optimizer"]].bytes:
            assert row["floors"] > 0 and row["floors_two"] > 0
        if "against" in row:
            assert row["ratio"] > 0 and row["ratio_two"] > 0


def test_no_time_of_a_gpu_is_claimed():
    assert all(row.get("floors_cuda") is None for row in STORED)


@pytest.mark.parametrize("name", CASES)
def test_a_step_of_every_way_runs(name):
    case = CASES[name]
    ours = {way: make for way, make in case.ours.items() if way != "compiled"}  # half a minute
    settings = {"scale": 64, "matrices_only": not case.bytes}
    rows = optimizers.measure(
        name, case._replace(ours=ours), rounds=1, threads=1, **settings
    )  # fmt: skip
    assert len(rows) == len(ours) + len(case.peers)


def test_numbers_of_a_later_run_stand_beside_the_earlier_ones_and_leave_others_alone():
    rows = [{"optimizer": "a", "way": "b", "floors": 1.0, "floors_two": 3.0}]
    later = [{"optimizer": "a", "way": "b", "floors": 2.0}]
    (found,) = optimizers.beside(rows, later, "cuda")
    assert found == rows[0] | {"floors_cuda": 2.0}
    (kept,) = optimizers.beside(rows, [], "two")
    assert kept["floors_two"] == 3.0

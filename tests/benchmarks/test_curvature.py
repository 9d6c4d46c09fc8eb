"""The table of products and of clipping: complete, and made by code that runs."""

import json

import pytest
import torch

from benchmarks import curvature
from tests.book.site import ROOT

FILE = ROOT / "benchmarks" / "results" / "curvature.json"
STORED = json.loads(FILE.read_text("utf-8"))
SMALL = {"dim": 8, "layers": 1, "heads": 2}


def test_a_small_measurement_gives_the_rows_that_are_stored(monkeypatch):
    monkeypatch.setattr(curvature, "MODEL", SMALL)
    monkeypatch.setattr(curvature, "TOKENS", (1, 8))
    monkeypatch.setattr(curvature, "gradients", lambda tensors, entries: with_gradients())
    found = curvature.rows(rounds=1)
    shown = ("what", "against", "of", "case", "wanted")
    assert [[row[key] for key in shown] for row in found] == [
        [row[key] for key in shown] for row in STORED["rows"]
    ]
    assert all(row["ratio"] > 0 for row in STORED["rows"])
    text = curvature.table(found, STORED["memory"])
    assert len(text.splitlines()) == 1 + len(found) + len(STORED["memory"])


def with_gradients():
    params = [torch.nn.Parameter(torch.zeros(3)) for _ in range(2)]
    for param in params:
        param.grad = torch.ones(3)
    return params


def test_gradients_have_the_number_and_the_size_that_the_row_names():
    params = curvature.gradients(3, 5)
    assert [tuple(param.grad.shape) for param in params] == [(5,)] * 3


def test_large_model_has_five_million_weights():
    (row,) = STORED["memory"]
    params, *_ = curvature.problem(curvature.LARGE, (1, 2))
    assert row["parameters"] == sum(param.numel() for param in params)
    assert row["parameters"] == pytest.approx(5e6, rel=0.01)
    assert row["steps"] == curvature.LANCZOS_STEPS and row["basis"] == row["steps"] + 1
    assert row["beyond_basis"] == pytest.approx(row["copies"] - row["basis"], abs=0.06)


def test_memory_of_lanczos_is_the_basis_and_a_few_copies():
    model = {"dim": 128, "layers": 2, "heads": 4}
    (row,) = curvature.memory(model, 8)
    # the smaller the model, the more a page of memory here and there weighs
    assert row["basis"] == 9 and -1 < row["beyond_basis"] < 12


def test_a_further_product_costs_less_than_the_first():
    # a further product is one backward pass through the graph of the gradient
    ratios = {row["what"]: row["ratio"] for row in STORED["rows"] if row["case"] is None}
    assert ratios["hessian_product, each product"] < ratios["hvp"]
    assert ratios["gauss_newton_product, each product"] < ratios["gauss_newton_vp"]


def test_clipping_costs_what_torch_s_does():
    for row in STORED["rows"]:
        if row["what"] == "clip_by_global_norm":
            assert row["ratio"] < 1.3  # the aim is 1.05; the rest is the machine's

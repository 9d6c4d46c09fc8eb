"""The table of in-batch losses: complete, of ways that agree, and saying what the page says."""

import json

import pytest
import torch

from benchmarks import contrastive
from benchmarks.figures import RESULTS

STORED = json.loads((RESULTS / "contrastive.json").read_text("utf-8"))
GROUPS = {group.what: group for group in contrastive.GROUPS}
# packages take long to load; before they are measured their losses are compared with the others'
OURS = {
    what: [name for name in group.ways if name not in contrastive.NEEDS]
    for what, group in GROUPS.items()
}


def row(what, way):
    (found,) = [r for r in STORED["rows"] if (r["what"], r["way"]) == (what, way)]
    return found


@pytest.mark.parametrize("what", GROUPS)
def test_every_way_was_measured_on_its_shape(what):
    measured = [r["way"] for r in STORED["rows"] if r["what"] == what]
    assert set(OURS[what]) <= set(measured) <= set(GROUPS[what].ways)
    for name in measured:
        found = row(what, name)
        assert tuple(found["shape"]) == GROUPS[what].shape
        assert found["ratio"] > 0 and found["peak_mib"] > 0
    first = next(iter(GROUPS[what].ways))
    assert row(what, first)["ratio"] == row(what, first)["peak_ratio"] == 1


@pytest.mark.parametrize("what", GROUPS)
def test_the_ways_of_a_group_are_one_loss(what):
    found = []
    for name in OURS[what]:
        vectors = [v.detach().double().requires_grad_() for v in contrastive.inputs(192, 8)]
        loss = GROUPS[what].ways[name](*vectors)
        found.append((loss, *torch.autograd.grad(loss, vectors)))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-10, atol=1e-10)


def test_a_way_that_computes_something_else_is_not_measured():
    group = contrastive.Group("mixed", (192, 8), one=contrastive.ours_one_way)
    group.ways["other"] = contrastive.ours_views
    with pytest.raises(AssertionError, match="not close"):
        contrastive.compared(group)


def test_peers_are_left_out_where_they_are_not_installed(monkeypatch):
    monkeypatch.setattr(contrastive, "find_spec", lambda name: None)
    names = [name for name in GROUPS["InfoNCE"].ways if contrastive.here(name)]
    assert names == ["full matrix", "lmlosses"]


def test_a_step_leaves_gradients_of_both_sides():
    vectors = contrastive.inputs(8, 4)
    contrastive.step(GROUPS["InfoNCE"].ways["lmlosses"], vectors)()
    once = [vector.grad.clone() for vector in vectors]
    contrastive.step(GROUPS["InfoNCE"].ways["lmlosses"], vectors)()
    assert all(torch.equal(v.grad, first) for v, first in zip(vectors, once, strict=True))


def test_rows_and_table_of_a_small_group():
    small = contrastive.Group("InfoNCE", (1024, 16), **GROUPS["InfoNCE"].ways)
    small.ways = {name: small.ways[name] for name in OURS["InfoNCE"]}
    found = contrastive.compared(small, rounds=1)
    assert [r["way"] for r in found] == OURS["InfoNCE"]
    assert all(r["peak_mib"] is not None for r in found)
    lines = contrastive.table(found).splitlines()
    assert len(lines) == 1 + len(found)
    assert "1024x16" in lines[1]


def test_lean_forms_are_no_slower_than_the_full_matrix_and_hold_a_fraction():
    for what, group in GROUPS.items():
        if group.shape[0] >= contrastive.SHAPE[0] // 2:
            lean = row(what, "lmlosses")
            assert lean["ratio"] < 1.1
            assert lean["peak_ratio"] < 0.35
    # where nothing but the pairs is computed
    assert row("symmetric InfoNCE of unit vectors", "lmlosses")["peak_ratio"] <= 0.1


def test_the_broadcast_form_costs_a_hundred_times_as_much():
    for name in ("full matrix", "lmlosses"):
        found = row("InfoNCE, small batch", name)
        assert found["ratio"] < 0.05 and found["peak_ratio"] < 0.05


def test_memory_grows_with_the_batch_and_not_with_its_square():
    peaks = {(r["way"], r["pairs"]): r["peak_mib"] for r in STORED["growth"]}
    assert set(contrastive.GROWTH) < {pairs for _, pairs in peaks}
    assert peaks["full matrix", 8192] > 3 * peaks["full matrix", 4096]
    largest = contrastive.LARGEST[0]
    assert peaks["lmlosses", largest] < 2.5 * peaks["lmlosses", largest // 2]
    assert peaks["lmlosses", largest] < peaks["full matrix", 8192]


def test_thirty_two_thousand_pairs_fit_into_a_gibibyte_and_a_half():
    (found,) = [r for r in STORED["growth"] if r["pairs"] == contrastive.LARGEST[0]]
    assert found["way"] == "lmlosses"
    assert found["process_mib"] < 1.5 * 1024

"""The pages as text and notebook: in step, in order, quick, and alike where they must be."""

import re
import sys

import nbformat
import pytest
import yaml

from tests.book.site import ROOT
from tools import notebooks

PAGES = [pytest.param(path, id=path.relative_to(ROOT).as_posix()) for path in notebooks.pages()]


def stored(path):
    return nbformat.read(path.with_suffix(".ipynb"), as_version=4)


@pytest.mark.parametrize("path", PAGES)
def test_notebook_is_what_its_text_and_the_library_give(path):
    assert notebooks.why_stale(path) is None


@pytest.mark.parametrize("path", PAGES)
def test_page_ran_in_under_a_minute(path):
    assert stored(path).metadata["lmlosses"]["seconds"] < 60


@pytest.mark.parametrize("path", PAGES)
def test_page_has_a_head_exercises_a_summary_and_its_ledger(path):
    text = path.read_text(encoding="utf-8")
    for wanted in ("```{page-head}", ":question:", ":needs:", "## Summary", "```{page-ledger}"):
        assert wanted in text, wanted
    labels = re.findall(r"^:label: (ex-\S+)$", text, flags=re.M)
    solutions = re.findall(r"^```\{solution-start\} (\S+)$", text, flags=re.M)
    assert len(labels) >= 3 and labels == solutions
    for label in labels:
        *page, letter = label.removeprefix("ex-").split("-")
        name = f"{'.'.join(page)}-{letter}"
        assert f'exercises.check("{name}", answer)' in text, name


@pytest.mark.parametrize("path", PAGES)
def test_page_installs_the_library_from_the_one_address(path):
    address = yaml.safe_load((ROOT / "_config.yml").read_text())["repository"]["url"]
    first = next(cell for cell in stored(path).cells if cell.cell_type == "code")
    assert f'%pip install -q "lmlosses @ git+{address}"' in first.source
    assert "remove-cell" in first.metadata["tags"] and not first.outputs


@pytest.mark.parametrize("path", PAGES)
def test_page_imports_only_what_the_install_line_brings(path):
    allowed = {"lmlosses", "torch", "matplotlib", "numpy", *sys.stdlib_module_names}
    for cell in stored(path).cells:
        if cell.cell_type == "code":
            for name in re.findall(r"^\s*(?:import|from)\s+(\w+)", cell.source, flags=re.M):
                assert name in allowed, name


@pytest.mark.parametrize("path", PAGES)
def test_page_defines_only_plotting_functions_and_answers(path):
    for cell in stored(path).cells:
        if cell.cell_type == "code":
            for name in re.findall(r"^(?:def|class)\s+(\w+)", cell.source, flags=re.M):
                assert name.startswith(("plot_", "draw_", "describe_", "answer")), name


@pytest.mark.parametrize("path", PAGES)
def test_every_figure_has_a_caption_and_words_for_who_cannot_see_it(path):
    for cell in stored(path).cells:
        pictures = [o for o in cell.get("outputs", []) if "image/svg+xml" in o.get("data", {})]
        if pictures:
            assert cell.metadata["mystnb"]["figure"]["caption"].strip()
            assert cell.metadata["mystnb"]["image"]["alt"].strip()


@pytest.mark.parametrize("path", PAGES)
def test_stored_outputs_hold_no_address_and_no_error(path):
    for cell in stored(path).cells:
        for output in cell.get("outputs", []):
            expected = "raises-exception" in cell.metadata.get("tags", ())
            assert output.output_type != "error" or expected
            assert " at 0x" not in str(output.get("text", "")) + str(output.get("data", {}))


@pytest.mark.parametrize("path", PAGES)
def test_code_of_more_than_a_dozen_lines_folds(path):
    for cell in stored(path).cells:
        if cell.cell_type == "code" and len(cell.source.splitlines()) > 12:
            assert set(cell.metadata.get("tags", ())) & {"hide-input", "hide-cell", "remove-cell"}

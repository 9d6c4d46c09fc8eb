"""The ledger itself: every number is there, and every row names things that exist."""

import ast
import importlib
import re

import pytest

from tests.ledger.rows import ROOT, ROWS

# the last equation of each section; definitions and theorems likewise
NUMBERED = {
    "4.3": {"eq": 36, "def": 3},
    "4.4": {"eq": 30},
    "4.5": {"eq": 30, "def": 15, "thm": 2},
    "4.6": {"eq": 26, "def": 11},
}


def resolve(name: str) -> object:
    """The object that a dotted name means, found in the longest module that it starts with."""
    parts = name.split(".")
    for split in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:split]))
        except ModuleNotFoundError:
            continue
        for part in parts[split:]:
            found = getattr(found, part)
        return found
    raise ModuleNotFoundError(name)


def test_every_numbered_equation_and_definition_has_a_row():
    present = {row.id for row in ROWS}
    for section, kinds in NUMBERED.items():
        wanted = {f"{k}-{section}.{n}" for k, last in kinds.items() for n in range(1, last + 1)}
        assert not wanted - present, f"missing from the ledger: {sorted(wanted - present)}"
        numbered = {i for i in present if re.match(rf"(eq|def|thm)-{re.escape(section)}\.", i)}
        assert not numbered - wanted, f"not numbers of {section}: {sorted(numbered - wanted)}"


def test_no_two_rows_share_an_id_or_a_test():
    for what in ("id", "test"):
        values = [getattr(row, what) for row in ROWS]
        repeated = {value for value in values if values.count(value) > 1}
        assert not repeated, f"{what} used twice: {sorted(repeated)}"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
def test_row_is_complete(row):
    assert re.fullmatch(r"(eq|def|thm)-\d+(\.\d+)+|(claim|table|notes)-[\d.]+-[a-z0-9-]+", row.id)
    assert row.verdict in {"holds", "conditional", "wrong", "ambiguous"}
    assert row.says.strip()
    assert bool(row.correct.strip()) == (row.verdict != "holds"), "correct: unless it holds"
    assert row.api, "something must compute it"
    for name in row.api:
        assert callable(resolve(name))
    assert row.page.endswith("#" + row.id.replace(".", "-"))
    assert (ROOT / (row.page.partition("#")[0] + ".ipynb")).exists()


def bodies() -> dict[str, str]:
    """What each test under tests/ledger does, with its name and docstring left out."""
    found = {}
    for path in sorted((ROOT / "tests" / "ledger").glob("test_*.py")):
        if path.stem in ("test_rows", "test_tests"):
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                name = f"{path.relative_to(ROOT).as_posix()}::{node.name}"
                found[name] = "\n".join(ast.dump(statement) for statement in body)
    return found


def test_every_row_has_its_own_test_and_every_test_its_row():
    found = bodies()
    named = {row.test for row in ROWS}
    assert not named - set(found), f"rows whose test is missing: {sorted(named - set(found))}"
    assert not set(found) - named, f"tests of no row: {sorted(set(found) - named)}"


def test_no_two_tests_share_a_body():
    seen: dict[str, str] = {}
    for name, body in bodies().items():
        assert body not in seen, f"{name} repeats {seen.get(body)}"
        seen[body] = name

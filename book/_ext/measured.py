"""Measured numbers in the book, read from the stored results of ``make bench``; none is typed.

``{measured}`FILE / PART / KEY=VALUE; … / FIELD``` is one number: the field of the only row in that
part of ``benchmarks/results/FILE.json`` that has these values; two of them with `` over `` between
are a quotient. The directive ``measured-table`` lists rows, one line each.
"""

import json
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from sphinx.util.docutils import SphinxDirective, SphinxRole

Row = dict[str, Any]


def results(root: Path, file: str) -> dict[str, Any]:
    return json.loads((root / "benchmarks" / "results" / f"{file}.json").read_text("utf-8"))


def matching(rows: list[Row], conditions: str) -> list[Row]:
    """Rows whose fields have the values that ``key=value; key=value`` names."""
    for condition in filter(None, (part.strip() for part in conditions.split(";"))):
        key, _, value = condition.partition("=")
        rows = [row for row in rows if as_text(row.get(key.strip())) == value.strip()]
    return rows


def as_text(value: Any) -> str:
    return ", ".join(str(item) for item in value) if isinstance(value, list) else str(value)


def number(root: Path, text: str) -> int | float:
    """The number that ``file / part / conditions / field`` names."""
    file, part, conditions, field = (piece.strip() for piece in text.split("/"))
    found = matching(results(root, file)[part], conditions)
    if len(found) != 1:
        raise ExtensionError(f"measured {text!r} names {len(found)} rows, not one")
    value: int | float = found[0][field]
    return value


def shown(value: int | float) -> str:
    """Two digits or so, as a reader wants them; a count as it is."""
    size = abs(value)
    if isinstance(value, int):
        return f"{value:,}".replace("-", "−")
    if size >= 1000:
        return f"{value:,.0f}"
    return (f"{value:.0f}" if size >= 20 else f"{value:.2f}").replace("-", "−")


class Measured(SphinxRole):
    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        root = Path(self.env.srcdir)
        numerator, _, denominator = self.text.partition(" over ")
        value = number(root, numerator)
        if denominator:
            value /= number(root, denominator)
        return [nodes.Text(shown(value))], []


class MeasuredTable(SphinxDirective):
    """Rows of a results file: which, which fields, under which heads."""

    required_arguments = 2  # file, part
    final_argument_whitespace = False
    option_spec = {
        "where": directives.unchanged,
        "columns": directives.unchanged_required,  # field: head, separated by |
    }

    def run(self) -> list[nodes.Node]:
        file, part = self.arguments
        root = Path(self.env.srcdir)
        self.env.note_dependency(str(root / "benchmarks" / "results" / f"{file}.json"))
        self.all = results(root, file)[part]
        rows = matching(self.all, self.options.get("where", ""))
        if not rows:
            raise self.error("no measured row matches")
        pairs = [column.partition(":") for column in self.options["columns"].split("|")]
        columns = [(field.strip(), head.strip()) for field, _, head in pairs]
        table = nodes.table(classes=["measured"])
        group = nodes.tgroup(cols=len(columns))
        group += [nodes.colspec(colwidth=1) for _ in columns]
        head, body = nodes.thead(), nodes.tbody()
        head += self.line([head for _, head in columns])
        body += [self.line([self.cell(row, field) for field, _ in columns]) for row in rows]
        group += [head, body]
        table += group
        box = nodes.container(classes=["measured-box"])
        box += table
        return [box]

    def cell(self, row: Row, field: str) -> str:
        if field == "two threads":
            twin = {key: row[key] for key in ("what", "shape", "dtype")} | {"threads": 2}
            return self.cell(next((r for r in self.all if twin.items() <= r.items()), {}), "ratio")
        if field == "beyond":  # what a step holds besides the gradients it must return
            return f"{row['peak_mib'] - row['gradients_mib']:,.0f}"
        value = row.get(field)
        if value is None:
            return "–"  # not measured
        if isinstance(value, float):
            return f"{value:.1e}" if field in ("loss", "hidden", "weight") else shown(value)
        return as_text(value)

    def line(self, cells: list[str]) -> nodes.row:
        row = nodes.row()
        for cell in cells:
            entry = nodes.entry()
            entry += nodes.paragraph("", cell)
            row += entry
        return row


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_role("measured", Measured())
    app.add_directive("measured-table", MeasuredTable)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

"""The ledger in the book: a card beside each equation, the ledger page, the errata.

Entries live in ``book/ledger/*.yml``. Three directives read them:

``ledger-card ID``   the card of one entry; labelled equations get theirs without asking
``ledger-table``     every entry, filterable by verdict
``errata``           every entry that does not simply hold, filterable by verdict
``page-ledger``      the entries met on the page where it stands
"""

import re
from pathlib import Path
from typing import NamedTuple

import yaml
from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from sphinx.transforms import SphinxTransform
from sphinx.util.docutils import SphinxDirective

VERDICTS = {"holds": "●", "conditional": "▲", "wrong": "✖", "ambiguous": "◆"}
INLINE = re.compile(r"\$(?P<math>[^$]+)\$|`(?P<code>[^`]+)`|\*(?P<emphasis>[^*]+)\*")
EQUATION = re.compile(r"eq-\d+(?:-\d+)+")


class Entry(NamedTuple):
    """One row of the ledger, as written in its file."""

    id: str
    says: str
    verdict: str
    api: list[str]
    test: str
    page: str
    correct: str = ""

    @property
    def anchor(self) -> str:
        return self.id.replace(".", "-")

    @property
    def title(self) -> str:
        """``(4.3.5)`` for an equation, ``Definition 4.3.1``, or the claim's words."""
        kind, _, rest = self.id.partition("-")
        if kind == "eq":
            return f"({rest})"
        if kind in ("def", "thm"):
            return {"def": "Definition", "thm": "Theorem"}[kind] + f" {rest}"
        section, _, words = rest.partition("-")
        return f"{kind.capitalize()} {section}: {words.replace('-', ' ')}"


def load(folder: Path) -> dict[str, Entry]:
    """All entries by id, in the order in which they stand in the files."""
    entries: dict[str, Entry] = {}
    for path in sorted(folder.glob("*.yml")):
        for row in yaml.safe_load(path.read_text(encoding="utf-8")):
            entry = Entry(**row)
            if entry.id in entries:
                raise ExtensionError(f"{path.name}: {entry.id} stands twice")
            if entry.verdict not in VERDICTS:
                raise ExtensionError(f"{path.name}: {entry.id}: no verdict {entry.verdict!r}")
            entries[entry.id] = entry
    return entries


def inline(text: str) -> list[nodes.Node]:
    """Text with ``$math$``, ```code``` and ``*emphasis*`` as nodes."""
    found: list[nodes.Node] = []
    position = 0
    for match in INLINE.finditer(text):
        found.append(nodes.Text(text[position : match.start()]))
        if match["math"]:
            found.append(nodes.math(match["math"], match["math"]))
        elif match["code"]:
            found.append(nodes.literal(match["code"], match["code"]))
        else:
            found.append(nodes.emphasis(match["emphasis"], match["emphasis"]))
        position = match.end()
    found.append(nodes.Text(text[position:]))
    return found


def badge(verdict: str) -> nodes.inline:
    text = f"{VERDICTS[verdict]} {verdict}"
    return nodes.inline(text, text, classes=["verdict", f"verdict-{verdict}"])


def link(text: str, docname: str, anchor: str, here: str, app: Sphinx) -> nodes.reference:
    """An internal link to an anchor that this extension makes itself."""
    uri = (
        f"#{anchor}"
        if docname == here
        else (app.builder.get_relative_uri(here, docname) + f"#{anchor}")
    )
    return nodes.reference("", text, internal=True, refuri=uri)


def card(entry: Entry, docname: str, app: Sphinx) -> nodes.container:
    """Number, verdict, one line, all linking to the entry in the ledger."""
    box = nodes.container(classes=["ledger-card", f"ledger-{entry.verdict}"])
    box["ids"].append(entry.anchor)
    line = nodes.paragraph()
    line += link(entry.title, "book/ledger", entry.anchor, docname, app)
    line += nodes.Text(" ")
    line += badge(entry.verdict)
    line += nodes.Text(" ")
    line.extend(inline(" ".join((entry.correct or entry.says).split())))
    box += line
    return box


def row(entry: Entry, docname: str, app: Sphinx, *, errata: bool) -> nodes.container:
    """One entry in full."""
    box = nodes.container(classes=["ledger-entry", f"ledger-{entry.verdict}"])
    box["ids"].append(entry.anchor)
    head = nodes.paragraph(classes=["ledger-head"])
    page, _, anchor = entry.page.partition("#")
    head += link(entry.title, page, anchor, docname, app)
    head += nodes.Text(" ")
    head += badge(entry.verdict)
    box += head
    for label, text in (("Says", entry.says), ("Correct", entry.correct)):
        if text:
            line = nodes.paragraph(classes=[f"ledger-{label.lower()}"])
            line += nodes.inline(label, label, classes=["ledger-label"])
            line += nodes.Text(" ")
            line.extend(inline(" ".join(text.split())))
            box += line
    if errata:
        return box
    proof = nodes.paragraph(classes=["ledger-proof"])
    proof += nodes.inline("Computed by", "Computed by", classes=["ledger-label"])
    for name in entry.api:
        proof += nodes.Text(" ")
        reference = addnodes.pending_xref(
            "", refdomain="py", reftype="obj", reftarget=name, refdoc=docname, refexplicit=True
        )
        reference += nodes.literal(name, name, classes=["xref", "py"])
        proof += reference
    proof += nodes.Text(" · ")
    proof += nodes.inline("checked by", "checked by", classes=["ledger-label"])
    proof += nodes.Text(" ")
    test = entry.test.partition("::")[2]
    proof += nodes.literal(test, test)
    box += proof
    return box


def filter_bar(entries: list[Entry]) -> nodes.raw:
    buttons = ""
    for verdict, shape in VERDICTS.items():
        count = sum(entry.verdict == verdict for entry in entries)
        if count:
            buttons += (
                f'<button type="button" class="verdict verdict-{verdict}" value="{verdict}" '
                f'aria-pressed="false">{shape} {verdict} ({count})</button>'
            )
    return nodes.raw(
        "",
        '<div class="ledger-filter" role="group" aria-label="Show entries by verdict">'
        f'{buttons}<span class="ledger-count" role="status"></span></div>',
        format="html",
    )


class LedgerDirective(SphinxDirective):
    """What the four directives share: the entries, and a rebuild when their files change."""

    def entries(self) -> dict[str, Entry]:
        for path in (Path(self.env.srcdir) / "book" / "ledger").glob("*.yml"):
            self.env.note_dependency(str(path))
        return self.env.app.ledger_entries


class LedgerCard(LedgerDirective):
    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        found: list[nodes.Node] = []
        for name in self.arguments[0].split():
            if name not in self.entries():
                raise self.error(f"the ledger has no entry {name}")
            found.append(card(self.entries()[name], self.env.docname, self.env.app))
        return found


class LedgerTable(LedgerDirective):
    errata = False

    def run(self) -> list[nodes.Node]:
        entries = list(self.entries().values())
        if self.errata:
            entries = [entry for entry in entries if entry.verdict != "holds"]
        found: list[nodes.Node] = [filter_bar(entries)]
        found.extend(
            row(entry, self.env.docname, self.env.app, errata=self.errata) for entry in entries
        )
        return found


class Errata(LedgerTable):
    errata = True


class PageLedger(LedgerDirective):
    def run(self) -> list[nodes.Node]:
        here = [e for e in self.entries().values() if e.page.partition("#")[0] == self.env.docname]
        items = nodes.bullet_list(classes=["page-ledger"])
        for entry in here:
            line = nodes.paragraph()
            line += badge(entry.verdict)
            line += nodes.Text(" ")
            line += link(entry.title, "book/ledger", entry.anchor, self.env.docname, self.env.app)
            items += nodes.list_item("", line)
        return [items]


class EquationCards(SphinxTransform):
    """Put the card of its entry below each equation that carries a textbook number."""

    default_priority = 860  # after the equations have their numbers

    def apply(self, **kwargs: object) -> None:
        by_anchor = {entry.anchor: entry for entry in self.app.ledger_entries.values()}
        for node in list(self.document.findall(nodes.math_block)):
            label = node.get("label") or ""
            if EQUATION.fullmatch(label):
                if label not in by_anchor:
                    raise ExtensionError(f"{self.env.docname}: the ledger has no entry {label}")
                entry = by_anchor[label]
                node["classes"].append(f"printed-{entry.verdict}")
                parent = node.parent
                parent.insert(parent.index(node) + 1, card(entry, self.env.docname, self.app))


def verdict_role(name, rawtext, text, lineno, inliner, options=None, content=None):
    """``{verdict}`wrong```: the badge alone, for legends."""
    return [badge(text)], []


def read_entries(app: Sphinx) -> None:
    app.ledger_entries = load(Path(app.srcdir) / "book" / "ledger")


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("builder-inited", read_entries)
    app.add_directive("ledger-card", LedgerCard)
    app.add_directive("ledger-table", LedgerTable)
    app.add_directive("errata", Errata)
    app.add_directive("page-ledger", PageLedger)
    app.add_role("verdict", verdict_role)
    app.add_js_file("ledger.js")
    app.add_transform(EquationCards)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

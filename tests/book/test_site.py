"""The built book as files: links arrive, nothing comes from elsewhere, anchors are unique."""

import re
from collections import Counter
from urllib.parse import unquote, urlsplit

import pytest
import yaml

from tests.book.site import ROOT, SITE, pages
from tests.ledger.rows import ROWS

pytestmark = pytest.mark.site

# elements whose address the browser fetches by itself; a link waits for a click
LOADS = {"script", "link", "img", "iframe", "source", "video", "audio", "embed", "object", "form"}


def listed(node):
    if isinstance(node, dict):
        own = [node[key] for key in ("root", "file") if key in node]
        return own + [page for value in node.values() for page in listed(value)]
    return [page for value in node for page in listed(value)] if isinstance(node, list) else []


def test_every_page_of_the_table_of_contents_was_built():
    for page in listed(yaml.safe_load((ROOT / "_toc.yml").read_text())):
        assert (SITE / f"{page}.html").exists(), page


def test_every_local_link_and_anchor_exists():
    dangling = []
    for path, page in pages().items():
        for _, _, reference, _ in page.references:
            url = urlsplit(reference)
            if url.scheme or url.netloc:
                continue
            target = (path.parent / unquote(url.path)).resolve() if url.path else path
            if not target.exists():
                dangling.append(f"{path.relative_to(SITE)}: {reference}")
            elif url.fragment and target in pages():
                if unquote(url.fragment) not in pages()[target].ids:
                    dangling.append(f"{path.relative_to(SITE)}: {reference}: no such anchor")
    assert not dangling, "\n".join(dangling)


def test_nothing_is_loaded_from_another_host():
    foreign = [
        f"{path.relative_to(SITE)}: <{tag} {name}={reference}>"
        for path, page in pages().items()
        for tag, name, reference, rel in page.references
        if tag in LOADS and urlsplit(reference).netloc and rel != "canonical"
    ]
    assert not foreign, "\n".join(foreign)


def test_no_stylesheet_or_own_script_names_another_host():
    own = [path for path in (ROOT / "book" / "_static").iterdir() if path.suffix != ".png"]
    for path in [*(SITE / "_static").rglob("*.css"), *own]:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"(?:@import|url\()\s*['\"]?(?:https?:)?//", text), path.name


def test_no_page_uses_an_id_twice():
    for path, page in pages().items():
        twice = [name for name, count in Counter(page.ids).items() if count > 1]
        assert not twice, f"{path.relative_to(SITE)}: {twice[:5]}"


def test_every_ledger_entry_has_its_card_on_its_page_and_its_row_in_the_ledger():
    ledger = pages()[SITE / "book" / "ledger.html"]
    for row in ROWS:
        name, _, anchor = row.page.partition("#")
        page = pages()[SITE / f"{name}.html"]
        assert anchor in page.ids, f"{row.id}: no card on {name}"
        assert anchor in ledger.ids, f"{row.id}: not in the ledger"
        links = [reference for _, _, reference, _ in page.references]
        assert any(link.endswith(f"book/ledger.html#{anchor}") for link in links), row.id
        back = [reference for _, _, reference, _ in ledger.references]
        assert any(link.endswith(f"{name}.html#{anchor}") for link in back), row.id


def test_every_numbered_equation_is_on_its_page():
    for row in ROWS:
        if row.id.startswith("eq-"):
            name, _, anchor = row.page.partition("#")
            assert f"equation-{anchor}" in pages()[SITE / f"{name}.html"].ids, row.id


def test_every_executed_page_offers_its_notebook_its_text_and_colab():
    for path, page in pages().items():
        if path.parent.parent.name == "chapters":
            links = [reference for tag, _, reference, _ in page.references if tag == "a"]
            for wanted in (".ipynb", ".md"):
                assert any("_downloads" in link and link.endswith(wanted) for link in links), path
            assert any("colab" in link and link.endswith(f"{path.stem}.ipynb") for link in links)

"""The built book, parsed once for the tests that read it."""

import functools
from html.parser import HTMLParser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SITE = ROOT / "_build" / "html"


class Page(HTMLParser):
    """What a built page defines and what it points to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.references: list[tuple[str, str, str, str]] = []  # tag, attribute, value, rel
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if "id" in given:
            self.ids.append(given["id"])
        for name in ("href", "src", "action", "srcset", "poster", "data"):
            if given.get(name):
                self.references.append((tag, name, given[name], given.get("rel", "")))


@functools.cache
def pages() -> dict[Path, Page]:
    """Every page of the built book by its path."""
    assert (SITE / "index.html").exists(), "the book is not built: run make book"
    return {
        path: Page(path)
        for path in sorted(SITE.rglob("*.html"))
        if "_static" not in path.relative_to(SITE).parts
    }

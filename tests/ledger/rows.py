"""The ledger's rows, for the tests that hold it to the library, the tests and the pages."""

from dataclasses import dataclass, field
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Row:
    """One entry, as written."""

    id: str
    says: str
    verdict: str
    api: list[str]
    test: str
    page: str
    correct: str = ""
    chapter: str = field(default="", compare=False)


def rows() -> list[Row]:
    """Every entry of every chapter."""
    return [
        Row(**entry, chapter=path.stem)
        for path in sorted((ROOT / "book" / "ledger").glob("*.yml"))
        for entry in yaml.safe_load(path.read_text(encoding="utf-8"))
    ]


ROWS = rows()

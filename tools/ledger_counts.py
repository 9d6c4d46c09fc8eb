"""Print how many entries of the ledger carry each verdict, by chapter."""

from collections import Counter
from pathlib import Path

import yaml

LEDGER = Path(__file__).resolve().parents[1] / "book" / "ledger"


def main() -> None:
    for path in sorted(LEDGER.glob("*.yml")):
        counts = Counter(row["verdict"] for row in yaml.safe_load(path.read_text()))
        shown = ", ".join(f"{count} {verdict}" for verdict, count in counts.most_common())
        print(f"ledger {path.stem}: {counts.total()} entries: {shown}")


if __name__ == "__main__":
    main()

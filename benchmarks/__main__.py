"""Run the benchmarks, print the tables, store the ratios: ``python -m benchmarks``."""

import json
import platform
from importlib.metadata import version
from pathlib import Path

from benchmarks import losses

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    for suite in (losses,):
        rows = suite.rows()
        print(f"{suite.__doc__.splitlines()[0]}\n")
        print(f"{'what':48} {'against':34} {'threads':>7} {'ratio':>7}")
        for row in rows:
            print(f"{row['what']:48} {row['against']:34} {row['threads']:7d} {row['ratio']:7.2f}")
        measured = {"torch": version("torch").partition("+")[0], "machine": platform.machine()}
        name = suite.__name__.rpartition(".")[2]
        path = RESULTS / f"{name}.json"
        path.write_text(json.dumps({**measured, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Run the benchmarks, print the tables, store the results: ``python -m benchmarks``."""

import argparse
import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks import contrastive, curvature, figures, linear, losses, optimizers

RESULTS = Path(__file__).parent / "results"


def store(name: str, found: dict[str, Any]) -> None:
    """Write results, with what they were measured on."""
    measured = {"torch": version("torch").partition("+")[0], "machine": platform.machine()}
    text = json.dumps(measured | {k: v for k, v in found.items() if k not in measured}, indent=1)
    (RESULTS / f"{name}.json").write_text(text + "\n", "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure against peers, side by side.")
    parser.add_argument("--full", action="store_true", help="all shapes: an hour on two cores")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda for the linear losses")
    arguments = parser.parse_args()

    if arguments.device == "cpu":
        rows = losses.rows()
        print(f"{losses.__doc__.splitlines()[0]}\n\n{losses.table(rows)}\n")
        store("losses", {"rows": rows})
        rows = contrastive.rows(full=arguments.full)
        print(f"{contrastive.__doc__.splitlines()[0]}\n\n{contrastive.table(rows)}\n")
        if arguments.full:
            store("contrastive", {"rows": rows, "growth": contrastive.growth()})
        rows, memory = curvature.rows(), curvature.memory()
        print(f"{curvature.__doc__.splitlines()[0]}\n\n{curvature.table(rows, memory)}\n")
        store("curvature", {"rows": rows, "memory": memory})
        rows = optimizers.rows(full=arguments.full)
        print(f"{optimizers.__doc__.splitlines()[0]}\n\n{optimizers.table(rows)}\n")
        if arguments.full:
            store("optimizers", {"rows": optimizers.beside(rows, [], "cuda")})

    rows = linear.rows(full=arguments.full, device=arguments.device)
    print(f"{linear.__doc__.splitlines()[0]}\n\n{linear.table(rows)}\n")
    if arguments.device != "cpu":
        measured = {"linear": rows, "alignment": linear.of_alignment(arguments.device)}
        rows = optimizers.rows(full=True, device=arguments.device)
        print(optimizers.table(rows))
        stored = json.loads((RESULTS / "optimizers.json").read_text())
        store("optimizers", {**stored, "rows": optimizers.beside(stored["rows"], rows, "cuda")})
        for name, found in measured.items():
            stored = json.loads((RESULTS / f"{name}.json").read_text())
            store(name, {**stored, "rows": linear.with_cuda(stored["rows"], found)})
    elif arguments.full:
        growth, errors = linear.growth(arguments.device), linear.errors()
        store("linear", {"rows": rows, "growth": growth, "errors": errors})
        store("alignment", {"rows": linear.of_alignment(arguments.device)})
        figures.draw()
    else:
        print("The stored results are those of --full and stay as they are.")


if __name__ == "__main__":
    main()

"""Turn the text of the pages into executed notebooks, one way.

    python tools/notebooks.py              execute the pages whose text or library changed
    python tools/notebooks.py NAME …       only pages whose path contains NAME
    python tools/notebooks.py --force …    whether they changed or not
    python tools/notebooks.py --check      execute nothing; exit 1 and name the stale pages

A page is stale when the cells of its notebook are not the cells of its text, when a cell was not
run in order, or when a module of the library that it imports, directly or through others, is not
the one it was executed with.
"""

import argparse
import ast
import hashlib
import os
import re
import sys
import time
from importlib.metadata import version
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parents[1]
CHAPTERS = ROOT / "chapters"
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def pages() -> list[Path]:
    """The text of every executed page."""
    return sorted(CHAPTERS.rglob("*.md"))


def from_text(path: Path) -> NotebookNode:
    """The notebook of a page before it runs; a cell's id follows from its content."""
    notebook = jupytext.read(path, fmt="md:myst")
    seen: dict[str, int] = {}
    for cell in notebook.cells:
        digest = hashlib.sha256((cell.cell_type + cell.source).encode()).hexdigest()[:8]
        seen[digest] = seen.get(digest, 0) + 1
        cell.id = digest if seen[digest] == 1 else f"{digest}-{seen[digest]}"
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL})
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    return notebook


def cells_of(notebook: NotebookNode) -> list[tuple[str, str, dict]]:
    """What must agree between a page's text and its notebook."""
    return [(cell.cell_type, cell.source, dict(cell.metadata)) for cell in notebook.cells]


def _imports(source: str) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.split(".")[0] == "lmlosses"}


def library_of(notebook: NotebookNode) -> str:
    """Hash of every library file that the page's code reaches."""
    code = "\n".join(
        re.sub(r"^([ \t]*)[%!].*$", r"\1pass", cell.source, flags=re.M)
        for cell in notebook.cells
        if cell.cell_type == "code"
    )
    waiting, files = _imports(code), set()
    while waiting:
        parts = waiting.pop().split(".")
        for depth in range(1, len(parts) + 1):
            stem = ROOT.joinpath(*parts[:depth])
            for path in (stem.with_suffix(".py"), stem / "__init__.py"):
                if path.exists() and path not in files:
                    files.add(path)
                    waiting |= _imports(path.read_text(encoding="utf-8"))
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def why_stale(text: Path) -> str | None:
    """What is out of step between a page's text and its notebook; None when nothing is."""
    path = text.with_suffix(".ipynb")
    if not path.exists():
        return "there is no notebook"
    fresh, stored = from_text(text), nbformat.read(path, as_version=4)
    for number, (new, old) in enumerate(
        zip(cells_of(fresh), cells_of(stored), strict=False), start=1
    ):
        if new != old:
            return f"cell {number} is not the text's"
    if len(fresh.cells) != len(stored.cells):
        return f"{len(stored.cells)} cells where the text has {len(fresh.cells)}"
    counts = [c.execution_count for c in stored.cells if c.cell_type == "code"]
    if counts != list(range(1, len(counts) + 1)):
        return f"the cells were run in the order {counts}"
    if stored.metadata.get("lmlosses", {}).get("library") != library_of(fresh):
        return "the library changed since it was executed"
    return None


def execute(text: Path) -> float:
    """Run a page from its text and store it with what was measured; seconds it took."""
    notebook = from_text(text)
    client = NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,  # one print is one output, however busy the machine
        resources={"metadata": {"path": str(text.parent)}},
    )
    start = time.perf_counter()
    client.execute()
    seconds = time.perf_counter() - start
    for number, cell in enumerate(notebook.cells, start=1):
        # a figure that cannot be shown stores an error and lets the run go on
        expected = "raises-exception" in cell.metadata.get("tags", ())
        errors = [output for output in cell.get("outputs", ()) if output.output_type == "error"]
        if errors and not expected:
            raise RuntimeError(f"{text}: cell {number} stored {errors}")
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": KERNEL,
            "lmlosses": {
                "library": library_of(notebook),
                "seconds": round(seconds, 1),
                "versions": {
                    "Python": ".".join(map(str, sys.version_info[:3])),
                    "torch": version("torch").partition("+")[0],
                    "matplotlib": version("matplotlib"),
                },
            },
        }
    )
    nbformat.validate(notebook)
    nbformat.write(notebook, text.with_suffix(".ipynb"))
    return seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="parts of the paths of the pages to look at")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--force", action="store_true")
    options = parser.parse_args()
    # one thread and one library: what the tests will compare with
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["PYTHONPATH"] = str(ROOT)
    failed = False
    for text in pages():
        name = text.relative_to(ROOT).as_posix()
        if options.names and not any(part in name for part in options.names):
            continue
        reason = "it was asked for" if options.force else why_stale(text)
        if reason is None:
            continue
        if options.check:
            print(f"{name}: stale, {reason}")
            failed = True
        else:
            print(f"{name}: {reason}; executed in {execute(text):.1f} s", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

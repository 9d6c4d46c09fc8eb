"""Build the book from nothing; fail on a warning, and on a page that did not come out."""

import shutil
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / "_build" / "html"


def listed(node: object) -> list[str]:
    """Every page that the table of contents names."""
    if isinstance(node, dict):
        own = [node[key] for key in ("root", "file") if key in node]
        return own + [page for value in node.values() for page in listed(value)]
    if isinstance(node, list):
        return [page for value in node for page in listed(value)]
    return []


def main() -> int:
    shutil.rmtree(ROOT / "_build", ignore_errors=True)
    build = [str(Path(sys.executable).with_name("jupyter-book")), "build", ".", "--all", "-q"]
    # -W and --keep-going: report every warning, then fail
    done = subprocess.run([*build, "-W", "-n", "--keep-going"], cwd=ROOT)
    pages = listed(yaml.safe_load((ROOT / "_toc.yml").read_text()))
    missing = [page for page in [*pages, "index"] if not (SITE / f"{page}.html").exists()]
    for page in missing:
        print(f"missing from the built book: {page}", file=sys.stderr)
    if done.returncode or missing:
        # leave no index behind: a failed build must not pass for a finished one
        (SITE / "index.html").unlink(missing_ok=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

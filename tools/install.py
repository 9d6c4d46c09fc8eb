"""Install the requirements named in pyproject.toml, at the versions of requirements.lock.

    python tools/install.py runtime test …    "runtime" or the names of extras

The package itself is not installed: the commands put the checkout on the path. A torch that the
environment already has is kept, whatever its version; everything else follows the lock.
"""

import os
import re
import subprocess
import sys
import tempfile
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def requirements(names: list[str]) -> list[str]:
    """The requirements of the project itself ("runtime") and of its extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = {"runtime": project["dependencies"], **project["optional-dependencies"]}
    found = [requirement for name in names for requirement in lists[name]]
    return [requirement for requirement in found if not requirement.startswith("lmlosses")]


def constraints() -> list[str]:
    """The lock, less torch where the environment brings its own."""
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    try:
        kept = f"torch=={version('torch')}"
    except PackageNotFoundError:
        return lines
    if not any(kept.partition("+")[0] == line for line in lines):
        print(f"keeping {kept}, which is not the version of requirements.lock")
        lines = [line for line in lines if not re.match(r"(torch|triton|nvidia-.*)==", line)]
        lines.append(kept)
    return lines


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "-q"]
    done = subprocess.run(
        [*command, *arguments], cwd=ROOT, stderr=subprocess.PIPE, text=True, env=os.environ
    )
    # some set-ups of pip warn once a package about each local index that lacks it
    sys.stderr.writelines(
        line + "\n" for line in done.stderr.splitlines() if "it is neither a file nor" not in line
    )
    done.check_returncode()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        lock = Path(folder, "lock.txt")
        lock.write_text("\n".join(constraints()))
        # compiling every module ahead of its first import takes longer than all the downloads
        pip("--no-compile", "-c", str(lock), *requirements(sys.argv[1:]))


if __name__ == "__main__":
    main()

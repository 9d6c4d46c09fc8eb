"""See to it that a Chromium is there for the tests of the built book.

As root on a system with apt-get it is installed. An ordinary user is told what to install, and the
tests that need it are skipped with that reason; with CI=true they fail instead.
"""

import os
import shutil
import subprocess

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


def find() -> str | None:
    """Path of an installed Chromium, or of the one that LMLOSSES_CHROMIUM names."""
    installed = next(filter(None, map(shutil.which, NAMES)), None)
    return os.environ.get("LMLOSSES_CHROMIUM") or installed


def main() -> None:
    if find():
        return
    if shutil.which("apt-get") and os.geteuid() == 0:
        quiet = {"check": True, "stdout": subprocess.DEVNULL}
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        subprocess.run(["apt-get", "update", "-qq"], env=environment, **quiet)
        subprocess.run(
            ["apt-get", "install", "-y", "-qq", "--no-install-recommends", "chromium"],
            env=environment,
            **quiet,
        )
    else:
        print(
            "No Chromium found: the browser tests will be skipped. Install the package "
            "chromium, or set LMLOSSES_CHROMIUM to a browser's path."
        )


if __name__ == "__main__":
    main()

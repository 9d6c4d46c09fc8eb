"""Notation: every letter that a page uses in mathematics has one row in the table."""

import re

from tests.book.site import ROOT
from tools import notebooks

GREEK = (
    "alpha beta gamma delta epsilon varepsilon zeta eta theta kappa lambda mu nu xi pi rho sigma "
    "tau phi varphi chi psi omega Gamma Delta Theta Lambda Sigma Phi Psi Omega ell"
).split()
# words and commands that print no symbol of their own
TEXT = re.compile(
    r"\\(?:text|mathrm|operatorname|textbf|mathbf)\*?\{[^{}]*\}"
    r"|_\{[A-Z]{2,}\}|_\{[A-Za-z]{3,}\}"  # indices that are words: MSE, CE, KL, total
)


def mathematics(text: str) -> str:
    prose = re.sub(r"^```\{code-cell\}.*?^```$", " ", text, flags=re.S | re.M)
    prose = re.sub(r"`[^`\n]*`", " ", prose)
    return " ".join(a or b for a, b in re.findall(r"\$\$(.+?)\$\$|\$([^$]+)\$", prose, re.S))


def letters(math: str) -> set[str]:
    """Latin letters and Greek names in TeX, accents and indices' own letters included."""
    math = TEXT.sub(" ", math)
    found = {name for name in re.findall(r"\\([A-Za-z]+)", math) if name in GREEK}
    calligraphic = re.findall(r"\\math(?:cal|bb)\s*\{?([A-Z])\}?", math)
    plain = re.sub(r"\\math(?:cal|bb)\s*\{?[A-Z]\}?", " ", math)
    plain = re.sub(r"\\[A-Za-z]+", " ", plain)
    return found | set(re.findall(r"[A-Za-z]", plain)) | {f"math {name}" for name in calligraphic}


def table() -> list[set[str]]:
    rows = re.findall(r"^\| (\$.*?) \|", (ROOT / "book" / "notation.md").read_text(), flags=re.M)
    return [letters(mathematics(row)) for row in rows]


def test_every_letter_on_the_pages_is_in_the_notation():
    known = set().union(*table())
    for path in notebooks.pages():
        unknown = letters(mathematics(path.read_text(encoding="utf-8"))) - known
        assert not unknown, f"{path.name} uses {sorted(unknown)}, which the notation lacks"


def test_no_symbol_has_two_rows():
    text = (ROOT / "book" / "notation.md").read_text(encoding="utf-8")
    symbols = re.findall(r"\$([^$]+)\$", " ".join(re.findall(r"^\| (\$.*?) \|", text, flags=re.M)))
    twice = {symbol for symbol in symbols if symbols.count(symbol) > 1}
    assert not twice, f"two rows for {sorted(twice)}"

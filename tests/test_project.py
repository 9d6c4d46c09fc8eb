"""The project's own files agree with each other."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import yaml
from packaging.requirements import Requirement

import lmlosses

ROOT = Path(__file__).resolve().parents[1]


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def locked() -> dict[str, str]:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pairs}


def test_lock_holds_a_version_of_everything_that_is_required():
    lists = [project()["dependencies"], *project()["optional-dependencies"].values()]
    for line in sum(lists, []):
        requirement = Requirement(line)
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if name != "lmlosses":
            assert requirement.specifier.contains(locked()[name]), line


def test_address_of_the_repository_is_the_same_everywhere():
    address = yaml.safe_load((ROOT / "_config.yml").read_text())["repository"]["url"]
    owner = address.rpartition("/")[0]
    for name in ("README.md", "CITATION.cff", "CONTRIBUTING.md", "book/index.md"):
        for found in re.findall(r"https://github\.com/[^/\s)\"]+", (ROOT / name).read_text()):
            assert found == owner, f"{name}: {found}"


def test_version_is_the_same_in_all_places():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == project()["version"]


def test_public_names_are_documented_in_the_book_and_the_changelog():
    reference = (ROOT / "book" / "api.rst").read_text()
    modules = re.findall(r"^\.\. api-module:: (\S+)$", reference, flags=re.M)
    sources = {
        path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
        for path in (ROOT / "lmlosses").rglob("*.py")
        if not any(part.startswith("_") for part in path.relative_to(ROOT).parts)
        and "__all__: list[str] = []" not in path.read_text()  # offers nothing
    }
    assert not sources - set(modules), f"not in book/api.rst: {sorted(sources - set(modules))}"
    changes = (ROOT / "CHANGELOG.md").read_text()
    for name in lmlosses.__all__:
        if name not in ("cpu_generator", "default_device"):
            assert f"`{name}`" in changes, f"not in CHANGELOG.md: {name}"


def test_every_name_the_package_exports_exists_and_is_sorted():
    assert lmlosses.__all__ == sorted(lmlosses.__all__)
    for name in lmlosses.__all__:
        assert callable(getattr(lmlosses, name))


def test_example_of_the_readme_prints_what_it_says():
    text = (ROOT / "README.md").read_text()
    code, output = re.search(r"```python\n(.*?)```\n\n```\n(.*?)```", text, flags=re.S).groups()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == output


def test_example_of_the_front_page_runs():
    text = (ROOT / "book" / "index.md").read_text()
    exec(re.search(r"\{code-block\} python\n(.*?)```", text, flags=re.S)[1], {})


# which of the library's own modules a module may import; what is not listed may import none
MAY_IMPORT = {
    "lmlosses.normalizers": {"_checks"},
    "lmlosses.reductions": {"_checks"},
    "lmlosses.logprobs": {"_checks", "logprobs"},
    "lmlosses.masking": {"_checks"},
    "lmlosses.advantages": {"_checks"},
    "lmlosses.losses": {"_checks", "logprobs", "normalizers", "reductions", "losses"},
    "lmlosses.metrics": {"_checks", "reductions"},
    "lmlosses.multitask": {"_checks"},
    "lmlosses.analysis": {"_checks", "analysis"},
    "lmlosses.optim": {"_checks", "optim"},
    "lmlosses.schedules": {"_checks", "schedules"},
    "lmlosses.precision": {"_checks"},
    "lmlosses.gradient_cache": {"_checks"},
    "lmlosses.nn": {"_checks", "logprobs", "losses", "reductions"},
    "lmlosses": {"device", "logprobs", "losses", "normalizers", "reductions"},
}


# packages that one module alone may import
OWNED = {"matplotlib": "lmlosses.lab.plotting", "triton": "lmlosses.logprobs.triton"}


def test_imports_point_one_way_and_heavy_packages_have_one_home_each():
    for path in sorted((ROOT / "lmlosses").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if name.startswith("lmlosses.lab"):
            allowed = {
                "_checks",
                "device",
                "logprobs",
                "losses",
                "normalizers",
                "reductions",
                "metrics",
            }
            allowed |= {"multitask", "masking", "advantages", "analysis", "optim"}
            allowed |= {"schedules", "precision", "lab"}
        else:
            allowed = MAY_IMPORT.get(".".join(name.split(".")[:2]), set())
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lmlosses."):
                assert node.module.split(".")[1] in allowed, f"{name} imports {node.module}"
            modules = [alias.name for alias in getattr(node, "names", [])]
            modules.append(getattr(node, "module", None) or "")
            for package, home in OWNED.items():
                if any(module.split(".")[0] == package for module in modules):
                    assert name == home, f"{name} imports {package}"

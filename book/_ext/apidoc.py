"""The API reference, read from the sources: nothing is imported, so the book needs no torch.

``.. api-module:: lmlosses.losses.regression`` lists the module's public functions and classes
with their signatures as written, shapes included, and their docstrings. ``:as: lmlosses.losses``
lists them under the module from which users import them.
"""

import ast
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import directives
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.ext.napoleon import Config, GoogleDocstring
from sphinx.util.docutils import SphinxDirective

Definition = ast.FunctionDef | ast.ClassDef
NAPOLEON = Config(napoleon_use_rtype=False, napoleon_use_ivar=True)


def source_of(module: str, root: Path) -> Path:
    path = root.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def signature(node: ast.FunctionDef, *, method: bool = False) -> str:
    arguments = node.args
    if method and arguments.args:
        arguments.args = arguments.args[1:]
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"({ast.unparse(arguments)}){returns}"


def lines_of(docstring: str, indent: str) -> list[str]:
    converted = GoogleDocstring(docstring, NAPOLEON).lines()
    return [indent + line if line else "" for line in converted]


def describe(node: Definition, module: str) -> list[str]:
    """A class or function as lines of reStructuredText."""
    kind = "class" if isinstance(node, ast.ClassDef) else "function"
    own = node
    if isinstance(node, ast.ClassDef):
        own = next((m for m in node.body if getattr(m, "name", "") == "__init__"), None)
    arguments = signature(own, method=kind == "class") if own else ""
    if kind == "class":
        arguments = arguments.replace(" -> None", "")
    lines = [f".. py:{kind}:: {node.name}{arguments}", f"   :module: {module}", ""]
    lines += lines_of(ast.get_docstring(node) or "", "   ")
    return [*lines, ""]


def public(tree: ast.Module) -> list[Definition]:
    """What a module offers: the names in its ``__all__``, else those without an underscore."""
    named = next(
        (
            ast.literal_eval(node.value)
            for node in tree.body
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        ),
        None,
    )
    return [
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and (not node.name.startswith("_") if named is None else node.name in named)
    ]


class ApiModule(SphinxDirective):
    required_arguments = 1
    option_spec = {"as": directives.unchanged_required}

    def run(self) -> list[nodes.Node]:
        module = self.arguments[0]
        path = source_of(module, Path(self.env.srcdir))
        self.env.note_dependency(str(path))
        tree = ast.parse(path.read_text(encoding="utf-8"))
        lines = lines_of(ast.get_docstring(tree) or "", "") + [""]
        for node in public(tree):
            lines += describe(node, self.options.get("as", module))
        holder = nodes.container(classes=["api-module"])
        self.state.nested_parse(StringList(lines, source=str(path)), 0, holder)
        return holder.children


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("api-module", ApiModule)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

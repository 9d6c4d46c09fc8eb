"""Number an equation by its label: ``eq-4-3-5`` prints (4.3.5), ``eq-4-3-5c`` prints (4.3.5c).

Sphinx would count labelled equations through the whole book; here the textbook's own numbers
are kept. Both places that print a number are set: the node, for the page, and the math domain,
for references to it. Labels of any other form keep Sphinx's numbers.
"""

import re

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

LABEL = re.compile(r"eq-(\d+(?:-\d+)+c?)")


class EquationNumbers(SphinxTransform):
    """Copy the number out of each equation's label."""

    default_priority = 850  # labels have been resolved, the doctree is not pickled yet

    def apply(self, **kwargs: object) -> None:
        equations = self.env.get_domain("math").equations
        for node in self.document.findall(nodes.math_block):
            match = LABEL.fullmatch(node.get("label") or "")
            if match:
                node["number"] = match[1].replace("-", ".")
                equations[node["label"]] = (self.env.docname, node["number"])


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_transform(EquationNumbers)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

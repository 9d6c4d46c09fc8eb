"""The head of an executed page: its question, what to know first, minutes, seconds, links.

```{page-head}
:question: Why do two different losses have the same gradient?
:needs: the chain rule; the softmax
```

Minutes are counted from the page's words. Seconds and versions were measured when the notebook
was executed and are read from its metadata.
"""

import json
import re
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import directives
from ledger import inline
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform
from sphinx.util.docutils import SphinxDirective

WORDS_A_MINUTE = 200


def minutes_to_read(notebook: dict) -> int:
    """Minutes for the prose of the page, code and mathematics not counted."""
    texts = [cell["source"] for cell in notebook["cells"] if cell["cell_type"] == "markdown"]
    prose = "\n".join("".join(text) for text in texts)
    prose = re.sub(r"\$\$.*?\$\$|\$[^$]*\$", " ", prose, flags=re.S)
    prose = re.sub(r"^[`:]{3}.*$", " ", prose, flags=re.M)  # opening lines of directives
    return max(1, round(len(re.findall(r"[A-Za-z]{2,}", prose)) / WORDS_A_MINUTE))


class PageHead(SphinxDirective):
    option_spec = {
        "question": directives.unchanged_required,
        "needs": directives.unchanged_required,
    }

    def run(self) -> list[nodes.Node]:
        path = Path(self.env.doc2path(self.env.docname))
        notebook = json.loads(path.read_text(encoding="utf-8"))
        measured = notebook["metadata"]["lmlosses"]
        box = nodes.container(classes=["page-head"])
        question = nodes.paragraph(classes=["page-question"])
        question.extend(inline(self.options["question"]))
        box += question
        needs = nodes.paragraph()
        needs += nodes.inline("", "Know first: ", classes=["page-label"])
        needs.extend(inline(self.options["needs"]))
        box += needs
        versions = ", ".join(
            f"{name} {measured['versions'][name]}" for name in ("Python", "torch", "matplotlib")
        )
        facts = nodes.paragraph(classes=["page-facts"])
        facts += nodes.Text(
            f"{minutes_to_read(notebook)} min to read · "
            f"{measured['seconds']:.0f} s to run on one thread ({versions}) · "
        )
        for label, suffix in (("notebook", ".ipynb"), ("text", ".md")):
            download = addnodes.download_reference(
                "",
                label,
                reftarget="/" + self.env.docname + suffix,
                refdoc=self.env.docname,
            )
            facts += download
            facts += nodes.Text(" · ")
        facts += nodes.reference("", "open in Colab", refuri=self.colab())
        box += facts
        return [box]

    def colab(self) -> str:
        options = self.config.html_theme_options
        repository = options["repository_url"].partition("://")[2].partition("/")[2]
        branch = options["repository_branch"]
        return (
            f"https://colab.research.google.com/github/{repository}/blob/{branch}/"
            f"{self.env.docname}.ipynb"
        )


class UniqueIds(SphinxTransform):
    """Count the ids that sphinx-exercise gives to the content of every exercise alike."""

    default_priority = 880

    def apply(self, **kwargs: object) -> None:
        for number, node in enumerate(self.document.findall(nodes.section), start=1):
            if node["ids"] in (["exercise-content"], ["solution-content"]):
                node["ids"] = [f"{node['ids'][0]}-{number}"]


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("page-head", PageHead)
    app.add_transform(UniqueIds)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

"""One look for all figures: colors, lines, and figures that move without a kernel.

Figures are SVG on a transparent ground, in inks that read on white and on near-black. Their
bytes are compared by the tests, so what is drawn is computed in float64 and rounded (`rounded`).
"""

import io
import json
import re
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

INK = "#767676"
"""Axes and words: contrast above 4:1 on both grounds."""

COLORS = ("#0f7fc4", "#d0661f", "#14936b", "#b65aa3", "#8a7a1c", "#767676")
"""A palette that survives the common kinds of color blindness, in order of use."""

_NO_METADATA: dict[str, Any] = {"Creator": None, "Date": None, "Format": None, "Type": None}

_STYLE: dict[Any, Any] = {
    "axes.edgecolor": INK,
    "axes.grid": False,
    "axes.labelcolor": INK,
    "axes.prop_cycle": cycler(color=COLORS),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlesize": 10,
    "figure.constrained_layout.use": True,
    "figure.facecolor": "none",
    "figure.figsize": (5.2, 3.2),
    "font.size": 10,
    "axes.facecolor": "none",
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.8,
    "savefig.facecolor": "none",
    "svg.fonttype": "path",
    "svg.hashsalt": "lmlosses",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


def use_style() -> None:
    """Set the figures' style for the rest of the session and, in a notebook, ask for SVG."""
    matplotlib.rcParams.update(_STYLE)
    try:
        from matplotlib_inline.backend_inline import set_matplotlib_formats
    except ImportError:  # outside a notebook there is no inline backend to tell
        return
    if "inline" in matplotlib.get_backend():
        set_formats: Any = set_matplotlib_formats  # it has no annotations
        set_formats("svg", metadata=_NO_METADATA)


def rounded(values: Tensor | Sequence[float], digits: int = 3) -> np.ndarray:
    """Values as a NumPy array with so many decimals, the form in which curves are drawn.

    Args:
        values: A tensor of any shape, or numbers.
        digits: Decimals kept.

    Example:
        >>> import torch
        >>> from lmlosses.lab.plotting import rounded
        >>> rounded(torch.tensor([0.12345, 2.0]))
        array([0.123, 2.   ])
    """
    numbers = values.detach().cpu() if isinstance(values, Tensor) else values
    array = np.round(np.asarray(numbers, dtype=np.float64), digits)
    return array + 0.0  # no negative zero


def label_line(axes: Axes, x: float, y: float, text: str, color: str, **style: Any) -> None:
    """Write a curve's name beside it, in its color, instead of a legend.

    Args:
        axes: Where to write.
        x: Position of the label's left end, in data coordinates.
        y: Height of its middle, in data coordinates.
        text: The curve's name.
        color: The curve's color.
        **style: Passed on to matplotlib's text.
    """
    axes.text(x, y, text, color=color, va="center", **style)


def svg(figure: Figure) -> str:
    """The figure as SVG text, the same bytes in every run; the figure is closed.

    Args:
        figure: What to draw.

    Returns:
        The ``<svg>`` element.
    """
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata=_NO_METADATA, transparent=True)
    plt.close(figure)
    text = out.getvalue()
    text = text[text.index("<svg") :]
    # only ids that something points to: several figures may stand on one page
    used = set(re.findall(r"#([\w-]+)", text))
    return re.sub(r' id="([^"]+)"', lambda m: m[0] if m[1] in used else "", text)


class Slider:
    """A figure for each value of a knob, shown one at a time in static HTML.

    It needs no kernel, no library and no network: the frames are inline SVG and a range input
    with a few lines of script shows one of them. Arrow keys move it.

    Args:
        name: Identifier of the element, unique on its page.
        label: What the knob sets, with its unit; the text before the value.
        values: What the knob can be set to, in order.
        draw: Draws the figure for one value.
        describe: Says in one sentence what the figure for a value shows, for those who hear it.
        start: Position at which the knob stands first.

    Raises:
        ValueError: If there are fewer than two values or ``start`` is not one of their positions.
    """

    def __init__(
        self,
        name: str,
        label: str,
        values: Sequence[float | str],
        draw: Callable[[float | str], Figure],
        *,
        describe: Callable[[float | str], str],
        start: int = 0,
    ) -> None:
        if len(values) < 2:
            raise ValueError(f"values must hold at least two settings; got {len(values)}")
        if not 0 <= start < len(values):
            raise ValueError(f"start must lie in [0, {len(values)}); got {start!r}")
        self.name, self.label, self.start = name, label, start
        self.values = [str(value) for value in values]
        # one salt a frame and no glyphs: ids must be unique on the page that holds all frames
        self.frames = []
        for position, value in enumerate(values):
            salt: dict[Any, Any] = {"svg.hashsalt": f"{name}-{position}", "svg.fonttype": "none"}
            with matplotlib.rc_context(salt):
                self.frames.append((describe(value), svg(draw(value))))

    def __repr__(self) -> str:
        return f"Slider({self.name!r}, {len(self.frames)} frames)"

    def _repr_html_(self) -> str:
        frames = "".join(
            f'<div class="slider-frame" role="img" aria-label="{escape(text)}"'
            f"{'' if position == self.start else ' hidden'}>{picture}</div>"
            for position, (text, picture) in enumerate(self.frames)
        )
        return (
            f'<div class="slider" id="{escape(self.name)}"><label>{escape(self.label)} '
            f"<output>{escape(self.values[self.start])}</output>"
            f'<input type="range" min="0" max="{len(self.frames) - 1}" value="{self.start}" '
            f'step="1" aria-valuetext="{escape(self.values[self.start])}"></label>{frames}'
            f'<script>(()=>{{const box=document.getElementById("{escape(self.name)}"),'
            f"values={json.dumps(self.values)},"
            'knob=box.querySelector("input"),shown=box.querySelector("output"),'
            'frames=box.querySelectorAll(".slider-frame");'
            'knob.addEventListener("input",()=>{shown.textContent=values[knob.value];'
            'knob.setAttribute("aria-valuetext",values[knob.value]);'
            "frames.forEach((f,i)=>{f.hidden=i!=knob.value})})})()</script></div>"
        )

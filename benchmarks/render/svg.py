"""Plots as SVG to be written into a page: text is text, colours are the page's.

Matplotlib draws them. Its SVG is a few KB per plot, needs no script and prints; colours are
replaced by CSS variables, so the page's light and dark palettes apply. An interactive library would
bring megabytes of script into every report for the same dozen marks.
"""

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nsp.errors import MissingExtraError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Stand-ins that Matplotlib takes and CSS variables replace; each occurs nowhere by itself.
INK, FAINT, GRID = "#010203", "#040506", "#070809"
SERIES = ("#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04", "#0a0b05", "#0a0b06")
_VARIABLES = {
    INK: "var(--ink)",
    FAINT: "var(--faint)",
    GRID: "var(--grid)",
    **{color: f"var(--series-{number})" for number, color in enumerate(SERIES, 1)},
}
WIDTH_IN = 4.8  # readable at 328 CSS px, not huge at 560
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "nsp",  # the same data give the same file
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.6,
}
MARKERS = "osD^vP"


@dataclass(frozen=True)
class Plot:
    """One figure of the page. `summary` says in words what it shows, for who cannot see it."""

    key: str  # unique in the page
    title: str
    summary: str
    svg: str


def draw(key: str, title: str, summary: str, height_in: float, paint: Callable[..., str]) -> Plot:
    """Return the plot that `paint` puts on empty axes; what it returns is added to the summary."""
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise MissingExtraError("matplotlib", "bench") from error
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH_IN, height_in), layout="constrained")
        said = paint(figure.add_subplot())
        svg = _inline(figure, key)
    return Plot(key, title, " ".join(filter(None, (summary, said))), svg)


def _inline(figure: "Figure", key: str) -> str:
    """Return a figure as an element of a page: own names, the page's font and colours."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'(id="|xlink:href="#|url\(#)', rf"\g<1>{key}-", text)
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    for stand_in, variable in _VARIABLES.items():
        text = text.replace(stand_in, variable)
    head = f'<svg class="plot" role="img" aria-labelledby="{key}-title" focusable="false"'
    text = re.sub(r'^<svg[^>]*?(viewBox="[^"]*")[^>]*>', rf"{head} \1>", text)
    return text.strip()

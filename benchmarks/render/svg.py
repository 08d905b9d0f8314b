"""Plots as SVG to be written into a page, each in two styles: for light and for dark pages.

Matplotlib draws them; text is text. A plot has about 15 KB in each style, needs no script and can
be printed. The page shows the one in its colours. An interactive library would bring megabytes of
script into every report for the same dozen marks.
"""

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nsp.errors import MissingExtraError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The colours of the page and of its plots, in each scheme.
_NAMES = ("page", "card", "link", "alert", "alert-card", "ink", "faint", "grid")
_VALUES = {
    "light": "#ffffff #f5f6f8 #0b5cad #8a2b06 #fdf1ea #1a1c1f #59616a #d5dae0",
    "dark": "#14171a #1d2226 #7cbcf8 #ffb38a #33231b #e8eaed #a6adb5 #373e45",
}
COLORS = {k: dict(zip(_NAMES, v.split(), strict=True)) for k, v in _VALUES.items()}
_SERIES = {
    "light": ["#1f6fb4", "#c2410c", "#2e7d32", "#7b3fa0", "#b0256a", "#6b6417"],
    "dark": ["#6cb4f5", "#ff9d5c", "#7fd186", "#c79bf0", "#ff8fbd", "#d6cc5c"],
}
# Places in a style's cycle of colours.
SERIES = ("C0", "C1", "C2", "C3", "C4", "C5")
INK, FAINT = "C6", "C7"
WIDTH_IN = 4.8  # readable at 328 CSS px, not huge at 560
MARKERS = "osD^vP"


@dataclass(frozen=True)
class Plot:
    """One figure of the page. `summary` says in words what it shows, for who cannot see it."""

    key: str  # unique in the page
    title: str
    summary: str
    svg: str  # one drawing for each scheme


def draw(key: str, title: str, summary: str, height_in: float, paint: Callable[..., str]) -> Plot:
    """Return the plot that `paint` puts on empty axes; what it returns is added to the summary."""
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise MissingExtraError("matplotlib", "bench") from error
    svgs, said = [], None
    for scheme in COLORS:
        with mpl.rc_context(_style(scheme)):
            figure = Figure(figsize=(WIDTH_IN, height_in), layout="constrained")
            said = paint(figure.add_subplot())
            svgs.append(_inline(figure, key, scheme))
    return Plot(key, title, " ".join(filter(None, (summary, said))), "\n".join(svgs))


def _style(scheme: str) -> dict[str, Any]:
    """Return Matplotlib's settings for plots on a light or a dark page."""
    colors = COLORS[scheme]
    ink, faint = colors["ink"], colors["faint"]
    return {
        "svg.fonttype": "none",
        "svg.hashsalt": "nsp",  # the same data give the same file
        "font.size": 10,
        "text.color": ink,
        "axes.prop_cycle": f"cycler('color', {[*_SERIES[scheme], ink, faint]})",
        "axes.edgecolor": faint,
        "axes.labelcolor": ink,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": colors["grid"],
        "grid.linewidth": 0.6,
        "xtick.color": ink,
        "ytick.color": ink,
        "legend.frameon": False,
        "legend.fontsize": 9,
        "lines.linewidth": 1.6,
    }


def _inline(figure: "Figure", key: str, scheme: str) -> str:
    """Return a figure as an element of a page: with names of its own, in the page's font."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'(id="|xlink:href="#|url\(#)', rf"\g<1>{key}-{scheme}-", text)
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    head = f'<svg class="plot {scheme}" role="img" aria-labelledby="{key}-title" focusable="false"'
    text = re.sub(r'^<svg[^>]*?(viewBox="[^"]*")[^>]*>', rf"{head} \1>", text)
    return text.strip()

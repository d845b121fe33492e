"""Matplotlib figures as SVG inside a page: they take the page's font and colours, light or dark."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from typing import Any

import matplotlib
from matplotlib.figure import Figure

# Drawn for the ink, replaced by the page's own.
INK = "#010203"
FAINT = "#040506"

_PROLOGUE = re.compile(r"\A.*?(?=<svg)", re.DOTALL)
# The style would hold for the whole page, which has its own.
_UNWANTED = re.compile(r"<metadata>.*?</metadata>|<style.*?</style>", re.DOTALL)
_NAMESPACES = re.compile(r'\s+xmlns(:\w+)?="[^"]*"')
_SIZE = re.compile(r'(<svg[^>]*?)\s+width="[^"]*"|(<svg[^>]*?)\s+height="[^"]*"')
_FONT = re.compile(r"'DejaVu Sans'[^;\"]*")
_NAMED = re.compile(r'(\sid="|url\(#|xlink:href="#|\shref="#)')

# Text stays text; it is laid out in a wide font, so that the page's has room.
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "qm_spec",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": FAINT,
    "grid.alpha": 0.35,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def inline_svg(figure: Figure, name: str, description: str, colours: Mapping[str, str]) -> str:
    """Return a figure as one `<svg>` element that loads nothing and can stand beside others.

    Args:
        name: of letters and hyphens, unlike that of any other figure of the page; ids inside begin with it.
        description: what a reader who does not see the figure hears.
        colours: by hexadecimal colour the CSS that replaces it.
    """
    stream = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(
            stream,
            format="svg",
            transparent=True,
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
    text = _UNWANTED.sub("", _PROLOGUE.sub("", stream.getvalue()))
    text = _NAMESPACES.sub("", text)
    for _ in range(2):
        text = _SIZE.sub(lambda found: found.group(1) or found.group(2), text, count=1)
    text = _NAMED.sub(lambda found: f"{found.group(1)}{name}-", text)
    text = _FONT.sub("inherit", text).replace(INK, "currentColor").replace(FAINT, "var(--faint)")
    for colour, css in colours.items():
        text = re.sub(re.escape(colour), css, text, flags=re.IGNORECASE)
    label = description.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1).strip()

"""How the benchmarks draw: SVG that follows light and dark mode and can be read on a phone."""

from __future__ import annotations

import html
import io
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Inches: at the width of a phone, text of 10 points keeps 9 pixels.
WIDTH = 4.9
# Drawn in a colour that nothing else has, which becomes the reader's.
INK = "#010203"
OURS, OTHERS, QUIET = "#e07b1a", "#3b86d1", "#8a8a8a"
COLORS = (OTHERS, "#8b6fd0", "#2f9e5f", OURS, "#d6455a", "#1a9aa8", "#b08a00", "#c25bb0", QUIET, "#555f6b")
# On the site the colours follow the theme; elsewhere, what the reader's system prefers.
MODES = (
    "<style>.benchmark{--ink:var(--color-foreground-primary,#1f2328)}@media(prefers-color-scheme:dark)"
    "{.benchmark{--ink:var(--color-foreground-primary,#e6edf3)}}.benchmark text{font-family:sans-serif}</style>"
)
STYLE = {
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "font.size": 10,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "numba-lion",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


def figure(height: float) -> Figure:
    """Return an empty figure.

    Args:
        height: In inches.
    """
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams.update(STYLE)
    return Figure(figsize=(WIDTH, height), layout="constrained")


def save(figure: Figure, path: Path, label: str) -> None:
    """Write a figure as SVG, the same bytes for the same figure.

    Args:
        figure: What ``figure`` returned.
        path: The file.
        label: What it shows, for who cannot see it.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    drawing = buffer.getvalue()
    drawing = drawing[drawing.index("<svg") :].replace(INK, "var(--ink)")
    opened = f'<svg class="benchmark picture" role="img" aria-label="{html.escape(label)}"'
    head, _, body = drawing.replace("<svg", opened, 1).partition("<defs>")
    # A blank line would end the block of HTML that a page includes it as.
    lines = f"{head}{MODES}\n<defs>{body}".splitlines()
    path.write_text("\n".join(line for line in lines if line.strip()) + "\n", encoding="utf-8")

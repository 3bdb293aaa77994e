"""How the benchmarks draw: SVG that follows light and dark mode and can be read on a phone."""

from __future__ import annotations

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
MODES = (
    "<style>:root{--ink:#1f2328}@media (prefers-color-scheme: dark){:root{--ink:#d5d9de}}text{font-family:sans-serif}"
    "</style>"
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


def save(figure: Figure, path: Path) -> None:
    """Write a figure as SVG, the same bytes for the same figure.

    Args:
        figure: What ``figure`` returned.
        path: The file.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    head, _, body = buffer.getvalue().partition("<defs>")
    path.write_text(f"{head}{MODES}\n <defs>{body}".replace(INK, "var(--ink)"))

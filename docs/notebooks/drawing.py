"""How the notebooks draw: one look for figures and tables that follows the page's light or dark mode."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from IPython.display import HTML
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

BLUE, ORANGE, GREEN = "#3b86d1", "#e07b1a", "#2f9e5f"
RED, VIOLET, GREY = "#d6455a", "#8b6fd0", "#8a8a8a"

# Text and lines are drawn in a colour that nothing else has, which becomes the page's text colour.
INK = "#010203"

STYLE = {
    "axes.edgecolor": INK,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.prop_cycle": matplotlib.cycler(
        color=[BLUE, ORANGE, GREEN, RED, VIOLET, GREY]
    ),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "grid.alpha": 0.25,
    "grid.color": GREY,
    "legend.frameon": False,
    "svg.hashsalt": "numba-lion",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}
matplotlib.rcParams.update(STYLE)


def axes(
    columns: int = 1,
    rows: int = 1,
    *,
    height: float = 3.0,
    share_x: bool = False,
    share_y: bool = False,
) -> tuple[Figure, Any]:
    """Return a figure of the pages' width and its axes.

    Args:
        columns: Axes side by side (default: 1).
        rows: Axes on top of one another (default: 1).
        height: Height of a row in inches (default: 3).
        share_x: Whether the axes share the scale of x (default: False).
        share_y: Whether the axes share the scale of y (default: False).

    Returns:
        The figure, and one ``Axes`` or an array of them.
    """
    figure = Figure(figsize=(7.2, height * rows))
    return figure, figure.subplots(rows, columns, sharex=share_x, sharey=share_y)


def show(figure: Figure, alt: str) -> HTML:
    """Return a figure as inline SVG in the text colour of the page.

    Args:
        figure: The figure.
        alt: What is to be seen, for those who do not see it.
    """
    for ax in figure.axes:
        _, labels = ax.get_legend_handles_labels()
        if labels and ax.get_legend() is None:
            ax.legend()
    buffer = io.StringIO()
    figure.savefig(
        buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None}
    )
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(alt)}" ', 1)
    return HTML(f'<div class="figure-scroll">{svg}</div>')


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> HTML:
    """Return a table; floats are shown with four significant digits.

    Args:
        header: Names of the columns.
        rows: The rows, one value per column.
    """

    def cell(tag: str, value: Any) -> str:
        text = f"{value:.4g}" if isinstance(value, (float, np.floating)) else str(value)
        return f"<{tag}>{html.escape(text)}</{tag}>"

    head = "".join(cell("th", name) for name in header)
    body = "".join(
        "<tr>" + "".join(cell("td", value) for value in row) + "</tr>" for row in rows
    )
    return HTML(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")


def hits(
    ax: Axes, found: npt.NDArray[np.bool_], rows: Sequence[str], columns: Sequence[str]
) -> None:
    """Draw a table of what was found: a filled field for a hit, an empty one for a miss.

    Args:
        ax: Where to draw.
        found: bool array, one row per name in ``rows`` and one column per name in ``columns``.
        rows: Names of the rows.
        columns: Names of the columns.
    """
    for row, column in np.ndindex(found.shape):
        hit = found[row, column]
        place, width, height = (column - 0.46, row - 0.42), 0.92, 0.84
        ax.add_patch(
            Rectangle(
                place,
                width,
                height,
                facecolor=GREEN if hit else "none",
                edgecolor=GREEN if hit else RED,
            )
        )
        colour = "white" if hit else INK
        ax.text(
            column,
            row,
            "found" if hit else "missed",
            ha="center",
            va="center_baseline",
            fontsize=9,
            color=colour,
        )
    ax.set_xticks(range(len(columns)), [name.replace(" ", "\n", 1) for name in columns])
    ax.set_yticks(range(len(rows)), rows)
    ax.set(xlim=(-0.55, len(columns) - 0.45), ylim=(len(rows) - 0.5, -0.5))
    _without_frame(ax)


def lanes(ax: Axes, elements: npt.NDArray[Any], width: int, title: str) -> None:
    """Draw which lane of a warp touches which element: lanes on y, elements on x, one colour a load.

    Args:
        ax: Where to draw.
        elements: int array of shape (loads, lanes): the first element that a lane touches with a load.
        width: Elements that a lane touches with a load.
        title: Title of the drawing.
    """
    colours = (BLUE, ORANGE, GREEN, RED)
    for load, row in enumerate(elements):
        ax.hlines(
            range(row.size), row, row + width, colors=colours[load % 4], linewidth=2.5
        )
    ax.invert_yaxis()
    ax.set(title=title, ylabel="lane", xlim=(-2, 258))


def levels(
    ax: Axes, rows: Mapping[str, tuple[Sequence[str], int]], notes: Sequence[str]
) -> None:
    """Draw what consists of what: each row is one field of the row above, opened.

    Args:
        ax: Where to draw.
        rows: By name, the names of the fields and which of them the next row opens.
        notes: What is said below each row.
    """
    for row, ((names, opened), note) in enumerate(
        zip(rows.values(), notes, strict=True)
    ):
        last, width = row == len(rows) - 1, 1 / len(names)
        for place, name in enumerate(names):
            lit = place == opened and not last
            field = Rectangle(
                (place * width, row), width, 0.42, facecolor=BLUE if lit else "none"
            )
            field.set_edgecolor(BLUE)
            ax.add_patch(field)
            ax.text(
                (place + 0.5) * width,
                row + 0.21,
                name,
                ha="center",
                va="center",
                fontsize=8,
                color="white" if lit else INK,
            )
        ax.text(1, row + 0.47, note, ha="right", va="top", fontsize=9)
        if not last:
            for begin, end in ((opened * width, 0), ((opened + 1) * width, 1)):
                ax.plot(
                    [begin, end], [row + 0.42, row + 1], ":", color=BLUE, linewidth=1
                )
    ax.set_yticks([row + 0.21 for row in range(len(rows))], list(rows))
    ax.set_xticks([])
    ax.set(xlim=(-0.01, 1.01), ylim=(len(rows) - 0.3, -0.1))
    _without_frame(ax)


def _without_frame(ax: Axes) -> None:
    ax.grid(False)
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)


def bits(ax: Axes, rows: Mapping[str, Sequence[str]]) -> None:
    """Draw numbers bit by bit, the first part of each in blue and the second in orange.

    Args:
        ax: Where to draw.
        rows: By name, one or two strings of 0 and 1 each, which are drawn one after the other.
    """
    for row, parts in enumerate(rows.values()):
        column = 0
        for part, colour in zip(parts, (BLUE, ORANGE), strict=False):
            for bit in part:
                one = bit == "1"
                field = Rectangle(
                    (column - 0.45, row - 0.36),
                    0.9,
                    0.72,
                    facecolor=colour if one else "none",
                )
                field.set_edgecolor(colour)
                ax.add_patch(field)
                ax.text(
                    column,
                    row,
                    bit,
                    ha="center",
                    va="center_baseline",
                    fontsize=8,
                    color="white" if one else INK,
                )
                column += 1
    ax.set_yticks(range(len(rows)), list(rows))
    ax.set_xticks([])
    ax.set(xlim=(-0.6, 31.6), ylim=(len(rows) - 0.5, -0.5))
    _without_frame(ax)

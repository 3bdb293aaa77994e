"""The results as tables."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text


def show(report: dict[str, Any]) -> None:
    """Print the timings of a report, and last how its parts ended."""
    console = Console() if sys.stdout.isatty() else Console(width=120)
    timings = Table(title="Timings", title_justify="left")
    for heading in ("", "ms", "quartiles", "of a copy", "× ours", "bits"):
        timings.add_column(heading, justify="left" if heading in ("", "bits") else "right")
    for outcome in report["parts"]:
        rows = list(_rows(outcome.get("result") or {}))
        if rows:
            timings.add_section()
            timings.add_row(Text(outcome["name"], style="bold"))
        for row in rows:
            timings.add_row(*(Text(cell) for cell in row))
    if timings.row_count:
        console.print(timings)
    parts = Table(title="Parts", title_justify="left")
    for heading in ("", "outcome", "s", "found"):
        parts.add_column(heading, justify="right" if heading == "s" else "left", overflow="fold")
    for outcome in report["parts"]:
        seconds = f"{outcome['seconds']:.0f}" if "seconds" in outcome else ""
        parts.add_row(*(Text(cell) for cell in (outcome["name"], outcome["outcome"], seconds, outcome["found"])))
    console.print(parts)


def _rows(result: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Return the cells of a part's timings: those of the measurements, or those of the benchmark."""
    for row in result.get("rows", []):
        share = f"{row['share_of_copy']:.1%}" if "share_of_copy" in row else ""
        yield row["what"], *_times(row["ms"], 1), share, "", row.get("bits", "")
    for run in result.get("runs", []):
        if "job" in run:  # a training
            yield from _measured(run["job"]["contestant"], run["job"]["kind"], run["result"])
            continue
        for name, row in run["rows"].items():
            times = _times(row["nanoseconds_per_parameter"], run["elements"] / 1e6)
            what = f"{run['workload']}, {run['dtype']}: {name}"
            yield what, *times, f"{row['share_of_bound']:.1%}", f"{row['times_ours']:.2f}", ""


def _measured(contestant: str, kind: str, result: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Return the cells of what was measured of a training: its peak of memory, or a step."""
    if kind == "memory" and result["peak"] is not None:
        yield f"{contestant}: peak of {result['peak'] / (1 << 20):.0f} MiB", "", "", "", "", ""
    elif kind == "time":
        yield f"{contestant}: a training step", f"{1e3 * result['step_seconds']:.4g}", "", "", "", ""


def _times(times: dict[str, float], factor: float) -> tuple[str, str]:
    low, median, high = (f"{factor * times[key]:.4g}" for key in ("low", "median", "high"))
    return median, f"{low} – {high}"

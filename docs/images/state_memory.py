"""Draws ``state_memory.png`` from measured figures: ``python docs/images/state_memory.py``, from the root."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from matplotlib.figure import Figure

CLASSES = ("Lion", "Lion32bit", "Lion8bit", "PagedLion", "PagedLion32bit", "PagedLion8bit")
NUMEL = 25_000_000


def main() -> None:
    """Measure every class in a process of its own, and draw the bars."""
    figures = []
    for name in CLASSES:
        command = [sys.executable, "-m", "tests.paging.memory", name, str(NUMEL)]
        figures.append(json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout))
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots()
    left = [0.0] * len(CLASSES)
    for key, label, color in (
        ("anonymous", "anonymous (RssAnon)", "#c44e52"),
        ("file", "backed by a file, can be paged out (RssFile)", "#8fb8de"),
    ):
        widths = [result[key] / NUMEL for result in figures]
        axes.barh(CLASSES, widths, left=left, label=label, color=color)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for row, total in enumerate(left):
        axes.text(total, row, f" {total:.2f}", va="center")
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set(xlabel="bytes of state per parameter", title=f"Resident memory that state takes, {NUMEL:,} parameters")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", fontsize="small")
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=120)


if __name__ == "__main__":
    main()

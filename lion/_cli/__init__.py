"""The commands of ``python -m lion``."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from rich.box import Box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from rich.text import Text

from lion._backends import for_device

# A rule under the headings, nothing else.
_RULED = Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)
# Wider than any table, yet no wider than what rich lays out in no time.
_AS_WIDE_AS_NEEDED = 1000
# What stands for a sign on a terminal that does not have it.
_SPELLED = str.maketrans({"✓": "ok", "✗": "differs", "×": "x", "·": "-", "–": "-"})


class UsageError(Exception):
    """A mistake of the user: shown as one line, without a traceback."""


def add_json(parser: argparse.ArgumentParser) -> None:
    """Declare --json; it may stand before the command or after it."""
    parser.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON instead of tables")


def print_json(report: Any) -> None:
    """Print what --json asks for."""
    json.dump(report, sys.stdout, indent=2)
    print()


def output() -> Console:
    """Return what prints on stdout: as wide as the terminal; in a file or a pipe, where nothing may be cut, wider."""
    is_bounded = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(width=None if is_bounded else _AS_WIDE_AS_NEEDED, highlight=False)


def spelled(text: str) -> str:
    """Return a text as stdout can show it: signs that its encoding lacks become words and letters."""
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return text.translate(_SPELLED)
    return text


def print_line(text: str, style: str = "") -> None:
    """Print a line, of several rows where it is wider than the terminal."""
    output().print(Text(spelled(text), style))


def print_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table of numbers: the first column has names, which are folded where there is no room for them."""
    table = Table(box=_RULED, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for index, heading in enumerate(headings):
        table.add_column(
            Text(spelled(heading)),
            justify="right" if index else "left",
            no_wrap=index > 0,
            overflow="fold",
            vertical="bottom" if index == 0 else "top",
        )
    for row in rows:
        # As text: brackets are no markup.
        table.add_row(*(Text(spelled(cell)) for cell in row))
    output().print(table)


def progress_bars(*more: ProgressColumn) -> Progress:
    """Return progress bars on stderr that vanish at the end, and are not there where it is no terminal."""
    # A description is folded where there is no room for it.
    description = TextColumn("{task.description}", table_column=Column())
    columns = (description, BarColumn(bar_width=16), MofNCompleteColumn(), TimeElapsedColumn(), *more)
    return Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())


def add_device(parser: argparse.ArgumentParser) -> None:
    """Declare --device."""
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")


def no_gpu() -> str:
    """Return why there is no GPU to use, or nothing where there is one."""
    if torch.cuda.device_count():
        return ""
    return "torch finds no GPU" + ("" if torch.version.cuda else ", it is built for CPUs alone")


def checked_device(name: str | None) -> torch.device:
    """Return the device of a name, or raise UsageError if this machine has none or no kernels for it."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch("cpu|cuda|cuda:[0-9]+", name):
        raise UsageError(f"Invalid --device: {name}; expected cpu, cuda or the number of a GPU, such as cuda:0")
    if name != "cpu" and no_gpu():
        raise UsageError(f"Invalid --device: {name}; {no_gpu()}")
    last = torch.cuda.device_count() - 1
    if name.startswith("cuda:") and int(name[5:]) > last:
        raise UsageError(f"Invalid --device: {name}; the last GPU is cuda:{last}")
    device = torch.device(name)
    try:
        for_device(device)
    except (RuntimeError, ValueError) as error:
        raise UsageError(str(error)) from None
    return device


def at_least(name: str, value: int, minimum: int) -> None:
    """Raise UsageError if the value of an option is below its minimum."""
    if value < minimum:
        raise UsageError(f"Invalid {name}: {value}; at least {minimum} is needed")


def checked_names(option: str, given: str, allowed: Collection[str]) -> list[str]:
    """Return the names in a list separated by commas, or raise UsageError if one is not allowed."""
    names = [name.strip() for name in given.split(",")]
    for name in names:
        if name not in allowed:
            raise UsageError(f"Invalid {option}: {name!r}; expected one of {', '.join(allowed)}")
    return list(dict.fromkeys(names))


def device_name(device: torch.device) -> str:
    """Return what to call a device in a table."""
    if device.type == "cuda":
        return f"{device}: {torch.cuda.get_device_name(device)}"
    return str(device)

"""The commands of ``python -m lion``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Collection
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn

from lion._backends import for_device


class UsageError(Exception):
    """A mistake of the user: shown as one line, without a traceback."""


def add_json(parser: argparse.ArgumentParser) -> None:
    """Declare --json; it may stand before the command or after it."""
    parser.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON instead of tables")


def print_json(report: Any) -> None:
    """Print what --json asks for."""
    json.dump(report, sys.stdout, indent=2)
    print()


def progress_bars(*more: ProgressColumn) -> Progress:
    """Return progress bars on stderr that vanish at the end."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), *more)
    return Progress(*columns, console=Console(stderr=True), transient=True)


def add_device(parser: argparse.ArgumentParser) -> None:
    """Declare --device."""
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")


def checked_device(name: str | None) -> torch.device:
    """Return the device of a name, or raise UsageError if this machine has none or no kernels for it."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"Invalid --device: {name}; {str(error).splitlines()[0]}") from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"Invalid --device: {name}; cpu and cuda devices are supported")
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

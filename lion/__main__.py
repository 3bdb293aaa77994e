"""``python -m lion``: demo, check, bench, and without a command an overview."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import sys
from typing import NoReturn

import torch
from rich.console import Console
from rich.table import Table

from lion.cli import UsageError, bench, check, demo

COMMANDS = {"demo": demo, "check": check, "bench": bench}
DISTRIBUTIONS = ("numba-lion", "torch", "numba", "numba-cuda", "numpy")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def main(arguments: list[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: The command line after the program's name (default: that of the process).

    Returns:
        The exit code: 0, 1 if a check found a difference, 2 for a mistake of the user.
    """
    parser = _Parser(prog="python -m lion", description="Lion optimizers with 32-bit and 8-bit state for PyTorch.")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, module in COMMANDS.items():
        doc = (module.__doc__ or "").strip()
        command = subparsers.add_parser(name, help=doc.splitlines()[0], description=doc)
        module.add_arguments(command)
    options = parser.parse_args(arguments)
    if options.command is None:
        _overview(parser)
        return 0
    try:
        return COMMANDS[options.command].run(options)
    except UsageError as error:
        print(f"{parser.prog} {options.command}: error: {error}", file=sys.stderr)
        return 2


def _overview(parser: argparse.ArgumentParser) -> None:
    parser.print_help()
    table = Table.grid(padding=(0, 2))
    table.add_row("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    for name in DISTRIBUTIONS:
        try:
            table.add_row(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            table.add_row(name, "not installed")
    table.add_row("cpu", f"{torch.get_num_threads()} threads")
    for index in range(torch.cuda.device_count()):
        device, properties = torch.device("cuda", index), torch.cuda.get_device_properties(index)
        table.add_row(
            str(device),
            f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
            f"{properties.total_memory / 2**30:.0f} GiB",
        )
    print()
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())

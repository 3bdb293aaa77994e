"""``python -m lion``: demo, check, bench, and without a command an overview."""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import textwrap
from io import TextIOWrapper
from types import ModuleType
from typing import Any, NoReturn

import lion
from lion._cli import UsageError, add_json, bench, check, demo, overview, print_json, spelled

COMMANDS = {"demo": demo, "check": check, "bench": bench}
DESCRIPTION = """Lion optimizers with 32-bit and 8-bit state for PyTorch.

Without a command: what was found on this machine."""
EXAMPLES = """\
python -m lion --json > machine.json
python -m lion check
python -m lion demo --help"""
EXIT_CODES = "exit codes: 0, 1 if check finds a difference, 2 for a mistake in the command line, 130 after Ctrl-C"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def main(arguments: list[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: The command line after the program's name (default: that of the process).

    Returns:
        The exit code: 0, 1 if a check found a difference, 2 for a mistake of the user, 130 after Ctrl-C.
    """
    parser = _Parser(prog="python -m lion", **_texts(DESCRIPTION, EXAMPLES))
    parser.add_argument("--version", action="version", version=f"numba-lion {lion.__version__}")
    add_json(parser)
    parser.set_defaults(json=False)
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    parsers: dict[str | None, argparse.ArgumentParser] = {None: parser}
    for name, module in COMMANDS.items():
        doc = _purpose(module)
        command = subparsers.add_parser(name, help=doc.splitlines()[0], **_texts(doc, module.EXAMPLES))
        module.add_arguments(command)
        parsers[name] = command
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        parsers[options.command].error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        if options.command is not None:
            return COMMANDS[options.command].run(options)
        if options.json:
            print_json(overview.found())
        else:
            overview.print_found(overview.found())
            print(f"\n{_usage(parser)}")
        return 0
    except UsageError as error:
        print(f"{parser.prog} {options.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        return 130


def _purpose(module: ModuleType) -> str:
    """Return what a command is for; its name under ``python -OO``, which takes docstrings away."""
    return (module.__doc__ or module.__name__.rpartition(".")[2]).strip()


def _width() -> int:
    return shutil.get_terminal_size().columns - 2


def _texts(description: str, examples: str) -> dict[str, Any]:
    """Return the description and epilog that --help shows, and their formatter."""
    width = _width()
    commands = (" \\\n    ".join(_folded(command, width - 8)) for command in examples.splitlines())
    return {
        "description": spelled("\n\n".join(textwrap.fill(part, width) for part in description.split("\n\n"))),
        "epilog": f"examples:\n{textwrap.indent(chr(10).join(commands), '  ')}\n\n{textwrap.fill(EXIT_CODES, width)}",
        "formatter_class": argparse.RawDescriptionHelpFormatter,
    }


def _folded(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)


def _usage(parser: argparse.ArgumentParser) -> str:
    """Return the commands, a line each where there is room, and how to learn more."""
    lines = [f"{parser.prog} [--json] [--version] [COMMAND]"]
    for name, module in COMMANDS.items():
        title = _purpose(module).splitlines()[0]
        lines.append(textwrap.fill(title, _width(), initial_indent=f"  {name:<7}", subsequent_indent=" " * 9))
    lines.append(textwrap.fill(f"{parser.prog} COMMAND --help shows the options of a command.", _width()))
    return "\n".join(lines)


if __name__ == "__main__":
    if isinstance(sys.stdout, TextIOWrapper):
        # A path may have letters that the terminal has not.
        sys.stdout.reconfigure(errors="backslashreplace")
    if hasattr(signal, "SIGPIPE"):
        # A reader that has enough, such as head, ends the command without a word.
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.exit(main())

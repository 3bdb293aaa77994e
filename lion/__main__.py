"""``python -m lion``: demo, check, bench, and without a command an overview."""

from __future__ import annotations

import argparse
import shutil
import sys
import textwrap
from typing import Any, NoReturn

from lion._cli import UsageError, add_json, bench, check, demo, overview, print_json

COMMANDS = {"demo": demo, "check": check, "bench": bench}
DESCRIPTION = """Lion optimizers with 32-bit and 8-bit state for PyTorch.

Without a command: these lines, and what was found on this machine."""
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
    add_json(parser)
    parser.set_defaults(json=False)
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, module in COMMANDS.items():
        doc = (module.__doc__ or "").strip()
        command = subparsers.add_parser(name, help=doc.splitlines()[0], **_texts(doc, module.EXAMPLES))
        module.add_arguments(command)
    options = parser.parse_args(arguments)
    try:
        if options.command is not None:
            return COMMANDS[options.command].run(options)
        if options.json:
            print_json(overview.found())
        else:
            parser.print_help()
            print()
            overview.print_tables(overview.found())
        return 0
    except UsageError as error:
        print(f"{parser.prog} {options.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        return 130


def _texts(description: str, examples: str) -> dict[str, Any]:
    """Return the description and epilog that --help shows, and their formatter."""
    width = shutil.get_terminal_size().columns - 2
    return {
        "description": "\n\n".join(textwrap.fill(part, width) for part in description.split("\n\n")),
        "epilog": f"examples:\n{textwrap.indent(examples, '  ')}\n\n{textwrap.fill(EXIT_CODES, width)}",
        "formatter_class": argparse.RawDescriptionHelpFormatter,
    }


if __name__ == "__main__":
    sys.exit(main())

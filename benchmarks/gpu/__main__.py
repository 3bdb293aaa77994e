"""All that is asked of a machine with a GPU, most important first: ``python -m benchmarks.gpu --out FOLDER``.

Every part is a process of its own with a time limit; when one fails, the next goes on. After each of them results.json
is written again; tests.txt and log.txt hold what the parts printed. Exit code 1 if a part failed.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.parts import PARTS, Part

ROOT = Path(__file__).resolve().parents[2]
NEEDED = ("numpy", "ml_dtypes", "numba", "torch", "rich")
PEERS = ("bitsandbytes", "flashoptim", "torchao")
# Seconds for a part to end by itself after it was interrupted: pytest then still says what failed.
GRACE = 5
# The last bytes of what a part prints are kept.
LOG_BYTES = 1 << 20

Outcome = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    """Run the parts, write the results and print a table.

    Args:
        arguments: The command line after the program's name (default: that of the process).

    Returns:
        The exit code: 0, 1 if a part failed or if something is missing that all parts need.
    """
    options = _parser().parse_args(arguments)
    deadline = time.monotonic() + 60 * options.minutes
    without = missing(for_gpu=not options.dry_run)
    for line in without:
        print(f"missing: {line}", flush=True)
    if without:
        return 1
    for name in PEERS:
        if not installed(name):
            print(f"not installed, so not measured: {name}", flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    for name in ("tests.txt", "log.txt"):
        (options.out / name).unlink(missing_ok=True)
    report: dict[str, Any] = {
        "began": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "minutes": options.minutes,
        "dry_run": options.dry_run,
        "parts": [],
    }
    for part in PARTS:
        if options.only and not any(name in part.name for name in options.only):
            continue
        print(f"{part.name} ...", end=" ", flush=True)
        outcome = run(part, options.dry_run, deadline - time.monotonic(), options.out)
        print(f"{outcome['outcome']}: {outcome['found']}", flush=True)
        report["parts"].append(outcome)
        _write(options.out / "results.json", report)
    from benchmarks.gpu import tables  # not before it is known that its needs are met

    print(f"wrote {options.out / 'results.json'}")
    tables.show(report)
    return int(any(outcome["outcome"] in ("failed", "out of time") for outcome in report["parts"]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").strip())
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--minutes", type=float, default=9, help="for all parts together (default: 9)")
    parser.add_argument("--only", nargs="+", default=[], help="parts whose name contains one of these")
    parser.add_argument(
        "--dry-run", action="store_true", help="each part in its smallest form on the CPU, those that need a GPU named"
    )
    return parser


def installed(module: str) -> bool:
    """Return whether a module can be found; it is not imported."""
    return importlib.util.find_spec(module) is not None


def missing(for_gpu: bool) -> list[str]:
    """Return what is missing without which no part can run, on a GPU or on the CPU."""
    found = [f"{name} is not installed" for name in NEEDED if not installed(name)]
    if found or not for_gpu:
        return found
    import torch

    from lion.cuda_kernels import launch, simulator

    if not torch.cuda.is_available():
        found.append("torch finds no GPU")
    if simulator.asked_for():
        found.append(f"a GPU does nothing where {simulator.VARIABLE}=1 is in the environment")
    try:
        launch.require()
    except (ImportError, RuntimeError) as error:
        found.append(str(error))
    return found


def run(part: Part, dry_run: bool, seconds_left: float, out: Path) -> Outcome:
    """Run a part, or say why not.

    Args:
        part: The part.
        dry_run: Whether to run its smallest form, on the CPU.
        seconds_left: Until all parts have to have ended.
        out: Where the logs are.

    Returns:
        Its name, ``outcome`` ("passed", "failed", "out of time" or "skipped"), ``found`` in a few words, and of a part
        that ran ``seconds``, ``returncode`` and ``result``: what is in its JSON file.
    """
    command = part.dry_run if dry_run else part.command
    absent = [name for name in part.modules if not installed(name)]
    if command is None:
        return {"name": part.name, "outcome": "skipped", "found": "needs a GPU"}
    if absent:
        return {"name": part.name, "outcome": "skipped", "found": f"not installed: {', '.join(absent)}"}
    limit = min(part.seconds, seconds_left - GRACE)
    if limit <= 0:
        return {"name": part.name, "outcome": "skipped", "found": "no time left"}
    with tempfile.TemporaryDirectory() as name:
        folder, began = Path(name), time.monotonic()
        code = _finished([argument.replace("{folder}", name) for argument in command], folder, limit)
        seconds = round(time.monotonic() - began, 1)
        printed = (folder / "stdout").read_text(errors="replace")
        errors = (folder / "stderr").read_text(errors="replace")
        result = None
        if part.result is not None:
            # A part that was interrupted may have left a piece of a file, or none.
            with contextlib.suppress(OSError, ValueError):
                result = json.loads((folder / part.result).read_text())
    with (out / ("log.txt" if part.result else "tests.txt")).open("a", encoding="utf-8") as log:
        log.write(f"===== {part.name}: exit code {code}, {seconds} s\n{printed[-LOG_BYTES:]}{errors[-LOG_BYTES:]}\n")
    outcome = "out of time" if code is None else "failed" if code or (part.result and result is None) else "passed"
    found = _in_words(result) if result is not None else _tests_in_words(printed) if part.result is None else ""
    if outcome == "failed" and (part.result is None or result is None):
        found = found or _last_line(errors) or _last_line(printed)
    return {
        "name": part.name,
        "outcome": outcome,
        "found": found,
        "seconds": seconds,
        "returncode": code,
        "result": result,
    }


def _finished(arguments: list[str], folder: Path, limit: float) -> int | None:
    """Run Python and return its exit code, None where it took longer than the limit in seconds."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    with (folder / "stdout").open("wb") as stdout, (folder / "stderr").open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
        )
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
            return None
        finally:
            # Whatever it has started, too.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _in_words(result: dict[str, Any]) -> str:
    """Return what is in a part's JSON in a few words."""
    if "difference" in result:
        return result["difference"] or f"{sum(r['values'] for r in result['results']):,} values are the reference's"
    if "settings" in result:
        return f"{len(result['runs'])} trainings"
    if "runs" in result:
        skipped = f"; not measured: {', '.join(result['skipped'])}" if result["skipped"] else ""
        return f"{sum(len(run['rows']) for run in result['runs'])} timings{skipped}"
    if "rows" in result:
        return f"{len(result['rows'])} timings"
    return str(result["machine"])


def _tests_in_words(printed: str) -> str:
    """Return pytest's last line, or if it did not come to it how many tests had which outcome."""
    summary = re.findall(r"^=+ (.*\b(?:passed|failed|skipped|error|errors)\b.*) =+$", printed, re.MULTILINE)
    if summary:
        return summary[-1]
    counts: dict[str, int] = {}
    for line in printed.splitlines():
        word = re.search(r"\b(PASSED|FAILED|ERROR|SKIPPED)\b", line)
        if word and re.search(r"\[ *\d+%\]", line):
            counts[word[0].lower()] = counts.get(word[0].lower(), 0) + 1
    return ", ".join(f"{count} {word}" for word, count in counts.items())


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def _write(path: Path, report: dict[str, Any]) -> None:
    """Write JSON so that a reader never finds half of it."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(new, path)


if __name__ == "__main__":
    sys.exit(main())

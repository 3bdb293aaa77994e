"""Train a model with several optimizers and compare loss, memory and speed.

Each contestant's learning rate is searched for first, with the same effort for all: short trainings with four rates,
and more at an end of the row while the best is there. Then all train with their best rate, once for each seed, with the
same initial weights and batches for all contestants of a seed. Last, memory and speed are measured in short trainings,
in turns. Each training is a process, and each result is stored at once in training.json: begun again, the command goes
on where it was stopped.

Tables show means and standard deviations of the seeds, and how the losses of two contestants differ on the same seeds:
the mean difference with its 95% confidence interval, and the p value of a paired t-test.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.machine import ROOT, machine
from benchmarks.training import report
from benchmarks.training.contestants import BY_NAME, Contestant, installed
from benchmarks.training.store import Store
from benchmarks.training.tasks import SIZES, Task, found_task
from benchmarks.training.worker import KINDS, Job
from lion._cli import UsageError, at_least, checked_device

EXAMPLES = """\
python -m benchmarks.training tiny
python -m benchmarks.training small --seeds 5 --out small
python -m benchmarks.training my_module:my_task --batch-sizes 32 --steps 500 --search-steps 100"""

# Of the usual rate, and how often the row may grow by one.
RATES = (0.25, 0.5, 1.0, 2.0)
GROWTH = 2
SEARCH_SEED = 1000
MEMORY_STEPS, TIMED_STEPS, REPETITIONS = 3, 12, 3
LARGER_BATCH = ("AdamW", "Lion8bit")
# What the tables and the pictures are made with.
NEEDED = ("matplotlib", "scipy")


def main() -> int:
    """Do what is not done yet, print tables and draw pictures.

    Returns:
        The exit code: 0, 2 for a mistake of the user, 130 after Ctrl-C.
    """
    parser = _parser()
    options = parser.parse_args()
    try:
        missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
        if missing:
            raise UsageError(f"{' and '.join(missing)} cannot be found: pip install {' '.join(missing)}")
        store = Store(options.out / "training.json")
        if not options.report:
            run(options, store)
        elif not store.path.exists():
            raise UsageError(f"Invalid --out: {options.out}; there is no {store.path.name} in it")
    except UsageError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted; begun again, it goes on", file=sys.stderr)
        return 130
    console = Console() if sys.stdout.isatty() else Console(width=120)
    report.show(store, console)
    for picture in report.draw(store, options.out):
        console.print(f"wrote {picture}", highlight=False, soft_wrap=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training",
        description=(__doc__ or "").strip(),
        epilog=f"Examples:\n{EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("task", help=f"{', '.join(SIZES)}, or module:function for a function that returns a Task")
    parser.add_argument("--data", type=Path, help="text for a byte model (default: the standard library's sources)")
    parser.add_argument("--contestants", nargs="+", choices=BY_NAME, metavar="NAME", help="(default: all installed)")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each contestant (default: 3)")
    parser.add_argument("--steps", type=int, help="of a training (default: by size)")
    parser.add_argument("--search-steps", type=int, help="of a training in the search (default: by size)")
    parser.add_argument("--batch-sizes", nargs="+", type=int, help="the smallest is the usual one (default: by size)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="what to do (default: all)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--threads", type=int, default=1, help="on a CPU; sums depend on it (default: 1)")
    parser.add_argument("--out", type=Path, default=Path("build/training"), help="folder (default: build/training)")
    parser.add_argument("--report", action="store_true", help="only show what is stored")
    return parser


def run(options: argparse.Namespace, store: Store) -> None:
    """Do the jobs that are not stored yet.

    Args:
        options: The command's.
        store: Where results are kept.

    Raises:
        UsageError: If there is no such task, an option is wrong, or what is stored was made with other settings.
    """
    size, task = SIZES.get(options.task), found_task(options.task, options.data)
    if size is None and None in (options.steps, options.search_steps, options.batch_sizes):
        raise UsageError(f"--steps, --search-steps and --batch-sizes are needed for {options.task}")
    steps = size.steps if size and options.steps is None else options.steps
    search_steps = size.search_steps if size and options.search_steps is None else options.search_steps
    batch_sizes = sorted(set(size.batch_sizes if size and options.batch_sizes is None else options.batch_sizes))
    numbers = (("--seeds", options.seeds), ("--steps", steps), ("--search-steps", search_steps))
    for name, number in (*numbers, ("--batch-sizes", batch_sizes[0]), ("--threads", options.threads)):
        at_least(name, number, 1)
    device = checked_device(options.device)
    contestants = [BY_NAME[name] for name in options.contestants] if options.contestants else installed()
    settings = {"task": options.task, "data": _called(options.data), "steps": steps, "search_steps": search_steps}
    store.begin(settings, {**machine(device), "threads": options.threads}, batch_sizes[0])

    for batch_size in batch_sizes:
        # A larger batch is for two of them, in half as many steps.
        is_usual = batch_size == batch_sizes[0]
        some = contestants if is_usual else [c for c in contestants if c.name in LARGER_BATCH]
        factor = 1 if is_usual else 2
        if "search" in options.kinds:
            for contestant in dict.fromkeys(BY_NAME[c.searched_as or c.name] for c in some):
                few = max(1, search_steps // factor)
                job = Job("search", options.task, contestant.name, 0.0, SEARCH_SEED, batch_size, few)
                _search(contestant, task, job, options, store)
        jobs = [
            Job("training", options.task, contestant.name, lr, seed, batch_size, max(1, steps // factor))
            for seed in range(options.seeds)
            for contestant in some
            if (lr := store.rate(contestant, batch_size)) is not None
        ]
        for job in jobs:
            if "training" in options.kinds:
                _do(job, options, store)
    for kind, count in (("memory", MEMORY_STEPS), ("time", TIMED_STEPS)):
        for repetition in range(REPETITIONS if kind == "time" else 1):
            for contestant in contestants if kind in options.kinds else ():
                lr = store.rate(contestant, batch_sizes[0]) or task.rate * contestant.rate
                _do(Job(kind, options.task, contestant.name, lr, repetition, batch_sizes[0], count), options, store)


def _called(data: Path | None) -> str | None:
    """Return what to call a text: its name, and a part of its digest, so that another text is told from it."""
    if data is None:
        return None
    return f"{data.name}, SHA-256 {hashlib.sha256(data.read_bytes()).hexdigest()[:16]}"


def _search(contestant: Contestant, task: Task, job: Job, options: argparse.Namespace, store: Store) -> None:
    """Try the rates of a contestant, and more while the best is at an end of the row."""
    usual = task.rate * contestant.rate
    factors = list(RATES)
    for _ in range(GROWTH + 1):
        losses = {}
        for factor in factors:
            result = _do(job._replace(lr=usual * factor), options, store)
            losses[factor] = math.inf if result is None or result["loss"] is None else result["loss"]
        best = min(factors, key=lambda factor: losses[factor])
        if best == factors[0]:
            factors.insert(0, best / 2)
        elif best == factors[-1]:
            factors.append(best * 2)
        else:
            return


def _do(job: Job, options: argparse.Namespace, store: Store) -> dict[str, Any] | None:
    """Return the stored result of a job, after doing it if there is none; None if it failed, or one like it."""
    known = store.result(job)
    if known is not None or store.has_failed(job):
        return known
    print(f"{job.kind} of {job.contestant}, rate {job.lr:.3g}, seed {job.seed}, batch {job.batch_size}", flush=True)
    result = _in_process(job, options)
    if isinstance(result, str):
        print(f"  skipped: {result}")
        store.skip(job, result)
        return None
    store.add(job, result)
    return result


def _in_process(job: Job, options: argparse.Namespace) -> dict[str, Any] | str:
    """Do a job in a process of its own; return its result, or why it failed."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    if job.kind == "memory":
        # What is freed goes back to the system, so that the process is as large as what it holds.
        environment["MALLOC_MMAP_THRESHOLD_"] = environment["MALLOC_TRIM_THRESHOLD_"] = "65536"
    told = {"job": job._asdict(), "data": options.data and str(options.data.resolve()), "device": options.device}
    command = [sys.executable, "-m", "benchmarks.training.worker", json.dumps({**told, "threads": options.threads})]
    last = ""
    with tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
            for last in process.stdout or ():
                if not last.startswith("{"):
                    print(f"  {last}", end="", flush=True)
        errors.seek(0)
        lines = errors.read().strip().splitlines()
    if process.returncode < 0:
        return f"ended by {signal.Signals(-process.returncode).name}"
    if process.returncode:
        return lines[-1] if lines else f"exit code {process.returncode}"
    result: dict[str, Any] = json.loads(last)
    return result


if __name__ == "__main__":
    sys.exit(main())

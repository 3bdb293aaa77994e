"""Side by side with the other implementations of Lion.

Ours, every peer that is installed, and the bound that memory sets, in turns on the same tensors; prints tables and
writes benchmark.json and benchmark.png.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import nn

from benchmarks.machine import machine
from benchmarks.peers import BETAS, LR, WEIGHT_DECAY, peers
from benchmarks.remote import Remote
from lion import Lion, Lion8bit
from lion._cli import measure
from lion._cli.check import WAYS_OF_KEEPING
from lion._cli.measure import WORKLOADS, Workload

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Make = Callable[[list[nn.Parameter]], Any]
OURS: dict[str, Make] = {
    "numba-lion Lion": partial(Lion, lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY),
    "numba-lion Lion8bit": partial(Lion8bit, lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY, min_8bit_size=0),
}
BOUNDS = {"bound, 32-bit state": 4, "bound, 8-bit state": 1}
# How the contestants' steps compare: 8-bit states with 8-bit states, the rest with 32-bit Lion.
EIGHT_BIT = ("Lion8bit", "AdamW8bit", "FlashLion", "8-bit")


def main() -> int:
    """Measure, print and write."""
    options = _parser().parse_args()
    device = torch.device(options.device)
    console = Console(width=120) if not sys.stdout.isatty() else Console()
    remote = Remote(options.fork_python) if options.fork_python else None
    options.out.mkdir(parents=True, exist_ok=True)
    runs: list[dict[str, Any]] = []
    skipped: dict[str, str] = {}
    try:
        with Progress(console=console, transient=True) as progress:
            for workload in _workloads(options):
                for dtype in options.dtypes:
                    runs += _measure(workload, dtype, device, options, remote, skipped, progress)
                    settings = {"rounds": options.rounds, "cold": options.cold}
                    report = {**machine(device), **settings, "skipped": skipped, "runs": runs}
                    (options.out / "benchmark.json").write_text(json.dumps(report, indent=1) + "\n")
    finally:
        if remote is not None:
            remote.close()
    for result in runs:
        console.print(_table(result))
    for name, reason in skipped.items():
        console.print(f"not measured: {name}: {reason}", markup=False)
    if options.picture:
        _draw(report, options.out / "benchmark.png")
    console.print(f"wrote {options.out / 'benchmark.json'}{' and benchmark.png' * options.picture}", markup=False)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").strip())
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS), help="(default: all)")
    parser.add_argument("--sizes", nargs="+", type=float, help="single tensors of so many elements instead")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2], help="on a CPU (default: 1 2)")
    parser.add_argument("--rounds", type=int, default=11, help="timed steps of each contestant (default: 11)")
    parser.add_argument("--cold", action="store_true", help="each step after other work has used the caches")
    parser.add_argument("--only", nargs="+", default=[], help="contestants whose name contains one of these")
    parser.add_argument("--fork-python", help="Python of an environment that holds bitsandbytes-cpu-fork")
    parser.add_argument("--no-picture", dest="picture", action="store_false", help="as without matplotlib")
    parser.add_argument("--out", type=Path, default=Path("build/benchmark"), help="folder to write to")
    return parser


def _workloads(options: argparse.Namespace) -> list[Workload]:
    if options.sizes:
        return [Workload(f"one tensor of {int(size):,} elements", [(int(size),)]) for size in options.sizes]
    return [WORKLOADS[name] for name in options.workloads]


def _measure(
    workload: Workload,
    dtype: str,
    device: torch.device,
    options: argparse.Namespace,
    remote: Remote | None,
    skipped: dict[str, str],
    progress: Progress,
) -> list[dict[str, Any]]:
    """Return one result per number of threads; on a GPU one, with 0 threads."""
    params = measure.make_params(workload, DTYPES[dtype], device)
    makers: dict[str, Make] = {**_ours(dtype), **peers()}
    steps = {name: measure.bound(params, itemsize) for name, itemsize in BOUNDS.items()}
    sizes: dict[str, dict[str, float]] = {}
    task = progress.add_task(f"{workload.title}, {dtype}: first steps", total=None)
    for name, make in makers.items():
        if options.only and not any(part in name for part in (*options.only, "numba-lion")):
            continue
        try:
            optimizer = make(params)
            optimizer.step()
        except Exception as error:  # a peer may be missing, or fail in its own ways
            skipped[f"{name}, {workload.title}, {dtype}"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            continue
        steps[name] = optimizer.step
        extra = measure.peak_extra_bytes(optimizer.step, device)
        sizes[name] = {"state": measure.state_bytes(optimizer.state) / workload.elements}
        if extra is not None:
            sizes[name]["peak_extra"] = extra / workload.elements
    before = measure.other_work(device) if options.cold else lambda: None
    timers = {name: measure.timer(step, device, before) for name, step in steps.items()}
    if remote is not None:
        remote.ask(do="make", dtype=dtype, shapes=workload.shapes)
        timers.update({name: partial(remote.ask, do="step", name=name) for name in remote.ask(do="names")})
    results = []
    for threads in options.threads if device.type == "cpu" else [0]:
        if threads:
            torch.set_num_threads(threads)
        for name in timers:
            if name in steps:
                steps[name]()
            elif remote is not None:
                remote.ask(do="first", name=name, threads=threads)
        description = _title(workload.title, dtype, threads)
        progress.update(task, description=description, total=options.rounds * len(timers), completed=0)
        times = measure.in_turns(timers, options.rounds, partial(progress.advance, task))
        results.append(_result(workload, dtype, threads, times, sizes))
    progress.remove_task(task)
    del params, steps, timers
    gc.collect()
    return results


def _ours(dtype: str) -> dict[str, Make]:
    """Return ours, for bfloat16 with the ways of keeping weights; the bounds leave out what master bits move."""
    kept: dict[str, Make] = {
        f"{name}, {title}": partial(make, **options)
        for name, make in OURS.items()
        for title, options in WAYS_OF_KEEPING.items()
    }
    return {**OURS, **(kept if dtype == "bfloat16" else {})}


def _result(
    workload: Workload, dtype: str, threads: int, times: dict[str, list[float]], sizes: dict[str, dict[str, float]]
) -> dict[str, Any]:
    rows = {}
    summaries = {name: measure.summary(seconds) for name, seconds in times.items()}
    for name, s in summaries.items():
        eight = any(part in name for part in EIGHT_BIT)
        bound = summaries["bound, 8-bit state" if eight else "bound, 32-bit state"]
        ours = summaries["numba-lion Lion8bit" if eight else "numba-lion Lion"]
        rows[name] = {
            "nanoseconds_per_parameter": {k: v / workload.elements * 1e9 for k, v in s._asdict().items()},
            "share_of_bound": bound.median / s.median,
            "times_ours": s.median / ours.median,
            **{f"{key}_bytes_per_parameter": value for key, value in sizes.get(name, {}).items()},
        }
    return {"workload": workload.title, "elements": workload.elements, "dtype": dtype, "threads": threads, "rows": rows}


def _title(workload: str, dtype: str, threads: int) -> str:
    return f"{workload}, {dtype}" + (f", {threads} thread{'s' * (threads > 1)}" if threads else "")


def _table(result: dict[str, Any]) -> Table:
    table = Table(title=_title(result["workload"], result["dtype"], result["threads"]))
    table.add_column("")
    for heading in ("ns/parameter", "quartiles", "ms/step", "of bound", "ours is faster", "state B", "extra B"):
        table.add_column(heading, justify="right")
    for name, row in result["rows"].items():
        ns = row["nanoseconds_per_parameter"]
        table.add_row(
            name,
            f"{ns['median']:.2f}",
            f"{ns['low']:.2f} – {ns['high']:.2f}",
            f"{ns['median'] * result['elements'] / 1e6:.2f}",
            f"{row['share_of_bound']:.0%}",
            f"{row['times_ours']:.1f}×",
            *(
                f"{row[key]:.2f}" if key in row else ""
                for key in ("state_bytes_per_parameter", "peak_extra_bytes_per_parameter")
            ),
        )
    return table


def _draw(report: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    runs = report["runs"]
    figure, axes = plt.subplots(len(runs), 1, figsize=(9, 3.2 * len(runs)), squeeze=False, layout="constrained")
    for axis, result in zip(axes[:, 0], runs, strict=True):
        rows = sorted(result["rows"].items(), key=lambda row: row[1]["nanoseconds_per_parameter"]["median"])
        names = [name for name, _ in rows]
        medians = [row["nanoseconds_per_parameter"]["median"] for _, row in rows]
        ours = {"numba-lion": "tab:orange", "bound": "0.6"}
        colors = [next((c for k, c in ours.items() if name.startswith(k)), "tab:blue") for name in names]
        axis.barh(names, medians, color=colors)
        axis.bar_label(axis.containers[0], fmt="%.2f", padding=3, fontsize=8)
        axis.set_xscale("log")
        axis.invert_yaxis()
        axis.margins(x=0.1)
        axis.set_xlabel("ns per parameter and step (log scale)")
        axis.set_title(_title(result["workload"], result["dtype"], result["threads"]))
    figure.suptitle(f"{report['machine']}, {report['date']}")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())

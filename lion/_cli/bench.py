"""Time optimizer steps against other implementations and against what the memory could do.

Our optimizers, those other implementations of Lion that are installed, and torch's fused AdamW take steps in turns,
and again each after other work has used the caches, as backward passes do in training.

"× ours" is the time over that of the optimizer here that keeps as many bits; "ns per param" a step's median time,
"cold" the same after other work. "of bound" is how near ours come to a loop, on a GPU a copy, that moves the bytes of a
Lion step and does nothing else. "state" and "extra" are bytes per parameter: of optimizer state, and of what memory
grows by in the middle of a step.
"""

from __future__ import annotations

import argparse
import importlib
from typing import Any, NamedTuple

import torch
from rich.progress import Progress
from torch.optim import Optimizer

from lion._cli import (
    add_device,
    add_json,
    at_least,
    checked_device,
    checked_names,
    device_name,
    measure,
    print_json,
    print_line,
    print_table,
    progress_bars,
)
from lion._cli.measure import WORKLOADS, Summary
from lion.cpu_kernels.quantization import LOOKUPS

EXAMPLES = """\
python -m lion bench
python -m lion bench --threads 1 --workloads gpt2 --dtypes float32
python -m lion bench --rounds 50 --json > bench.json"""

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


# Times whose quartiles are farther apart than this share of the median say more of the machine than of the step.
MAX_SPREAD = 0.25


DISTURBED = (
    f"! disturbed: quartiles more than {MAX_SPREAD:.0%} of the median apart (--details), or faster than the bound; "
    "time again on a machine that does nothing else"
)


class Contestant(NamedTuple):
    """An optimizer to time.

    Attributes:
        name: What to call it.
        module: Where its class is.
        cls: Name of the class.
        ours: Which of ours it is measured against.
        arguments: Arguments besides the parameters.
    """

    name: str
    module: str
    cls: str
    ours: str
    arguments: dict[str, Any]

    def make(self, params: list[Any]) -> Optimizer:
        """Return the optimizer; ImportError if it is not installed."""
        optimizer: Optimizer = getattr(importlib.import_module(self.module), self.cls)(params, **self.arguments)
        return optimizer


_LION = {"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0.1}
STATE_ITEMSIZE = {"Lion": 4, "Lion8bit": 1}
CONTESTANTS = (
    Contestant("Lion", "lion", "Lion", "Lion", _LION),
    Contestant("Lion8bit", "lion", "Lion8bit", "Lion8bit", {**_LION, "min_8bit_size": 0}),
    Contestant("torch AdamW", "torch.optim", "AdamW", "Lion", {"lr": 1e-4, "weight_decay": 0.1, "fused": True}),
    Contestant("bitsandbytes Lion", "bitsandbytes.optim", "Lion", "Lion", _LION),
    Contestant("bitsandbytes Lion8bit", "bitsandbytes.optim", "Lion8bit", "Lion8bit", {**_LION, "min_8bit_size": 0}),
    Contestant("lion-pytorch", "lion_pytorch", "Lion", "Lion", _LION),
    Contestant("torch-optimi Lion", "optimi", "Lion", "Lion", _LION),
    Contestant("pytorch-optimizer Lion", "pytorch_optimizer", "Lion", "Lion", _LION),
    Contestant("timm Lion", "timm.optim", "Lion", "Lion", _LION),
    Contestant("torchao AdamW8bit", "torchao.optim", "AdamW8bit", "Lion8bit", {"lr": 1e-4, "weight_decay": 0.1}),
)


class Row(NamedTuple):
    """What was measured of one contestant.

    Attributes:
        name: Name of the contestant.
        ns_per_parameter: Median and quartiles, in turns: the others have left the same parameters in the caches.
        cold_ns_per_parameter: The same after other work has used the caches.
        share_of_bound: Time of the bound over that of the contestant; of ours only, for others move other bytes.
        times_ours: Its time over that of ours; None for ours.
        state_bytes_per_parameter: Optimizer state.
        extra_bytes_per_parameter: What memory grows by in the middle of a step; None where that cannot be seen.
        disturbed: Whether other work on the machine shows in its times: their quartiles, or those of its bound, are far
            apart, or it was faster than its bound.
    """

    name: str
    ns_per_parameter: Summary
    cold_ns_per_parameter: Summary
    share_of_bound: float | None
    times_ours: float | None
    state_bytes_per_parameter: float
    extra_bytes_per_parameter: float | None
    disturbed: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    add_device(parser)
    parser.add_argument("--threads", type=int, help="threads on a CPU (default: as torch has it)")
    parser.add_argument("--rounds", type=int, default=15, help="timed steps of each optimizer (default: 15)")
    parser.add_argument(
        "--dtypes", default="float32,bfloat16", help=f"of {', '.join(DTYPES)} (default: float32,bfloat16)"
    )
    parser.add_argument(
        "--workloads",
        default="one,many",
        help="; ".join(f"{name}: {workload.title}" for name, workload in WORKLOADS.items()) + " (default: one,many)",
    )
    parser.add_argument("--details", action="store_true", help="print the quartiles of the times, too")
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Carry the command out and return its exit code."""
    at_least("--rounds", options.rounds, 1)
    device = checked_device(options.device)
    dtypes = checked_names("--dtypes", options.dtypes, DTYPES)
    workloads = checked_names("--workloads", options.workloads, WORKLOADS)
    if options.threads is not None:
        at_least("--threads", options.threads, 1)
        torch.set_num_threads(options.threads)

    results: list[tuple[str, str, list[Row]]] = []
    with progress_bars() as progress:
        for workload in workloads:
            for dtype in dtypes:
                bar = progress.add_task(f"{WORKLOADS[workload].title}, {dtype}", total=None)
                rows = measured(workload, DTYPES[dtype], device, options.rounds, progress, bar)
                results.append((workload, dtype, rows))
                progress.remove_task(bar)

    threads = torch.get_num_threads()
    where = f"{threads} thread{'s' * (threads > 1)}, 8-bit states by {LOOKUPS}"
    if device.type != "cpu":
        where = device_name(device)
    if options.json:
        report = [{"workload": w, "dtype": d, "rows": [_as_dict(row) for row in rows]} for w, d, rows in results]
        print_json({"device": str(device), "where": where, "results": report})
    else:
        print_line(where)
        for workload, dtype, rows in results:
            print_line(f"\n{WORKLOADS[workload].title}, {dtype}", "bold")
            _print_table(rows, options.details)
        if any(row.disturbed for _, _, rows in results for row in rows):
            print_line(f"\n{DISTURBED}")
    return 0


def measured(
    workload: str, dtype: torch.dtype, device: torch.device, rounds: int, progress: Progress, bar: Any
) -> list[Row]:
    """Time all contestants that are installed, and the bounds, in turns.

    Args:
        workload: Key of ``WORKLOADS``.
        dtype: dtype of parameters and gradients.
        device: Where.
        rounds: Timed steps of each.
        progress: Where to show it.
        bar: The bar of this measurement.

    Returns:
        A row for each contestant.
    """
    elements = WORKLOADS[workload].elements
    params = measure.make_params(WORKLOADS[workload], dtype, device)
    steps: dict[str, measure.Step] = {}
    states: dict[str, float] = {}
    extra: dict[str, int | None] = {}
    for contestant in CONTESTANTS:
        try:
            optimizer = contestant.make(params)
        except ImportError:
            continue
        optimizer.step()
        states[contestant.name] = measure.state_bytes(optimizer.state) / elements
        extra[contestant.name] = measure.peak_extra_bytes(optimizer.step, device)
        steps[contestant.name] = optimizer.step
    bounds = {name: f"bound of {name}" for name in STATE_ITEMSIZE}
    for name, itemsize in STATE_ITEMSIZE.items():
        steps[bounds[name]] = measure.bound(params, itemsize)
        steps[bounds[name]]()
    timers = {name: measure.timer(step, device) for name, step in steps.items()}
    other_work = measure.other_work(device)
    cold_timers = {_cold(name): measure.timer(steps[name], device, before=other_work) for name in states}
    progress.update(bar, total=rounds * (len(timers) + len(cold_timers)))
    # One after the other, for what is cold would leave cold caches to what comes next.
    times = measure.in_turns(timers, rounds, lambda: progress.advance(bar))
    times |= measure.in_turns(cold_timers, rounds, lambda: progress.advance(bar))

    summaries = {name: measure.summary(seconds) for name, seconds in times.items()}

    def per_parameter(timed: str) -> Summary:
        return Summary(*(1e9 * seconds / elements for seconds in summaries[timed]))

    rows = []
    for contestant in (c for c in CONTESTANTS if c.name in states):
        name, ours, more = contestant.name, contestant.ours, extra[contestant.name]
        median = summaries[name].median
        share = summaries[bounds[name]].median / median if name == ours else None
        seen = [name, _cold(name), *([] if share is None else [bounds[name]])]
        rows.append(
            Row(
                name,
                per_parameter(name),
                per_parameter(_cold(name)),
                share,
                median / summaries[ours].median if name != ours else None,
                states[name],
                None if more is None else more / elements,
                any(_is_spread(summaries[timed]) for timed in seen) or (share is not None and share > 1),
            )
        )
    return rows


def _cold(name: str) -> str:
    return f"{name} after other work"


def _as_dict(row: Row) -> dict[str, Any]:
    return {name: value._asdict() if isinstance(value, Summary) else value for name, value in row._asdict().items()}


def _is_spread(times: Summary) -> bool:
    return times.high - times.low > MAX_SPREAD * times.median


def _print_table(rows: list[Row], details: bool) -> None:
    no_mark = " " * any(row.disturbed for row in rows)
    print_table(
        ("optimizer", "×\nours", "ns per\nparam", "\ncold", "of\nbound", "state\nbytes", "extra\nbytes"),
        [
            (
                row.name,
                "" if row.times_ours is None else _figure(row.times_ours),
                _figure(row.ns_per_parameter.median) + ("!" if row.disturbed else no_mark),
                _figure(row.cold_ns_per_parameter.median),
                "" if row.share_of_bound is None else f"{row.share_of_bound:.0%}",
                _figure(row.state_bytes_per_parameter),
                "?" if row.extra_bytes_per_parameter is None else _figure(row.extra_bytes_per_parameter),
            )
            for row in rows
        ],
    )
    if details:
        print_line("")
        print_table(
            ("quartiles, ns per param", "", "cold"),
            [(row.name, _quartiles(row.ns_per_parameter), _quartiles(row.cold_ns_per_parameter)) for row in rows],
        )


def _quartiles(times: Summary) -> str:
    return f"{_figure(times.low)}–{_figure(times.high)}"


def _figure(value: float) -> str:
    """Return a number of at most five characters, as long as it is below 100,000."""
    return f"{value:.{3 if value < 9.9995 else 2 if value < 99.995 else 0}f}"

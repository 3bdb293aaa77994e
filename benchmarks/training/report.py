"""What the stored results say, as tables and as pictures."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from benchmarks import pictures
from benchmarks.training.contestants import BY_NAME, Contestant
from benchmarks.training.store import Store
from benchmarks.training.worker import KINDS, Job

# Whom the others are compared with, on the same seeds.
BASELINES = ("AdamW", "Lion8bit")
SIGNIFICANT = 0.05
MEBI = 1 << 20
TITLES = {
    **{name: f"{name}, float32" for name in ("AdamW", "Lion", "Lion8bit")},
    "flashoptim FlashLion, bf16": "flashoptim FlashLion, bf16 + 24 bits",
}
LINES = ("-", (0, (3, 1)))


class Difference(NamedTuple):
    """How the losses of two contestants differ on the same seeds.

    Attributes:
        mean: Mean difference; below 0 the first one is better.
        low: Lower end of the 95% confidence interval of the mean.
        high: Its upper end.
        p: Of a paired t-test; not corrected for the number of comparisons.
    """

    mean: float
    low: float
    high: float
    p: float

    @property
    def verdict(self) -> str:
        """What the seeds tell: "better", "worse", "same" to the last bit, or "not told apart"."""
        if self.mean == self.low == self.high == 0:
            return "same"
        if self.p >= SIGNIFICANT:
            return "not told apart"
        return "better" if self.mean < 0 else "worse"


class Row(NamedTuple):
    """A contestant's results with one batch size.

    Attributes:
        contestant: Who.
        rate: Its best learning rate, or None.
        losses: Held-out losses after training with that rate, by seed.
        diverged: Seeds whose training diverged; they are in nothing else.
        metrics: Figures of merit, by seed.
        curve: Pairs of step and mean held-out loss.
        memory: Bytes by what they are for, or None.
        step_seconds: Median of a step, or None.
        optimizer_seconds: The optimizer's part of it, or None.
        tokens_per_second: Or None.
    """

    contestant: Contestant
    rate: float | None
    losses: dict[int, float]
    diverged: list[int]
    metrics: dict[int, float]
    curve: list[tuple[int, float]]
    memory: dict[str, int] | None
    step_seconds: float | None
    optimizer_seconds: float | None
    tokens_per_second: float | None

    @property
    def title(self) -> str:
        """What to call the contestant."""
        return title(self.contestant)


def title(contestant: Contestant) -> str:
    """Return what to call a contestant: its name, with the dtype of its weights."""
    return TITLES.get(contestant.name, contestant.name)


def batch_sizes(store: Store) -> list[int]:
    """Return the batch sizes that there are results with, the usual one first."""
    return sorted({job.batch_size for kind in KINDS for job, _ in store.runs(kind)})


def rows(store: Store, batch_size: int) -> list[Row]:
    """Return the results with a batch size.

    Args:
        store: All results.
        batch_size: Examples in a batch.
    """
    found = []
    for contestant in BY_NAME.values():

        def results(kind: str, name: str = contestant.name) -> list[tuple[Job, dict[str, Any]]]:
            runs = store.runs(kind)
            return [(job, result) for job, result in runs if (job.contestant, job.batch_size) == (name, batch_size)]

        # A search that went on afterwards may have found another rate: the seeds of one rate belong together.
        rate = store.rate(contestant, batch_size)
        runs = {job.seed: result for job, result in results("training") if job.lr == rate}
        trained = {seed: result for seed, result in runs.items() if result["loss"] is not None}
        timed, memory = [result for _, result in results("time")], [result for _, result in results("memory")]
        if not (runs or timed or memory):
            continue
        curves = [result["curve"] for result in trained.values()]
        median = {
            key: statistics.median(result[key] for result in timed) if timed and timed[0][key] is not None else None
            for key in ("step_seconds", "optimizer_seconds", "tokens_per_second")
        }
        found.append(
            Row(
                contestant,
                rate,
                {seed: result["loss"] for seed, result in trained.items()},
                sorted(runs.keys() - trained.keys()),
                {seed: result["metric"] for seed, result in trained.items() if result["metric"] is not None},
                [(points[0][0], statistics.fmean(loss for _, loss in points)) for points in zip(*curves, strict=True)],
                memory[-1] if memory else None,
                **median,
            )
        )
    return found


def difference(row: Row, baseline: Row) -> Difference | None:
    """Return how a contestant's loss differs from another's on the seeds of both; None for fewer than two seeds."""
    from scipy import stats

    seeds = sorted(row.losses.keys() & baseline.losses.keys())
    if len(seeds) < 2:
        return None
    ours, theirs = ([one.losses[seed] for seed in seeds] for one in (row, baseline))
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    if len(set(differences)) == 1:
        mean = differences[0]
        return Difference(mean, mean, mean, 0.0 if mean else 1.0)
    test = stats.ttest_rel(ours, theirs)
    interval = test.confidence_interval()
    return Difference(statistics.fmean(differences), interval.low, interval.high, test.pvalue)


def spread(values: dict[int, float], digits: int) -> str:
    """Return mean and standard deviation as text, with "±" for the latter."""
    if not values:
        return ""
    mean = f"{statistics.fmean(values.values()):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values.values()):.{digits}f}" if len(values) > 1 else mean


def results_table(found: list[Row]) -> tuple[list[str], list[list[str]]]:
    """Return headings and cells: loss, memory and speed of each contestant; columns without a figure are left out."""
    headings = ["", "rate", "held-out loss", "metric", "peak MiB", "state B", "tokens/s", "optimizer's share"]
    cells = []
    for row in found:
        memory, share = row.memory, None
        if row.optimizer_seconds is not None and row.step_seconds is not None:
            share = row.optimizer_seconds / row.step_seconds
        line = [
            row.title,
            "" if row.rate is None else f"{row.rate:.3g}",
            ", ".join(filter(None, [spread(row.losses, 4), row.diverged and f"{len(row.diverged)} diverged"])),
            spread(row.metrics, 4),
            "" if memory is None or memory["peak"] is None else f"{memory['peak'] / MEBI:.0f}",
            "" if memory is None else f"{memory['state'] / memory['parameters']:.2f}",
            "" if row.tokens_per_second is None else f"{row.tokens_per_second:,.0f}",
            "" if share is None else f"{share:.1%}",
        ]
        cells.append(line)
    known = [i for i in range(len(headings)) if i == 0 or any(line[i] for line in cells)]
    return [headings[i] for i in known], [[line[i] for i in known] for line in cells]


def differences_table(found: list[Row], baseline: Row) -> tuple[list[str], list[list[str]]]:
    """Return headings and cells: each contestant's loss less that of another."""
    cells = []
    for row in found:
        told = difference(row, baseline) if row is not baseline else None
        if told is not None:
            interval = f"{told.low:+.4f} to {told.high:+.4f}"
            cells.append([row.title, f"{told.mean:+.4f}", interval, f"{told.p:.2g}", told.verdict])
    return ["", "difference", "95% interval", "p", "verdict"], cells


def search_table(store: Store, batch_size: int) -> tuple[list[str], list[list[str]]]:
    """Return headings and cells: the held-out losses of the search, as pairs of rate and loss, the best one first.

    A best rate at an end of the row is marked: a better one may lie beyond.
    """
    cells = []
    for contestant in BY_NAME.values():
        tried = {
            job.lr: result["loss"]
            for job, result in store.runs("search")
            if (job.contestant, job.batch_size) == (contestant.name, batch_size)
        }
        if tried:
            best = store.rate(contestant, batch_size)
            texts = {lr: f"{lr:.3g}: {'diverged' if loss is None else f'{loss:.3f}'}" for lr, loss in tried.items()}
            others = [texts[lr] for lr in sorted(tried) if lr != best]
            mark = " (at the end)" if best in (min(tried), max(tried)) else ""
            cells.append([title(contestant), texts[best] + mark, ", ".join(others)])
    return ["", "best rate: loss", "others"], cells


def tables(store: Store) -> list[tuple[str, list[str], list[list[str]]]]:
    """Return all tables: title, headings, cells."""
    found = []
    for batch_size in batch_sizes(store):
        results, size = rows(store, batch_size), f"batch of {batch_size}"
        trained = [row for row in results if row.losses]
        found.append((f"Results, {size}", *results_table(results)))
        for baseline in (row for row in trained if row.contestant.name in BASELINES):
            heading = f"Held-out loss less that of {baseline.title}, {size}"
            found.append((heading, *differences_table(trained, baseline)))
        found.append((f"Search for the rate, {size}", *search_table(store, batch_size)))
    return [(name, headings, cells) for name, headings, cells in found if cells and len(headings) > 1]


def show(store: Store, console: Console) -> None:
    """Print the tables, and who could not take part."""
    for name, headings, cells in tables(store):
        table = Table(title=name, title_justify="left")
        for i, heading in enumerate(headings):
            table.add_column(heading, justify="right" if i else "left", overflow="fold")
        for line in cells:
            table.add_row(*line)
        console.print(table)
    for name, reason in store.skipped.items():
        console.print(f"not trained: {name}: {reason}", markup=False, highlight=False)


def draw(store: Store, folder: Path, prefix: str = "") -> list[Path]:
    """Draw the losses and the memory with the usual batch size.

    Args:
        store: All results.
        folder: Where loss.svg and memory.svg go.
        prefix: Of these names (default: none).

    Returns:
        The files that were written; none without results.
    """
    sizes = batch_sizes(store)
    found = [row for row in rows(store, sizes[0]) if row.curve or row.memory] if sizes else []
    written = []
    if any(row.curve for row in found):
        written.append(_draw_losses([row for row in found if row.curve], folder / f"{prefix}loss.svg"))
    if any(row.memory and row.memory["peak"] for row in found):
        written.append(_draw_memory(found, folder / f"{prefix}memory.svg"))
    return written


def _draw_losses(found: list[Row], path: Path) -> Path:
    """Draw the end of the losses: the beginning is the same for all and would hide what differs."""
    timed = all(row.step_seconds for row in found)
    count = 2 if timed else 1
    figure = pictures.figure(2.4 * count + 0.22 * len(found))
    axes = figure.subplots(count, 1, squeeze=False)[:, 0]
    for i, row in enumerate(found):
        steps, losses = zip(*row.curve[len(row.curve) // 3 :], strict=True)
        # Curves that lie on one another: the later ones are thinner, so that each stays visible.
        colors = len(pictures.COLORS)
        style: dict[str, Any] = {"color": pictures.COLORS[i % colors], "linestyle": LINES[i // colors]}
        style["linewidth"] = 4 - 3 * i / len(found)
        axes[0].plot(steps, losses, label=row.title, **style)
        if timed:
            axes[1].plot([step * (row.step_seconds or 0) for step in steps], losses, **style)
    axes[0].set(xlabel="step", title="held-out loss, mean of the seeds")
    if timed:
        axes[1].set(xlabel="seconds of training")
    for axis in axes:
        axis.grid(True)
    figure.legend(loc="outside lower left")
    ends = ", ".join(f"{row.title} {row.curve[-1][1]:.3f}" for row in found)
    pictures.save(figure, path, f"Held-out loss; at the end: {ends}")
    return path


def _draw_memory(found: list[Row], path: Path) -> Path:
    """Draw the peak of memory as bars made of weights, gradients, state and the rest."""
    measured = [(row, row.memory) for row in found if row.memory and row.memory["peak"]]
    figure = pictures.figure(1.2 + 0.5 * len(measured))
    axis = figure.subplots()
    parts = (("weights", pictures.QUIET), ("gradients", pictures.OTHERS), ("state", pictures.OURS), ("rest", "#cfcfcf"))
    for i, (_, memory) in enumerate(measured):
        sizes = {name: memory[name] for name in ("weights", "gradients", "state")}
        sizes["rest"] = max(0, memory["peak"] - sum(sizes.values()))
        left = 0.0
        for name, color in parts:
            width = sizes[name] / MEBI
            axis.barh(i, width, left=left, color=color, height=0.42, label=name if i == 0 else None)
            left += width
        axis.text(left, i, f" {memory['peak'] / MEBI:.0f}", va="center")
    axis.set_yticks(range(len(measured)), [""] * len(measured))
    for i, (row, _) in enumerate(measured):
        # Above its bar, where a phone has room for it.
        axis.text(0, i - 0.28, row.title, va="bottom")
    axis.set(xlabel="peak memory, MiB")
    axis.margins(x=0.12)
    axis.set_ylim(len(measured) - 0.6, -0.9)
    figure.legend(loc="outside lower left", ncols=2)
    peaks = ", ".join(f"{row.title} {memory['peak'] / MEBI:.0f}" for row, memory in measured)
    pictures.save(figure, path, f"Peak memory in MiB: {peaks}")
    return path

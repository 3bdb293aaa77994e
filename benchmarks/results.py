"""The stored results as Markdown tables and one picture: ``python -m benchmarks.results``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lion._cli.measure import WORKLOADS

ROOT = Path(__file__).resolve().parent.parent
FOLDER = Path(__file__).resolve().parent / "results"
PICTURE = ROOT / "docs" / "images" / "speed.png"
DTYPES = ("float32", "float16", "bfloat16")
OURS = ("Lion", "Lion8bit")
TITLES = {name: workload.title for name, workload in WORKLOADS.items()}
Rows = dict[str, dict[str, Any]]
Runs = dict[tuple[str, str, int], Rows]  # by workload, dtype and threads, 0 on a GPU


def cpu_runs(name: str) -> Runs:
    """Return what ``python -m benchmarks`` stored in a file."""
    runs = {}
    for run in json.loads((FOLDER / name).read_text())["runs"]:
        rows = {}
        for name, row in run["rows"].items():
            if not name.startswith("bound"):
                numbers = row["nanoseconds_per_parameter"]
                rows[name.removeprefix("numba-lion ")] = {
                    **numbers,
                    "share": row["share_of_bound"],
                    "times": row["times_ours"],
                    "state": row.get("state_bytes_per_parameter"),
                    "extra": row.get("peak_extra_bytes_per_parameter"),
                }
        runs[run["workload"], run["dtype"], run["threads"]] = rows
    return runs


def gpu_runs() -> Runs:
    """Return what ``python -m lion bench --json`` stored."""
    runs = {}
    for run in json.loads((FOLDER / "gpu-h100.json").read_text())["results"]:
        runs[TITLES[run["workload"]], run["dtype"], 0] = {
            row["name"]: {
                **row["ns_per_parameter"],
                "share": row["share_of_bound"],
                "times": row["times_ours"],
                "state": row["state_bytes_per_parameter"],
                "extra": row["extra_bytes_per_parameter"],
            }
            for row in run["rows"]
        }
    return runs


def print_tables(runs: Runs) -> None:
    """Print, for each workload, ours against the bound and the others against ours."""
    for workload in dict.fromkeys(key[0] for key in runs):
        keys = [key for key in runs if key[0] == workload]
        elements = next(w.elements for w in WORKLOADS.values() if w.title == workload)
        heads = [f"{dtype}, {threads}" if threads else dtype for _, dtype, threads in keys]
        print(f"### {workload}\n\n| ms per step; share of the bound | {' | '.join(heads)} | extra B |")
        print("| --- |" + " ---: |" * (len(keys) + 1))
        for name in OURS:
            rows = [runs[key][name] for key in keys]
            cells = [f"{row['median'] * elements / 1e6:.3g}; {row['share']:.0%}" for row in rows]
            print(f"| `{name}` | {' | '.join(cells)} | {rows[0]['extra']:.2f} |")
        print(f"\n| time, in ours | {' | '.join(heads)} | state B | extra B |")
        print("| --- |" + " ---: |" * (len(keys) + 2))
        for name in dict.fromkeys(name for key in keys for name in runs[key] if name not in OURS):
            found = [runs[key].get(name) for key in keys]
            cells = [f"{row['times']:.3g}" if row else "" for row in found]
            first = next(row for row in found if row)
            sizes = ["" if first[key] is None else f"{first[key]:.2f}" for key in ("state", "extra")]
            print(f"| {name} | {' | '.join(cells + sizes)} |")
        print()


def print_growth(runs: Runs) -> None:
    """Print how the cost of ours grows with the size of a single tensor."""
    threads = sorted({key[2] for key in runs})
    heads = [f"`{name}`, {count}" for name in OURS for count in threads]
    print(f"| float32, ms per step | {' | '.join(heads)} |\n| --- |" + " ---: |" * len(heads))
    for workload in dict.fromkeys(key[0] for key in runs):
        elements = int(workload.split()[3].replace(",", ""))
        found = [runs.get((workload, "float32", count), {}).get(name) for name in OURS for count in threads]
        cells = [f"{row['median'] * elements / 1e6:.3g}" if row else "" for row in found]
        print(f"| {elements:,} elements | {' | '.join(cells)} |")
    print()


def draw(cpu: Rows, gpu: Rows) -> None:
    """Draw the times of one large tensor, on a CPU and on a GPU."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for axis, rows, title in zip(axes, (cpu, gpu), ("AMD EPYC (Zen 4), 2 threads", "NVIDIA H100"), strict=True):
        names = sorted(rows, key=lambda name: rows[name]["median"])
        times = [rows[name]["median"] * WORKLOADS["one"].elements / 1e6 for name in names]
        colors = ["tab:orange" if name in OURS else "0.7" for name in names]
        bars = axis.barh([f"numba-lion {name}" if name in OURS else name for name in names], times, color=colors)
        axis.bar_label(bars, [f"{t:.3f}" if t < 1 else f"{t:.1f}" if t < 100 else f"{t:.0f}" for t in times], padding=3)
        axis.set(xscale="log", title=title, xlabel="milliseconds per step (log scale)")
        axis.set_xlim(times[0] / 3, times[-1] * 2.5)
        axis.minorticks_off()
        axis.invert_yaxis()
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle("One bfloat16 tensor of 16 million elements: shorter is faster")
    figure.savefig(PICTURE, dpi=110)


def main() -> None:
    cpu, gpu = cpu_runs("cpu-epyc-zen4.json"), gpu_runs()
    print("## CPU\n")
    print_tables(cpu)
    print_growth(cpu_runs("cpu-epyc-zen4-sizes.json"))
    print("## GPU\n")
    print_tables(gpu)
    draw(cpu[TITLES["one"], "bfloat16", 2], gpu[TITLES["one"], "bfloat16", 0])
    print(f"wrote {PICTURE}")


if __name__ == "__main__":
    main()

"""The stored results as Markdown tables and one picture: ``python -m benchmarks.results``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lion._cli.measure import WORKLOADS

ROOT = Path(__file__).resolve().parent.parent
FOLDER = Path(__file__).resolve().parent / "results"
PICTURE = ROOT / "docs" / "images" / "speed.svg"
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
        print(f"\n| × slower than numba-lion | {' | '.join(heads)} | state B | extra B |")
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


def draw(panels: dict[str, Rows]) -> str:
    """Return an SVG of how many times as long as ours others take, a group of bars per machine."""
    peers = {
        title: {name: row["times"] for name, row in rows.items() if name not in OURS} for title, rows in panels.items()
    }
    width = 360
    scale = (width - 70) / max(times for others in peers.values() for times in others.values())
    shapes = ['<text class="title" x="8" y="18">Time of a step: numba-lion is 1</text>']
    shapes.append('<text x="8" y="36">16 million bfloat16 elements; shorter is faster</text>')
    y = 40
    for title, others in peers.items():
        y += 26
        shapes.append(f'<text class="title" x="8" y="{y}">{title}</text>')
        bars = [("numba-lion", 1.0), *sorted(others.items(), key=lambda bar: bar[1])]
        for name, times in bars:
            y += 34
            length, kind = times * scale, ' class="ours"' if name == "numba-lion" else ""
            shapes.append(f'<text x="8" y="{y - 12}">{name}</text>')
            shapes.append(f'<rect{kind} x="8" y="{y - 7}" width="{length:.1f}" height="9" rx="1.5"/>')
            shapes.append(f'<text x="{length + 13:.1f}" y="{y + 2}">{times:.3g}×</text>')
        y += 14
    label = "; ".join(
        f"{title}: " + ", ".join(f"{name} {times:.2g}" for name, times in others.items())
        for title, others in peers.items()
    )
    # On the site the colours follow the theme; elsewhere, what the reader's system prefers.
    style = (
        ".speed{--ink:var(--color-foreground-primary,#1f2328);--ours:var(--color-brand-primary,#9a4a00)}"
        "@media(prefers-color-scheme:dark){.speed{--ink:var(--color-foreground-primary,#e6edf3);"
        "--ours:var(--color-brand-primary,#f0a35c)}}"
        ".speed text{fill:var(--ink);font:13px sans-serif}.speed .title{font-weight:600}"
        ".speed rect{fill:#8b949e}.speed .ours{fill:var(--ours)}"
    )
    head = f'<svg class="speed picture" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {y}" width="480"'
    return "\n".join([f'{head} role="img" aria-label="{label}">', f"<style>{style}</style>", *shapes, "</svg>", ""])


def main() -> None:
    cpu, gpu = cpu_runs("cpu-epyc-zen4.json"), gpu_runs()
    print("## CPU\n")
    print_tables(cpu)
    print_growth(cpu_runs("cpu-epyc-zen4-sizes.json"))
    print("## GPU\n")
    print_tables(gpu)
    one = TITLES["one"]
    panels = {"AMD EPYC (Zen 4), 2 threads": cpu[one, "bfloat16", 2], "NVIDIA H100": gpu[one, "bfloat16", 0]}
    PICTURE.write_text(draw(panels), encoding="utf-8")
    print(f"wrote {PICTURE}")


if __name__ == "__main__":
    main()

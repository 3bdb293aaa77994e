"""What the pages show of the stored results: ``python -m benchmarks.results`` writes it into them.

In a page, ``<!-- results: NAME -->`` begins a block and ``<!-- end -->`` ends it. The pictures are drawn, too.
"""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

from benchmarks.training import report
from benchmarks.training.store import Store
from lion._cli.check import WAYS_OF_KEEPING
from lion._cli.measure import WORKLOADS

ROOT = Path(__file__).resolve().parent.parent
FOLDER = Path(__file__).resolve().parent / "results"
PICTURE = ROOT / "docs" / "images" / "speed.svg"
DTYPES = ("float32", "float16", "bfloat16")
OURS = ("Lion", "Lion8bit")
PATHS = ("cpu-epyc-zen4-avx2.json", "cpu-epyc-zen4-avx512.json")
COLD = ("cpu-epyc-zen4-avx2-cold.json", "cpu-epyc-zen4-avx512-cold.json")
TRAININGS = ("training-tiny", "training-small", "finetuning")
# The contestants that README and the first page show.
FIRST = ("AdamW", "AdamW, bf16", "Lion8bit", "Lion8bit, bf16 + 24 bits")
# What the table of the first page shows: the name there, and those in the results of CPU and GPU.
SPEED = {
    "`Lion`": ("Lion",),
    "`Lion8bit`": ("Lion8bit",),
    "bitsandbytes `Lion`": ("bitsandbytes Lion",),
    "bitsandbytes `Lion8bit`": ("bitsandbytes Lion8bit",),
    "torch.compile of Lion": ("torch.compile Lion",),
    "torch `AdamW(fused=True)`": ("torch fused AdamW", "torch AdamW"),
}
BLOCK = re.compile(r"(<!-- results: (.*?) -->)\n.*?(<!-- end -->)", re.DOTALL)
TITLES = {name: workload.title for name, workload in WORKLOADS.items()}
Rows = dict[str, dict[str, Any]]
Runs = dict[tuple[str, str, int], Rows]  # by workload, dtype and threads, 0 on a GPU


def cpu_runs(name: str) -> Runs:
    """Return what ``python -m benchmarks`` stored in a file."""
    runs = {}
    for run in json.loads((FOLDER / name).read_text())["runs"]:
        rows = {}
        for name, row in run["rows"].items():
            # What other ways of keeping weights cost has a table of its own.
            if not name.startswith("bound") and not name.endswith(tuple(f", {way}" for way in WAYS_OF_KEEPING)):
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


def tables(runs: Runs) -> str:
    """Return, for each workload, ours against the bound and the others against ours."""
    text = []
    for workload in dict.fromkeys(key[0] for key in runs):
        keys = [key for key in runs if key[0] == workload]
        elements = next(w.elements for w in WORKLOADS.values() if w.title == workload)
        heads = [f"{dtype}, {threads}" if threads else dtype for _, dtype, threads in keys]
        ours, others = [], []
        for name in OURS:
            rows = [runs[key][name] for key in keys]
            cells = [f"{row['median'] * elements / 1e6:.3g}; {row['share']:.0%}" for row in rows]
            ours.append([f"`{name}`", *cells, f"{rows[0]['extra']:.2f}"])
        for name in dict.fromkeys(name for key in keys for name in runs[key] if name not in OURS):
            found = [runs[key].get(name) for key in keys]
            first = next(row for row in found if row)
            cells = [f"{row['times']:.3g}" if row else "" for row in found]
            sizes = ["" if first[key] is None else f"{first[key]:.2f}" for key in ("state", "extra")]
            others.append([name, *cells, *sizes])
        text.append(f"#### {workload}")
        text.append(markdown(["ms per step; share of the bound", *heads, "extra B"], ours))
        text.append(markdown(["× slower than numba-lion", *heads, "state B", "extra B"], others))
    return "\n\n".join(text)


def growth(runs: Runs) -> str:
    """Return how the cost of ours grows with the size of a single tensor."""
    threads = sorted({key[2] for key in runs})
    cells = []
    for workload in dict.fromkeys(key[0] for key in runs):
        elements = int(workload.split()[3].replace(",", ""))
        found = [runs.get((workload, "float32", count), {}).get(name) for name in OURS for count in threads]
        cells.append([f"{elements:,} elements", *(f"{r['median'] * elements / 1e6:.3g}" if r else "" for r in found)])
    return markdown(["float32, ms per step", *(f"`{name}`, {count}" for name in OURS for count in threads)], cells)


def paths() -> str:
    """Return what a parameter costs by the instructions of a processor, and with each way of keeping weights."""
    measurements = [json.loads((FOLDER / name).read_text()) for name in PATHS]
    names: dict[tuple[str, str], list[str]] = {}
    for measurement in measurements:
        for run in measurement["runs"]:
            for name, row in run["rows"].items():
                if not name.startswith("bound"):
                    cells = names.setdefault((run["dtype"], name.removeprefix("numba-lion ")), [])
                    cells.append(f"{row['nanoseconds_per_parameter']['median']:.2f}")
    cells = [[f"{dtype}: {name}", *numbers] for (dtype, name), numbers in names.items()]
    return markdown(["ns per parameter", *(measurement["lookups"] for measurement in measurements)], cells)


def small_models() -> str:
    """Return the milliseconds of a step over many tensors, after other work, by the instructions of a processor."""
    measurements = [json.loads((FOLDER / name).read_text()) for name in COLD]
    cells: dict[tuple[str, str], list[str]] = {}
    for measurement in measurements:
        for run in measurement["runs"]:
            for name in (*(f"numba-lion {ours}" for ours in OURS), "torch fused AdamW"):
                line = cells.setdefault((run["workload"], name), [])
                time = run["rows"][name]["nanoseconds_per_parameter"]["median"] * run["elements"] / 1e6
                line.append(f"{time:.2f}")
    dtypes = list(dict.fromkeys(run["dtype"] for run in measurements[0]["runs"]))
    headings = [f"{dtype}, {measurement['lookups']}" for measurement in measurements for dtype in dtypes]
    lines = [[f"{workload}: {name.removeprefix('numba-lion ')}", *times] for (workload, name), times in cells.items()]
    return markdown(["ms per step", *headings], lines)


def markdown(headings: list[str], cells: list[list[str]]) -> str:
    """Return a table, its columns of numbers to the right: all but the first, and what has commas between words."""
    words = [number == 0 or any(", " in line[number] for line in cells) for number in range(len(headings))]
    lines = [headings, ["---" if left else "---:" for left in words], *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def ways_of_keeping_weights() -> str:
    """Return how many times as long a step takes with each way of keeping bfloat16 weights, by a processor's paths."""
    cells = []
    for path in PATHS:
        stored = json.loads((FOLDER / path).read_text())
        rows = next(run["rows"] for run in stored["runs"] if run["dtype"] == "bfloat16")
        for name in OURS:
            nearest = rows[f"numba-lion {name}"]["nanoseconds_per_parameter"]["median"]
            times = [
                rows[f"numba-lion {name}, {way}"]["nanoseconds_per_parameter"]["median"] for way in WAYS_OF_KEEPING
            ]
            cells.append([f"`{name}`, {stored['lookups']}", *(f"{time / nearest:.2f}" for time in times)])
    return markdown(["times as long as rounding to nearest", *WAYS_OF_KEEPING], cells)


def speed() -> str:
    """Return the milliseconds of a step over one large tensor, on a CPU with two threads and on a GPU."""
    cpu, gpu = cpu_runs("cpu-epyc-zen4.json"), gpu_runs()
    columns = [(runs, dtype) for runs in (cpu, gpu) for dtype in ("float32", "bfloat16")]
    cells = []
    for title, names in SPEED.items():
        cells.append([title])
        for runs, dtype in columns:
            rows = runs[TITLES["one"], dtype, 2 if runs is cpu else 0]
            row = next((rows[name] for name in names if name in rows), None)
            cells[-1].append("" if row is None else milliseconds(row))
    return markdown(["ms per step", "CPU, float32", "CPU, bfloat16", "H100, float32", "H100, bfloat16"], cells)


def milliseconds(row: dict[str, Any]) -> str:
    """Return the median time of a step over one large tensor, as text."""
    time = row["median"] * WORKLOADS["one"].elements / 1e6
    return f"{time:.3f}" if time < 1 else f"{time:.1f}" if time < 100 else f"{time:.0f}"


def measured(name: str) -> str:
    """Return a sentence on where and when a file was measured."""
    report = json.loads((FOLDER / name).read_text())
    found = report["machines"] if "machines" in report else [report]
    days = sorted({machine["date"] for machine in found})
    commits = ", ".join(sorted({f"`{machine['commit']}`" for machine in found if machine.get("commit")}))
    versions = ", ".join(f"{key} {value}" for key, value in found[-1]["versions"].items() if key != "numba-lion")
    on = f"{found[-1]['machine']}, {found[-1]['processors']} processors"
    when = " to ".join(dict.fromkeys((days[0], days[-1])))
    return f"`{name}`: {on}; {when}{f'; commit {commits}' if commits else ''}; {versions}."


def trainings(name: str) -> dict[str, str]:
    """Return the blocks of a training's file: where, the tables, and the few rows that a reader sees first."""
    path = FOLDER / f"{name}.json"
    if not path.exists():
        return {}
    store = Store(path)
    found = {f"{name} where": measured(path.name)}
    found.update({f"{name}: {title}": markdown(headings, cells) for title, headings, cells in report.tables(store)})
    chosen = [row for row in report.rows(store, report.batch_sizes(store)[0]) if row.contestant.name in FIRST]
    headings, cells = report.results_table(chosen)
    wanted = [headings.index(name) for name in ("", "peak MiB", "state B", "held-out loss") if name in headings]
    found[f"{name} first"] = markdown([headings[i] for i in wanted], [[line[i] for i in wanted] for line in cells])
    return found


@functools.cache
def blocks() -> dict[str, str]:
    """Return what the pages show of the stored results, by the names in their comments."""
    found = {
        "cpu": tables(cpu_runs("cpu-epyc-zen4.json")),
        "cpu where": measured("cpu-epyc-zen4.json"),
        "sizes": growth(cpu_runs("cpu-epyc-zen4-sizes.json")),
        "gpu": tables(gpu_runs()),
        "speed": speed(),
    }
    if all((FOLDER / name).exists() for name in PATHS):
        found["paths"] = paths()
        found["ways of keeping weights"] = ways_of_keeping_weights()
        found["paths where"] = " ".join(measured(name) for name in PATHS)
    found["small models"] = small_models()
    found["small models where"] = " ".join(measured(name) for name in COLD)
    for name in TRAININGS:
        found.update(trainings(name))
    return found


def rewritten(text: str) -> str:
    """Return a page with its blocks as the stored results give them; KeyError for a block that there is none for."""
    known = blocks()
    return BLOCK.sub(lambda match: f"{match[1]}\n\n{known[match[2]]}\n\n{match[3]}", text)


def pages() -> list[Path]:
    """Return the pages that may have blocks."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def panels(cpu: Runs, gpu: Runs) -> dict[str, Rows]:
    """Return what the picture shows, by machine."""
    one = TITLES["one"]
    return {"AMD EPYC (Zen 4), 2 threads": cpu[one, "bfloat16", 2], "NVIDIA H100": gpu[one, "bfloat16", 0]}


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
    """Rewrite the pages and draw the pictures."""
    for page in pages():
        before = page.read_text(encoding="utf-8")
        after = rewritten(before)
        if after != before:
            page.write_text(after, encoding="utf-8")
            print(f"wrote {page}")
    picture = draw(panels(cpu_runs("cpu-epyc-zen4.json"), gpu_runs()))
    PICTURE.write_text(picture, encoding="utf-8")
    print(f"wrote {PICTURE}")
    for name in TRAININGS:
        if (FOLDER / f"{name}.json").exists():
            for picture in report.draw(Store(FOLDER / f"{name}.json"), PICTURE.parent, f"{name}-"):
                print(f"wrote {picture}")


if __name__ == "__main__":
    main()

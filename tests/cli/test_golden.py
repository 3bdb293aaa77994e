"""What every command prints, in terminals of three widths, beside what it printed when somebody last read it.

After a change, ``LION_GOLDEN=write pytest tests/cli/test_golden.py`` writes the texts again; read what git shows then.
The machine and its figures are made up.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lion.__main__ import main
from lion._cli import _SPELLED, bench, check, demo, overview
from lion._cli.bench import Row, Summary

GOLDEN = Path(__file__).parent / "golden"
WIDTHS = (60, 80, 120)
BENCH = ("bench", "--device", "cpu", "--workloads", "one,many", "--dtypes", "bfloat16")

Patch = Callable[[pytest.MonkeyPatch], None]


def machine(gpus: int, problem: str | None = None) -> Patch:
    """Return what makes the overview find a machine with as many GPUs, and a reason why nothing serves them."""
    folder = "/home/user/projects/language-models/venv/lib/python3.13/site-packages/lion"
    kernels = {"files": 18, "bytes": 3 << 20, "problem": None}
    devices = {"cpu": "Linux x86_64, 8 threads"}
    devices |= {f"cuda:{i}": "NVIDIA H100 80GB HBM3, compute capability 9.0, 79 GiB" for i in range(gpus)}
    found = {
        "versions": {
            **{"numba-lion": "0.1.0", "Python": "3.13.5", "torch": "2.13.0+cu130", "numba": "0.68.1"},
            **{"numba-cuda": "0.30.4" if gpus and not problem else None, "numpy": "2.4.6"},
        },
        "devices": devices if gpus else {**devices, "cuda": "torch finds no GPU"},
        "backends": {
            "cpu": {"name": "lion.cpu_kernels", "problem": None},
            "cuda": {"name": "lion.cuda_kernels" if gpus and not problem else None, "problem": problem},
        },
        "environment": {"LION_PAGE_DIR": "/scratch"} if gpus else {},
        "compiled_cpu_kernels": {"folder": f"{folder}/cpu_kernels/__pycache__", **kernels},
        "compiled_cuda_kernels": {"folder": f"{folder}/cuda_kernels/__pycache__", **kernels} if gpus > 1 else None,
        "paged_state": {"folder": "/tmp", "free_bytes": 100 << 30, "problem": None},
    }
    return lambda patch: patch.setattr(overview, "found", lambda: found)


def rows(disturbed: bool) -> list[Row]:
    """Return made-up times of all contestants."""
    found = []
    for number, contestant in enumerate(bench.CONTESTANTS):
        is_ours = contestant.name == contestant.ours
        time = 0.5 if is_ours else 0.5 * 3**number
        times = Summary(time, 0.95 * time, 1.1 * time)
        state = 1.016 if "8bit" in contestant.name else 4.0
        shares = (0.9, None) if is_ours else (None, time / 0.5)
        found.append(Row(contestant.name, times, times, *shares, state, 0.25 * number, disturbed and number in (1, 7)))
    return found


def benchmark(disturbed: bool) -> Patch:
    """Return what makes the benchmark measure made-up times."""

    def change(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(bench, "measured", lambda *arguments: rows(disturbed))
        patch.setattr(bench, "LOOKUPS", "AVX-512 VBMI")
        patch.setattr(torch, "get_num_threads", lambda: 8)

    return change


def checked(gpus: int, differs: str = "") -> Patch:
    """Return what makes all checks pass but one, on the CPU and as many GPUs."""

    def passes(target: check.Target, dtype: torch.dtype) -> Iterator[int]:
        yield 2_345_678

    def fails(target: check.Target, dtype: torch.dtype) -> Iterator[int]:
        yield 1
        raise check.Difference("step 2, 257 elements, offset 3, state1: element 256 (block 1) is 0x81 = 129")

    def change(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(check, "CHECKS", {name: fails if name == differs else passes for name in check.CHECKS})
        patch.setattr(torch.cuda, "device_count", lambda: gpus)
        patch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
        patch.setattr(torch.version, "cuda", "13.0")

    return change


def trained(patch: pytest.MonkeyPatch) -> None:
    """Make the demo's trainings end at once, with made-up results."""

    def results(names: list[str], *arguments: object) -> list[demo.Result]:
        million = 1_000_000
        return [
            demo.Result(
                name, [(0, 5.5), (240, 2 - i / 8)], 4 * million, (9 - i) * million, (60 - i) << 20, million, 2.5, 0.03
            )
            for i, name in enumerate(names)
        ]

    patch.setattr(demo, "_train_all", results)
    patch.setattr(demo, "_draw", lambda results, path: path)


def interrupted(patch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    patch.setattr(bench, "measured", interrupt)


def as_it_is(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch.cuda, "device_count", lambda: 0)
    patch.setattr(torch.version, "cuda", "13.0")


CASES: dict[str, tuple[tuple[str, ...], Patch]] = {
    "overview": ((), machine(0)),
    "overview-gpus": ((), machine(2)),
    "overview-not-ready": ((), machine(1, 'CUDA tensors need numba-cuda: pip install "numba-lion[cu13]"')),
    "version": (("--version",), as_it_is),
    "help": (("--help",), as_it_is),
    "help-demo": (("demo", "--help"), as_it_is),
    "help-check": (("check", "--help"), as_it_is),
    "help-bench": (("bench", "--help"), as_it_is),
    "demo": (("demo", "--device", "cpu"), trained),
    "check": (("check",), checked(0)),
    "check-gpus": (("check",), checked(2)),
    "check-difference": (("check",), checked(0, "8-bit blockwise, paged")),
    "bench": (BENCH, benchmark(False)),
    "bench-disturbed": (BENCH, benchmark(True)),
    "bench-details": ((*BENCH, "--details"), benchmark(True)),
    "mistake-option": (("demo", "--stepz=3"), as_it_is),
    "mistake-device": (("bench", "--device", "mps"), as_it_is),
    "mistake-gpu": (("bench", "--device", "cuda:1"), as_it_is),
    "mistake-workload": (("bench", "--workloads", "two"), as_it_is),
    "interrupted": (BENCH, interrupted),
}


def printed(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    patch: Patch,
    columns: int | None,
) -> str:
    """Return what a command prints, errors last, and its exit code."""
    with monkeypatch.context() as changed:
        for variable in ("COLUMNS", "FORCE_COLOR", "TTY_COMPATIBLE"):
            changed.delenv(variable, raising=False)
        if columns:
            changed.setenv("COLUMNS", str(columns))
        changed.setenv("LINES", "24")
        patch(changed)
        try:
            code: Any = main(list(arguments))
        except SystemExit as exit:
            code = exit.code
    captured = capsys.readouterr()
    lines = [f"$ {' '.join(('python -m lion', *arguments))}", *captured.out.splitlines(), *captured.err.splitlines()]
    return "\n".join(line.rstrip() for line in [*lines, f"[exit code {code}]"]) + "\n"


@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize("name", CASES)
def test_what_is_printed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, columns: int
) -> None:
    monkeypatch.chdir(tmp_path)
    text = printed(capsys, monkeypatch, *CASES[name], columns)
    path = GOLDEN / f"{name}-{columns}.txt"
    if os.environ.get("LION_GOLDEN") == "write":
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8"), "see the top of this file"


def test_no_text_is_left_over() -> None:
    assert {path.name for path in GOLDEN.iterdir()} == {f"{name}-{width}.txt" for name in CASES for width in WIDTHS}


@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize("name", CASES)
def test_it_fits_and_is_whole(name: str, columns: int) -> None:
    command, *lines = (GOLDEN / f"{name}-{columns}.txt").read_text(encoding="utf-8").splitlines()
    text = "\n".join(lines)
    assert "\N{HORIZONTAL ELLIPSIS}" not in text
    # An error is one line for programs that read it, and terminals wrap it.
    if "error: " not in text and "DIFFERENCE: " not in text:
        assert max(map(len, lines)) <= columns, max(lines, key=len)
    words = set((GOLDEN / f"{name}-{max(WIDTHS)}.txt").read_text(encoding="utf-8").split())
    # All but what stands in a folded path.
    lost = {word for word in words - set(text.split()) - set(command.split()) if word.isalnum()}
    assert not lost


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith(("help", "overview"))])
def test_into_a_pipe_it_is_whole(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    text = printed(capsys, monkeypatch, *CASES[name], None)
    widest = (GOLDEN / f"{name}-{max(WIDTHS)}.txt").read_text(encoding="utf-8")
    assert text.split() == widest.split()


@pytest.mark.parametrize("name", CASES)
def test_an_ascii_terminal_shows_the_same_in_words(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    shown = io.BytesIO()
    terminal = io.TextIOWrapper(shown, "ascii", write_through=True)
    with monkeypatch.context() as changed:
        changed.setattr(sys, "stdout", terminal)
        rest = printed(capsys, monkeypatch, *CASES[name], max(WIDTHS))
    command, *errors = rest.splitlines(keepends=True)
    golden = (GOLDEN / f"{name}-{max(WIDTHS)}.txt").read_text(encoding="utf-8").translate(_SPELLED)
    # A rule is as long as the words.
    found, expected = (
        [word for word in text.split() if set(word) != {"-"}]
        for text in ("".join((command, shown.getvalue().decode("ascii"), *errors)), golden)
    )
    assert found == expected

"""The example for a single machine: it learns, and a kill in its midst changes no bit."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from tests.comparing import assert_same_bits

ROOT = Path(__file__).parents[2]
LINE = re.compile(r"step (\d+): ([\d.]+) nats per byte")


def run(folder: Path, kill_after: int | None = None) -> list[str]:
    """Run the example in a folder, kill it after a step where asked to, and return its lines."""
    command = [sys.executable, ROOT / "examples" / "single_machine.py", "--steps", "16", "--save-every", "3"]
    # One thread: several wait for one another by spinning, for seconds beside other tests.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    lines = []
    with subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.strip())
            if kill_after is not None and line.startswith(f"step {kill_after}:"):
                process.kill()
                break
        else:
            assert process.wait(200) == 0
    return lines


def assert_same(one: Any, other: Any, what: str = "") -> None:
    """Fail unless two checkpoints hold the same, tensors to the bit."""
    assert type(one) is type(other), what
    if isinstance(one, torch.Tensor):
        assert_same_bits(one, other, what=what)
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), what
        for key in one:
            assert_same(one[key], other[key], f"{what} {key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), what
        for number, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{what} {number}")
    else:
        assert one == other, what


def test_killed_and_started_again(tmp_path: Path) -> None:
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    lines = run(tmp_path / "whole")
    losses = [float(found[2]) for found in map(LINE.fullmatch, lines) if found]
    assert len(losses) == 16 and losses[-1] < losses[0] - 1

    run(tmp_path / "killed", kill_after=8)
    lines = run(tmp_path / "killed")
    assert lines[0] == "going on after step 6"
    whole, killed = (torch.load(tmp_path / name / "model.pt") for name in ("whole", "killed"))
    assert_same(killed, whole)
    states = whole["optimizer"]["state"].values()
    assert {state["state1"].dtype for state in states} == {torch.uint8, torch.float32}
    assert {int(state["step"]) for state in states} == {16}

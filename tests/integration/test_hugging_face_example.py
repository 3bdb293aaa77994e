"""The example for Hugging Face: it learns, and goes on from a checkpoint with the same bits."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.examples.test_single_machine import ROOT, assert_same

pytest.importorskip("transformers")
pytest.importorskip("accelerate")


def run(folder: Path) -> float:
    """Run the example and return the loss that it prints."""
    command = [sys.executable, ROOT / "examples" / "hugging_face.py", "--folder", folder]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, "--steps", "16", "--save-every", "8"],
        env=environment, stdout=subprocess.PIPE, text=True, check=True, timeout=300,
    )  # fmt: skip
    return float(done.stdout.splitlines()[-1].removesuffix(" nats per byte of held-out text"))


def test_started_again(tmp_path: Path) -> None:
    loss = run(tmp_path / "whole")
    assert loss < 4.9  # log(256) is 5.5
    shutil.copytree(tmp_path / "whole" / "checkpoint-8", tmp_path / "stopped" / "checkpoint-8")
    assert run(tmp_path / "stopped") == loss
    whole, stopped = (torch.load(tmp_path / name / "checkpoint-16" / "optimizer.pt") for name in ("whole", "stopped"))
    assert_same(stopped, whole)
    assert {state["state1"].dtype for state in whole["state"].values()} == {torch.uint8, torch.float32}
    assert {group["betas"] for group in whole["param_groups"]} == {(0.9, 0.99)}

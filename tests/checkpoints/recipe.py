"""A training that writes checkpoints by the recipe of ``docs/checkpoints.md``."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import lion


# [recipe]
def save(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a checkpoint so that the path holds a whole one at any moment: the old one or the new one."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


# [/recipe]


def train(path: Path, steps: int, started: Callable[[], object] = lambda: None) -> None:
    """Take steps up to number ``steps``, with a checkpoint after each; go on from the checkpoint where there is one.

    Args:
        path: The checkpoint.
        steps: Number of the last step.
        started: Called after loading, before the first step.
    """
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    params = [nn.Parameter(torch.from_numpy(rng.normal(size=size)).float()) for size in (110_000, 5_000, 10)]
    optimizer = lion.PagedLion8bit(params, lr=1e-3, weight_decay=0.1, percentile_clipping=50)
    begin = 0
    if path.exists():
        checkpoint = torch.load(path, weights_only=True)
        begin = checkpoint["step"]
        optimizer.load_state_dict(checkpoint["optimizer"])
        for p, saved in zip(params, checkpoint["params"], strict=True):
            p.data.copy_(saved)
    started()
    for step in range(begin, steps):
        for p in params:
            p.grad = torch.from_numpy(np.random.default_rng([step, p.numel()]).normal(size=p.shape)).float()
        optimizer.step()
        save({"step": step + 1, "params": [p.detach() for p in params], "optimizer": optimizer.state_dict()}, path)


def warm_up() -> None:
    """Compile and load all kernels of the training."""
    with tempfile.TemporaryDirectory() as folder:
        train(Path(folder) / "checkpoint.pt", 1)

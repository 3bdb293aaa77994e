"""A second process of the checkpoint test: loads what the first one saved and trains on.

Usage: python -m tests.optimizers.resume FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

from tests.optimizers.support import DTYPES, VARIANTS, parameter, set_gradients

OPTIONS = {"lr": 1e-3, "weight_decay": 0.1, "percentile_clipping": 50}


def make_parameters() -> list[Tensor]:
    """Return parameters of all dtypes, and one that is large enough for paging."""
    small = [parameter(*shape, dtype=dtype) for dtype in DTYPES for shape in ((65, 64), (10,), ())]
    return [*small, parameter(100_001)]


def train(params: list[Tensor], optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Take steps with the gradients of these numbers."""
    for step in steps:
        set_gradients(params, step, 10.0 ** (step % 3 - 3))
        optimizer.step()


def main(folder: Path) -> None:
    for name, make in VARIANTS.items():
        saved = torch.load(folder / f"{name}.pt", weights_only=True)
        params = make_parameters()
        with torch.no_grad():
            for p, value in zip(params, saved["params"], strict=True):
                p.copy_(value)
        optimizer = make(params, **OPTIONS)
        optimizer.load_state_dict(saved["optimizer"])
        train(params, optimizer, range(20, 40))
        results = {"params": [p.detach() for p in params], "optimizer": optimizer.state_dict()}
        torch.save(results, folder / f"{name}-resumed.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""A small model and its data, for the trainings through other libraries and by hand."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.optimizers.support import VARIANTS

OPTIONS = {"lr": 1e-3, "weight_decay": 0.1, "percentile_clipping": 50}
CHOSEN = {name: VARIANTS[name] for name in ("Lion", "Lion8bit", "PagedLion8bit-tensorwise")}


def make_model() -> nn.Module:
    """Return a model with weights of 5,000 and more elements, so that 8 bits are 8 bits, and biases."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(50, 110), nn.Tanh(), nn.Dropout(0.1), nn.Linear(110, 90), nn.Tanh(), nn.Linear(90, 3)
    )


def make_data(count: int = 32) -> list[tuple[Tensor, Tensor]]:
    """Return batches of inputs and targets, of sizes of gradient that differ."""
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(4, 50, generator=generator), torch.randn(4, 3, generator=generator) * 10.0 ** (number % 3))
        for number in range(count)
    ]

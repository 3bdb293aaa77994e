"""What the tests of 16-bit weights share: the ways of keeping them, and gradients of float32."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lion
from tests.optimizers.support import parameter

SEED = 2**64 - 59
WAYS: dict[str, dict[str, Any]] = {
    "24": {"master_weight_bits": 24},
    "32": {"master_weight_bits": 32},
    "stochastic": {"stochastic_rounding": True, "rounding_seed": SEED},
}
MASTERS = {name: way for name, way in WAYS.items() if name != "stochastic"}
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
both_masters = pytest.mark.parametrize("way", MASTERS.values(), ids=MASTERS)


def bfloat16(*shape: int, seed: int = 0) -> nn.Parameter:
    """Return a bfloat16 parameter that takes float32 gradients."""
    p = parameter(*shape, dtype=torch.bfloat16, seed=seed)
    p.grad_dtype = torch.float32
    return p


def gradients(params: Iterable[Tensor], seed: int) -> list[Tensor]:
    """Return float32 gradients of normally distributed values."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return [torch.randn(p.shape, generator=generator) * 10.0 ** -(seed % 4) for p in params]


def take(optimizer: torch.optim.Optimizer, params: Iterable[Tensor], steps: Iterable[int]) -> None:
    """Take steps with the gradients that belong to their numbers."""
    params = list(params)
    for step in steps:
        for p, g in zip(params, gradients(params, step), strict=True):
            p.grad = g
        optimizer.step()


def whole(optimizer: lion.Lion, params: Iterable[Tensor]) -> list[Tensor]:
    """Return the float32 values of parameters, with their lower parts."""
    model = nn.ParameterList(params)
    return list(lion.exchange.float32_state_dict(model, optimizer).values())

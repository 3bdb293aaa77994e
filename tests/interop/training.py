"""A small training that two optimizers can go through side by side, and how far apart they may end."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

SHAPES = ((24, 25), (7,))
OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.98), "weight_decay": 0.1}
SMALL = {"min_8bit_size": 64}
CASES = {  # class, dtype
    "lion_float32": ("Lion", "float32"),
    "lion_bfloat16": ("Lion", "bfloat16"),
    "lion8bit_float32": ("Lion8bit", "float32"),
    "lion8bit_bfloat16": ("Lion8bit", "bfloat16"),
    "paged_lion_float32": ("PagedLion", "float32"),
    "paged_lion8bit_float16": ("PagedLion8bit", "float16"),
}
STEPS = 3
MORE_STEPS = 3
ULP = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


def make_params(dtype: str) -> list[nn.Parameter]:
    """Return the parameters at the start."""
    rng = np.random.default_rng(0)
    return [nn.Parameter(torch.from_numpy(rng.normal(size=s)).to(getattr(torch, dtype))) for s in SHAPES]


def train(optimizer: Optimizer, params: list[nn.Parameter], first: int, count: int) -> None:
    """Take steps ``first`` to ``first + count - 1``; their gradients depend on nothing but the number of the step."""
    for number in range(first, first + count):
        rng = np.random.default_rng(1 + number)
        for p in params:
            p.grad = torch.from_numpy(rng.normal(size=p.shape) * 0.01).to(p.dtype)
        optimizer.step()


def snapshot(params: list[nn.Parameter]) -> list[Tensor]:
    """Return copies of the parameters."""
    return [p.detach().clone() for p in params]


def restore(params: list[Tensor]) -> list[nn.Parameter]:
    """Return parameters with these values."""
    return [nn.Parameter(p.clone()) for p in params]


def flat(state: dict[str, Any]) -> dict[str, Any]:
    """Return a state of a state dict without bitsandbytes' nesting."""
    return {**state, **state.get("__bnb_optimizer_quant_state__", {})}


def assert_close(
    params: list[Tensor], states: list[dict[str, Any]], others: list[Tensor], theirs: list[dict[str, Any]]
):
    """Fail unless parameters agree within two roundings a step, and momentum within one code or a rounding a step."""
    for p, q in zip(params, others, strict=True):
        bound = 2 * MORE_STEPS * ULP[p.dtype] * torch.maximum(p.abs(), q.abs()).float()
        assert ((p.detach().float() - q.detach().float()).abs() <= bound).all()
    for ours, other in zip(map(flat, states), map(flat, theirs), strict=True):
        assert int(ours["step"]) == int(other["step"])
        assert ours["state1"].dtype == other["state1"].dtype
        if ours["state1"].dtype == torch.uint8:
            assert (ours["state1"].int() - other["state1"].int()).abs().max() <= 1
            torch.testing.assert_close(ours["absmax1"], other["absmax1"], rtol=1e-5, atol=0)
            assert torch.equal(ours["qmap1"], other["qmap1"])
        else:
            torch.testing.assert_close(ours["state1"], other["state1"], rtol=1e-5, atol=1e-8)

"""Who is compared: optimizers, the dtype of their weights, and where the search for their rates begins."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.optim import AdamW, Optimizer

from lion import Lion, Lion8bit

BETAS = (0.9, 0.99)
# The learning rate times the weight decay: how much of the weights every step takes away, the same for all.
DECAY = 2e-4
# Lion's rate where the search begins, as a share of AdamW's.
LION_RATE = 0.25

Make = Callable[[Any, float, float], Optimizer]


class Contestant(NamedTuple):
    """An optimizer with its way of keeping weights.

    Attributes:
        name: What to call it.
        dtype: Of the weights.
        rate: Where the search for its rate begins, as a share of AdamW's usual rate.
        make: Returns the optimizer for parameters, a learning rate and a weight decay.
        module: The package that it needs.
        in_backward: Whether it steps in the backward pass.
        searched_as: The contestant whose rate it takes, for its updates are the same (default: its own search).
    """

    name: str
    dtype: torch.dtype
    rate: float
    make: Make
    module: str = "lion"
    in_backward: bool = False
    searched_as: str | None = None


def _adamw(params: Any, lr: float, weight_decay: float) -> Optimizer:
    return AdamW(params, lr=lr, betas=BETAS, weight_decay=weight_decay, fused=True)


def _ours(cls: type[Lion], **options: Any) -> Make:
    return lambda params, lr, weight_decay: cls(params, lr=lr, betas=BETAS, weight_decay=weight_decay, **options)


def _bitsandbytes(name: str) -> Make:
    def make(params: Any, lr: float, weight_decay: float) -> Optimizer:
        import bitsandbytes

        return getattr(bitsandbytes.optim, name)(params, lr=lr, betas=BETAS, weight_decay=weight_decay)

    return make


def _torchao(params: Any, lr: float, weight_decay: float) -> Optimizer:
    from torchao.optim import AdamW8bit

    return AdamW8bit(params, lr=lr, betas=BETAS, weight_decay=weight_decay)


def _flashoptim(params: Any, lr: float, weight_decay: float) -> Optimizer:
    from flashoptim import FlashLion

    return FlashLion(params, lr=lr, betas=BETAS, weight_decay=weight_decay)


_F32, _BF16 = torch.float32, torch.bfloat16
ALL = (
    Contestant("AdamW", _F32, 1, _adamw, "torch"),
    Contestant("AdamW, bf16", _BF16, 1, _adamw, "torch"),
    Contestant("Lion", _F32, LION_RATE, _ours(Lion)),
    Contestant("Lion8bit", _F32, LION_RATE, _ours(Lion8bit)),
    Contestant("Lion8bit, bf16", _BF16, LION_RATE, _ours(Lion8bit)),
    Contestant("Lion8bit, bf16 stochastic", _BF16, LION_RATE, _ours(Lion8bit, stochastic_rounding=True)),
    Contestant("Lion8bit, bf16 + 24 bits", _BF16, LION_RATE, _ours(Lion8bit, master_weight_bits=24)),
    Contestant("Lion8bit, bf16 + 32 bits", _BF16, LION_RATE, _ours(Lion8bit, master_weight_bits=32)),
    Contestant("Lion8bit in backward", _F32, LION_RATE, _ours(Lion8bit), in_backward=True, searched_as="Lion8bit"),
    Contestant("bitsandbytes Lion8bit", _F32, LION_RATE, _bitsandbytes("Lion8bit"), "bitsandbytes"),
    Contestant("bitsandbytes AdamW8bit", _F32, 1, _bitsandbytes("AdamW8bit"), "bitsandbytes"),
    Contestant("torchao AdamW8bit", _F32, 1, _torchao, "torchao"),
    Contestant("flashoptim FlashLion, bf16", _BF16, LION_RATE, _flashoptim, "flashoptim"),
)
BY_NAME = {contestant.name: contestant for contestant in ALL}


def installed() -> list[Contestant]:
    """Return the contestants whose package is installed."""
    return [contestant for contestant in ALL if importlib.util.find_spec(contestant.module)]

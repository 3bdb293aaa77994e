"""The other implementations. Imports neither numba-lion nor Numba: a foreign environment may run it."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

LR, BETAS, WEIGHT_DECAY = 1e-4, (0.9, 0.99), 0.1
Params = list[nn.Parameter]


class CompiledLion:
    """The update of Lion as one function, compiled by torch."""

    def __init__(self, params: Params) -> None:
        self.params = params
        self.state = {p: {"momentum": torch.zeros_like(p)} for p in params}
        torch._dynamo.reset()  # after eight versions of a function torch compiles no more
        self.update = torch.compile(self._update, dynamic=False)

    @staticmethod
    def _update(params: Params, grads: list[Tensor], momentums: list[Tensor]) -> None:
        beta1, beta2 = BETAS
        for param, grad, momentum in zip(params, grads, momentums, strict=True):
            sign = (momentum * beta1 + grad * (1 - beta1)).sign()
            param.mul_(1 - LR * WEIGHT_DECAY).sub_(sign, alpha=LR)
            momentum.mul_(beta2).add_(grad, alpha=1 - beta2)

    @torch.no_grad()
    def step(self) -> None:
        grads = [p.grad for p in self.params if p.grad is not None]
        self.update(self.params, grads, [self.state[p]["momentum"] for p in self.params])


def _bitsandbytes(name: str) -> Callable[[Params], Any]:
    def make(params: Params) -> Any:
        import bitsandbytes

        options = {"min_8bit_size": 0} if name == "Lion8bit" else {}
        return getattr(bitsandbytes.optim, name)(params, LR, BETAS, WEIGHT_DECAY, **options)

    return make


def _lion_pytorch(params: Params) -> Any:
    from lion_pytorch import Lion

    return Lion(params, LR, BETAS, WEIGHT_DECAY)


def _optimi(params: Params) -> Any:
    from optimi import Lion

    return Lion(params, LR, BETAS, WEIGHT_DECAY)


def _pytorch_optimizer(params: Params) -> Any:
    from pytorch_optimizer import Lion

    return Lion(params, lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY, foreach=True)


def _timm(params: Params) -> Any:
    from timm.optim import Lion

    return Lion(params, lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY, foreach=True)


def _flashoptim(params: Params) -> Any:
    from flashoptim import FlashLion

    if params[0].dtype == torch.float32:
        raise ValueError("its master bits are for 16-bit parameters")
    return FlashLion(params, lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY)


def _adamw(params: Params) -> Any:
    return torch.optim.AdamW(params, lr=LR, weight_decay=WEIGHT_DECAY, fused=True)


def _torchao(params: Params) -> Any:
    from torchao.optim import AdamW8bit

    return AdamW8bit(params, lr=LR, weight_decay=WEIGHT_DECAY)


def _bitsandbytes_distribution() -> str:
    """Two distributions hold a package of this name; an environment has one of them."""
    names = importlib.metadata.packages_distributions().get("bitsandbytes", ["bitsandbytes"])
    return names[0]


def peers() -> dict[str, Callable[[Params], Any]]:
    """Return the peers' constructors by name; calling one raises ImportError where it is not installed."""
    bitsandbytes = _bitsandbytes_distribution()
    return {
        f"{bitsandbytes} Lion8bit": _bitsandbytes("Lion8bit"),
        f"{bitsandbytes} Lion": _bitsandbytes("Lion"),
        "lion-pytorch": _lion_pytorch,
        "torch-optimi": _optimi,
        "pytorch-optimizer": _pytorch_optimizer,
        "timm": _timm,
        "flashoptim FlashLion, 24 master bits": _flashoptim,
        "torch.compile Lion": CompiledLion,
        "torch fused AdamW": _adamw,
        "torchao AdamW8bit": _torchao,
    }

"""What the optimizer tests share: the classes under test, and the same steps taken by hand with the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lion
from lion import reference
from tests.comparing import assert_same_bits, to_numpy

CLASSES = (lion.Lion, lion.Lion8bit, lion.Lion32bit, lion.PagedLion, lion.PagedLion8bit, lion.PagedLion32bit)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
QMAP = reference.create_dynamic_map()


class Variant(NamedTuple):
    """A class with the arguments that choose its state."""

    cls: type[lion.Lion]
    kwargs: dict[str, Any]

    def __call__(self, params: Any, **kwargs: Any) -> lion.Lion:
        return self.cls(params, **{**self.kwargs, **kwargs})

    @property
    def bits(self) -> int:
        return 8 if "8bit" in self.cls.__name__ else self.kwargs.get("optim_bits", 32)


VARIANTS = {
    "Lion": Variant(lion.Lion, {}),
    "Lion-8": Variant(lion.Lion, {"optim_bits": 8}),
    "Lion8bit": Variant(lion.Lion8bit, {}),
    "Lion8bit-tensorwise": Variant(lion.Lion8bit, {"block_wise": False}),
    "Lion32bit": Variant(lion.Lion32bit, {}),
    "PagedLion": Variant(lion.PagedLion, {}),
    "PagedLion-8": Variant(lion.PagedLion, {"optim_bits": 8}),
    "PagedLion8bit": Variant(lion.PagedLion8bit, {}),
    "PagedLion8bit-tensorwise": Variant(lion.PagedLion8bit, {"block_wise": False}),
    "PagedLion32bit": Variant(lion.PagedLion32bit, {}),
}
KINDS = {  # one variant for each kind of state
    "32bit": VARIANTS["Lion"],
    "blockwise": VARIANTS["Lion8bit"],
    "tensorwise": VARIANTS["Lion8bit-tensorwise"],
}
every_class = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
every_variant = pytest.mark.parametrize("make", VARIANTS.values(), ids=VARIANTS.keys())
every_kind = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS.keys())
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def parameter(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Parameter:
    """Return a parameter of normally distributed values."""
    generator = torch.Generator().manual_seed(seed)
    return nn.Parameter(torch.randn(shape, generator=generator).mul(0.1).to(dtype))


def set_gradients(params: Iterable[Tensor], seed: int, scale: float = 1e-2) -> None:
    """Give every parameter a new gradient of normally distributed values."""
    generator = torch.Generator().manual_seed(1000 + seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).mul(scale).to(p.dtype)


def move_to_bucket(params: Sequence[Tensor], alignment: int) -> None:
    """Make the gradients, all of one dtype, views of one buffer, at odd multiples of so many bytes."""
    itemsize = params[0].grad.element_size()
    step = alignment // itemsize
    places, end = [], step
    for p in params:
        places.append(end)
        end += p.numel() + (-p.numel()) % (2 * step)
    bucket = torch.zeros(end, dtype=params[0].grad.dtype, device=params[0].device)
    assert bucket.data_ptr() % 16 == 0
    for p, place in zip(params, places, strict=True):
        p.grad = bucket[place : place + p.numel()].copy_(p.grad.reshape(-1)).view(p.shape)


class ByHand:
    """A copy of a parameter and its optimizer state, moved by ``reference`` alone.

    Args:
        p: The parameter, as it is before the first step.
        bits: 8 or 32.
        block_wise: Whether 8-bit momentum is quantized in blocks.
        percentile: Percentile clipping; 100 is off.
        min_8bit_size: Smaller parameters keep 32-bit momentum.
    """

    def __init__(
        self, p: Tensor, bits: int, block_wise: bool = True, percentile: int = 100, min_8bit_size: int = 4096
    ) -> None:
        self.param = to_numpy(p).copy()
        self.kind = "32bit" if bits == 32 or p.numel() < min_8bit_size else "blockwise" if block_wise else "tensorwise"
        self.percentile = percentile
        self.steps = 0
        self.history = np.zeros(100, np.float32)
        blocks = 1 if self.kind == "tensorwise" else -(-p.numel() // 256)
        if self.kind == "32bit":
            self.momentum = np.zeros(self.param.shape, np.float32)
        else:
            self.codes, self.absmax = np.full(self.param.shape, 127, np.uint8), np.zeros(blocks, np.float32)

    @classmethod
    def of(cls, make: Variant, p: Tensor, **kwargs: Any) -> ByHand:
        """Return the copy for a variant and the keyword arguments it was given."""
        kwargs = {**make.kwargs, **kwargs}
        return cls(
            p,
            kwargs.get("optim_bits", make.bits),
            kwargs.get("block_wise", True),
            kwargs.get("percentile_clipping", 100),
            kwargs.get("min_8bit_size", 4096),
        )

    def step(
        self,
        grad: Tensor,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        squared_norm: np.float32 | None = None,
    ) -> None:
        """Take a step; ``squared_norm`` is that of the whole gradient where ``grad`` is a part of it."""
        g, k, scale = to_numpy(grad), reference.coefficients(lr, betas, weight_decay), np.float32(1)
        self.steps += 1
        if self.percentile < 100:
            norm = reference.squared_norm(g) if squared_norm is None else squared_norm
            self.history, _, _, scale = reference.percentile_clipping(self.history, norm, self.steps, self.percentile)
        if self.kind == "32bit":
            self.param, self.momentum = reference.update_32bit(self.param, g, self.momentum, k, scale)
        elif self.param.size:
            update = reference.update_8bit_blockwise if self.kind == "blockwise" else reference.update_8bit_tensorwise
            self.param, self.codes, self.absmax = update(self.param, g, self.codes, self.absmax, QMAP, k, scale)

    def expected_state(self) -> dict[str, np.ndarray]:
        """Return the state as the optimizer must hold it."""
        state: dict[str, Any] = {"step": np.array(self.steps, np.float32)}
        if self.kind == "32bit":
            state["state1"] = self.momentum
        else:
            state.update(state1=self.codes, qmap1=QMAP)
            state["absmax1" if self.kind == "blockwise" else "max1"] = self.absmax
        if self.percentile < 100:
            state["gnorm_vec"] = self.history
        return state

    def check(self, p: Tensor, optimizer: torch.optim.Optimizer, what: str = "") -> None:
        """Fail unless parameter and state are those of this copy, to the bit."""
        assert_same_bits(p, self.param, what=f"{what} param")
        state = dict(optimizer.state[p])
        if "new_max1" in state:
            assert_same_bits(state.pop("new_max1"), state["max1"], what=f"{what} new_max1")
        expected = self.expected_state()
        assert state.keys() == expected.keys()
        for key in state:
            assert_same_bits(state[key], expected[key], what=f"{what} {key}")


def follow(
    optimizer: lion.Lion,
    copies: dict[Tensor, ByHand],
    steps: int,
    *,
    seed: int = 0,
    before: Callable[[int], None] = lambda i: None,
    scale: Callable[[int], float] = lambda i: 1e-2,
) -> None:
    """Take steps with random gradients, by the optimizer and by hand, and compare after each.

    Args:
        optimizer: The optimizer.
        copies: The parameters that get a gradient, with their copies.
        steps: Number of steps.
        seed: Seed of the first gradients.
        before: Called with the index of a step before it.
        scale: Standard deviation of the gradients, by the index of a step.
    """
    for i in range(steps):
        set_gradients(copies, seed + i, scale(i))
        before(i)
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p in copies:
                    lr = group["lr"]
                    copies[p].step(p.grad, float(lr), group["betas"], group["weight_decay"])
        optimizer.step()
        for number, (p, copy) in enumerate(copies.items()):
            copy.check(p, optimizer, f"step {i}, parameter {number}")


def snapshot(optimizer: torch.optim.Optimizer) -> list[tuple[str, Any]]:
    """Return copies of all that a step may change, for :func:`assert_unchanged`."""
    values: list[tuple[str, Any]] = []
    for number, group in enumerate(optimizer.param_groups):
        for index, p in enumerate(group["params"]):
            values.append((f"parameter {number}.{index}", p.detach().clone()))
            if isinstance(p.grad, Tensor) and p.grad.layout == torch.strided:
                values.append((f"gradient {number}.{index}", p.grad.detach().clone()))
            for key, value in optimizer.state.get(p, {}).items():
                values.append((f"{key} {number}.{index}", value.clone()))
    return values


def assert_unchanged(optimizer: torch.optim.Optimizer, before: list[tuple[str, Any]]) -> None:
    """Fail unless everything is as in the snapshot."""
    after = snapshot(optimizer)
    assert [name for name, _ in after] == [name for name, _ in before]
    for (name, actual), (_, expected) in zip(after, before, strict=True):
        assert_same_bits(actual, expected, what=name)

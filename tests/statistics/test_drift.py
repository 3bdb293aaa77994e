"""What becomes of momentum that is quantized again and again without a gradient; ``pytest -rP`` shows the figures.

The map has no -1: a block whose greatest magnitude is negative comes back with 0.99297 of it. All codes stay the same,
so the whole block shrinks by this factor in every step, until nothing is left.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch

import lion
from lion import reference
from tests.comparing import assert_same_bits

QMAP = reference.create_dynamic_map()
FACTOR = -QMAP[0]
BETAS = (0.9, 1 - 2.0**-53)  # legal, and (0.9, 1) in float32: without a gradient, a step quantizes the same again


def block(greatest: float, seed: int = 0) -> npt.NDArray[np.float32]:
    """Return 256 normally distributed values below 4, and one greatest magnitude."""
    values = np.random.default_rng(seed).standard_normal(256).clip(-3.5, 3.5).astype(np.float32)
    values[100] = greatest
    return values


class Requantized:
    """The 8-bit momentum of a real optimizer whose gradients are zero."""

    def __init__(self, momentum: npt.NDArray[np.float32]) -> None:
        self.p = torch.nn.Parameter(torch.zeros(momentum.size))
        self.p.grad = torch.zeros(momentum.size)
        self.optimizer = lion.Lion8bit([self.p], lr=0.0, betas=BETAS, min_8bit_size=0)
        self.optimizer.step()
        codes, absmax = reference.quantize_blockwise(momentum, QMAP, 256)
        self.state = self.optimizer.state[self.p]
        self.state["state1"].copy_(torch.from_numpy(codes))
        self.state["absmax1"].copy_(torch.from_numpy(absmax))

    def step(self, times: int) -> None:
        for _ in range(times):
            self.optimizer.step()

    def now(self) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
        return self.state["state1"].numpy().copy(), self.state["absmax1"].numpy().copy()


def test_10000_steps() -> None:
    names = ("greatest positive", "greatest negative", "all negative", "all positive")
    blocks = [block(4), block(-4), -np.abs(block(4)), np.abs(block(4))]
    requantized = Requantized(np.concatenate(blocks))
    codes, absmax = requantized.now()
    expected = absmax.copy()
    negative = np.array([False, True, True, False])
    done = 0
    for steps in (1, 10, 100, 1000, 10_000):
        requantized.step(steps - done)
        for _ in range(steps - done):
            expected[negative] *= FACTOR
        done = steps
        now_codes, now_absmax = requantized.now()
        assert_same_bits(now_codes, codes, what="codes")
        assert_same_bits(now_absmax, expected, what="absmax")
        for name, ratio in zip(names, now_absmax / absmax, strict=True):
            print(f"{name}: after {steps} steps {ratio:.5g} of the momentum")
    np.testing.assert_allclose(now_absmax[1] / absmax[1], float(FACTOR) ** 10_000, rtol=1e-3)


def test_the_end_of_a_shrinking_block() -> None:
    """Below the smallest normal number a block is stored as zeros."""
    requantized = Requantized(block(-4))
    steps = 0
    while requantized.now()[1] > 0:
        requantized.step(1)
        steps += 1
    print(f"a block of absmax 4 is zero after {steps} steps")
    assert steps == pytest.approx(np.log(2.0**-126 / 4) / np.log(FACTOR), abs=2)
    assert (requantized.now()[0] == 127).all()


def test_which_blocks_shrink() -> None:
    """Those that hold -absmax, unless a positive value is so near to absmax that its code is one of the last two."""
    for code in range(128, 256):
        codes, absmax = np.array([0, code, 127], np.uint8), np.ones(1, np.float32)
        for _ in range(50):
            values = reference.dequantize_blockwise(codes, absmax, QMAP, 3)
            codes, absmax = reference.quantize_blockwise(values, QMAP, 3)
        kept = {254: float(FACTOR), 255: 1.0}.get(code, float(FACTOR) ** 50)
        assert absmax[0] == pytest.approx(kept, rel=1e-5)


def test_how_many_blocks_of_normal_momentum_shrink() -> None:
    """Nearly half: a negative greatest magnitude, and no positive one within about 1% of it."""
    values = np.random.default_rng(0).standard_normal((10_000, 256)).astype(np.float32)
    codes, absmax = reference.quantize_blockwise(values, QMAP, 256)
    back = reference.dequantize_blockwise(codes, absmax, QMAP, 256)
    shrinking = (np.abs(back).max(axis=1) < absmax) & (codes.max(axis=1) < 254)
    print(f"{shrinking.mean():.1%} of 10,000 blocks of normal momentum shrink")
    assert 0.45 < shrinking.mean() < 0.5


@pytest.mark.parametrize("sign", [1, -1])
def test_momentum_of_a_constant_gradient(sign: int) -> None:
    """1 where it is positive; where it is negative, m = 0.99297 (0.99 m + 0.01), that is 0.585."""
    p = torch.nn.Parameter(torch.zeros(256))
    optimizer = lion.Lion8bit([p], min_8bit_size=0)
    p.grad = torch.full((256,), float(sign))
    for _ in range(2000):
        optimizer.step()
    state = optimizer.state[p]
    found = float((state["qmap1"][state["state1"].int()] * state["absmax1"])[0])
    print(f"gradient {sign}: momentum {found:.4f}")
    kept = 1.0 if sign > 0 else float(FACTOR)
    assert found == pytest.approx(sign * 0.01 * kept / (1 - 0.99 * kept), rel=1e-3)

"""Every float32 as a 16-bit weight, through the compiled PTX of the kernels' own functions, executed on the CPU."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from lion.reference.rounding import STOCHASTIC
from tests.compiled import building
from tests.differential.every_weight import (
    LOW,
    Array,
    Patterns,
    any_parts,
    boundary_patterns,
    check_parts,
    check_rounding,
    joined,
)

ptxrun = pytest.importorskip("ptxrun", reason="the PTX executor is not importable")
pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")

from lion.cuda_kernels.device import (  # noqa: E402
    BFLOAT16,
    FLOAT32,
    TOGETHER,
    cuda,
    float32,
    load_8,
    load_f32,
    load_u32,
    mul,
    store_8,
    to_floats,
    uint32,
)
from lion.cuda_kernels.rounding import (  # noqa: E402
    join_8_weights,
    load_8_weights,
    low_itemsize,
    read_weight,
    write_8_weights,
    write_weight,
)

CHUNK, CAPABILITY = 1 << 22, (9, 0)
ONE = np.ones(1, np.float32)

all_bits = pytest.mark.parametrize("bits", LOW)
# By eight elements, and one at a time.
both = pytest.mark.parametrize("wide", [True, False], ids=["wide", "single"])


def make_write(weights: int, wide: bool) -> Callable[..., None]:
    """Return a kernel that writes float32 values as parameters; products with 1, as only NaNs of arithmetic occur."""
    low_size = low_itemsize(weights)

    def write_all(values: int, one: int, random: int, params: int, lows: int, size: int) -> None:
        p, bits = cuda.local.array(8, float32), cuda.local.array(8, uint32)
        factor = load_f32(one)
        i = cuda.grid(1) * 8
        while i < size:
            load_8(FLOAT32, TOGETHER, 16, values + i * 4, bits)
            to_floats(FLOAT32, bits, p)
            for j in range(8):
                p[j] = mul(p[j], factor)
            words = random + i * 2
            a, b, c, d = load_u32(words), load_u32(words + 4), load_u32(words + 8), load_u32(words + 12)
            if wide:
                write_8_weights(weights, BFLOAT16, TOGETHER, params + i * 2, lows + i * low_size, p, (a, b, c, d))
            else:
                for j in range(8):
                    u = uint32((a, b, c, d)[j // 2] >> uint32(16 * (j % 2)) & uint32(0xFFFF))
                    write_weight(weights, BFLOAT16, params + (i + j) * 2, lows + (i + j) * low_size, p[j], u)
            i += cuda.gridsize(1) * 8

    return write_all


def make_read(weights: int, wide: bool) -> Callable[..., None]:
    """Return a kernel that reads parameters as float32 values."""
    low_size = low_itemsize(weights)

    def read_all(params: int, lows: int, values: int, size: int) -> None:
        p, bits, low_bits = cuda.local.array(8, float32), cuda.local.array(8, uint32), cuda.local.array(4, uint32)
        i = cuda.grid(1) * 8
        while i < size:
            if wide:
                load_8_weights(weights, BFLOAT16, TOGETHER, params + i * 2, lows + i * low_size, bits, low_bits)
                join_8_weights(weights, BFLOAT16, bits, low_bits, p)
            else:
                for j in range(8):
                    p[j] = read_weight(weights, BFLOAT16, params + (i + j) * 2, lows + (i + j) * low_size)
            store_8(FLOAT32, TOGETHER, values + i * 4, p)
            i += cuda.gridsize(1) * 8

    return read_all


@functools.cache
def module(make: Callable[..., Any], weights: int, wide: bool) -> Any:
    return ptxrun.Module(building.ptx(make(weights, wide), CAPABILITY))


def run(make: Callable[..., Any], weights: int, wide: bool, arrays: list[Array]) -> None:
    with ptxrun.registered(*arrays) as addresses:
        module(make, weights, wide).launch(None, 2, 256, [np.int64(x) for x in (*addresses, arrays[0].size)])


def converters(bits: int, wide: bool) -> Any:
    """Return a function that splits, and one that joins."""

    def split(patterns: Patterns, bits: int) -> tuple[Array, Array]:
        high, low = np.empty(patterns.size, np.uint16), np.empty(patterns.size, LOW[bits])
        run(make_write, bits, wide, [patterns.view(np.float32), ONE, np.zeros_like(high), high, low])
        return high, low

    def join(high: Array, low: Array) -> Patterns:
        values = np.empty(high.size, np.float32)
        run(make_read, bits, wide, [high, low, values])
        return values.view(np.uint32)

    return split, join


def rounding(wide: bool) -> Any:
    """Return a function that rounds at random."""

    def round_(patterns: Patterns, u: Array) -> Array:
        rounded = np.empty(patterns.size, np.uint16)
        run(make_write, STOCHASTIC, wide, [patterns.view(np.float32), ONE, u, rounded, np.zeros(0, np.int8)])
        return rounded

    return round_


@pytest.fixture(autouse=True)
def empty_memory() -> Iterator[None]:
    yield
    ptxrun.unregister()


@both
@all_bits
def test_parts_at_every_boundary(bits: int, wide: bool) -> None:
    check_parts(boundary_patterns(), bits, *converters(bits, wide))


@both
@all_bits
def test_any_two_parts_are_joined(bits: int, wide: bool) -> None:
    high, low, expected = any_parts(bits)
    assert (converters(bits, wide)[1](high, low) == expected).all()


@both
@pytest.mark.parametrize("least", [True, False])
def test_rounding_at_every_boundary(least: bool, wide: bool) -> None:
    patterns = boundary_patterns()
    u = (0x10000 - (patterns & np.uint32(0xFFFF)) - np.uint32(not least)).clip(0, 0xFFFF).astype(np.uint16)
    check_rounding(patterns, u, rounding(wide))


@both
@pytest.mark.exhaustive
def test_every_two_parts_of_24_bits_are_joined(wide: bool) -> None:
    for first in range(0, 1 << 24, CHUNK):
        parts = np.arange(first, first + CHUNK, dtype=np.uint32)
        high, low = (parts >> np.uint32(8)).astype(np.uint16), parts.astype(np.uint8).view(np.int8)
        assert (converters(24, wide)[1](high, low) == joined(high, low)).all()


@pytest.mark.exhaustive
@all_bits
def test_every_float32_is_split_and_joined(bits: int) -> None:
    for first in range(0, 1 << 32, CHUNK):
        patterns = np.arange(first, first + CHUNK, dtype=np.uint64).astype(np.uint32)
        check_parts(patterns, bits, *converters(bits, True))


@pytest.mark.exhaustive
def test_every_float32_is_rounded_at_random() -> None:
    rng = np.random.default_rng(0)
    for first in range(0, 1 << 32, CHUNK):
        patterns = np.arange(first, first + CHUNK, dtype=np.uint64).astype(np.uint32)
        check_rounding(patterns, rng.integers(0, 1 << 16, CHUNK, dtype=np.uint16), rounding(True))

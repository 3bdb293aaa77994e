"""Every float32 as a 16-bit weight, in the reference and in the CPU kernels."""

from __future__ import annotations

import functools
from typing import Any

import numba
import numpy as np
import pytest

from lion import reference
from lion.cpu_kernels.device import load, store
from lion.cpu_kernels.rounding import read, read_pair, write, write_pair
from lion.reference.rounding import BFLOAT16, STOCHASTIC
from tests.differential import cpu_twins
from tests.differential.every_weight import (
    LOW,
    Array,
    Join,
    Patterns,
    Round,
    Split,
    any_parts,
    boundary_patterns,
    check_parts,
    check_rounding,
)

CHUNK = 1 << 23

pytestmark = pytest.mark.skipif(cpu_twins.DISABLE_JIT, reason="Python is too slow for so many values")
all_bits = pytest.mark.parametrize("bits", LOW)


@functools.cache
def loops(mode: int, paired: bool) -> tuple[Any, Any]:
    """Return loops over the kernels' write and read, which the compiler vectorises as it does theirs."""

    @numba.njit(nogil=True, error_model="numpy")
    def write_all(values: int, size: int, param: int, place: int) -> None:
        if paired:
            for i in range(size // 2):
                even, odd = load("float32", values, 2 * i), load("float32", values, 2 * i + 1)
                write_pair(mode, param, place, i, even, odd)
        else:
            for i in range(size):
                write(mode, param, place, i, load("float32", values, i))

    @numba.njit(nogil=True, error_model="numpy")
    def read_all(param: int, place: int, size: int, values: int) -> None:
        if paired:
            for i in range(size // 2):
                even, odd = read_pair(mode, param, place, i)
                store("float32", values, 2 * i, even)
                store("float32", values, 2 * i + 1, odd)
        else:
            for i in range(size):
                store("float32", values, i, read(mode, param, place, i))

    return write_all, read_all


def by_kernel(paired: bool, step: int = 1) -> tuple[Split, Join, Round]:
    """Return what the kernels do; with step -1 values are at each other's places in their pairs."""

    def split(patterns: Patterns, bits: int) -> tuple[Array, Array]:
        high, low = np.empty(patterns.size, np.uint16), np.empty(patterns.size, LOW[bits])
        ordered = patterns[::step].copy()
        loops(bits, paired)[0](ordered.ctypes.data, ordered.size, high.ctypes.data, low.ctypes.data)
        return high[::step], low[::step]

    def join(high: Array, low: Array) -> Patterns:
        values, high, low = np.empty(high.size, np.uint32), high[::step].copy(), low[::step].copy()
        read_all = loops(16 + 8 * low.itemsize, paired)[1]
        read_all(high.ctypes.data, low.ctypes.data, high.size, values.ctypes.data)
        return values[::step]

    def round_at_random(patterns: Patterns, u: Array) -> Array:
        rounded, patterns, u = np.empty(patterns.size, np.uint16), patterns[::step].copy(), u[::step].copy()
        write_all = loops(STOCHASTIC, paired)[0]
        write_all(patterns.ctypes.data, patterns.size, rounded.ctypes.data, u.ctypes.data)
        return rounded[::step]

    return split, join, round_at_random


def split_by_reference(patterns: Patterns, bits: int) -> tuple[Array, Array]:
    high, low = reference.split(patterns.view(np.float32), bits)
    return high.view(np.uint16), low


def join_by_reference(high: Array, low: Array) -> Patterns:
    return reference.join(high.view(BFLOAT16), low).view(np.uint32)


def round_by_reference(patterns: Patterns, u: Array) -> Array:
    return reference.stochastic_round(patterns.view(np.float32), u).view(np.uint16)


IMPLEMENTATIONS = {
    "reference": (split_by_reference, join_by_reference, round_by_reference),
    "kernel": by_kernel(paired=False),
    "kernel, in pairs": by_kernel(paired=True),
    "kernel, in turned pairs": by_kernel(paired=True, step=-1),
}
each = pytest.mark.parametrize("name", IMPLEMENTATIONS)


@each
@all_bits
def test_parts_at_every_boundary(bits: int, name: str) -> None:
    check_parts(boundary_patterns(), bits, *IMPLEMENTATIONS[name][:2])


@each
@all_bits
def test_any_two_parts_are_joined(bits: int, name: str) -> None:
    high, low, expected = any_parts(bits)
    assert (IMPLEMENTATIONS[name][1](high, low) == expected).all()


@each
@pytest.mark.parametrize("least", [True, False])
def test_rounding_at_every_boundary(least: bool, name: str) -> None:
    patterns = boundary_patterns()
    # The least bits that round up, and the greatest that do not.
    u = (0x10000 - (patterns & np.uint32(0xFFFF)) - np.uint32(not least)).clip(0, 0xFFFF).astype(np.uint16)
    check_rounding(patterns, u, IMPLEMENTATIONS[name][2])


@pytest.mark.exhaustive
@each
@all_bits
def test_every_float32_is_split_and_joined(bits: int, name: str) -> None:
    for first in range(0, 1 << 32, CHUNK):
        patterns = np.arange(first, first + CHUNK, dtype=np.uint64).astype(np.uint32)
        check_parts(patterns, bits, *IMPLEMENTATIONS[name][:2])


@pytest.mark.exhaustive
@each
def test_every_float32_is_rounded_at_random(name: str) -> None:
    rng = np.random.default_rng(0)
    for first in range(0, 1 << 32, CHUNK):
        patterns = np.arange(first, first + CHUNK, dtype=np.uint64).astype(np.uint32)
        check_rounding(patterns, rng.integers(0, 1 << 16, CHUNK, dtype=np.uint16), IMPLEMENTATIONS[name][2])

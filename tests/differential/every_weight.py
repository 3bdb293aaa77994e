"""What becomes of a float32 that is kept as a 16-bit weight, by definition and with 32-bit integers only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Patterns = npt.NDArray[np.uint32]
Split = Callable[[Patterns, int], tuple[Array, Array]]
"""Returns the upper and lower parts of the float32 with these patterns, uint16 and int16 or int8."""
Join = Callable[[Array, Array], Patterns]
Round = Callable[[Patterns, npt.NDArray[np.uint16]], Array]

INFINITY, MAGNITUDE, QUIET_NAN = 0x7F800000, 0x7FFFFFFF, 0x7FC0
LOW = {24: np.dtype(np.int8), 32: np.dtype(np.int16)}


def boundary_patterns() -> Patterns:
    """Return patterns, a multiple of 8, around all where a part changes its direction, of both signs, and NaNs."""
    high = np.arange(0x7F81, dtype=np.int64) << 16
    near = [-0x8001, -0x8000, -0x7FFF, -0x101, -0x81, -0x80, -0x7F, -1, 0, 1, 0x7F, 0x80, 0x81, 0x17F, 0x180, 0x181]
    positive = np.unique((high[:, None] + near).clip(0, MAGNITUDE))
    positive = np.append(positive, [0x7F800001, 0x7FC00000, 0x7FFFFFFF])
    patterns = np.concatenate([positive, positive | 0x80000000]).astype(np.uint32)
    return np.resize(patterns, -(-patterns.size // 8) * 8)


def any_parts(bits: int) -> tuple[Array, Array, Patterns]:
    """Return every upper part with some lower ones, ±0 with all, also those of no value; and what they are."""
    least = -(2 ** (bits - 17))
    every = np.arange(least, -least)
    some = np.random.default_rng(0).integers(least, -least, 8 << 16)
    high = np.concatenate([np.repeat(np.arange(1 << 16), 8), np.repeat([0, 0x8000], every.size)]).astype(np.uint16)
    low = np.concatenate([some, every, every]).astype(LOW[bits])
    return high, low, joined(high, low)


def joined(high: Array, low: Array) -> Patterns:
    """Return what upper and lower parts are, by definition."""
    added = np.where((high % 0x8000 == 0) & (low < 0), 0, low).astype(np.int32) << (16 - 8 * low.itemsize)
    return (high.astype(np.uint32) << np.uint32(16)) + added.view(np.uint32)


def check_parts(patterns: Patterns, bits: int, split: Split, join: Join) -> None:
    """Split and join float32 values, and fail unless all is as specified: parts, what is lost, NaN, and once more."""
    high, low = split(patterns, bits)
    joined = join(high, low)
    assert high.dtype == np.uint16 and low.dtype == LOW[bits]
    nan = (patterns & np.uint32(MAGNITUDE)) > INFINITY
    assert (high[nan] == QUIET_NAN).all() and not low[nan].any(), "NaN"
    expected = patterns
    if bits == 24:
        below, rest = patterns >> np.uint32(8), patterns & np.uint32(0xFF)
        up = (rest > 0x80) | ((rest == 0x80) & (below & np.uint32(1) == 1))
        expected = (below + up) << np.uint32(8)
    expected = np.where(nan, np.uint32(QUIET_NAN << 16), expected)
    assert (joined == expected).all(), f"joined: {patterns[joined != expected][0]:#x}"
    nearest = (joined >> np.uint32(16)) + (joined >> np.uint32(15) & np.uint32(1))
    assert (high == nearest).all(), f"upper part: {patterns[high != nearest][0]:#x}"
    rest = (joined - (high.astype(np.uint32) << np.uint32(16))) >> np.uint32(32 - bits)
    assert (low == rest.astype(LOW[bits])).all(), f"lower part: {patterns[low != rest.astype(LOW[bits])][0]:#x}"
    again, low_again = split(joined, bits)
    assert (again == high).all() and (low_again == low).all(), "not idempotent"


def check_rounding(patterns: Patterns, u: npt.NDArray[np.uint16], round_: Round) -> None:
    """Round float32 values at random, and fail unless the bits are those that are specified."""
    nan = (patterns & np.uint32(MAGNITUDE)) > INFINITY
    # No sum of those that are not NaN needs more than 32 bits.
    expected = np.where(nan, QUIET_NAN, (patterns + u) >> np.uint32(16))
    found = round_(patterns, u)
    assert (found == expected).all(), f"{patterns[found != expected][0]:#x}"

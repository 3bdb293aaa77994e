"""Rounding to float16 and bfloat16, and back, by definition: from the values that the 16-bit patterns stand for.

To nearest, ties to the even pattern, beyond the largest finite value by half a unit to infinity. No library's
conversion takes part.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

FRACTION_BITS = {"float16": 10, "bfloat16": 7}
INFINITY = {"float16": 0x7C00, "bfloat16": 0x7F80}
FLOAT32_INFINITY = 0x7F800000
SIGN = 0x80000000


def magnitudes(dtype: str) -> npt.NDArray[np.float64]:
    """Return the values of the patterns from 0 to infinity, where infinity is what would follow the largest."""
    fraction_bits = FRACTION_BITS[dtype]
    pattern = np.arange(INFINITY[dtype] + 1)
    bias = 2 ** (14 - fraction_bits) - 1
    exponent, fraction = pattern >> fraction_bits, pattern & (2**fraction_bits - 1)
    significand = np.where(exponent > 0, 2**fraction_bits, 0) + fraction
    return np.ldexp(significand.astype(np.float64), np.maximum(exponent, 1) - bias - fraction_bits)


@functools.cache
def last_patterns(dtype: str) -> npt.NDArray[np.int64]:
    """Return, for each pattern from 0 to infinity, the greatest float32 pattern without a sign that rounds to it."""
    values = magnitudes(dtype)
    middles = (values[:-1] + values[1:]) / 2
    exact = middles.astype(np.float32)
    assert (exact == middles).all()
    even = np.arange(len(middles)) % 2 == 0
    return np.append(exact.view(np.int32).astype(np.int64) - np.where(even, 0, 1), FLOAT32_INFINITY)


def rounded(dtype: str, patterns: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint16]:
    """Return the 16-bit patterns of float32 patterns; for every NaN 0xFFFF."""
    magnitude = patterns & np.uint32(SIGN - 1)
    found = np.searchsorted(last_patterns(dtype), magnitude, side="left").astype(np.uint16)
    found |= (patterns >> np.uint32(16)).astype(np.uint16) & np.uint16(0x8000)
    found[magnitude > FLOAT32_INFINITY] = 0xFFFF
    return found


def rounded_range(dtype: str, first: int, count: int) -> npt.NDArray[np.uint16]:
    """Return what :func:`rounded` does for ``count`` consecutive patterns of one sign, without a search for each."""
    sign, begin = first & SIGN, first & (SIGN - 1)
    ends = np.clip(last_patterns(dtype) + 1 - begin, 0, count)
    lengths = np.diff(ends, prepend=0)
    found = np.repeat((np.arange(len(lengths)) | sign >> 16).astype(np.uint16), lengths)
    return np.append(found, np.full(count - len(found), 0xFFFF, np.uint16))


def assert_patterns(actual: npt.NDArray[np.uint16], expected: npt.NDArray[np.uint16], dtype: str) -> None:
    """Fail unless 16-bit patterns are equal, any NaN where 0xFFFF is expected."""
    wrong = actual != expected
    wrong &= ~((expected == 0xFFFF) & ((actual & 0x7FFF) > INFINITY[dtype]))
    assert not wrong.any(), f"{wrong.sum()} differ, the first: {np.flatnonzero(wrong)[0]:#x}"


def boundary_patterns(dtype: str) -> npt.NDArray[np.uint32]:
    """Return the float32 patterns where the result changes, and the neighbours of these, and some NaNs."""
    last = last_patterns(dtype)
    around = np.unique((last[:, None] + np.arange(-2, 4)).clip(0, 0x7FFFFFFF))
    around = np.append(around, [0x7F800001, 0x7FC00000, 0x7FFFFFFF])
    return np.concatenate([around, around | SIGN]).astype(np.uint32)


def widened(dtype: str) -> npt.NDArray[np.float32]:
    """Return the float32 values of all 65,536 patterns; NaN for every NaN."""
    finite = magnitudes(dtype)[:-1].astype(np.float32)
    values = np.append(finite, np.float32(np.inf))
    values = np.append(values, np.full(0x8000 - len(values), np.nan, np.float32))
    return np.append(values, -values)

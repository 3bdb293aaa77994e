"""Blocks of 256 that hold every float32 there is, and the codes they get by definition."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from lion import reference

THRESHOLDS = reference.quantize_thresholds(reference.create_dynamic_map())
ONE, INFINITY, SIGN = 0x3F800000, 0x7F800000, 0x80000000
# All values of an exponent fit: 255 of them in a block, after its greatest magnitude.
BLOCKS = -(-((1 << 23) + 1) // 255)


def around(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return float32 values and their neighbours within two."""
    order = values.view(np.int32)
    order = (order ^ ((order >> 31) & 0x7FFFFFFF))[:, None] + np.arange(-2, 3)
    order = order.reshape(-1).astype(np.int32)
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).view(np.float32)


def nearest_codes(quotients: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Return the codes of quotients that ascend or descend.

    The places of the thresholds say it faster than a search for each quotient.
    """
    if quotients[0] > quotients[-1]:
        return nearest_codes(quotients[::-1])[::-1]
    begins = np.searchsorted(quotients, THRESHOLDS, side="right")
    return np.repeat(np.arange(256, dtype=np.uint8), np.diff(begins, prepend=0, append=quotients.size))


def magnitudes_of_quotients(count: int) -> Iterator[npt.NDArray[np.float32]]:
    """Give the magnitudes that a value over its block's greatest can have, ascending, so many at a time.

    Rounding takes them to 1 + 2**-22 at most: the reciprocal of the greatest value is off by 2**-23 of itself where
    it is no normal number.
    """
    for first in range(0, ONE + 3, count):
        yield np.minimum(np.arange(first, first + count, dtype=np.uint32), np.uint32(ONE + 2)).view(np.float32)


def finite_blocks() -> Iterator[tuple[npt.NDArray[np.float32], np.float32, npt.NDArray[np.uint8]]]:
    """Give all finite values, those up to 1 as their own quotients.

    Yields:
        Blocks, one array used again and again; the greatest magnitude of each; the codes of all elements but it.
    """
    blocks = np.empty((BLOCKS, 256), np.float32)
    for exponent in range(255):
        first, last, maximum = exponent << 23, (exponent + 1 << 23) - 1, np.float32(1)
        if exponent == 126:
            last = ONE
        if exponent > 126:
            maximum = np.ldexp(maximum, exponent - 126) if exponent < 254 else np.finfo(np.float32).max
        magnitudes = np.minimum(np.arange(first, first + BLOCKS * 255, dtype=np.uint32), np.uint32(last))
        for sign in (0, SIGN):
            values = (magnitudes | np.uint32(sign)).view(np.float32)
            blocks[:, 0] = maximum
            blocks[:, 1:] = values.reshape(BLOCKS, 255)
            yield blocks, maximum, nearest_codes(values * (np.float32(1) / maximum)).reshape(BLOCKS, 255)


def not_finite_blocks() -> Iterator[npt.NDArray[np.float32]]:
    """Give every NaN and both infinities, each in a block of its own, at all places."""
    count = 1 << 15
    for first in [*range(INFINITY, SIGN, count), *range(INFINITY + SIGN, 1 << 32, count)]:
        blocks = np.ones((count, 256), np.float32)
        patterns = np.arange(first, first + count, dtype=np.uint64).astype(np.uint32)
        blocks.view(np.uint32)[np.arange(count), np.arange(count) % 256] = patterns
        yield blocks


def paired(blocks: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return a copy of blocks in which the even elements come first, then the odd ones."""
    return np.concatenate([blocks[:, ::2], blocks[:, 1::2]], axis=1)


def check_finite(codes: npt.NDArray[Any], absmax: npt.NDArray[Any], maximum: np.float32, expected: Any) -> None:
    """Fail unless blocks from :func:`finite_blocks` got their codes."""
    assert (absmax == maximum).all() and (codes[:, 0] == 255).all()
    np.testing.assert_array_equal(codes[:, 1:], expected)


def check_not_finite(codes: npt.NDArray[Any], absmax: npt.NDArray[Any]) -> None:
    """Fail unless blocks from :func:`not_finite_blocks` read back as NaN."""
    assert np.isnan(absmax).all() and (codes == 127).all()

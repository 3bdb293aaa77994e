"""16-bit weights: parameters with a lower part, and rounding at random, on raw addresses."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lion.cpu_kernels.device import MAGNITUDE, ROWS, TABLE, bits_to_float, float_to_bits, inlined, kernel, load, store
from lion.cpu_kernels.pool import Int64Array, enter, leave, run
from lion.reference.rounding import (
    LOW_DTYPES,
    MASTER_24,
    MASTER_32,
    NEAREST,
    PHILOX_KEY_STEPS,
    PHILOX_MULTIPLIERS,
    QUIET_NAN,
    ROUNDS,
    STOCHASTIC,
)

# Columns of the rows that a kernel gets: with a lower part LOW alone, for rounding at random the others.
LOW = 0
SEED, OFFSET, PARAMETER, NUMBER = range(4)

_NO_ROWS = np.empty((0, 0), np.int64)

# Elements that random bits are made for at once, and 4-byte items that hold them from any element of a group of 8 on.
SPAN = 256
RANDOM_ITEMS = SPAN // 2 + 4

NAN_BITS, ONE_HALF, WORD = np.uint32(QUIET_NAN), np.uint32(0x8000), np.uint64(0xFFFFFFFF)
UPPER_HALF, LOWER_HALF = np.uint32(0xFFFF0000), np.uint32(0xFFFF)
MULTIPLIERS = np.uint64(PHILOX_MULTIPLIERS[0]), np.uint64(PHILOX_MULTIPLIERS[1])
KEY_STEPS = np.uint64(PHILOX_KEY_STEPS[0]), np.uint64(PHILOX_KEY_STEPS[1])


class Stochastic(NamedTuple):
    """Parameters are rounded to bfloat16 at random, see :func:`lion.reference.stochastic_round`.

    The number of the step is one more than the step counter holds; 1 for a parameter that has none.

    Attributes:
        seed: Seed of all random bits, 0 to 2**64 - 1.
        parameters: int64 array: the parameters' places among all that share the seed.
        offsets: int64 array: the index, in the whole parameter, of each tensor's first element.
    """

    seed: int
    parameters: Int64Array
    offsets: Int64Array


class Master(NamedTuple):
    """Parameters are the upper parts of master values, see :func:`lion.reference.split`.

    Attributes:
        bits: Bits of a master value: 24 or 32.
        lows: int64 array: addresses of the lower parts, int8 or int16, updated in place.
    """

    bits: int
    lows: Int64Array


Weights = Stochastic | Master | None


def mode_of(dtype: str, weights: Weights) -> int:
    """Return how parameters are kept, as kernels are told.

    Raises:
        ValueError: If ``weights`` is given for parameters that are not bfloat16, or its bits are neither 24 nor 32.
    """
    if weights is None:
        return NEAREST
    if dtype != "bfloat16":
        raise ValueError(f"Invalid dtype: {dtype!r}; stochastic rounding and master values are for 'bfloat16'")
    if isinstance(weights, Stochastic):
        return STOCHASTIC
    if weights.bits not in LOW_DTYPES:
        raise ValueError(f"Invalid bits: {weights.bits}; 24 or 32 is allowed")
    return weights.bits


def rows_of(weights: Weights, steps: Int64Array) -> npt.NDArray[np.int64]:
    """Return what kernels need to know of each tensor, as an int64 array with a row per tensor.

    Args:
        weights: How the parameters are kept.
        steps: int64 array: addresses of float32 step counters that are still to be counted up; 0 for none.
    """
    if weights is None:
        return _NO_ROWS
    if isinstance(weights, Master):
        return weights.lows.reshape(-1, 1)
    rows = np.empty((steps.size, 4), np.int64)
    rows[:, SEED] = np.uint64(weights.seed).view(np.int64)
    rows[:, OFFSET], rows[:, PARAMETER] = weights.offsets, weights.parameters
    run(_number_kernel(), 1, None, steps, rows)
    return rows


@functools.cache
def _number_kernel() -> Any:
    # Read before the update, whose threads count the steps while others are still at work.
    @kernel("", TABLE, ROWS)
    def number(control, steps, rows):  # type: ignore[no-untyped-def]
        mode = enter(control)
        for tensor in range(steps.size):
            step = np.float32(0.0)
            if steps[tensor] != 0:
                step = load("float32", steps[tensor], 0)
            rows[tensor, NUMBER] = np.int64(step + np.float32(1.0))
        leave(control, mode)

    return number


@inlined
def prepare(mode: int, rows: Any, tensor: int, begin: int, end: int, randoms: int) -> int:
    """Return the address that :func:`read` and :func:`write` take for elements of a tensor.

    Args:
        mode: How the parameter is kept.
        rows: int64 array of shape (n, 1) or (n, 4), see :func:`rows_of`.
        tensor: Index of the tensor.
        begin: First element.
        end: Its end; for rounding at random at most ``SPAN`` elements on.
        randoms: Address of ``RANDOM_ITEMS`` 4-byte items on the stack, where random bits are written.
    """
    if mode == NEAREST:
        return 0
    if mode != STOCHASTIC:
        return rows[tensor, LOW]
    element = rows[tensor, OFFSET] + begin
    groups = (element + (end - begin) + 7) // 8 - element // 8
    draw(rows[tensor, SEED], element // 8, groups, rows[tensor, NUMBER], rows[tensor, PARAMETER], randoms)
    return randoms + 2 * (element % 8 - begin)


@inlined
def draw(seed: int, first: int, groups: int, number: int, parameter: int, randoms: int) -> None:
    """Write the random bits of consecutive groups of 8 elements, see :func:`lion.reference.random_bits`.

    A word is kept in 64 bits, of which only the product is used in full: so vectors hold products as they come.
    """
    low, high = np.uint64(seed) & WORD, np.uint64(seed) >> np.uint64(32)
    for i in range(groups):
        group = np.uint64(first + i)
        c0, c1, c2, c3 = group & WORD, group >> np.uint64(32), np.uint64(number), np.uint64(parameter)
        k0, k1 = low, high
        for _ in range(ROUNDS):
            a, b = (c0 & WORD) * MULTIPLIERS[0], (c2 & WORD) * MULTIPLIERS[1]
            c0, c1 = (b >> np.uint64(32)) ^ c1 ^ k0, b
            c2, c3 = (a >> np.uint64(32)) ^ c3 ^ k1, a
            k0, k1 = k0 + KEY_STEPS[0], k1 + KEY_STEPS[1]
        store("uint64", randoms, 2 * i, (c0 & WORD) | (c1 << np.uint64(32)))
        store("uint64", randoms, 2 * i + 1, (c2 & WORD) | (c3 << np.uint64(32)))


@inlined
def read(mode: int, param: int, place: int, i: int) -> np.float32:
    """Return an element of a bfloat16 parameter, joined with its lower part if it has one."""
    value = load("bfloat16", param, i)
    if mode == MASTER_32:
        value = _joined(value, load("int16", place, i))
    elif mode == MASTER_24:
        value = _joined(value, np.uint32(load("int8", place, i) << np.uint32(8)))
    return value


@inlined
def write(mode: int, param: int, place: int, i: int, value: np.float32) -> None:
    """Write an element of a bfloat16 parameter, rounded at random or split."""
    b = _bits(value)
    if mode == STOCHASTIC:
        b = np.uint32(b + load("uint16", place, i))
    else:
        if mode == MASTER_24:
            b = _rounded(b, 8)
            store("uint8", place, i, np.uint32(b >> np.uint32(8)))
            # What is left of the lower byte carries nothing into the upper part.
        else:
            store("uint16", place, i, b)
        b = np.uint32(b + ONE_HALF)
    store("uint16", param, i, np.uint32(b >> np.uint32(16)))


@inlined
def load_pair(address: int, i: int) -> tuple[np.float32, np.float32]:
    """Return two neighbouring bfloat16 as float32.

    They are one word in memory, so that vectors need not be widened or, by :func:`write_pair`, narrowed.
    """
    pair = load("uint32", address, i)
    return bits_to_float(np.uint32(pair << np.uint32(16))), bits_to_float(np.uint32(pair & UPPER_HALF))


@inlined
def read_pair(mode: int, param: int, place: int, i: int) -> tuple[np.float32, np.float32]:
    """Return two neighbouring elements of a bfloat16 parameter, joined with their lower parts if they have some."""
    even, odd = load_pair(param, i)
    if mode == MASTER_32:
        low = load("uint32", place, i)
        even = _joined(even, np.uint32(np.int32(np.uint32(low << np.uint32(16))) >> np.int32(16)))
        odd = _joined(odd, np.uint32(np.int32(low) >> np.int32(16)))
    elif mode == MASTER_24:
        low = load("int16", place, i)
        even = _joined(even, np.uint32(np.int32(np.uint32(low << np.uint32(24))) >> np.int32(16)))
        odd = _joined(odd, np.uint32(low & np.uint32(0xFFFFFF00)))
    return even, odd


@inlined
def write_pair(mode: int, param: int, place: int, i: int, even: np.float32, odd: np.float32) -> None:
    """Write two neighbouring elements of a bfloat16 parameter, rounded to nearest or at random, or split."""
    b, d = _bits(even), _bits(odd)
    if mode == NEAREST:
        b, d = _rounded(b, 16), _rounded(d, 16)
    elif mode == STOCHASTIC:
        u = load("uint32", place, i)
        b, d = np.uint32(b + np.uint32(u & LOWER_HALF)), np.uint32(d + np.uint32(u >> np.uint32(16)))
    else:
        if mode == MASTER_24:
            b, d = _rounded(b, 8), _rounded(d, 8)
            low = np.uint32(np.uint32(b >> np.uint32(8)) & np.uint32(0xFF))
            store("uint16", place, i, np.uint32(low | np.uint32(d & np.uint32(0xFF00))))
        else:
            store("uint32", place, i, np.uint32(np.uint32(b & LOWER_HALF) | np.uint32(d << np.uint32(16))))
        b, d = np.uint32(b + ONE_HALF), np.uint32(d + ONE_HALF)
    store("uint32", param, i, np.uint32(np.uint32(b >> np.uint32(16)) | np.uint32(d & UPPER_HALF)))


@inlined
def _joined(value: np.float32, low: np.uint32) -> np.float32:
    high = float_to_bits(value)
    b = np.uint32(high + low)
    # Only a negative lower part of ±0 turns the sign.
    return value if np.uint32(b ^ high) > MAGNITUDE else bits_to_float(b)


@inlined
def _bits(value: np.float32) -> np.uint32:
    return float_to_bits(value) if value == value else NAN_BITS


@inlined
def _rounded(b: np.uint32, count: int) -> np.uint32:
    """Return bits whose upper part is rounded to nearest even; so many lower ones are left over."""
    odd = np.uint32(np.uint32(b >> np.uint32(count)) & np.uint32(1))
    return np.uint32(b + np.uint32(odd + np.uint32((1 << (count - 1)) - 1)))

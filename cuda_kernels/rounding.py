"""16-bit weights on the GPU: parameters with a lower part, and rounding at random."""

from __future__ import annotations

from typing import Any

import numpy as np

from lion.cuda_kernels.device import (
    HALVES,
    TOGETHER,
    add,
    add_or_zero,
    add_rounding_24,
    device,
    from_bits,
    half_above_byte,
    high_halves,
    int32,
    load_8,
    load_8_of_1,
    load_8_of_2,
    load_f32,
    load_float,
    load_i64,
    load_u8,
    load_u16,
    low_halves,
    multiply_words,
    quiet_bits,
    second_bytes,
    shuffle_xor_u32,
    signed_half,
    store_8,
    store_8_of_1,
    store_8_of_2,
    store_float,
    store_u8,
    store_u16,
    to_floats,
    uint32,
    wrapping_add,
)
from lion.cuda_kernels.table import FIRST_ELEMENT, LOW, PARAMETER, SEED, STEP, WIDEST
from lion.reference.rounding import (
    MASTER_24,
    MASTER_32,
    NEAREST,
    PHILOX_KEY_STEPS,
    PHILOX_MULTIPLIERS,
    ROUNDS,
    STOCHASTIC,
)

MAGNITUDE, SIGN = np.uint32(0x7FFFFFFF), np.uint32(0x80000000)
ONE_HALF, MINUS_ONE_HALF, WITHOUT_SIGN_24 = np.uint32(0x8000), np.uint32(0xFFFF8000), np.uint32(0x7FFFFF00)
LOW_HALF_SIGNS, LOW_BYTE_SIGNS = np.uint32(0x80008000), np.uint32(0x80808080)
MULTIPLIERS = np.uint32(PHILOX_MULTIPLIERS[0]), np.uint32(PHILOX_MULTIPLIERS[1])
KEY_STEPS = np.uint32(PHILOX_KEY_STEPS[0]), np.uint32(PHILOX_KEY_STEPS[1])


def low_itemsize(weights: int) -> int:
    """Return the bytes of a lower part; 0 where there is none."""
    return {MASTER_24: 1, MASTER_32: 2}.get(weights, 0)


@device
def step_number(row: int, counted: bool) -> np.uint32:
    """Return the number of the step, which the tensor's counter holds once it is counted; 1 where there is none."""
    address = load_i64(row + STEP)
    if address == 0:
        return uint32(1)
    step = load_f32(address)
    return uint32(np.int64(step if counted else add(step, np.float32(1))))


@device
def read_stream(weights: int, table: int, row: int, counted: bool) -> Any:
    """Return what a tensor's random bits depend on besides the element: the seed's words, the step, the parameter."""
    if weights != STOCHASTIC:
        return uint32(0), uint32(0), uint32(0), uint32(0)
    seed = load_i64(table + SEED)
    return uint32(seed), uint32(seed >> 32), step_number(row, counted), uint32(load_i64(row + PARAMETER))


@device
def random_words(weights: int, stream: Any, group: int) -> Any:
    """Return the four random words of eight elements, see ``lion.reference.random_bits``."""
    if weights != STOCHASTIC:
        return uint32(0), uint32(0), uint32(0), uint32(0)
    k0, k1, c2, c3 = stream
    c0, c1 = uint32(group), uint32(group >> 32)
    for _ in range(ROUNDS):
        a_low, a_high = multiply_words(c0, MULTIPLIERS[0])
        b_low, b_high = multiply_words(c2, MULTIPLIERS[1])
        c0, c1 = uint32(uint32(b_high ^ c1) ^ k0), b_low
        c2, c3 = uint32(uint32(a_high ^ c3) ^ k1), a_low
        k0, k1 = wrapping_add(k0, KEY_STEPS[0]), wrapping_add(k1, KEY_STEPS[1])
    return c0, c1, c2, c3


@device
def first_group(gap: int, element: int, thread: int) -> int:
    """Return the group of eight whose random words a lane draws; ``element`` is the index of its first element."""
    return (element >> 3) + (16 if gap == HALVES and thread & 1 else 0)


@device
def random_words_of_8(weights: int, gap: int, stream: Any, group: int, thread: int) -> Any:
    """Return the random words of a lane's eight elements, which in halves are two halves of two lanes' groups."""
    words = random_words(weights, stream, group)
    if weights != STOCHASTIC or gap == TOGETHER:
        return words
    a, b, c, d = words
    odd = thread & 1
    e = shuffle_xor_u32(a if odd else c, int32(1))
    f = shuffle_xor_u32(b if odd else d, int32(1))
    return e if odd else a, f if odd else b, c if odd else e, d if odd else f


@device
def random_half(weights: int, stream: Any, element: int) -> np.uint32:
    """Return the random bits of one element."""
    a, b, c, d = random_words(weights, stream, element >> 3)
    place = element & 7
    word = (a if place < 2 else b) if place < 4 else (c if place < 6 else d)
    return uint32(word >> uint32(16)) if place & 1 else uint32(word & uint32(0xFFFF))


@device
def read_weights(weights: int, row: int) -> Any:
    """Return the address of a tensor's lower part and its first element's index in the whole parameter, or zeros."""
    low = load_i64(row + LOW) if weights == MASTER_24 or weights == MASTER_32 else 0
    first = load_i64(row + FIRST_ELEMENT) if weights == STOCHASTIC else 0
    return low, first


@device
def misaligned(weights: int, low: int, first: int) -> int:
    """Return a number whose lower 4 bits are 0 where eight elements can be taken at once."""
    return low << 1 | first & 7 if weights == MASTER_24 else low | first & 7


@device
def rounded(weights: int, pattern: np.uint32) -> np.uint32:
    """Return the bits of a master value with the upper part in the upper half, rounded with ties away from zero.

    The lower part is below it with its sign turned over, for ``ONE_HALF`` was added.
    """
    if weights == MASTER_24:
        return add_rounding_24(pattern)
    return wrapping_add(pattern, ONE_HALF)


@device
def joined_32(high: np.uint32, low: np.uint32) -> np.float32:
    """Return a master value; a negative lower part of ±0, where the magnitude would be below 0, counts as 0."""
    magnitude = add_or_zero(uint32(high & MAGNITUDE), low)
    return from_bits(uint32(uint32(high & SIGN) | magnitude))


@device
def joined_24(word: np.uint32, low_word: np.uint32, place: int) -> np.float32:
    """Return a master value of 24 bits, one of two in ``word``, by the place of its lower part among four."""
    # With its sign turned over, the lower part is 128 more and never negative.
    pattern = half_above_byte(word, uint32(low_word ^ LOW_BYTE_SIGNS), uint32(place))
    magnitude = add_or_zero(uint32(pattern & WITHOUT_SIGN_24), MINUS_ONE_HALF)
    return from_bits(uint32(uint32(pattern & SIGN) | magnitude))


@device
def read_weight(weights: int, dtype: int, param: int, low: int) -> np.float32:
    """Return an element of a parameter, joined with its lower part if it has one."""
    if weights == MASTER_32:
        return joined_32(uint32(load_u16(param) << uint32(16)), signed_half(load_u16(low), uint32(0)))
    if weights == MASTER_24:
        return joined_24(load_u16(param), load_u8(low), 0)
    return load_float(dtype, param)


@device
def write_weight(weights: int, dtype: int, param: int, low: int, value: np.float32, random: np.uint32) -> None:
    """Write an element of a parameter: to nearest, at random, or split."""
    if weights == NEAREST:
        store_float(dtype, param, value)
    else:
        pattern = quiet_bits(value)
        if weights == STOCHASTIC:
            pattern = wrapping_add(pattern, random)
        else:
            pattern = rounded(weights, pattern)
            turned = uint32(pattern ^ ONE_HALF)
            if weights == MASTER_32:
                store_u16(low, turned)
            else:
                store_u8(low, uint32(turned >> uint32(8)))
        store_u16(param, uint32(pattern >> uint32(16)))


@device
def load_8_weights(
    weights: int, dtype: int, gap: int, param: int, low: int, words: np.ndarray, low_words: np.ndarray
) -> None:
    """Fill ``words`` and ``low_words`` with the bits of eight elements of a parameter and of their lower parts."""
    load_8(dtype, gap, WIDEST, param, words)
    if weights == MASTER_32:
        pairs = load_8_of_2(gap, WIDEST, low)
        for i in range(4):
            low_words[i] = pairs[i]
    elif weights == MASTER_24:
        low_words[0], low_words[1] = load_8_of_1(gap, low)


@device
def join_8_weights(weights: int, dtype: int, words: np.ndarray, low_words: np.ndarray, values: np.ndarray) -> None:
    """Fill ``values`` with the eight elements whose bits :func:`load_8_weights` has loaded."""
    if weights == MASTER_32:
        for i in range(4):
            values[2 * i] = joined_32(uint32(words[i] << uint32(16)), signed_half(low_words[i], uint32(0)))
            values[2 * i + 1] = joined_32(uint32(words[i] & uint32(0xFFFF0000)), signed_half(low_words[i], uint32(1)))
    elif weights == MASTER_24:
        for i in range(8):
            values[i] = joined_24(words[i // 2], low_words[i // 4], i % 4)
    else:
        to_floats(dtype, words, values)


@device
def round_pair(a: np.float32, b: np.float32, random: np.uint32) -> np.uint32:
    """Return two values rounded at random to bfloat16, in a word."""
    first = wrapping_add(quiet_bits(a), uint32(random & uint32(0xFFFF)))
    return high_halves(first, wrapping_add(quiet_bits(b), uint32(random >> uint32(16))))


@device
def write_8_weights(weights: int, dtype: int, gap: int, param: int, low: int, values: np.ndarray, random: Any) -> None:
    """Write eight elements of a parameter where :func:`load_8_weights` reads them."""
    if weights == NEAREST:
        store_8(dtype, gap, param, values)
    elif weights == STOCHASTIC:
        store_8_of_2(
            gap,
            param,
            round_pair(values[0], values[1], random[0]),
            round_pair(values[2], values[3], random[1]),
            round_pair(values[4], values[5], random[2]),
            round_pair(values[6], values[7], random[3]),
        )
    else:
        a, b = rounded(weights, quiet_bits(values[0])), rounded(weights, quiet_bits(values[1]))
        c, d = rounded(weights, quiet_bits(values[2])), rounded(weights, quiet_bits(values[3]))
        e, f = rounded(weights, quiet_bits(values[4])), rounded(weights, quiet_bits(values[5]))
        g, h = rounded(weights, quiet_bits(values[6])), rounded(weights, quiet_bits(values[7]))
        store_8_of_2(gap, param, high_halves(a, b), high_halves(c, d), high_halves(e, f), high_halves(g, h))
        if weights == MASTER_32:
            store_8_of_2(
                gap,
                low,
                uint32(low_halves(a, b) ^ LOW_HALF_SIGNS),
                uint32(low_halves(c, d) ^ LOW_HALF_SIGNS),
                uint32(low_halves(e, f) ^ LOW_HALF_SIGNS),
                uint32(low_halves(g, h) ^ LOW_HALF_SIGNS),
            )
        else:
            store_8_of_1(
                gap,
                low,
                uint32(second_bytes(a, b, c, d) ^ LOW_BYTE_SIGNS),
                uint32(second_bytes(e, f, g, h) ^ LOW_BYTE_SIGNS),
            )

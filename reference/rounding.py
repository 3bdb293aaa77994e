"""16-bit weights that train: stochastic rounding, and bfloat16 parameters that are the upper part of a master value.

A new value whose distance to the old one is less than half a unit of bfloat16 is lost where it is rounded to nearest.
Rounded up or down at random it counts on average; with its lower bits kept apart it is not rounded at all.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt

from lion.reference.quantization import Float32Array

Array = npt.NDArray[Any]
Uint16Array = npt.NDArray[np.uint16]
Uint32Array = npt.NDArray[np.uint32]

BFLOAT16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
QUIET_NAN = 0x7FC00000
LOW_DTYPES: dict[int, np.dtype[Any]] = {24: np.dtype(np.int8), 32: np.dtype(np.int16)}
"""The dtype of the lower part, by the bits of a master value."""

NEAREST, STOCHASTIC, MASTER_24, MASTER_32 = 0, 1, 24, 32
"""How a parameter is kept, as kernels are told."""

LAST_STEP = 2**24
"""The greatest number of a step: float32 counters, to which 1 is added, stay there."""

ROUNDS = 7
PHILOX_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
PHILOX_KEY_STEPS = 0x9E3779B9, 0xBB67AE85
WORD = 2**32 - 1


class Stochastic(NamedTuple):
    """Parameters are rounded to bfloat16 at random, see :func:`stochastic_round`.

    Attributes:
        seed: Seed of all random bits, 0 to 2**64 - 1.
        step: Number of the step, counted from 1, at most 2**24.
        parameter: The parameter's place among all that share the seed, 0 to 2**32 - 1 (default: 0).
        offset: Index in the whole parameter of the first element that is given, 0 to 2**63 - 1 (default: 0).
    """

    seed: int
    step: int
    parameter: int = 0
    offset: int = 0


class Master(NamedTuple):
    """Parameters are the upper parts of master values, see :func:`split`.

    Attributes:
        low: The lower parts, int16 (32 bits) or int8 (24 bits), the parameter's shape; a fresh one is 0.
    """

    low: Array


Weights = Stochastic | Master | None


def split(values: Float32Array, bits: int) -> tuple[Array, Array]:
    """Return the upper and lower parts of master values.

    With ``b`` the bits of a value::

        32: high = (b + 0x8000) >> 16         to nearest, ties away from zero
            low  = b - (high << 16)
        24: r    = b rounded to its upper 24 bits, to nearest even
            high = (r + 0x80) >> 8
            low  = r - (high << 8)

    NaN is high 0x7FC0, low 0. With 32 bits nothing is lost but the payload of a NaN; with 24 bits what is lost is at
    most 1/512 of the distance between neighbouring bfloat16, and splitting what was joined gives the same parts. A
    finite value next to infinity has an infinite upper part, and is finite again once joined.

    Args:
        values: float32 array of any shape.
        bits: Bits of a master value: 32 or 24.

    Returns:
        The upper parts, bfloat16, and the lower parts, int16 or int8, both of the shape of ``values``.

    Raises:
        ValueError: If ``bits`` is another number.
    """
    if bits not in LOW_DTYPES:
        raise ValueError(f"Invalid bits: {bits}; 24 or 32 is allowed")
    b = _patterns(values)
    dropped = 32 - bits
    if dropped:
        b = (b + (2 ** (dropped - 1) - 1) + (b >> dropped & 1)) >> dropped << dropped
    high = (b + 0x8000) >> 16
    # Cut off to its width, b - (high << 16) is b.
    low = b >> dropped
    return high.astype(np.uint16).view(BFLOAT16), low.astype(LOW_DTYPES[bits])


def join(high: Array, low: Array) -> Float32Array:
    """Return master values from their upper and lower parts.

    The bits of a value are ``(high << 16) + low`` with a lower part of int16, ``((high << 8) + low) << 8`` with one of
    int8. A negative lower part of ±0, which :func:`split` never makes, counts as 0: it is what is left behind where a
    program writes 0 to a parameter.

    Args:
        high: The upper parts, bfloat16, any shape.
        low: The lower parts, int16 or int8, the same shape.

    Returns:
        float32 array of that shape.

    Raises:
        ValueError: If a dtype is another or the shapes differ.
    """
    if high.dtype != BFLOAT16:
        raise ValueError(f"Invalid high: {high.dtype}; master values have bfloat16 upper parts")
    if low.dtype not in LOW_DTYPES.values() or low.shape != high.shape:
        raise ValueError(f"Invalid low: {low.dtype} of shape {low.shape}; int8 or int16 of {high.shape} is needed")
    place = 16 - 8 * low.dtype.itemsize
    upper = high.view(np.uint16).astype(np.int64)
    b = (upper << 16) + np.where((upper & 0x7FFF == 0) & (low < 0), 0, low.astype(np.int64) << place)
    return b.astype(np.uint32).view(np.float32)


def stochastic_round(values: Float32Array, u: Uint16Array) -> Array:
    """Return values rounded to bfloat16: up in magnitude for so many ``u`` as the bits that are cut off say.

    The bits of the result are ``(b + u) >> 16``, with ``b`` those of the value; NaN is 0x7FC0. Over all ``u`` the mean
    is the value itself.

    Args:
        values: float32 array of any shape.
        u: Random bits, uint16, the shape of ``values``.

    Returns:
        bfloat16 array of that shape.
    """
    return (_patterns(values) + u >> 16).astype(np.uint16).view(BFLOAT16)


def philox4x32(counter: Uint32Array, key: Uint32Array, rounds: int = ROUNDS) -> Uint32Array:
    """Return the four random words of each counter.

    ::

        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]   64 bits: high and low word
        c    = high(b) ^ c[1] ^ k[0], low(b), high(a) ^ c[3] ^ k[1], low(a)
        k    = k[0] + 0x9E3779B9, k[1] + 0xBB67AE85   modulo 2**32, after a round

    Args:
        counter: uint32 array of shape (..., 4).
        key: uint32 array of shape (2,).
        rounds: Number of rounds (default: 7).

    Returns:
        uint32 array of the shape of ``counter``.

    Source:
        Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", https://doi.org/10.1145/2063384.2063405;
        the fewest rounds of those that pass all tests there are 7.
    """
    c0, c1, c2, c3 = (counter[..., i].astype(np.uint64) for i in range(4))
    k0, k1 = (int(word) for word in key)
    for _ in range(rounds):
        a, b = c0 * np.uint64(PHILOX_MULTIPLIERS[0]), c2 * np.uint64(PHILOX_MULTIPLIERS[1])
        c0, c1 = (b >> np.uint64(32)) ^ c1 ^ np.uint64(k0), b & np.uint64(WORD)
        c2, c3 = (a >> np.uint64(32)) ^ c3 ^ np.uint64(k1), a & np.uint64(WORD)
        k0, k1 = (k0 + PHILOX_KEY_STEPS[0]) & WORD, (k1 + PHILOX_KEY_STEPS[1]) & WORD
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def random_bits(count: int, offset: int, step: int, parameter: int, seed: int) -> Uint16Array:
    """Return the random bits of consecutive elements of a parameter.

    Eight elements share a counter: its four words, each the lower half first, are theirs in turn. The counter is the
    index of the element divided by 8, low and high word, the step, and the parameter; the key is the seed, low and
    high word. So an element's bits depend neither on the device nor on how a parameter is cut into shards.

    Args:
        count: Number of elements, at least 0.
        offset: Index in the whole parameter of the first of them, 0 to 2**63 - 1.
        step: Number of the step, counted from 1, at most 2**24.
        parameter: The parameter's place among all that share the seed, 0 to 2**32 - 1.
        seed: The seed, 0 to 2**64 - 1.

    Returns:
        uint16 array of shape (count,).

    Raises:
        ValueError: If an argument is out of its range.
    """
    for name, value, first, last in (
        ("count", count, 0, 2**63 - 1),
        ("offset", offset, 0, 2**63 - 1),
        ("step", step, 1, LAST_STEP),
        ("parameter", parameter, 0, WORD),
        ("seed", seed, 0, 2**64 - 1),
    ):
        if not first <= value <= last:
            raise ValueError(f"Invalid {name}: {value}; {first} to {last} is allowed")
    element = np.uint64(offset) + np.arange(count, dtype=np.uint64)
    group, place = element >> np.uint64(3), element & np.uint64(7)
    same = np.ones(count, np.uint32)
    counter = [group.astype(np.uint32), (group >> np.uint64(32)).astype(np.uint32), same * np.uint32(step)]
    counter.append(same * np.uint32(parameter))
    words = philox4x32(np.stack(counter, axis=1), np.array([seed & WORD, seed >> 32], np.uint32))
    word = words[np.arange(count), (place >> np.uint64(1)).astype(np.intp)]
    return np.where(place % 2 == 0, word, word >> np.uint32(16)).astype(np.uint16)


def read_weights(param: Array, weights: Weights) -> Float32Array:
    """Return the float32 values that an update begins with.

    Args:
        param: The parameter; bfloat16 unless ``weights`` is None.
        weights: How the parameter is kept; None where it is rounded to nearest.

    Returns:
        float32 array of the parameter's shape.

    Raises:
        ValueError: If the parameter's dtype or the lower part do not fit.
    """
    if isinstance(weights, Master):
        return join(param, weights.low)
    return param.astype(np.float32)


def write_weights(values: Float32Array, dtype: np.dtype[Any], weights: Weights) -> tuple[Array, ...]:
    """Return what is kept of the float32 values that an update ends with.

    Args:
        values: The values, float32, any shape.
        dtype: The parameter's dtype; bfloat16 unless ``weights`` is None.
        weights: How the parameter is kept; None where it is rounded to nearest.

    Returns:
        The parameter and, with master values, their lower part.

    Raises:
        ValueError: If the dtype does not fit, or a number of ``weights`` is out of its range.
    """
    if weights is None:
        return (values.astype(dtype),)
    if isinstance(weights, Master):
        return split(values, 16 + 8 * weights.low.dtype.itemsize)
    if dtype != BFLOAT16:
        raise ValueError(f"Invalid dtype: {dtype}; stochastic rounding is for bfloat16 parameters")
    u = random_bits(values.size, weights.offset, weights.step, weights.parameter, weights.seed)
    return (stochastic_round(values, u.reshape(values.shape)),)


def _patterns(values: Float32Array) -> npt.NDArray[np.int64]:
    """Return the bits of float32 values, those of a quiet NaN for every NaN."""
    return np.where(np.isnan(values), QUIET_NAN, values.view(np.uint32).astype(np.int64))

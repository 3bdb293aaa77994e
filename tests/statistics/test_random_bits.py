"""The random bits of stochastic rounding: even, and of no more influence on each other than chance.

The seeds are fixed, so that the tests never fail by chance; each bound is passed by all but one in 10^6 of true random
bits.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats

from lion import reference

COUNT = 1 << 18
CHANCE = 1e-6


def bits(offset: int = 0, step: int = 1, parameter: int = 0, seed: int = 0) -> npt.NDArray[np.uint16]:
    return reference.random_bits(COUNT, offset, step, parameter, seed)


# Counters as trainings have them: small numbers that differ in few bits.
STREAMS = [
    {},
    {"offset": 1 << 35},
    {"step": 2},
    {"step": 1 << 24},
    {"parameter": 1},
    {"parameter": 2**32 - 1},
    {"seed": 1},
    {"seed": 2**64 - 1},
]


@pytest.mark.parametrize("stream", STREAMS, ids=str)
def test_all_values_are_equally_frequent(stream: dict[str, int]) -> None:
    u = bits(**stream)
    for shift in (0, 4, 8):  # the lower, middle and upper 8 bits
        counts = np.bincount(u >> shift & 0xFF, minlength=256)
        assert stats.chisquare(counts).pvalue > CHANCE
    assert stats.chisquare(np.bincount(u.reshape(-1, 8).argmax(axis=1), minlength=8)).pvalue > CHANCE


@pytest.mark.parametrize("stream", STREAMS, ids=str)
def test_each_bit_is_set_half_of_the_time(stream: dict[str, int]) -> None:
    u = bits(**stream)
    for place in range(16):
        assert stats.binomtest(int((u >> place & 1).sum()), COUNT).pvalue > CHANCE


def distance(a: npt.NDArray[np.uint16], b: npt.NDArray[np.uint16]) -> float:
    """Return the chance of a correlation as great as that of two streams."""
    correlation = np.corrcoef(a.astype(np.float64), b.astype(np.float64))[0, 1]
    return float(2 * stats.norm.sf(abs(correlation) * np.sqrt(len(a))))


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 5, 6, 7, 8, 16, 256, 4096])
def test_neighbouring_elements_are_not_correlated(lag: int) -> None:
    u = bits()
    assert distance(u[:-lag], u[lag:]) > CHANCE


@pytest.mark.parametrize("first", STREAMS, ids=str)
def test_steps_parameters_and_seeds_are_not_correlated(first: dict[str, int]) -> None:
    for second in STREAMS:
        if second != first:
            a, b = bits(**first), bits(**second)
            assert distance(a, b) > CHANCE
            joint = np.bincount((a >> 12).astype(np.int64) << 4 | b >> 12, minlength=256)
            assert stats.chisquare(joint).pvalue > CHANCE
            differing = np.unpackbits((a ^ b).view(np.uint8)).mean()
            assert abs(differing - 0.5) < 5 * 0.5 / np.sqrt(16 * COUNT)


def test_words_of_a_counter_are_not_correlated() -> None:
    u = bits().reshape(-1, 8)
    for i in range(8):
        for j in range(i):
            assert distance(u[:, i], u[:, j]) > CHANCE


# Around 1, 2, the least normal number, and among denormals; each with little, half and nearly all of a unit cut off.
PATTERNS = [
    high << 16 | low
    for high in (0x3F7F, 0x3F80, 0x3FFF, 0x4000, 0x0000, 0x0001, 0x007F, 0x0080)
    for low in (1, 37, 0x1234, 0x7FFF, 0x8000, 0x8001, 0xFFFF)
]


@pytest.mark.parametrize("sign", [0, 0x80000000])
@pytest.mark.parametrize("pattern", PATTERNS, ids=hex)
def test_rounding_is_unbiased(pattern: int, sign: int) -> None:
    """The number of elements that round up, and the mean, are those that the exact value asks for."""
    value = np.array([pattern | sign], np.uint32).view(np.float32)
    rounded = reference.stochastic_round(np.repeat(value, COUNT), bits(step=3, parameter=4, seed=5))
    share = (pattern & 0xFFFF) / 65536
    up = int((rounded.view(np.uint16) != (pattern | sign) >> 16).sum())
    assert stats.binomtest(up, COUNT, share).pvalue > CHANCE
    ends = np.array([pattern >> 16 << 16, (pattern >> 16) + 1 << 16], np.uint32).view(np.float32).astype(np.float64)
    error = abs(rounded.astype(np.float64).mean() - float(value[0]))
    assert error <= 5 * (ends[1] - ends[0]) * np.sqrt(share * (1 - share) / COUNT)


def test_steps_too_small_for_bfloat16_add_up() -> None:
    """512 steps of 1/256 of a unit move the mean by two units; rounded to nearest nothing moves."""
    k = reference.coefficients(2.0**-15, (0.0, 0.0), 0.0)
    grad, momentum = np.ones(4096, np.float32), np.zeros(4096, np.float32)
    moved = stuck = np.full(4096, 1.5, reference.split(np.ones(1, np.float32), 32)[0].dtype)
    for step in range(512):
        moved, momentum = reference.update_32bit(moved, grad, momentum, k, weights=reference.Stochastic(0, step + 1))
        stuck, _ = reference.update_32bit(stuck, grad, momentum, k)
    assert (stuck == 1.5).all()
    # Each element makes Bernoulli steps of 1/128 or none: the mean of so many is within five standard deviations.
    deviation = 2.0**-7 * np.sqrt(512 * (1 / 256) * (255 / 256) / 4096)
    assert abs(moved.astype(np.float64).mean() - (1.5 - 512 * 2.0**-15)) < 5 * deviation

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lion.reference import (
    Master,
    Stochastic,
    coefficients,
    create_dynamic_map,
    dequantize_blockwise,
    join,
    philox4x32,
    quantize_blockwise,
    random_bits,
    rounding,
    split,
    stochastic_round,
    update_8bit_blockwise,
    update_8bit_tensorwise,
    update_32bit,
)
from tests import strategies
from tests.comparing import assert_same_bits

F = np.float32
BF16 = ml_dtypes.bfloat16
LOW = {24: np.int8, 32: np.int16}
ALL_U = np.arange(1 << 16, dtype=np.uint16)
MAP = create_dynamic_map()

# Random123's known answers: rounds, counter, key, result.
KNOWN_ANSWERS = [
    (7, "00000000 00000000 00000000 00000000", "00000000 00000000", "5f6fb709 0d893f64 4f121f81 4f730a48"),
    (7, "ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "5207ddc2 45165e59 4d8ee751 8c52f662"),
    (7, "243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "4dfccaba 190a87f0 c47362ba b6b5242a"),
    (10, "00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    (10, "ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (10, "243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text):
    return np.array([int(word, 16) for word in text.split()], np.uint32)


def values(*patterns):
    return np.array(patterns, np.uint32).view(F)


def patterns_around_all_ends():
    """Patterns of both signs around every change of the upper part, of the lower byte, and of the exponent."""
    high = np.concatenate([np.arange(0, 0x7F81), np.arange(0x8000, 0xFF81)]).astype(np.int64) << 16
    near = [-0x8001, -0x8000, -0x7FFF, -0x81, -0x80, -0x7F, -1, 0, 1, 0x7F, 0x80, 0x81, 0x180, 0x17F, 0x181, 0x7FFF]
    b = (high[:, None] + near).reshape(-1) % 2**32
    b = b[(b & 0x7FFFFFFF) <= 0x7F800000]
    return np.concatenate([b, np.random.default_rng(0).integers(0, 0x7F800000, 100_000)]).astype(np.uint32)


# --- master values


@pytest.mark.parametrize("bits", [24, 32])
def test_parts_by_hand(bits):
    """1, and 1 with a quarter, a half, and three quarters of a unit of bfloat16 more; the half goes away from zero."""
    unit = 1 / 128
    x = np.array([1, 1 + unit / 4, 1 + unit / 2, 1 + 3 * unit / 4, -1 - unit / 2, 0.0, -0.0], F)
    high, low = split(x, bits)
    assert_same_bits(high, np.array([1, 1, 1 + unit, 1 + unit, -1 - unit, 0.0, -0.0], BF16))
    quarter = 2 ** (bits - 18)
    assert_same_bits(low, np.array([0, quarter, -2 * quarter, -quarter, -2 * quarter, 0, 0], LOW[bits]))
    assert_same_bits(join(high, low), x)


def test_nothing_is_lost_with_32_bits():
    x = patterns_around_all_ends().view(F)
    high, low = split(x, 32)
    assert_same_bits(join(high, low).view(np.uint32), x.view(np.uint32))


def test_24_bits_are_the_nearest_with_ties_to_even():
    b = patterns_around_all_ends()
    high, low = split(b.view(F), 24)
    joined = join(high, low)
    below, rest = b >> 8, b & 0xFF
    nearest = below + ((rest > 0x80) | ((rest == 0x80) & (below % 2 == 1)))
    assert_same_bits(joined.view(np.uint32), (nearest << 8).astype(np.uint32))
    again = split(joined, 24)
    assert_same_bits(again[0], high)
    assert_same_bits(again[1], low)


def test_24_bits_are_off_by_at_most_one_in_512():
    x = patterns_around_all_ends().view(F)
    exact = x[np.abs(x) < F(2.0**127)].astype(np.float64)
    joined = join(*split(exact.astype(F), 24)).astype(np.float64)
    unit = np.exp2(np.maximum(np.frexp(exact)[1] - 8, -133).astype(np.float64))
    assert np.abs(joined - exact).max() > 0
    assert (np.abs(joined - exact) <= unit / 512).all()


@pytest.mark.parametrize("bits", [24, 32])
def test_upper_part_is_the_nearest_with_ties_away_from_zero(bits):
    b = patterns_around_all_ends()
    b = b if bits == 32 else b >> np.uint32(8) << np.uint32(8)
    high, _ = split(b.view(F), bits)
    assert_same_bits(high.view(np.uint16), ((b >> 16) + (b >> 15) % 2).astype(np.uint16))


@pytest.mark.parametrize("bits", [24, 32])
def test_nan_is_one_pattern(bits):
    high, low = split(values(0x7F800001, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF, 0x7FC12345), bits)
    assert_same_bits(high.view(np.uint16), np.full(5, 0x7FC0, np.uint16))
    assert_same_bits(low, np.zeros(5, LOW[bits]))
    assert np.isnan(join(high, low)).all()


@pytest.mark.parametrize("bits", [24, 32])
def test_ends(bits):
    x = values(0x7F7FFF00, 0xFF7FFF00, 0x7F800000, 0xFF800000, 0x00000100, 0x80000100)
    high, low = split(x, bits)
    assert_same_bits(high, np.array([np.inf, -np.inf, np.inf, -np.inf, 0.0, -0.0], BF16))
    assert_same_bits(join(high, low), x)


@pytest.mark.parametrize("low", LOW.values())
def test_a_fresh_lower_part_is_zero(low):
    high = np.arange(1 << 16, dtype=np.uint16).view(BF16)
    assert_same_bits(join(high, np.zeros(high.shape, low)), high.astype(F))


def test_any_lower_part_is_added():
    high = np.array([0x0001, 0xFFFF, 0x7F80, 0x0000, 0x8000], np.uint16).view(BF16)
    joined = join(high, np.array([-(2**15), 2**15 - 1, 1, 2**15 - 1, 1], np.int16))
    expected = np.array([0x00008000, 0xFFFF7FFF, 0x7F800001, 0x00007FFF, 0x80000001], np.uint32)
    assert_same_bits(joined.view(np.uint32), expected)
    joined = join(high, np.array([-(2**7), 2**7 - 1, 1, 2**7 - 1, 1], np.int8))
    expected = np.array([0x00008000, 0xFFFF7F00, 0x7F800100, 0x00007F00, 0x80000100], np.uint32)
    assert_same_bits(joined.view(np.uint32), expected)


@pytest.mark.parametrize("low", LOW.values())
def test_a_negative_lower_part_of_zero_counts_as_zero(low):
    lows = np.arange(np.iinfo(low).min, 0, dtype=low)
    for pattern in (0x0000, 0x8000):
        high = np.full(lows.shape, pattern, np.uint16).view(BF16)
        assert_same_bits(join(high, lows).view(np.uint32), np.full(lows.shape, pattern << 16, np.uint32))


@pytest.mark.parametrize("low", LOW.values())
def test_a_number_stays_within_half_a_unit_of_its_upper_part(low):
    """Whatever a program writes to a parameter, the lower part that was left behind makes no other number of it."""
    high = np.arange(1 << 16, dtype=np.uint16).view(BF16)
    high = high[np.isfinite(high.astype(F))]
    for extreme in (np.iinfo(low).min, np.iinfo(low).max):
        joined = join(high, np.full(high.shape, extreme, low))
        assert np.isfinite(joined).all() and (np.signbit(joined) == np.signbit(high.astype(F))).all()
        distance = np.abs(joined.view(np.uint32).astype(np.int64) - (high.view(np.uint16).astype(np.int64) << 16))
        assert (distance <= 2**15).all()


@pytest.mark.parametrize("bits", [0, 16, 23, 25, 31, 33])
def test_other_numbers_of_bits(bits):
    with pytest.raises(ValueError, match=f"Invalid bits: {bits}"):
        split(np.ones(1, F), bits)


def test_parts_that_do_not_fit():
    with pytest.raises(ValueError, match="Invalid high: float16"):
        join(np.ones(2, np.float16), np.zeros(2, np.int16))
    for low in (np.zeros(2, np.int32), np.zeros(2, np.uint8), np.zeros(3, np.int8), np.zeros((2, 1), np.int16)):
        with pytest.raises(ValueError, match="Invalid low"):
            join(np.ones(2, BF16), low)


def test_parts_have_the_shape_of_the_values():
    high, low = split(np.ones((2, 3), F), 32)
    assert high.shape == low.shape == join(high, low).shape == (2, 3)


def test_kernels_are_told_the_bits_of_master_values():
    assert (rounding.MASTER_24, rounding.MASTER_32) == tuple(rounding.LOW_DTYPES) == (24, 32)
    assert (rounding.NEAREST, rounding.STOCHASTIC) == (0, 1)


# --- rounding at random

ENDS = [0x3F800000, 0x3F800001, 0x3F7FFFFF, 0x40000001, 0x3FC08000, 0x00000001, 0x00008001, 0x007F8001, 0x00800001]


@pytest.mark.parametrize("sign", [0, 0x80000000])
@pytest.mark.parametrize("pattern", [*ENDS, 0x7F7F0001, 0x7F7FFFFF, 0x7F800000, 0x00000000])
def test_so_many_of_all_random_bits_round_up_as_the_bits_cut_off_say(pattern, sign):
    rounded = stochastic_round(np.full(1 << 16, pattern | sign, np.uint32).view(F), ALL_U).view(np.uint16)
    below = (pattern | sign) >> 16
    assert set(rounded) <= {below, below + 1}
    assert (rounded == below + 1).sum() == pattern & 0xFFFF
    assert (np.diff(rounded) >= 0).all()  # the greatest round up


def test_nan_stays_nan_with_all_random_bits():
    for pattern in (0x7FFFFFFF, 0x7F800001, 0xFFFFFFFF, 0xFF800001):
        rounded = stochastic_round(np.full(1 << 16, pattern, np.uint32).view(F), ALL_U)
        assert_same_bits(rounded.view(np.uint16), np.full(1 << 16, 0x7FC0, np.uint16))


@pytest.mark.parametrize(("rounds", "counter", "key", "result"), KNOWN_ANSWERS)
def test_known_answers(rounds, counter, key, result):
    assert_same_bits(philox4x32(words(counter), words(key), rounds), words(result))
    if rounds == 7:
        assert_same_bits(philox4x32(np.stack([words(counter)] * 3), words(key)), np.stack([words(result)] * 3))


@pytest.mark.parametrize(
    ("counter", "offset", "step", "parameter"),
    [
        ([0, 0, 1, 0], 0, 1, 0),
        ([5, 0, 2**24, 7], 40, 2**24, 7),
        ([0xFFFFFFFF, 0, 3, 2**32 - 1], 2**35 - 8, 3, 2**32 - 1),
        ([0xFFFFFFFF, 0x0FFFFFFF, 3, 0], 2**63 - 8, 3, 0),
    ],
)
@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**64 - 1, 0x0123456789ABCDEF])
def test_eight_elements_share_a_counter(counter, offset, step, parameter, seed):
    random = philox4x32(np.array(counter, np.uint32), np.array([seed % 2**32, seed // 2**32], np.uint32))
    expected = [half for word in random for half in (int(word) % 2**16, int(word) // 2**16)]
    assert_same_bits(random_bits(8, offset, step, parameter, seed), np.array(expected, np.uint16))


@given(st.integers(0, 100), st.integers(0, 30), strategies.seeds())
def test_random_bits_do_not_depend_on_how_a_parameter_is_cut(offset, count, seed):
    whole = random_bits(offset + count, 2**35 - 50, 3, 1, seed)
    assert_same_bits(random_bits(count, 2**35 - 50 + offset, 3, 1, seed), whole[offset:])


RANGES = {
    "count": (0, 2**63 - 1),
    "offset": (0, 2**63 - 1),
    "step": (1, 2**24),
    "parameter": (0, 2**32 - 1),
    "seed": (0, 2**64 - 1),
}


@pytest.mark.parametrize("name", RANGES)
def test_numbers_out_of_range(name):
    usual = {"count": 1, "offset": 0, "step": 1, "parameter": 0, "seed": 0}
    first, last = RANGES[name]
    for value in (first, last) if name != "count" else (first,):
        assert len(random_bits(**{**usual, name: value})) == (value if name == "count" else 1)
    for value in (first - 1, last + 1):
        with pytest.raises(ValueError, match=f"Invalid {name}: {value}; {first} to {last} is allowed"):
            random_bits(**{**usual, name: value})


# --- the update


@given(st.data(), strategies.hyperparameters(), strategies.scales(), strategies.inv_scales())
def test_32_master_bits_train_as_float32_parameters(data, hyperparameters, scale, inv_scale):
    k = coefficients(*hyperparameters)
    param = data.draw(strategies.floats("bfloat16", 40))
    wide, low = param.astype(F), np.zeros(40, np.int16)
    momentum = wide_momentum = np.zeros(40, F)
    for _ in range(3):
        grad = data.draw(strategies.floats(data.draw(st.sampled_from(["float32", "bfloat16"])), 40))
        param, momentum, low = update_32bit(param, grad, momentum, k, scale, inv_scale, Master(low))
        wide, wide_momentum = update_32bit(wide, grad, wide_momentum, k, scale, inv_scale)
        assert param.dtype == BF16 and low.dtype == np.int16
        assert_same_bits(join(param, low), wide)
        assert_same_bits(momentum, wide_momentum)


def test_24_master_bits_keep_a_small_step():
    k = coefficients(2.0**-15, (0.9, 0.99), 0.0)
    param, low, momentum = np.ones(1, BF16), np.zeros(1, np.int8), np.zeros(1, F)
    for _ in range(100):
        param, momentum, low = update_32bit(param, np.ones(1, F), momentum, k, weights=Master(low))
    assert low.dtype == np.int8
    assert join(param, low).tolist() == [1 - 100 * 2.0**-15]
    assert param.astype(F).tolist() == [1 - 2.0**-8]


@given(st.data(), strategies.hyperparameters(), st.integers(0, 2**40), st.integers(0, 2**64 - 1))
def test_rounding_at_random_is_that_of_the_float32_update(data, hyperparameters, offset, seed):
    k = coefficients(*hyperparameters)
    param, grad = (data.draw(strategies.floats("bfloat16", 40)) for _ in range(2))
    momentum = data.draw(strategies.floats("float32", 40))
    weights = Stochastic(seed, 5, 3, offset)
    exact, expected_momentum = update_32bit(param.astype(F), grad, momentum, k)
    new_param, new_momentum = update_32bit(param, grad, momentum, k, weights=weights)
    assert_same_bits(new_param, stochastic_round(exact, random_bits(40, offset, 5, 3, seed)))
    assert_same_bits(new_momentum, expected_momentum)


def test_the_numbers_of_a_parameter_are_0_where_none_are_given():
    assert Stochastic(3, 4) == (3, 4, 0, 0)


@pytest.mark.parametrize("make", [lambda: None, lambda: Stochastic(1, 2), lambda: Master(np.zeros((3, 200), np.int8))])
def test_8bit_is_dequantize_update_quantize(make):
    k = coefficients(1e-3, (0.9, 0.99), 0.1)
    param, grad = (strategies.make_floats("gradients", "bfloat16", 600, i).reshape(3, 200) for i in range(2))
    codes, absmax = strategies.make_codes(600, 2).reshape(3, 200), np.array([0.1, 0.2, 0.3], F)
    for update, size, maxima in ((update_8bit_blockwise, 256, absmax), (update_8bit_tensorwise, 600, absmax[:1])):
        momentum = dequantize_blockwise(codes, maxima, MAP, size)
        new_param, new_momentum, *low = update_32bit(param, grad, momentum, k, weights=make())
        expected = (new_param, *quantize_blockwise(new_momentum, MAP, size), *low)
        actual = update(param, grad, codes, maxima, MAP, k, weights=make())
        for ours, theirs in zip(actual, expected, strict=True):
            assert_same_bits(ours, theirs)


@pytest.mark.parametrize("dtype", [F, np.float16])
@pytest.mark.parametrize("weights", [Stochastic(0, 1), Master(np.zeros(2, np.int16))])
def test_parameters_of_other_dtypes(dtype, weights):
    k = coefficients(1e-3, (0.9, 0.99), 0.1)
    with pytest.raises(ValueError, match=np.dtype(dtype).name):
        update_32bit(np.ones(2, dtype), np.ones(2, dtype), np.zeros(2, F), k, weights=weights)


def test_scalars():
    k = coefficients(2.0**-4, (0.5, 0.5), 0.0)
    for weights in (Stochastic(0, 1), Master(np.array(0, np.int16))):
        param, momentum, *low = update_32bit(np.array(1, BF16), np.array(1, F), np.array(0, F), k, weights=weights)
        assert param == 1 - 2.0**-4 and param.dtype == BF16
        assert all(part.shape == () for part in (param, momentum, *low))

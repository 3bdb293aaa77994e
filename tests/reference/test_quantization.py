from __future__ import annotations

import hashlib
import warnings
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lion.reference import create_dynamic_map, dequantize_blockwise, quantize_blockwise, quantize_thresholds
from tests import strategies
from tests.comparing import assert_same_bits
from tests.reference.exact import float32

F = np.float32
MAP = create_dynamic_map()
EVEN_MAP = ((np.arange(256) - 127) / 128).astype(F)  # midpoints are exact, so ties exist
SMALLEST_NORMAL = F(2.0**-126)
SMALLEST_DENORMAL = F(2.0**-149)


def quantize(values, qmap=MAP, block_size=256):
    return quantize_blockwise(np.asarray(values, F), qmap, block_size)


# --- the map


@pytest.mark.parametrize(
    ("signed", "digest"),
    [
        (True, "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c"),
        (False, "305f002cc11278fb769d13b25b9fd0c7c83c8402c40a878fe086f4039fde6398"),
    ],
)
def test_map_has_the_bits_of_bitsandbytes(signed, digest):
    qmap = create_dynamic_map(signed)
    assert qmap.dtype == F and qmap.shape == (256,)
    assert hashlib.sha256(qmap.astype("<f4").tobytes()).hexdigest() == digest


def test_smaller_maps_have_the_bits_of_bitsandbytes():
    """All signed maps of 2 to 8 bits, one after the other; made without a warning."""
    digest = hashlib.sha256()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for total_bits in range(2, 9):
            for max_exponent_bits in range(1, total_bits):
                digest.update(create_dynamic_map(True, max_exponent_bits, total_bits).astype("<f4").tobytes())
    assert digest.hexdigest() == "6240d4e313d3597c4ab5c63227030ed958caf9e2590c11d26cde0d0d02443a68"


def test_maps_with_as_many_decades_as_bits_have_the_bits_of_bitsandbytes():
    """Those of its tests with few bits: all signed ones of 2 to 8 bits, one after the other; made without a warning."""
    digest = hashlib.sha256()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for bits in range(2, 9):
            qmap = create_dynamic_map(True, bits, bits)
            assert np.count_nonzero(qmap) == 2**bits - 1
            digest.update(qmap.astype("<f4").tobytes())
    assert digest.hexdigest() == "5a6ff47ee79c297256a7ad0f718dff8d027c90f664f6b37891ec69b95a217b07"


def test_a_three_bit_map_of_three_decades_by_hand():
    """The lowest one is empty: 0.1 * (0.1 + 0.9 / 2), 0.1 + 0.9 * {1, 3}/4."""
    entries = create_dynamic_map(True, 3, 3)
    np.testing.assert_allclose(entries[entries > 0], [0.055, 0.325, 0.775, 1.0], rtol=2e-7)
    np.testing.assert_allclose(entries[entries < 0], [-0.775, -0.325, -0.055], rtol=2e-7)
    assert_same_bits(np.unique(create_dynamic_map(True, 1, 1)), F([0, 1]))


def test_map_landmarks():
    assert MAP[0] == F(-0.99296874) and MAP[127] == 0.0 and MAP[255] == 1.0
    assert not np.signbit(MAP[127])
    assert (MAP[1:] > MAP[:-1]).all()
    assert_same_bits(MAP[:127], -MAP[254:127:-1], what="negative side")


@pytest.mark.parametrize("signed", [True, False])
def test_map_entries_are_the_means_of_the_decades_within_a_rounding(signed):
    """Code 128 + 2^i - 1 + j of the signed map is 10^(i-6) * (0.1 + 0.9 (2j + 1) / 2^(i+1)), j < 2^i."""
    positive = [Fraction(0)]
    for i in range(7):
        count = 2 ** (i if signed else i + 1)
        for j in range(count):
            mean = Fraction(1, 10) + Fraction(9, 10) * Fraction(2 * j + 1, 2 * count)
            positive.append(Fraction(10) ** (i - 6) * mean)
    positive.append(Fraction(1))
    actual = create_dynamic_map(signed)[127:] if signed else create_dynamic_map(signed)
    assert len(positive) == len(actual)
    for entry, exact in zip(actual.tolist(), positive, strict=True):
        assert abs(Fraction(entry) - exact) <= exact * Fraction(1, 2**22)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("total_bits", range(2, 9))
def test_smaller_maps_are_padded_with_zeros(signed, total_bits):
    for max_exponent_bits in range(1, total_bits):
        qmap = create_dynamic_map(signed, max_exponent_bits, total_bits)
        assert qmap.shape == (256,) and qmap.dtype == F and (qmap[1:] >= qmap[:-1]).all()
        assert qmap[-1] == 1.0 and np.count_nonzero(qmap) < 2**total_bits
        if signed:
            assert np.count_nonzero(qmap) == 2**total_bits - 1
            assert_same_bits(np.sort(-qmap[(qmap > 0) & (qmap < 1)]), qmap[qmap < 0])
        else:
            assert (qmap >= 0).all()


def test_a_four_bit_map_by_hand():
    """Two decades and a bit to spare: 0.1 * (0.1 + 0.9 * {1, 3}/4), 0.1 + 0.9 * {1, 3, 5, 7}/8, and their middle."""
    entries = create_dynamic_map(True, 2, 4)
    expected = [0.0325, 0.0775, 0.2125, 0.4375, 0.55, 0.6625, 0.8875]
    np.testing.assert_allclose(entries[entries > 0], [*expected, 1.0], rtol=2e-7)


@pytest.mark.parametrize("bits", [(0, 8), (9, 8), (8, 7), (7, 9), (9, 9), (-1, 8), (0, 0), (1, 0)])
@pytest.mark.parametrize("signed", [True, False])
def test_map_refuses_bits_that_do_not_fit(signed, bits):
    with pytest.raises(ValueError, match=rf"max_exponent_bits and total_bits: {bits[0]}, {bits[1]}"):
        create_dynamic_map(signed, *bits)


@pytest.mark.parametrize("bits", range(1, 9))
def test_an_unsigned_map_needs_a_bit_more_than_decades(bits):
    with pytest.raises(ValueError, match="max_exponent_bits < total_bits <= 8 is allowed"):
        create_dynamic_map(False, bits, bits)


# --- thresholds and ties


@pytest.mark.parametrize("qmap", [MAP, create_dynamic_map(False), EVEN_MAP, create_dynamic_map(True, 3, 5)])
def test_thresholds_are_exact_midpoints_rounded_down(qmap):
    thresholds = quantize_thresholds(qmap)
    assert thresholds.dtype == F and thresholds.shape == (255,)
    for i, threshold in enumerate(thresholds):
        midpoint = (Fraction(float(qmap[i])) + Fraction(float(qmap[i + 1]))) / 2
        assert Fraction(float(threshold)) <= midpoint < Fraction(float(np.nextafter(threshold, F(np.inf))))


def test_code_changes_right_after_each_threshold():
    thresholds = quantize_thresholds(MAP)
    for i, threshold in enumerate(thresholds):
        codes, absmax = quantize([1.0, threshold, np.nextafter(threshold, F(2))])
        assert absmax[0] == 1.0
        assert codes.tolist() == [255, i, i + 1]


def test_ties_go_to_the_lower_code():
    midpoints = (EVEN_MAP[:-1] + EVEN_MAP[1:]) / F(2)
    codes, _ = quantize([*midpoints, 1.0], EVEN_MAP, 512)
    assert codes.tolist() == [*range(255), 255]


def test_repeated_entries_give_the_first_code():
    qmap = create_dynamic_map(True, 3, 5)
    codes, _ = quantize([0.0, 1.0, 1e-9], qmap)
    first_zero = int(np.flatnonzero(qmap == 0)[0])
    assert codes[0] == first_zero and codes[1] == 255
    assert qmap[codes[2]] == 0.0


# --- quantize


def test_a_block_by_hand():
    """0.5 lies between entries 27 and 28 of the top decade: 0.1 + 0.9 * 57/128 = 0.5008 is the nearer one."""
    codes, absmax = quantize([1.0, 0.5, -0.5, 0.25, 0.0, -0.0, -1.0, 0.9965, 0.996, 1e-7, 5e-7, -5e-7])
    assert absmax.tolist() == [1.0]
    assert codes.tolist() == [255, 191 + 28, 63 - 28, 191 + 10, 127, 127, 0, 255, 254, 127, 128, 126]
    assert codes.dtype == np.uint8 and absmax.dtype == F


def test_values_are_scaled_by_the_reciprocal_rounded_once():
    rng = np.random.default_rng(0)
    values = (rng.standard_normal(256) * 3e-3).astype(F)
    codes, absmax = quantize(values)
    maximum = Fraction(float(max(abs(v) for v in values.tolist())))
    assert Fraction(float(absmax[0])) == maximum
    reciprocal = float32(1 / maximum)
    entries = [Fraction(v) for v in MAP.tolist()]
    for value, code in zip(values.tolist(), codes.tolist(), strict=True):
        scaled = float32(Fraction(value) * reciprocal)
        assert code == min(range(256), key=lambda i: (abs(entries[i] - scaled), i))


def test_a_product_with_the_reciprocal_is_not_a_division():
    """Where x * (1 / absmax) and x / absmax straddle a threshold, the product counts."""
    threshold = quantize_thresholds(EVEN_MAP)
    rng = np.random.default_rng(1)
    found = 0
    for maximum in rng.uniform(1, 2, 4000).astype(F):
        values = threshold[130:240] * maximum
        product, quotient = values * (F(1) / maximum), values / maximum
        expected = np.searchsorted(threshold, product, side="left")
        found += int((expected != np.searchsorted(threshold, quotient, side="left")).sum())
        codes, _ = quantize([*values, maximum], EVEN_MAP)
        assert codes[:-1].tolist() == expected.tolist()
    assert found > 100


@pytest.mark.parametrize("block", [[0.0] * 5, [-0.0] * 5, [0.0, -0.0]])
def test_zero_block(block):
    codes, absmax = quantize(block)
    assert set(codes.tolist()) == {127}
    assert_same_bits(absmax, np.array([0.0], F))


def test_block_below_the_smallest_normal_is_zero():
    largest_denormal = np.nextafter(SMALLEST_NORMAL, F(0))
    for tiny in (SMALLEST_DENORMAL, -SMALLEST_DENORMAL, largest_denormal, -largest_denormal):
        codes, absmax = quantize([0.0, tiny])
        assert codes.tolist() == [127, 127]
        assert_same_bits(absmax, np.array([0.0], F))


def test_block_at_the_smallest_normal_is_kept():
    codes, absmax = quantize([SMALLEST_NORMAL, -SMALLEST_NORMAL, SMALLEST_NORMAL / 2, SMALLEST_DENORMAL])
    assert absmax.tolist() == [SMALLEST_NORMAL]
    assert codes.tolist() == [255, 0, 191 + 28, 127]


def test_denormals_are_not_flushed_before_scaling():
    codes, absmax = quantize([SMALLEST_NORMAL, SMALLEST_NORMAL / 2, SMALLEST_NORMAL / 4])
    assert codes.tolist() == [255, 219, 201]
    largest = np.finfo(F).max  # its reciprocal is a denormal
    codes, absmax = quantize([largest, -largest, largest / 2])
    assert absmax[0] == largest
    assert codes.tolist() == [255, 0, 219]


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 100, 255])
def test_a_block_that_is_not_finite_reads_back_as_nan(bad, place):
    values = np.full(700, 0.5, F)
    values[256 + place] = bad
    codes, absmax = quantize(values)
    assert np.isnan(absmax).tolist() == [False, True, False]
    assert set(codes[256:512].tolist()) == {127}
    assert set(codes[:256].tolist()) == set(codes[512:].tolist()) == {255}
    back = dequantize_blockwise(codes, absmax, MAP, 256)
    assert np.isnan(back[256:512]).all()
    assert (back[:256] == 0.5).all() and (back[512:] == 0.5).all()


@pytest.mark.parametrize(("size", "blocks"), [(0, 0), (1, 1), (255, 1), (256, 1), (257, 2), (512, 2), (513, 3)])
def test_short_last_block(size, blocks):
    values = np.arange(1, size + 1, dtype=F)
    codes, absmax = quantize(values)
    assert absmax.tolist() == [min(256 * (i + 1), size) for i in range(blocks)]
    assert codes.shape == (size,)
    assert codes[255:256].tolist() == [255][: max(0, size - 255)]


@pytest.mark.parametrize("block_size", [1, 3, 64, 256, 4096])
def test_blocks_do_not_influence_each_other(block_size):
    values = strategies.make_floats("mixed", "float32", 3000, 5)
    codes, absmax = quantize(values, block_size=block_size)
    assert absmax.shape == (-(-3000 // block_size),)
    for i in range(len(absmax)):
        part = slice(i * block_size, (i + 1) * block_size)
        alone = quantize(values[part], block_size=block_size)
        assert_same_bits(codes[part], alone[0], what="codes")
        assert_same_bits(absmax[i : i + 1], alone[1], what="absmax")


@given(st.data(), strategies.dtypes(), strategies.sizes(600))
def test_no_value_changes_its_sign_and_the_error_is_half_a_gap(data, dtype, size):
    values = data.draw(strategies.finite_floats(dtype, size))
    codes, absmax = quantize_blockwise(values, MAP, 64)
    back = dequantize_blockwise(codes, absmax, MAP, 64)
    assert back.shape == values.shape
    exact = values.astype(np.float64)
    assert (back * exact >= 0).all()
    gaps = np.diff(MAP.astype(np.float64))
    half_gap = 0.5 * np.maximum(np.r_[gaps, 0], np.r_[0, gaps])[codes]
    half_gap[codes == 0] = 1 + MAP[0]  # the map has no -1
    bound = (half_gap * (1 + 1e-6) + 3e-7) * np.repeat(absmax, 64)[:size].astype(np.float64)
    assert (np.abs(back.astype(np.float64) - exact) <= np.maximum(bound, 2.0**-126)).all()


@given(st.data(), strategies.dtypes(), strategies.sizes(600))
def test_half_precision_is_widened_first(data, dtype, size):
    values = data.draw(strategies.floats(dtype, size))
    for ours, widened in zip(
        quantize_blockwise(values, MAP, 256), quantize_blockwise(values.astype(F), MAP, 256), strict=True
    ):
        assert_same_bits(ours, widened)


def test_shapes_are_kept_and_the_input_is_untouched():
    values = np.arange(24, dtype=F).reshape(2, 3, 4)
    before = values.copy()
    codes, absmax = quantize_blockwise(values.transpose(2, 0, 1), MAP, 8)
    assert codes.shape == (4, 2, 3) and absmax.shape == (3,)
    assert_same_bits(values, before)
    flat = quantize_blockwise(values.transpose(2, 0, 1).reshape(-1), MAP, 8)
    assert_same_bits(codes.reshape(-1), flat[0])
    codes, absmax = quantize_blockwise(np.array(2.0, F), MAP, 8)
    assert codes.shape == () and codes == 255 and absmax.tolist() == [2.0]
    assert dequantize_blockwise(codes, absmax, MAP, 8).shape == ()


# --- dequantize


def test_dequantize_by_hand():
    codes = np.array([[255, 0, 127], [128, 126, 255]], np.uint8)
    values = dequantize_blockwise(codes, np.array([2.0, 0.5], F), EVEN_MAP, 4)
    assert_same_bits(values, np.array([[2.0, -127 / 64, 0.0], [1 / 64, -1 / 256, 0.5]], F))


def test_every_code_comes_back():
    codes = np.arange(256, dtype=np.uint8)
    values = dequantize_blockwise(codes, np.array([1.0], F), MAP, 256)
    assert_same_bits(values, MAP)
    again, absmax = quantize(values)
    assert_same_bits(again, codes)
    assert absmax.tolist() == [1.0]


def test_dequantize_special_absmax():
    codes = np.array([127, 0, 255], np.uint8)
    assert_same_bits(dequantize_blockwise(codes, np.array([0.0], F), MAP, 3), np.array([0.0, -0.0, 0.0], F))
    assert np.isnan(dequantize_blockwise(codes, np.array([np.nan], F), MAP, 3)).all()
    assert_same_bits(
        dequantize_blockwise(codes, np.array([SMALLEST_DENORMAL], F), MAP, 3),
        np.array([0.0, -SMALLEST_DENORMAL, SMALLEST_DENORMAL], F),
    )


# --- errors


@pytest.mark.parametrize(
    "qmap",
    [
        pytest.param(MAP[:255], id="short"),
        pytest.param(MAP.astype(np.float64), id="float64"),
        pytest.param(MAP[::-1].copy(), id="descending"),
        pytest.param(np.r_[MAP[:200], MAP[[201, 200]], MAP[202:]], id="two swapped"),
        pytest.param(np.r_[MAP[[1, 0]], MAP[2:]], id="first two swapped"),
        pytest.param(np.r_[MAP[:254], MAP[[255, 254]]], id="last two swapped"),
        pytest.param(np.full(256, np.nan, F), id="nan"),
        pytest.param(np.r_[MAP[:255], F(np.inf)], id="infinite"),
        pytest.param(MAP.reshape(16, 16), id="shape"),
    ],
)
def test_a_map_that_is_none_is_refused(qmap):
    codes, absmax = np.zeros(4, np.uint8), np.zeros(1, F)
    with pytest.raises(ValueError, match="Invalid qmap"):
        quantize_thresholds(qmap)
    with pytest.raises(ValueError, match="Invalid qmap"):
        quantize_blockwise(np.zeros(4, F), qmap, 64)
    with pytest.raises(ValueError, match="Invalid qmap"):
        dequantize_blockwise(codes, absmax, qmap, 64)


@pytest.mark.parametrize("block_size", [0, -1])
def test_block_size_below_one_is_refused(block_size):
    with pytest.raises(ValueError, match=f"Invalid block_size: {block_size}"):
        quantize_blockwise(np.zeros(4, F), MAP, block_size)
    with pytest.raises(ValueError, match=f"Invalid block_size: {block_size}"):
        dequantize_blockwise(np.zeros(4, np.uint8), np.zeros(1, F), MAP, block_size)


@pytest.mark.parametrize("shape", [(0,), (1,), (3,), (2, 1), ()])
def test_absmax_must_hold_one_value_per_block(shape):
    with pytest.raises(ValueError, match="Invalid absmax shape"):
        dequantize_blockwise(np.zeros(65, np.uint8), np.zeros(shape, F), MAP, 64)

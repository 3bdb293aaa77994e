from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lion.reference import percentile_clipping, squared_norm
from tests import strategies
from tests.comparing import assert_same_bits

F = np.float32


def slow_squared_norm(grad, inv_scale=1.0) -> np.float32:
    """The documented order, one addition after the other."""

    def pairs(values):
        while len(values) > 1:
            values = [values[i] + values[i + 1] for i in range(0, len(values), 2)]
        return values[0]

    totals = [np.float64(0)] * 32
    with np.errstate(all="ignore"):
        g = [F(x) * F(inv_scale) for x in np.asarray(grad).reshape(-1)]
        for number, begin in enumerate(range(0, len(g), 4096)):
            chunk = g[begin : begin + 4096]
            chunk += [F(0)] * (4096 - len(chunk))
            lanes = []
            for j in range(256):
                lane = chunk[j] * chunk[j]
                for i in range(j + 256, 4096, 256):
                    lane = lane + chunk[i] * chunk[i]
                lanes.append(lane)
            totals[number % 32] = totals[number % 32] + np.float64(pairs(lanes))
        return F(pairs(totals))


# --- squared norm


@pytest.mark.parametrize("dtype", strategies.FLOAT_DTYPES)
@pytest.mark.parametrize("size", [0, 1, 2, 255, 256, 257, 4095, 4096, 4097, 12289])
def test_summation_order(dtype, size):
    grad = strategies.make_floats("gradients", dtype, size, size)
    assert_same_bits(squared_norm(grad), slow_squared_norm(grad))


def test_summation_order_over_more_chunks_than_lanes():
    grad = strategies.make_floats("gradients", "float32", 70 * 4096 + 5, 3)
    assert_same_bits(squared_norm(grad), slow_squared_norm(grad))


def test_the_order_is_visible_in_the_bits():
    """Otherwise the tests above would not show anything."""
    orders = 0
    for seed in range(20):
        grad = strategies.make_floats("gradients", "float32", 5000, seed)
        expected = squared_norm(grad)
        orders += expected != np.sum(grad * grad) or expected != squared_norm(grad[::-1])
    assert orders > 10


@given(st.data(), strategies.dtypes(), strategies.sizes(600), strategies.inv_scales())
def test_summation_order_on_any_bits(data, dtype, size, inv_scale):
    grad = data.draw(strategies.floats(dtype, size))
    assert_same_bits(squared_norm(grad, inv_scale), slow_squared_norm(grad, inv_scale))


def test_squared_norm_by_hand():
    assert squared_norm(np.array([3.0, 4.0], F)) == 25.0
    assert squared_norm(np.array([[1.0, -2.0], [2.0, 0.0]], np.float16)) == 9.0
    assert squared_norm(np.array(-3.0, F)) == 9.0
    assert squared_norm(np.array([6.0, 8.0], F), F(0.5)) == 25.0
    assert_same_bits(squared_norm(np.zeros(0, F)), F(0))
    assert_same_bits(squared_norm(np.array([-0.0], F)), F(0))
    assert type(squared_norm(np.ones(3, F))) is F


def test_close_to_the_float64_sum():
    grad = strategies.make_floats("gradients", "float32", 100_000, 9)
    exact = float(sum(Fraction(x) ** 2 for x in grad.tolist()))
    assert abs(float(squared_norm(grad)) / exact - 1) < 1e-6


def test_lanes_are_float32_and_totals_float64():
    grad = np.zeros(65 * 4096, F)
    grad[0], grad[32 * 4096], grad[64 * 4096] = 4096, 1, 1  # one lane of the totals: 2^24 + 1 + 1
    assert squared_norm(grad) == 2**24 + 2
    grad = np.zeros(4096, F)
    grad[0], grad[256], grad[512] = 4096, 1, 1  # one lane of a chunk: the ones are lost
    assert squared_norm(grad) == 2**24
    grad[0], grad[256], grad[512] = 1, 1, 4096
    assert squared_norm(grad) == 2**24 + 2


def test_half_precision_is_squared_in_float32():
    assert squared_norm(np.array([65504.0], np.float16)) == F(65504.0) * F(65504.0)
    assert squared_norm(np.array([2.0**-24], np.float16)) == 2.0**-48


@pytest.mark.parametrize(
    ("values", "expected"),
    [([1e20, 1], np.inf), ([np.inf], np.inf), ([-np.inf, 1], np.inf), ([np.nan, np.inf], np.nan)],
)
def test_norms_that_are_not_finite(values, expected):
    assert_same_bits(squared_norm(np.array(values, F)), F(expected))


def test_denormal_squares_are_kept():
    assert squared_norm(np.array([2.0**-74], F)) == 2.0**-148
    assert squared_norm(np.array([2.0**-76], F)) == 0.0


# --- percentile clipping


def empty_history():
    return np.zeros(100, F)


def test_first_norm_fills_the_history():
    history, norm, threshold, scale = percentile_clipping(empty_history(), F(9), 1, 5)
    assert_same_bits(history, np.full(100, 9, F))
    assert (norm, threshold, scale) == (3.0, 3.0, 1.0)
    assert {type(x) for x in (norm, threshold, scale)} == {F}


def test_clipping_by_hand():
    history = np.arange(1, 101, dtype=F) ** 2  # sorted already: the norms 1, 2, ..., 100
    new, norm, threshold, scale = percentile_clipping(history, F(200.0**2), 7, 10)
    expected = history.copy()
    expected[7] = 200.0**2  # was 8, so the norm at index 10 is 12 instead of 11
    assert_same_bits(new, expected)
    assert (norm, threshold) == (200.0, 12.0)
    assert_same_bits(scale, F(12) / F(200))
    new, norm, threshold, scale = percentile_clipping(history, F(0.25), 7, 10)
    assert (norm, threshold, scale) == (0.5, 11.0, 1.0)


def test_the_new_norm_is_in_the_history_before_the_threshold_is_taken():
    history = np.full(100, 1, F)
    _, norm, threshold, scale = percentile_clipping(history, F(100), 3, 99)
    assert (norm, threshold, scale) == (10.0, 10.0, 1.0)
    _, norm, threshold, scale = percentile_clipping(history, F(100), 3, 98)
    assert_same_bits(scale, F(1) / F(10))


def test_a_norm_at_the_threshold_is_not_clipped():
    assert percentile_clipping(np.full(100, 4, F), F(4), 1, 50)[3] == 1.0
    above = np.nextafter(F(4), F(5))
    assert percentile_clipping(np.full(100, 4, F), np.nextafter(above, F(5)), 1, 50)[3] < 1.0


@pytest.mark.parametrize(("step", "place"), [(1, 1), (99, 99), (100, 0), (101, 1), (199, 99), (200, 0), (1_000_007, 7)])
def test_place_is_the_step_modulo_100(step, place):
    before = np.full(100, 4, F)
    after = percentile_clipping(before, F(1), step, 50)[0]
    assert np.flatnonzero(after != before).tolist() == [place]
    assert after[place] == 1.0


@pytest.mark.parametrize("skipped", [0.0, -0.0, np.inf, np.nan])
def test_zero_and_not_finite_norms_leave_no_trace(skipped):
    for before in (empty_history(), np.full(100, 4, F)):
        history, norm, threshold, scale = percentile_clipping(before, F(skipped), 3, 5)
        assert_same_bits(history, before)
        assert scale == 1.0 and type(scale) is F
        assert threshold == math.sqrt(before[0])
        assert_same_bits(norm, np.sqrt(F(skipped)))


def test_first_recorded_norm_fills_all_places_even_after_skipped_steps():
    history = empty_history()
    for step, norm in enumerate([0.0, np.nan, np.inf], 1):
        history = percentile_clipping(history, F(norm), step, 5)[0]
    assert not history.any()
    history = percentile_clipping(history, F(2.0**-149), 4, 5)[0]
    assert_same_bits(history, np.full(100, 2.0**-149, F))


@pytest.mark.parametrize("percentile", [1, 5, 50, 99])
def test_250_steps_against_a_plain_list(percentile):
    rng = np.random.default_rng(percentile)
    norms = (rng.standard_normal(251) ** 2 * 10.0 ** rng.integers(-3, 3, 251)).astype(F)
    norms[rng.integers(0, 251, 20)] = 0.0
    norms[rng.integers(0, 251, 5)] = np.nan
    norms[rng.integers(0, 251, 5)] = np.inf
    history, places, clipped = empty_history(), None, 0
    for step in range(1, 251):
        current = norms[step]
        before = history.copy()
        history, norm, threshold, scale = percentile_clipping(history, current, step, percentile)
        if math.isfinite(current) and current > 0:
            places = [current] * 100 if places is None else places
            places[step % 100] = current
            expected = math.sqrt(sorted(places)[percentile])  # a float32 root: rounding twice is harmless
            assert_same_bits(threshold, F(expected))
            clipped += scale < 1
            assert_same_bits(scale, min(F(1), threshold / norm))
        else:
            assert_same_bits(history, before)
            assert scale == 1.0
        if places is not None:
            assert_same_bits(history, np.array(places, F))
    assert clipped > 0 or percentile == 99


def test_the_given_history_is_untouched():
    before = np.full(100, 4, F)
    percentile_clipping(before, F(1), 3, 5)
    assert (before == 4).all()


@pytest.mark.parametrize("percentile", [0, 100, -1, 101])
def test_percentile_out_of_range(percentile):
    with pytest.raises(ValueError, match=f"Invalid percentile: {percentile}"):
        percentile_clipping(empty_history(), F(1), 1, percentile)


@pytest.mark.parametrize("step", [0, -1])
def test_step_below_one(step):
    with pytest.raises(ValueError, match=f"Invalid step: {step}"):
        percentile_clipping(empty_history(), F(1), step, 5)


@pytest.mark.parametrize("shape", [(99,), (101,), (1, 100), ()])
def test_history_of_another_shape(shape):
    with pytest.raises(ValueError, match="Invalid gnorm_vec shape"):
        percentile_clipping(np.zeros(shape, F), F(1), 1, 5)

from __future__ import annotations

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lion.reference import (
    BLOCK_SIZE,
    Coefficients,
    coefficients,
    create_dynamic_map,
    dequantize_blockwise,
    quantize_blockwise,
    update_8bit_blockwise,
    update_8bit_tensorwise,
    update_32bit,
)
from tests import strategies
from tests.comparing import assert_same_bits
from tests.reference import exact

F = np.float32
BF16 = ml_dtypes.bfloat16
MAP = create_dynamic_map()
K = coefficients(0.125, (0.5, 0.75), 0.5)  # all exact: decay is 0.9375
DENORMAL = F(2.0**-149)


def step(param, grad, momentum, k=K, dtype=F, scale=1.0, inv_scale=1.0):
    arrays = np.array(param, dtype), np.array(grad, dtype), np.array(momentum, F)
    return update_32bit(*arrays, k, F(scale), F(inv_scale))


def fresh(size, blocks):
    return np.full(size, 127, np.uint8), np.zeros(blocks, F)


# --- coefficients


def test_coefficients_are_computed_in_float64_and_rounded_once():
    k = coefficients(1e-4, (0.9, 0.99), 0.01)
    assert k == Coefficients(F(1e-4), F(1 - 1e-6), F(0.9), F(1 - 0.9), F(0.99), F(1 - 0.99))
    assert {type(x) for x in k} == {F}
    assert k.one_minus_beta1 != F(1) - F(0.9)  # float32 arithmetic would show


@given(strategies.hyperparameters())
def test_coefficients_are_the_nearest_float32(hyperparameters):
    lr, (beta1, beta2), weight_decay = hyperparameters
    assume(lr * weight_decay < 1e38)
    k = coefficients(lr, (beta1, beta2), weight_decay)
    exact_values = [lr, 1.0 - lr * weight_decay, beta1, 1.0 - beta1, beta2, 1.0 - beta2]
    assert [Fraction(float(x)) for x in k] == [exact.float32(Fraction(x)) for x in exact_values]


def test_negative_zeros_are_zeros():
    negative, positive = coefficients(-0.0, (-0.0, -0.0), 0.0), coefficients(0.0, (0.0, 0.0), 0.0)
    assert_same_bits(np.array(negative), np.array(positive))


@pytest.mark.parametrize("lr", [float("inf"), float("nan"), 1e39])
def test_learning_rate_that_is_not_finite(lr):
    with pytest.raises(ValueError, match="Invalid learning rate"):
        coefficients(lr, (0.9, 0.99), 0.0)


@pytest.mark.parametrize("weight_decay", [float("inf"), float("nan"), 1e39])
def test_decay_that_is_not_finite(weight_decay):
    with pytest.raises(ValueError, match="Invalid weight_decay value"):
        coefficients(1.0, (0.9, 0.99), weight_decay)


# --- the update, by hand


@pytest.mark.parametrize("dtype", [F, np.float16, BF16])
def test_update_by_hand(dtype):
    """c = 0.5 m + 0.5 g, p = 0.9375 p - 0.125 sign(c), m = 0.75 m + 0.25 g; the last column cancels."""
    grad = [0.5, -1.5, 1.0, 0.0, -0.25]
    param, momentum = step([1.0, 1.0, -2.0, 1.0, 1.0], grad, [0.25, 0.25, 0.25, 0.0, 0.25], dtype=dtype)
    assert_same_bits(param, np.array([0.8125, 1.0625, -2.0, 0.9375, 0.9375], dtype))
    assert_same_bits(momentum, np.array([0.3125, -0.1875, 0.4375, 0.0, 0.125], F))


def test_decay_is_decoupled():
    """Coupled decay would turn the momentum and the sign: here the gradient is tiny and the parameter huge."""
    param, momentum = step([1024.0], [-(2.0**-20)], [0.0], coefficients(2.0**-4, (0.5, 0.5), 0.5))
    assert param.tolist() == [1024.0 * (1 - 2.0**-5) + 2.0**-4]
    assert momentum.tolist() == [-(2.0**-21)]


def test_two_products_then_one_sum():
    """A fused multiply-add would leave a rest of the first product: here the rounded products cancel."""
    k = coefficients(0.125, (0.9, 0.99), 0.0)
    grads = -np.arange(1, 4000, dtype=F)
    b1, rest = Fraction(float(k.beta1)), Fraction(float(k.one_minus_beta1))
    found = 0
    for g in grads:
        product = F(k.one_minus_beta1 * g)
        m = F(-product / k.beta1)
        if F(k.beta1 * m) + product == 0 and b1 * Fraction(float(m)) + rest * Fraction(float(g)) != 0:
            param, _ = step([1.0], [g], [m], k)
            assert param[0] == 1.0
            found += 1
    assert found > 100


def test_one_rounding_to_the_dtype_of_the_parameter():
    """1 - 2^-9 - 2^-10 is 0.75 of a bfloat16 unit below 1; decay stored on its own would tie back to 1."""
    k = coefficients(2.0**-10, (0.5, 0.5), 2.0)
    param, _ = step([1.0], [1.0], [0.0], k, BF16)
    assert param.astype(F).tolist() == [1 - 2.0**-8]


def test_learning_rate_is_not_rounded_to_the_dtype_of_the_parameter():
    """2e-8 is 0 in float16; with the decay to 0.75 units it decides the rounding of the smallest denormal."""
    k = coefficients(2e-8, (0.5, 0.5), 1.25e7)
    assert k.decay == 0.75
    param, _ = step([2.0**-24], [1.0], [0.0], k, np.float16)
    assert param.tolist() == [0.0]
    param, _ = step([2.0**-24], [-1.0], [0.0], k, np.float16)
    assert param.tolist() == [2.0**-24]


@pytest.mark.parametrize("dtype", strategies.FLOAT_DTYPES)
def test_zero_learning_rate_moves_the_momentum_only(dtype):
    values = strategies.make_floats("finite_bits", dtype, 500, 1)
    grad = np.ones(500, values.dtype)
    param, momentum = update_32bit(values, grad, np.zeros(500, F), coefficients(0.0, (0.9, 0.99), 0.1))
    assert (param == values).all()
    assert_same_bits(momentum, np.full(500, F(1 - 0.99)))


def test_sign_of_zero_is_zero():
    for g, m in [(0.0, 0.0), (-0.0, -0.0), (-0.0, 0.0), (-0.25, 0.25), (0.25, -0.25)]:
        param, _ = step([1.0], [g], [m], coefficients(0.125, (0.5, 0.75), 0.0))
        assert param.tolist() == [1.0]


def test_zeros_keep_their_sign_as_ieee_says():
    k = coefficients(0.125, (0.5, 0.5), 0.0)
    param, momentum = step([-0.0, -0.0, 0.0], [-0.0, 0.0, -0.0], [-0.0, -0.0, -0.0], k)
    assert_same_bits(param, np.array([-0.0, -0.0, 0.0], F))  # -0 - 0.125 * (+-0)
    assert_same_bits(momentum, np.array([-0.0, 0.0, -0.0], F))


def test_nan_is_seen():
    param, momentum = step([1.0, 1.0, np.nan], [np.nan, 1.0, 1.0], [1.0, np.nan, 1.0])
    assert np.isnan(param).all()
    assert np.isnan(momentum).tolist() == [True, True, False]
    param, _ = step([1.0], [np.nan], [0.0], coefficients(0.0, (0.5, 0.5), 0.0))
    assert np.isnan(param).all()


def test_infinities():
    param, momentum = step([1.0, 1.0, 1.0, np.inf], [np.inf, -np.inf, np.inf, 1.0], [0.0, 0.0, -np.inf, 0.0])
    assert param[:2].tolist() == [0.8125, 1.0625]
    assert momentum[:2].tolist() == [np.inf, -np.inf]
    assert np.isnan(param[2]) and np.isnan(momentum[2])
    assert param[3] == np.inf


def test_denormals_count():
    k = coefficients(0.125, (0.5, 0.75), 0.0)
    d = DENORMAL
    param, momentum = step([1.0, 1.0, 1.0, 1.0], [0.0, 2 * d, d, -3 * d], [2 * d, 0, 0, 0], k)
    assert param.tolist() == [0.875, 0.875, 1.0, 1.125]  # half of the smallest denormal ties to even, to zero
    assert_same_bits(momentum, np.array([2 * d, 0, 0, -d], F))  # 1.5 to 2, 0.5 to 0, 0.25 to 0, -0.75 to -1


def test_a_denormal_parameter_is_not_flushed():
    param, _ = step([DENORMAL, 3 * DENORMAL], [0.0, 0.0], [0.0, 0.0], coefficients(0.0, (0.5, 0.5), 0.0))
    assert_same_bits(param, np.array([DENORMAL, 3 * DENORMAL], F))
    param, _ = step([1.0], [1.0], [0.0], coefficients(float(DENORMAL), (0.5, 0.5), 0.0))
    assert param.tolist() == [1.0]


def test_overflow_is_infinity():
    param, _ = step([65504.0, -65504.0], [-1.0, 1.0], [0.0, 0.0], coefficients(16.0, (0.5, 0.5), 0.0), np.float16)
    assert param.tolist() == [np.inf, -np.inf]
    largest = np.finfo(F).max
    _, momentum = step([0.0], [largest], [0.0], K, scale=F(2))
    assert momentum.tolist() == [np.inf]


def test_scale_multiplies_the_gradient_first():
    scaled = step([1.0, 2.0], [0.5, -3.0], [0.25, 0.0], scale=F(0.25))
    plain = step([1.0, 2.0], [0.125, -0.75], [0.25, 0.0])
    for ours, expected in zip(scaled, plain, strict=True):
        assert_same_bits(ours, expected)
    param, momentum = step([1.0], [1.0], [0.0], scale=F(np.nan))
    assert np.isnan(param).all() and np.isnan(momentum).all()


def test_inv_scale_multiplies_before_scale():
    scaled = step([1.0, 2.0], [1.0, -6.0], [0.25, 0.0], scale=F(0.25), inv_scale=F(0.5))
    plain = step([1.0, 2.0], [0.125, -0.75], [0.25, 0.0])
    for ours, expected in zip(scaled, plain, strict=True):
        assert_same_bits(ours, expected)
    _, momentum = step([1.0], [2.0**100], [0.0], scale=F(2.0**-100), inv_scale=F(2.0**100))
    assert momentum.tolist() == [np.inf]


def test_gradient_and_parameter_may_differ_in_dtype():
    param, momentum = update_32bit(np.ones(1, BF16), np.ones(1, F), np.zeros(1, F), K)
    assert param.dtype == BF16 and momentum.dtype == F


def test_pure_and_shapes_kept():
    arrays = [strategies.make_floats("gradients", "float32", 24, i).reshape(2, 3, 4) for i in range(3)]
    before = [a.copy() for a in arrays]
    param, momentum = update_32bit(*arrays, K)
    assert param.shape == momentum.shape == (2, 3, 4)
    for a, b in zip(arrays, before, strict=True):
        assert_same_bits(a, b)
    param, momentum = step(1.0, 1.0, 0.0)
    assert param.shape == momentum.shape == ()


# --- oracles


@given(st.data(), strategies.dtypes(), strategies.hyperparameters())
def test_equals_exact_fractions_rounded_one_by_one(data, dtype, hyperparameters):
    lr, betas, weight_decay = hyperparameters
    assume(lr < 1e20)
    k = coefficients(lr, betas, weight_decay)
    size = 40
    param, grad = (data.draw(strategies.finite_floats(dtype, size)) for _ in range(2))
    momentum = data.draw(strategies.finite_floats("float32", size))
    scale = np.float32(data.draw(st.sampled_from([1.0, 0.7, 1e-3])))
    new_param, new_momentum = update_32bit(param, grad, momentum, k, scale)
    fractions = tuple(Fraction(float(x)) for x in k)
    checked = 0
    for i in range(size):
        values = (Fraction(float(x[i])) for x in (param, grad, momentum))
        try:
            expected = exact.lion(*values, fractions, Fraction(float(scale)), dtype)
        except OverflowError:
            continue
        assert (Fraction(float(new_param[i])), Fraction(float(new_momentum[i]))) == expected
        checked += 1
    assume(checked)


def test_float64_lion_over_100_steps():
    """Plain float64 Lion: the same path up to roundings where no sign is a close call."""
    rng = np.random.default_rng(0)
    lr, (beta1, beta2), weight_decay = 1e-3, (0.9, 0.99), 0.1
    k = coefficients(lr, (beta1, beta2), weight_decay)
    param32, momentum32 = rng.standard_normal(2000).astype(F), np.zeros(2000, F)
    param64, momentum64 = param32.astype(np.float64), np.zeros(2000)
    closest = np.full(2000, np.inf)
    for _ in range(100):
        grad = rng.standard_normal(2000).astype(F)
        param32, momentum32 = update_32bit(param32, grad, momentum32, k)
        c = beta1 * momentum64 + (1 - beta1) * grad.astype(np.float64)
        closest = np.minimum(closest, np.abs(c))
        param64 = param64 * (1 - lr * weight_decay) - lr * np.sign(c)
        momentum64 = beta2 * momentum64 + (1 - beta2) * grad
    clear = closest > 1e-6
    assert clear.sum() > 1900
    np.testing.assert_allclose(param32[clear], param64[clear], rtol=0, atol=2e-5)
    np.testing.assert_allclose(momentum32, momentum64, rtol=0, atol=2e-6)


# --- 8 bits


def test_8bit_step_by_hand():
    """A fresh state; m = 0.25 g, so absmax is 0.25 and the codes are those of g = 1, 0.5, -0.5, 0."""
    codes, absmax = fresh(4, 1)
    param, codes, absmax = update_8bit_blockwise(np.ones(4, F), np.array([1, 0.5, -0.5, 0], F), codes, absmax, MAP, K)
    assert_same_bits(param, np.array([0.8125, 0.8125, 1.0625, 0.9375], F))
    assert codes.tolist() == [255, 219, 35, 127]
    assert_same_bits(absmax, np.array([0.25], F))
    # next step: m = 0.75 * map[code] * 0.25 + 0.25 g
    grad = np.array([-1.0, 0.0, 0.0, 2.0], F)
    momentum = F(0.75) * (MAP[codes] * F(0.25)) + F(0.25) * grad
    _, codes, absmax = update_8bit_blockwise(param, grad, codes, absmax, MAP, K)
    assert absmax.tolist() == [0.5] == [np.abs(momentum).max()]
    expected = [min(range(256), key=lambda i: abs(float(MAP[i]) - float(m) / 0.5)) for m in momentum]
    assert codes.tolist() == expected


def test_8bit_state_is_scaled_by_the_new_absmax():
    codes, absmax = np.full(2, 255, np.uint8), np.array([8.0], F)
    _, codes, absmax = update_8bit_blockwise(np.zeros(2, F), np.array([0.0, 0.0], F), codes, absmax, MAP, K)
    assert absmax.tolist() == [6.0] and codes.tolist() == [255, 255]


def test_8bit_zero_gradient_keeps_a_fresh_state():
    codes, absmax = fresh(300, 2)
    param, new_codes, new_absmax = update_8bit_blockwise(np.ones(300, F), np.zeros(300, F), codes, absmax, MAP, K)
    assert_same_bits(param, np.full(300, 0.9375, F))
    assert_same_bits(new_codes, codes)
    assert_same_bits(new_absmax, absmax)


def test_8bit_nan_stays_within_its_block():
    grad = np.ones(600, F)
    grad[300] = np.nan
    codes, absmax = fresh(600, 3)
    param, codes, absmax = update_8bit_blockwise(np.ones(600, F), grad, codes, absmax, MAP, K)
    assert np.flatnonzero(np.isnan(param)).tolist() == [300]
    assert np.isnan(absmax).tolist() == [False, True, False]
    param, codes, absmax = update_8bit_blockwise(np.ones(600, F), np.ones(600, F), codes, absmax, MAP, K)
    assert np.flatnonzero(np.isnan(param)).tolist() == list(range(256, 512))


@given(st.data(), strategies.dtypes(), strategies.sizes(600), strategies.hyperparameters(), strategies.scales())
def test_8bit_is_dequantize_update_quantize(data, dtype, size, hyperparameters, scale):
    inv_scale = data.draw(strategies.inv_scales())
    assume(hyperparameters[0] * hyperparameters[2] < 1e38)
    k = coefficients(*hyperparameters)
    param, grad = (data.draw(strategies.floats(dtype, size)) for _ in range(2))
    block_size = data.draw(st.sampled_from([BLOCK_SIZE, 64, 1]))
    blocks = -(-size // block_size)
    codes = data.draw(strategies.codes(size))
    absmax = np.abs(data.draw(strategies.floats("float32", blocks)))
    momentum = dequantize_blockwise(codes, absmax, MAP, block_size)
    expected_param, new_momentum = update_32bit(param, grad, momentum, k, scale, inv_scale)
    expected = (expected_param, *quantize_blockwise(new_momentum, MAP, block_size))
    actual = update_8bit_blockwise(param, grad, codes, absmax, MAP, k, scale, block_size, inv_scale)
    for what, ours, theirs in zip(("param", "codes", "absmax"), actual, expected, strict=True):
        assert_same_bits(ours, theirs, what=what)
    if size:
        absmax = absmax[:1]
        actual = update_8bit_tensorwise(param, grad, codes, absmax, MAP, k, scale, inv_scale)
        expected = update_8bit_blockwise(param, grad, codes, absmax, MAP, k, scale, size, inv_scale)
        for what, ours, theirs in zip(("param", "codes", "max1"), actual, expected, strict=True):
            assert_same_bits(ours, theirs, what=what)


def test_tensorwise_is_one_block():
    grad = np.ones(1000, F)
    grad[999] = 4.0
    codes, absmax = fresh(1000, 1)
    _, codes, absmax = update_8bit_tensorwise(np.ones(1000, F), grad, codes, absmax, MAP, K)
    assert absmax.tolist() == [1.0]
    assert set(codes[:999].tolist()) == {201} and codes[999] == 255


def test_8bit_shapes():
    codes, absmax, ones = np.full((3, 100), 127, np.uint8), np.zeros(2, F), np.ones((3, 100), BF16)
    param, codes, absmax = update_8bit_blockwise(ones, ones, codes, absmax, MAP, K)
    assert param.shape == codes.shape == (3, 100) and absmax.shape == (2,)
    assert (param.dtype, codes.dtype, absmax.dtype) == (BF16, np.uint8, F)
    empty = update_8bit_blockwise(np.ones(0, F), np.ones(0, F), *fresh(0, 0), MAP, K)
    assert [x.shape for x in empty] == [(0,), (0,), (0,)]


def test_8bit_errors():
    ones, (codes, absmax) = np.ones(4, F), fresh(4, 1)
    with pytest.raises(ValueError, match="Invalid qmap"):
        update_8bit_blockwise(ones, ones, codes, absmax, MAP[:-1], K)
    with pytest.raises(ValueError, match="Invalid block_size: 0"):
        update_8bit_blockwise(ones, ones, codes, absmax, MAP, K, block_size=0)
    with pytest.raises(ValueError, match="Invalid absmax shape"):
        update_8bit_blockwise(ones, ones, codes, np.zeros(2, F), MAP, K)
    with pytest.raises(ValueError, match="Invalid absmax shape"):
        update_8bit_tensorwise(ones, ones, codes, np.zeros(2, F), MAP, K)

"""Every float32 there is, through the quantizers of the CPU kernels, and every code with absmax of every size."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import pytest

from lion import cpu_kernels, reference
from lion.cpu_kernels import quantization
from tests import strategies
from tests.comparing import assert_same_bits
from tests.differential import cpu_paths, every_float

QMAP = reference.create_dynamic_map()
K = np.array(reference.coefficients(1e-4, (0.0, 0.0), 0.0), np.float32)
ZERO_CODE = 127
SMALLEST_NORMAL = 0x00800000

pytestmark = pytest.mark.exhaustive


def update(
    grad: npt.NDArray[np.float32],
    codes: npt.NDArray[np.uint8] | None = None,
    absmax: npt.NDArray[np.float32] | None = None,
    k: npt.NDArray[np.float32] = K,
    dtype: str = "float32",
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """Return codes and absmax of blocks after a step; with beta2 = 0 the new momentum is the gradient."""
    param = np.zeros_like(grad)
    codes = np.full(grad.shape, ZERO_CODE, np.uint8) if codes is None else codes.copy()
    absmax = np.zeros(len(grad), np.float32) if absmax is None else absmax.copy()
    places = [np.array([array.ctypes.data]) for array in (param, grad, codes, absmax)]
    sizes, steps, scales = np.array([grad.size]), np.zeros(1, np.int64), np.ones(1, np.float32)
    cpu_kernels.update_8bit_blockwise(dtype, *places, sizes, steps, scales, k, 2)
    return codes, absmax


def quantize(values: npt.NDArray[np.float32], block_size: int) -> tuple[Any, Any]:
    """Return codes and absmax of blocks, without an update."""
    codes = np.empty(values.shape, np.uint8)
    absmax = np.empty(values.size // block_size, np.float32)
    places = values.ctypes.data, codes.ctypes.data, absmax.ctypes.data
    cpu_kernels.quantize_blockwise("float32", *places, values.size, QMAP, block_size, 2)
    return codes, absmax


@numba.njit(nogil=True, error_model="numpy")
def quantize_each(blocks: int, entries: int, count: int, absmax: np.float32, codes: int) -> None:
    for i in range(count):
        quantization.quantize_paired(blocks + 1024 * i, entries, absmax, codes + 256 * i)


def quantize_paired(blocks: npt.NDArray[np.float32], absmax: np.float32) -> npt.NDArray[np.uint8]:
    """Return the codes of blocks of one absmax, by way of paired blocks."""
    codes, entries, pairs = np.empty(blocks.shape, np.uint8), np.empty(256, np.uint32), every_float.paired(blocks)
    quantize_each(pairs.ctypes.data, entries.ctypes.data, len(blocks), absmax, codes.ctypes.data)
    return codes


def test_every_finite_value_gets_the_nearest_code() -> None:
    for blocks, maximum, expected in every_float.finite_blocks():
        every_float.check_finite(*update(blocks), maximum, expected)
        every_float.check_finite(*quantize(blocks, 256), maximum, expected)
        every_float.check_finite(quantize_paired(blocks, maximum), maximum, maximum, expected)


def test_every_pattern_that_is_not_finite_makes_its_block_nan() -> None:
    for blocks in every_float.not_finite_blocks():
        every_float.check_not_finite(*update(blocks))
        every_float.check_not_finite(*quantize(blocks, 256))


def test_every_pattern_as_a_block_of_its_own() -> None:
    count = 1 << 24
    for first in range(0, 1 << 32, count):
        patterns = np.arange(first, first + count, dtype=np.uint64).astype(np.uint32)
        codes, absmax = quantize(patterns.view(np.float32), 1)
        magnitude = patterns & np.uint32(every_float.SIGN - 1)
        finite = magnitude < every_float.INFINITY
        magnitude[magnitude < SMALLEST_NORMAL] = 0
        code_of_greatest = 255 if first < every_float.SIGN else 0
        assert (codes == np.where(finite & (magnitude > 0), code_of_greatest, ZERO_CODE)).all()
        assert np.where(finite, absmax.view(np.uint32) == magnitude, np.isnan(absmax)).all()


def test_all_codes_with_absmax_of_every_exponent() -> None:
    """The update only dequantizes and quantizes where the gradient is 0 and beta2 so near to 1 that it is 1."""
    k = np.array(reference.coefficients(0.0, (0.0, 1 - 2.0**-53), 0.0), np.float32)
    assert k[4] == 1
    for absmax in strategies.absmax_sweep(1024).reshape(255, -1):
        codes = np.tile(np.arange(256, dtype=np.uint8), absmax.size)
        values = reference.dequantize_blockwise(codes, absmax, QMAP, 256)
        expected, expected_absmax = reference.quantize_blockwise(values, QMAP, 256)
        zeros = {dtype: np.zeros((absmax.size, 256), item) for dtype, item in strategies.FLOAT_DTYPES.items()}
        updated = [update(grad, codes, absmax, k, dtype) for dtype, grad in zeros.items()]
        for actual in (quantize(values, 256), *updated):
            assert_same_bits(actual[0].reshape(-1), expected)
            assert_same_bits(actual[1], expected_absmax)
        if absmax[0] >= 2.0**-104:
            assert_same_bits(expected, codes)
            assert_same_bits(expected_absmax, absmax)


@pytest.mark.skipif(quantization.grouped is None, reason="the portable code has no groups")
@pytest.mark.parametrize("paired", [False, True])
def test_codes_of_a_group_that_are_not_the_nearest_are_not_sure(paired: bool) -> None:
    """Alone: in a block, a code that is not sure makes all others be looked up again."""
    group, quantize_group, quantize_pairs = quantization.GROUP, quantization.quantize_group, quantization.quantize_pairs

    @numba.njit(nogil=True, error_model="numpy")
    def quantize_groups(values: int, codes: int, sure: npt.NDArray[np.bool_]) -> None:
        for i in range(sure.size):
            first = values + 4 * group * i
            if paired:
                sure[i] = quantize_pairs(first, first + 2 * group, np.float32(1.0), codes + group * i)
            else:
                sure[i] = quantize_group(first, np.float32(1.0), codes + group * i)

    def by_groups(values: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
        codes, sure = np.empty(values.size, np.uint8), np.empty(values.size // group, np.bool_)
        groups = every_float.paired(values.reshape(-1, group)) if paired else values
        quantize_groups(groups.ctypes.data, codes.ctypes.data, sure)
        return codes, sure

    unsure = groups = 0
    for magnitudes in every_float.magnitudes_of_quotients(1 << 22):
        for values in (magnitudes, -magnitudes):
            codes, sure = by_groups(values)
            wrong = codes != every_float.nearest_codes(values)
            assert not by_groups(np.repeat(values[wrong], group))[1].any()
            unsure, groups = unsure + np.count_nonzero(~sure), groups + sure.size
    assert unsure < groups / 1000


@cpu_paths.on_others
def test_other_code_that_the_processor_has(lookups: str) -> None:
    cpu_paths.run_tests(lookups, "-m", "exhaustive", "-k", "finite or sure", __file__)

"""Every float32 there is, through the quantizer of the CPU kernels."""

from __future__ import annotations

import numpy as np
import pytest

import cpu_kernels
import reference

BLOCKS = 1 << 16
COUNT = BLOCKS * 255


@pytest.mark.exhaustive
def test_every_quotient_gets_the_nearest_code() -> None:
    """With beta2 = 0 and absmax 1, the new momentum is the gradient and its own quotient."""
    thresholds = reference.quantize_thresholds(reference.create_dynamic_map())
    grad = np.ones((BLOCKS, 256), np.float32)
    param, codes = np.zeros_like(grad), np.empty(grad.shape, np.uint8)
    absmax = np.zeros(BLOCKS, np.float32)
    k = np.array(reference.coefficients(1e-4, (0.0, 0.0), 0.0), np.float32)
    places = [np.array([array.ctypes.data], np.int64) for array in (param, grad, codes, absmax)]
    for sign in (0, 0x80000000):
        for begin in range(0, 0x3F800001, COUNT):
            magnitudes = np.minimum(np.arange(begin, begin + COUNT, dtype=np.uint32), 0x3F800000)
            values = (magnitudes | np.uint32(sign)).view(np.float32)
            grad[:, 1:] = values.reshape(BLOCKS, 255)
            codes[:] = 127
            absmax[:] = 0
            cpu_kernels.update_8bit_blockwise(
                "float32",
                *places,
                np.array([grad.size], np.int64),
                np.zeros(1, np.int64),
                np.ones(1, np.float32),
                k,
                2,
            )
            # Ascending values: the thresholds' places say it faster than a search per value.
            ascending = values if sign == 0 else values[::-1]
            places_of_thresholds = np.searchsorted(ascending, thresholds, side="right")
            expected = np.zeros(COUNT + 1, np.int64)
            np.add.at(expected, places_of_thresholds, 1)
            expected = np.cumsum(expected[:-1]).astype(np.uint8)
            actual = codes[:, 1:].reshape(-1)
            np.testing.assert_array_equal(actual if sign == 0 else actual[::-1], expected)

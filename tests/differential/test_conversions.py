"""float16 and bfloat16 in the reference and the CPU kernels: all values back, and rounding where the result changes."""

from __future__ import annotations

import functools
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import pytest
import torch

from lion import cpu_kernels, reference
from lion.cpu_kernels.device import load, store
from lion.cpu_kernels.rounding import load_pair, write_pair
from lion.reference.rounding import NEAREST
from tests import strategies
from tests.comparing import assert_same_bits
from tests.differential import conversions

CHUNK = 1 << 24

half_dtypes = pytest.mark.parametrize("dtype", conversions.FRACTION_BITS)


@functools.cache
def converter(dtype: str) -> Any:
    """Return a loop over the kernels' load and store, which the compiler vectorises as it does theirs."""

    @numba.njit(nogil=True, error_model="numpy")
    def convert(values: int, size: int, results: int) -> None:
        for i in range(size):
            store(dtype, results, i, load("float32", values, i))

    return convert


@functools.cache
def pair_converters() -> tuple[Any, Any]:
    """Return loops over the kernels' pairs of bfloat16: one that rounds, one that widens."""

    @numba.njit(nogil=True, error_model="numpy")
    def rounds(values: int, pairs: int, results: int) -> None:
        for i in range(pairs):
            write_pair(NEAREST, results, 0, i, load("float32", values, 2 * i), load("float32", values, 2 * i + 1))

    @numba.njit(nogil=True, error_model="numpy")
    def widens(values: int, pairs: int, results: int) -> None:
        for i in range(pairs):
            even, odd = load_pair(values, i)
            store("float32", results, 2 * i, even)
            store("float32", results, 2 * i + 1, odd)

    return rounds, widens


def check_rounding_of_pairs(values: npt.NDArray[np.float32], expected: npt.NDArray[np.uint16]) -> None:
    """Compare what becomes of values, of an even number, at both places of a pair."""
    found = np.empty(values.size, np.uint16)
    for step in (1, -1):
        ordered = np.ascontiguousarray(values[::step])
        pair_converters()[0](ordered.ctypes.data, values.size // 2, found.ctypes.data)
        conversions.assert_patterns(found[::step], expected, "bfloat16")


def check_rounding(dtype: str, values: npt.NDArray[np.float32], expected: npt.NDArray[np.uint16]) -> None:
    """Compare the reference's rounding, the vectorised one of the kernels, and a kernel's that takes one at a time."""
    with np.errstate(over="ignore", invalid="ignore"):
        by_reference = values.astype(strategies.FLOAT_DTYPES[dtype]).view(np.uint16)
    conversions.assert_patterns(by_reference, expected, dtype)
    found = np.empty(values.size, np.uint16)
    converter(dtype)(values.ctypes.data, values.size, found.ctypes.data)
    conversions.assert_patterns(found, expected, dtype)
    # The code of 1, with every value as the absmax of a block of its own.
    codes = np.full(values.size, 255, np.uint8)
    found[:] = 0
    places = codes.ctypes.data, values.ctypes.data, found.ctypes.data
    cpu_kernels.dequantize_blockwise(dtype, *places, values.size, reference.create_dynamic_map(), 1, 2)
    conversions.assert_patterns(found, expected, dtype)
    if dtype == "bfloat16":
        check_rounding_of_pairs(values, expected)


@half_dtypes
def test_all_values_widened(dtype: str) -> None:
    """With beta2 = 0 the new momentum is the gradient; a momentum of -0 leaves its zeros their signs."""
    grad = np.arange(1 << 16, dtype=np.uint16).view(strategies.FLOAT_DTYPES[dtype])
    expected = conversions.widened(dtype)
    with np.errstate(invalid="ignore"):
        assert_same_bits(grad.astype(np.float32), expected, what="as the reference widens")
    momentum = np.full(grad.size, -0.0, np.float32)
    param = np.zeros_like(grad)
    places = [np.array([array.ctypes.data]) for array in (param, grad, momentum)]
    k = np.array(reference.coefficients(0.0, (0.0, 0.0), 0.0), np.float32)
    sizes, steps, scales = np.array([grad.size]), np.zeros(1, np.int64), np.ones(1, np.float32)
    cpu_kernels.update_32bit(dtype, *places, sizes, steps, scales, k, 1)
    assert_same_bits(momentum, expected)


def test_all_values_widened_in_pairs() -> None:
    patterns = np.arange(1 << 16, dtype=np.uint16)
    for values in (patterns, np.ascontiguousarray(patterns[::-1])):
        found = np.empty(values.size, np.float32)
        pair_converters()[1](values.ctypes.data, values.size // 2, found.ctypes.data)
        assert_same_bits(found, conversions.widened("bfloat16")[values])


@half_dtypes
def test_rounding_at_every_boundary(dtype: str) -> None:
    patterns = conversions.boundary_patterns(dtype)
    values, expected = patterns.view(np.float32), conversions.rounded(dtype, patterns)
    assert set(expected & 0x7FFF) >= set(range(conversions.INFINITY[dtype] + 1))
    check_rounding(dtype, values, expected)
    by_torch = torch.from_numpy(values).to(getattr(torch, dtype)).view(torch.int16).numpy().view(np.uint16)
    conversions.assert_patterns(by_torch, expected, dtype)


@pytest.mark.exhaustive
@half_dtypes
def test_rounding_of_every_float32(dtype: str) -> None:
    for first in range(0, 1 << 32, CHUNK):
        patterns = np.arange(first, first + CHUNK, dtype=np.uint64).astype(np.uint32)
        check_rounding(dtype, patterns.view(np.float32), conversions.rounded_range(dtype, first, CHUNK))

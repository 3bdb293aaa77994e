"""8-bit quantization on the GPU: the optimizer state's, by table, and any map's, by binary search."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import cuda, uint32

from cuda_kernels.device import (
    FLOAT32,
    as_signed,
    bits,
    device,
    from_bits,
    load_2_words,
    load_f32,
    load_float,
    load_u8,
    mul,
    ordered,
    reciprocal,
    store_2_words,
    store_f32,
    store_float,
    store_u8,
    warp_max_u32,
    wrapping_add,
)
from reference.quantization import create_dynamic_map, quantize_thresholds

ABS_BITS = np.uint32(0x7FFFFFFF)
INFINITY_BITS = np.uint32(0x7F800000)
SMALLEST_NORMAL_BITS = np.uint32(0x00800000)
NAN = np.float32(np.nan)
ZERO_CODE = 127
ZERO_CODES = np.uint32(0x7F7F7F7F)

# The table quantizer. Scaled by 2**-104, every value in [-1, 1] has an exponent of at most 23, so the upper bits of
# its ordered pattern, from the 18th on, number 1473 buckets of either sign; one more rounds the table up to whole
# 128-bit loads. No bucket holds two thresholds. Values so small that the scaling rounds them lie below the smallest.
BUCKET_SCALE = np.float32(2.0**-104)
BUCKET_SHIFT = 17
BUCKETS_EACH_SIGN = 1474
MAP_WORDS = 256
LOOKUP_WORDS = MAP_WORDS + 2 * BUCKETS_EACH_SIGN
FIRST_BUCKET = MAP_WORDS + BUCKETS_EACH_SIGN


def lookup_table() -> npt.NDArray[np.uint32]:
    """Return the tables of the signed dynamic map that the 8-bit updates read from device memory.

    The 256 map values come first. Then comes one word per bucket: adding the lower bits of a value, shifted up by 7,
    leaves the value's code in the upper 8 bits; the sum carries into them exactly above the bucket's threshold.

    Returns:
        uint32 array.
    """
    qmap = create_dynamic_map()
    thresholds = (quantize_thresholds(qmap) * BUCKET_SCALE).view(np.int32)
    thresholds = thresholds ^ ((thresholds >> 31) & np.int32(0x7FFFFFFF))
    buckets = np.arange(-BUCKETS_EACH_SIGN, BUCKETS_EACH_SIGN, dtype=np.int64)
    begin = np.searchsorted(thresholds, buckets << BUCKET_SHIFT, side="left")
    end = np.searchsorted(thresholds, ((buckets + 1) << BUCKET_SHIFT) - 1, side="left")
    # A threshold that is the last value of its bucket is passed by none of the bucket's values.
    passed = np.where(begin < end, thresholds[np.minimum(begin, len(thresholds) - 1)] & ((1 << BUCKET_SHIFT) - 1), 0)
    carry = np.where(begin < end, (1 << 24) - ((passed + 1) << 7), 0)
    words = (begin << 24) + carry - ((buckets & 0xFF) << 24)
    return np.concatenate([qmap.view(np.uint32), (words & 0xFFFFFFFF).astype(np.uint32)])


@device
def load_codes(address: int, wide: bool, left: int) -> Any:
    """Return eight codes, four a word: by a 64-bit load if ``wide``, else the ``left`` ones and codes of 0."""
    if wide:
        return load_2_words(address)
    low = uint32(0)
    high = uint32(0)
    for j in range(4):
        low = uint32(low | uint32((load_u8(address + j) if j < left else uint32(ZERO_CODE)) << uint32(8 * j)))
        high = uint32(high | uint32((load_u8(address + j + 4) if j + 4 < left else uint32(ZERO_CODE)) << uint32(8 * j)))
    return low, high


@device
def store_codes(address: int, wide: bool, left: int, low: np.uint32, high: np.uint32) -> None:
    """Write eight codes: by a 64-bit store if ``wide``, else the first ``left`` ones."""
    if wide:
        store_2_words(address, low, high)
    else:
        for j in range(4):
            if j < left:
                store_u8(address + j, uint32(low >> uint32(8 * j)))
            if j + 4 < left:
                store_u8(address + j + 4, uint32(high >> uint32(8 * j)))


@device
def dequantize_8(low: np.uint32, high: np.uint32, absmax: np.float32, lookup: np.ndarray, values: np.ndarray) -> None:
    """Fill ``values`` with the values of eight codes."""
    for j in range(4):
        values[j] = mul(from_bits(lookup[uint32(uint32(low >> uint32(8 * j)) & uint32(0xFF))]), absmax)
        values[j + 4] = mul(from_bits(lookup[uint32(uint32(high >> uint32(8 * j)) & uint32(0xFF))]), absmax)


@device
def quantize(value: np.float32, lookup: np.ndarray) -> np.uint32:
    """Return the code of a value in [-1, 1]."""
    pattern = ordered(bits(mul(value, BUCKET_SCALE)))
    bucket = lookup[uint32(FIRST_BUCKET + (as_signed(pattern) >> BUCKET_SHIFT))]
    return uint32(wrapping_add(bucket, uint32(pattern << uint32(7))) >> uint32(24))


@device
def quantize_8(values: np.ndarray, factor: np.float32, lookup: np.ndarray) -> Any:
    """Return the codes of eight values times ``factor``, four a word."""
    low = uint32(0)
    high = uint32(0)
    for j in range(4):
        low = uint32(low | uint32(quantize(mul(values[j], factor), lookup) << uint32(8 * j)))
        high = uint32(high | uint32(quantize(mul(values[j + 4], factor), lookup) << uint32(8 * j)))
    return low, high


@device
def abs_max_8(values: np.ndarray, maximum: np.uint32) -> np.uint32:
    """Return the bits of the greatest magnitude of eight values and ``maximum``; above infinity's if one is NaN."""
    for j in range(8):
        maximum = max(maximum, uint32(bits(values[j]) & ABS_BITS))
    return maximum


@device
def stored_absmax(maximum: np.uint32) -> np.float32:
    """Return what a block whose greatest magnitude has these bits stores as its absmax."""
    if maximum >= INFINITY_BITS:
        return NAN
    if maximum < SMALLEST_NORMAL_BITS:
        return np.float32(0)
    return from_bits(maximum)


@device
def code_factor(maximum: np.uint32) -> np.float32:
    """Return what the values of a block are multiplied with: 1 / absmax, or 0 for a block stored as zeros."""
    return np.float32(0) if maximum < SMALLEST_NORMAL_BITS else reciprocal(from_bits(maximum))


@device
def store_quantized(
    address: int, wide: bool, left: int, values: np.ndarray, maximum: np.uint32, factor: np.float32, lookup: np.ndarray
) -> None:
    """Write the codes of eight values of a block whose greatest magnitude has the bits ``maximum``."""
    low, high = ZERO_CODES, ZERO_CODES
    if maximum < INFINITY_BITS:
        low, high = quantize_8(values, factor, lookup)
    store_codes(address, wide, left, low, high)


@device
def search(thresholds: np.ndarray, value: np.float32) -> int:
    """Return the number of thresholds strictly below a value; ``thresholds`` are 255 and a last one that is not."""
    code = 0
    for bit in range(8):
        step = 128 >> bit
        code += step if thresholds[code + step - 1] < value else 0
    return code


def make_quantize_blockwise(dtype: int) -> Callable[..., None]:
    """Return the kernel that quantizes with any map: a warp per block."""
    itemsize = 4 if dtype == FLOAT32 else 2

    def quantize_blockwise(
        values: int, codes: int, absmax: int, size: int, thresholds_address: int, block_size: int
    ) -> None:
        thresholds = cuda.shared.array(256, np.float32)
        i = cuda.threadIdx.x
        while i < 256:
            thresholds[i] = load_f32(thresholds_address + i * 4) if i < 255 else np.float32(np.inf)
            i += cuda.blockDim.x
        cuda.syncthreads()
        lane = cuda.threadIdx.x & 31
        warps = cuda.blockDim.x >> 5
        block = cuda.blockIdx.x * warps + (cuda.threadIdx.x >> 5)
        while block * block_size < size:
            first = block * block_size
            end = min(first + block_size, size)
            maximum = uint32(0)
            i = first + lane
            while i < end:
                maximum = max(maximum, uint32(bits(load_float(dtype, values + i * itemsize)) & ABS_BITS))
                i += 32
            maximum = warp_max_u32(maximum)
            if lane == 0:
                store_f32(absmax + block * 4, stored_absmax(maximum))
            finite = maximum < INFINITY_BITS
            factor = code_factor(maximum)
            i = first + lane
            while i < end:
                x = mul(load_float(dtype, values + i * itemsize), factor) if finite else np.float32(0)
                store_u8(codes + i, uint32(search(thresholds, x)))
                i += 32
            block += cuda.gridDim.x * warps

    return quantize_blockwise


def make_dequantize_blockwise(dtype: int) -> Callable[..., None]:
    """Return the kernel that turns codes of any map into values of a dtype."""
    itemsize = 4 if dtype == FLOAT32 else 2

    def dequantize_blockwise(codes: int, absmax: int, values: int, size: int, qmap: int, shift: int) -> None:
        entries = cuda.shared.array(256, np.float32)
        i = cuda.threadIdx.x
        while i < 256:
            entries[i] = load_f32(qmap + i * 4)
            i += cuda.blockDim.x
        cuda.syncthreads()
        i = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
        while i < size:
            value = mul(entries[load_u8(codes + i)], load_f32(absmax + (i >> shift) * 4))
            store_float(dtype, values + i * itemsize, value)
            i += cuda.gridDim.x * cuda.blockDim.x

    return dequantize_blockwise

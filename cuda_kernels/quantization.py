"""8-bit quantization on the GPU: the optimizer state's, by table, and any map's, by binary search."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from lion.cuda_kernels.device import (
    FLOAT32,
    WARPS,
    abs_max,
    as_signed,
    bits,
    byte,
    cuda,
    device,
    from_bits,
    load_f32,
    load_float,
    load_u8,
    mul,
    ordered,
    reciprocal,
    store_f32,
    store_float,
    store_u8,
    top_bytes,
    uint32,
    warp_max_u32,
    wrapping_add,
)
from lion.reference.quantization import SMALLEST_NORMAL, create_dynamic_map, quantize_thresholds

INFINITY = np.float32(np.inf)
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
def dequantize(code: np.uint32, absmax: np.float32, lookup: np.ndarray) -> np.float32:
    """Return the value of a code."""
    return mul(from_bits(lookup[code]), absmax)


@device
def dequantize_8(low: np.uint32, high: np.uint32, absmax: np.float32, lookup: np.ndarray, values: np.ndarray) -> None:
    """Fill ``values`` with the values of eight codes."""
    for j in range(4):
        values[j] = dequantize(byte(low, uint32(j)), absmax, lookup)
        values[j + 4] = dequantize(byte(high, uint32(j)), absmax, lookup)


@device
def code_on_top(value: np.float32, lookup: np.ndarray) -> np.uint32:
    """Return a word with the code of a value in [-1, 1] in its upper 8 bits."""
    pattern = ordered(bits(mul(value, BUCKET_SCALE)))
    bucket = lookup[uint32(FIRST_BUCKET + (as_signed(pattern) >> BUCKET_SHIFT))]
    return wrapping_add(bucket, uint32(pattern << uint32(7)))


@device
def quantize(value: np.float32, maximum: np.float32, factor: np.float32, lookup: np.ndarray) -> np.uint32:
    """Return the code of a value of a block whose greatest magnitude is ``maximum``."""
    if not maximum < INFINITY:
        return uint32(ZERO_CODE)
    return uint32(code_on_top(mul(value, factor), lookup) >> uint32(24))


@device
def quantize_8(values: np.ndarray, maximum: np.float32, factor: np.float32, lookup: np.ndarray) -> Any:
    """Return the codes of eight values of a block whose greatest magnitude is ``maximum``, four a word."""
    if not maximum < INFINITY:
        return ZERO_CODES, ZERO_CODES
    low = top_bytes(
        code_on_top(mul(values[0], factor), lookup),
        code_on_top(mul(values[1], factor), lookup),
        code_on_top(mul(values[2], factor), lookup),
        code_on_top(mul(values[3], factor), lookup),
    )
    high = top_bytes(
        code_on_top(mul(values[4], factor), lookup),
        code_on_top(mul(values[5], factor), lookup),
        code_on_top(mul(values[6], factor), lookup),
        code_on_top(mul(values[7], factor), lookup),
    )
    return low, high


@device
def abs_max_8(values: np.ndarray, maximum: np.float32) -> np.float32:
    """Return the greatest magnitude of eight values and ``maximum``, NaN if one is NaN."""
    for j in range(8):
        maximum = abs_max(maximum, values[j])
    return maximum


@device
def warp_max(maximum: np.float32) -> np.float32:
    """Return the greatest of the warp's magnitudes, NaN if one is NaN."""
    return from_bits(warp_max_u32(bits(maximum)))


@device
def stored_absmax(maximum: np.float32) -> np.float32:
    """Return what a block with this greatest magnitude stores as its absmax."""
    if not maximum < INFINITY:
        return NAN
    return maximum if maximum >= SMALLEST_NORMAL else np.float32(0)


@device
def code_factor(maximum: np.float32) -> np.float32:
    """Return what the values of a block are multiplied with: 1 / absmax, or 0 for a block stored as zeros."""
    return reciprocal(maximum) if maximum >= SMALLEST_NORMAL else np.float32(0)


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
        block = cuda.blockIdx.x * WARPS + (cuda.threadIdx.x >> 5)
        while block * block_size < size:
            first = block * block_size
            end = min(first + block_size, size)
            maximum = np.float32(0)
            i = first + lane
            while i < end:
                maximum = abs_max(maximum, load_float(dtype, values + i * itemsize))
                i += 32
            maximum = warp_max(maximum)
            if lane == 0:
                store_f32(absmax + block * 4, stored_absmax(maximum))
            finite = maximum < INFINITY
            factor = code_factor(maximum)
            i = first + lane
            while i < end:
                x = mul(load_float(dtype, values + i * itemsize), factor) if finite else np.float32(0)
                store_u8(codes + i, uint32(search(thresholds, x)))
                i += 32
            block += cuda.gridDim.x * WARPS

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

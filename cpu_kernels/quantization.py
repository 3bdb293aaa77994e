"""Blockwise dynamic 8-bit quantization on raw addresses."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from lion.cpu_kernels import avx512
from lion.cpu_kernels.device import (
    FLOATS,
    INTEGER,
    MAGNITUDE,
    TABLE,
    bits_to_float,
    by_dtype,
    float_to_bits,
    inlined,
    kernel,
    load,
    store,
)
from lion.cpu_kernels.pool import enter, leave, pull, run
from lion.reference import create_dynamic_map, quantize_thresholds

CHUNK = 16384
SMALLEST_NORMAL, INFINITY = np.uint32(0x00800000), np.uint32(0x7F800000)
NAN = np.float32(np.nan)

# Tables are frozen into the kernels: as arguments they might alias the outputs, which stops vectorisation.
QMAP = create_dynamic_map()


def _bucket_table() -> npt.NDArray[np.uint32]:
    """Return the table that quantizes with one lookup.

    A bucket is the 2**17 float32 that share their upper 15 bits once their bits are made to ascend; the 16384
    buckets cover (-2, 2), and none holds more than one threshold. Those bits, shifted left by 7 and added to the
    bucket's entry, give the code in the upper 8 bits: the lower bits carry at the threshold.
    """
    bits = quantize_thresholds(QMAP).view(np.int32)
    order = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).astype(np.int64)
    starts = np.arange(-8192, 8192) << 17
    code = np.searchsorted(order, starts, side="left")
    last = np.searchsorted(order, starts + (1 << 17), side="left")
    assert (last - code <= 1).all()
    next_threshold = np.append(order, 0)[code]
    carry = np.where(last > code, (1 << 24) - ((next_threshold + 1 - starts) << 7), 0)
    return ((code << 24) + carry - (starts << 7)).astype(np.uint32)


BUCKETS = _bucket_table()
ZERO_CODE = np.uint32(avx512.ZERO_CODE)


@inlined
def dequantize_block(codes: int, size: int, block: int) -> None:
    """Write the dynamic map's values of codes, not yet scaled.

    Args:
        codes: Address of the codes.
        size: Element count.
        block: Address of the float32 values to write, on the stack.
    """
    done = dequantize_groups(codes, size, block)
    for i in range(done, size):
        store("float32", block, i, QMAP[load("uint8", codes, i)])


@inlined
def quantize_block(block: int, entries: int, size: int, absmax: np.float32, codes: int) -> None:
    """Write the dynamic map's codes of a block scaled by a stored absmax.

    The table is looked up in a loop of its own that stores to the stack only: that loop becomes gathers, or stays
    scalar where gathers are slow, and the others vectorise either way.

    Args:
        block: Address of the float32 values, on the stack; destroyed.
        entries: Address of as many uint32 to work in, on the stack.
        size: Element count.
        absmax: The largest magnitude, or 0 or NaN, see :func:`stored_absmax`.
        codes: Address of the codes to write.
    """
    if not absmax > np.float32(0.0):
        for i in range(size):
            store("uint8", codes, i, ZERO_CODE)
        return
    reciprocal = np.float32(1.0) / absmax
    done = quantize_groups(block, entries, size, reciprocal, codes)
    for i in range(done, size):
        bits = np.int32(float_to_bits(load("float32", block, i) * reciprocal))
        # Ascends with the value, as a signed integer.
        order = np.int32(bits ^ np.int32(np.int32(bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))
        store("uint32", block, i, np.uint32(order))
        store("uint32", entries, i, np.uint32(np.int32(order >> np.int32(17)) + np.int32(8192)))
    for i in range(done, size):
        store("uint32", entries, i, BUCKETS[load("uint32", entries, i)])
    for i in range(done, size):
        shifted = np.uint32(load("uint32", block, i) << np.uint32(7))
        store("uint8", codes, i, np.uint32(np.uint32(load("uint32", entries, i) + shifted) >> np.uint32(24)))


if avx512.AVAILABLE:
    GROUP = avx512.GROUP

    # The last group of a block may be short, and there need not be memory beyond the last code.
    @inlined
    def dequantize_groups(codes: int, size: int, block: int) -> int:
        whole = size // GROUP * GROUP
        for i in range(0, whole, GROUP):
            avx512.dequantize_group(codes + i, block + 4 * i)
        if whole < size:
            last = block + 4 * whole
            for i in range(size - whole):
                store("uint8", last, i, load("uint8", codes, whole + i))
            avx512.dequantize_group(last, last)
        return size

    @inlined
    def quantize_groups(block: int, entries: int, size: int, reciprocal: np.float32, codes: int) -> int:
        whole = size // GROUP * GROUP
        for i in range(0, whole, GROUP):
            avx512.quantize_group(block + 4 * i, reciprocal, codes + i)
        if whole < size:
            avx512.quantize_group(block + 4 * whole, reciprocal, entries)
            for i in range(size - whole):
                store("uint8", codes, whole + i, load("uint8", entries, i))
        return size

else:

    @inlined
    def dequantize_groups(codes: int, size: int, block: int) -> int:
        return 0

    @inlined
    def quantize_groups(block: int, entries: int, size: int, reciprocal: np.float32, codes: int) -> int:
        return 0


@inlined
def threshold_code(x: np.float32, thresholds: npt.NDArray[np.float32]) -> np.uint32:
    """Return the number of ascending thresholds (of 255) strictly below ``x``."""
    code = np.uint32(0)
    for shift in range(7, -1, -1):
        # Arithmetic, because half of all branches would be mispredicted.
        above = np.uint32(thresholds[np.uint32(code + np.uint32((1 << shift) - 1))] < x)
        code = np.uint32(code + np.uint32(above << np.uint32(shift)))
    return code


@inlined
def stored_absmax(maximum: np.uint32) -> np.float32:
    """Return the absmax of a block from the bits of its largest magnitude."""
    if maximum >= INFINITY:
        return NAN
    if maximum < SMALLEST_NORMAL:
        return np.float32(0.0)
    return bits_to_float(maximum)


def quantize_blockwise(
    dtype: str,
    values: int,
    codes: int,
    absmax: int,
    size: int,
    qmap: npt.NDArray[np.float32],
    block_size: int,
    threads: int,
) -> None:
    """Quantize a tensor to 8-bit codes, see :func:`lion.reference.quantize_blockwise`.

    Args:
        dtype: The dtype of ``values``: "float32", "float16" or "bfloat16".
        values: Address of the tensor.
        codes: Address of the codes to write, uint8, one per element.
        absmax: Address of the absmax to write, float32, one per block.
        size: Element count.
        qmap: float32 array of shape (256,), ascending.
        block_size: Elements in a block, at least 1.
        threads: How many threads may work, at least 1.

    Raises:
        ValueError: If the map, the block size or the number of threads is invalid.
    """
    thresholds = quantize_thresholds(qmap)
    chunk_size = _chunk_size(block_size)
    sizes = np.array([size], np.int64)
    run(_quantize_kernel(dtype), threads, size, values, codes, absmax, sizes, thresholds, block_size, chunk_size)


def dequantize_blockwise(
    dtype: str,
    codes: int,
    absmax: int,
    values: int,
    size: int,
    qmap: npt.NDArray[np.float32],
    block_size: int,
    threads: int,
) -> None:
    """Write the values of codes, rounded once to the dtype, see :func:`lion.reference.dequantize_blockwise`.

    Args:
        dtype: The dtype of ``values``: "float32", "float16" or "bfloat16".
        codes: Address of the codes, uint8, one per element.
        absmax: Address of the absmax, float32, one per block.
        values: Address of the tensor to write.
        size: Element count.
        qmap: float32 array of shape (256,), ascending.
        block_size: Elements in a block, at least 1.
        threads: How many threads may work, at least 1.

    Raises:
        ValueError: If the map, the block size or the number of threads is invalid.
    """
    quantize_thresholds(qmap)  # refuses what is no map
    qmap = qmap.copy()  # contiguous and writable, as the kernel's signature says
    chunk_size = _chunk_size(block_size)
    sizes = np.array([size], np.int64)
    run(_dequantize_kernel(dtype), threads, size, codes, absmax, values, sizes, qmap, block_size, chunk_size)


def _chunk_size(block_size: int) -> int:
    if block_size < 1:
        raise ValueError(f"Invalid block_size: {block_size}; at least 1 is needed")
    return block_size * max(1, CHUNK // block_size)


@by_dtype
def _quantize_kernel(dtype: str) -> Any:
    @kernel(dtype, INTEGER, INTEGER, INTEGER, TABLE, FLOATS, INTEGER, INTEGER)
    def quantize(control, values, codes, absmax, sizes, thresholds, block_size, chunk_size):  # type: ignore[no-untyped-def]
        mode = enter(control)
        zero_code = threshold_code(np.float32(0.0), thresholds)
        tensor, first, begin, end = pull(control, sizes, chunk_size, 0, 0)
        while tensor < sizes.size:
            while begin < end:
                stop = min(begin + block_size, end)
                maximum = np.uint32(0)
                for i in range(begin, stop):
                    maximum = max(maximum, np.uint32(float_to_bits(load(dtype, values, i)) & MAGNITUDE))
                scale = stored_absmax(maximum)
                store("float32", absmax, begin // block_size, scale)
                if scale > np.float32(0.0):
                    reciprocal = np.float32(1.0) / scale
                    for i in range(begin, stop):
                        store("uint8", codes, i, threshold_code(load(dtype, values, i) * reciprocal, thresholds))
                else:
                    for i in range(begin, stop):
                        store("uint8", codes, i, zero_code)
                begin = stop
            tensor, first, begin, end = pull(control, sizes, chunk_size, tensor, first)
        leave(control, mode)

    return quantize


@by_dtype
def _dequantize_kernel(dtype: str) -> Any:
    @kernel(dtype, INTEGER, INTEGER, INTEGER, TABLE, FLOATS, INTEGER, INTEGER)
    def dequantize(control, codes, absmax, values, sizes, qmap, block_size, chunk_size):  # type: ignore[no-untyped-def]
        mode = enter(control)
        tensor, first, begin, end = pull(control, sizes, chunk_size, 0, 0)
        while tensor < sizes.size:
            while begin < end:
                stop = min(begin + block_size, end)
                scale = load("float32", absmax, begin // block_size)
                for i in range(begin, stop):
                    store(dtype, values, i, qmap[load("uint8", codes, i)] * scale)
                begin = stop
            tensor, first, begin, end = pull(control, sizes, chunk_size, tensor, first)
        leave(control, mode)

    return dequantize

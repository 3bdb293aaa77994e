"""Blockwise dynamic 8-bit quantization on raw addresses."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from lion.cpu_kernels import avx2, avx512, portable
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
    stack,
    store,
)
from lion.cpu_kernels.pool import enter, leave, pull, run
from lion.cpu_kernels.portable import PAIRS
from lion.reference import BLOCK_SIZE, quantize_thresholds

CHUNK = 16384
SMALLEST_NORMAL, INFINITY = np.uint32(0x00800000), np.uint32(0x7F800000)
NAN = np.float32(np.nan)
ZERO_CODE = np.uint32(127)

# The first that the processor has. Each has the same functions for GROUP elements.
grouped = next((module for module in (avx512, avx2) if module.AVAILABLE), None)
LOOKUPS = portable.NAME if grouped is None else grouped.NAME

if grouped is None:
    dequantize_block, _quantize = portable.dequantize, portable.quantize
    dequantize_paired, _quantize_paired = portable.dequantize_paired, portable.quantize_paired
else:
    GROUP, dequantize_group, quantize_group = grouped.GROUP, grouped.dequantize_group, grouped.quantize_group
    dequantize_pairs, quantize_pairs = grouped.dequantize_pairs, grouped.quantize_pairs

    # The last group may be short, and there need not be memory beyond the last code.
    @inlined
    def dequantize_block(codes: int, size: int, block: int) -> None:
        """Write the dynamic map's values of codes, not yet scaled.

        Args:
            codes: Address of the codes.
            size: Element count, at most ``BLOCK_SIZE``.
            block: Address of ``BLOCK_SIZE`` float32 on the stack, the first of which are written.
        """
        whole = size // GROUP * GROUP
        for i in range(0, whole, GROUP):
            dequantize_group(codes + i, block + 4 * i)
        if whole < size:
            last = block + 4 * whole
            for i in range(size - whole):
                store("uint8", last, i, load("uint8", codes, whole + i))
            dequantize_group(last, last)

    @inlined
    def _quantize(block: int, entries: int, size: int, reciprocal: np.float32, codes: int) -> None:
        whole = size // GROUP * GROUP
        sure = True
        for i in range(0, whole, GROUP):
            sure &= quantize_group(block + 4 * i, reciprocal, codes + i)
        if whole < size:
            sure &= quantize_group(block + 4 * whole, reciprocal, entries)
            for i in range(size - whole):
                store("uint8", codes, whole + i, load("uint8", entries, i))
        if not sure:
            portable.quantize(block, entries, size, reciprocal, codes)

    @inlined
    def dequantize_paired(codes: int, block: int) -> None:
        """Write the dynamic map's values of a whole block's codes, not yet scaled, as a paired block.

        Args:
            codes: Address of the codes.
            block: Address of ``BLOCK_SIZE`` float32 on the stack.
        """
        odd = block + 4 * PAIRS
        for i in range(0, BLOCK_SIZE, GROUP):
            dequantize_pairs(codes + i, block + 2 * i, odd + 2 * i)

    @inlined
    def _quantize_paired(block: int, entries: int, reciprocal: np.float32, codes: int) -> None:
        odd = block + 4 * PAIRS
        sure = True
        for i in range(0, BLOCK_SIZE, GROUP):
            sure &= quantize_pairs(block + 2 * i, odd + 2 * i, reciprocal, codes + i)
        if not sure:
            portable.quantize_paired(block, entries, reciprocal, codes)


@inlined
def quantize_block(block: int, entries: int, size: int, absmax: np.float32, codes: int) -> None:
    """Write the dynamic map's codes of a block scaled by a stored absmax.

    Args:
        block: Address of ``BLOCK_SIZE`` float32 on the stack, the first of which are the values; destroyed.
        entries: Address of as many uint32 to work in, on the stack.
        size: Element count, at most ``BLOCK_SIZE``.
        absmax: The largest magnitude, or 0 or NaN, see :func:`stored_absmax`.
        codes: Address of the codes to write.
    """
    if absmax > np.float32(0.0):
        _quantize(block, entries, size, np.float32(1.0) / absmax, codes)
    else:
        for i in range(size):
            store("uint8", codes, i, ZERO_CODE)


@inlined
def quantize_paired(block: int, entries: int, absmax: np.float32, codes: int) -> None:
    """Write the dynamic map's codes of a paired block, see :func:`quantize_block`."""
    if absmax > np.float32(0.0):
        _quantize_paired(block, entries, np.float32(1.0) / absmax, codes)
    else:
        for i in range(BLOCK_SIZE):
            store("uint8", codes, i, ZERO_CODE)


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
    sizes, shape = np.array([size], np.int64), (block_size, _chunk_size(block_size))
    if _is_dynamic(qmap):
        run(_quantize_dynamic_kernel(dtype), threads, sizes, values, codes, absmax, sizes, *shape)
    else:
        thresholds = quantize_thresholds(qmap)
        run(_quantize_kernel(dtype), threads, sizes, values, codes, absmax, sizes, thresholds, *shape)


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
    sizes, shape = np.array([size], np.int64), (block_size, _chunk_size(block_size))
    if _is_dynamic(qmap):
        run(_dequantize_dynamic_kernel(dtype), threads, sizes, codes, absmax, values, sizes, *shape)
    else:
        quantize_thresholds(qmap)  # refuses what is no map
        qmap = qmap.copy()  # contiguous and writable, as the kernel's signature says
        run(_dequantize_kernel(dtype), threads, sizes, codes, absmax, values, sizes, qmap, *shape)


def _is_dynamic(qmap: npt.NDArray[np.float32]) -> bool:
    own = portable.QMAP
    # Compared as bytes: -0 is another entry than 0.
    return qmap.dtype == own.dtype and qmap.shape == own.shape and qmap.tobytes() == own.tobytes()


def _chunk_size(block_size: int) -> int:
    if block_size < 1:
        raise ValueError(f"Invalid block_size: {block_size}; at least 1 is needed")
    return block_size * max(1, CHUNK // block_size)


@by_dtype
def _quantize_dynamic_kernel(dtype: str) -> Any:
    @kernel(dtype, INTEGER, INTEGER, INTEGER, TABLE, INTEGER, INTEGER)
    def quantize_dynamic(control, values, codes, absmax, sizes, block_size, chunk_size):  # type: ignore[no-untyped-def]
        block, entries = stack(BLOCK_SIZE), stack(BLOCK_SIZE)
        mode = enter(control)
        tensor, first, begin, end = pull(control, sizes, chunk_size, 0, 0)
        while tensor < sizes.size:
            while begin < end:
                stop = min(begin + block_size, end)
                maximum = np.uint32(0)
                for i in range(begin, stop):
                    maximum = max(maximum, np.uint32(float_to_bits(load(dtype, values, i)) & MAGNITUDE))
                scale = stored_absmax(maximum)
                store("float32", absmax, begin // block_size, scale)
                while begin < stop:
                    size = min(BLOCK_SIZE, stop - begin)
                    for i in range(size):
                        store("float32", block, i, load(dtype, values, begin + i))
                    quantize_block(block, entries, size, scale, codes + begin)
                    begin += size
            tensor, first, begin, end = pull(control, sizes, chunk_size, tensor, first)
        leave(control, mode)

    return quantize_dynamic


@by_dtype
def _dequantize_dynamic_kernel(dtype: str) -> Any:
    @kernel(dtype, INTEGER, INTEGER, INTEGER, TABLE, INTEGER, INTEGER)
    def dequantize_dynamic(control, codes, absmax, values, sizes, block_size, chunk_size):  # type: ignore[no-untyped-def]
        block = stack(BLOCK_SIZE)
        mode = enter(control)
        tensor, first, begin, end = pull(control, sizes, chunk_size, 0, 0)
        while tensor < sizes.size:
            while begin < end:
                stop = min(begin + block_size, end)
                scale = load("float32", absmax, begin // block_size)
                while begin < stop:
                    size = min(BLOCK_SIZE, stop - begin)
                    dequantize_block(codes + begin, size, block)
                    for i in range(size):
                        store(dtype, values, begin + i, load("float32", block, i) * scale)
                    begin += size
            tensor, first, begin, end = pull(control, sizes, chunk_size, tensor, first)
        leave(control, mode)

    return dequantize_dynamic


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

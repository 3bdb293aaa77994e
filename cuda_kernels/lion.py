"""The Lion update on the GPU, in place, with 32-bit and with 8-bit momentum.

Every kernel takes the address of a table (see :mod:`cuda_kernels.table`). A block of threads takes work items in turn;
within one, the warps take turns at its blocks of 256 elements, 8 consecutive ones a lane. Whole blocks of a tensor
whose addresses allow it are moved by 128 bits, before the rest, which are moved element by element.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import cuda, float32, uint32

from cuda_kernels.device import (
    FLOAT32,
    add,
    atomic_max_u32,
    bits,
    device,
    from_bits,
    load_4_words,
    load_8,
    load_f32,
    load_i64,
    load_u32,
    mul,
    store_8,
    store_f32,
    store_u32,
    sub,
    warp_max_u32,
)
from cuda_kernels.quantization import (
    LOOKUP_WORDS,
    abs_max_8,
    code_factor,
    dequantize_8,
    load_codes,
    store_quantized,
    stored_absmax,
)
from cuda_kernels.table import (
    ABSMAX,
    BETA1,
    BETA2,
    DECAY,
    GRAD,
    ITEM_BYTES,
    ITEM_END,
    ITEM_FIRST,
    ITEM_TENSOR,
    ITEMS,
    LOOKUP,
    LR,
    NEW_ABSMAX,
    ONE_MINUS_BETA1,
    ONE_MINUS_BETA2,
    PARAM,
    ROW_BYTES,
    ROWS,
    SCALE,
    SIZE,
    STATE,
    STEP,
    TENSORS,
    WORK,
)

SIGN_BIT = np.uint32(0x80000000)


@device
def read_item(table: int, item: int) -> Any:
    """Return the row's address, the first and the end block of a work item."""
    address = load_i64(table + WORK) + item * ITEM_BYTES
    row = table + ROWS + load_i64(address + ITEM_TENSOR) * ROW_BYTES
    return row, load_i64(address + ITEM_FIRST), load_i64(address + ITEM_END)


@device
def read_scale(row: int) -> np.float32:
    """Return the factor of a tensor's gradient."""
    address = load_i64(row + SCALE)
    return load_f32(address) if address != 0 else np.float32(1)


@device
def count_step(row: int) -> None:
    """Add 1 to a tensor's step."""
    address = load_i64(row + STEP)
    if address != 0:
        store_f32(address, add(load_f32(address), np.float32(1)))


@device
def blend(beta: np.float32, momentum: np.float32, one_minus_beta: np.float32, g: np.float32) -> np.float32:
    """Return ``beta * momentum + one_minus_beta * g``: two products, then one sum."""
    return add(mul(beta, momentum), mul(one_minus_beta, g))


@device
def descend(param: np.float32, c: np.float32, lr: np.float32, decay: np.float32) -> np.float32:
    """Return ``param * decay - lr * sign(c)``: sign(±0) is 0, sign(NaN) is NaN; ``lr`` is not negative."""
    signed_lr = from_bits(uint32(uint32(bits(c) & SIGN_BIT) | bits(lr)))
    return sub(mul(param, decay), signed_lr if abs(c) > np.float32(0) else abs(c))


@device
def read_coefficients(table: int) -> Any:
    """Return the six coefficients in the order of ``reference.Coefficients``."""
    return (
        load_f32(table + LR),
        load_f32(table + DECAY),
        load_f32(table + BETA1),
        load_f32(table + ONE_MINUS_BETA1),
        load_f32(table + BETA2),
        load_f32(table + ONE_MINUS_BETA2),
    )


@device
def end_of_wide(first: int, end: int, size: int, addresses: int) -> int:
    """Return the end of an item's blocks that are moved by 128 bits: whole ones, if all ``addresses`` allow it."""
    return min(end, size >> 8) if addresses & 15 == 0 else first


@device
def step_8(k: Any, scale: np.float32, param: np.ndarray, grad: np.ndarray, momentum: np.ndarray) -> None:
    """Update eight parameters and their momentum."""
    lr, decay, beta1, one_minus_beta1, beta2, one_minus_beta2 = k
    for j in range(8):
        g = mul(grad[j], scale)
        param[j] = descend(param[j], blend(beta1, momentum[j], one_minus_beta1, g), lr, decay)
        momentum[j] = blend(beta2, momentum[j], one_minus_beta2, g)


@device
def update_32bit_block(
    dtype: int, wide: bool, k: Any, scale: np.float32, param: int, grad: int, momentum: int, size: int, offset: int
) -> None:
    """Update this lane's 8 elements, from ``offset`` on, of a block with float32 momentum."""
    itemsize = 4 if dtype == FLOAT32 else 2
    p, g, m = cuda.local.array(8, float32), cuda.local.array(8, float32), cuda.local.array(8, float32)
    load_8(dtype, param + offset * itemsize, wide, size - offset, p)
    load_8(dtype, grad + offset * itemsize, wide, size - offset, g)
    load_8(FLOAT32, momentum + offset * 4, wide, size - offset, m)
    step_8(k, scale, p, g, m)
    store_8(dtype, param + offset * itemsize, wide, size - offset, p)
    store_8(FLOAT32, momentum + offset * 4, wide, size - offset, m)


def make_update_32bit(dtype: int) -> Callable[[int], None]:
    """Return the kernel that updates parameters of a dtype and their float32 momentum."""

    def update_32bit(table: int) -> None:
        k = read_coefficients(table)
        items = load_i64(table + ITEMS)
        lane, warp, warps = cuda.threadIdx.x & 31, cuda.threadIdx.x >> 5, cuda.blockDim.x >> 5
        item = cuda.blockIdx.x
        while item < items:
            row, first, end = read_item(table, item)
            if first == 0 and cuda.threadIdx.x == 0:
                count_step(row)
            param, grad, momentum = load_i64(row + PARAM), load_i64(row + GRAD), load_i64(row + STATE)
            size, scale = load_i64(row + SIZE), read_scale(row)
            wide_end = end_of_wide(first, end, size, param | grad | momentum)
            block = first + warp
            while block < wide_end:
                update_32bit_block(dtype, True, k, scale, param, grad, momentum, size, block * 256 + lane * 8)
                block += warps
            while block < end:
                update_32bit_block(dtype, False, k, scale, param, grad, momentum, size, block * 256 + lane * 8)
                block += warps
            item += cuda.gridDim.x

    return update_32bit


@device
def fill_lookup(address: int, lookup: np.ndarray, thread: int, threads: int) -> None:
    """Copy the lookup table from device to shared memory."""
    i = thread
    while i < LOOKUP_WORDS // 4:
        words = load_4_words(address + 16 * i)
        lookup[4 * i], lookup[4 * i + 1], lookup[4 * i + 2], lookup[4 * i + 3] = words
        i += threads


@device
def update_8bit_block(
    dtype: int,
    wide: bool,
    k: Any,
    scale: np.float32,
    lookup: np.ndarray,
    param: int,
    grad: int,
    codes: int,
    absmax: int,
    size: int,
    offset: int,
) -> None:
    """Update this lane's 8 elements, from ``offset`` on, of a block of 256 with 8-bit momentum."""
    itemsize = 4 if dtype == FLOAT32 else 2
    left = size - offset
    p, g, m = cuda.local.array(8, float32), cuda.local.array(8, float32), cuda.local.array(8, float32)
    load_8(dtype, param + offset * itemsize, wide, left, p)
    load_8(dtype, grad + offset * itemsize, wide, left, g)
    low, high = load_codes(codes + offset, wide, left)
    dequantize_8(low, high, load_f32(absmax), lookup, m)
    step_8(k, scale, p, g, m)
    store_8(dtype, param + offset * itemsize, wide, left, p)
    # Elements past the end are zeros here and change no maximum: a factor that is not finite, which would turn them
    # into NaN, does so to every element of the block.
    maximum = warp_max_u32(abs_max_8(m, uint32(0)))
    if offset & 255 == 0:
        store_f32(absmax, stored_absmax(maximum))
    store_quantized(codes + offset, wide, left, m, maximum, code_factor(maximum), lookup)


def make_update_8bit_blockwise(dtype: int) -> Callable[[int], None]:
    """Return the kernel that updates parameters of a dtype and their 8-bit momentum: a warp per block of 256."""

    def update_8bit_blockwise(table: int) -> None:
        lookup = cuda.shared.array(LOOKUP_WORDS, uint32)
        fill_lookup(load_i64(table + LOOKUP), lookup, cuda.threadIdx.x, cuda.blockDim.x)
        cuda.syncthreads()
        k = read_coefficients(table)
        items = load_i64(table + ITEMS)
        lane, warp, warps = cuda.threadIdx.x & 31, cuda.threadIdx.x >> 5, cuda.blockDim.x >> 5
        item = cuda.blockIdx.x
        while item < items:
            row, first, end = read_item(table, item)
            if first == 0 and cuda.threadIdx.x == 0:
                count_step(row)
            param, grad, codes = load_i64(row + PARAM), load_i64(row + GRAD), load_i64(row + STATE)
            absmax, size, scale = load_i64(row + ABSMAX), load_i64(row + SIZE), read_scale(row)
            wide_end = end_of_wide(first, end, size, param | grad | codes << 1)
            block = first + warp
            while block < wide_end:
                offset, place = block * 256 + lane * 8, absmax + block * 4
                update_8bit_block(dtype, True, k, scale, lookup, param, grad, codes, place, size, offset)
                block += warps
            while block < end:
                offset, place = block * 256 + lane * 8, absmax + block * 4
                update_8bit_block(dtype, False, k, scale, lookup, param, grad, codes, place, size, offset)
                block += warps
            item += cuda.gridDim.x

    return update_8bit_blockwise


def make_begin_tensorwise() -> Callable[[int], None]:
    """Return the kernel that counts the steps and clears what the maxima are gathered in: a thread per tensor."""

    def begin_tensorwise(table: int) -> None:
        tensor = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
        while tensor < load_i64(table + TENSORS):
            row = table + ROWS + tensor * ROW_BYTES
            count_step(row)
            if load_i64(row + SIZE) > 0:
                store_u32(load_i64(row + NEW_ABSMAX), uint32(0))
            tensor += cuda.gridDim.x * cuda.blockDim.x

    return begin_tensorwise


@device
def new_momentum_max(
    dtype: int,
    wide: bool,
    k: Any,
    scale: np.float32,
    lookup: np.ndarray,
    grad: int,
    codes: int,
    absmax: np.float32,
    size: int,
    offset: int,
    maximum: np.uint32,
) -> np.uint32:
    """Return the bits of the greatest magnitude of the new momentum of 8 elements and ``maximum``."""
    itemsize = 4 if dtype == FLOAT32 else 2
    g, m = cuda.local.array(8, float32), cuda.local.array(8, float32)
    load_8(dtype, grad + offset * itemsize, wide, size - offset, g)
    low, high = load_codes(codes + offset, wide, size - offset)
    dequantize_8(low, high, absmax, lookup, m)
    for j in range(8):
        m[j] = blend(k[4], m[j], k[5], mul(g[j], scale))
    return abs_max_8(m, maximum)


def make_measure_tensorwise(dtype: int) -> Callable[[int], None]:
    """Return the kernel that gathers the greatest magnitude of each tensor's new momentum in ``new_absmax``."""

    def measure_tensorwise(table: int) -> None:
        lookup = cuda.shared.array(LOOKUP_WORDS, uint32)
        fill_lookup(load_i64(table + LOOKUP), lookup, cuda.threadIdx.x, cuda.blockDim.x)
        cuda.syncthreads()
        k = read_coefficients(table)
        items = load_i64(table + ITEMS)
        lane, warp, warps = cuda.threadIdx.x & 31, cuda.threadIdx.x >> 5, cuda.blockDim.x >> 5
        item = cuda.blockIdx.x
        while item < items:
            row, first, end = read_item(table, item)
            grad, codes = load_i64(row + GRAD), load_i64(row + STATE)
            size, scale = load_i64(row + SIZE), read_scale(row)
            if size > 0:
                absmax = load_f32(load_i64(row + ABSMAX))
                wide_end = end_of_wide(first, end, size, grad | codes << 1)
                maximum = uint32(0)
                block = first + warp
                while block < wide_end:
                    offset = block * 256 + lane * 8
                    maximum = new_momentum_max(
                        dtype, True, k, scale, lookup, grad, codes, absmax, size, offset, maximum
                    )
                    block += warps
                while block < end:
                    offset = block * 256 + lane * 8
                    maximum = new_momentum_max(
                        dtype, False, k, scale, lookup, grad, codes, absmax, size, offset, maximum
                    )
                    block += warps
                maximum = warp_max_u32(maximum)
                if lane == 0:
                    atomic_max_u32(load_i64(row + NEW_ABSMAX), maximum)
            item += cuda.gridDim.x

    return measure_tensorwise


@device
def update_tensorwise_block(
    dtype: int,
    wide: bool,
    k: Any,
    scale: np.float32,
    lookup: np.ndarray,
    param: int,
    grad: int,
    codes: int,
    absmax: np.float32,
    maximum: np.uint32,
    factor: np.float32,
    size: int,
    offset: int,
) -> None:
    """Update this lane's 8 elements, from ``offset`` on, of a tensor with one absmax."""
    itemsize = 4 if dtype == FLOAT32 else 2
    left = size - offset
    p, g, m = cuda.local.array(8, float32), cuda.local.array(8, float32), cuda.local.array(8, float32)
    load_8(dtype, param + offset * itemsize, wide, left, p)
    load_8(dtype, grad + offset * itemsize, wide, left, g)
    low, high = load_codes(codes + offset, wide, left)
    dequantize_8(low, high, absmax, lookup, m)
    step_8(k, scale, p, g, m)
    store_8(dtype, param + offset * itemsize, wide, left, p)
    store_quantized(codes + offset, wide, left, m, maximum, factor, lookup)


def make_update_tensorwise(dtype: int) -> Callable[[int], None]:
    """Return the kernel that updates parameters and codes once ``new_absmax`` holds the greatest magnitudes."""

    def update_tensorwise(table: int) -> None:
        lookup = cuda.shared.array(LOOKUP_WORDS, uint32)
        fill_lookup(load_i64(table + LOOKUP), lookup, cuda.threadIdx.x, cuda.blockDim.x)
        cuda.syncthreads()
        k = read_coefficients(table)
        items = load_i64(table + ITEMS)
        lane, warp, warps = cuda.threadIdx.x & 31, cuda.threadIdx.x >> 5, cuda.blockDim.x >> 5
        item = cuda.blockIdx.x
        while item < items:
            row, first, end = read_item(table, item)
            param, grad, codes = load_i64(row + PARAM), load_i64(row + GRAD), load_i64(row + STATE)
            size, scale = load_i64(row + SIZE), read_scale(row)
            if size > 0:
                absmax, maximum = load_f32(load_i64(row + ABSMAX)), load_u32(load_i64(row + NEW_ABSMAX))
                factor = code_factor(maximum)
                wide_end = end_of_wide(first, end, size, param | grad | codes << 1)
                block = first + warp
                while block < wide_end:
                    offset = block * 256 + lane * 8
                    update_tensorwise_block(
                        dtype,
                        True,
                        k,
                        scale,
                        lookup,
                        param,
                        grad,
                        codes,
                        absmax,
                        maximum,
                        factor,
                        size,
                        offset,
                    )
                    block += warps
                while block < end:
                    offset = block * 256 + lane * 8
                    update_tensorwise_block(
                        dtype,
                        False,
                        k,
                        scale,
                        lookup,
                        param,
                        grad,
                        codes,
                        absmax,
                        maximum,
                        factor,
                        size,
                        offset,
                    )
                    block += warps
            item += cuda.gridDim.x

    return update_tensorwise


def make_end_tensorwise() -> Callable[[int], None]:
    """Return the kernel that turns the gathered maxima into the new absmax: a thread per tensor."""

    def end_tensorwise(table: int) -> None:
        tensor = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
        while tensor < load_i64(table + TENSORS):
            row = table + ROWS + tensor * ROW_BYTES
            if load_i64(row + SIZE) > 0:
                address = load_i64(row + NEW_ABSMAX)
                absmax = stored_absmax(load_u32(address))
                store_f32(address, absmax)
                store_f32(load_i64(row + ABSMAX), absmax)
            tensor += cuda.gridDim.x * cuda.blockDim.x

    return end_tensorwise

"""The Lion update on the GPU, in place, with 32-bit and with 8-bit momentum.

Every kernel takes the address of a table (see :mod:`lion.cuda_kernels.table`). A block of threads takes work items in
turn; within one, the warps take turns at its blocks of 256 elements. Whole blocks of a tensor whose addresses allow it
go first, 8 elements a lane, by the widest accesses; the rest is moved element by element. Kernels of a smaller
``grad_alignment`` load gradients, and nothing else, in pieces of so many bytes: those of views of a bucket.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from lion.cuda_kernels.device import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    HALVES,
    TOGETHER,
    WARPS,
    abs_max,
    add,
    atomic_add_i64,
    atomic_max_u32,
    bits,
    cuda,
    device,
    float32,
    from_bits,
    load_4_words,
    load_8,
    load_8_of_1,
    load_f32,
    load_float,
    load_i64,
    load_u8,
    mul,
    store_8,
    store_8_of_1,
    store_f32,
    store_i64,
    store_u8,
    sub,
    to_floats,
    uint32,
)
from lion.cuda_kernels.quantization import (
    LOOKUP_WORDS,
    abs_max_8,
    code_factor,
    dequantize,
    dequantize_8,
    quantize,
    quantize_8,
    stored_absmax,
    warp_max,
)
from lion.cuda_kernels.rounding import (
    first_group,
    join_8_weights,
    load_8_weights,
    low_itemsize,
    misaligned,
    random_half,
    random_words_of_8,
    read_stream,
    read_weight,
    read_weights,
    write_8_weights,
    write_weight,
)
from lion.cuda_kernels.table import (
    ABSMAX,
    BETA1,
    BETA2,
    DECAY,
    DONE,
    FOUND_INF,
    GRAD,
    INV_SCALE,
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
    WIDEST,
    WORK,
)
from lion.cuda_kernels.tuning import DEFAULT, Tuning
from lion.reference.rounding import NEAREST, STOCHASTIC

SIGN_BIT = np.uint32(0x80000000)
ITEMSIZES = {FLOAT32: 4, FLOAT16: 2, BFLOAT16: 2}


@device
def read_item(table: int, item: int) -> Any:
    """Return the row's address, the first and the end block of a work item."""
    address = load_i64(table + WORK) + item * ITEM_BYTES
    row = table + ROWS + load_i64(address + ITEM_TENSOR) * ROW_BYTES
    return row, load_i64(address + ITEM_FIRST), load_i64(address + ITEM_END)


@device
def read_count(table: int, offset: int) -> int:
    """Return how many items or tensors a table has; none where infinities were found, so that nothing changes."""
    address = load_i64(table + FOUND_INF)
    if address != 0 and load_f32(address) != np.float32(0):
        return 0
    return load_i64(table + offset)


@device
def read_inv_scale(table: int) -> np.float32:
    """Return the factor that undoes the scaling of the loss."""
    address = load_i64(table + INV_SCALE)
    return load_f32(address) if address != 0 else np.float32(1)


@device
def keep(grad: np.float32, inv_scale: np.float32) -> np.float32:
    """Return a gradient of a loss that was not scaled; 1 is the factor then."""
    return grad


@device
def load_gradient(dtype: int, address: int, inv_scale: np.float32) -> np.float32:
    """Return an element of a gradient as float32, the scaling of the loss undone."""
    return mul(load_float(dtype, address), inv_scale)


@device
def read_scale(row: int) -> np.float32:
    """Return the factor that clips a tensor's gradient."""
    address = load_i64(row + SCALE)
    return load_f32(address) if address != 0 else np.float32(1)


@device
def count_step(row: int) -> None:
    """Add 1 to a tensor's step."""
    address = load_i64(row + STEP)
    if address != 0:
        store_f32(address, add(load_f32(address), np.float32(1)))


@device
def count_step_when_done(row: int, blocks: int, all_blocks: int) -> None:
    """Add 1 to a tensor's step, by the block of threads that is the last to end an item: until then all read it."""
    cuda.syncthreads()
    if cuda.threadIdx.x == 0:
        cuda.threadfence()
        if atomic_add_i64(row + DONE, blocks) + blocks == all_blocks:
            store_i64(row + DONE, 0)
            count_step(row)


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
    """Return the six coefficients in the order of ``lion.reference.Coefficients``."""
    return (
        load_f32(table + LR),
        load_f32(table + DECAY),
        load_f32(table + BETA1),
        load_f32(table + ONE_MINUS_BETA1),
        load_f32(table + BETA2),
        load_f32(table + ONE_MINUS_BETA2),
    )


@device
def end_of_wide(first: int, end: int, size: int, others: int, grads: int, grad_alignment: int) -> int:
    """Return the end of an item's blocks that are moved by 128 bits: whole ones, if the addresses allow it.

    Only the gradient's may be a multiple of a smaller ``grad_alignment``.
    """
    return min(end, size >> 8) if (others | grads & (grad_alignment - 1)) & (WIDEST - 1) == 0 else first


@device
def first_of_lane(first: int, gap: int) -> int:
    """Return the index of the first element that a lane takes of an item that begins with block ``first``."""
    if gap == TOGETHER:
        return first * 256 + cuda.threadIdx.x * 8
    return (first + (cuda.threadIdx.x >> 5)) * 256 + (cuda.threadIdx.x & 31) * 4


@device
def step(k: Any, scale: np.float32, param: np.float32, grad: np.float32, momentum: np.float32) -> Any:
    """Return a parameter and its momentum after one step."""
    lr, decay, beta1, one_minus_beta1, beta2, one_minus_beta2 = k
    g = mul(grad, scale)
    c = blend(beta1, momentum, one_minus_beta1, g)
    return descend(param, c, lr, decay), blend(beta2, momentum, one_minus_beta2, g)


def make_update_32bit(
    dtype: int,
    grad_dtype: int,
    weights: int = NEAREST,
    scaled_loss: bool = False,
    grad_alignment: int = WIDEST,
    tuning: Tuning = DEFAULT,
) -> Callable[[int], None]:
    """Return the kernel that updates parameters of a dtype and their float32 momentum."""
    itemsize, grad_itemsize, low_size = ITEMSIZES[dtype], ITEMSIZES[grad_dtype], low_itemsize(weights)
    unscaled = mul if scaled_loss else keep
    gap, ahead = HALVES if tuning.halves else TOGETHER, tuning.ahead

    def update_32bit(table: int) -> None:
        p, g, m = cuda.local.array(8, float32), cuda.local.array(8, float32), cuda.local.array(8, float32)
        pw, gw, mw = cuda.local.array(8, uint32), cuda.local.array(8, uint32), cuda.local.array(8, uint32)
        lw = cuda.local.array(4, uint32)
        k, inv_scale = read_coefficients(table), read_inv_scale(table)
        items = read_count(table, ITEMS)
        item = cuda.blockIdx.x
        while item < items:
            row, first, end = read_item(table, item)
            if weights != STOCHASTIC and first == 0 and cuda.threadIdx.x == 0:
                count_step(row)
            params, grads, momenta = load_i64(row + PARAM), load_i64(row + GRAD), load_i64(row + STATE)
            size, scale = load_i64(row + SIZE), read_scale(row)
            lows, origin = read_weights(weights, row)
            stream = read_stream(weights, table, row, False)
            others = params | momenta | misaligned(weights, lows, origin)
            wide_end = end_of_wide(first, end, size, others, grads, grad_alignment)
            i = first_of_lane(first, gap)
            param, grad, momentum = params + i * itemsize, grads + i * grad_itemsize, momenta + i * 4
            lower, group = lows + i * low_size, first_group(gap, origin + i, cuda.threadIdx.x)
            if ahead and momentum < momenta + wide_end * (256 * 4):
                load_8_weights(weights, dtype, gap, param, lower, pw, lw)
                load_8(grad_dtype, gap, grad_alignment, grad, gw)
                load_8(FLOAT32, gap, WIDEST, momentum, mw)
            while momentum < momenta + wide_end * (256 * 4):
                if not ahead:
                    load_8_weights(weights, dtype, gap, param, lower, pw, lw)
                    load_8(grad_dtype, gap, grad_alignment, grad, gw)
                    load_8(FLOAT32, gap, WIDEST, momentum, mw)
                join_8_weights(weights, dtype, pw, lw, p)
                to_floats(grad_dtype, gw, g)
                to_floats(FLOAT32, mw, m)
                for j in range(8):
                    p[j], m[j] = step(k, scale, p[j], unscaled(g[j], inv_scale), m[j])
                if ahead and momentum + WARPS * 256 * 4 < momenta + wide_end * (256 * 4):
                    next_param, next_lower = param + WARPS * 256 * itemsize, lower + WARPS * 256 * low_size
                    load_8_weights(weights, dtype, gap, next_param, next_lower, pw, lw)
                    load_8(grad_dtype, gap, grad_alignment, grad + WARPS * 256 * grad_itemsize, gw)
                    load_8(FLOAT32, gap, WIDEST, momentum + WARPS * 256 * 4, mw)
                random = random_words_of_8(weights, gap, stream, group, cuda.threadIdx.x)
                write_8_weights(weights, dtype, gap, param, lower, p, random)
                store_8(FLOAT32, gap, momentum, m)
                param += WARPS * 256 * itemsize
                grad += WARPS * 256 * grad_itemsize
                momentum += WARPS * 256 * 4
                lower += WARPS * 256 * low_size
                group += WARPS * 32
            i = wide_end * 256 + cuda.threadIdx.x
            while i < min(end * 256, size):
                param, momentum, lower = params + i * itemsize, momenta + i * 4, lows + i * low_size
                new_param, new_momentum = step(
                    k,
                    scale,
                    read_weight(weights, dtype, param, lower),
                    load_gradient(grad_dtype, grads + i * grad_itemsize, inv_scale),
                    load_f32(momentum),
                )
                write_weight(weights, dtype, param, lower, new_param, random_half(weights, stream, origin + i))
                store_f32(momentum, new_momentum)
                i += WARPS * 32
            if weights == STOCHASTIC:
                count_step_when_done(row, end - first, (size + 255) >> 8)
            item += cuda.gridDim.x

    return update_32bit


def gap_of_8bit(dtype: int, tuning: Tuning) -> int:
    """Return how far a lane's fours are apart: only parameters of 4 bytes take two stores for eight elements."""
    return HALVES if tuning.halves and dtype == FLOAT32 else TOGETHER


@device
def fill_lookup(address: int, lookup: np.ndarray, thread: int) -> None:
    """Copy the lookup table from device to shared memory."""
    i = thread
    while i < LOOKUP_WORDS // 4:
        words = load_4_words(address + 16 * i)
        lookup[4 * i], lookup[4 * i + 1], lookup[4 * i + 2], lookup[4 * i + 3] = words
        i += WARPS * 32


@device
def new_momentum(
    grad_dtype: int,
    k: Any,
    inv_scale: np.float32,
    scale: np.float32,
    grad: int,
    code: int,
    absmax: np.float32,
    lookup: np.ndarray,
) -> np.float32:
    """Return the momentum after one step of the element whose gradient and code lie at these addresses."""
    g = mul(load_gradient(grad_dtype, grad, inv_scale), scale)
    return blend(k[4], dequantize(load_u8(code), absmax, lookup), k[5], g)


@device
def update_8bit_element(
    weights: int,
    dtype: int,
    grad_dtype: int,
    k: Any,
    inv_scale: np.float32,
    scale: np.float32,
    param: int,
    low: int,
    grad: int,
    code: int,
    absmax: np.float32,
    maximum: np.float32,
    factor: np.float32,
    lookup: np.ndarray,
    random: np.uint32,
) -> None:
    """Update one element of a block whose new momentum has the greatest magnitude ``maximum``."""
    momentum = dequantize(load_u8(code), absmax, lookup)
    g = load_gradient(grad_dtype, grad, inv_scale)
    new_param, momentum = step(k, scale, read_weight(weights, dtype, param, low), g, momentum)
    write_weight(weights, dtype, param, low, new_param, random)
    store_u8(code, quantize(momentum, maximum, factor, lookup))


def make_update_8bit_blockwise(
    dtype: int,
    grad_dtype: int,
    weights: int = NEAREST,
    scaled_loss: bool = False,
    grad_alignment: int = WIDEST,
    tuning: Tuning = DEFAULT,
) -> Callable[[int], None]:
    """Return the kernel that updates parameters of a dtype and their 8-bit momentum: a warp per block of 256."""
    itemsize, grad_itemsize, low_size = ITEMSIZES[dtype], ITEMSIZES[grad_dtype], low_itemsize(weights)
    unscaled = mul if scaled_loss else keep
    gap, ahead = gap_of_8bit(dtype, tuning), tuning.ahead

    def update_8bit_blockwise(table: int) -> None:
        p, g, m = cuda.local.array(8, float32), cuda.local.array(8, float32), cuda.local.array(8, float32)
        pw, gw, lw = cuda.local.array(8, uint32), cuda.local.array(8, uint32), cuda.local.array(4, uint32)
        lookup = cuda.shared.array(LOOKUP_WORDS, uint32)
        fill_lookup(load_i64(table + LOOKUP), lookup, cuda.threadIdx.x)
        cuda.syncthreads()
        k, inv_scale = read_coefficients(table), read_inv_scale(table)
        items = read_count(table, ITEMS)
        lane, warp = cuda.threadIdx.x & 31, cuda.threadIdx.x >> 5
        item = cuda.blockIdx.x
        while item < items:
            row, first, end = read_item(table, item)
            if weights != STOCHASTIC and first == 0 and cuda.threadIdx.x == 0:
                count_step(row)
            params, grads, codes = load_i64(row + PARAM), load_i64(row + GRAD), load_i64(row + STATE)
            scales, size, scale = load_i64(row + ABSMAX), load_i64(row + SIZE), read_scale(row)
            lows, origin = read_weights(weights, row)
            stream = read_stream(weights, table, row, False)
            others = params | codes << 1 | misaligned(weights, lows, origin)
            wide_end = end_of_wide(first, end, size, others, grads, grad_alignment)
            i = first_of_lane(first, gap)
            param, grad, code = params + i * itemsize, grads + i * grad_itemsize, codes + i
            lower, group, absmax = (
                lows + i * low_size,
                first_group(gap, origin + i, cuda.threadIdx.x),
                scales + (first + warp) * 4,
            )
            low, high, old_absmax = uint32(0), uint32(0), np.float32(0)
            if ahead and absmax < scales + wide_end * 4:
                load_8_weights(weights, dtype, gap, param, lower, pw, lw)
                load_8(grad_dtype, gap, grad_alignment, grad, gw)
                low, high = load_8_of_1(gap, code)
                old_absmax = load_f32(absmax)
            while absmax < scales + wide_end * 4:
                if not ahead:
                    load_8_weights(weights, dtype, gap, param, lower, pw, lw)
                    load_8(grad_dtype, gap, grad_alignment, grad, gw)
                    low, high = load_8_of_1(gap, code)
                    old_absmax = load_f32(absmax)
                join_8_weights(weights, dtype, pw, lw, p)
                to_floats(grad_dtype, gw, g)
                dequantize_8(low, high, old_absmax, lookup, m)
                for j in range(8):
                    p[j], m[j] = step(k, scale, p[j], unscaled(g[j], inv_scale), m[j])
                if ahead and absmax + WARPS * 4 < scales + wide_end * 4:
                    next_param, next_lower = param + WARPS * 256 * itemsize, lower + WARPS * 256 * low_size
                    load_8_weights(weights, dtype, gap, next_param, next_lower, pw, lw)
                    load_8(grad_dtype, gap, grad_alignment, grad + WARPS * 256 * grad_itemsize, gw)
                    low, high = load_8_of_1(gap, code + WARPS * 256)
                    old_absmax = load_f32(absmax + WARPS * 4)
                random = random_words_of_8(weights, gap, stream, group, cuda.threadIdx.x)
                write_8_weights(weights, dtype, gap, param, lower, p, random)
                maximum = warp_max(abs_max_8(m, np.float32(0)))
                if lane == 0:
                    store_f32(absmax, stored_absmax(maximum))
                new_low, new_high = quantize_8(m, maximum, code_factor(maximum), lookup)
                store_8_of_1(gap, code, new_low, new_high)
                param += WARPS * 256 * itemsize
                grad += WARPS * 256 * grad_itemsize
                code += WARPS * 256
                lower += WARPS * 256 * low_size
                group += WARPS * 32
                absmax += WARPS * 4
            block = wide_end + warp
            while block < end:
                old_absmax = load_f32(scales + block * 4)
                block_end = min(block * 256 + 256, size)
                maximum = np.float32(0)
                i = block * 256 + lane
                while i < block_end:
                    momentum = new_momentum(
                        grad_dtype, k, inv_scale, scale, grads + i * grad_itemsize, codes + i, old_absmax, lookup
                    )
                    maximum = abs_max(maximum, momentum)
                    i += 32
                maximum = warp_max(maximum)
                factor = code_factor(maximum)
                i = block * 256 + lane
                while i < block_end:
                    update_8bit_element(
                        *(weights, dtype, grad_dtype, k, inv_scale, scale, params + i * itemsize, lows + i * low_size),
                        *(grads + i * grad_itemsize, codes + i, old_absmax, maximum, factor, lookup),
                        random_half(weights, stream, origin + i),
                    )
                    i += 32
                if lane == 0:
                    store_f32(scales + block * 4, stored_absmax(maximum))
                block += WARPS
            if weights == STOCHASTIC:
                count_step_when_done(row, end - first, (size + 255) >> 8)
            item += cuda.gridDim.x

    return update_8bit_blockwise


def make_begin_tensorwise() -> Callable[[int], None]:
    """Return the kernel that counts the steps and clears what the maxima are gathered in: a thread per tensor."""

    def begin_tensorwise(table: int) -> None:
        tensor = cuda.blockIdx.x * (WARPS * 32) + cuda.threadIdx.x
        while tensor < read_count(table, TENSORS):
            row = table + ROWS + tensor * ROW_BYTES
            count_step(row)
            if load_i64(row + SIZE) > 0:
                store_f32(load_i64(row + NEW_ABSMAX), np.float32(0))
            tensor += cuda.gridDim.x * (WARPS * 32)

    return begin_tensorwise


def make_measure_tensorwise(
    grad_dtype: int, scaled_loss: bool = False, grad_alignment: int = WIDEST
) -> Callable[[int], None]:
    """Return the kernel that gathers the greatest magnitude of each tensor's new momentum in ``new_absmax``."""
    itemsize = ITEMSIZES[grad_dtype]
    unscaled = mul if scaled_loss else keep

    def measure_tensorwise(table: int) -> None:
        g, m, gw = cuda.local.array(8, float32), cuda.local.array(8, float32), cuda.local.array(8, uint32)
        lookup = cuda.shared.array(LOOKUP_WORDS, uint32)
        fill_lookup(load_i64(table + LOOKUP), lookup, cuda.threadIdx.x)
        cuda.syncthreads()
        k, inv_scale = read_coefficients(table), read_inv_scale(table)
        items = read_count(table, ITEMS)
        item = cuda.blockIdx.x
        while item < items:
            row, first, end = read_item(table, item)
            grads, codes = load_i64(row + GRAD), load_i64(row + STATE)
            size, scale = load_i64(row + SIZE), read_scale(row)
            if size > 0:
                absmax = load_f32(load_i64(row + ABSMAX))
                wide_end = end_of_wide(first, end, size, codes << 1, grads, grad_alignment)
                maximum = np.float32(0)
                i = first * 256 + cuda.threadIdx.x * 8
                grad, code = grads + i * itemsize, codes + i
                while code < codes + wide_end * 256:
                    load_8(grad_dtype, TOGETHER, grad_alignment, grad, gw)
                    low, high = load_8_of_1(TOGETHER, code)
                    to_floats(grad_dtype, gw, g)
                    dequantize_8(low, high, absmax, lookup, m)
                    for j in range(8):
                        m[j] = blend(k[4], m[j], k[5], mul(unscaled(g[j], inv_scale), scale))
                    maximum = abs_max_8(m, maximum)
                    grad += WARPS * 256 * itemsize
                    code += WARPS * 256
                i = wide_end * 256 + cuda.threadIdx.x
                while i < min(end * 256, size):
                    momentum = new_momentum(
                        grad_dtype, k, inv_scale, scale, grads + i * itemsize, codes + i, absmax, lookup
                    )
                    maximum = abs_max(maximum, momentum)
                    i += WARPS * 32
                maximum = warp_max(maximum)
                if cuda.threadIdx.x & 31 == 0:
                    atomic_max_u32(load_i64(row + NEW_ABSMAX), bits(maximum))
            item += cuda.gridDim.x

    return measure_tensorwise


def make_update_tensorwise(
    dtype: int,
    grad_dtype: int,
    weights: int = NEAREST,
    scaled_loss: bool = False,
    grad_alignment: int = WIDEST,
    tuning: Tuning = DEFAULT,
) -> Callable[[int], None]:
    """Return the kernel that updates parameters and codes once ``new_absmax`` holds the greatest magnitudes."""
    itemsize, grad_itemsize, low_size = ITEMSIZES[dtype], ITEMSIZES[grad_dtype], low_itemsize(weights)
    unscaled = mul if scaled_loss else keep
    gap, ahead = gap_of_8bit(dtype, tuning), tuning.ahead

    def update_tensorwise(table: int) -> None:
        p, g, m = cuda.local.array(8, float32), cuda.local.array(8, float32), cuda.local.array(8, float32)
        pw, gw, lw = cuda.local.array(8, uint32), cuda.local.array(8, uint32), cuda.local.array(4, uint32)
        lookup = cuda.shared.array(LOOKUP_WORDS, uint32)
        fill_lookup(load_i64(table + LOOKUP), lookup, cuda.threadIdx.x)
        cuda.syncthreads()
        k, inv_scale = read_coefficients(table), read_inv_scale(table)
        items = read_count(table, ITEMS)
        item = cuda.blockIdx.x
        while item < items:
            row, first, end = read_item(table, item)
            params, grads, codes = load_i64(row + PARAM), load_i64(row + GRAD), load_i64(row + STATE)
            size, scale = load_i64(row + SIZE), read_scale(row)
            if size > 0:
                absmax, maximum = load_f32(load_i64(row + ABSMAX)), load_f32(load_i64(row + NEW_ABSMAX))
                factor = code_factor(maximum)
                lows, origin = read_weights(weights, row)
                stream = read_stream(weights, table, row, True)
                others = params | codes << 1 | misaligned(weights, lows, origin)
                wide_end = end_of_wide(first, end, size, others, grads, grad_alignment)
                i = first_of_lane(first, gap)
                param, grad, code = params + i * itemsize, grads + i * grad_itemsize, codes + i
                lower, group = lows + i * low_size, first_group(gap, origin + i, cuda.threadIdx.x)
                low, high = uint32(0), uint32(0)
                if ahead and code < codes + wide_end * 256:
                    load_8_weights(weights, dtype, gap, param, lower, pw, lw)
                    load_8(grad_dtype, gap, grad_alignment, grad, gw)
                    low, high = load_8_of_1(gap, code)
                while code < codes + wide_end * 256:
                    if not ahead:
                        load_8_weights(weights, dtype, gap, param, lower, pw, lw)
                        load_8(grad_dtype, gap, grad_alignment, grad, gw)
                        low, high = load_8_of_1(gap, code)
                    join_8_weights(weights, dtype, pw, lw, p)
                    to_floats(grad_dtype, gw, g)
                    dequantize_8(low, high, absmax, lookup, m)
                    for j in range(8):
                        p[j], m[j] = step(k, scale, p[j], unscaled(g[j], inv_scale), m[j])
                    if ahead and code + WARPS * 256 < codes + wide_end * 256:
                        next_param, next_lower = param + WARPS * 256 * itemsize, lower + WARPS * 256 * low_size
                        load_8_weights(weights, dtype, gap, next_param, next_lower, pw, lw)
                        load_8(grad_dtype, gap, grad_alignment, grad + WARPS * 256 * grad_itemsize, gw)
                        low, high = load_8_of_1(gap, code + WARPS * 256)
                    random = random_words_of_8(weights, gap, stream, group, cuda.threadIdx.x)
                    write_8_weights(weights, dtype, gap, param, lower, p, random)
                    new_low, new_high = quantize_8(m, maximum, factor, lookup)
                    store_8_of_1(gap, code, new_low, new_high)
                    param += WARPS * 256 * itemsize
                    grad += WARPS * 256 * grad_itemsize
                    code += WARPS * 256
                    lower += WARPS * 256 * low_size
                    group += WARPS * 32
                i = wide_end * 256 + cuda.threadIdx.x
                while i < min(end * 256, size):
                    update_8bit_element(
                        *(weights, dtype, grad_dtype, k, inv_scale, scale, params + i * itemsize, lows + i * low_size),
                        *(grads + i * grad_itemsize, codes + i, absmax, maximum, factor, lookup),
                        random_half(weights, stream, origin + i),
                    )
                    i += WARPS * 32
            item += cuda.gridDim.x

    return update_tensorwise


def make_end_tensorwise() -> Callable[[int], None]:
    """Return the kernel that turns the gathered maxima into the new absmax: a thread per tensor."""

    def end_tensorwise(table: int) -> None:
        tensor = cuda.blockIdx.x * (WARPS * 32) + cuda.threadIdx.x
        while tensor < read_count(table, TENSORS):
            row = table + ROWS + tensor * ROW_BYTES
            if load_i64(row + SIZE) > 0:
                address = load_i64(row + NEW_ABSMAX)
                absmax = stored_absmax(load_f32(address))
                store_f32(address, absmax)
                store_f32(load_i64(row + ABSMAX), absmax)
            tensor += cuda.gridDim.x * (WARPS * 32)

    return end_tensorwise

"""The Lion update in place, many tensors a call, with 32-bit and with 8-bit momentum.

Tables are int64 arrays with an entry per tensor: raw addresses of contiguous tensors, which
need not be aligned.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt

from lion.cpu_kernels.device import (
    FLOAT32,
    FLOATS,
    MAGNITUDE,
    ROWS,
    TABLE,
    atomic_max_bits,
    bits_to_float,
    by_dtype,
    float_to_bits,
    inlined,
    kernel,
    load,
    stack,
    store,
)
from lion.cpu_kernels.pool import Int64Array, enter, leave, pull, run
from lion.cpu_kernels.portable import PAIRS
from lion.cpu_kernels.quantization import (
    CHUNK,
    dequantize_block,
    dequantize_paired,
    quantize_block,
    quantize_paired,
    stored_absmax,
)
from lion.cpu_kernels.rounding import (
    RANDOM_ITEMS,
    SPAN,
    Weights,
    load_pair,
    mode_of,
    prepare,
    read,
    read_pair,
    rows_of,
    write,
    write_pair,
)
from lion.reference import BLOCK_SIZE
from lion.reference.rounding import NEAREST, STOCHASTIC

Float32Array = npt.NDArray[np.float32]
SIGN = np.uint32(0x80000000)


def update_32bit(
    dtype: str,
    params: Int64Array,
    grads: Int64Array,
    momentums: Int64Array,
    sizes: Int64Array,
    steps: Int64Array,
    scales: Float32Array,
    k: Float32Array,
    threads: int,
    inv_scale: float | np.float32 = 1.0,
    grad_dtype: str | None = None,
    weights: Weights = None,
) -> None:
    """Step tensors with float32 momentum, see :func:`lion.reference.update_32bit`.

    Args:
        dtype: The dtype of the parameters: "float32", "float16" or "bfloat16".
        params: Addresses of the parameters, updated in place.
        grads: Addresses of the gradients.
        momentums: Addresses of the momentum, float32, updated in place.
        sizes: Element counts.
        steps: Addresses of float32 step counters that grow by 1; 0 for none.
        scales: float32 array: factors that clip the gradients.
        k: float32 array of shape (6,): the fields of :class:`lion.reference.Coefficients`.
        threads: How many threads may work, at least 1.
        inv_scale: Factor that undoes the scaling of the loss, rounded to float32 (default: 1).
        grad_dtype: The dtype of the gradients (default: None, that of the parameters).
        weights: How bfloat16 parameters are kept (default: None, rounded to nearest).

    Raises:
        ValueError: If a dtype is another, ``weights`` does not fit, or ``threads`` is below 1.
    """
    update = _update_32bit_kernel(dtype, grad_dtype or dtype, mode=mode_of(dtype, weights))
    rows = rows_of(weights, steps)
    run(update, threads, sizes, params, grads, momentums, sizes, steps, scales, k, inv_scale, rows)


def update_8bit_blockwise(
    dtype: str,
    params: Int64Array,
    grads: Int64Array,
    codes: Int64Array,
    absmax: Int64Array,
    sizes: Int64Array,
    steps: Int64Array,
    scales: Float32Array,
    k: Float32Array,
    threads: int,
    inv_scale: float | np.float32 = 1.0,
    grad_dtype: str | None = None,
    weights: Weights = None,
) -> None:
    """Step tensors with blockwise 8-bit momentum, see :func:`lion.reference.update_8bit_blockwise`.

    The map is the signed dynamic map, the block size 256.

    Args:
        dtype: The dtype of the parameters: "float32", "float16" or "bfloat16".
        params: Addresses of the parameters, updated in place.
        grads: Addresses of the gradients.
        codes: Addresses of the codes, uint8, updated in place.
        absmax: Addresses of the absmax, float32, one per block, updated in place.
        sizes: Element counts.
        steps: Addresses of float32 step counters that grow by 1; 0 for none.
        scales: float32 array: factors that clip the gradients.
        k: float32 array of shape (6,): the fields of :class:`lion.reference.Coefficients`.
        threads: How many threads may work, at least 1.
        inv_scale: Factor that undoes the scaling of the loss, rounded to float32 (default: 1).
        grad_dtype: The dtype of the gradients (default: None, that of the parameters).
        weights: How bfloat16 parameters are kept (default: None, rounded to nearest).

    Raises:
        ValueError: If a dtype is another, ``weights`` does not fit, or ``threads`` is below 1.
    """
    update = _update_8bit_kernel(dtype, grad_dtype or dtype, mode=mode_of(dtype, weights))
    rows = rows_of(weights, steps)
    run(update, threads, sizes, params, grads, codes, absmax, sizes, steps, scales, k, inv_scale, rows)


def update_8bit_tensorwise(
    dtype: str,
    params: Int64Array,
    grads: Int64Array,
    codes: Int64Array,
    absmax: Int64Array,
    new_absmax: Int64Array,
    sizes: Int64Array,
    steps: Int64Array,
    scales: Float32Array,
    k: Float32Array,
    threads: int,
    inv_scale: float | np.float32 = 1.0,
    grad_dtype: str | None = None,
    weights: Weights = None,
) -> None:
    """Step tensors with tensor-wise 8-bit momentum, see :func:`lion.reference.update_8bit_tensorwise`.

    Args:
        dtype: The dtype of the parameters: "float32", "float16" or "bfloat16".
        params: Addresses of the parameters, updated in place.
        grads: Addresses of the gradients.
        codes: Addresses of the codes, uint8, updated in place.
        absmax: Addresses of the absmax, float32, one per tensor, updated in place.
        new_absmax: Addresses of one float32 per tensor to work in; ends equal to ``absmax``.
        sizes: Element counts.
        steps: Addresses of float32 step counters that grow by 1; 0 for none.
        scales: float32 array: factors that clip the gradients.
        k: float32 array of shape (6,): the fields of :class:`lion.reference.Coefficients`.
        threads: How many threads may work, at least 1.
        inv_scale: Factor that undoes the scaling of the loss, rounded to float32 (default: 1).
        grad_dtype: The dtype of the gradients (default: None, that of the parameters).
        weights: How bfloat16 parameters are kept (default: None, rounded to nearest).

    Raises:
        ValueError: If a dtype is another, ``weights`` does not fit, or ``threads`` is below 1.
    """
    move = _move_tensorwise_kernel(dtype, grad_dtype or dtype, mode=mode_of(dtype, weights))
    requantize = _requantize_tensorwise_kernel(grad_dtype or dtype)
    reset, finish = _ends_of_tensorwise_kernels()
    rows = rows_of(weights, steps)
    run(reset, threads, None, new_absmax)
    run(move, threads, sizes, params, grads, codes, absmax, new_absmax, sizes, steps, scales, k, inv_scale, rows)
    run(requantize, threads, sizes, grads, codes, absmax, new_absmax, sizes, scales, k, inv_scale)
    run(finish, threads, None, absmax, new_absmax, sizes)


@inlined
def new_param(param: np.float32, c: np.float32, lr: np.float32, decay: np.float32) -> np.float32:
    """Return ``param * decay - lr * sign(c)``."""
    # Where c is 0 or NaN, the step lr * sign(c) is |c|.
    step = bits_to_float(np.uint32((float_to_bits(c) & SIGN) | float_to_bits(lr)))
    if not (c > np.float32(0.0) or c < np.float32(0.0)):
        step = bits_to_float(np.uint32(float_to_bits(c) & MAGNITUDE))
    return param * decay - step


@inlined
def count_step(address: int) -> None:
    """Add 1 to a step counter, if there is one."""
    if address != 0:
        store("float32", address, 0, load("float32", address, 0) + np.float32(1.0))


@by_dtype
def _update_32bit_kernel(dtype: str, grad_dtype: str, mode: int) -> Any:
    span = SPAN if mode == STOCHASTIC else CHUNK

    @kernel(f"{dtype}_{grad_dtype}_{mode}", TABLE, TABLE, TABLE, TABLE, TABLE, FLOATS, FLOATS, FLOAT32, ROWS)
    def update(control, params, grads, momentums, sizes, steps, scales, k, inv_scale, rows):  # type: ignore[no-untyped-def]
        randoms = stack(RANDOM_ITEMS)
        float_mode = enter(control)
        lr, decay, beta1, one_minus_beta1, beta2, one_minus_beta2 = k[0], k[1], k[2], k[3], k[4], k[5]
        tensor, first, begin, end = pull(control, sizes, CHUNK, 0, 0)
        while tensor < sizes.size:
            param, grad, momentum, scale = params[tensor], grads[tensor], momentums[tensor], scales[tensor]
            if begin == 0:
                count_step(steps[tensor])
            while begin < end:
                stop = min(begin + span, end)
                place = prepare(mode, rows, tensor, begin, stop, randoms)
                for i in range(begin, stop):
                    g = load(grad_dtype, grad, i) * inv_scale * scale
                    m = load("float32", momentum, i)
                    c = beta1 * m + one_minus_beta1 * g
                    if mode == NEAREST:
                        store(dtype, param, i, new_param(load(dtype, param, i), c, lr, decay))
                    else:
                        write(mode, param, place, i, new_param(read(mode, param, place, i), c, lr, decay))
                    store("float32", momentum, i, beta2 * m + one_minus_beta2 * g)
                begin = stop
            tensor, first, begin, end = pull(control, sizes, CHUNK, tensor, first)
        leave(control, float_mode)

    return update


@by_dtype
def _update_8bit_kernel(dtype: str, grad_dtype: str, mode: int) -> Any:
    # Whole blocks only: the last one may end within a pair.
    in_pairs = dtype == grad_dtype == "bfloat16"

    @kernel(f"{dtype}_{grad_dtype}_{mode}", TABLE, TABLE, TABLE, TABLE, TABLE, TABLE, FLOATS, FLOATS, FLOAT32, ROWS)
    def update(control, params, grads, codes, absmax, sizes, steps, scales, k, inv_scale, rows):  # type: ignore[no-untyped-def]
        block, entries, randoms = stack(BLOCK_SIZE), stack(BLOCK_SIZE), stack(RANDOM_ITEMS)
        float_mode = enter(control)
        lr, decay, beta1, one_minus_beta1, beta2, one_minus_beta2 = k[0], k[1], k[2], k[3], k[4], k[5]
        tensor, first, begin, end = pull(control, sizes, CHUNK, 0, 0)
        while tensor < sizes.size:
            param, grad, code, scale = params[tensor], grads[tensor], codes[tensor], scales[tensor]
            if begin == 0:
                count_step(steps[tensor])
            while begin < end:
                size = min(BLOCK_SIZE, end - begin)
                old = load("float32", absmax[tensor], begin // BLOCK_SIZE)
                maximum = np.uint32(0)
                place = prepare(mode, rows, tensor, begin, begin + size, randoms)
                if in_pairs and size == BLOCK_SIZE:
                    odd = block + 4 * PAIRS
                    dequantize_paired(code + begin, block)
                    for i in range(PAIRS):
                        j = begin // 2 + i
                        g0, g1 = load_pair(grad, j)
                        g0, g1 = g0 * inv_scale * scale, g1 * inv_scale * scale
                        m0, m1 = load("float32", block, i) * old, load("float32", odd, i) * old
                        c0, c1 = beta1 * m0 + one_minus_beta1 * g0, beta1 * m1 + one_minus_beta1 * g1
                        p0, p1 = read_pair(mode, param, place, j)
                        p0, p1 = new_param(p0, c0, lr, decay), new_param(p1, c1, lr, decay)
                        write_pair(mode, param, place, j, p0, p1)
                        m0, m1 = beta2 * m0 + one_minus_beta2 * g0, beta2 * m1 + one_minus_beta2 * g1
                        store("float32", block, i, m0)
                        store("float32", odd, i, m1)
                        maximum = max(maximum, np.uint32(float_to_bits(m0) & MAGNITUDE))
                        maximum = max(maximum, np.uint32(float_to_bits(m1) & MAGNITUDE))
                else:
                    dequantize_block(code + begin, size, block)
                    for i in range(size):
                        j = begin + i
                        g = load(grad_dtype, grad, j) * inv_scale * scale
                        m = load("float32", block, i) * old
                        c = beta1 * m + one_minus_beta1 * g
                        if mode == NEAREST:
                            store(dtype, param, j, new_param(load(dtype, param, j), c, lr, decay))
                        else:
                            write(mode, param, place, j, new_param(read(mode, param, place, j), c, lr, decay))
                        m = beta2 * m + one_minus_beta2 * g
                        store("float32", block, i, m)
                        maximum = max(maximum, np.uint32(float_to_bits(m) & MAGNITUDE))
                new = stored_absmax(maximum)
                store("float32", absmax[tensor], begin // BLOCK_SIZE, new)
                if in_pairs and size == BLOCK_SIZE:
                    quantize_paired(block, entries, new, code + begin)
                else:
                    quantize_block(block, entries, size, new, code + begin)
                begin += size
            tensor, first, begin, end = pull(control, sizes, CHUNK, tensor, first)
        leave(control, float_mode)

    return update


@by_dtype
def _move_tensorwise_kernel(dtype: str, grad_dtype: str, mode: int) -> Any:
    @kernel(
        f"{dtype}_{grad_dtype}_{mode}",
        *(TABLE, TABLE, TABLE, TABLE, TABLE, TABLE, TABLE, FLOATS, FLOATS, FLOAT32, ROWS),
    )
    def move(control, params, grads, codes, absmax, new_absmax, sizes, steps, scales, k, inv_scale, rows):  # type: ignore[no-untyped-def]
        block, randoms = stack(BLOCK_SIZE), stack(RANDOM_ITEMS)
        float_mode = enter(control)
        lr, decay, beta1, one_minus_beta1, beta2, one_minus_beta2 = k[0], k[1], k[2], k[3], k[4], k[5]
        tensor, first, begin, end = pull(control, sizes, CHUNK, 0, 0)
        while tensor < sizes.size:
            param, grad, code, scale = params[tensor], grads[tensor], codes[tensor], scales[tensor]
            old = load("float32", absmax[tensor], 0)
            if begin == 0:
                count_step(steps[tensor])
            maximum = np.uint32(0)
            while begin < end:
                size = min(BLOCK_SIZE, end - begin)
                place = prepare(mode, rows, tensor, begin, begin + size, randoms)
                dequantize_block(code + begin, size, block)
                for i in range(size):
                    j = begin + i
                    g = load(grad_dtype, grad, j) * inv_scale * scale
                    m = load("float32", block, i) * old
                    c = beta1 * m + one_minus_beta1 * g
                    if mode == NEAREST:
                        store(dtype, param, j, new_param(load(dtype, param, j), c, lr, decay))
                    else:
                        write(mode, param, place, j, new_param(read(mode, param, place, j), c, lr, decay))
                    m = beta2 * m + one_minus_beta2 * g
                    maximum = max(maximum, np.uint32(float_to_bits(m) & MAGNITUDE))
                begin += size
            atomic_max_bits(new_absmax[tensor], maximum)
            tensor, first, begin, end = pull(control, sizes, CHUNK, tensor, first)
        leave(control, float_mode)

    return move


@by_dtype
def _requantize_tensorwise_kernel(grad_dtype: str) -> Any:
    # The new momentum is computed a second time, because there is nowhere to keep it.
    @kernel(grad_dtype, TABLE, TABLE, TABLE, TABLE, TABLE, FLOATS, FLOATS, FLOAT32)
    def requantize(control, grads, codes, absmax, new_absmax, sizes, scales, k, inv_scale):  # type: ignore[no-untyped-def]
        block, entries = stack(BLOCK_SIZE), stack(BLOCK_SIZE)
        mode = enter(control)
        beta2, one_minus_beta2 = k[4], k[5]
        tensor, first, begin, end = pull(control, sizes, CHUNK, 0, 0)
        while tensor < sizes.size:
            grad, code, scale = grads[tensor], codes[tensor], scales[tensor]
            old = load("float32", absmax[tensor], 0)
            new = stored_absmax(float_to_bits(load("float32", new_absmax[tensor], 0)))
            while begin < end:
                size = min(BLOCK_SIZE, end - begin)
                dequantize_block(code + begin, size, block)
                for i in range(size):
                    g = load(grad_dtype, grad, begin + i) * inv_scale * scale
                    m = load("float32", block, i) * old
                    store("float32", block, i, beta2 * m + one_minus_beta2 * g)
                quantize_block(block, entries, size, new, code + begin)
                begin += size
            tensor, first, begin, end = pull(control, sizes, CHUNK, tensor, first)
        leave(control, mode)

    return requantize


@functools.cache
def _ends_of_tensorwise_kernels() -> tuple[Any, Any]:
    @kernel("", TABLE)
    def reset(control, new_absmax):  # type: ignore[no-untyped-def]
        for tensor in range(new_absmax.size):
            store("float32", new_absmax[tensor], 0, np.float32(0.0))

    @kernel("", TABLE, TABLE, TABLE)
    def finish(control, absmax, new_absmax, sizes):  # type: ignore[no-untyped-def]
        for tensor in range(sizes.size):
            if sizes[tensor] > 0:
                new = stored_absmax(float_to_bits(load("float32", new_absmax[tensor], 0)))
                store("float32", absmax[tensor], 0, new)
            store("float32", new_absmax[tensor], 0, load("float32", absmax[tensor], 0))

    return reset, finish

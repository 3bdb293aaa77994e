"""Squared gradient norms in the specified order, and percentile clipping, many tensors a call."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt

from lion.cpu_kernels.device import FLOAT32, FLOATS, INTEGER, TABLE, by_dtype, inlined, kernel, load, store
from lion.cpu_kernels.pool import Int64Array, enter, leave, pull, run
from lion.reference.clipping import CHUNK, CHUNK_LANES, HISTORY, TOTAL_LANES

Float32Array = npt.NDArray[np.float32]


def squared_norm(
    dtype: str, grads: Int64Array, sizes: Int64Array, threads: int, inv_scale: float | np.float32 = 1.0
) -> Float32Array:
    """Return the squared norms of gradients, see :func:`lion.reference.squared_norm`.

    Args:
        dtype: The dtype of the gradients: "float32", "float16" or "bfloat16".
        grads: int64 array: addresses of the gradients.
        sizes: int64 array: element counts.
        threads: How many threads may work, at least 1.
        inv_scale: Factor that undoes the scaling of the loss, rounded to float32 (default: 1).

    Returns:
        float32 array, one per gradient.

    Raises:
        ValueError: If ``dtype`` is another or ``threads`` is below 1.
    """
    partials = np.empty(int(np.maximum(-(-sizes // CHUNK), 1).sum()), np.float32)
    run(_partials_kernel(dtype), threads, sizes, grads, sizes, partials, inv_scale)
    norms = np.empty(sizes.size, np.float32)
    run(_totals_kernel(), threads, None, sizes, partials, norms)
    return norms


def percentile_clipping(
    squared_norms: Float32Array,
    gnorm_vecs: Int64Array,
    steps: Int64Array,
    scales: Float32Array,
    percentile: int,
    threads: int,
) -> None:
    """Record squared gradient norms and write the scales that clip, see :func:`lion.reference.percentile_clipping`.

    Args:
        squared_norms: float32 array: the squared norms.
        gnorm_vecs: int64 array: addresses of the histories, float32 of shape (100,), updated in place.
        steps: int64 array: addresses of float32 step counters, which stand one below the step recorded.
        scales: float32 array to write: factors of the gradients.
        percentile: Rank of the threshold among the 100 sorted norms, 1 to 99.
        threads: How many threads may work, at least 1.

    Raises:
        ValueError: If ``percentile`` is not in 1 to 99 or ``threads`` is below 1.
    """
    if not 1 <= percentile < HISTORY:
        raise ValueError(f"Invalid percentile: {percentile}; 1 to 99 is allowed")
    run(_clip_kernel(), threads, None, squared_norms, gnorm_vecs, steps, scales, percentile)


@inlined
def add_pairs(lanes: Any) -> Any:
    """Add lanes (a power of two) in adjacent pairs, then the sums likewise, until one is left; in place."""
    count = lanes.size
    while count > 1:
        count //= 2
        for i in range(count):
            lanes[i] = lanes[2 * i] + lanes[2 * i + 1]
    return lanes[0]


@by_dtype
def _partials_kernel(dtype: str) -> Any:
    @kernel(dtype, TABLE, TABLE, FLOATS, FLOAT32)
    def partial_sums(control, grads, sizes, partials, inv_scale):  # type: ignore[no-untyped-def]
        lanes = np.empty(CHUNK_LANES, np.float32)
        mode = enter(control)
        tensor, first, begin, end = pull(control, sizes, CHUNK, 0, 0)
        while tensor < sizes.size:
            grad, number = grads[tensor], first + begin // CHUNK
            lanes[:] = np.float32(0.0)
            while begin < end:
                for i in range(min(CHUNK_LANES, end - begin)):
                    g = load(dtype, grad, begin + i) * inv_scale
                    lanes[i] += g * g
                begin += CHUNK_LANES
            partials[number] = add_pairs(lanes)
            tensor, first, begin, end = pull(control, sizes, CHUNK, tensor, first)
        leave(control, mode)

    return partial_sums


@functools.cache
def _totals_kernel() -> Any:
    @kernel("", TABLE, FLOATS, FLOATS)
    def totals(control, sizes, partials, norms):  # type: ignore[no-untyped-def]
        lanes = np.empty(TOTAL_LANES, np.float64)
        mode = enter(control)
        first = 0
        for tensor in range(sizes.size):
            count = max(1, (sizes[tensor] + CHUNK - 1) // CHUNK)
            lanes[:] = 0.0
            for i in range(count):
                lanes[i % TOTAL_LANES] += np.float64(partials[first + i])
            norms[tensor] = np.float32(add_pairs(lanes))
            first += count
        leave(control, mode)

    return totals


@functools.cache
def _clip_kernel() -> Any:
    @kernel("", FLOATS, TABLE, TABLE, FLOATS, INTEGER)
    def clip(control, norms, gnorm_vecs, steps, scales, percentile):  # type: ignore[no-untyped-def]
        history = np.empty(HISTORY, np.float32)
        mode = enter(control)
        for tensor in range(norms.size):
            squared, gnorm_vec = norms[tensor], gnorm_vecs[tensor]
            scales[tensor] = np.float32(1.0)
            if squared > np.float32(0.0) and squared < np.float32(np.inf):
                empty = True
                for i in range(HISTORY):
                    history[i] = load("float32", gnorm_vec, i)
                    empty &= history[i] == np.float32(0.0)
                if empty:
                    history[:] = squared
                    for i in range(HISTORY):
                        store("float32", gnorm_vec, i, squared)
                else:
                    place = np.int64(load("float32", steps[tensor], 0) + np.float32(1.0)) % HISTORY
                    history[place] = squared
                    store("float32", gnorm_vec, place, squared)
                history.sort()
                norm, threshold = np.sqrt(squared), np.sqrt(history[percentile])
                if norm > threshold:
                    scales[tensor] = threshold / norm
        leave(control, mode)

    return clip

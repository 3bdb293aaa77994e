"""The table in device memory that a launch works on, and the work list beside it.

A kernel's only argument is the address of a table: a header, then one row of addresses per tensor. The coefficients
lie in it too, so that a CUDA graph can be replayed with others. The work list cuts the tensors into items of
consecutive blocks; it depends on nothing but the element counts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Int64Array = npt.NDArray[np.int64]
Float32Array = npt.NDArray[np.float32]

# Header, in bytes from the start: six float32 coefficients, then int64.
LR, DECAY, BETA1, ONE_MINUS_BETA1, BETA2, ONE_MINUS_BETA2 = 0, 4, 8, 12, 16, 20
WORK = 24
ITEMS = 32
TENSORS = 40
LOOKUP = 48
PERCENTILE = 56
INV_SCALE = 64
FOUND_INF = 72
SEED = 80
ROWS = 88

# Row, in bytes from its start: int64.
PARAM, GRAD, STATE, ABSMAX, NEW_ABSMAX, SIZE, STEP, SCALE, GNORM_VEC, PARTIALS = range(0, 80, 8)
LOW, FIRST_ELEMENT, PARAMETER, DONE, ROW_BYTES = range(80, 120, 8)

# Work item, in bytes from its start: int64.
ITEM_TENSOR, ITEM_FIRST, ITEM_END, ITEM_BYTES = range(0, 32, 8)

# Elements that a warp handles at once, the most bytes that a lane moves at once, warps in a block of threads, and the
# most items per block of threads that can be resident: enough to even out their run times, few enough for a short list.
BLOCK_SIZE = 256
WIDEST = 16
WARPS = 8
ITEMS_PER_RESIDENT_BLOCK = 8


def table(
    k: Float32Array,
    sizes: Int64Array,
    *,
    work: int,
    items: int,
    params: Int64Array | int = 0,
    grads: Int64Array | int = 0,
    states: Int64Array | int = 0,
    absmax: Int64Array | int = 0,
    new_absmax: Int64Array | int = 0,
    steps: Int64Array | int = 0,
    scales: Int64Array | int = 0,
    gnorm_vecs: Int64Array | int = 0,
    partials: Int64Array | int = 0,
    lows: Int64Array | int = 0,
    first_elements: Int64Array | int = 0,
    parameters: Int64Array | int = 0,
    done: Int64Array | int = 0,
    lookup: int = 0,
    percentile: int = 100,
    inv_scale: int = 0,
    found_inf: int = 0,
    seed: int = 0,
) -> Int64Array:
    """Return the words of a table, to be copied to the device.

    Args:
        k: The coefficients in the order of ``lion.reference.Coefficients``, float32 of shape (6,).
        sizes: Element counts, int64 of shape (n,).
        work: Address of the work list in device memory.
        items: Number of items in the work list.
        params: Addresses of the parameters, int64 of shape (n,).
        grads: Addresses of the gradients.
        states: Addresses of the momentum: float32, or uint8 codes.
        absmax: Addresses of the absmax, float32, one per block or one per tensor.
        new_absmax: Addresses of one float32 per tensor; used by ``update_8bit_tensorwise`` only.
        steps: Addresses of the float32 step counters; 0 where there is none.
        scales: Addresses of the float32 gradient scales; 0 where there is none.
        gnorm_vecs: Addresses of the histories, float32 of shape (100,).
        partials: Addresses of scratch, one float32 per 4096 elements.
        lows: Addresses of the lower parts of master values, int16 or int8.
        first_elements: Indices, in the whole parameters, of the tensors' first elements; for rounding at random.
        parameters: The parameters' places among all that share the seed; for rounding at random.
        done: Blocks of 256 elements that are not in the work list (default: 0); for rounding at random, where it is
            scratch memory that ends as 0.
        lookup: Address of :func:`lookup_table` in device memory; used by the 8-bit updates only.
        percentile: Percentile of the clipping (default: 100).
        inv_scale: Address of the float32 factor that undoes the scaling of the loss; 0 where it was not scaled.
        found_inf: Address of a float32 that is not 0 where nothing is to change; 0 where there is none.
        seed: Seed of the rounding at random, 0 to 2**64 - 1 (default: 0).

    Returns:
        int64 array of shape (11 + 14 n,).
    """
    n = len(sizes)
    header = ROWS // 8
    words = np.zeros(header + n * ROW_BYTES // 8, np.int64)
    words[: WORK // 8] = k.astype(np.float32).view(np.int64)
    signed_seed = np.uint64(seed).view(np.int64)
    words[WORK // 8 : header] = work, items, n, lookup, percentile, inv_scale, found_inf, signed_seed
    columns: list[Any] = [params, grads, states, absmax, new_absmax, sizes, steps, scales, gnorm_vecs, partials]
    columns += [lows, first_elements, parameters, done]
    rows = words[header:].reshape(n, -1)
    for i, column in enumerate(columns):
        rows[:, i] = column
    return words


def work_list(sizes: Int64Array, unit: int, resident_blocks: int) -> Int64Array:
    """Cut tensors into items of consecutive units.

    Args:
        sizes: Element counts, int64 of shape (n,).
        unit: Elements in a unit: 256 for the updates, 4096 for the norms.
        resident_blocks: Blocks of threads that the device runs at once.

    Returns:
        int64 array of shape (items, 3): tensor, first unit, end unit. An empty tensor has one empty item.
    """
    units = -(-sizes // unit)
    share = -(-int(units.sum()) // (resident_blocks * ITEMS_PER_RESIDENT_BLOCK))
    length = max(WARPS, -(-share // WARPS) * WARPS)
    items = np.maximum(1, -(-units // length))
    tensor = np.repeat(np.arange(len(sizes), dtype=np.int64), items)
    first = (np.arange(len(tensor), dtype=np.int64) - np.repeat(np.cumsum(items) - items, items)) * length
    return np.stack([tensor, first, np.minimum(first + length, units[tensor])], axis=1)


def alignment(addresses: Int64Array) -> int:
    """Return the greatest power of two up to ``WIDEST`` that divides all addresses.

    Args:
        addresses: int64 of shape (n,); 0 where there is none.

    Returns:
        1, 2, 4, 8 or 16.
    """
    common = int(np.bitwise_or.reduce(addresses)) | WIDEST
    return common & -common

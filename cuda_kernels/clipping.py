"""Squared gradient norms and percentile clipping on the GPU, summed in the order of ``lion.reference.clipping``."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lion.cuda_kernels.device import (
    FLOAT32,
    TOGETHER,
    WARPS,
    add,
    add_f64,
    as_signed,
    bits,
    cuda,
    device,
    div,
    float32,
    float64,
    int32,
    load_8,
    load_f32,
    load_i64,
    mul,
    ordered,
    shuffle_xor,
    shuffle_xor_f64,
    sqrt,
    store_f32,
    sync_warp,
    to_floats,
    uint32,
)
from lion.cuda_kernels.lion import load_gradient, read_count, read_inv_scale, read_item
from lion.cuda_kernels.table import (
    GNORM_VEC,
    GRAD,
    ITEMS,
    PARTIALS,
    PERCENTILE,
    ROW_BYTES,
    ROWS,
    SCALE,
    SIZE,
    STEP,
    TENSORS,
    WIDEST,
)

HISTORY = 100
CHUNK = 4096
NAN_ORDER = np.int32(0x7FFFFFFF)
INFINITY = np.float32(np.inf)


def make_partial_norms(dtype: int, grad_alignment: int = WIDEST) -> Callable[[int], None]:
    """Return the kernel that writes the partial sum of every chunk of 4096 elements: a warp per chunk."""
    itemsize = 4 if dtype == FLOAT32 else 2

    def partial_norms(table: int) -> None:
        words, values = cuda.local.array(8, uint32), cuda.local.array(8, float32)
        lanes = cuda.local.array(8, float32)
        items, inv_scale = read_count(table, ITEMS), read_inv_scale(table)
        lane, warp = cuda.threadIdx.x & 31, cuda.threadIdx.x >> 5
        item = cuda.blockIdx.x
        while item < items:
            row, first, end = read_item(table, item)
            grads, size, partials = load_i64(row + GRAD), load_i64(row + SIZE), load_i64(row + PARTIALS)
            chunk = first + warp
            while chunk < end:
                i = chunk * CHUNK + lane * 8
                chunk_end = min(chunk * CHUNK + CHUNK, size)
                for j in range(8):
                    lanes[j] = np.float32(0)
                # Places past the end would add zeros, which change nothing.
                if grads & (grad_alignment - 1) == 0:
                    while i + 8 <= chunk_end:
                        load_8(dtype, TOGETHER, grad_alignment, grads + i * itemsize, words)
                        to_floats(dtype, words, values)
                        for j in range(8):
                            value = mul(values[j], inv_scale)
                            lanes[j] = add(lanes[j], mul(value, value))
                        i += 256
                while i < chunk_end:
                    for j in range(8):
                        address = grads + (i + j) * itemsize
                        value = load_gradient(dtype, address, inv_scale) if i + j < chunk_end else np.float32(0)
                        lanes[j] = add(lanes[j], mul(value, value))
                    i += 256
                first_half = add(add(lanes[0], lanes[1]), add(lanes[2], lanes[3]))
                total = add(first_half, add(add(lanes[4], lanes[5]), add(lanes[6], lanes[7])))
                for bit in range(5):
                    total = add(total, shuffle_xor(total, int32(1 << bit)))
                if lane == 0:
                    store_f32(partials + chunk * 4, total)
                chunk += WARPS
            item += cuda.gridDim.x

    return partial_norms


@device
def total_norm(partials: int, chunks: int, lane: int) -> np.float32:
    """Return the squared norm of a tensor from its partial sums, by one warp."""
    total = float64(0)
    chunk = lane
    # Eight loads are under way at once; the sums stay in order.
    while chunk + 7 * 32 < chunks:
        a = load_f32(partials + chunk * 4)
        b = load_f32(partials + chunk * 4 + 128)
        c = load_f32(partials + chunk * 4 + 256)
        d = load_f32(partials + chunk * 4 + 384)
        e = load_f32(partials + chunk * 4 + 512)
        f = load_f32(partials + chunk * 4 + 640)
        g = load_f32(partials + chunk * 4 + 768)
        h = load_f32(partials + chunk * 4 + 896)
        total = add_f64(add_f64(add_f64(add_f64(total, float64(a)), float64(b)), float64(c)), float64(d))
        total = add_f64(add_f64(add_f64(add_f64(total, float64(e)), float64(f)), float64(g)), float64(h))
        chunk += 256
    while chunk < chunks:
        total = add_f64(total, float64(load_f32(partials + chunk * 4)))
        chunk += 32
    for bit in range(5):
        total = add_f64(total, shuffle_xor_f64(total, int32(1 << bit)))
    return float32(total)


def make_squared_norm() -> Callable[[int], None]:
    """Return the kernel that writes every tensor's squared norm to its ``scales`` address: a warp per tensor."""

    def squared_norm(table: int) -> None:
        lane = cuda.threadIdx.x & 31
        tensor = cuda.blockIdx.x * WARPS + (cuda.threadIdx.x >> 5)
        while tensor < read_count(table, TENSORS):
            row = table + ROWS + tensor * ROW_BYTES
            norm = total_norm(load_i64(row + PARTIALS), (load_i64(row + SIZE) + (CHUNK - 1)) // CHUNK, lane)
            if lane == 0:
                store_f32(load_i64(row + SCALE), norm)
            tensor += cuda.gridDim.x * WARPS

    return squared_norm


@device
def rank_key(value: np.float32) -> np.int32:
    """Return an integer in the order in which values are sorted; NaN comes last."""
    return as_signed(ordered(bits(value))) if value == value else NAN_ORDER


@device
def clip(gnorm_vec: int, scale: int, squared: np.float32, step: int, percentile: int, lane: int) -> None:
    """Record a squared norm in a history and write the scale, by one warp."""
    recorded = squared > np.float32(0) and squared < INFINITY
    slot = step % HISTORY if recorded else -1
    empty = True
    # Places lane, lane + 32, ... are this lane's: it counts how many values come before each.
    own_a = rank_key(squared if lane == slot else load_f32(gnorm_vec + lane * 4))
    own_b = rank_key(squared if lane + 32 == slot else load_f32(gnorm_vec + lane * 4 + 128))
    own_c = rank_key(squared if lane + 64 == slot else load_f32(gnorm_vec + lane * 4 + 256))
    last = min(lane + 96, HISTORY - 1)
    own_d = rank_key(squared if last == slot else load_f32(gnorm_vec + last * 4))
    rank_a = rank_b = rank_c = rank_d = 0
    for place in range(HISTORY):
        value = load_f32(gnorm_vec + place * 4)
        empty = empty and value == np.float32(0)
        key = rank_key(squared if place == slot else value)
        rank_a += 1 if key < own_a or (key == own_a and place < lane) else 0
        rank_b += 1 if key < own_b or (key == own_b and place < lane + 32) else 0
        rank_c += 1 if key < own_c or (key == own_c and place < lane + 64) else 0
        rank_d += 1 if key < own_d or (key == own_d and place < lane + 96) else 0
    chosen = -1
    if rank_a == percentile:
        chosen = lane
    if rank_b == percentile:
        chosen = lane + 32
    if rank_c == percentile:
        chosen = lane + 64
    if lane < HISTORY - 96 and rank_d == percentile:
        chosen = lane + 96
    if chosen >= 0:
        threshold = sqrt(squared if chosen == slot or (recorded and empty) else load_f32(gnorm_vec + chosen * 4))
        norm = sqrt(squared)
        store_f32(scale, div(threshold, norm) if recorded and norm > threshold else np.float32(1))
    sync_warp()
    if recorded:
        place = lane
        while place < HISTORY:
            if empty or place == slot:
                store_f32(gnorm_vec + place * 4, squared)
            place += 32


def make_percentile_clipping() -> Callable[[int], None]:
    """Return the kernel that turns partial sums into scales and records the norms: a warp per tensor."""

    def percentile_clipping(table: int) -> None:
        percentile = load_i64(table + PERCENTILE)
        lane = cuda.threadIdx.x & 31
        tensor = cuda.blockIdx.x * WARPS + (cuda.threadIdx.x >> 5)
        while tensor < read_count(table, TENSORS):
            row = table + ROWS + tensor * ROW_BYTES
            squared = total_norm(load_i64(row + PARTIALS), (load_i64(row + SIZE) + (CHUNK - 1)) // CHUNK, lane)
            step = np.int64(add(load_f32(load_i64(row + STEP)), np.float32(1)))
            clip(load_i64(row + GNORM_VEC), load_i64(row + SCALE), squared, step, percentile, lane)
            tensor += cuda.gridDim.x * WARPS

    return percentile_clipping

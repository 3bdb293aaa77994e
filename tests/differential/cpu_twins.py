"""Twins in Python of the CPU kernels' intrinsics, for runs with NUMBA_DISABLE_JIT=1.

Compiled code cannot be watched. Without the compiler the kernels are Python functions, in which coverage is measured
by lines and branches; but the intrinsics exist as machine code only.
"""

from __future__ import annotations

import ctypes
import threading
from typing import Any

import numba
import numpy as np
import pytest

from lion import reference
from lion.cpu_kernels import clipping, device, lion, pool, portable, quantization, rounding
from tests.comparing import Array
from tests.strategies import FLOAT_DTYPES

DISABLE_JIT = bool(numba.config.DISABLE_JIT)

_QMAP = reference.create_dynamic_map()
_THRESHOLDS = reference.quantize_thresholds(_QMAP)
_lock = threading.Lock()
_stacks: list[Array] = []


def _at(dtype: str, address: int, index: int, count: int = 1) -> Array:
    item = FLOAT_DTYPES.get(dtype) or np.dtype(dtype)
    size = count * item.itemsize
    return np.frombuffer((ctypes.c_char * size).from_address(int(address) + int(index) * item.itemsize), item)


def load(dtype: str, address: int, index: int) -> Any:
    value = _at(dtype, address, index)[0]
    return value.astype(np.uint32) if dtype in device.INTEGERS else np.float32(value)


def store(dtype: str, address: int, index: int, value: Any) -> None:
    place = _at(dtype, address, index)
    place[0] = value.astype(place.dtype)


def stack(count: int) -> int:
    _stacks.append(np.empty(count, np.uint32))
    return _stacks[-1].ctypes.data


def float_to_bits(value: np.float32) -> np.uint32:
    return value.view(np.uint32)


def bits_to_float(bits: np.uint32) -> np.float32:
    return bits.view(np.float32)


def atomic_add(address: int, value: int) -> int:
    with _lock:
        before = int(_at("int64", address, 0)[0])
        _at("int64", address, 0)[0] += value
        return before


def atomic_max_bits(address: int, value: np.uint32) -> np.uint32:
    with _lock:
        before = load("uint32", address, 0)
        store("uint32", address, 0, max(before, value))
        return before


def pause() -> None:
    pass


def set_float_mode(mode: int) -> int:
    assert mode == device.DEFAULT_FLOAT_MODE
    return mode


def dequantize_group(codes: int, values: int) -> None:
    _at("float32", values, 0, quantization.GROUP)[:] = _QMAP[_at("uint8", codes, 0, quantization.GROUP)]


def dequantize_pairs(codes: int, even: int, odd: int) -> None:
    for place, values in enumerate((even, odd)):
        every_other = _at("uint8", codes, 0, quantization.GROUP)[place::2]
        _at("float32", values, 0, quantization.GROUP // 2)[:] = _QMAP[every_other]


def quantize_group(values: int, reciprocal: np.float32, codes: int) -> bool:
    return _quantize(_at("float32", values, 0, quantization.GROUP), reciprocal, codes)


def quantize_pairs(even: int, odd: int, reciprocal: np.float32, codes: int) -> bool:
    values = [_at("float32", values, 0, quantization.GROUP // 2) for values in (even, odd)]
    return _quantize(np.stack(values, axis=1).reshape(-1), reciprocal, codes)


def _quantize(values: Array, reciprocal: np.float32, codes: int) -> bool:
    quotients = values * reciprocal
    next_to_thresholds = np.isin(quotients, _THRESHOLDS)
    # What is not sure may be one too high.
    nearest = np.searchsorted(_THRESHOLDS, quotients, side="left")
    _at("uint8", codes, 0, quantization.GROUP)[:] = nearest + next_to_thresholds
    return not next_to_thresholds.any()


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the twins in the place of the intrinsics."""
    _stacks.clear()
    twins = (
        *(load, store, stack, float_to_bits, bits_to_float, atomic_add, atomic_max_bits, pause, set_float_mode),
        *(dequantize_group, dequantize_pairs, quantize_group, quantize_pairs),
    )
    for module in (clipping, lion, pool, portable, quantization, rounding):
        for twin in twins:
            if hasattr(module, twin.__name__):
                monkeypatch.setattr(module, twin.__name__, twin)

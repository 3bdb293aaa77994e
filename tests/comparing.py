"""How tests compare numbers, in one place: bit for bit.

Tolerance policy: two results are the same when dtype, shape and every bit agree; any NaN equals any NaN, because
which NaN an operation returns is left to the hardware. Exceptions, each with its reason: none.

Where one of two calls raises, both do, and the class of the exception is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

ALIGNMENT = 64
GUARD_BYTES = 64
GUARD_PATTERN = 0xA5
SHOWN = 8


def to_numpy(values: Any) -> Array:
    """Return a torch tensor, NumPy array or NumPy scalar as a NumPy array of the same bits.

    Args:
        values: torch tensor on any device, array, or NumPy scalar; Python numbers have no bits and are refused.

    Returns:
        NumPy array of the same dtype and shape; bfloat16 as ``ml_dtypes.bfloat16``.
    """
    if hasattr(values, "detach"):
        import torch

        tensor = values.detach().cpu()
        if tensor.dtype == torch.bfloat16:
            return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()
    if not isinstance(values, np.ndarray | np.generic):
        raise TypeError(f"cannot compare the bits of {type(values).__name__} {values!r}")
    return np.asarray(values)


def bits(array: Array) -> Array:
    """Return the bit patterns of an array as unsigned integers of the same width."""
    return np.ascontiguousarray(array).reshape(-1).view(f"u{array.dtype.itemsize}").reshape(array.shape)


def assert_same_bits(
    actual: Any, expected: Any, *, what: str = "", block_size: int = 256, inputs: Mapping[str, Any] | None = None
) -> None:
    """Fail unless two arrays agree in dtype, shape and every bit, any NaN being equal to any NaN.

    Args:
        actual: NumPy array or scalar, or torch tensor.
        expected: The same; the two may differ in kind.
        what: Name of the compared thing, shown first when they differ.
        block_size: Elements in a quantization block, for naming the block of a difference (default: 256).
        inputs: What the compared thing was computed from, for the reproducer (default: None).

    Raises:
        AssertionError: Naming the number of differing elements and, for the first few, index, block, bits and values;
            with ``inputs`` also Python code that makes those of the first differing block.
    """
    a, b = to_numpy(actual), to_numpy(expected)
    name = f"{what}: " if what else ""
    if a.dtype != b.dtype:
        raise AssertionError(f"{name}dtype {a.dtype}, expected {b.dtype}")
    if a.shape != b.shape:
        raise AssertionError(f"{name}shape {a.shape}, expected {b.shape}")
    a, b = a.reshape(-1), b.reshape(-1)
    a_bits, b_bits = bits(a), bits(b)
    differs = a_bits != b_bits
    if not differs.any():
        return
    if a.dtype.kind in "fcV":  # ml_dtypes.bfloat16 is of kind V
        differs &= ~(np.isnan(a) & np.isnan(b))
    where = np.flatnonzero(differs)
    if not where.size:
        return
    digits = 2 * a.dtype.itemsize
    lines = [f"{name}{where.size} of {a.size} elements differ ({a.dtype})"]
    lines += [
        f"  element {i} (block {i // block_size}, place {i % block_size}): "
        f"0x{int(a_bits[i]):0{digits}x} = {a[i]!s}, expected 0x{int(b_bits[i]):0{digits}x} = {b[i]!s}"
        for i in where[:SHOWN]
    ]
    if where.size > SHOWN:
        lines.append(f"  ... and {where.size - SHOWN} more, the last at element {where[-1]}")
    if inputs is not None:
        block = int(where[0]) // block_size
        lines.append(f"inputs of block {block}, where element {where[0]} is number {where[0] % block_size}:")
        lines += reproducer(inputs, a.size, block, block_size)
    raise AssertionError("\n".join(lines))


def reproducer(inputs: Mapping[str, Any], size: int, block: int, block_size: int) -> list[str]:
    """Return lines of Python that make the part of some inputs that one block depends on, to the bit.

    Args:
        inputs: Arrays, tensors or other values by name; arrays of ``size`` elements are cut to the block, arrays with
            one element per block to that element, and all others are kept.
        size: Elements of the compared arrays.
        block: Number of the block.
        block_size: Elements in a block.
    """
    parts = {size: slice(block * block_size, (block + 1) * block_size), -(-size // block_size): slice(block, block + 1)}
    lines = []
    for name, value in inputs.items():
        if hasattr(value, "detach") or isinstance(value, np.ndarray | np.generic):
            array = to_numpy(value).reshape(-1)
            part = array[parts.get(array.size, slice(None))]
            dtype = "ml_dtypes.bfloat16" if part.dtype == ml_dtypes.bfloat16 else f"{part.dtype.str!r}"
            lines.append(f"{name} = np.frombuffer(bytes.fromhex({part.tobytes().hex()!r}), {dtype})")
        else:
            lines.append(f"{name} = {value!r}")
    return lines


def assert_same_outcome(actual: Callable[[], Any], expected: Callable[[], Any], *, what: str = "") -> None:
    """Fail unless two calls raise exceptions of the same class, or both return arrays of the same bits.

    Args:
        actual: Called without arguments; returns an array, a tensor, or a tuple of them.
        expected: The same.
        what: Name of the compared thing, shown first when they differ.

    Raises:
        AssertionError: Naming both exceptions, or as :func:`assert_same_bits`.
    """
    (results, error), (expected_results, expected_error) = _outcome(actual), _outcome(expected)
    if type(error) is not type(expected_error):
        name = f"{what}: " if what else ""
        raise AssertionError(f"{name}{error!r}, expected {expected_error!r}") from error
    assert len(results) == len(expected_results), what
    for i, (result, other) in enumerate(zip(results, expected_results, strict=True)):
        assert_same_bits(result, other, what=f"{what} {i}")


def _outcome(call: Callable[[], Any]) -> tuple[tuple[Any, ...], Exception | None]:
    try:
        result = call()
    except Exception as error:
        return (), error
    return result if isinstance(result, tuple) else (result,), None


class Guarded(NamedTuple):
    """An array inside a larger buffer, and the check that the bytes around it were left alone."""

    array: Array
    check: Callable[[], None]


def guarded(values: Array | tuple[int, ...], dtype: npt.DTypeLike | None = None, *, offset_bytes: int = 0) -> Guarded:
    """Return an array at a chosen misalignment, between guard bytes.

    Args:
        values: Array to copy, or the shape of an array of zeros.
        dtype: Element type; needed with a shape, otherwise that of the array.
        offset_bytes: Bytes by which the first element lies beyond a 64-byte boundary (default: 0).

    Returns:
        The array (C order, writable), and ``check()``, which fails if a guard byte changed.
    """
    source = np.zeros(values, dtype) if isinstance(values, tuple) else np.asarray(values, dtype)
    buffer = np.full(source.nbytes + 2 * GUARD_BYTES + 2 * ALIGNMENT, GUARD_PATTERN, np.uint8)
    begin = GUARD_BYTES + (offset_bytes - GUARD_BYTES - buffer.ctypes.data) % ALIGNMENT
    end = begin + source.nbytes
    array = buffer[begin:end].view(source.dtype).reshape(source.shape)
    array[...] = source

    def check() -> None:
        changed = np.flatnonzero(buffer != GUARD_PATTERN)
        changed = changed[(changed < begin) | (changed >= end)]
        if changed.size:
            first = changed[0] - begin
            raise AssertionError(f"{changed.size} bytes outside the array were written, the first at byte {first}")

    return Guarded(array, check)

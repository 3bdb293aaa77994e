"""Blockwise dynamic 8-bit quantization (Dettmers et al. 2021, arXiv 2110.02861, section 2).

Every array is float32 unless said otherwise, and every operation is rounded on its own to nearest even.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Float32Array = npt.NDArray[np.float32]
Uint8Array = npt.NDArray[np.uint8]

SMALLEST_NORMAL = np.float32(2.0**-126)


def create_dynamic_map(signed: bool = True, max_exponent_bits: int = 7, total_bits: int = 8) -> Float32Array:
    """Return the dynamic quantization map: 256 ascending values in [-1, 1], dense near zero.

    Each decade ``10**(i + 1 - max_exponent_bits)`` is cut linearly into twice as many values as the one below
    it; 0 and 1 are added. The signed map ends at -0.99296874 on the negative side: there is no -1.

    Args:
        signed: Whether negative values are represented too (default: True).
        max_exponent_bits: Number of decades (default: 7); as many as ``total_bits`` leave no bit for the lowest one of
            a signed map, which is empty then.
        total_bits: Bits of a code (default: 8); with fewer, the map is padded with zeros to 256 entries.

    Returns:
        float32 array of shape (256,), ascending.

    Raises:
        ValueError: If the bits do not fit: ``1 <= max_exponent_bits <= total_bits <= 8`` must hold, and an unsigned map
            needs ``max_exponent_bits < total_bits``.

    Source:
        arXiv 2110.02861, section 1.3 and figure 2; entries equal to bitsandbytes' ``create_dynamic_map``.
    """
    if not (1 <= max_exponent_bits <= total_bits <= 8 and (signed or max_exponent_bits < total_bits)):
        raise ValueError(
            f"Invalid max_exponent_bits and total_bits: {max_exponent_bits}, {total_bits}; "
            f"1 <= max_exponent_bits {'<=' if signed else '<'} total_bits <= 8 is allowed"
        )
    extra_bits = total_bits - 1 - max_exponent_bits
    values = [np.float32(0.0), np.float32(1.0)]

    def add_decade(decade: np.float32, intervals: int) -> None:
        bounds = _linspace(intervals + 1)
        means = (bounds[:-1] + bounds[1:]) / np.float32(2.0)
        values.extend(decade * means)
        if signed:
            values.extend(-decade * means)

    for i in range(max(0, -extra_bits), max_exponent_bits):
        intervals = 2 ** (i + extra_bits + (0 if signed else 1))
        add_decade(np.float32(10.0 ** (i + 1 - max_exponent_bits)), intervals)
    if extra_bits > 0:
        add_decade(np.float32(1.0), 2**extra_bits - 1)
    values.extend([np.float32(0.0)] * (256 - len(values)))
    return np.sort(np.array(values, dtype=np.float32))


def _linspace(count: int) -> Float32Array:
    """Return ``count`` values from 0.1 to 1: a float32 step, taken from the nearer end with a single rounding."""
    start, end = np.float32(0.1), np.float32(1.0)
    step = np.float64((end - start) / np.float32(count - 1))
    index = np.arange(count)
    return np.where(index < count // 2, start + step * index, end - step * (count - 1 - index)).astype(np.float32)


def quantize_thresholds(qmap: Float32Array) -> Float32Array:
    """Return the 255 thresholds between the codes of a map.

    ``threshold[i]`` is the float64 midpoint of ``qmap[i]`` and ``qmap[i + 1]`` rounded *down* to float32, so
    that for float32 ``x``: ``x > threshold[i]`` exactly when ``x`` is above the midpoint.

    Args:
        qmap: float32 array of shape (256,), ascending and finite.

    Returns:
        float32 array of shape (255,), ascending.

    Raises:
        ValueError: If ``qmap`` has another shape or dtype, is not ascending, or is not finite.
    """
    _check_map(qmap)
    entries = qmap.astype(np.float64)
    midpoints = (entries[:-1] + entries[1:]) / 2.0
    nearest = midpoints.astype(np.float32)
    return np.where(nearest > midpoints, np.nextafter(nearest, np.float32(-np.inf)), nearest)


def quantize_blockwise(
    values: npt.NDArray[np.generic], qmap: Float32Array, block_size: int
) -> tuple[Uint8Array, Float32Array]:
    """Quantize an array to 8-bit codes, each block of consecutive elements scaled by its own absmax.

    For a block ``x``::

        absmax = max |x|
        r      = 1 / absmax                                  one division a block
        code   = number of thresholds strictly below x * r   ties to the lower code

    A block whose absmax is below the smallest normal float32 is stored as zeros: absmax 0 and the code of 0.
    A block that holds a NaN or an infinity is stored as absmax NaN and the code of 0: it reads back as NaN.

    Args:
        values: Array of any shape, float32, float16 or bfloat16; converted to float32 first.
        qmap: float32 array of shape (256,), ascending.
        block_size: Elements in a block, at least 1; the last block may be short.

    Returns:
        The codes (uint8, the shape of ``values``) and the absmax of each block (float32, one per block).

    Raises:
        ValueError: If ``qmap`` is not a map or ``block_size`` is below 1.

    Source:
        arXiv 2110.02861, equation 5.
    """
    thresholds = quantize_thresholds(qmap)
    zero_code = np.searchsorted(thresholds, np.float32(0.0), side="left")
    blocks = _split(values.astype(np.float32), block_size)
    codes = np.empty(values.size, np.uint8)
    absmax = np.empty(len(blocks), np.float32)
    with np.errstate(all="ignore"):
        for i, x in enumerate(blocks):
            block_codes = codes[i * block_size : i * block_size + x.size]
            maximum = np.max(np.abs(x))
            if not np.isfinite(maximum):
                absmax[i] = np.nan
                block_codes[:] = zero_code
            elif maximum < SMALLEST_NORMAL:
                absmax[i] = 0.0
                block_codes[:] = zero_code
            else:
                absmax[i] = maximum
                reciprocal = np.float32(1.0) / maximum
                block_codes[:] = np.searchsorted(thresholds, x * reciprocal, side="left")
    return codes.reshape(values.shape), absmax


def dequantize_blockwise(codes: Uint8Array, absmax: Float32Array, qmap: Float32Array, block_size: int) -> Float32Array:
    """Return the values that codes stand for: ``qmap[code] * absmax`` of the block.

    Args:
        codes: uint8 array of any shape.
        absmax: float32 array, one per block.
        qmap: float32 array of shape (256,).
        block_size: Elements in a block, at least 1; the last block may be short.

    Returns:
        float32 array of the shape of ``codes``.

    Raises:
        ValueError: If ``qmap`` is not a map, ``block_size`` is below 1, or ``absmax`` does not hold one value per
            block.
    """
    _check_map(qmap)
    blocks = _split(codes, block_size)
    if absmax.shape != (len(blocks),):
        raise ValueError(f"Invalid absmax shape: {absmax.shape}; ({len(blocks)},) is needed")
    values = np.empty(codes.size, np.float32)
    with np.errstate(all="ignore"):
        for i, block in enumerate(blocks):
            values[i * block_size : i * block_size + block.size] = qmap[block] * absmax[i]
    return values.reshape(codes.shape)


def _split(array: npt.NDArray[np.generic], block_size: int) -> list[npt.NDArray[np.generic]]:
    if block_size < 1:
        raise ValueError(f"Invalid block_size: {block_size}; at least 1 is needed")
    flat = array.reshape(-1)
    return [flat[begin : begin + block_size] for begin in range(0, flat.size, block_size)]


def _check_map(qmap: Float32Array) -> None:
    if qmap.shape != (256,) or qmap.dtype != np.float32:
        raise ValueError(f"Invalid qmap: {qmap.dtype} of shape {qmap.shape}; float32 of shape (256,) is needed")
    if not np.isfinite(qmap).all() or (qmap[:-1] > qmap[1:]).any():
        raise ValueError("Invalid qmap: its entries must be finite and ascending")

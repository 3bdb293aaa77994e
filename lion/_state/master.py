"""Master values: bfloat16 parameters joined with their lower parts, see :func:`lion.reference.split`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lion._memory import sharding
from lion.reference.rounding import QUIET_NAN

LOW_DTYPES = {24: torch.int8, 32: torch.int16}
BITS = {dtype: bits for bits, dtype in LOW_DTYPES.items()}


def join(high: Tensor, low: Tensor) -> Tensor:
    """Return master values.

    Args:
        high: The upper parts, bfloat16, any shape and strides.
        low: The lower parts, int8 or int16, the same shape.

    Returns:
        float32 tensor of that shape.
    """
    upper, place = high.view(torch.int16).int() << 16, 32 - BITS[low.dtype]
    pattern = upper + (low.int() << place)
    # Only a negative lower part of ±0 turns the sign.
    return torch.where((pattern ^ upper) < 0, upper, pattern).view(torch.float32)


def split(values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return the upper and the lower parts of master values.

    Args:
        values: float32 tensor, any shape and strides.
        bits: Bits of a master value: 24 or 32.

    Returns:
        The upper parts, bfloat16, and the lower parts, int8 or int16, both of the shape of ``values``.
    """
    pattern = values.view(torch.int32).masked_fill(values.isnan(), QUIET_NAN)
    if bits == 24:
        pattern = _rounded(pattern) << 8
    high = (pattern + 0x8000) >> 16
    return high.to(torch.int16).view(torch.bfloat16), (pattern >> (32 - bits)).to(LOW_DTYPES[bits])


def with_bits(low: Tensor, bits: int) -> Tensor:
    """Return lower parts for master values of another number of bits; the upper parts stay as they are.

    From 24 bits to 32 it is exact. From 32 to 24 it rounds to nearest, ties to even; what would carry into the upper
    part is the greatest lower part instead.
    """
    if BITS[low.dtype] == bits:
        return low
    if bits == 32:
        return low.to(torch.int16) << 8
    return _rounded(low.int()).clamp_(max=127).to(torch.int8)


def for_communication(state: Any) -> Any:
    """Return a state as torch can communicate it: lower parts of int16 in shards as bfloat16 of the same memory.

    gloo and NCCL have no int16, so that nobody could gather such a state in full, or send it to others.

    Args:
        state: The state of a parameter, or whatever a program has put in the place of one.
    """
    low = state.get("master_low") if isinstance(state, Mapping) else None
    if not sharding.is_dtensor(low) or low.dtype != torch.int16:
        return state
    return {**state, "master_low": sharding.laid_out_like(sharding.local(low).view(torch.bfloat16), low)}


def from_communication(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a saved state with lower parts as what they are."""
    low = state.get("master_low")
    if not isinstance(low, Tensor) or low.dtype != torch.bfloat16 or low.is_meta:
        return dict(state)
    return {**state, "master_low": sharding.laid_out_like(sharding.local(low).view(torch.int16), low)}


def _rounded(pattern: Tensor) -> Tensor:
    """Return int32 numbers without their last 8 bits, rounded to nearest, ties to even."""
    return (pattern + 0x7F + (pattern >> 8 & 1)) >> 8

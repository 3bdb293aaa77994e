"""What is kept for a parameter.

The state of a parameter has bitsandbytes' keys:

=================  ==================================================================================
``step``           number of steps taken: float32, 0-dim, on the parameter's device
``state1``         momentum, the parameter's shape: float32, or uint8 codes
``qmap1``          8-bit: the quantization map, float32 of shape (256,), of this state alone
``absmax1``        8-bit blockwise: float32, one per block of 256 elements
``max1``           8-bit tensor-wise: absmax of the whole tensor, float32 of shape (1,)
``new_max1``       8-bit tensor-wise: scratch of the same shape
``gnorm_vec``      with percentile clipping: the last 100 squared gradient norms, float32
``master_low``     with master bits: the lower parts of the weights, the parameter's shape: int16 (32 bits) or
                   int8 (24 bits)
=================  ==================================================================================

Whatever else a program puts into a state stays there: it is kept from form to form, saved and loaded.

Of a parameter that is a DTensor, ``state1``, ``master_low``, ``absmax1``, ``max1`` and ``new_max1`` are DTensors too,
see :mod:`lion._memory.sharding`. Of a paged state ``state1``, ``absmax1`` and ``master_low`` lie in memory made by
:mod:`lion._memory.paging`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lion import _dynamic_map, reference
from lion._memory import paging, sharding
from lion._options import Kind
from lion._state.master import BITS, LOW_DTYPES

State = dict[str, Any]

MIN_PAGED_SIZE = 100_000
PAGED_KEYS = ("state1", "absmax1", "master_low")
OWN_KEYS = ("step", "state1", "qmap1", "absmax1", "max1", "new_max1", "gnorm_vec", "master_low")
# What bitsandbytes keeps for other algorithms than Lion.
_OTHER_ALGORITHMS_KEYS = ("state2", "qmap2", "absmax2", "max2", "new_max2", "unorm_vec")
_RESERVED_KEYS = frozenset((*OWN_KEYS, *_OTHER_ALGORITHMS_KEYS))


class Form(NamedTuple):
    """What the state of a parameter looks like.

    Attributes:
        kind: How the momentum is kept.
        clipped: Whether there is a history for percentile clipping.
        paged: Whether momentum, absmax and lower parts lie in memory that can be paged out.
        in_memory_order: Whether momentum and lower parts have the strides of a parameter that is dense and not
            contiguous. Only with float32 momentum, without clipping and without rounding at random they have: blocks,
            norms and random bits follow the logical order of the elements.
        master_bits: Bits of the weights' master values, 24 or 32; None where there are no lower parts.
    """

    kind: Kind
    clipped: bool
    paged: bool
    in_memory_order: bool = False
    master_bits: int | None = None


def form_of(p: Tensor, options: Mapping[str, Any]) -> Form:
    """Return the form that the state of a parameter has under these options.

    The precision follows the element count of the whole parameter, so that it does not depend on a mesh; what is paged
    is the memory of one process, so that follows the count in this process's shard.
    """
    if options["optim_bits"] == 32 or p.numel() < options["min_8bit_size"]:
        kind = Kind.FLOAT32
    else:
        kind = Kind.BLOCKWISE if options["block_wise"] else Kind.TENSORWISE
    paged = options["is_paged"] and sharding.local(p).numel() >= MIN_PAGED_SIZE
    clipped = options["percentile_clipping"] < 100
    logical_order = kind is not Kind.FLOAT32 or clipped or rounding_seed_of(p, options) is not None
    master_bits = options["master_weight_bits"] if p.dtype == torch.bfloat16 else None
    return Form(kind, clipped, paged, not logical_order and is_permuted(p), master_bits)


def rounding_seed_of(p: Tensor, options: Mapping[str, Any]) -> int | None:
    """Return the seed that a parameter is rounded at random with; None where it is rounded to nearest."""
    is_rounded = options["stochastic_rounding"] and p.dtype == torch.bfloat16
    return options["rounding_seed"] if is_rounded else None


def is_permuted(p: Tensor) -> bool:
    """Return whether a tensor fills its memory, as a contiguous one does, in another order of its elements."""
    if p.is_contiguous() or sharding.is_dtensor(p):
        return False
    order = sorted(range(p.ndim), key=p.stride, reverse=True)
    return p.detach().permute(order).is_contiguous()


def foreign(state: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return the entries of a state that the program has put there."""
    return {key: value for key, value in state.items() if key not in _RESERVED_KEYS}


def is_unused(state: Mapping[Any, Any]) -> bool:
    """Return whether a state, which may have entries of the program, is of a parameter that has taken no step."""
    return _RESERVED_KEYS.isdisjoint(state)


def kind_in(state: Mapping[str, Any]) -> Kind:
    """Return how the momentum in a state is kept."""
    if state["state1"].dtype == torch.float32:
        return Kind.FLOAT32
    return Kind.TENSORWISE if "max1" in state or "new_max1" in state else Kind.BLOCKWISE


def master_bits_in(state: Mapping[str, Any]) -> int | None:
    """Return the bits of the master values that a state has the lower parts of; None if it has none."""
    return BITS[state["master_low"].dtype] if "master_low" in state else None


def absmax_shapes(kind: Kind, numel: int, block_size: int = reference.BLOCK_SIZE) -> dict[str, tuple[int, ...]]:
    if kind is Kind.TENSORWISE:
        return {"max1": (1,), "new_max1": (1,)}
    return {"absmax1": (-(-numel // block_size),)}


def create(p: Tensor, form: Form) -> State:
    """Return the state of a parameter that has taken no step.

    Args:
        p: The parameter, which is no DTensor.
        form: What its state is to look like.

    Raises:
        OSError: If there is no room or no permission for paged state.
    """
    state: State = {"step": torch.zeros((), dtype=torch.float32, device=p.device)}
    if form.kind is Kind.FLOAT32:
        state["state1"] = _full(p.shape, 0, torch.float32, p.device, form.paged, momentum_strides(p, form))
    else:
        state["state1"] = _full(p.shape, _zero_code(), torch.uint8, p.device, form.paged)
        state["qmap1"] = _dynamic_map.copied(p.device)
        for key, shape in absmax_shapes(form.kind, p.numel()).items():
            state[key] = _full(shape, 0, torch.float32, p.device, form.paged and key in PAGED_KEYS)
    if form.clipped:
        state["gnorm_vec"] = empty_history(p.device)
    if form.master_bits is not None:
        state["master_low"] = fresh_low(p, form.master_bits, form)
    return state


def fresh_low(p: Tensor, bits: int, form: Form) -> Tensor:
    """Return the lower parts of a parameter that has had none: zeros."""
    return _full(p.shape, 0, LOW_DTYPES[bits], p.device, form.paged, momentum_strides(p, form))


def momentum_strides(p: Tensor, form: Form) -> tuple[int, ...]:
    """Return the strides of a parameter's momentum and lower parts."""
    return p.stride() if form.in_memory_order else paging.contiguous_strides(p.shape)


def _full(
    shape: Sequence[int],
    value: int,
    dtype: torch.dtype,
    device: torch.device,
    paged: bool,
    strides: tuple[int, ...] | None = None,
) -> Tensor:
    if paged:
        return paging.empty(shape, dtype, device, strides).fill_(value)
    strides = strides or paging.contiguous_strides(shape)
    return torch.empty_strided(shape, strides, dtype=dtype, device=device).fill_(value)


def empty_history(device: torch.device) -> Tensor:
    return torch.zeros(reference.HISTORY, dtype=torch.float32, device=device)


@lru_cache
def _zero_code() -> int:
    thresholds = reference.quantize_thresholds(reference.create_dynamic_map())
    return int((thresholds < 0).sum())

"""Whether a state is one of its parameter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor

from lion import _dynamic_map, reference
from lion._memory import sharding
from lion._memory.addresses import layout, unaddressable
from lion._options import Kind
from lion._state.layout import OWN_KEYS, State, absmax_shapes, foreign, is_permuted, kind_in
from lion._state.master import BITS

_ROWS = ("absmax1", "max1", "new_max1")
_GATHERED = ". It was gathered from shards: 8-bit state has to be converted before that (lion.exchange.to_exp_avg)"
_LEFT_OUT = "; a flattened state dict loses it where the optimizer that loads has other optim_bits or block_wise"


def check(state: State, p: Tensor, name: str) -> None:
    """Raise unless a state fits its parameter: keys, dtypes, shapes, devices, contiguity, the map.

    A state whose map and absmax are all zeros has been reset, and fits.

    Raises:
        ValueError: Naming the parameter and the key.
    """
    check_contents(state, p, name)
    kind = kind_in(state)
    for key in [key for key in OWN_KEYS if key in state]:
        value = state[key]
        may_be_permuted = key in sharding.PER_ELEMENT and kind is Kind.FLOAT32
        ordered = value.is_contiguous() or (may_be_permuted and is_permuted(value))
        if value.device != p.device or not ordered or value.is_neg():
            raise ValueError(
                f"Invalid state of {name}: {key!r} must be contiguous and on {p.device}; it is on {value.device}"
            )
    # The kernels have the map built in.
    if "qmap1" in state and not _dynamic_map.is_dynamic(state["qmap1"]) and not is_reset(state):
        raise ValueError(f"Invalid state of {name}: 'qmap1' is not the dynamic map; load_state_dict converts others")


def is_reset(state: State) -> bool:
    """Return whether the map and the absmax of 8-bit momentum are all zeros, so the momentum is zero."""
    return not state["qmap1"].any() and is_zero(state)


def is_zero(state: State) -> bool:
    """Return whether the absmax of 8-bit momentum is all zeros, so the momentum is zero by any map."""
    return not state["max1" if "max1" in state else "absmax1"].any()


def check_contents(state: Mapping[str, Any], p: Tensor, name: str, block_size: int = reference.BLOCK_SIZE) -> None:
    """Raise unless keys, dtypes and shapes are those of a state of the parameter, which is no DTensor.

    Entries that the program has put there may be anything.

    Raises:
        ValueError: Naming the parameter and the key.
    """
    own = {key: value for key, value in state.items() if key in OWN_KEYS}
    for key, value in own.items():
        if not is_dense(value):
            found = f"{layout(value)} on {value.device}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"Invalid state of {name}: {key!r} must be a dense tensor, not {found}")
        if sharding.is_dtensor(value):
            raise ValueError(
                f"Invalid state of {name}: {key!r} is a DTensor, unlike the parameter; "
                "get_optimizer_state_dict with full_state_dict=True gathers 32-bit state"
            )
        check_memory(key, value, name)
    if "state1" not in state:
        raise ValueError(f"Invalid state of {name}: the key 'state1' is missing")
    if state["state1"].dtype not in (torch.float32, torch.uint8):
        raise ValueError(
            f"Invalid state of {name}: 'state1' is {state['state1'].dtype}; expected torch.float32 or torch.uint8"
        )
    kind = kind_in(state)
    expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "step": (torch.float32, ()),
        "state1": (state["state1"].dtype, tuple(p.shape)),
    }
    if kind is not Kind.FLOAT32:
        expected["qmap1"] = (torch.float32, (256,))
        expected.update(
            (key, (torch.float32, shape)) for key, shape in absmax_shapes(kind, p.numel(), block_size).items()
        )
    if "gnorm_vec" in state:
        expected["gnorm_vec"] = (torch.float32, (reference.HISTORY,))
    if "master_low" in state:
        low_dtype = state["master_low"].dtype
        expected["master_low"] = (low_dtype if low_dtype in BITS else torch.int16, tuple(p.shape))
    for key, (dtype, shape) in expected.items():
        if key not in state:
            why = _LEFT_OUT if key in ("qmap1", *_ROWS) else ""
            raise ValueError(f"Invalid state of {name}: the key {key!r} is missing{why}")
        value = state[key]
        if value.dtype != dtype or tuple(value.shape) != shape:
            raise ValueError(
                f"Invalid state of {name}: {key!r} is {value.dtype} of shape {tuple(value.shape)}; "
                f"{dtype} of shape {shape} is needed{_GATHERED if key in _ROWS and value.dim() > 1 else ''}"
            )
    entries = foreign(state)
    unknown = [key for key in state if key not in expected and key not in entries]
    if unknown:
        why = f": 'state1' is {state['state1'].dtype}; torch.uint8 has it" if kind is Kind.FLOAT32 else ""
        raise ValueError(
            f"Invalid state of {name}: unknown key {unknown[0]!r} beside momentum of kind {kind.value}{why}"
        )


def check_memory(key: str, tensor: Tensor, name: str) -> None:
    """Raise unless a kernel can work on a tensor of a state where it is.

    Raises:
        ValueError: Naming the parameter, the key and the reason.
    """
    # A negated view is copied when it is loaded, and refused where it is.
    reason = unaddressable(tensor._neg_view() if tensor.is_neg() else tensor)
    if reason is not None:
        raise ValueError(f"Invalid state of {name}: {key!r}: {reason}")


def check_sharded(state: State, name: str) -> None:
    """Raise unless the tensors that a DTensor's state keeps for its elements and blocks are DTensors."""
    if "state1" not in state:
        raise ValueError(f"Invalid state of {name}: the key 'state1' is missing")
    for key in (*sharding.PER_ELEMENT, *_ROWS):
        if key in state and not sharding.is_dtensor(state[key]):
            raise ValueError(f"Invalid state of {name}: {key!r} must be a DTensor, like the parameter")


def is_dense(value: object) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and layout(value) == torch.strided and not value.is_meta

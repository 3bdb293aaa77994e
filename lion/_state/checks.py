"""Whether a state is one of its parameter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor

from lion import functional, reference
from lion._memory import addresses, sharding
from lion._options import Kind
from lion._state.layout import State, absmax_shapes, is_permuted, kind_in
from lion._state.master import BITS

_ROWS = ("absmax1", "max1", "new_max1")
_GATHERED = ". It was gathered from shards: 8-bit state has to be converted before that (lion.exchange.to_exp_avg)"


def check(state: State, p: Tensor, name: str) -> None:
    """Raise unless a state fits its parameter: keys, dtypes, shapes, devices, contiguity.

    Raises:
        ValueError: Naming the parameter and the key.
    """
    check_contents(state, p, name)
    kind = kind_in(state)
    for key, value in state.items():
        ordered = value.is_contiguous() or (
            key in ("state1", "master_low") and kind is Kind.FLOAT32 and is_permuted(value)
        )
        if value.device != p.device or not ordered or value.is_neg():
            raise ValueError(
                f"Invalid state of {name}: {key!r} must be contiguous and on {p.device}; it is on {value.device}"
            )
    # The kernels have the map built in.
    shared = functional.shared_dynamic_map(p.device)
    qmap = state.get("qmap1", shared)
    if qmap is not shared and not torch.equal(qmap, shared):
        raise ValueError(f"Invalid state of {name}: 'qmap1' is not the dynamic map; load_state_dict converts others")


def check_contents(state: Mapping[str, Any], p: Tensor, name: str, block_size: int = reference.BLOCK_SIZE) -> None:
    """Raise unless keys, dtypes and shapes are those of a state of the parameter, which is no DTensor.

    Raises:
        ValueError: Naming the parameter and the key.
    """
    for key, value in state.items():
        if not is_dense(value):
            found = f"{value.layout} on {value.device}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"Invalid state of {name}: {key!r} must be a dense tensor, not {found}")
        if sharding.is_dtensor(value):
            raise ValueError(
                f"Invalid state of {name}: {key!r} is a DTensor, unlike the parameter; "
                "get_optimizer_state_dict with full_state_dict=True gathers 32-bit state"
            )
        if reason := addresses.unaddressable(value):
            raise ValueError(f"Invalid state of {name}: {key!r}: {reason}")
    if "state1" not in state:
        raise ValueError(f"Invalid state of {name}: the key 'state1' is missing")
    if state["state1"].dtype not in (torch.float32, torch.uint8):
        raise ValueError(
            f"Invalid state of {name}: 'state1' is {state['state1'].dtype}; torch.float32 and torch.uint8 are allowed"
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
            raise ValueError(f"Invalid state of {name}: the key {key!r} is missing")
        value = state[key]
        if value.dtype != dtype or tuple(value.shape) != shape:
            raise ValueError(
                f"Invalid state of {name}: {key!r} is {value.dtype} of shape {tuple(value.shape)}; "
                f"{dtype} of shape {shape} is needed{_GATHERED if key in _ROWS and value.dim() > 1 else ''}"
            )
    unknown = [key for key in state if key not in expected]
    if unknown:
        raise ValueError(f"Invalid state of {name}: unknown key {unknown[0]!r}")


def check_sharded(state: State, name: str) -> None:
    """Raise unless the tensors that a DTensor's state keeps for its elements and blocks are DTensors."""
    for key in ("state1", "master_low", *_ROWS):
        if key in state and not sharding.is_dtensor(state[key]):
            raise ValueError(f"Invalid state of {name}: {key!r} must be a DTensor, like the parameter")


def is_dense(value: object) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta

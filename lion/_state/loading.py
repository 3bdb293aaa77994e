"""Making the state of a parameter from a saved one, ours or bitsandbytes'."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from typing import Any

import torch
from torch import Tensor

from lion import _dynamic_map, reference
from lion._memory import sharding
from lion._memory.sharding import PER_ELEMENT
from lion._options import Kind, shown
from lion._state.adapting import adapted, momentum
from lion._state.checks import check_contents, check_memory, check_sharded, is_dense, is_zero
from lion._state.layout import OWN_KEYS, Form, State, foreign, is_unused, kind_in
from lion._state.master import from_communication

NESTED_KEY = "__bnb_optimizer_quant_state__"


def load(saved: object, p: Tensor, form: Form, name: str) -> State:
    """Return a parameter's state made from a saved one, on the parameter's device and in the form of its options.

    Accepts bitsandbytes' states too: a Python number as ``step``, quantization tensors nested under
    ``__bnb_optimizer_quant_state__``, and 8-bit state whose blocks have 2048 elements. Entries that the program has put
    there are loaded as :func:`moved` says.

    Args:
        saved: The saved state; not changed, and its tensors are not shared with the result.
        p: The parameter.
        form: What its state is to look like.
        name: What to call the parameter in an error.

    Raises:
        ValueError: If the state does not fit the parameter.
        OSError: If there is no room or no permission for paged state.
    """
    flat = _flattened(saved, name)
    entries = {key: moved(value, p.device, f"{name}: {shown(key)}") for key, value in foreign(flat).items()}
    if is_unused(flat):
        return entries
    flat = {key: value for key, value in flat.items() if key not in entries}
    if sharding.is_dtensor(p):
        if sharding.is_dtensor(flat.get("state1")):
            check_sharded(flat, name)
            local_state = sharding.unwrapped(flat, p, name)
        else:
            # Every process has all of it: the whole is read, and of that the shard kept.
            stand_in = torch.empty((), dtype=p.dtype, device=p.device).expand(p.shape)
            whole = load(flat, stand_in, form._replace(kind=Kind.FLOAT32, paged=False), name)
            local_state = {**whole, **{key: sharding.shard_of(whole[key], p) for key in PER_ELEMENT if key in whole}}
        return {**sharding.wrapped(load(local_state, sharding.local(p), form, name), p), **entries}
    block_size = _saved_block_size(flat, p)
    check_contents(flat, p, name, block_size)
    state = {
        key: value.detach().to(p.device, copy=True, memory_format=torch.contiguous_format)
        for key, value in flat.items()
    }
    for key, value in state.items():
        check_memory(key, value, name)
    kind = kind_in(state)
    if kind is Kind.TENSORWISE:
        # bitsandbytes' scratch holds what is left of an earlier step.
        state["new_max1"] = state["max1"].clone()
    if kind is not Kind.FLOAT32:
        if block_size != reference.BLOCK_SIZE or not _dynamic_map.is_dynamic(state["qmap1"]):
            as_float = {"state1": _checked_momentum(state, block_size, name)}
            state = {**as_float, **{key: state[key] for key in ("step", "gnorm_vec", "master_low") if key in state}}
    return adapted({**state, **entries}, p, form, name)


def moved(value: Any, device: torch.device | None, name: str) -> Any:
    """Return an entry that a program has put into a state, as a checkpoint gives it.

    As in torch's optimizers, its tensors, also those in dicts, lists, tuples and sets, go to the parameter's device,
    and objects of other kinds are not copied. Unlike there, tensors keep their dtypes, and are copied always.

    Args:
        value: The entry.
        device: The device; None keeps those that the tensors have.
        name: What to call it in an error.

    Raises:
        ValueError: If a tensor cannot be copied, or the entry contains itself.
    """
    try:
        return _moved(value, device, name)
    except RecursionError:
        raise ValueError(f"Invalid state of {name} contains itself, or is nested too deeply") from None


def _moved(value: Any, device: torch.device | None, name: str) -> Any:
    if isinstance(value, Tensor):
        try:
            return value.detach().to(device or value.device, copy=True)
        except Exception as error:
            raise ValueError(f"Invalid state of {name} cannot be copied to {device}: {error}") from error
    if isinstance(value, dict):
        new = copy(value)
        new.update({key: _moved(item, device, name) for key, item in value.items()})
        return new
    if isinstance(value, (list, tuple, set, frozenset)):
        items = [_moved(item, device, name) for item in value]
        return value._make(items) if hasattr(value, "_make") else type(value)(items)
    return value


def _checked_momentum(state: State, block_size: int, name: str) -> Tensor:
    """Return 8-bit momentum that has any map or block size as float32.

    Raises:
        ValueError: If the map is none that a momentum can have.
    """
    qmap = state["qmap1"].cpu().numpy()
    try:
        reference.quantize_thresholds(qmap)
    except ValueError as error:
        raise ValueError(f"Invalid state of {name}: 'qmap1' is no quantization map: {error}") from None
    if (qmap == 0).any() and (qmap != 0).any():
        return momentum(state, block_size)
    if not is_zero(state):
        raise ValueError(f"Invalid state of {name}: 'qmap1' is no quantization map: it is constant or lacks a zero")
    return torch.zeros_like(state["state1"], dtype=torch.float32)


def _flattened(saved: object, name: str) -> State:
    """Return a saved state with all entries side by side and the step as a tensor."""
    if not isinstance(saved, Mapping):
        raise ValueError(f"Invalid state of {name}: a dict is needed, not {type(saved).__name__}")
    flat = dict(saved)
    nested = flat.pop(NESTED_KEY, {})
    if not isinstance(nested, Mapping):
        raise ValueError(f"Invalid state of {name}: {NESTED_KEY!r} must be a dict, not {type(nested).__name__}")
    flat.update(nested)
    lacking = [key for key in OWN_KEYS if isinstance(flat.get(key), Mapping) and not flat[key]]
    # In the place of what a flattened state dict lacks, torch puts an empty dict.
    for key in lacking:
        del flat[key]
    flat = from_communication(flat)
    step = flat.get("step")
    if isinstance(step, (int, float)):
        try:
            step = torch.tensor(float(step), device="cpu")
        except OverflowError:
            raise ValueError(f"Invalid state of {name}: 'step' is {shown(step)}; that is too large") from None
    if is_dense(step) and not sharding.is_dtensor(step):
        check_memory("step", step, name)
    if is_dense(step) and step.numel() == 1 and not step.is_complex():
        flat["step"] = step = step.detach().reshape(()).to(torch.float32)
        if not sharding.is_dtensor(step):
            check_memory("step", step, name)
        # The kernels take it as an int64.
        if not (0 <= step < 2**63 and step == step.floor()):
            raise ValueError(f"Invalid state of {name}: 'step' is {step.item()}; a whole number below 2^63 is needed")
    return flat


def _saved_block_size(state: State, p: Tensor) -> int:
    """Return the block size of saved blockwise state: bitsandbytes used 2048 before it used 256."""
    absmax = state.get("absmax1")
    if isinstance(absmax, Tensor) and absmax.numel() != -(-p.numel() // reference.BLOCK_SIZE):
        if absmax.numel() == -(-p.numel() // 2048):
            return 2048
    return reference.BLOCK_SIZE

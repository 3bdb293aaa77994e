"""Bringing a state into the form that its parameter's options ask for."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping

import torch
from torch import Tensor

from lion import _dynamic_map, functional, reference
from lion._memory import paging, sharding
from lion._options import Kind
from lion._state.checks import check, check_memory, check_sharded
from lion._state.layout import (
    OWN_KEYS,
    PAGED_KEYS,
    Form,
    State,
    create,
    empty_history,
    foreign,
    fresh_low,
    is_unused,
    kind_in,
    master_bits_in,
    momentum_strides,
)
from lion._state.master import with_bits

_MOMENTUM_KEYS = {
    Kind.FLOAT32: ("state1",),
    Kind.BLOCKWISE: ("state1", "qmap1", "absmax1"),
    Kind.TENSORWISE: ("state1", "qmap1", "max1", "new_max1"),
}


# What is made in torch's inference mode could not be changed outside of it.
@torch.inference_mode(False)
@torch.no_grad()
def adapted(state: State | None, p: Tensor, form: Form, name: str) -> State:
    """Return a parameter's state in the form that its options ask for: the same object where it fits already.

    8-bit momentum is dequantized and float32 momentum quantized, which loses precision as any quantization does.
    Lower parts begin as zeros, are converted by :func:`with_bits`, and are dropped where there are to be none. Entries
    that the program has put into a state stay in it.

    Args:
        state: The state; None, or one without entries of ours, for a parameter that has taken no step.
        p: The parameter.
        form: What its state is to look like.
        name: What to call the parameter in an error.

    Raises:
        ValueError: If the state does not fit the parameter.
        OSError: If there is no room or no permission for paged state.
    """
    if not isinstance(state, (Mapping, type(None))):
        raise ValueError(f"Invalid state of {name}: a dict is needed, not {type(state).__name__}")
    if not sharding.is_dtensor(p):
        return _adapted(state or {}, p, form, name)
    if state is None or is_unused(state):
        return sharding.wrapped(_adapted(state or {}, sharding.local(p), form, name), p)
    check_sharded(state, name)
    local_state = sharding.unwrapped(state, p, name)
    new = _adapted(local_state, sharding.local(p), form, name)
    return state if new is local_state and not _inference_keys(state) else sharding.wrapped(new, p)


def _adapted(old: State, p: Tensor, form: Form, name: str) -> State:
    new = {**create(p, form), **old} if is_unused(old) else _fitting(old, p, form, name)
    for key in OWN_KEYS:
        if key in new and new[key] is not old.get(key):
            check_memory(key, new[key], name)
    return new


def _fitting(state: State, p: Tensor, form: Form, name: str) -> State:
    step = state.get("step")
    if isinstance(step, Tensor) and step.device != p.device and not step.is_meta:
        # There torch's ZeroRedundancyOptimizer puts it when it loads.
        state = {**state, "step": step.to(p.device)}
    check(state, p, name)
    inference = _inference_keys(state)
    if inference:
        state = {**state, **{key: state[key].clone() for key in inference}}
    old = kind_in(state)
    if old is not Kind.FLOAT32 and not _dynamic_map.is_dynamic(state["qmap1"]):
        state = {**state, **zero_momentum(p, old)}
    strides = momentum_strides(p, form)
    same_bits = master_bits_in(state) == form.master_bits
    if old is form.kind and form.clipped == ("gnorm_vec" in state) and same_bits:
        return placed(state, form.paged, strides)
    new = {"step": state["step"], **foreign(state)}
    if old is form.kind:
        new.update({key: state[key] for key in _MOMENTUM_KEYS[old]})
    else:
        _dynamic_map.renew(state.get("qmap1"))
        new.update(quantized(momentum(state), form.kind))
    if form.clipped:
        new["gnorm_vec"] = state.get("gnorm_vec", empty_history(p.device))
    if form.master_bits is not None:
        low = state.get("master_low")
        new["master_low"] = fresh_low(p, form.master_bits, form) if low is None else with_bits(low, form.master_bits)
    return placed(new, form.paged, strides)


def _inference_keys(state: State) -> list[str]:
    """Return the keys of a state's tensors that were made in inference mode: torch could not change them outside."""
    return [key for key in OWN_KEYS if key in state and state[key].is_inference()]


def zero_momentum(p: Tensor, kind: Kind) -> State:
    """Return the part of a state that keeps a momentum of zero in the way of a kind."""
    state = create(p, Form(kind, clipped=False, paged=False))
    return {key: state[key] for key in _MOMENTUM_KEYS[kind]}


def put(states: MutableMapping[Tensor, State], p: Tensor, new: State) -> None:
    """Make a state that of a parameter: programs that hold the one it has go on seeing it."""
    old = states.get(p)
    if old is None:
        states[p] = new
    elif old is not new:
        old.clear()
        old.update(new)


def placed(state: State, paged: bool, strides: tuple[int, ...] | None = None) -> State:
    """Return a state whose large tensors are in pageable memory or are not: the same object where that is so already.

    Args:
        state: The state.
        paged: Whether its memory is to be pageable.
        strides: The strides that momentum and lower parts are to have (default: those that they have).

    Raises:
        OSError: If there is no room or no permission for paged state.
    """
    momentum = state["state1"]
    if sharding.is_dtensor(momentum):
        local_state = sharding.unwrapped(state, momentum, "a parameter")
        new = placed(local_state, paged)
        return state if new is local_state else sharding.wrapped(new, momentum)
    tensors = {
        key: paging.moved(state[key], paged, strides if strides and key != "absmax1" else state[key].stride())
        for key in PAGED_KEYS
        if key in state
    }
    return {**state, **tensors} if any(tensors[key] is not state[key] for key in tensors) else state


def momentum(state: State, block_size: int = reference.BLOCK_SIZE) -> Tensor:
    """Return the momentum in a state as float32; float32 momentum itself, no copy."""
    kind, stored = kind_in(state), state["state1"]
    if kind is Kind.FLOAT32:
        return stored
    if sharding.is_dtensor(stored):
        local_state = sharding.unwrapped(state, stored, "a parameter")
        return sharding.wrapped({"state1": momentum(local_state)}, stored)["state1"]
    if kind is Kind.TENSORWISE:
        return state["qmap1"][state["state1"].int()] * state["max1"].view(())  # that of a 0-dim tensor is 0-dim
    return functional.dequantize_blockwise(
        state["state1"], absmax=state["absmax1"], code=state["qmap1"], blocksize=block_size
    )


def quantized(momentum: Tensor, kind: Kind) -> State:
    """Return the part of a state that keeps float32 momentum in the way of a kind."""
    if kind is Kind.FLOAT32:
        return {"state1": momentum}
    momentum = momentum.contiguous()
    qmap = _dynamic_map.copied(momentum.device)
    if kind is Kind.BLOCKWISE:
        codes, quantized = functional.quantize_blockwise(momentum, blocksize=reference.BLOCK_SIZE)
        return {"state1": codes, "qmap1": qmap, "absmax1": quantized.absmax}
    numel = momentum.numel()
    array, absmax = reference.quantize_blockwise(momentum.cpu().numpy(), qmap.cpu().numpy(), max(numel, 1))
    maximum = torch.from_numpy(absmax).to(momentum.device) if numel else momentum.new_zeros(1)
    return {
        "state1": torch.from_numpy(array).to(momentum.device),
        "qmap1": qmap,
        "max1": maximum,
        "new_max1": maximum.clone(),
    }

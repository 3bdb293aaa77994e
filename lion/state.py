"""Optimizer state: creating, checking, converting and loading it.

The state of a parameter has bitsandbytes' keys:

=================  ==================================================================================
``step``           number of steps taken: float32, 0-dim, on the parameter's device
``state1``         momentum, the parameter's shape: float32, or uint8 codes
``qmap1``          8-bit: the quantization map, float32 of shape (256,), shared
``absmax1``        8-bit blockwise: float32, one per block of 256 elements
``max1``           8-bit tensor-wise: absmax of the whole tensor, float32 of shape (1,)
``new_max1``       8-bit tensor-wise: scratch of the same shape
``gnorm_vec``      with percentile clipping: the last 100 squared gradient norms, float32
=================  ==================================================================================

Of a parameter that is a DTensor, ``state1``, ``absmax1``, ``max1`` and ``new_max1`` are DTensors too, see
:mod:`lion.sharding`. Of a paged state ``state1`` and ``absmax1`` lie in memory made by :mod:`lion.paging`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, TypeGuard

import torch
from torch import Tensor

from lion import functional, paging, reference, sharding
from lion.options import Form, Kind, shown

State = dict[str, Any]

NESTED_KEY = "__bnb_optimizer_quant_state__"
_ROWS = ("absmax1", "max1", "new_max1")
_GATHERED = ". It was gathered from shards: 8-bit state has to be converted before that (lion.exchange.to_exp_avg)"
_PAGED_KEYS = ("state1", "absmax1")
_MOMENTUM_KEYS = {
    Kind.FLOAT32: ("state1",),
    Kind.BLOCKWISE: ("state1", "qmap1", "absmax1"),
    Kind.TENSORWISE: ("state1", "qmap1", "max1", "new_max1"),
}


def create(p: Tensor, form: Form) -> State:
    """Return the state of a parameter that has taken no step.

    Args:
        p: The parameter.
        form: What its state is to look like.

    Raises:
        OSError: If there is no room or no permission for paged state.
    """
    if sharding.is_dtensor(p):
        return sharding.wrapped(create(sharding.local(p), form), p)
    state: State = {"step": torch.zeros((), dtype=torch.float32, device=p.device)}
    if form.kind is Kind.FLOAT32:
        state["state1"] = _full(p.shape, 0, torch.float32, p.device, form.paged)
    else:
        state["state1"] = _full(p.shape, _zero_code(), torch.uint8, p.device, form.paged)
        state["qmap1"] = functional.shared_dynamic_map(p.device)
        for key, shape in _absmax_shapes(form.kind, p.numel()).items():
            state[key] = _full(torch.Size(shape), 0, torch.float32, p.device, form.paged and key in _PAGED_KEYS)
    if form.clipped:
        state["gnorm_vec"] = _empty_history(p.device)
    return state


def adapted(state: State | None, p: Tensor, form: Form, name: str) -> State:
    """Return a parameter's state in the form that its options ask for: the same object where it fits already.

    8-bit momentum is dequantized and float32 momentum quantized, which loses precision as any quantization does.

    Args:
        state: The state; None or empty for a parameter that has taken no step.
        p: The parameter.
        form: What its state is to look like.
        name: What to call the parameter in an error.

    Raises:
        ValueError: If the state does not fit the parameter.
        OSError: If there is no room or no permission for paged state.
    """
    if not state:
        return create(p, form)
    if sharding.is_dtensor(p):
        _check_sharded(state, name)
        local_state = sharding.unwrapped(state, p, name)
        new = adapted(local_state, sharding.local(p), form, name)
        return state if new is local_state else sharding.wrapped(new, p)
    step = state.get("step")
    if isinstance(step, Tensor) and step.device != p.device and not step.is_meta:
        # There torch's ZeroRedundancyOptimizer puts it when it loads.
        state = {**state, "step": step.to(p.device)}
    check(state, p, name)
    old = kind_in(state)
    if old is form.kind and form.clipped == ("gnorm_vec" in state):
        return placed(state, form.paged)
    new = {"step": state["step"]}
    if old is form.kind:
        new.update({key: state[key] for key in _MOMENTUM_KEYS[old]})
    else:
        new.update(quantized(momentum(state), form.kind))
    if form.clipped:
        new["gnorm_vec"] = state.get("gnorm_vec", _empty_history(p.device))
    return placed(new, form.paged)


def placed(state: State, paged: bool) -> State:
    """Return a state whose large tensors are in pageable memory or are not: the same object where that is so already.

    Raises:
        OSError: If there is no room or no permission for paged state.
    """
    momentum = state["state1"]
    if sharding.is_dtensor(momentum):
        local_state = sharding.unwrapped(state, momentum, "a parameter")
        new = placed(local_state, paged)
        return state if new is local_state else sharding.wrapped(new, momentum)
    tensors = {key: paging.moved(state[key], paged) for key in _PAGED_KEYS if key in state}
    return {**state, **tensors} if any(tensors[key] is not state[key] for key in tensors) else state


def kind_in(state: Mapping[str, Any]) -> Kind:
    """Return how the momentum in a state is kept."""
    if state["state1"].dtype == torch.float32:
        return Kind.FLOAT32
    return Kind.TENSORWISE if "max1" in state or "new_max1" in state else Kind.BLOCKWISE


def check(state: State, p: Tensor, name: str) -> None:
    """Raise unless a state fits its parameter: keys, dtypes, shapes, devices, contiguity.

    Raises:
        ValueError: Naming the parameter and the key.
    """
    check_contents(state, p, name)
    for key, value in state.items():
        if value.device != p.device or not value.is_contiguous() or value.is_neg():
            raise ValueError(
                f"Invalid state of {name}: {key!r} must be contiguous and on {p.device}; it is on {value.device}"
            )
    # The kernels have the map built in.
    shared = functional.shared_dynamic_map(p.device)
    qmap = state.get("qmap1", shared)
    if qmap is not shared and not torch.equal(qmap, shared):
        raise ValueError(f"Invalid state of {name}: 'qmap1' is not the dynamic map; load_state_dict converts others")


def load(saved: object, p: Tensor, form: Form, name: str) -> State:
    """Return a parameter's state made from a saved one, on the parameter's device and in the form of its options.

    Accepts bitsandbytes' states too: a Python number as ``step``, quantization tensors nested under
    ``__bnb_optimizer_quant_state__``, and 8-bit state whose blocks have 2048 elements.

    Args:
        saved: The saved state; not changed and not shared with the result.
        p: The parameter.
        form: What its state is to look like.
        name: What to call the parameter in an error.

    Raises:
        ValueError: If the state does not fit the parameter.
        OSError: If there is no room or no permission for paged state.
    """
    flat = _flattened(saved, name)
    if sharding.is_dtensor(p):
        if sharding.is_dtensor(flat.get("state1")):
            _check_sharded(flat, name)
            local_state = sharding.unwrapped(flat, p, name)
        else:
            # Every process has all of it: the whole is read, and of that the shard kept.
            stand_in = torch.empty((), dtype=p.dtype, device=p.device).expand(p.shape)
            whole = load(flat, stand_in, form._replace(kind=Kind.FLOAT32, paged=False), name)
            local_state = {**whole, "state1": sharding.shard_of(whole["state1"], p)}
        return sharding.wrapped(load(local_state, sharding.local(p), form, name), p)
    block_size = _saved_block_size(flat, p)
    check_contents(flat, p, name, block_size)
    state = {
        key: value.detach().to(p.device, copy=True, memory_format=torch.contiguous_format)
        for key, value in flat.items()
    }
    kind = kind_in(state)
    if kind is Kind.TENSORWISE:
        # bitsandbytes' scratch holds what is left of an earlier step.
        state["new_max1"] = state["max1"].clone()
    if kind is not Kind.FLOAT32:
        shared = functional.shared_dynamic_map(p.device)
        if block_size != reference.BLOCK_SIZE or not torch.equal(state["qmap1"], shared):
            try:
                reference.quantize_thresholds(state["qmap1"].cpu().numpy())
            except ValueError as error:
                raise ValueError(f"Invalid state of {name}: 'qmap1' is no quantization map: {error}") from None
            as_float = {"state1": momentum(state, block_size)}
            state = {**as_float, **{key: state[key] for key in ("step", "gnorm_vec") if key in state}}
        else:
            state["qmap1"] = shared
    return adapted(state, p, form, name)


def _check_sharded(state: State, name: str) -> None:
    """Raise unless the tensors that a DTensor's state keeps for its elements and blocks are DTensors."""
    for key in ("state1", *_ROWS):
        if key in state and not sharding.is_dtensor(state[key]):
            raise ValueError(f"Invalid state of {name}: {key!r} must be a DTensor, like the parameter")


def _flattened(saved: object, name: str) -> State:
    """Return a saved state with all entries side by side and the step as a tensor."""
    if not isinstance(saved, Mapping):
        raise ValueError(f"Invalid state of {name}: a dict is needed, not {type(saved).__name__}")
    flat = dict(saved)
    nested = flat.pop(NESTED_KEY, {})
    if not isinstance(nested, Mapping):
        raise ValueError(f"Invalid state of {name}: {NESTED_KEY!r} must be a dict, not {type(nested).__name__}")
    flat.update(nested)
    step = flat.get("step")
    if isinstance(step, (int, float)):
        try:
            step = torch.tensor(float(step), device="cpu")
        except OverflowError:
            raise ValueError(f"Invalid state of {name}: 'step' is {shown(step)}; that is too large") from None
    if _is_dense(step) and step.numel() == 1 and not step.is_complex():
        flat["step"] = step = step.detach().reshape(()).to(torch.float32)
        # The kernels take it as an int64.
        if not (0 <= step < 2**63 and step == step.floor()):
            raise ValueError(f"Invalid state of {name}: 'step' is {step.item()}; a whole number below 2^63 is needed")
    return flat


def has_memory(tensor: Tensor) -> bool:
    """Return whether a dense tensor lies within its storage, which may have been made smaller."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    end = (tensor.storage_offset() + last + 1) * tensor.itemsize
    return tensor.numel() == 0 or end <= tensor.untyped_storage().nbytes()


def _is_dense(value: object) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta


def check_contents(state: Mapping[str, Any], p: Tensor, name: str, block_size: int = reference.BLOCK_SIZE) -> None:
    """Raise unless keys, dtypes and shapes are those of a state of the parameter, which is no DTensor.

    Raises:
        ValueError: Naming the parameter and the key.
    """
    for key, value in state.items():
        if not _is_dense(value):
            found = f"{value.layout} on {value.device}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"Invalid state of {name}: {key!r} must be a dense tensor, not {found}")
        if sharding.is_dtensor(value):
            raise ValueError(
                f"Invalid state of {name}: {key!r} is a DTensor, unlike the parameter; "
                "get_optimizer_state_dict with full_state_dict=True gathers 32-bit state"
            )
        if not has_memory(value):
            raise ValueError(f"Invalid state of {name}: {key!r} reaches beyond the end of its memory")
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
            (key, (torch.float32, shape)) for key, shape in _absmax_shapes(kind, p.numel(), block_size).items()
        )
    if "gnorm_vec" in state:
        expected["gnorm_vec"] = (torch.float32, (reference.HISTORY,))
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


def momentum(state: State, block_size: int = reference.BLOCK_SIZE) -> Tensor:
    """Return the momentum in a state as float32; float32 momentum itself, no copy."""
    kind, stored = kind_in(state), state["state1"]
    if kind is Kind.FLOAT32:
        return stored
    if sharding.is_dtensor(stored):
        local_state = sharding.unwrapped(state, stored, "a parameter")
        return sharding.wrapped({"state1": momentum(local_state)}, stored)["state1"]
    if kind is Kind.TENSORWISE:
        return state["qmap1"][state["state1"].int()] * state["max1"]
    return functional.dequantize_blockwise(
        state["state1"], absmax=state["absmax1"], code=state["qmap1"], blocksize=block_size
    )


def quantized(momentum: Tensor, kind: Kind) -> State:
    """Return the part of a state that keeps float32 momentum in the way of a kind."""
    if kind is Kind.FLOAT32:
        return {"state1": momentum}
    shared = functional.shared_dynamic_map(momentum.device)
    if kind is Kind.BLOCKWISE:
        codes, quantized = functional.quantize_blockwise(momentum, code=shared, blocksize=reference.BLOCK_SIZE)
        return {"state1": codes, "qmap1": shared, "absmax1": quantized.absmax}
    numel = momentum.numel()
    array, absmax = reference.quantize_blockwise(momentum.cpu().numpy(), shared.cpu().numpy(), max(numel, 1))
    maximum = torch.from_numpy(absmax).to(momentum.device) if numel else momentum.new_zeros(1)
    return {
        "state1": torch.from_numpy(array).to(momentum.device),
        "qmap1": shared,
        "max1": maximum,
        "new_max1": maximum.clone(),
    }


def _saved_block_size(state: State, p: Tensor) -> int:
    """Return the block size of saved blockwise state: bitsandbytes used 2048 before it used 256."""
    absmax = state.get("absmax1")
    if isinstance(absmax, Tensor) and absmax.numel() != -(-p.numel() // reference.BLOCK_SIZE):
        if absmax.numel() == -(-p.numel() // 2048):
            return 2048
    return reference.BLOCK_SIZE


def _absmax_shapes(kind: Kind, numel: int, block_size: int = reference.BLOCK_SIZE) -> dict[str, tuple[int, ...]]:
    if kind is Kind.TENSORWISE:
        return {"max1": (1,), "new_max1": (1,)}
    return {"absmax1": (-(-numel // block_size),)}


def _full(shape: torch.Size, value: int, dtype: torch.dtype, device: torch.device, paged: bool) -> Tensor:
    if paged:
        return paging.empty(shape, dtype, device).fill_(value)
    return torch.full(shape, value, dtype=dtype, device=device)


def _empty_history(device: torch.device) -> Tensor:
    return torch.zeros(reference.HISTORY, dtype=torch.float32, device=device)


@lru_cache
def _zero_code() -> int:
    thresholds = reference.quantize_thresholds(reference.create_dynamic_map())
    return int((thresholds < 0).sum())

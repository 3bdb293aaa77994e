"""Making the state of a parameter from a saved one, ours or bitsandbytes'."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lion import functional, reference
from lion._memory import sharding
from lion._memory.sharding import PER_ELEMENT
from lion._options import Kind, shown
from lion._state.adapting import adapted, momentum
from lion._state.checks import check_contents, check_sharded, is_dense
from lion._state.layout import Form, State, kind_in

NESTED_KEY = "__bnb_optimizer_quant_state__"


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
            check_sharded(flat, name)
            local_state = sharding.unwrapped(flat, p, name)
        else:
            # Every process has all of it: the whole is read, and of that the shard kept.
            stand_in = torch.empty((), dtype=p.dtype, device=p.device).expand(p.shape)
            whole = load(flat, stand_in, form._replace(kind=Kind.FLOAT32, paged=False), name)
            local_state = {**whole, **{key: sharding.shard_of(whole[key], p) for key in PER_ELEMENT if key in whole}}
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
            state = {**as_float, **{key: state[key] for key in ("step", "gnorm_vec", "master_low") if key in state}}
        else:
            state["qmap1"] = shared
    return adapted(state, p, form, name)


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
    if is_dense(step) and step.numel() == 1 and not step.is_complex():
        flat["step"] = step = step.detach().reshape(()).to(torch.float32)
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

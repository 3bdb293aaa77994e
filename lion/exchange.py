"""State dicts for, and from, other projects' Lion optimizers, and for other meshes; 16-bit weights as float32.

Checkpoints of bitsandbytes need no function to be read: ``load_state_dict`` takes them as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from lion._memory import sharding
from lion._options import Kind, check_group, shown
from lion._parameters import check_weights, parameter_name
from lion._state import (
    adapted,
    check_contents,
    check_parts,
    check_saved_group,
    entries_beside,
    form_of,
    from_communication,
    is_reset,
    join,
    kind_in,
    momentum,
    put,
    quantized,
    split,
    zero_momentum,
)
from lion.optimizers import Lion
from lion.overrides import GlobalOptimManager

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

StateDict = Mapping[str, Any]


def from_exp_avg(state_dict: StateDict, drop: Sequence[str] = ()) -> dict[str, Any]:
    """Return a state dict for these optimizers made from that of a Lion whose momentum is called ``exp_avg``.

    So are those of lion-pytorch, optimi, timm and others. ``betas`` may be given as ``beta1`` and ``beta2``. Without a
    ``step`` it is 0, which changes no result. A ``gnorm_vec`` and a ``master_low`` that :func:`to_exp_avg` kept are
    taken along.

    Args:
        state_dict: What the other optimizer's ``state_dict()`` returned.
        drop: Entries of its states, and options of its groups, that may be lost, for instance
            ``["kahan_comp", "kahan_sum"]`` (default: none); entries that are None always may.

    Returns:
        A state dict to load; momentum is float32, and loading it converts it to the optimizer's options.

    Raises:
        ValueError: If a state has no ``exp_avg``, or an entry that is neither known nor dropped, or if a group says
            that another algorithm is used, for instance by ``maximize`` or ``decouple_lr``.
    """
    check_parts(state_dict)
    states = {}
    for saved_id, saved in state_dict["state"].items():
        if not isinstance(saved, Mapping):
            raise ValueError(f"Invalid state of parameter {saved_id!r}: a dict is needed, not {type(saved).__name__}")
        entries = {key: value for key, value in saved.items() if value is not None and key not in drop}
        exp_avg = entries.pop("exp_avg", None)
        if not isinstance(exp_avg, Tensor) or not exp_avg.is_floating_point():
            raise ValueError(f"Invalid state of parameter {saved_id!r}: 'exp_avg' must be a tensor of floats")
        step = entries.pop("step", 0)
        kept = {key: entries.pop(key) for key in ("gnorm_vec", "master_low") if key in entries}
        if entries:
            raise ValueError(
                f"Invalid state of parameter {saved_id!r}: {next(iter(entries))!r} has no counterpart here; "
                "name it in `drop` to lose it"
            )
        momentum = exp_avg.detach().float()
        states[saved_id] = {"step": torch.tensor(float(step), device="cpu"), "state1": momentum, **kept}
    groups = []
    for number, saved in enumerate(state_dict["param_groups"]):
        group = {key: value for key, value in saved.items() if key not in drop}
        if "betas" not in group and "beta1" in group and "beta2" in group:
            group["betas"] = (group.pop("beta1"), group.pop("beta2"))
        check_saved_group(group, number)
        groups.append(group)
    return {"state": states, "param_groups": groups}


def to_exp_avg(
    state_dict: StateDict,
    param_groups: Sequence[Mapping[str, Any]] | None = None,
    entries: Mapping[str, Any] | None = None,
    keep: Sequence[str] = (),
) -> dict[str, Any]:
    """Return the state dict of one of these optimizers with float32 momentum of the parameter's shape, ``exp_avg``.

    It is what Lions of other projects load, and how 8-bit state of DTensors moves to another mesh: there
    :func:`from_exp_avg` makes of it what the optimizer loads and quantizes for its own shards.

    Args:
        state_dict: What ``state_dict()`` returned here.
        param_groups: ``other.state_dict()["param_groups"]``: the options that the other optimizer wants in its groups;
            ``lr``, ``weight_decay`` and ``betas`` (or ``beta1`` and ``beta2``) in them are replaced (default: the
            groups have these three options only).
        entries: What the other optimizer wants in every state besides ``exp_avg``, for instance
            ``{"kahan_comp": None}`` for optimi (default: nothing).
        keep: Which of ``"step"``, ``"gnorm_vec"`` and ``"master_low"`` its states keep, for one of these optimizers
            (default: none).

    Returns:
        A state dict for the other optimizer; ``exp_avg`` is float32, which torch's loader casts to the parameter's
        dtype.

    Raises:
        ValueError: If a state is none of one of these optimizers, ``param_groups`` do not hold
            the same numbers of parameters, or ``keep`` names something else.
    """
    check_parts(state_dict)
    if not set(keep) <= {"step", "gnorm_vec", "master_low"}:
        raise ValueError(f"Invalid keep: {keep!r}; expected some of 'step', 'gnorm_vec' and 'master_low'")
    own_states = _own_states(state_dict)
    # torch's loader would share a tensor that needs no cast.
    states = {
        key: {
            "exp_avg": momentum(own).clone(),
            **(entries or {}),
            **{name: own[name].clone() for name in keep if name in own},
        }
        for key, own in own_states.items()
    }
    own_groups = state_dict["param_groups"]
    templates = [{"params": group["params"]} for group in own_groups] if param_groups is None else param_groups
    if [len(group["params"]) for group in templates] != [len(group["params"]) for group in own_groups]:
        raise ValueError("Invalid param_groups: they do not hold as many parameters as those of the state dict")
    groups = []
    for own, template in zip(own_groups, templates, strict=True):
        group = {**template, "lr": own["lr"], "weight_decay": own["weight_decay"], "params": own["params"]}
        beta1, beta2 = own["betas"]
        group.update({"beta1": beta1, "beta2": beta2} if "beta1" in group else {"betas": (beta1, beta2)})
        groups.append(group)
    return {"state": states, "param_groups": groups}


def to_bitsandbytes(state_dict: StateDict) -> dict[str, Any]:
    """Return the state dict of one of these optimizers for bitsandbytes' class of the same name.

    Momentum that is quantized tensor-wise becomes block-wise: bitsandbytes no longer has the former. Lower parts of
    weights, which it does not have either, are left out.

    Args:
        state_dict: What ``state_dict()`` returned here.

    Returns:
        A state dict for bitsandbytes; its tensors are the optimizer's own, except converted ones.

    Raises:
        ValueError: If a state is none of one of these optimizers, or that of a DTensor.
    """
    check_parts(state_dict)
    states = dict(state_dict["state"])
    for key, own in _own_states(state_dict).items():
        if sharding.is_dtensor(own["state1"]):
            raise ValueError(f"Invalid state of parameter {key!r}: a DTensor; bitsandbytes' optimizers have none")
        new = dict(own, step=int(own["step"]))
        new.pop("master_low", None)
        if "qmap1" in own and is_reset(own):
            # There codes are made with the map of the state.
            new.update(zero_momentum(own["state1"], kind_in(own)))
        if "max1" in own:
            del new["max1"], new["new_max1"]
            new.update(quantized(momentum(own), Kind.BLOCKWISE))
        states[key] = new
    groups = [{"eps": 0.0, **group, "lr": float(group["lr"])} for group in state_dict["param_groups"]]
    return {"state": states, "param_groups": groups}


def _own_states(state_dict: StateDict) -> dict[Any, Any]:
    """Return the states of the parameters, checked, without what a program has put beside them."""
    beside = entries_beside(state_dict)
    states = {key: own for key, own in state_dict["state"].items() if key not in beside}
    for key, own in states.items():
        _check(key, own)
    return states


def float32_state_dict(model: nn.Module, optimizer: Lion) -> dict[str, Any]:
    """Return a model's state dict in float32, with the master values of its weights: for evaluation and export.

    A bfloat16 parameter that the optimizer keeps the lower part of is joined with it; every other tensor of 16 bits
    becomes float32 as it is. What is left is the model's own, as in its ``state_dict()``. DTensors stay what they are.

    Args:
        model: The model.
        optimizer: The optimizer of its parameters, or of some of them.

    Returns:
        A state dict with the keys of ``model.state_dict()``.

    Raises:
        TypeError: If ``optimizer`` is none of this package.
        ValueError: If the model's state dict does not hold a parameter that has a lower part, as with FSDP1, or if one
            is of a lazy module that has not run yet.
    """
    _check_optimizer(optimizer)
    _check_has_run(model)
    states = ((p, optimizer.state.get(p, {})) for group in optimizer.param_groups for p in group["params"])
    # Of a parameter that has become float32, the next step drops it.
    lows = {id(p): state["master_low"] for p, state in states if "master_low" in state and p.dtype == torch.bfloat16}
    own = _tensors_of(model, lows)
    # Tied parameters stay tied.
    wide = {id(value): _as_float32(value, lows.get(id(value))) for value in own.values() if isinstance(value, Tensor)}
    new = copy(own)
    new.update((key, wide[id(value)]) for key, value in own.items() if isinstance(value, Tensor))
    return new


def load_float32_state_dict(model: nn.Module, optimizer: Lion, state: StateDict) -> None:
    """Load a model's state dict and keep of its float32 weights what the optimizer's options keep; all or nothing.

    A bfloat16 parameter with ``master_weight_bits`` becomes the upper part of its new value, and the lower part goes
    into the optimizer, whose state of the parameter is made if there is none. All else is loaded by
    ``model.load_state_dict``, which rounds to nearest where a tensor has fewer bits.

    Args:
        model: The model.
        optimizer: The optimizer of its parameters, or of some of them.
        state: What :func:`float32_state_dict` or the ``state_dict()`` of a float32 model returned. A DTensor may be
            given as such or, in every process, whole.

    Raises:
        TypeError: If ``optimizer`` is none of this package.
        ValueError: If ``state`` does not fit the model, or the model's state dict does not hold a parameter that has
            master bits, as with FSDP1, or a parameter is of a lazy module that has not run yet; nothing has changed
            then.
    """
    _check_optimizer(optimizer)
    _check_has_run(model)
    overrides = GlobalOptimManager.get_instance().lookup()
    masters = {}
    for number, group in enumerate(optimizer.param_groups):
        checked = check_group(group, number)
        for index, p in enumerate(group["params"]):
            options, name = {**checked, **overrides.get(id(p), {})}, parameter_name(group, number, index)
            form = form_of(p, options)
            if form.master_bits is not None:
                check_weights(p, options, name)
                masters[id(p)] = p, form, name
    own = _tensors_of(model, masters)
    given = _fitting(own, state)
    found = {id(value): given[key] for key, value in own.items() if id(value) in masters}
    with torch.no_grad():
        parts = []
        for key, value in found.items():
            p, form, name = masters[key]
            wide = sharding.local(value).to(p.device, torch.float32)
            high, low = split(wide, cast(int, form.master_bits))
            parts.append((p, adapted(optimizer.state.get(p), p, form, name), high, low))
        model.load_state_dict(given)
        for p, new, high, low in parts:
            sharding.local(p).copy_(high)
            sharding.local(new["master_low"]).copy_(low)
            put(optimizer.state, p, new)


def _check_has_run(model: nn.Module) -> None:
    """Raise if a parameter or a buffer is one of a lazy module that has not run yet."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if nn.parameter.is_lazy(tensor):
            raise ValueError(f"Invalid model: {name!r} has no shape yet; its module has to run once before")


def _check_optimizer(optimizer: object) -> None:
    if not isinstance(optimizer, Lion):
        raise TypeError(f"Invalid optimizer: {type(optimizer).__name__}; expected one of this package")


def _tensors_of(model: nn.Module, needed: Mapping[int, object]) -> dict[str, Any]:
    """Return a model's state dict of the tensors themselves, or raise if one of its parameters is not among them.

    Args:
        model: The model.
        needed: The ids of the parameters that have to be there if they are the model's.
    """
    own: dict[str, Any] = model.state_dict(keep_vars=True)
    there = set(map(id, own.values()))
    for name, p in model.named_parameters():
        if id(p) in needed and id(p) not in there:
            raise ValueError(
                f"Invalid model: its state_dict() does not hold the parameter {name!r} itself, to which a lower part "
                "belongs; that of FSDP1 never does (torch.distributed.fsdp.fully_shard is supported)"
            )
    return own


def _as_float32(tensor: Tensor, low: Tensor | None) -> Tensor:
    tensor = tensor.detach()
    if low is not None:
        return sharding.laid_out_like(join(sharding.local(tensor), sharding.local(low)), tensor)
    return tensor.float() if tensor.is_floating_point() and tensor.itemsize == 2 else tensor


def _fitting(own: Mapping[str, Any], state: StateDict) -> dict[str, Any]:
    """Return a state dict for a model, checked, with DTensors where the model has them."""
    if not isinstance(state, Mapping):
        raise TypeError(f"Invalid state: {type(state).__name__}; a dict is needed")
    for what, keys in (("lacks", own.keys() - state.keys()), ("has the unknown", state.keys() - own.keys())):
        if keys:
            raise ValueError(f"Invalid state: it {what} key {shown(min(keys, key=str))}")
    # With the metadata that torch keeps in an attribute.
    given: dict[str, Any] = copy(state) if isinstance(state, dict) else dict(state)
    for key, place in own.items():
        if not isinstance(place, Tensor):
            continue
        value = state[key]
        if not isinstance(value, Tensor) or value.shape != place.shape or value.is_complex() != place.is_complex():
            found = f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else shown(value)
            raise ValueError(f"Invalid state: {key!r} is {found}; a tensor of shape {tuple(place.shape)} is needed")
        if sharding.is_dtensor(place):
            given[key] = _laid_out(value.detach(), place)
        elif sharding.is_dtensor(value):
            given[key] = value.full_tensor()
    return given


def _laid_out(value: Tensor, place: DTensor) -> Tensor:
    """Return a tensor, which every process has whole or a shard of, laid out as another."""
    if not sharding.is_dtensor(value):
        return sharding.laid_out_like(sharding.shard_of(value.to(sharding.local(place).device), place), place)
    if (value.device_mesh, value.placements) != (place.device_mesh, place.placements):
        return value.redistribute(place.device_mesh, place.placements)
    return value


def _check(key: object, own: Any) -> None:
    """Raise unless a state is that of one of these optimizers."""
    name = f"parameter {key!r}"
    if not isinstance(own, Mapping) or not isinstance(own.get("state1"), Tensor):
        raise ValueError(f"Invalid state of {name}: a dict with a tensor 'state1' is needed")
    if not sharding.is_dtensor(own["state1"]):
        check_contents(from_communication(own), own["state1"], name)

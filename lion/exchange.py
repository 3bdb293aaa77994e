"""State dicts for, and from, other projects' Lion optimizers, and for other meshes.

Checkpoints of bitsandbytes need no function to be read: ``load_state_dict`` takes them as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lion._memory import sharding
from lion._options import Kind
from lion._state import (
    check_contents,
    check_parts,
    check_saved_group,
    entries_beside,
    is_reset,
    kind_in,
    momentum,
    quantized,
    zero_momentum,
)

StateDict = Mapping[str, Any]


def from_exp_avg(state_dict: StateDict, drop: Sequence[str] = ()) -> dict[str, Any]:
    """Return a state dict for these optimizers made from that of a Lion whose momentum is called ``exp_avg``.

    So are those of lion-pytorch, optimi, timm and others. ``betas`` may be given as ``beta1`` and ``beta2``. Without a
    ``step`` it is 0, which changes no result. A ``gnorm_vec`` that :func:`to_exp_avg` kept is taken along.

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
        kept = {"gnorm_vec": entries.pop("gnorm_vec")} if "gnorm_vec" in entries else {}
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
        keep: Which of ``"step"`` and ``"gnorm_vec"`` its states keep, for one of these optimizers (default: none).

    Returns:
        A state dict for the other optimizer; ``exp_avg`` is float32, which torch's loader casts to the parameter's
        dtype.

    Raises:
        ValueError: If a state is none of one of these optimizers, ``param_groups`` do not hold
            the same numbers of parameters, or ``keep`` names something else.
    """
    check_parts(state_dict)
    if not set(keep) <= {"step", "gnorm_vec"}:
        raise ValueError(f"Invalid keep: {keep!r}; 'step' and 'gnorm_vec' are allowed")
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

    Momentum that is quantized tensor-wise becomes block-wise: bitsandbytes no longer has the former.

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


def _check(key: object, own: Any) -> None:
    """Raise unless a state is that of one of these optimizers."""
    name = f"parameter {key!r}"
    if not isinstance(own, Mapping) or not isinstance(own.get("state1"), Tensor):
        raise ValueError(f"Invalid state of {name}: a dict with a tensor 'state1' is needed")
    if not sharding.is_dtensor(own["state1"]):
        check_contents(own, own["state1"], name)

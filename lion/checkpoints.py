"""Checkpoints: what a state dict gives an optimizer, checked as a whole before anything changes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

from torch import Tensor

from lion import state
from lion.options import CHECKS, STATE_OPTIONS, check_group, form_of
from lion.overrides import GlobalOptimManager
from lion.plan import parameter_name


def converted(state_dict: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the states and groups that a checkpoint gives an optimizer.

    Args:
        state_dict: The checkpoint; not changed and not shared with the result.
        groups: The optimizer's parameter groups; their parameters and the options that shape the state stay.

    Returns:
        A dict with the keys ``state``, by parameter, and ``param_groups``.

    Raises:
        ValueError: If the checkpoint does not fit, naming the parameter or group and the key.
        OSError: If there is no room or no permission for paged state.
    """
    saved_groups, saved_states = _parts(state_dict, groups)
    new_groups = []
    states: defaultdict[Tensor, state.State] = defaultdict(dict)
    overrides = GlobalOptimManager.get_instance().lookup()
    for number, (group, saved) in enumerate(zip(groups, saved_groups, strict=True)):
        own = {key: group[key] for key in ("params", "param_names", *STATE_OPTIONS) if key in group}
        new = {**{key: group[key] for key in CHECKS}, **deepcopy(saved), **own}
        try:
            new.update(check_group(new))
        except (TypeError, ValueError) as error:
            raise ValueError(f"Invalid state_dict: group {number}: {error}") from None
        new_groups.append(new)
        for index, (p, saved_id) in enumerate(zip(group["params"], saved["params"], strict=True)):
            # A parameter that never had a gradient has no state, or an empty one.
            if saved_states.get(saved_id, {}) != {}:
                form = form_of(p.numel(), {**new, **overrides.get(id(p), {})})
                states[p] = state.load(saved_states[saved_id], p, form, parameter_name(group, number, index))
    return {"state": states, "param_groups": new_groups}


def _parts(
    state_dict: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]
) -> tuple[list[dict[str, Any]], Mapping[Any, Any]]:
    """Return the groups and the states of a checkpoint after checking that they are as many as are needed."""
    for key, kind in (("state", Mapping), ("param_groups", list)):
        if key not in state_dict:
            raise ValueError(f"Invalid state_dict: the key {key!r} is missing")
        if not isinstance(state_dict[key], kind):
            raise ValueError(f"Invalid state_dict: {key!r} must not be of type {type(state_dict[key]).__name__}")
    saved_groups = state_dict["param_groups"]
    for number, saved in enumerate(saved_groups):
        if not isinstance(saved, Mapping) or not isinstance(saved.get("params"), list):
            raise ValueError(f"Invalid state_dict: group {number} must be a dict with a list under the key 'params'")
    counts, needed = ([len(group["params"]) for group in some] for some in (saved_groups, groups))
    if counts != needed:
        raise ValueError(f"Invalid state_dict: its groups hold {counts} parameters; {needed} are needed")
    ids = [saved_id for saved in saved_groups for saved_id in saved["params"]]
    if len(set(ids)) != len(ids):
        raise ValueError("Invalid state_dict: a parameter is in 'params' more than once")
    unknown = [saved_id for saved_id in state_dict["state"] if saved_id not in set(ids)]
    if unknown:
        raise ValueError(f"Invalid state_dict: no group holds the parameter {unknown[0]!r} of its states")
    return saved_groups, state_dict["state"]

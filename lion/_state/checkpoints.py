"""Checkpoints: what a state dict gives an optimizer, checked as a whole before anything changes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lion._options import CHECKS, HYPERPARAMETERS, STATE_OPTIONS, check_algorithm, check_group, check_value, shown
from lion._parameters import names_of, parameter_name
from lion._state.layout import form_of, is_unused
from lion._state.loading import NESTED_KEY, load, moved
from lion.overrides import GlobalOptimManager


# What is made in torch's inference mode could not be changed outside of it.
@torch.inference_mode(False)
@torch.no_grad()
def converted(state_dict: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the states and groups that a checkpoint gives an optimizer.

    Args:
        state_dict: The checkpoint; not changed and not shared with the result.
        groups: The optimizer's parameter groups; their parameters and the options that shape the state stay.

    Returns:
        A dict with the keys ``state``, by parameter and with the program's own entries, and ``param_groups``.

    Raises:
        ValueError: If the checkpoint does not fit, naming the parameter or group and the key.
        OSError: If there is no room or no permission for paged state.
    """
    saved_groups, saved_states, entries = _parts(state_dict, groups)
    new_groups = []
    states: defaultdict[Any, Any] = defaultdict(dict)
    overrides = GlobalOptimManager.get_instance().lookup()
    for number, (group, saved) in enumerate(zip(groups, saved_groups, strict=True)):
        own = {key: group[key] for key in ("params", "param_names", *STATE_OPTIONS) if key in group}
        check_saved_group(saved, number)
        try:
            new = {**deepcopy(dict(saved)), **own}
        except Exception as error:
            raise ValueError(f"Invalid state_dict: group {number} cannot be copied: {error}") from error
        new.update(check_group(new, number))
        new_groups.append(new)
        for index, (p, saved_id) in enumerate(zip(group["params"], saved["params"], strict=True)):
            # A parameter that never had a gradient has no state, or an empty one.
            saved_state = saved_states.get(saved_id, {})
            if not isinstance(saved_state, Mapping) or saved_state:
                name, place = parameter_name(group, number, index), _stand_in(p, saved_state)
                form = form_of(place, {**new, **overrides.get(id(p), {})})
                if isinstance(saved_state, Mapping) and is_unused(saved_state) and STATE_OPTIONS[0] not in saved:
                    # Here it has entries of the program only; elsewhere the momentum is one of them.
                    raise ValueError(f"Invalid state of {name}: the key 'state1' is missing")
                states[p] = load(saved_state, place, form, name)
    states.update(entries)
    return {"state": states, "param_groups": new_groups}


def python_numbers(value: Any) -> Any:
    """Return a value of a group with Python's numbers for NumPy's, which ``torch.load`` does not read by default."""
    try:
        return _python_numbers(value)
    except RecursionError:  # it contains itself
        return value


def _python_numbers(value: Any) -> Any:
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.ndim == 0):
        return value.item()
    if type(value) in (list, tuple):
        return type(value)(map(_python_numbers, value))
    if type(value) is dict:
        return {key: _python_numbers(item) for key, item in value.items()}
    return value


def check_parts(state_dict: Mapping[str, Any]) -> None:
    """Raise unless a state dict has states and a list of groups.

    Raises:
        ValueError: Naming the key.
    """
    for key, kinds in (("state", Mapping), ("param_groups", (list, tuple))):
        if key not in state_dict:
            raise ValueError(f"Invalid state_dict: the key {key!r} is missing")
        if not isinstance(state_dict[key], kinds):
            raise ValueError(f"Invalid state_dict: {key!r} must not be of type {type(state_dict[key]).__name__}")
    for number, saved in enumerate(state_dict["param_groups"]):
        if not isinstance(saved, Mapping) or not isinstance(saved.get("params"), (list, tuple)):
            raise ValueError(f"Invalid state_dict: group {number} must be a dict with a list under the key 'params'")


def entries_beside(state_dict: Mapping[str, Any]) -> set[Any]:
    """Return the keys of what a program has put beside the states of the parameters.

    Raises:
        ValueError: If one of them is the state of a parameter that no group holds.
    """
    states = state_dict["state"]
    ids = [saved_id for saved in state_dict["param_groups"] for saved_id in saved["params"]]
    keys = states.keys() - {saved_id for saved_id in ids if isinstance(saved_id, Hashable)}
    for key in keys:
        if isinstance(key, int) or (isinstance(states[key], Mapping) and not is_unused(states[key])):
            raise ValueError(f"Invalid state_dict: no group holds the parameter {key!r} of its states")
    return keys


def check_saved_group(saved: Mapping[str, Any], number: int) -> None:
    """Raise unless a group of a checkpoint says what a Lion needs, and nothing that would change what it does.

    Raises:
        ValueError: Naming the group and the key.
    """
    for key in HYPERPARAMETERS:
        if key not in saved:
            raise ValueError(f"Invalid state_dict: group {number} lacks the key {key!r}")
    for key in CHECKS:
        if key in saved:
            try:
                check_value(key, saved[key], saved)
            except (TypeError, ValueError) as error:
                raise ValueError(f"Invalid state_dict: group {number}: {key!r}: {error}") from None
    try:
        check_algorithm(saved, number)
    except ValueError as error:
        raise ValueError(f"Invalid state_dict: {str(error).removeprefix('Invalid ')}") from None


def _stand_in(p: Tensor, saved_state: object) -> Tensor:
    """Return what a state is loaded for: for the parameter of a lazy module, which has no shape yet, what it may be."""
    if not torch.nn.parameter.is_lazy(p):
        return p
    saved = saved_state if isinstance(saved_state, Mapping) else {}
    nested = saved.get(NESTED_KEY)
    momentum = {**saved, **(nested if isinstance(nested, Mapping) else {})}.get("state1")
    shape = momentum.shape if isinstance(momentum, Tensor) else ()
    return torch.empty((), dtype=p.dtype, device=p.device).expand(shape)


def _check_names(groups: Sequence[Mapping[str, Any]], saved_groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise if both sides name their parameters and the same names stand in another order.

    Names that differ as such, by a wrapper's prefix for instance, say nothing about the order.
    """
    own, saved = (
        [name if isinstance(name, str) else shown(name) for group in some for name in names_of(group)]
        for some in (groups, saved_groups)
    )
    if own != saved and sorted(own) == sorted(saved):
        first = next(pair for pair in zip(own, saved, strict=True) if pair[0] != pair[1])
        raise ValueError(f"Invalid state_dict: its 'param_names' have {first[1]!r} where {first[0]!r} is needed")


def _check_origin(saved_groups: Sequence[Mapping[str, Any]], states: Mapping[Any, Any]) -> None:
    """Raise if a state dict is one of the many optimizers that call their momentum exp_avg.

    An entry of this name that a program has put into a state of one of these optimizers is the program's.
    """
    for number, saved in enumerate(saved_groups):
        for saved_id in saved["params"] if STATE_OPTIONS[0] not in saved else []:
            state = states.get(saved_id) if isinstance(saved_id, Hashable) else None
            if isinstance(state, Mapping) and "exp_avg" in state and "state1" not in state:
                drop = ', drop=["exp_avg_sq"]' if "exp_avg_sq" in state else ""
                raise ValueError(
                    f"Invalid state_dict: group {number} is another optimizer's, with 'exp_avg' for 'state1'; "
                    f"lion.exchange.from_exp_avg(state_dict{drop}) makes of it what is needed here"
                )


def _parts(
    state_dict: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]
) -> tuple[list[dict[str, Any]], Mapping[Any, Any], dict[Any, Any]]:
    """Return the groups of a checkpoint, its states, and what a program has put beside them.

    Checks that they are as many as are needed.
    """
    check_parts(state_dict)
    saved_groups = state_dict["param_groups"]
    counts, needed = ([len(group["params"]) for group in some] for some in (saved_groups, groups))
    if counts != needed:
        raise ValueError(f"Invalid state_dict: its groups hold {counts} parameters; {needed} are needed")
    _check_names(groups, saved_groups)
    _check_origin(saved_groups, state_dict["state"])
    ids = [saved_id for saved in saved_groups for saved_id in saved["params"]]
    if not all(isinstance(saved_id, Hashable) for saved_id in ids):
        raise ValueError("Invalid state_dict: 'params' must hold the keys of its states")
    if len(set(ids)) != len(ids):
        raise ValueError("Invalid state_dict: a parameter is in 'params' more than once")
    states = state_dict["state"]
    return saved_groups, states, {key: moved(states[key], None, shown(key)) for key in entries_beside(state_dict)}

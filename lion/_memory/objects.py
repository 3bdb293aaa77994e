"""Tensor objects, told apart and followed without weak references to them.

``torch.utils.swap_tensors`` gives a tensor object another content: memory, class, attributes, and the hooks that fire.
``torch.nn.Module.to`` and ``load_state_dict`` do so to the parameters of FSDP2, and to all of them with
``torch.__future__.set_swap_module_params_on_conversion``. It refuses objects with weak references. So a mark is put
among the attributes instead: it goes when its object goes, or when the object goes that got the attributes in a swap.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Sequence
from itertools import compress
from typing import Any

from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

Mark = weakref.ReferenceType[set[object]]
# A module or an optimizer that has parameters.
Holder = weakref.ReferenceType[Any]
_KINDS = (Tensor, Module, Optimizer)


def mark(tensor: Tensor, key: str, lost: Callable[[], None]) -> Mark:
    """Mark a tensor object.

    Args:
        tensor: The tensor.
        key: The attribute to put the mark in.
        lost: Called when the tensor has died or has got another content, in the middle of that; not called any more
            once the result is gone.

    Returns:
        What keeps watch.
    """
    # torch.load reads a set without further ado, where a parameter is saved with its attributes.
    token: set[object] = set()
    vars(tensor)[key] = token
    return weakref.ref(token, lambda _: lost())


def search(identities: Iterable[int]) -> tuple[dict[int, Tensor], dict[int, list[Holder]]]:
    """Return the living tensors of some ids, and who holds them, by their ids; looks at every object that Python has.

    An object that is just being freed is not found.
    """
    wanted = set(identities)
    things = gc.get_objects()
    # Asking an object itself for its class may run code, and a class need not be hashable.
    kinds = list(map(type, things))
    numbers = list(map(id, kinds))
    chosen = {number for number, kind in dict(zip(numbers, kinds, strict=True)).items() if issubclass(kind, _KINDS)}
    living: dict[int, Tensor] = {}
    holders: dict[int, list[Holder]] = {}
    for thing in compress(things, map(chosen.__contains__, numbers)):
        if not issubclass(type(thing), Tensor):
            for identity in wanted.intersection(map(id, _held(thing))):
                holders.setdefault(identity, []).append(weakref.ref(thing))
        elif id(thing) in wanted:
            living[id(thing)] = thing
    return living, holders


def held(identity: int, holders: Sequence[Holder]) -> Tensor | None:
    """Return the tensor of an id if one of its holders has it still."""
    things = [thing for holder in holders if (thing := holder()) is not None]
    return next((tensor for thing in things for tensor in _held(thing) if id(tensor) == identity), None)


def _held(thing: Any) -> list[Any]:
    own = vars(thing)
    if "param_groups" in own:
        return [p for group in own["param_groups"] for p in group["params"]]
    return list(own.get("_parameters", {}).values())

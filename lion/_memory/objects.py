"""Tensor objects, told apart and followed without weak references to them.

``torch.utils.swap_tensors`` gives a tensor object another content: memory, class, attributes, and the hooks that fire.
``torch.nn.Module.to`` and ``load_state_dict`` do so to the parameters of FSDP2, and to all of them with
``torch.__future__.set_swap_module_params_on_conversion``. It refuses objects with weak references. So a mark is put
among the attributes instead: it goes when its object goes, or when the object goes that got the attributes in a swap.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

from torch import Tensor

Mark = weakref.ReferenceType[set[object]]


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


def living(identity: int) -> Tensor | None:
    """Return the tensor object whose ``id`` this is, if there is one; looks at every object that Python has."""
    objects = gc.get_objects()
    identities = list(map(id, objects))
    found = objects[identities.index(identity)] if identity in identities else None
    return found if isinstance(found, Tensor) else None

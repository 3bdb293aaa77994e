"""The dynamic map that the kernels have built in: one on each device to compute with, copies for all who keep one."""

from __future__ import annotations

from collections.abc import MutableMapping

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from lion import reference
from lion._memory.addresses import unaddressable

_constants: dict[torch.device, Tensor] = {}
# Tensors that held the map, with their version and their memory then: comparing them would wait for their device.
_found_equal: MutableMapping[Tensor, tuple[int, int]] = WeakTensorKeyDictionary()


def constant(device: torch.device) -> Tensor:
    """Return the signed dynamic map on a device, float32 of 256, to compute with: it is not to be handed out."""
    found = _constants.get(device)
    if found is None:
        with torch.inference_mode(False), torch.no_grad():
            found = torch.from_numpy(reference.create_dynamic_map()).to(device)
        # Under torch's FakeTensorMode there is no real one to keep.
        if unaddressable(found) is None:
            _constants[device] = found
    return found


def copied(device: torch.device) -> Tensor:
    """Return the signed dynamic map on a device as a tensor of its own."""
    with torch.inference_mode(False), torch.no_grad():
        own = constant(device).clone()
    _remember(own)
    return own


def is_dynamic(qmap: Tensor) -> bool:
    """Return whether a tensor holds the signed dynamic map.

    It waits for the tensor's device only where somebody has written to the tensor since it was last known to.

    Args:
        qmap: A tensor that a kernel can be given the address of.
    """
    if not qmap.is_inference() and _found_equal.get(qmap) == (qmap._version, qmap.data_ptr()):
        return True
    if not torch.equal(qmap, constant(qmap.device)):
        return False
    _remember(qmap)
    return True


def renew(qmap: object) -> None:
    """Write the map again into a tensor that held it and was set to zero unseen by torch, as through ``.data``.

    Kernels go by the map that they have built in, so the codes beside it are codes of that one.

    Args:
        qmap: Whatever a state has in the place of a map.
    """
    if not isinstance(qmap, Tensor) or qmap.is_inference():
        return
    known = _found_equal.get(qmap)
    if known is None or known != (qmap._version, qmap.data_ptr()):
        return
    some = qmap.any()
    # Under torch's FakeTensorMode there is no answer.
    if unaddressable(some) is None and not some:
        with torch.no_grad():
            qmap.copy_(constant(qmap.device))
        _remember(qmap)


def _remember(qmap: Tensor) -> None:
    if not qmap.is_inference() and unaddressable(qmap) is None:
        _found_equal[qmap] = qmap._version, qmap.data_ptr()

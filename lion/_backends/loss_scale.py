"""The scaling of a loss, which a step undoes while it reads the gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class LossScale(NamedTuple):
    """What :class:`torch.amp.GradScaler` hands to an optimizer that takes care of the scaling itself.

    Attributes:
        grad_scale: The factor that the loss was multiplied by, one float32 on any device; None for 1.
        found_inf: One float32 on any device; not 0 where a gradient is not finite and nothing is to change. None where
            nobody looked.
    """

    grad_scale: Tensor | None
    found_inf: Tensor | None

    @classmethod
    def of(cls, optimizer: object) -> LossScale:
        """Return what the attributes ``grad_scale`` and ``found_inf`` of an optimizer say.

        Raises:
            TypeError: If one of them is neither a number nor a tensor.
            ValueError: If one of them is a tensor of more than one element.
        """
        grad_scale, found_inf = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
        if grad_scale is None and found_inf is None:
            return _NOT_SCALED
        return cls(_scalar("grad_scale", grad_scale), _scalar("found_inf", found_inf))

    @classmethod
    def forget(cls, optimizer: object) -> None:
        """Take the attributes away from an optimizer, whose next step would take them for its own."""
        for name in cls._fields:
            vars(optimizer).pop(name, None)

    def inv_scale(self) -> np.float32:
        """Return the factor of the gradients; waits for the device that the scale is on."""
        if self.grad_scale is None:
            return np.float32(1)
        with np.errstate(all="ignore"):
            return np.float32(1) / np.float32(self.grad_scale.item())

    def skips_on_host(self) -> bool:
        """Return whether nothing is to change, as far as that is known without waiting for a device."""
        return self.found_inf is not None and self.found_inf.device.type == "cpu" and self.skips()

    def skips(self) -> bool:
        """Return whether nothing is to change; waits for the device that the answer is on."""
        return self.found_inf is not None and self.found_inf.item() != 0


_NOT_SCALED = LossScale(None, None)


def _scalar(name: str, value: Any) -> Tensor | None:
    if value is None:
        return None
    if isinstance(value, (int, float, np.number)):
        value = torch.tensor(float(value), device="cpu")
    if not isinstance(value, Tensor):
        raise TypeError(f"Invalid {name}: {value!r}; expected a number or a tensor of one element")
    tensor = value.to(torch.float32)
    if tensor.numel() != 1:
        raise ValueError(f"Invalid {name}: a tensor of shape {tuple(tensor.shape)}; expected one element")
    return tensor.detach().reshape(())

"""What the rest of the library asks of an implementation."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lion import reference
from lion._backends.batch import Batch
from lion._backends.loss_scale import LossScale

DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


class StepCoefficients(NamedTuple):
    """The numbers of one step.

    Attributes:
        values: The coefficients; ``lr`` and ``decay`` are not meaningful when ``device_lr`` is given.
        device_lr: A learning rate that is kept in the memory of the parameters' CUDA device.
        weight_decay: The weight decay.
    """

    values: reference.Coefficients
    device_lr: Tensor | None
    weight_decay: float


class Backend(Protocol):
    """What the optimizers and the functional API ask of an implementation; tensors are contiguous and checked."""

    def is_capturing(self, device: torch.device) -> bool:
        """Return whether what a device is told to do now goes into a graph instead."""

    def update(self, batch: Batch, step: StepCoefficients, loss_scale: LossScale) -> None:
        """Update parameters and states of a batch in place."""

    def squared_norms(self, batch: Batch, step: StepCoefficients, loss_scale: LossScale) -> Tensor:
        """Return the squared norms of a batch's gradients, float32 of shape (n,) on their device."""

    def quantize_blockwise(self, values: Tensor, codes: Tensor, absmax: Tensor, qmap: Tensor, block_size: int) -> None:
        """Write the codes and the absmax of each block."""

    def dequantize_blockwise(
        self, codes: Tensor, absmax: Tensor, values: Tensor, qmap: Tensor, block_size: int
    ) -> None:
        """Write the values that the codes stand for."""

    def squared_norm(self, grad: Tensor) -> Tensor:
        """Return the squared norm, 0-dim float32 on the gradient's device."""

    def percentile_clipping(self, grad: Tensor, gnorm_vec: Tensor, step: int, percentile: int) -> Tensor:
        """Record the gradient's norm in the history and return the scale, 0-dim float32 on its device."""

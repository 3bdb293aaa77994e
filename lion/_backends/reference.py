"""CPU tensors, through :mod:`lion.reference`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lion import reference
from lion._backends.batch import FIRST_ELEMENT, NUMBER, Batch
from lion._backends.loss_scale import LossScale
from lion._backends.protocol import StepCoefficients
from lion._options import Kind


class ReferenceBackend:
    """CPU tensors, through :mod:`lion.reference`: slow, and right by definition."""

    def is_capturing(self, device: torch.device) -> bool:
        return False

    def update(self, batch: Batch, step: StepCoefficients, loss_scale: LossScale) -> None:
        if loss_scale.skips():
            return
        inv_scale, norms = loss_scale.inv_scale(), batch.squared_norms
        if batch.percentile < 100 and norms is None:
            norms = self.squared_norms(batch, step, loss_scale)
        for i, (param, grad, state) in enumerate(zip(batch.operands, batch.gradients, batch.states, strict=True)):
            p, g, momentum = as_numpy(param), as_numpy(grad), as_numpy(state["state1"])
            scale = np.float32(1.0)
            if norms is not None:
                scale = _clip(norms.numpy()[i], state["gnorm_vec"], int(state["step"] + 1), batch.percentile)
            weights = _weights_of(batch, i, state)
            low: list[npt.NDArray[Any]] = []
            if batch.kind is Kind.FLOAT32:
                p[...], momentum[...], *low = reference.update_32bit(
                    p, g, momentum, step.values, scale, inv_scale, weights
                )
            elif p.size:
                name, update = _EIGHT_BIT[batch.kind]
                absmax, qmap = as_numpy(state[name]), as_numpy(state["qmap1"])
                p[...], momentum[...], absmax[...], *low = update(
                    p, g, momentum, absmax, qmap, step.values, scale, inv_scale=inv_scale, weights=weights
                )
            for new in low:
                as_numpy(state["master_low"])[...] = new
            if batch.kind is Kind.TENSORWISE:
                state["new_max1"].copy_(state["max1"])
            state["step"] += 1

    def squared_norms(self, batch: Batch, step: StepCoefficients, loss_scale: LossScale) -> Tensor:
        inv_scale = loss_scale.inv_scale()
        norms = [reference.squared_norm(as_numpy(grad), inv_scale) for grad in batch.gradients]
        return torch.from_numpy(np.array(norms, np.float32))

    def quantize_blockwise(self, values: Tensor, codes: Tensor, absmax: Tensor, qmap: Tensor, block_size: int) -> None:
        as_numpy(codes)[...], as_numpy(absmax)[...] = reference.quantize_blockwise(
            as_numpy(values), as_numpy(qmap), block_size
        )

    def dequantize_blockwise(
        self, codes: Tensor, absmax: Tensor, values: Tensor, qmap: Tensor, block_size: int
    ) -> None:
        as_numpy(values)[...] = reference.dequantize_blockwise(
            as_numpy(codes), as_numpy(absmax), as_numpy(qmap), block_size
        )

    def squared_norm(self, grad: Tensor) -> Tensor:
        return torch.from_numpy(np.array(reference.squared_norm(as_numpy(grad))))

    def percentile_clipping(self, grad: Tensor, gnorm_vec: Tensor, step: int, percentile: int) -> Tensor:
        squared = reference.squared_norm(as_numpy(grad))
        return torch.from_numpy(np.array(_clip(squared, gnorm_vec, step, percentile)))


def _weights_of(batch: Batch, i: int, state: Mapping[str, Any]) -> reference.Master | reference.Stochastic | None:
    master_bits, seed = batch.weights
    if master_bits is not None:
        return reference.Master(as_numpy(state["master_low"]))
    if seed is None:
        return None
    number, first = (int(batch.table[row, i]) for row in (NUMBER, FIRST_ELEMENT))
    return reference.Stochastic(seed, int(state["step"] + 1), number, first)


def _clip(squared_norm: np.float32, gnorm_vec: Tensor, step: int, percentile: int) -> np.float32:
    history = as_numpy(gnorm_vec)
    history[...], _, _, scale = reference.percentile_clipping(history, squared_norm, step, percentile)
    return scale


_EIGHT_BIT: dict[Kind, tuple[str, Callable[..., Any]]] = {
    Kind.BLOCKWISE: ("absmax1", reference.update_8bit_blockwise),
    Kind.TENSORWISE: ("max1", reference.update_8bit_tensorwise),
}


def as_numpy(tensor: Tensor) -> npt.NDArray[Any]:
    """Return a NumPy view of a contiguous CPU tensor's memory; bfloat16 through ml_dtypes."""
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()

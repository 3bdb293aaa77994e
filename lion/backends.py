"""Which implementation serves which tensor, and how a batch of parameters reaches it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lion import cpu_kernels, reference
from lion.batches import GRAD, SIZE, Batch
from lion.loss_scale import LossScale
from lion.options import Kind

DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
NAMES = ("reference", "cpu", "cuda")

_requested: str | None = None


class Backend(Protocol):
    """What the optimizers and the functional API ask of an implementation; tensors are contiguous and checked."""

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


class CpuBackend:
    """CPU tensors, through :mod:`lion.cpu_kernels`."""

    def update(self, batch: Batch, step: StepCoefficients, loss_scale: LossScale) -> None:
        if loss_scale.skips():
            return
        params, grads, states, absmax, new_absmax, sizes, steps, histories = batch.table
        dtype, threads = DTYPES[batch.dtype], torch.get_num_threads()
        k = np.array(step.values)
        scales = np.ones(len(sizes), np.float32)
        if batch.percentile < 100:
            norms = self.squared_norms(batch, step, loss_scale) if batch.squared_norms is None else batch.squared_norms
            cpu_kernels.percentile_clipping(norms.numpy(), histories, steps, scales, batch.percentile, threads)
        common = sizes, steps, scales, k, threads, loss_scale.inv_scale()
        if batch.kind is Kind.FLOAT32:
            cpu_kernels.update_32bit(dtype, params, grads, states, *common)
        elif batch.kind is Kind.BLOCKWISE:
            cpu_kernels.update_8bit_blockwise(dtype, params, grads, states, absmax, *common)
        else:
            cpu_kernels.update_8bit_tensorwise(dtype, params, grads, states, absmax, new_absmax, *common)

    def squared_norms(self, batch: Batch, step: StepCoefficients, loss_scale: LossScale) -> Tensor:
        dtype, grads, sizes = DTYPES[batch.dtype], batch.table[GRAD], batch.table[SIZE]
        norms = cpu_kernels.squared_norm(dtype, grads, sizes, torch.get_num_threads(), loss_scale.inv_scale())
        return torch.from_numpy(norms)

    def quantize_blockwise(self, values: Tensor, codes: Tensor, absmax: Tensor, qmap: Tensor, block_size: int) -> None:
        cpu_kernels.quantize_blockwise(
            DTYPES[values.dtype],
            values.data_ptr(),
            codes.data_ptr(),
            absmax.data_ptr(),
            values.numel(),
            qmap.numpy(),
            block_size,
            torch.get_num_threads(),
        )

    def dequantize_blockwise(
        self, codes: Tensor, absmax: Tensor, values: Tensor, qmap: Tensor, block_size: int
    ) -> None:
        cpu_kernels.dequantize_blockwise(
            DTYPES[values.dtype],
            codes.data_ptr(),
            absmax.data_ptr(),
            values.data_ptr(),
            values.numel(),
            qmap.numpy(),
            block_size,
            torch.get_num_threads(),
        )

    def squared_norm(self, grad: Tensor) -> Tensor:
        grads, sizes = np.array([grad.data_ptr()]), np.array([grad.numel()])
        norms = cpu_kernels.squared_norm(DTYPES[grad.dtype], grads, sizes, torch.get_num_threads())
        return torch.from_numpy(norms)[0]

    def percentile_clipping(self, grad: Tensor, gnorm_vec: Tensor, step: int, percentile: int) -> Tensor:
        before = torch.tensor(step - 1, dtype=torch.float32, device="cpu")
        norms = self.squared_norm(grad).reshape(1).numpy()
        histories, steps = np.array([[gnorm_vec.data_ptr()], [before.data_ptr()]])
        scales = np.ones(1, np.float32)
        cpu_kernels.percentile_clipping(norms, histories, steps, scales, percentile, 1)
        return torch.from_numpy(scales)[0]


class ReferenceBackend:
    """CPU tensors, through :mod:`lion.reference`: slow, and right by definition."""

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
            if batch.kind is Kind.FLOAT32:
                p[...], momentum[...] = reference.update_32bit(p, g, momentum, step.values, scale, inv_scale)
            elif p.size:
                name, update = _EIGHT_BIT[batch.kind]
                absmax, qmap = as_numpy(state[name]), as_numpy(state["qmap1"])
                p[...], momentum[...], absmax[...] = update(
                    p, g, momentum, absmax, qmap, step.values, scale, inv_scale=inv_scale
                )
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


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Make every optimizer of this process use one implementation while the context lasts.

    The environment variable ``LION_BACKEND`` does the same for a whole process.

    Args:
        name: ``"cpu"`` or ``"reference"`` for CPU tensors; ``"cuda"`` for CUDA tensors and, with
            ``NUMBA_ENABLE_CUDASIM=1`` in the environment, for CPU tensors by Numba's simulator.

    Raises:
        ValueError: If there is no such implementation.
    """
    global _requested
    before, _requested = _requested, _checked_name(name)
    try:
        yield
    finally:
        _requested = before


def for_device(device: torch.device) -> Backend:
    """Return the implementation that serves tensors of a device.

    Raises:
        ValueError: If none does.
    """
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"Unsupported device: {device}; cpu and cuda tensors are supported")
    name = _requested or _checked_name(os.environ.get("LION_BACKEND") or device.type)
    if device.type == "cuda" and name != "cuda":
        raise ValueError(f"Invalid backend: {name!r} does not serve tensors on {device}; 'cuda' does")
    return _make(name, device.type == "cpu")


@lru_cache
def _make(name: str, on_cpu: bool) -> Backend:
    if name == "cuda":
        from lion.cuda_kernels import launch

        launch.require()
        from lion.cuda_backend import CudaBackend

        return CudaBackend(simulated=on_cpu)
    return CpuBackend() if name == "cpu" else ReferenceBackend()


def _checked_name(name: str) -> str:
    if name not in NAMES:
        raise ValueError(f"Invalid backend: {name!r}; {', '.join(NAMES)} are allowed")
    return name

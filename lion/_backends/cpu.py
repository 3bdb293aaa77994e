"""CPU tensors, through :mod:`lion.cpu_kernels`."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lion import cpu_kernels
from lion._backends.batch import FIRST_ELEMENT, GRAD, LOW, NUMBER, SIZE, Batch
from lion._backends.loss_scale import LossScale
from lion._backends.protocol import DTYPES, StepCoefficients
from lion._options import Kind
from lion.cpu_kernels import Master, Stochastic
from lion.reference import Coefficients


class CpuBackend:
    """CPU tensors, through :mod:`lion.cpu_kernels`."""

    def is_capturing(self, device: torch.device) -> bool:
        return False

    def update(self, batch: Batch, step: StepCoefficients, loss_scale: LossScale) -> None:
        if loss_scale.skips():
            return
        params, grads, states, absmax, new_absmax, sizes, steps, histories = batch.rows[:LOW]
        dtype, threads = DTYPES[batch.dtype], torch.get_num_threads()
        k, scales = _array(step.values), _unscaled(len(sizes))
        if batch.percentile < 100:
            scales = np.empty(len(sizes), np.float32)
            norms = self.squared_norms(batch, step, loss_scale) if batch.squared_norms is None else batch.squared_norms
            cpu_kernels.percentile_clipping(norms.numpy(), histories, steps, scales, batch.percentile, threads)
        weights = _weights_of(batch)
        common = sizes, steps, scales, k, threads, loss_scale.inv_scale(), DTYPES[batch.grad_dtype], weights
        if batch.kind is Kind.FLOAT32:
            cpu_kernels.update_32bit(dtype, params, grads, states, *common)
        elif batch.kind is Kind.BLOCKWISE:
            cpu_kernels.update_8bit_blockwise(dtype, params, grads, states, absmax, *common)
        else:
            cpu_kernels.update_8bit_tensorwise(dtype, params, grads, states, absmax, new_absmax, *common)

    def squared_norms(self, batch: Batch, step: StepCoefficients, loss_scale: LossScale) -> Tensor:
        dtype, grads, sizes = DTYPES[batch.grad_dtype], batch.table[GRAD], batch.table[SIZE]
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


@lru_cache
def _array(values: Coefficients) -> npt.NDArray[np.float32]:
    return np.array(values)


@lru_cache
def _unscaled(count: int) -> npt.NDArray[np.float32]:
    return np.ones(count, np.float32)


def _weights_of(batch: Batch) -> Master | Stochastic | None:
    master_bits, seed = batch.weights
    if master_bits is not None:
        return Master(master_bits, batch.table[LOW])
    return None if seed is None else Stochastic(seed, batch.table[NUMBER], batch.table[FIRST_ELEMENT])

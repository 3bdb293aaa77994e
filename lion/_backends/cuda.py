"""CUDA tensors, through :mod:`lion.cuda_kernels`; in Numba's simulator, CPU tensors."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lion import reference
from lion._backends.batch import GRAD, LOW, SIZE, Batch
from lion._backends.loss_scale import LossScale
from lion._backends.protocol import DTYPES, StepCoefficients
from lion._memory import paging
from lion._options import Kind
from lion.cuda_kernels import launch, simulator
from lion.cuda_kernels.clipping import CHUNK
from lion.cuda_kernels.quantization import lookup_table
from lion.cuda_kernels.table import BLOCK_SIZE, alignment, table, work_list
from lion.reference.rounding import NEAREST, STOCHASTIC

Int64Array = npt.NDArray[np.int64]

_NO_COEFFICIENTS = np.zeros(6, np.float32)


class CudaBackend:
    """CUDA tensors: nothing here waits for the device, and a step can be captured in a CUDA graph.

    Args:
        simulated: Whether it serves CPU tensors by Numba's simulator.

    Raises:
        RuntimeError: If the tensors' device and Numba's simulator do not go together.
    """

    def __init__(self, simulated: bool) -> None:
        if simulated != simulator.enabled():
            raise RuntimeError(
                f"The backend 'cuda' serves CPU tensors where {simulator.VARIABLE}=1 is in the environment, "
                "and CUDA tensors where it is not"
            )
        self._captured: set[_Memory] = set()

    def is_capturing(self, device: torch.device) -> bool:
        return _is_capturing(device)

    def update(self, batch: Batch, step: StepCoefficients, loss_scale: LossScale) -> None:
        memory = _memory_of(batch, summed=False)
        dtype, grad_dtype = DTYPES[batch.dtype], DTYPES[batch.grad_dtype]
        scaled_loss, weights = loss_scale.grad_scale is not None, _way_of_keeping(batch)
        grad_alignment = alignment(batch.table[GRAD])
        kind: dict[str, Any] = {"scaled_loss": scaled_loss, "grad_dtype": grad_dtype, "weights": weights}
        kind["grad_alignment"] = grad_alignment
        with _on(batch.device) as place:
            if _is_capturing(batch.device):
                # A replayed graph reads this memory for as long as the process may live.
                self._captured.add(memory)
            elif batch.device.type == "cuda":
                paging.prefetch(batch.paged, *place)
            if batch.squared_norms is not None:
                memory.squared_norms.copy_(batch.squared_norms)
            else:
                memory.refresh(batch, step, loss_scale)
                if batch.percentile < 100:
                    launch.partial_norms(grad_dtype, *memory.norm_arguments, *place, grad_alignment)
            if batch.percentile < 100:
                launch.percentile_clipping(*memory.clip_arguments, *place)
            if batch.kind is Kind.FLOAT32:
                launch.update_32bit(dtype, *memory.update_arguments, *place, **kind)
            elif batch.kind is Kind.BLOCKWISE:
                launch.update_8bit_blockwise(dtype, *memory.update_arguments, *place, **kind)
            else:
                launch.update_8bit_tensorwise(dtype, *memory.update_arguments, len(batch.params), *place, **kind)

    def squared_norms(self, batch: Batch, step: StepCoefficients, loss_scale: LossScale) -> Tensor:
        memory = _memory_of(batch, summed=True)
        with _on(batch.device) as place:
            memory.refresh(batch, step, loss_scale)
            return memory.launch_squared_norms(DTYPES[batch.grad_dtype], place, alignment(batch.table[GRAD]))

    def quantize_blockwise(self, values: Tensor, codes: Tensor, absmax: Tensor, qmap: Tensor, block_size: int) -> None:
        thresholds = _upload(reference.quantize_thresholds(qmap.cpu().numpy()), values.device)
        with _on(values.device) as place:
            launch.quantize_blockwise(
                DTYPES[values.dtype],
                values.data_ptr(),
                codes.data_ptr(),
                absmax.data_ptr(),
                values.numel(),
                thresholds.data_ptr(),
                block_size,
                *place,
            )

    def dequantize_blockwise(
        self, codes: Tensor, absmax: Tensor, values: Tensor, qmap: Tensor, block_size: int
    ) -> None:
        with _on(values.device) as place:
            launch.dequantize_blockwise(
                DTYPES[values.dtype],
                codes.data_ptr(),
                absmax.data_ptr(),
                values.data_ptr(),
                values.numel(),
                qmap.data_ptr(),
                block_size,
                *place,
            )

    def squared_norm(self, grad: Tensor) -> Tensor:
        memory, grads = _Memory(np.array([grad.numel()]), grad.device, True), np.array([grad.data_ptr()])
        memory.write(_NO_COEFFICIENTS, grads=grads)
        with _on(grad.device) as place:
            return memory.launch_squared_norms(DTYPES[grad.dtype], place, alignment(grads))[0]

    def percentile_clipping(self, grad: Tensor, gnorm_vec: Tensor, step: int, percentile: int) -> Tensor:
        before = torch.full((1,), step - 1, dtype=torch.float32, device=grad.device)
        memory = _Memory(np.array([grad.numel()]), grad.device, True)
        grads, histories, steps = np.array([[t.data_ptr()] for t in (grad, gnorm_vec, before)])
        memory.write(_NO_COEFFICIENTS, grads=grads, gnorm_vecs=histories, steps=steps, percentile=percentile)
        with _on(grad.device) as place:
            launch.partial_norms(DTYPES[grad.dtype], *memory.norm_arguments, *place, alignment(grads))
            launch.percentile_clipping(*memory.clip_arguments, *place)
        return memory.scales[0]


def _way_of_keeping(batch: Batch) -> int:
    """Return how a batch's parameters are kept, as the kernels are told."""
    master_bits, seed = batch.weights
    return master_bits or (NEAREST if seed is None else STOCHASTIC)


def _memory_of(batch: Batch, summed: bool) -> _Memory:
    if batch.device_memory is None:
        # What is made in torch's inference mode could not be written to outside of it.
        with torch.inference_mode(False), torch.no_grad():
            batch.device_memory = _Memory(
                batch.table[SIZE], batch.device, batch.percentile < 100, batch.kind is Kind.TENSORWISE, summed
            )
    memory: _Memory = batch.device_memory
    return memory


class _Memory:
    """The device memory that launches over a set of tensors need besides the tensors.

    The tables of the norms lie behind that of the updates, so that one copy brings all. Where norms are summed over
    shards, the clipping has a table of its own: one in which each tensor has a single partial sum, its whole norm.
    """

    def __init__(
        self,
        sizes: Int64Array,
        device: torch.device,
        clipped: bool,
        tensorwise: bool = False,
        summed: bool = False,
    ) -> None:
        self.device = device
        resident = launch.resident_blocks(device.index or 0)
        # Smaller items even the run times out, but a tensor-wise one ends with an atomic operation.
        works = [work_list(sizes, BLOCK_SIZE, resident if tensorwise else 4 * resident)]
        if clipped:
            works.append(work_list(sizes, CHUNK, resident))
        self.works = [_upload(work, device) for work in works]
        self.scales = torch.ones(len(sizes) if clipped else 0, dtype=torch.float32, device=device)
        partials = -(-sizes // CHUNK) if clipped else sizes * 0
        self.partials = torch.empty(int(partials.sum()), dtype=torch.float32, device=device)
        self.squared_norms = torch.empty(len(sizes) if summed else 0, dtype=torch.float32, device=device)
        self._layouts = [
            (work, sizes, self.partials.data_ptr() + 4 * (np.cumsum(partials) - partials)) for work in self.works
        ]
        if summed:
            ones = np.ones_like(sizes)
            self._layouts.append((self.works[-1], ones, self.squared_norms.data_ptr() + 4 * (np.cumsum(ones) - ones)))
        self._scale_addresses = self.scales.data_ptr() + 4 * np.arange(len(sizes)) if clipped else 0
        length = len(table(_NO_COEFFICIENTS, sizes, work=0, items=0))
        self.tables = torch.empty((len(self._layouts), length), dtype=torch.int64, device=device)
        self._exact = torch.empty((), dtype=torch.float64, device=device)
        self._loss_scale = torch.empty(2, dtype=torch.float32, device=device)
        self._written: tuple[Int64Array, object] | None = None
        self._lookup = _lookup(device)
        self._hosts: list[Tensor] = []
        self._spare_host: Tensor | None = None
        self.update_arguments = self.tables[0].data_ptr(), len(self.works[0])
        self.norm_arguments = self.tables[len(works) - 1].data_ptr(), len(self.works[-1])
        self.clip_arguments = self.tables[-1].data_ptr(), len(sizes)

    def refresh(self, batch: Batch, step: StepCoefficients, loss_scale: LossScale) -> None:
        """Bring a batch's addresses and coefficients to the device, unless they are there."""
        header = step.values, loss_scale.grad_scale is None, loss_scale.found_inf is None
        # A graph copies at every replay; what the device holds after one is the graph's.
        if (
            self._hosts
            or _is_capturing(self.device)
            or self._written is None
            or self._written[1] != header
            or not np.array_equal(self._written[0], batch.table)
        ):
            params, grads, states, absmax, new_absmax, _, steps, histories = batch.table[:LOW]
            lows, first_elements, numbers = batch.table[LOW:]
            self.write(
                np.array(step.values),
                params=params,
                grads=grads,
                states=states,
                absmax=absmax,
                new_absmax=new_absmax,
                steps=steps,
                gnorm_vecs=histories,
                lows=lows,
                first_elements=first_elements,
                parameters=numbers,
                seed=batch.weights.seed or 0,
                percentile=batch.percentile,
                inv_scale=0 if loss_scale.grad_scale is None else self._loss_scale.data_ptr(),
                found_inf=0 if loss_scale.found_inf is None else self._loss_scale.data_ptr() + 4,
            )
            self._written = batch.table.copy(), header
        if step.device_lr is not None:
            coefficients = self.tables[0].view(torch.float32)
            # float64 as in reference.coefficients; adding 0.0 drops the sign of -0.0.
            coefficients[0].copy_(self._exact.copy_(step.device_lr.reshape(())).add_(0.0))
            coefficients[1].copy_(self._exact.mul_(-step.weight_decay).add_(1.0))
        if loss_scale.grad_scale is not None:
            # A quotient of float32 rounded twice, by float64, is as if rounded once.
            self._loss_scale[0].copy_(self._exact.copy_(loss_scale.grad_scale).reciprocal_())
        if loss_scale.found_inf is not None:
            self._loss_scale[1].copy_(loss_scale.found_inf)

    def launch_squared_norms(self, dtype: str, place: tuple[int, int], grad_alignment: int) -> Tensor:
        """Launch the squared norms of the gradients; return where they are to be, until the clipping overwrites it."""
        launch.partial_norms(dtype, *self.norm_arguments, *place, grad_alignment)
        launch.squared_norm(self.norm_arguments[0], len(self.scales), *place)
        return self.scales

    def write(self, k: npt.NDArray[np.float32], **columns: Any) -> None:
        """Write the tables."""
        words = np.stack(
            [
                table(
                    k,
                    sizes,
                    work=work.data_ptr(),
                    items=len(work),
                    scales=self._scale_addresses,
                    partials=partials,
                    lookup=self._lookup.data_ptr(),
                    **columns,
                )
                for work, sizes, partials in self._layouts
            ]
        )
        if self.device.type == "cpu":
            self.tables.copy_(torch.from_numpy(words))
            return
        # A graph copies from this memory at every replay. It is allocated before, since torch before 2.11 asks the
        # driver what it must not be asked during a capture.
        spare = self._spare_host
        if spare is None:
            spare = torch.empty(words.shape, dtype=torch.int64, device="cpu", pin_memory=True)
        if _is_capturing(self.device):
            host, self._spare_host = spare, None
            self._hosts.append(host)
        else:
            host, self._spare_host = torch.empty_like(spare, pin_memory=True), spare
        host.numpy()[...] = words
        self.tables.copy_(host, non_blocking=True)


def _upload(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    """Return a copy on a device, in the order of its current stream; the host does not wait."""
    host = torch.from_numpy(array)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.clone()


_lookups: dict[torch.device, Tensor] = {}
_lookups_lock = threading.Lock()


def _lookup(device: torch.device) -> Tensor:
    """Return the table of the 8-bit updates, one for a device; whoever takes its address has to keep it."""
    with _lookups_lock:
        if device not in _lookups:
            # Other streams read it too, so that this copy is waited for.
            _lookups[device] = torch.from_numpy(lookup_table().view(np.int32)).to(device, copy=True)
        return _lookups[device]


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@contextmanager
def _on(device: torch.device) -> Iterator[tuple[int, int]]:
    """Make a device current and give its index and the handle of torch's current stream there."""
    if device.type == "cpu":
        yield 0, 0
        return
    with torch.cuda.device(device):
        yield torch.cuda.current_device(), torch.cuda.current_stream().cuda_stream

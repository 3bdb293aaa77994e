"""Launches the kernels: compiled when first used, kept on disk, on the caller's device and stream.

Nothing here allocates device memory or waits for the device. The functions take raw device addresses; the caller
provides, in device memory:

- a table made by :func:`lion.cuda_kernels.table.table`, 16-byte aligned (the words are int64; the first 24 bytes are
  the coefficients, which may be rewritten between launches);
- a work list made by :func:`lion.cuda_kernels.table.work_list`, with unit 256 for the updates and 4096 for the norms,
  whose address and length the table holds;
- for the 8-bit updates :func:`lion.cuda_kernels.quantization.lookup_table`, 16-byte aligned, once per device;
- for the norms one float32 per 4096 elements and tensor (``partials``), for clipping one float32 per tensor
  (``scales``), written by :func:`percentile_clipping` and read by the updates.

``device`` is the index of the device, which must be the calling thread's current one; ``stream`` is the raw handle of
a CUDA stream, 0 for the default stream. A call may be captured in a CUDA graph after a first one of its kind: with its
dtype, and with or without a scaled loss.
Under Numba's simulator the addresses are those of ordinary memory.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from lion.cuda_kernels.table import WARPS

SIMULATED_BLOCKS = 2
INSTALL = 'pip install "numba-lion[cu13]" (or "numba-lion[cu12]" for a driver of CUDA 12)'


@functools.cache
def require() -> None:
    """Raise unless CUDA kernels can be compiled and launched here.

    Raises:
        RuntimeError: Saying what is missing and what to install.
    """
    if importlib.util.find_spec("numba_cuda") is None:
        raise RuntimeError(f"CUDA tensors need numba-cuda, which is not installed: {INSTALL}")
    from numba import config, cuda

    if config.ENABLE_CUDASIM:
        return
    try:
        # The compiler imports it at the first kernel, and all that it asks of NumPy with it.
        importlib.import_module("numba.cuda.np.arrayobj")
    except (AttributeError, ImportError) as error:
        raise RuntimeError(
            f"numba-cuda {importlib.metadata.version('numba-cuda')} cannot be imported with NumPy {np.__version__} "
            f'({error}): pip install "numpy<2.5"'
        ) from error
    try:
        from numba.cuda.cudadrv.nvvm import NVVM

        NVVM()
    except Exception as error:
        raise RuntimeError(f"CUDA tensors need the compiler libraries of numba-cuda: {INSTALL}") from error
    if not cuda.is_available():
        raise RuntimeError(
            f"numba-cuda finds no usable CUDA driver: update the driver, or install the matching extra: {INSTALL}"
        )


@functools.cache
def _version() -> str:
    """Return a hash of everything the compiled kernels depend on but numba-cuda's cache does not look at."""
    folder = Path(__file__).parent
    digest = hashlib.sha256(importlib.metadata.version("numba-cuda").encode())
    for path in sorted(folder.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@functools.cache
def kernel(name: str, dtype: str | None, scaled_loss: bool = False) -> Any:
    """Return the Python function of a kernel.

    Args:
        name: Name of the kernel, such as "update_32bit".
        dtype: "float32", "float16" or "bfloat16"; None for a kernel that reads no parameters and gradients.
        scaled_loss: Whether it is the kind of update that undoes the scaling of the loss (default: False).

    Returns:
        The function, to be compiled; its name on disk and in profilers tells what it is.
    """
    from lion.cuda_kernels import clipping, lion, quantization
    from lion.cuda_kernels.device import BFLOAT16, FLOAT16, FLOAT32

    codes = {"float32": FLOAT32, "float16": FLOAT16, "bfloat16": BFLOAT16}
    make = (vars(lion) | vars(quantization) | vars(clipping))[f"make_{name}"]
    function = make() if dtype is None else make(codes[dtype], *[True] * scaled_loss)
    # numba-cuda's disk cache names its files so; it would not notice a change in another module.
    function.__qualname__ = f"{name}_{dtype or 'any'}{'_scaled' * scaled_loss}_{_version()}"
    return function


@functools.cache
def _compiled(name: str, dtype: str | None, scaled_loss: bool, device: int) -> tuple[Any, int]:
    """Return a kernel compiled for a device and the number of its blocks that the device runs at once."""
    require()
    from numba import config, cuda, types

    function = kernel(name, dtype, scaled_loss)
    dispatcher = cuda.jit(cache=True)(function)
    if config.ENABLE_CUDASIM:
        return dispatcher, SIMULATED_BLOCKS
    compiled = dispatcher.compile((types.int64,) * function.__code__.co_argcount)
    return dispatcher, compiled.max_cooperative_grid_blocks(32 * WARPS)


@functools.cache
def _stream(device: int, handle: int) -> Any:
    """Return the one stream object for a handle: numba-cuda remembers launch settings by it."""
    from numba import config, cuda

    if config.ENABLE_CUDASIM:
        return 0
    return cuda.external_stream(handle) if handle else cuda.default_stream()


def _launch(
    name: str, dtype: str | None, device: int, stream: int, blocks: int, *arguments: int, scaled_loss: bool = False
) -> None:
    dispatcher, resident = _compiled(name, dtype, scaled_loss, device)
    grid = max(1, min(blocks, resident))
    if simulated():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            dispatcher[grid, 32](*(np.int64(argument) for argument in arguments))
    else:
        _configured(dispatcher, grid, _stream(device, stream))(*arguments)


@functools.cache
def _configured(dispatcher: Any, grid: int, stream: Any) -> Any:
    with warnings.catch_warnings():
        # Numba warns of small grids, which small tensors need.
        warnings.simplefilter("ignore")
        return dispatcher[grid, 32 * WARPS, stream]


@functools.cache
def simulated() -> bool:
    """Return whether Numba's simulator takes the GPU's place."""
    from numba import config

    return bool(config.ENABLE_CUDASIM)


@functools.cache
def resident_blocks(device: int) -> int:
    """Return how many blocks of threads a device runs at once, about: what ``table.work_list`` asks for."""
    from numba import cuda

    require()
    return SIMULATED_BLOCKS if simulated() else 4 * cuda.gpus[device].MULTIPROCESSOR_COUNT


def update_32bit(dtype: str, table: int, items: int, device: int, stream: int, scaled_loss: bool = False) -> None:
    """Launch the update of a table's parameters and float32 momentum.

    Args:
        dtype: "float32", "float16" or "bfloat16": that of parameters and gradients.
        table: Address of the table.
        items: Number of items in its work list, of unit 256.
        device: Index of the device.
        stream: Handle of the stream.
        scaled_loss: Whether the table has an ``inv_scale`` (default: False).
    """
    _launch("update_32bit", dtype, device, stream, items, table, scaled_loss=scaled_loss)


def update_8bit_blockwise(
    dtype: str, table: int, items: int, device: int, stream: int, scaled_loss: bool = False
) -> None:
    """Launch the update of a table's parameters and blockwise 8-bit momentum; arguments as :func:`update_32bit`."""
    _launch("update_8bit_blockwise", dtype, device, stream, items, table, scaled_loss=scaled_loss)


def update_8bit_tensorwise(
    dtype: str, table: int, items: int, tensors: int, device: int, stream: int, scaled_loss: bool = False
) -> None:
    """Launch the update of a table's parameters and tensor-wise 8-bit momentum.

    Args:
        dtype: "float32", "float16" or "bfloat16": that of parameters and gradients.
        table: Address of the table.
        items: Number of items in its work list, of unit 256.
        tensors: Number of tensors in the table.
        device: Index of the device.
        stream: Handle of the stream.
        scaled_loss: Whether the table has an ``inv_scale`` (default: False).
    """
    few = -(-tensors // (32 * WARPS))
    _launch("begin_tensorwise", None, device, stream, few, table)
    _launch("measure_tensorwise", dtype, device, stream, items, table, scaled_loss=scaled_loss)
    _launch("update_tensorwise", dtype, device, stream, items, table, scaled_loss=scaled_loss)
    _launch("end_tensorwise", None, device, stream, few, table)


def partial_norms(dtype: str, table: int, items: int, device: int, stream: int) -> None:
    """Launch the partial sums of a table's squared gradients, written to ``partials``.

    Args:
        dtype: "float32", "float16" or "bfloat16": that of the gradients.
        table: Address of the table.
        items: Number of items in its work list, of unit 4096.
        device: Index of the device.
        stream: Handle of the stream.
    """
    _launch("partial_norms", dtype, device, stream, items, table)


def squared_norm(table: int, tensors: int, device: int, stream: int) -> None:
    """Launch the squared norms of a table's gradients from their partial sums, written to ``scales``.

    Args:
        table: Address of the table.
        tensors: Number of tensors in the table.
        device: Index of the device.
        stream: Handle of the stream.
    """
    _launch("squared_norm", None, device, stream, -(-tensors // WARPS), table)


def percentile_clipping(table: int, tensors: int, device: int, stream: int) -> None:
    """Launch the clipping by the norms that a table's partial sums give: records them and writes ``scales``.

    It precedes the update and takes the number of the step to be step + 1. Arguments as :func:`squared_norm`.
    """
    _launch("percentile_clipping", None, device, stream, -(-tensors // WARPS), table)


def quantize_blockwise(
    dtype: str,
    values: int,
    codes: int,
    absmax: int,
    size: int,
    thresholds: int,
    block_size: int,
    device: int,
    stream: int,
) -> None:
    """Launch the quantization of an array with any map.

    Args:
        dtype: "float32", "float16" or "bfloat16": that of the values.
        values: Address of the values.
        codes: Address of the codes, uint8.
        absmax: Address of the absmax, float32, one per block.
        size: Number of elements.
        thresholds: Address of ``lion.reference.quantize_thresholds`` of the map: 255 float32.
        block_size: Elements in a block.
        device: Index of the device.
        stream: Handle of the stream.
    """
    warps = -(-size // block_size)
    _launch(
        *("quantize_blockwise", dtype, device, stream, -(-warps // WARPS)),
        *(values, codes, absmax, size, thresholds, block_size),
    )


def dequantize_blockwise(
    dtype: str,
    codes: int,
    absmax: int,
    values: int,
    size: int,
    qmap: int,
    block_size: int,
    device: int,
    stream: int,
) -> None:
    """Launch the reading of codes of any map.

    Args:
        dtype: "float32", "float16" or "bfloat16": that of the values, rounded once from float32.
        codes: Address of the codes, uint8.
        absmax: Address of the absmax, float32, one per block.
        values: Address of the values to be written.
        size: Number of elements.
        qmap: Address of the map, 256 float32.
        block_size: Elements in a block, a power of two.
        device: Index of the device.
        stream: Handle of the stream.
    """
    shift = block_size.bit_length() - 1
    blocks = -(-size // (32 * WARPS))
    _launch("dequantize_blockwise", dtype, device, stream, blocks, codes, absmax, values, size, qmap, shift)

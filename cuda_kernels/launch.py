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
dtypes, with or without a scaled loss, with its parameters kept in the same way and its gradients aligned as well.
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

from lion.cuda_kernels import simulator
from lion.cuda_kernels.table import WARPS, WIDEST
from lion.cuda_kernels.tuning import DEFAULT, Tuning
from lion.reference.rounding import NEAREST

UPDATES = ("update_32bit", "update_8bit_blockwise", "update_tensorwise")
READING_GRADIENTS = (*UPDATES, "measure_tensorwise", "partial_norms")
TUNING = DEFAULT  # of the updates that are launched
INSTALL = 'pip install "numba-lion[cu13]" (or "numba-lion[cu12]" for a driver of CUDA 12)'


@functools.cache
def require() -> None:
    """Raise unless CUDA kernels can be compiled and launched here.

    Raises:
        RuntimeError: Saying what is missing and what to install.
    """
    if importlib.util.find_spec("numba_cuda") is None:
        raise RuntimeError(f"CUDA tensors need numba-cuda, which is not installed: {INSTALL}")
    if simulator.enabled():
        return
    from numba import cuda

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
    from cuda.bindings import nvjitlink

    # Where torch has loaded a linker, numba-cuda gets that one; it cannot read what a newer compiler writes.
    compiler, linker = int(importlib.metadata.version("cuda-bindings").split(".")[0]), nvjitlink.version()[0]
    if linker < compiler:
        raise RuntimeError(
            f"numba-cuda is installed for CUDA {compiler}, torch for CUDA {linker}: in a new environment, "
            f'pip install "numba-lion[cu{linker}]"'
        )
    if not cuda.is_available():
        raise RuntimeError(
            f"numba-cuda finds no usable CUDA driver: update the driver, or install the matching extra: {INSTALL}"
        )


@functools.cache
def _version() -> str:
    """Return a hash of everything the compiled kernels depend on but numba-cuda's cache does not look at."""
    folder = Path(__file__).parent
    digest = hashlib.sha256(importlib.metadata.version("numba-cuda").encode())
    for package in (folder, folder.parent / "reference"):
        for path in sorted(package.glob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@functools.cache
def kernel(
    name: str,
    dtype: str | None,
    scaled_loss: bool = False,
    grad_dtype: str | None = None,
    weights: int = NEAREST,
    grad_alignment: int = WIDEST,
    tuning: Tuning = DEFAULT,
) -> Any:
    """Return the Python function of a kernel.

    Args:
        name: Name of the kernel, such as "update_32bit".
        dtype: "float32", "float16" or "bfloat16"; None for a kernel that reads no parameters and gradients.
        scaled_loss: Whether it is the kind of update that undoes the scaling of the loss (default: False).
        grad_dtype: Of the kernels in ``UPDATES``, the dtype of the gradients (default: None, ``dtype``).
        weights: Of the same, how the parameters are kept (default: ``NEAREST``).
        grad_alignment: Of the kernels that read gradients, what their addresses are multiples of (default: 16).
        tuning: Of the kernels in ``UPDATES``, how they are made (default: as programs get them).

    Returns:
        The function, to be compiled; its name on disk and in profilers tells what it is.
    """
    from lion.cuda_kernels import clipping, lion, quantization
    from lion.cuda_kernels.device import BFLOAT16, FLOAT16, FLOAT32

    codes: dict[str | None, int] = {"float32": FLOAT32, "float16": FLOAT16, "bfloat16": BFLOAT16}
    make = (vars(lion) | vars(quantization) | vars(clipping))[f"make_{name}"]
    options: dict[str, Any] = {"scaled_loss": True} if scaled_loss else {}
    if dtype is None:
        function = make()
    else:
        if name in UPDATES:
            options |= {"grad_dtype": codes[grad_dtype or dtype], "weights": weights, "tuning": tuning}
        if name in READING_GRADIENTS:
            options["grad_alignment"] = grad_alignment
        function = make(codes[dtype], **options)
    # numba-cuda's disk cache names its files so; it would not notice a change in another module.
    kind = f"{dtype or 'any'}{f'_{grad_dtype}' if grad_dtype else ''}{f'_weights{weights}' if weights else ''}"
    kind += f"_aligned{grad_alignment}" if grad_alignment != WIDEST else ""
    if tuning != DEFAULT:
        kind += f"_{hashlib.sha256(repr(tuning).encode()).hexdigest()[:8]}"
    function.__qualname__ = f"{name}_{kind}{'_scaled' * scaled_loss}_{_version()}"
    return function


@functools.cache
def _compiled(name: str, dtype: str | None, device: int, **kind: Any) -> tuple[Any, int]:
    """Return a kernel compiled for a device and the number of its blocks that the device runs at once."""
    require()
    from numba import cuda, types

    function = kernel(name, dtype, **kind)
    if simulator.enabled():
        return cuda.jit(function), simulator.BLOCKS
    signature = (types.int64,) * function.__code__.co_argcount
    limit = kind.get("tuning", DEFAULT).most_registers(name)
    options = {} if limit is None else {"max_registers": limit}
    try:
        dispatcher = cuda.jit(cache=True, **options)(function)
        compiled = dispatcher.compile(signature)
    except (OSError, RuntimeError):  # there is no folder that can be written, or the disk is full
        dispatcher = cuda.jit(**options)(function)
        compiled = dispatcher.compile(signature)
    return dispatcher, compiled.max_cooperative_grid_blocks(32 * WARPS)


@functools.cache
def _stream(device: int, handle: int) -> Any:
    """Return the one stream object for a handle: numba-cuda remembers launch settings by it."""
    from numba import cuda

    return cuda.external_stream(handle) if handle else cuda.default_stream()


def _launch(name: str, dtype: str | None, device: int, stream: int, blocks: int, *arguments: int, **kind: Any) -> None:
    """Launch a kernel; ``kind`` are further arguments of :func:`kernel`.

    Raises:
        RuntimeError: Whatever the compiler or the driver reports; their own errors are of other classes.
    """
    try:
        dispatcher, resident = _compiled(name, dtype, device, **kind)
        grid = max(1, min(blocks, resident))
        if simulator.enabled():
            simulator.run(dispatcher, grid, 32, *map(np.int64, arguments))
        else:
            _configured(dispatcher, grid, _stream(device, stream))(*arguments)
    except (OSError, MemoryError, RuntimeError):
        raise
    except Exception as error:
        raise RuntimeError(f"The CUDA kernel {name} on device {device}: {type(error).__name__}: {error}") from error


@functools.cache
def _configured(dispatcher: Any, grid: int, stream: Any) -> Any:
    with warnings.catch_warnings():
        # Numba warns of small grids, which small tensors need.
        warnings.simplefilter("ignore")
        return dispatcher[grid, 32 * WARPS, stream]


@functools.cache
def resident_blocks(device: int) -> int:
    """Return how many blocks of threads a device runs at once, about: what ``table.work_list`` asks for."""
    require()
    if simulator.enabled():
        return simulator.BLOCKS
    from numba import cuda

    return 4 * int(cuda.gpus[device].MULTIPROCESSOR_COUNT)


def folder_on_disk() -> str:
    """Return the folder where compiled kernels are kept; none is compiled for it.

    Returns:
        Its path.

    Raises:
        OSError: If there is no folder that can be written.
        RuntimeError: The same, as numba-cuda says it.
    """
    from numba import cuda

    # It follows from the place of a function's source.
    return str(cuda.jit(cache=True)(update_32bit)._cache.cache_path)


def update_32bit(
    dtype: str,
    table: int,
    items: int,
    device: int,
    stream: int,
    scaled_loss: bool = False,
    grad_dtype: str | None = None,
    weights: int = NEAREST,
    grad_alignment: int = WIDEST,
) -> None:
    """Launch the update of a table's parameters and float32 momentum.

    Args:
        dtype: "float32", "float16" or "bfloat16": that of the parameters.
        table: Address of the table.
        items: Number of items in its work list, of unit 256.
        device: Index of the device.
        stream: Handle of the stream.
        scaled_loss: Whether the table has an ``inv_scale`` (default: False).
        grad_dtype: The dtype of the gradients (default: None, that of the parameters).
        weights: How the parameters are kept; all but ``lion.reference.rounding.NEAREST`` (default) for bfloat16 only.
            ``STOCHASTIC`` takes the table's ``seed``, ``first_elements`` and ``parameters``, ``MASTER_24`` and
            ``MASTER_32`` take its ``lows``.
        grad_alignment: What the gradients' addresses are multiples of, 16 (default), 8, 4 or 2: they alone are loaded
            in pieces of so many bytes. A gradient whose address is no multiple makes the kernel take its tensor
            element by element.

    Raises:
        ValueError: If ``weights`` is not for this dtype.
    """
    kind = _kind_of(dtype, scaled_loss, grad_dtype, weights, grad_alignment)
    _launch("update_32bit", dtype, device, stream, items, table, **kind)


def update_8bit_blockwise(
    dtype: str,
    table: int,
    items: int,
    device: int,
    stream: int,
    scaled_loss: bool = False,
    grad_dtype: str | None = None,
    weights: int = NEAREST,
    grad_alignment: int = WIDEST,
) -> None:
    """Launch the update of a table's parameters and blockwise 8-bit momentum; arguments as :func:`update_32bit`."""
    kind = _kind_of(dtype, scaled_loss, grad_dtype, weights, grad_alignment)
    _launch("update_8bit_blockwise", dtype, device, stream, items, table, **kind)


def update_8bit_tensorwise(
    dtype: str,
    table: int,
    items: int,
    tensors: int,
    device: int,
    stream: int,
    scaled_loss: bool = False,
    grad_dtype: str | None = None,
    weights: int = NEAREST,
    grad_alignment: int = WIDEST,
) -> None:
    """Launch the update of a table's parameters and tensor-wise 8-bit momentum.

    Args:
        dtype: "float32", "float16" or "bfloat16": that of the parameters.
        table: Address of the table.
        items: Number of items in its work list, of unit 256.
        tensors: Number of tensors in the table.
        device: Index of the device.
        stream: Handle of the stream.
        scaled_loss: Whether the table has an ``inv_scale`` (default: False).
        grad_dtype: The dtype of the gradients (default: None, that of the parameters).
        weights: How the parameters are kept (default: ``NEAREST``), see :func:`update_32bit`.
        grad_alignment: What the gradients' addresses are multiples of (default: 16), see :func:`update_32bit`.

    Raises:
        ValueError: If ``weights`` is not for this dtype.
    """
    kind = _kind_of(dtype, scaled_loss, grad_dtype, weights, grad_alignment)
    reading = {"scaled_loss": scaled_loss, "grad_alignment": grad_alignment}
    few = -(-tensors // (32 * WARPS))
    _launch("begin_tensorwise", None, device, stream, few, table)
    _launch("measure_tensorwise", grad_dtype or dtype, device, stream, items, table, **reading)
    _launch("update_tensorwise", dtype, device, stream, items, table, **kind)
    _launch("end_tensorwise", None, device, stream, few, table)


def _kind_of(
    dtype: str, scaled_loss: bool, grad_dtype: str | None, weights: int, grad_alignment: int
) -> dict[str, Any]:
    """Return an update's further arguments of :func:`kernel`, the same for the same kernel."""
    if weights != NEAREST and dtype != "bfloat16":
        raise ValueError(f"Invalid dtype: {dtype!r}; stochastic rounding and master values are for 'bfloat16'")
    other = None if grad_dtype == dtype else grad_dtype
    kind = {"scaled_loss": scaled_loss, "grad_dtype": other, "weights": weights, "grad_alignment": grad_alignment}
    return {**kind, "tuning": TUNING}


def partial_norms(dtype: str, table: int, items: int, device: int, stream: int, grad_alignment: int = WIDEST) -> None:
    """Launch the partial sums of a table's squared gradients, written to ``partials``.

    Args:
        dtype: "float32", "float16" or "bfloat16": that of the gradients.
        table: Address of the table.
        items: Number of items in its work list, of unit 4096.
        device: Index of the device.
        stream: Handle of the stream.
        grad_alignment: What the gradients' addresses are multiples of (default: 16), see :func:`update_32bit`.
    """
    _launch("partial_norms", dtype, device, stream, items, table, grad_alignment=grad_alignment)


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

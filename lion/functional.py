"""Functions on tensors: the dynamic map, blockwise quantization, percentile clipping.

Names and arguments are those of ``bitsandbytes.functional``; the values are those of :mod:`lion.reference`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from lion import _dynamic_map, reference
from lion._backends import DTYPES, for_device
from lion._memory.addresses import layout, unaddressable
from lion._options import flag, integer, shown

BLOCK_SIZES = tuple(2**i for i in range(6, 17))

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def _not_compiled(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Return a function that torch.compile calls as it is: Numba has compiled it already."""
    # Where nothing is compiled, calling this would only import torch's compiler, which takes long.
    disabled = _disable_dynamo(function)

    @wraps(function)
    def wrapper(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        return (disabled if torch.compiler.is_compiling() else function)(*args, **kwargs)

    return wrapper


@dataclass
class QuantState:
    """What is needed, besides the codes, to dequantize a tensor.

    Attributes:
        absmax: float32, one value per block.
        code: The quantization map, float32 of shape (256,).
        blocksize: Elements in a block.
        dtype: dtype of the tensor that was quantized.
    """

    absmax: Tensor
    code: Tensor
    blocksize: int
    dtype: torch.dtype


@_not_compiled
def create_dynamic_map(signed: bool = True, max_exponent_bits: int = 7, total_bits: int = 8) -> Tensor:
    """Return the dynamic quantization map; see :func:`lion.reference.create_dynamic_map`.

    Args:
        signed: Whether negative values are represented too (default: True).
        max_exponent_bits: Number of decades, at most ``total_bits`` of a signed map (default: 7).
        total_bits: Bits of a code (default: 8).

    Returns:
        float32 CPU tensor of shape (256,), ascending.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If the bits do not fit.
    """
    bits = integer("max_exponent_bits", max_exponent_bits), integer("total_bits", total_bits)
    return torch.from_numpy(reference.create_dynamic_map(flag("signed", signed), *bits))


@_not_compiled
def quantize_blockwise(
    A: Tensor,
    code: Tensor | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int = 4096,
) -> tuple[Tensor, QuantState]:
    """Quantize a tensor to 8 bits in blocks; see :func:`lion.reference.quantize_blockwise`.

    Args:
        A: float32, float16 or bfloat16 tensor of any shape on a CPU or CUDA device.
        code: The quantization map, float32 of shape (256,), ascending (default: the signed dynamic map).
        absmax: Where to put the absmax values: contiguous float32, one per block (default: a new tensor).
        out: Where to put the codes: contiguous uint8, the shape of ``A`` (default: a new tensor).
        blocksize: Elements in a block, a power of two from 64 to 65536 (default: 4096).

    Returns:
        The codes and the :class:`QuantState` to dequantize them with.

    Raises:
        TypeError: If a tensor has another dtype than is allowed.
        ValueError: If a shape, the map or the block size is not allowed.
    """
    _check_dtype("A", A, tuple(DTYPES))
    blocksize = integer("blocksize", blocksize)
    count = _block_count(A.numel(), blocksize)
    qmap = _checked_map(code, A.device)
    if out is None:
        out = torch.empty(A.shape, dtype=torch.uint8, device=A.device)
    if absmax is None:
        absmax = torch.empty(count, dtype=torch.float32, device=A.device)
    _check_buffer("out", out, torch.uint8, tuple(A.shape), A.device)
    _check_buffer("absmax", absmax, torch.float32, (count,), A.device)
    for_device(A.device).quantize_blockwise(_plain(A), out, absmax, qmap, blocksize)
    return out, QuantState(absmax, qmap if code is not None else _dynamic_map.copied(A.device), blocksize, A.dtype)


@_not_compiled
def dequantize_blockwise(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    code: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int = 4096,
) -> Tensor:
    """Return the values that codes stand for; see :func:`lion.reference.dequantize_blockwise`.

    Args:
        A: The codes, uint8 of any shape.
        quant_state: What :func:`quantize_blockwise` returned (default: made of the arguments below).
        absmax: float32, one value per block; needed without ``quant_state``.
        code: The quantization map (default: the signed dynamic map); not used with ``quant_state``.
        out: Where to put the values: contiguous float32, float16 or bfloat16, the shape of ``A`` (default: a new
            tensor of the quantized tensor's dtype, float32 without ``quant_state``).
        blocksize: Elements in a block (default: 4096); not used with ``quant_state``.

    Returns:
        The values, each computed in float32 and rounded once.

    Raises:
        TypeError: If a tensor has another dtype than is allowed.
        ValueError: If neither ``quant_state`` nor ``absmax`` is given, or a shape, the map or the block size is not
            allowed.
    """
    _check_dtype("A", A, (torch.uint8,))
    if quant_state is None:
        if absmax is None:
            raise ValueError("Invalid absmax: None; quant_state or absmax is needed")
        quant_state = QuantState(absmax, _checked_map(code, A.device), integer("blocksize", blocksize), torch.float32)
    if not isinstance(quant_state, QuantState):
        raise TypeError(f"Invalid quant_state: {type(quant_state).__name__}; QuantState is needed")
    if not isinstance(quant_state.dtype, torch.dtype) or quant_state.dtype not in DTYPES:
        raise TypeError(f"Invalid dtype: {shown(quant_state.dtype)}; {', '.join(map(str, DTYPES))} allowed")
    blocksize = integer("blocksize", quant_state.blocksize)
    count = _block_count(A.numel(), blocksize)
    _check_buffer("absmax", quant_state.absmax, torch.float32, (count,), A.device)
    if out is None:
        out = torch.empty(A.shape, dtype=quant_state.dtype, device=A.device)
    _check_dtype("out", out, tuple(DTYPES))
    _check_buffer("out", out, out.dtype, tuple(A.shape), A.device)
    qmap = _checked_map(quant_state.code, A.device)
    for_device(A.device).dequantize_blockwise(_plain(A), quant_state.absmax, out, qmap, blocksize)
    return out


@_not_compiled
def percentile_clipping(
    grad: Tensor, gnorm_vec: Tensor, step: int, percentile: int = 5
) -> tuple[Tensor, Tensor, Tensor]:
    """Record a gradient's norm and return the scale that clips it; see :func:`lion.reference.percentile_clipping`.

    Nothing is copied to the host.

    Args:
        grad: The gradient: float32, float16 or bfloat16, any shape.
        gnorm_vec: The history, contiguous float32 of shape (100,), changed in place; all zeros at first.
        step: Number of this step, counted from 1.
        percentile: Rank of the threshold among the 100 sorted norms, 1 to 99 (default: 5).

    Returns:
        The norm, the threshold and the scale, each a 0-dim float32 tensor on the gradient's device.

    Raises:
        TypeError: If ``grad`` has another dtype.
        ValueError: If ``gnorm_vec``, ``step`` or ``percentile`` is not allowed.
    """
    _check_dtype("grad", grad, tuple(DTYPES))
    _check_buffer("gnorm_vec", gnorm_vec, torch.float32, (reference.HISTORY,), grad.device)
    percentile, step = integer("percentile", percentile), integer("step", step)
    if not 1 <= percentile < reference.HISTORY:
        raise ValueError(f"Invalid percentile: {percentile}; expected 1 to 99")
    if step < 1:
        raise ValueError(f"Invalid step: {step}; at least 1 is needed")
    backend = for_device(grad.device)
    grad = _plain(grad)
    scale = backend.percentile_clipping(grad, gnorm_vec, step, percentile)
    norm = _sqrt(backend.squared_norm(grad))
    threshold = _sqrt(gnorm_vec.detach().sort().values[percentile])
    return norm, threshold, scale


def _block_count(numel: int, blocksize: int) -> int:
    if blocksize not in BLOCK_SIZES:
        raise ValueError(f"Invalid blocksize: {blocksize}; expected a power of two from 64 to 65536")
    return -(-numel // blocksize)


def _checked_map(code: Tensor | None, device: torch.device) -> Tensor:
    if code is None:
        return _dynamic_map.constant(device)
    _check_dtype("code", code, (torch.float32,))
    code = _plain(code)
    reference.quantize_thresholds(code.cpu().numpy())
    return code.to(device)


def _plain(tensor: Tensor) -> Tensor:
    """Return a tensor whose memory holds its values, one after the other."""
    return tensor.detach().resolve_neg().contiguous()


def _sqrt(squared: Tensor) -> Tensor:
    # torch's float32 square root is not correctly rounded everywhere; through float64 it is.
    return squared.double().sqrt().float()


def _check_dtype(name: str, tensor: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    if not isinstance(tensor, Tensor) or layout(tensor) != torch.strided or tensor.is_meta:
        found = f"{layout(tensor)} on {tensor.device}" if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"Invalid {name}: {found}; a dense tensor is needed")
    if tensor.dtype not in allowed:
        raise TypeError(f"Invalid {name}: {tensor.dtype}; {', '.join(map(str, allowed))} allowed")
    # What has the negative bit is copied, or refused as a buffer.
    if reason := unaddressable(tensor._neg_view() if tensor.is_neg() else tensor):
        raise ValueError(f"Invalid {name}: {reason}")


def _check_buffer(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> None:
    if not isinstance(tensor, Tensor) or tensor.dtype != dtype:
        found = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"Invalid {name}: {found}; a tensor of {dtype} is needed")
    # A nested tensor has no shape.
    if layout(tensor) == torch.strided and (
        tuple(tensor.shape) != shape or tensor.device != device or not tensor.is_contiguous() or tensor.is_neg()
    ):
        raise ValueError(
            f"Invalid {name}: shape {tuple(tensor.shape)} on {tensor.device}; "
            f"contiguous of shape {shape} on {device} is needed"
        )
    if reason := unaddressable(tensor):
        raise ValueError(f"Invalid {name}: {reason}")

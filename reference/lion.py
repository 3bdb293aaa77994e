"""The Lion update (Chen et al. 2023, arXiv 2302.06675, Algorithm 2), with 32-bit and with 8-bit momentum.

All arithmetic is float32 and each operation is rounded on its own to nearest even: no fused multiply-add, no
flush to zero. Functions are pure: they take arrays and return new ones.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lion.reference.clipping import UNSCALED
from lion.reference.quantization import Float32Array, Uint8Array, dequantize_blockwise, quantize_blockwise
from lion.reference.rounding import Weights, read_weights, write_weights

BLOCK_SIZE = 256


class Coefficients(NamedTuple):
    """The numbers that one step needs, each computed in float64 and rounded once to float32."""

    lr: np.float32
    decay: np.float32
    beta1: np.float32
    one_minus_beta1: np.float32
    beta2: np.float32
    one_minus_beta2: np.float32


def coefficients(lr: float, betas: tuple[float, float], weight_decay: float) -> Coefficients:
    """Return the coefficients of a step.

    Args:
        lr: Learning rate, at least 0.
        betas: Weights of the momentum in the update and in the new momentum, each in [0, 1).
        weight_decay: Decoupled weight decay, at least 0.

    Returns:
        ``lr``, ``1 - lr * weight_decay``, ``beta1``, ``1 - beta1``, ``beta2``, ``1 - beta2`` as float32.

    Raises:
        ValueError: If ``lr`` or ``1 - lr * weight_decay`` is not finite in float32.
    """
    beta1, beta2 = betas
    with np.errstate(over="ignore"):
        # -0.0 is a legal learning rate, and a legal weight; adding 0.0 drops its sign.
        rounded = Coefficients(
            np.float32(lr + 0.0),
            np.float32(1.0 - lr * weight_decay),
            np.float32(beta1 + 0.0),
            np.float32(1.0 - beta1),
            np.float32(beta2 + 0.0),
            np.float32(1.0 - beta2),
        )
    if not np.isfinite(rounded.lr):
        raise ValueError(f"Invalid learning rate: {lr}; it must be finite in float32")
    if not np.isfinite(rounded.decay):
        raise ValueError(f"Invalid weight_decay value: {weight_decay}; 1 - lr * weight_decay must be finite in float32")
    return rounded


def update_32bit(
    param: npt.NDArray[np.generic],
    grad: npt.NDArray[np.generic],
    momentum: Float32Array,
    k: Coefficients,
    scale: np.float32 = UNSCALED,
    inv_scale: np.float32 = UNSCALED,
    weights: Weights = None,
) -> tuple[npt.NDArray[Any], ...]:
    """Return parameter and momentum after one Lion step with float32 momentum.

    ::

        g        = float32(grad) * inv_scale * scale
        c        = beta1 * momentum + (1 - beta1) * g
        param    = round(float32(param) * decay - lr * sign(c))
        momentum = beta2 * momentum + (1 - beta2) * g

    with sign(±0) = 0 and sign(NaN) = NaN. ``c`` and ``momentum`` are two products, then one sum. The parameter is
    rounded once to its dtype, to nearest even unless ``weights`` says otherwise; with ``Master`` weights,
    ``float32(param)`` is the master value, and ``round`` splits it.

    Args:
        param: The parameter, float32, float16 or bfloat16, any shape.
        grad: The gradient, float32, float16 or bfloat16, the parameter's shape.
        momentum: The momentum, float32, the parameter's shape.
        k: The coefficients of the step.
        scale: Factor that clips the gradient, float32 (default: 1).
        inv_scale: Factor that undoes the scaling of the loss, float32 (default: 1).
        weights: How a bfloat16 parameter is kept: ``Stochastic`` or ``Master`` (default: None, rounded to nearest).

    Returns:
        The new parameter (the dtype of ``param``), the new momentum (float32) and, with ``Master``, the new lower part.

    Raises:
        ValueError: If ``weights`` does not fit the parameter, or a number in it is out of its range.

    Source:
        arXiv 2302.06675, Algorithm 2; the decay is decoupled as there.
    """
    with np.errstate(all="ignore"):
        g = grad.astype(np.float32) * inv_scale * scale
        c = k.beta1 * momentum + k.one_minus_beta1 * g
        new_param, *low = write_weights(
            read_weights(param, weights) * k.decay - k.lr * np.sign(c), param.dtype, weights
        )
        new_momentum = k.beta2 * momentum + k.one_minus_beta2 * g
        return new_param, new_momentum, *low


def update_8bit_blockwise(
    param: npt.NDArray[np.generic],
    grad: npt.NDArray[np.generic],
    codes: Uint8Array,
    absmax: Float32Array,
    qmap: Float32Array,
    k: Coefficients,
    scale: np.float32 = UNSCALED,
    block_size: int = BLOCK_SIZE,
    inv_scale: np.float32 = UNSCALED,
    weights: Weights = None,
) -> tuple[npt.NDArray[Any], ...]:
    """Return parameter, codes and absmax after one Lion step with blockwise 8-bit momentum.

    The momentum is dequantized, updated as in :func:`update_32bit`, and quantized again with the absmax of the
    *new* momentum. A fresh state is the code of 0 everywhere with absmax 0.

    Args:
        param: The parameter, float32, float16 or bfloat16, any shape.
        grad: The gradient, float32, float16 or bfloat16, the parameter's shape.
        codes: The momentum's codes, uint8, the parameter's shape.
        absmax: The momentum's absmax, float32, one per block.
        qmap: The quantization map, float32 of shape (256,).
        k: The coefficients of the step.
        scale: Factor that clips the gradient, float32 (default: 1).
        block_size: Elements in a block (default: 256).
        inv_scale: Factor that undoes the scaling of the loss, float32 (default: 1).
        weights: How a bfloat16 parameter is kept: ``Stochastic`` or ``Master`` (default: None, rounded to nearest).

    Returns:
        The new parameter (the dtype of ``param``), codes (uint8), absmax (float32) and, with ``Master``, the new lower
        part.

    Raises:
        ValueError: If the map, the block size or the number of absmax values is invalid, or ``weights`` as in
            :func:`update_32bit`.

    Source:
        arXiv 2302.06675, Algorithm 2, on the 8-bit states of arXiv 2110.02861.
    """
    momentum = dequantize_blockwise(codes, absmax, qmap, block_size)
    new_param, new_momentum, *low = update_32bit(param, grad, momentum, k, scale, inv_scale, weights)
    return new_param, *quantize_blockwise(new_momentum, qmap, block_size), *low


def update_8bit_tensorwise(
    param: npt.NDArray[np.generic],
    grad: npt.NDArray[np.generic],
    codes: Uint8Array,
    absmax: Float32Array,
    qmap: Float32Array,
    k: Coefficients,
    scale: np.float32 = UNSCALED,
    inv_scale: np.float32 = UNSCALED,
    weights: Weights = None,
) -> tuple[npt.NDArray[Any], ...]:
    """Return parameter, codes and absmax after one Lion step with tensor-wise 8-bit momentum.

    The same as :func:`update_8bit_blockwise` with one block as large as the tensor.

    Args:
        param: The parameter, float32, float16 or bfloat16, any shape, at least one element.
        grad: The gradient, float32, float16 or bfloat16, the parameter's shape.
        codes: The momentum's codes, uint8, the parameter's shape.
        absmax: The momentum's absmax, float32 of shape (1,).
        qmap: The quantization map, float32 of shape (256,).
        k: The coefficients of the step.
        scale: Factor that clips the gradient, float32 (default: 1).
        inv_scale: Factor that undoes the scaling of the loss, float32 (default: 1).
        weights: How a bfloat16 parameter is kept: ``Stochastic`` or ``Master`` (default: None, rounded to nearest).

    Returns:
        The new parameter (the dtype of ``param``), codes (uint8), absmax (float32 of shape (1,)) and, with ``Master``,
        the new lower part.

    Raises:
        ValueError: If the map or the shape of ``absmax`` is invalid, or ``weights`` as in :func:`update_32bit`.

    Source:
        bitsandbytes' Lion with ``block_wise=False``.
    """
    return update_8bit_blockwise(param, grad, codes, absmax, qmap, k, scale, param.size, inv_scale, weights)

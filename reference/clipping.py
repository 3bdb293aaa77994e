"""Percentile clipping: gradients whose norm stands out among the last 100 are scaled down.

The summation order of the squared norm is part of the specification: it depends on nothing but the number of
elements, so every device and every number of threads gives the same bits.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Float32Array = npt.NDArray[np.float32]

HISTORY = 100
CHUNK = 4096
CHUNK_LANES = 256
TOTAL_LANES = 32
UNSCALED = np.float32(1.0)


def squared_norm(grad: npt.NDArray[np.generic], inv_scale: np.float32 = UNSCALED) -> np.float32:
    """Return the sum of the squares of a gradient, in the specified order.

    The flat gradient, every element multiplied by ``inv_scale``, is cut into chunks of 4096 elements, the last one
    filled up with zeros::

        lane[j]  = ((g[j]² + g[j + 256]²) + ...    256 float32 lanes, 16 terms each
        partial  = lanes added in adjacent pairs, their sums likewise, to the last
        total[k] = partial[k] + partial[k + 32] + ...  32 float64 lanes of chunks
        norm²    = totals added in adjacent pairs likewise, rounded once to float32

    Args:
        grad: Array of any shape, float32, float16 or bfloat16.
        inv_scale: Factor that undoes the scaling of the loss, float32 (default: 1).

    Returns:
        The squared L2 norm, float32; infinity or NaN where the gradient or the sum is not finite.
    """
    with np.errstate(all="ignore"):
        g = _fill_up((grad.astype(np.float32) * inv_scale).reshape(-1), CHUNK)
        squares = (g * g).reshape(-1, CHUNK // CHUNK_LANES, CHUNK_LANES)
        lanes = squares[:, 0]
        for i in range(1, CHUNK // CHUNK_LANES):
            lanes = lanes + squares[:, i]
        partials = _fill_up(_add_pairs(lanes), TOTAL_LANES).astype(np.float64)
        totals = np.zeros((1, TOTAL_LANES), np.float64)
        for row in partials.reshape(-1, TOTAL_LANES):
            totals = totals + row
        return np.float32(_add_pairs(totals)[0])


def percentile_clipping(
    gnorm_vec: Float32Array, squared_gnorm: np.float32, step: int, percentile: int
) -> tuple[Float32Array, np.float32, np.float32, np.float32]:
    """Record a squared gradient norm and return the scale that clips the gradient.

    ::

        history[step mod 100] = norm²           the first one recorded fills all 100 places
        threshold = sqrt(sorted(history)[percentile])
        scale     = threshold / norm if norm > threshold else 1

    A squared norm of 0, and one that is not finite, is not recorded and gives scale 1.

    Args:
        gnorm_vec: float32 array of shape (100,): the history; all zeros when nothing was recorded yet.
        squared_gnorm: The squared norm of the gradient, float32.
        step: Number of this step, counted from 1.
        percentile: Rank of the threshold among the 100 sorted norms, 1 to 99.

    Returns:
        The new history, the norm, the threshold, and the scale, all float32.

    Raises:
        ValueError: If ``percentile`` is not in 1 to 99, ``step`` is below 1, or ``gnorm_vec`` has another shape.

    Source:
        bitsandbytes' ``functional.percentile_clipping``; there a zero norm is recorded as well.
    """
    if not 1 <= percentile < HISTORY:
        raise ValueError(f"Invalid percentile: {percentile}; 1 to 99 is allowed")
    if step < 1:
        raise ValueError(f"Invalid step: {step}; at least 1 is needed")
    if gnorm_vec.shape != (HISTORY,):
        raise ValueError(f"Invalid gnorm_vec shape: {gnorm_vec.shape}; ({HISTORY},) is needed")
    history = gnorm_vec.copy()
    recorded = np.isfinite(squared_gnorm) and squared_gnorm > 0
    if recorded:
        if history.any():
            history[step % HISTORY] = squared_gnorm
        else:
            history[:] = squared_gnorm
    norm = np.sqrt(squared_gnorm)
    threshold = np.sqrt(np.sort(history)[percentile])
    scale = threshold / norm if recorded and norm > threshold else np.float32(1.0)
    return history, norm, threshold, scale


def _fill_up(array: npt.NDArray[np.floating], multiple: int) -> npt.NDArray[np.floating]:
    return np.pad(array, (0, -array.size % multiple))


def _add_pairs(lanes: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
    while lanes.shape[1] > 1:
        lanes = lanes[:, 0::2] + lanes[:, 1::2]
    return lanes[:, 0]

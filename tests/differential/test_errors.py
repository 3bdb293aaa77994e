"""A wrong argument is refused by every implementation with an exception of the same class."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from hypothesis import given
from hypothesis import strategies as st

import lion
from lion import cpu_kernels, functional, reference
from tests.comparing import assert_same_outcome, to_numpy

Array = npt.NDArray[Any]

QMAP = reference.create_dynamic_map()
WRONG_MAPS: dict[str, Array] = {
    "right": QMAP,
    "short": QMAP[:255],
    "long": np.append(QMAP, np.float32(2)),
    "float64": QMAP.astype(np.float64),
    "bytes": np.arange(256, dtype=np.uint8),
    "descending": QMAP[::-1].copy(),
    "nan": np.append(QMAP[:255], np.float32(np.nan)),
    "infinite": np.append(QMAP[:255], np.float32(np.inf)),
    "square": QMAP.reshape(16, 16),
    "empty": QMAP[:0],
}
maps = st.sampled_from(list(WRONG_MAPS))
block_sizes = st.sampled_from([-1, 0, 1, 64, 100, 256, 4096, 8192])


@given(st.integers(0, 600), maps, block_sizes)
def test_kernels_and_reference(size: int, name: str, block_size: int) -> None:
    values, qmap = np.linspace(-1, 1, size, dtype=np.float32), WRONG_MAPS[name]
    blocks = -(-size // max(block_size, 1))
    codes, absmax, back = np.zeros(size, np.uint8), np.zeros(blocks, np.float32), np.zeros(size, np.float32)
    places = values.ctypes.data, codes.ctypes.data, absmax.ctypes.data

    def quantized() -> tuple[Array, Array]:
        cpu_kernels.quantize_blockwise("float32", *places, size, qmap, block_size, 1)
        return codes, absmax

    def dequantized() -> Array:
        cpu_kernels.dequantize_blockwise("float32", *places[1:], back.ctypes.data, size, qmap, block_size, 1)
        return back

    assert_same_outcome(quantized, lambda: reference.quantize_blockwise(values, qmap, block_size))
    assert_same_outcome(dequantized, lambda: reference.dequantize_blockwise(codes, absmax, qmap, block_size))


@given(
    st.integers(0, 600), st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int32]), maps, st.data()
)
def test_functional_api(size: int, dtype: torch.dtype, name: str, data: st.DataObject) -> None:
    """The public functions, served by two implementations."""
    values = torch.linspace(-100, 100, size).to(dtype)
    qmap, block_size = torch.from_numpy(WRONG_MAPS[name]), data.draw(block_sizes)
    history = torch.rand(data.draw(st.sampled_from([100, 99, 0])))
    step, percentile = data.draw(st.integers(-1, 200)), data.draw(st.integers(-1, 101))

    def quantized(backend: str) -> tuple[Array, ...]:
        with lion.use_backend(backend):
            codes, state = functional.quantize_blockwise(values, code=qmap, blocksize=block_size)
            back = functional.dequantize_blockwise(codes, state)
        return to_numpy(codes), to_numpy(state.absmax), to_numpy(back)

    def clipped(backend: str) -> tuple[Array, ...]:
        with lion.use_backend(backend):
            recorded = history.clone()
            results = functional.percentile_clipping(values, recorded, step, percentile)
        return (to_numpy(recorded), *(np.asarray(float(result)) for result in results))

    for call in (quantized, clipped):
        assert_same_outcome(lambda call=call: call("cpu"), lambda call=call: call("reference"))

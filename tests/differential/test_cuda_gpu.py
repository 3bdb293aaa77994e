"""The CUDA kernels on this machine's GPU equal the reference."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lion.cuda_kernels import launch
from tests import strategies
from tests.differential import conversions

pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")

from tests.differential import cuda_cases as cases  # noqa: E402

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

KINDS = ["update_32bit", "update_8bit_blockwise", "update_8bit_tensorwise"]
GUARD_BYTES = 64

many = settings(max_examples=100)


class DeviceBuffer:
    def __init__(self, values: cases.Array, offset_bytes: int) -> None:
        self.dtype, self.shape = values.dtype, values.shape
        self.begin = GUARD_BYTES + offset_bytes
        self.end = self.begin + values.nbytes
        filled = np.full(self.end + GUARD_BYTES, 0xA5, np.uint8)
        filled[self.begin : self.end] = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        self.tensor = torch.from_numpy(filled).cuda()
        self.address = self.tensor.data_ptr() + self.begin

    def read(self) -> cases.Array:
        found = self.tensor.cpu().numpy()
        assert (found[: self.begin] == 0xA5).all() and (found[self.end :] == 0xA5).all(), "bytes outside were written"
        return found[self.begin : self.end].view(self.dtype).reshape(self.shape)


class DeviceMemory:
    @property
    def resident_blocks(self) -> int:
        return launch.resident_blocks(0)

    def put(self, values: cases.Array, offset_bytes: int = 0) -> DeviceBuffer:
        return DeviceBuffer(values, offset_bytes)


MEMORY = DeviceMemory()
LARGE = [cases.Kinds(dtype, dtype) for dtype in strategies.FLOAT_DTYPES]
LARGE += [cases.Kinds("bfloat16", "float32", weights) for weights in cases.WEIGHTS]


@pytest.mark.parametrize("dtype", strategies.FLOAT_DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@many
@given(data=st.data(), hyper=strategies.hyperparameters(), scaled=st.booleans())
def test_update(kind: str, dtype: str, data: st.DataObject, hyper: object, scaled: bool) -> None:
    kinds = data.draw(cases.kinds(dtype))
    drawn = data.draw(cases.tensors(kinds, tensorwise=kind.endswith("tensorwise")))
    cases.check_update(MEMORY, kind, kinds, drawn, hyper, scaled, unscaling=data.draw(strategies.unscalings()))


@pytest.mark.parametrize(("kinds", "alignment"), cases.BUCKETS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_in_a_bucket(kind: str, kinds: cases.Kinds, alignment: int) -> None:
    cases.check_gradients_in_a_bucket(MEMORY, kind, kinds, alignment)


@pytest.mark.parametrize("kinds", LARGE, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_large_update(kind: str, kinds: cases.Kinds) -> None:
    """Enough work for every block of the grid to take several items."""
    dtype, grad_dtype, weights = kinds
    size = 5_000_003
    low = np.zeros(0 if weights.bits is None else size, weights.low_dtype)
    blocks = 1 if kind == "update_8bit_tensorwise" else -(-size // 256)
    tensor = {
        "param": (strategies.make_floats("finite_bits", dtype, size, 1), 0),
        "grad": (strategies.make_floats("gradients", grad_dtype, size, 2), 0),
        "momentum": (strategies.make_floats("gradients", "float32", size, 3), 0),
        "codes": (strategies.make_codes(size, 4), 0),
        "absmax": (np.abs(strategies.make_floats("gradients", "float32", blocks, 5)), 0),
        "new_absmax": (np.zeros(1, np.float32), 0),
        "step": (np.zeros(1, np.float32), 0),
        "scale": (np.array([0.5], np.float32), 0),
        "low": (low, 0),
        "parameter": (np.zeros(1, np.int64), 0),
        "first_element": (np.zeros(1, np.int64), 0),
    }
    cases.check_update(MEMORY, kind, kinds, [tensor], (1e-3, (0.9, 0.99), 0.1), True)


@pytest.mark.parametrize("maximum", cases.MAXIMA)
@pytest.mark.parametrize("kind", KINDS[1:])
def test_codes_at_thresholds(kind: str, maximum: np.float32) -> None:
    cases.check_codes_at_thresholds(MEMORY, kind, maximum)


@pytest.mark.parametrize("dtype", conversions.FRACTION_BITS)
def test_conversions(dtype: str) -> None:
    patterns = conversions.boundary_patterns(dtype)
    cases.check_rounding(MEMORY, dtype, patterns.view(np.float32), conversions.rounded(dtype, patterns))
    cases.check_widening(MEMORY, dtype)
    cases.check_rounding_of_parameters(MEMORY, dtype)


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", conversions.FRACTION_BITS)
def test_rounding_of_every_float32(dtype: str) -> None:
    for first in range(0, 1 << 32, 1 << 24):
        patterns = np.arange(first, first + (1 << 24), dtype=np.uint64).astype(np.uint32)
        cases.check_rounding(MEMORY, dtype, patterns.view(np.float32), conversions.rounded_range(dtype, first, 1 << 24))


def test_codes_come_back() -> None:
    cases.check_codes_come_back(MEMORY, strategies.absmax_sweep(4))


@pytest.mark.parametrize("dtype", strategies.FLOAT_DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_beyond_32_bits(kind: str, dtype: str) -> None:
    cases.check_beyond_32_bits(MEMORY, kind, dtype, strategies.NEAREST)


@pytest.mark.parametrize("weights", cases.WEIGHTS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_16_bit_weights_beyond_32_bits(kind: str, weights: strategies.Weights) -> None:
    cases.check_beyond_32_bits(MEMORY, kind, "bfloat16", weights)


@pytest.mark.parametrize("dtype", strategies.FLOAT_DTYPES)
@many
@given(data=st.data())
def test_squared_norm(dtype: str, data: st.DataObject) -> None:
    grads = data.draw(cases.gradients(dtype, 9000, largest=(0, 0, 33 * 4096 + 1, 300 * 4096, 5_000_003)))
    unscaling, alignment = data.draw(strategies.unscalings()), data.draw(cases.alignments(dtype))
    cases.check_squared_norm(MEMORY, dtype, grads, unscaling, alignment)


@pytest.mark.parametrize("dtype", strategies.FLOAT_DTYPES)
@many
@given(
    data=st.data(),
    history=cases.histories(),
    step=st.sampled_from([0, 1, 97, 98, 99, 100, 1000]),
    percentile=st.integers(1, 99),
)
def test_percentile_clipping(dtype: str, data: st.DataObject, history: cases.Array, step: int, percentile: int) -> None:
    grads = data.draw(cases.gradients(dtype, 5000))
    unscaling = data.draw(strategies.unscalings())
    cases.check_percentile_clipping(MEMORY, dtype, grads, history, step, percentile, unscaling)


@pytest.mark.parametrize("dtype", strategies.FLOAT_DTYPES)
@many
@given(data=st.data(), block_size=st.sampled_from(cases.BLOCK_SIZES), qmap=cases.maps())
def test_quantize_and_dequantize(dtype: str, data: st.DataObject, block_size: int, qmap: cases.Array) -> None:
    values = data.draw(strategies.floats(dtype, data.draw(strategies.sizes())))
    cases.check_quantize_and_dequantize(MEMORY, dtype, (values, data.draw(strategies.offsets(dtype))), block_size, qmap)

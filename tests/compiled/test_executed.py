"""The kernels' compiled PTX, executed on the CPU with memory checks, equals the reference.

The executor (ptxrun) runs what the compiler emitted: every access is checked, warps and blocks run in random order.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lion.cuda_kernels import launch
from lion.cuda_kernels.tuning import Tuning
from tests import strategies
from tests.compiled import building
from tests.differential import conversions
from tests.differential import cuda_cases as cases

ptxrun = pytest.importorskip("ptxrun", reason="the PTX executor is not importable")
pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")

from tests.compiled import executing  # noqa: E402

KINDS = ["update_32bit", "update_8bit_blockwise", "update_8bit_tensorwise"]

some = settings(max_examples=25)


class CheckedBuffer:
    def __init__(self, values: cases.Array, offset_bytes: int) -> None:
        self.array = ptxrun.device_array(values.shape, values.dtype, offset=offset_bytes)
        self.array[...] = values
        self.address = ptxrun.register(self.array)

    def read(self) -> cases.Array:
        return self.array


class CheckedMemory:
    resident_blocks = executing.BLOCKS

    def put(self, values: cases.Array, offset_bytes: int = 0) -> CheckedBuffer:
        return CheckedBuffer(values, offset_bytes)


MEMORY = CheckedMemory()


@pytest.fixture(autouse=True, scope="module")
def executor() -> Iterator[None]:
    original, launch._launch = launch._launch, executing.execute
    yield
    launch._launch = original


@pytest.fixture(autouse=True)
def empty_memory() -> Iterator[None]:
    yield
    ptxrun.unregister()


@pytest.mark.parametrize("dtype", strategies.FLOAT_DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@some
@given(data=st.data(), hyper=strategies.hyperparameters(), scaled=st.booleans(), unscaling=strategies.unscalings())
def test_update(
    kind: str, dtype: str, data: st.DataObject, hyper: object, scaled: bool, unscaling: strategies.Unscaling
) -> None:
    ptxrun.unregister()
    kinds = cases.Kinds(dtype, data.draw(strategies.grad_dtypes(dtype)))
    drawn = data.draw(cases.tensors(kinds, tensorwise=kind.endswith("tensorwise")))
    cases.check_update(MEMORY, kind, kinds, drawn, hyper, scaled, unscaling=unscaling)


@pytest.mark.parametrize("capability", [(7, 5), (9, 0)], ids=str)
@pytest.mark.parametrize("weights", cases.WEIGHTS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_update_of_16_bit_weights(
    kind: str, weights: strategies.Weights, capability: building.Capability, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executing, "CAPABILITY", capability)

    @some
    @given(data=st.data(), hyper=strategies.hyperparameters(), unscaling=strategies.unscalings())
    def check(data: st.DataObject, hyper: object, unscaling: strategies.Unscaling) -> None:
        ptxrun.unregister()
        kinds = cases.Kinds("bfloat16", data.draw(strategies.grad_dtypes("bfloat16")), weights)
        drawn = data.draw(cases.tensors(kinds, tensorwise=kind.endswith("tensorwise")))
        cases.check_update(MEMORY, kind, kinds, drawn, hyper, data.draw(st.booleans()), unscaling=unscaling)

    check()


@pytest.mark.parametrize(("kinds", "alignment"), cases.BUCKETS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_in_a_bucket(kind: str, kinds: cases.Kinds, alignment: int) -> None:
    cases.check_gradients_in_a_bucket(MEMORY, kind, kinds, alignment)


@pytest.mark.parametrize("tuning", cases.TUNINGS, ids=str)
@pytest.mark.parametrize("kinds", cases.TUNED, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_tuning(kind: str, kinds: cases.Kinds, tuning: Tuning, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "TUNING", tuning)
    cases.check_tuning(MEMORY, kind, kinds, 130 * 256 + 40)


@pytest.mark.parametrize("maximum", cases.MAXIMA)
@pytest.mark.parametrize("kind", KINDS[1:])
def test_codes_at_thresholds(kind: str, maximum: np.float32) -> None:
    cases.check_codes_at_thresholds(MEMORY, kind, maximum)


@pytest.mark.parametrize("capability", [(7, 5), (9, 0)], ids=str)
@pytest.mark.parametrize("dtype", conversions.FRACTION_BITS)
def test_conversions(dtype: str, capability: building.Capability, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute capability 8.0 brought instructions that round to bfloat16, and two values at once."""
    monkeypatch.setattr(executing, "CAPABILITY", capability)
    patterns = conversions.boundary_patterns(dtype)
    cases.check_rounding(MEMORY, dtype, patterns.view(np.float32), conversions.rounded(dtype, patterns))
    cases.check_widening(MEMORY, dtype)
    cases.check_rounding_of_parameters(MEMORY, dtype)


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
@some
@given(data=st.data())
def test_squared_norm(dtype: str, data: st.DataObject) -> None:
    ptxrun.unregister()
    # Over 32 and 256 chunks, the parts of the total take part.
    grads = data.draw(cases.gradients(dtype, 9000, largest=(0, 0, 33 * 4096 + 1, 300 * 4096)))
    unscaling, alignment = data.draw(strategies.unscalings()), data.draw(cases.alignments(dtype))
    cases.check_squared_norm(MEMORY, dtype, grads, unscaling, alignment)


@pytest.mark.parametrize("dtype", strategies.FLOAT_DTYPES)
@some
@given(
    data=st.data(),
    history=cases.histories(),
    step=st.sampled_from([0, 1, 97, 98, 99, 100, 1000]),
    percentile=st.integers(1, 99),
)
def test_percentile_clipping(dtype: str, data: st.DataObject, history: cases.Array, step: int, percentile: int) -> None:
    ptxrun.unregister()
    grads = data.draw(cases.gradients(dtype, 5000))
    unscaling = data.draw(strategies.unscalings())
    cases.check_percentile_clipping(MEMORY, dtype, grads, history, step, percentile, unscaling)


@pytest.mark.parametrize("dtype", strategies.FLOAT_DTYPES)
@some
@given(data=st.data(), block_size=st.sampled_from(cases.BLOCK_SIZES), qmap=cases.maps())
def test_quantize_and_dequantize(dtype: str, data: st.DataObject, block_size: int, qmap: cases.Array) -> None:
    ptxrun.unregister()
    values = data.draw(strategies.floats(dtype, data.draw(strategies.sizes())))
    cases.check_quantize_and_dequantize(MEMORY, dtype, (values, data.draw(strategies.offsets(dtype))), block_size, qmap)

"""The CUDA kernels in Numba's simulator equal the reference: run with NUMBA_ENABLE_CUDASIM=1 in the environment."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lion.cuda_kernels import launch, simulator
from lion.cuda_kernels.tuning import DEFAULT, Tuning
from tests import strategies
from tests.comparing import guarded

pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")

from tests.differential import cuda_cases as cases  # noqa: E402

pytestmark = pytest.mark.skipif(not simulator.enabled(), reason=simulator.NEEDED)

few = settings(max_examples=5)
KINDS = ["update_32bit", "update_8bit_blockwise", "update_8bit_tensorwise"]


class HostBuffer:
    def __init__(self, values: cases.Array, offset_bytes: int) -> None:
        self.array, self.check = guarded(values, offset_bytes=offset_bytes)
        self.address = self.array.ctypes.data

    def read(self) -> cases.Array:
        self.check()
        return self.array


class HostMemory:
    resident_blocks = 2

    def put(self, values: cases.Array, offset_bytes: int = 0) -> HostBuffer:
        return HostBuffer(values, offset_bytes)


MEMORY = HostMemory()


@pytest.mark.parametrize("kind", KINDS)
@few
@given(st.data(), strategies.dtypes(), strategies.hyperparameters(), st.booleans())
def test_update(kind: str, data: st.DataObject, dtype: str, hyper: object, scaled: bool) -> None:
    kinds = data.draw(cases.kinds(dtype))
    drawn = data.draw(cases.tensors(kinds, tensorwise=kind.endswith("tensorwise"), max_size=600, max_tensors=2))
    alignment = data.draw(cases.alignments(kinds.grad_dtype))
    unscaling = data.draw(strategies.unscalings())
    cases.check_update(MEMORY, kind, kinds, drawn, hyper, scaled, unscaling=unscaling, grad_alignment=alignment)


@pytest.mark.parametrize(("kinds", "alignment"), cases.BUCKETS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_in_a_bucket(kind: str, kinds: cases.Kinds, alignment: int) -> None:
    cases.check_gradients_in_a_bucket(MEMORY, kind, kinds, alignment)


@pytest.mark.parametrize("tuning", cases.TUNINGS, ids=str)
@pytest.mark.parametrize("kinds", cases.TUNED, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_tuning(kind: str, kinds: cases.Kinds, tuning: Tuning, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "TUNING", tuning)
    cases.check_tuning(MEMORY, kind, kinds, 3 * 256 + 40)


# Sectors of 32 bytes that the L2 cache is asked for, for a block of 256 elements: as few as their bytes fill.
@pytest.mark.parametrize(
    ("kind", "kinds", "expected"),
    [
        ("update_32bit", cases.FLOAT32, 160),
        ("update_32bit", cases.Kinds("bfloat16", "bfloat16"), 112),
        ("update_32bit", cases.Kinds("bfloat16", "bfloat16", strategies.Weights(24)), 128),
        ("update_32bit", cases.Kinds("bfloat16", "bfloat16", strategies.Weights(32)), 144),
        ("update_32bit", cases.Kinds("bfloat16", "bfloat16", strategies.Weights(seed=1)), 112),
        ("update_8bit_blockwise", cases.FLOAT32, 114),
        ("update_8bit_blockwise", cases.Kinds("bfloat16", "bfloat16"), 66),
    ],
    ids=str,
)
def test_accesses_are_of_whole_sectors(kind: str, kinds: cases.Kinds, expected: int) -> None:
    from tests.differential import sectors

    assert sectors.count(kind, kinds, DEFAULT).to_l2 == expected
    assert sectors.count(kind, kinds, Tuning(halves=False)).to_l2 >= expected


@pytest.mark.parametrize("weights", cases.WEIGHTS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@few
@given(data=st.data(), hyper=strategies.hyperparameters())
def test_update_of_16_bit_weights(kind: str, weights: strategies.Weights, data: st.DataObject, hyper: object) -> None:
    kinds = cases.Kinds("bfloat16", data.draw(strategies.grad_dtypes("bfloat16")), weights)
    drawn = data.draw(cases.tensors(kinds, tensorwise=kind.endswith("tensorwise"), max_size=600, max_tensors=2))
    cases.check_update(MEMORY, kind, kinds, drawn, hyper, True, unscaling=data.draw(strategies.unscalings()))


@pytest.mark.parametrize("dtype", strategies.FLOAT_DTYPES)
def test_squared_norm(dtype: str) -> None:
    sizes = [0, 1, 4096, 4097]
    for alignment in (16, 8, strategies.FLOAT_DTYPES[dtype].itemsize):
        grads = [(strategies.make_floats("gradients", dtype, size, size), alignment) for size in sizes]
        cases.check_squared_norm(MEMORY, dtype, grads, grad_alignment=alignment)


@few
@given(st.data(), strategies.dtypes(), cases.histories(), st.sampled_from([0, 98, 99, 100]), st.integers(1, 99))
def test_percentile_clipping(data: st.DataObject, dtype: str, history: cases.Array, step: int, percentile: int) -> None:
    grads, unscaling = data.draw(cases.gradients(dtype, 300)), data.draw(strategies.unscalings())
    cases.check_percentile_clipping(MEMORY, dtype, grads, history, step, percentile, unscaling)


@few
@given(st.data(), strategies.dtypes(), st.sampled_from(cases.BLOCK_SIZES), cases.maps())
def test_quantize_and_dequantize(data: st.DataObject, dtype: str, block_size: int, qmap: cases.Array) -> None:
    values = data.draw(strategies.floats(dtype, data.draw(strategies.sizes(600))))
    cases.check_quantize_and_dequantize(MEMORY, dtype, (values, np.dtype(values.dtype).itemsize), block_size, qmap)


@pytest.mark.parametrize(("dtype", "block_size"), [("float32", 8192), ("bfloat16", 65536)])
def test_quantize_and_dequantize_large_blocks(dtype: str, block_size: int) -> None:
    """A whole block, with its greatest element at its end, and a short one."""
    values = np.random.default_rng(0).normal(size=block_size + 300).astype(strategies.FLOAT_DTYPES[dtype])
    values[block_size - 1] = 64
    place = values, values.dtype.itemsize
    cases.check_quantize_and_dequantize(MEMORY, dtype, place, block_size, cases.QMAP)

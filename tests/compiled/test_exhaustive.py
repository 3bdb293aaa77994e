"""Every float32 through the compiled PTX, executed on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import pytest

from lion import reference
from lion.cuda_kernels import launch
from lion.cuda_kernels.quantization import lookup_table
from lion.cuda_kernels.table import table, work_list
from tests.differential import conversions, every_float

ptxrun = pytest.importorskip("ptxrun", reason="the PTX executor is not importable")
pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")

from tests.compiled import executing  # noqa: E402

QMAP = reference.create_dynamic_map()

pytestmark = pytest.mark.exhaustive


@pytest.fixture(autouse=True)
def executor(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(launch, "_launch", executing.execute)
    yield
    ptxrun.unregister()


def update_of(grad: npt.NDArray[np.float32]) -> Callable[[], tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]]:
    """Return what updates blocks and returns codes and absmax: with beta2 = 0 the new momentum is the gradient."""
    param, codes = np.zeros(grad.shape, np.float32), np.empty(grad.shape, np.uint8)
    absmax = np.empty(len(grad), np.float32)
    sizes = np.array([grad.size])
    items = work_list(sizes, 256, executing.BLOCKS)
    names = ("params", "grads", "states", "absmax")
    places = [np.array([ptxrun.register(array)]) for array in (param, grad, codes, absmax)]
    words = table(
        np.array(reference.coefficients(0.0, (0.0, 0.0), 0.0), np.float32),
        sizes,
        work=ptxrun.register(items),
        items=len(items),
        lookup=ptxrun.register(lookup_table()),
        **dict(zip(names, places, strict=True)),
    )
    address = ptxrun.register(words)

    def update() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
        codes[:], absmax[:] = 127, 0
        launch.update_8bit_blockwise("float32", address, len(items), 0, 0)
        return codes, absmax

    return update


def test_every_finite_value_gets_the_nearest_code() -> None:
    update = None
    for blocks, maximum, expected in every_float.finite_blocks():
        update = update or update_of(blocks)
        every_float.check_finite(*update(), maximum, expected)


def test_every_pattern_that_is_not_finite_makes_its_block_nan() -> None:
    for blocks in every_float.not_finite_blocks():
        every_float.check_not_finite(*update_of(blocks)())
        ptxrun.unregister()


def test_rounding_of_every_float32_to_bfloat16() -> None:
    """As compute capability 7.5 does it, in integers; later ones have an instruction for it."""
    count = 1 << 24
    codes, values, found = np.full(count, 255, np.uint8), np.empty(count, np.float32), np.empty(count, np.uint16)
    places = [ptxrun.register(array) for array in (codes, values, found)]
    entries = ptxrun.register(QMAP)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(executing, "CAPABILITY", (7, 5))
        for first in range(0, 1 << 32, count):
            values.view(np.uint32)[:] = np.arange(first, first + count, dtype=np.uint64)
            launch.dequantize_blockwise("bfloat16", *places, count, entries, 1, 0, 0)
            conversions.assert_patterns(found, conversions.rounded_range("bfloat16", first, count), "bfloat16")

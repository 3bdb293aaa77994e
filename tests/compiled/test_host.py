"""What the host side of the CUDA kernels makes: work lists, lookup table, names on disk, what it says to install."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lion import reference
from lion.cuda_kernels import launch
from lion.cuda_kernels.table import alignment, work_list

pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")


@given(
    st.lists(st.integers(0, 2**35) | st.integers(0, 10_000), min_size=1, max_size=50),
    st.sampled_from([256, 4096]),
    st.integers(1, 1000),
)
def test_work_list_covers_every_unit_once(sizes: list[int], unit: int, resident: int) -> None:
    items = work_list(np.array(sizes), unit, resident)
    assert len(items) <= 8 * resident + len(sizes)
    for tensor, size in enumerate(sizes):
        mine = items[items[:, 0] == tensor]
        assert mine[0, 1] == 0 and mine[-1, 2] == -(-size // unit)
        assert np.array_equal(mine[1:, 1], mine[:-1, 2])
        assert size == 0 or (mine[:, 2] > mine[:, 1]).all()


@given(st.lists(st.integers(0, 2**62), max_size=5), st.sampled_from([1, 2, 4, 8, 16]))
def test_alignment_is_what_divides_all_addresses(numbers: list[int], least: int) -> None:
    addresses = np.array([number // 16 * least for number in numbers], np.int64)
    found = alignment(addresses)
    assert not (addresses % found).any()
    assert found == 16 or (addresses % (2 * found)).any()


@pytest.mark.exhaustive
def test_lookup_table_gives_every_code() -> None:
    """Every float32 in [-1, 1], and the few above that a product with a rounded reciprocal can be."""
    from lion.cuda_kernels.quantization import BUCKET_SCALE, BUCKET_SHIFT, FIRST_BUCKET, lookup_table

    table = lookup_table()
    thresholds = reference.quantize_thresholds(reference.create_dynamic_map())
    for begin in range(0, 2**32, 2**24):
        patterns = np.arange(begin, begin + 2**24, dtype=np.uint64).astype(np.uint32)
        x = patterns.view(np.float32)
        x = x[np.abs(x) <= 1.000001]
        scaled = (x * BUCKET_SCALE).view(np.int32)
        scaled = scaled ^ ((scaled >> 31) & np.int32(0x7FFFFFFF))
        words = table[FIRST_BUCKET + (scaled >> BUCKET_SHIFT)] + (scaled.view(np.uint32) << np.uint32(7))
        assert np.array_equal(words >> np.uint32(24), np.searchsorted(thresholds, x, side="left"))


def test_names_on_disk_change_with_every_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(launch.__file__).parent
    for path in folder.glob("*.py"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(launch, "__file__", str(tmp_path / "launch.py"))
    seen = {launch._version.__wrapped__()}
    for path in sorted(tmp_path.glob("*.py")):
        path.write_text(path.read_text() + "\n# changed\n")
        seen.add(launch._version.__wrapped__())
    assert len(seen) == 1 + len(list(tmp_path.glob("*.py")))
    kernel = launch.kernel("update_32bit", "float32")
    assert kernel.__qualname__.startswith("update_32bit_float32_") and launch._version() in kernel.__qualname__


def test_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r'numba-cuda.*pip install "numba-lion\[cu13\]"'):
        launch.require.__wrapped__()


ROOT = Path(__file__).resolve().parents[2]
# Those of the kernels, and what stands in for launch.py where there is no driver.
KNOWING = {"cuda_kernels/device.py", "cuda_kernels/launch.py", "tests/compiled/building.py"}


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def test_numba_cuda_is_known_in_few_places() -> None:
    """So that its successor, or another simulator, takes little to change."""
    knowing, simulating = set(), set()
    for folder in ("cuda_kernels", "cpu_kernels", "reference", "lion", "tests", "benchmarks", "examples", "docs"):
        for path in (ROOT / folder).rglob("*.py"):
            names, place = imported(path), path.relative_to(ROOT).as_posix()
            if any(f"{name}.".startswith(("numba.cuda.", "numba_cuda.")) for name in names):
                knowing.add(place)
            if any("simulator" in name and "numba" in name for name in names) or "ENABLE_CUDASIM" in {
                node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)
            }:
                simulating.add(place)
    assert {place for place in knowing if not place.startswith("lion/cuda_kernels")} == KNOWING
    assert {place for place in simulating if not place.startswith("lion/cuda_kernels")} == {"cuda_kernels/simulator.py"}


def test_importing_is_cheap() -> None:
    code = "import sys, cuda_kernels, cuda_kernels.launch; print([m for m in sys.modules if m.startswith('numba')])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "[]"

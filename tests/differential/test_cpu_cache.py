"""Compiled CPU kernels on the disk: found again, never stale, never mixed up, and not needed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# A gradient of 0 and a decay of 1 leave the parameter, 2.0, as it is.
PROGRAM = """
import numpy as np
from lion import cpu_kernels
from lion.cpu_kernels import lion

param = np.full(1, 0x4000, np.uint16)
rest = np.zeros(2, np.float32)
places = [np.array([address], np.int64) for address in (param.ctypes.data, rest.ctypes.data, rest.ctypes.data + 4)]
k = np.array([1, 1, 0, 1, 0, 1], np.float32)
one = np.ones(1, np.float32)
cpu_kernels.update_32bit("{dtype}", *places, np.ones(1, np.int64), np.zeros(1, np.int64), one, k, 1)
print(hex(param[0]), sum(lion._update_32bit_kernel("{dtype}", "{dtype}", mode=0).stats.cache_hits.values()))
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    (tmp_path / "lion").mkdir()
    shutil.copy(ROOT / "lion" / "__init__.py", tmp_path / "lion")
    for package in ("cpu_kernels", "reference"):
        shutil.copytree(ROOT / package, tmp_path / "lion" / package, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def run(site: Path, dtype: str = "bfloat16", **environment: str) -> tuple[str, str]:
    inherited = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"}
    # Python's own cache of bytecode goes by time and size, which a test here keeps.
    own = {"PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(dtype=dtype)],
        env={**inherited, **own, **environment},
        cwd=site,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    param, hits = result.stdout.split()
    return param, hits


def test_the_second_process_loads_what_the_first_compiled(site: Path) -> None:
    assert run(site) == ("0x4000", "0")
    assert run(site) == ("0x4000", "1")


def test_a_change_of_another_file_is_seen(site: Path) -> None:
    run(site)
    device = site / "lion" / "cpu_kernels" / "device.py"
    source, stamp = device.read_text(), device.stat()
    assert source.count("shl(builder.zext(value, I32), I32(16))") == 1
    device.write_text(
        source.replace("shl(builder.zext(value, I32), I32(16))", "shl(builder.zext(value, I32), I32(15))")
    )
    os.utime(device, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert run(site) == ("0x2000", "0")


def test_dtypes_share_no_file(site: Path) -> None:
    """Numba numbers the entries of a shared file, and processes that do so at once mix them up."""
    for dtype in ("bfloat16", "float16"):
        run(site, dtype)
    indices = list(site.glob("lion/cpu_kernels/__pycache__/*.nbi"))
    data = list(site.glob("lion/cpu_kernels/__pycache__/*.nbc"))
    assert len(indices) == len(data) == 2


def test_without_a_folder_to_write_kernels_are_compiled_each_time(site: Path, tmp_path: Path) -> None:
    """A file stands where the cache would be: permissions would not stop root."""
    (site / "lion" / "cpu_kernels" / "__pycache__").touch()
    home = tmp_path / "home"
    home.touch()
    for _ in range(2):
        assert run(site, HOME=str(home), XDG_CACHE_HOME=str(home)) == ("0x4000", "0")
    (tmp_path / "cache").mkdir()
    assert run(site, HOME=str(home), XDG_CACHE_HOME=str(tmp_path / "cache")) == ("0x4000", "0")
    assert run(site, HOME=str(home), XDG_CACHE_HOME=str(tmp_path / "cache")) == ("0x4000", "1")

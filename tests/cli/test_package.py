"""The wheel, installed into an empty environment: the README's example runs from there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.package

ROOT = Path(__file__).parents[2]
PACKAGES = ("cpu_kernels", "cuda_kernels", "lion", "reference")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source, dist = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("LICENSE", "README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, source)
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", dist, source], check=True)
    (path,) = dist.iterdir()
    return path


def test_contents(wheel: Path) -> None:
    assert re.fullmatch(r"numba_lion-\d+\.\d+\.\d+-py3-none-any\.whl", wheel.name)
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {str(path.relative_to(ROOT)) for name in PACKAGES for path in (ROOT / name).rglob("*.py")}
    typed = {f"{name}/py.typed" for name in PACKAGES}
    assert {name for name in names if ".dist-info/" not in name} == sources | typed


def test_example_of_the_readme(wheel: Path, tmp_path: Path) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    bin = tmp_path / "venv" / "bin"
    subprocess.run([bin / "python", "-m", "pip", "install", wheel], check=True)

    # No compiler, no GPU, nothing of this checkout.
    hidden = ("PYTHONPATH", "CC", "CXX", "CUDA_HOME", "CUDA_PATH", "VIRTUAL_ENV")
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    environment |= {"PATH": str(bin), "CUDA_VISIBLE_DEVICES": ""}

    def run(*arguments: str) -> str:
        command = [bin / "python", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True)
        return done.stdout

    place = "\nimport lion, cpu_kernels; print(lion.__file__, cpu_kernels.__file__)"
    assert run("-c", example + place).count("site-packages") == 2
    assert "numba-lion" in run("-m", "lion")
    assert "Lion8bit" in run("-m", "lion", "demo", "--steps", "2", "--out", "demo")

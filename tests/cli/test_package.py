"""The wheel, installed into an empty environment: one name, and programs run from there whatever lies beside them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.package

ROOT = Path(__file__).parents[2]
# Folders at the top of the repository, imported as lion.reference and so on.
LINKED = ("cpu_kernels", "cuda_kernels", "reference")
TRAINING = """
import torch
from lion import Lion8bit
p = torch.nn.Parameter(torch.ones(5000))
optimizer = Lion8bit([p], lr=0.5)
p.grad = torch.ones(5000)
optimizer.step()
assert (p == 0.5).all(), p
"""


def checkout(folder: Path, links: bool = True) -> Path:
    """Return a copy of what a checkout holds for a build, with the links in lion/ or without."""
    ignored = shutil.ignore_patterns("__pycache__", *(() if links else LINKED))
    for name in ("lion", *LINKED):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignored)
    for name in ("LICENSE", "README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    return folder


def built(source: Path, dist: Path) -> Path:
    """Return the wheel of a source tree or archive."""
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", dist, source], check=True)
    (path,) = dist.glob("*.whl")
    return path


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith("RECORD")}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(checkout(tmp_path_factory.mktemp("source")), tmp_path_factory.mktemp("dist"))


def test_contents(wheel: Path) -> None:
    assert re.fullmatch(r"numba_lion-\d+\.\d+\.\d+-py3-none-any\.whl", wheel.name)
    names = {name for name in contents(wheel) if ".dist-info/" not in name}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "lion").rglob("*.py")}
    linked = {f"lion/{path.relative_to(ROOT).as_posix()}" for name in LINKED for path in (ROOT / name).rglob("*.py")}
    typed = {"lion/py.typed", *(f"lion/{name}/py.typed" for name in LINKED)}
    assert names == sources | linked | typed
    (top_level,) = (text for name, text in contents(wheel).items() if name.endswith("top_level.txt"))
    assert top_level.decode().split() == ["lion"]


def test_a_wheel_of_the_source_distribution_is_the_same(wheel: Path, tmp_path: Path) -> None:
    source = checkout(tmp_path / "source")
    build = "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--target", tmp_path / "tools", "setuptools"], check=True
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "tools")}
    subprocess.run([sys.executable, "-c", build, tmp_path], cwd=source, env=environment, check=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        assert not [member.name for member in tar.getmembers() if member.issym() or member.islnk()]
    assert contents(built(archive, tmp_path / "dist")) == contents(wheel)


def test_a_checkout_without_links_builds_the_same(wheel: Path, tmp_path: Path) -> None:
    """As git makes it on Windows, where links need a permission."""
    assert contents(built(checkout(tmp_path / "source", links=False), tmp_path / "dist")) == contents(wheel)


def test_situations(wheel: Path, tmp_path: Path) -> None:
    """The programs of tests/situations find the wheel, and nothing else of the checkout than the tests."""
    installed, outside = tmp_path / "installed", tmp_path / "outside"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", installed, wheel], check=True
    )
    shutil.copytree(ROOT / "tests", outside / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", outside)

    def python(*arguments: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(installed)}
        command = [sys.executable, *arguments]
        done = subprocess.run(command, cwd=outside, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        return done.stdout

    assert Path(python("-c", "import lion; print(lion.__file__)").strip()).is_relative_to(installed)
    assert " passed" in python("-m", "pytest", "-q", "-n", "2", "tests/situations")


@pytest.fixture(scope="module")
def run(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Return what runs Python in an environment in which only the wheel and what it needs are installed."""
    venv = tmp_path_factory.mktemp("environment") / "venv"
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    subprocess.run([venv / "bin" / "python", "-m", "pip", "install", "-q", wheel], check=True)
    # No compiler, no GPU, nothing of this checkout.
    hidden = ("PYTHONPATH", "CC", "CXX", "CUDA_HOME", "CUDA_PATH", "VIRTUAL_ENV")
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    environment |= {"PATH": str(venv / "bin"), "CUDA_VISIBLE_DEVICES": ""}

    def run(folder: Path, *arguments: str) -> str:
        command = [venv / "bin" / "python", *arguments]
        done = subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, text=True)
        return done.stdout

    return run


def test_example_of_the_readme(run: Callable[..., str], tmp_path: Path) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    place = "\nfrom lion import cpu_kernels; import lion; print(lion.__file__, cpu_kernels.__file__)"
    assert run(tmp_path, "-c", example + place).count("site-packages") == 2
    assert "numba-lion" in run(tmp_path, "-m", "lion")
    assert "Lion8bit" in run(tmp_path, "-m", "lion", "demo", "--steps", "2", "--out", "demo")


@pytest.mark.parametrize(
    "name",
    ["reference.py", "reference/", "cpu_kernels.py", "cuda_kernels/", "tests.py", "backends/", "cli/", "state.py"],
)
def test_a_program_may_have_modules_of_these_names(run: Callable[..., str], tmp_path: Path, name: str) -> None:
    own = tmp_path / name.rstrip("/")
    if name.endswith("/"):
        own.mkdir()
        own /= "__init__.py"
    own.write_text("MINE = 1\n")
    module = name.rstrip("/").removesuffix(".py")
    (tmp_path / "train.py").write_text(f"import {module}\n{TRAINING}\nassert {module}.MINE == 1\n")
    run(tmp_path, "train.py")


def test_the_specification_runs_without_torch(run: Callable[..., str], tmp_path: Path) -> None:
    program = "import sys; from lion import cpu_kernels, reference; print('torch' in sys.modules)"
    assert run(tmp_path, "-c", program) == "False\n"

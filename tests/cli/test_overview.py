"""``python -m lion`` without a command, and what its commands have in common."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lion.__main__ import COMMANDS, main
from lion._backends import selection
from lion.cuda_kernels import launch, simulator

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise RuntimeError("CUDA tensors need numba-cuda, which is not installed")

    monkeypatch.setattr(launch, "require", missing)
    monkeypatch.delenv("LION_BACKEND", raising=False)
    selection._make.cache_clear()


def found(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["--json"]) == 0
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    return report


def test_text(capsys: pytest.CaptureFixture[str], no_cuda: None) -> None:
    assert main([]) == 0
    out = capsys.readouterr().out
    for word in (
        *COMMANDS,
        "numba-lion",
        "torch",
        "threads",
        "served by lion.cpu_kernels",
        "CUDA tensors need numba-cuda",
    ):
        assert word in out


def test_backends(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, no_cuda: None) -> None:
    report = found(capsys)
    assert report["backends"] == {
        "cpu": {"name": "lion.cpu_kernels", "problem": None},
        "cuda": {"name": None, "problem": "CUDA tensors need numba-cuda, which is not installed"},
    }
    monkeypatch.setenv("LION_BACKEND", "reference")
    report = found(capsys)
    assert report["environment"]["LION_BACKEND"] == "reference"
    assert report["backends"]["cpu"] == {"name": "lion.reference", "problem": None}
    monkeypatch.setenv("LION_BACKEND", "gpu")
    assert found(capsys)["backends"]["cpu"]["problem"].startswith("Invalid backend: 'gpu'")


def test_numpy_too_new_for_numba_cuda() -> None:
    pytest.importorskip("numba_cuda")
    # NumPy 2.5 has no row_stack any more.
    program = "import numpy, runpy; vars(numpy).pop('row_stack', None); runpy.run_module('lion', run_name='__main__')"
    environment = {key: value for key, value in os.environ.items() if key != simulator.VARIABLE}
    command = [sys.executable, "-c", program, "--json"]
    result = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    cuda = json.loads(result.stdout)["backends"]["cuda"]
    assert cuda["name"] is None
    assert re.fullmatch(
        r"numba-cuda [\d.]+ cannot be imported with NumPy [\d.]+ "
        r"\(module 'numpy' has no attribute 'row_stack'\): pip install \"numpy<2\.5\"",
        cuda["problem"],
    )


def test_caches(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("numba.core.config.CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("LION_PAGE_DIR", str(tmp_path))
    report = found(capsys)
    folder = Path(report["compiled_cpu_kernels"]["folder"])
    assert folder.parent == tmp_path and report["compiled_cpu_kernels"]["files"] == 0
    assert simulator.enabled() or Path(report["compiled_cuda_kernels"]["folder"]).parent == tmp_path
    assert report["paged_state"]["folder"] == str(tmp_path) and report["paged_state"]["free_bytes"] > 0
    (folder / "kernel.nbi").write_bytes(bytes(3))
    (folder / "kernel.1.nbc").write_bytes(bytes(5))
    monkeypatch.setenv("LION_PAGE_DIR", str(tmp_path / "missing"))
    report = found(capsys)
    assert (report["compiled_cpu_kernels"]["files"], report["compiled_cpu_kernels"]["bytes"]) == (2, 8)
    assert report["paged_state"]["problem"] == f"{tmp_path / 'missing'}: No such file or directory"
    assert main([]) == 0


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help(capsys: pytest.CaptureFixture[str], command: list[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main([*command, "--help"])
    assert exit.value.code == 0
    out = capsys.readouterr().out
    assert " ".join(["examples:\n  python -m lion", *command]) in out and "--json" in out and "exit codes:" in out


@pytest.mark.parametrize("arguments", [["--json", "check"], ["check", "--json"]])
def test_json_before_and_after_the_command(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    monkeypatch.setattr(COMMANDS["check"], "run", lambda options: 7 if options.json else 0)
    assert main(arguments) == 7


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["trian"])
    assert exit.value.code == 2
    captured = capsys.readouterr()
    assert "invalid choice: 'trian'" in captured.err and captured.err.count("\n") == 1


def test_interrupted(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(options: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(COMMANDS["bench"], "run", interrupt)
    assert main(["bench"]) == 130
    assert capsys.readouterr().err == "python -m lion: interrupted\n"


@pytest.mark.parametrize("command", ["demo", "bench"])
def test_unusable_backend(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.setenv("LION_BACKEND", "gpu")
    assert main([command, "--device", "cpu"]) == 2
    assert capsys.readouterr().err == (
        f"python -m lion {command}: error: Invalid backend: 'gpu'; reference, cpu, cuda are allowed\n"
    )

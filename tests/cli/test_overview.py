"""``python -m lion`` without a command, and what its commands have in common."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import lion
from lion.__main__ import COMMANDS, main
from lion._backends import selection
from lion._cli import overview, spelled
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
    out = " ".join(capsys.readouterr().out.split())
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
    if simulator.enabled() or importlib.util.find_spec("numba_cuda") is None:
        assert report["compiled_cuda_kernels"] is None
    else:
        assert Path(report["compiled_cuda_kernels"]["folder"]).parent == tmp_path
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


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["--version"])
    assert exit.value.code == 0
    version = capsys.readouterr().out
    assert version == f"numba-lion {lion.__version__}\n" and re.fullmatch(r"numba-lion \d+\.\d+\.\d+\n", version)


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_an_unknown_option_points_to_the_help_of_its_command(
    capsys: pytest.CaptureFixture[str], command: str | None
) -> None:
    arguments = [] if command is None else [command]
    with pytest.raises(SystemExit) as exit:
        main([*arguments, "--stepz=3"])
    assert exit.value.code == 2
    name = " ".join(["python -m lion", *arguments])
    assert capsys.readouterr().err == f"{name}: error: unrecognized arguments: --stepz=3; see {name} --help\n"


@pytest.mark.parametrize(
    ("device", "message"),
    [
        *(
            (name, "expected cpu, cuda or the number of a GPU, such as cuda:0")
            for name in ("mps", "gpu", "cuda:x", "cpu:1")
        ),
        ("cuda", "torch finds no GPU"),
        ("cuda:0", "torch finds no GPU"),
    ],
)
@pytest.mark.parametrize("command", ["demo", "bench"])
def test_a_device_that_is_not_there_is_one_short_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str, device: str, message: str
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert main([command, f"--device={device}"]) == 2
    assert capsys.readouterr().err == f"python -m lion {command}: error: Invalid --device: {device}; {message}\n"


def test_a_gpu_of_a_number_that_is_too_high(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert main(["bench", "--device", "cuda:2"]) == 2
    assert capsys.readouterr().err.endswith("Invalid --device: cuda:2; the last GPU is cuda:1\n")


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {**{key: os.environ[key] for key in os.environ if key != "COLUMNS"}, **environment}
    return subprocess.run(
        [sys.executable, "-m", "lion", *command], cwd=ROOT, env=environment, capture_output=True, text=True
    )


def test_terminals_without_signs(tmp_path: Path) -> None:
    """Where the encoding is ASCII, words stand for signs, and a folder's name is shown with escapes."""
    folder = tmp_path / "\N{LATIN SMALL LETTER E WITH ACUTE}"
    folder.mkdir()
    done = run(PYTHONIOENCODING="ascii", LION_PAGE_DIR=str(folder))
    assert done.returncode == 0, done.stderr
    assert re.match("CPU ready - (GPU|[0-9]+ GPUs)", done.stdout) and r"\xe9" in done.stdout
    done = run("bench", "--help", PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and '"x ours"' in done.stdout and done.stdout.isascii()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_signs_that_an_encoding_lacks(monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding))
    signs = "3 \N{CHECK MARK}, \N{BALLOT X}, 2 \N{MULTIPLICATION SIGN}"
    assert spelled(signs) == (signs if encoding == "utf-8" else "3 ok, differs, 2 x")
    times = "2 \N{MULTIPLICATION SIGN}"
    assert spelled(times) == ("2 x" if encoding == "ascii" else times)


@pytest.mark.parametrize("arguments", [["--help"], ["check", "--help"]], ids=" ".join)
def test_a_python_that_takes_docstrings_away(arguments: list[str]) -> None:
    command = [sys.executable, "-OO", "-m", "lion", *arguments]
    shown = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert "check" in shown and "exit codes" in shown


@pytest.mark.skipif(sys.platform == "win32", reason="has no signal for a reader that has gone")
def test_a_reader_that_has_enough_ends_the_command_without_a_word() -> None:
    for command in ([], ["--json"]):
        program = [sys.executable, "-m", "lion", *command]
        with subprocess.Popen(program, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            process.stdout.close()
            assert process.stderr.read() == ""
        assert process.returncode == -signal.SIGPIPE


@pytest.mark.parametrize("gpus", [0, 1, 8])
def test_what_a_terminal_of_24_rows_and_80_columns_shows(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, gpus: int
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    report = found(capsys)
    report["devices"] = {"cpu": report["devices"]["cpu"], **({} if gpus else {"cuda": "torch finds no GPU"})}
    report["devices"] |= {f"cuda:{i}": "H100, compute capability 9.0, 80 GiB" for i in range(gpus)}
    served = {"name": "lion.cuda_kernels", "problem": None} if gpus else {"name": None, "problem": None}
    report["backends"]["cuda"] = served
    report["environment"] = {}
    for kind in ("cpu", "cuda"):
        report[f"compiled_{kind}_kernels"] = {"folder": "/home/me/kernels", "files": 1, "bytes": 1, "problem": None}
    monkeypatch.setattr(overview, "found", lambda: report)
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    ready = {0: "GPU: none found", 1: "GPU ready", 8: "8 GPUs ready"}[gpus]
    assert lines[0].rstrip() == f"CPU ready \N{MIDDLE DOT} {ready}"
    assert lines[-1] == "python -m lion COMMAND --help shows the options of a command."
    assert max(map(len, lines)) <= 80
    assert len(lines) < 24 + max(0, gpus - 2)
    assert "driver" not in "".join(lines)


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
        f"python -m lion {command}: error: Invalid backend: 'gpu'; expected one of reference, cpu, cuda\n"
    )

"""``python -m lion check``."""

from __future__ import annotations

import importlib.metadata
import io
import json
import re
import sys
from contextlib import AbstractContextManager

import numpy as np
import pytest
import torch

from lion import functional
from lion.__main__ import main
from lion._backends import selection
from lion._cli import check
from lion.cuda_kernels import launch, simulator

SMALL = check.Extent((1, 257), 513, 2, (257,), 3, (64,))


def test_cpu_passes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "FULL", SMALL)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert main(["check", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["passed"] and report["difference"] is None
    assert report["values"] == sum(r["values"] for r in report["results"])
    assert report["not_checked"].startswith("CUDA: torch finds no GPU")
    cells = {(r["feature"], r["dtype"]): r["values"] for r in report["results"]}
    # 16-bit weights train as bfloat16 alone.
    kept = [feature for feature in check.CHECKS if feature.endswith(tuple(check.WAYS_OF_KEEPING))]
    assert len(kept) == 9
    assert len(cells) == 3 * len(check.CHECKS) - 2 * len(kept) and min(cells.values()) > 0


def test_first_difference_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    quantize = functional.quantize_blockwise

    def one_wrong(*args: object, **kwargs: object) -> object:
        codes, state = quantize(*args, **kwargs)
        if codes.numel() == 321:
            codes[300] ^= 1
        return codes, state

    monkeypatch.setattr(functional, "quantize_blockwise", one_wrong)
    monkeypatch.setattr(check, "FULL", SMALL)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert main(["check"]) == 1
    captured = capsys.readouterr()
    assert "✗" in captured.out and "OK" not in captured.out
    assert captured.err.startswith("DIFFERENCE: cpu, functional.quantize_blockwise, float32: ")
    assert (
        "cpu, functional.quantize_blockwise, float32: 321 elements in blocks of 64, signed map, codes: " in captured.err
    )
    assert "element 300 (block 4) is 0x" in captured.err and ", expected 0x" in captured.err
    assert "1 of 321 differ" in captured.err


@pytest.fixture
def two_features(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "FULL", SMALL)
    monkeypatch.setattr(check, "SIMULATED", SMALL)
    monkeypatch.delenv("COLUMNS", raising=False)
    names = ("32-bit", "functional.quantize_blockwise")
    monkeypatch.setattr(check, "CHECKS", {name: check.CHECKS[name] for name in names})


@pytest.mark.parametrize("cuda", [None, "13.0"])
def test_the_last_line_is_the_verdict(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, two_features: None, cuda: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert main(["check"]) == 0
    reason = "torch finds no GPU" + (", it is built for CPUs alone" if cuda is None else "")
    last = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(
        rf"OK: \d+ K values, 0 differences; CUDA not checked: {reason} \(try --simulator\)", last.strip()
    )


def test_the_verdict_with_a_gpu(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, two_features: None
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    gpu = check.Target("gpu", torch.device("cpu"), SMALL, lambda: selection.use_backend("cpu"))
    monkeypatch.setattr(check, "_targets", lambda simulator: [gpu])
    assert main(["check"]) == 0
    assert re.fullmatch(r"OK: \d+ K values, 0 differences", capsys.readouterr().out.splitlines()[-1].strip())


def test_the_verdict_of_the_simulator(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, two_features: None
) -> None:
    monkeypatch.setenv("NUMBA_ENABLE_CUDASIM", "1")
    target = check.Target("simulator", torch.device("cpu"), SMALL, lambda: selection.use_backend("cpu"))
    monkeypatch.setattr(check, "_targets", lambda simulator: [target])
    assert main(["check", "--simulator"]) == 0
    last = capsys.readouterr().out.splitlines()[-1].strip()
    assert re.fullmatch(r"OK: \d+ K values, 0 differences; CPU and GPUs not checked", last)


def test_a_terminal_without_signs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, two_features: None
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, "ascii"))
    assert main(["check"]) == 0
    sys.stdout.flush()
    text = out.getvalue().decode("ascii")
    assert re.search(r"32-bit +\S+ K ok +\S+ K ok +\S+ K ok\n", text) and "OK: " in text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (999, "999"), (1000, "1.0 K"), (12_345, "12 K"), (3_449_999, "3.4 M"), (10**9, "1000 M")],
)
def test_numbers_of_values_are_short(count: int, text: str) -> None:
    assert check._rounded(count) == text


@pytest.mark.parametrize("wrong", [0.5, float("nan"), -0.0])
def test_compare_sees_bits(wrong: float) -> None:
    expected = np.array([0.0, np.nan, 1.0], np.float32)
    actual = torch.tensor([0.0, -float("nan"), 1.0])
    assert check._compare("x", actual, expected) == 3
    actual[0] = wrong
    with pytest.raises(check.Difference, match="x: element 0 .* expected 0x00000000"):
        check._compare("x", actual, expected)


@pytest.fixture
def gpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def use_cuda() -> AbstractContextManager[None]:
        selection._make.cache_clear()
        return selection.use_backend("cuda")

    gpu = check.Target("gpu", torch.device("cpu"), SMALL, use_cuda)
    monkeypatch.setattr(check, "_targets", lambda simulator: [gpu])


def test_gpu_without_numba_cuda(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, gpu_only: None
) -> None:
    def missing() -> None:
        raise RuntimeError("CUDA tensors need numba-cuda, which is not installed")

    monkeypatch.setattr(launch, "require", missing)
    assert main(["check"]) == 1
    error = capsys.readouterr().err
    assert error == "FAILED: gpu, 32-bit, float32: CUDA tensors need numba-cuda, which is not installed\n"


@pytest.mark.skipif(simulator.enabled(), reason="the simulator needs nothing of what is missing")
@pytest.mark.parametrize("error", [AttributeError("module 'numpy' has no attribute 'row_stack'"), ImportError("no")])
def test_gpu_with_a_numpy_too_new_for_numba_cuda(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, gpu_only: None, error: Exception
) -> None:
    pytest.importorskip("numba_cuda")

    import_module = importlib.import_module

    def fail(name: str, *package: str) -> object:
        if name.startswith("numba.cuda"):
            raise error
        return import_module(name, *package)

    launch.require.cache_clear()
    monkeypatch.setattr(importlib, "import_module", fail)
    monkeypatch.setattr(np, "__version__", "2.5.5")
    assert main(["check"]) == 1
    assert f'cannot be imported with NumPy 2.5.5 ({error}): pip install "numpy<2.5"' in capsys.readouterr().err


@pytest.mark.skipif(simulator.enabled(), reason="the simulator needs nothing of what is missing")
def test_gpu_with_a_torch_of_another_cuda(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, gpu_only: None
) -> None:
    pytest.importorskip("numba_cuda")
    nvjitlink = pytest.importorskip("cuda.bindings.nvjitlink")
    version = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: {"cuda-bindings": "13.4.4"}.get(name) or version(name)
    )
    monkeypatch.setattr(nvjitlink, "version", lambda: (12, 4))
    launch.require.cache_clear()
    assert main(["check"]) == 1
    assert (
        "numba-cuda is installed for CUDA 13, torch for CUDA 12: in a new environment, "
        'pip install "numba-lion[cu12]"' in capsys.readouterr().err
    )


def test_simulator_starts_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    class Finished:
        returncode = 1

    def start(command: list[str], env: dict[str, str]) -> Finished:
        started.append((command[1:], env[simulator.VARIABLE]))
        return Finished()

    monkeypatch.delenv(simulator.VARIABLE, raising=False)
    monkeypatch.setattr(check.subprocess, "run", start)
    assert main(["check", "--simulator", "--json"]) == 1
    assert started == [(["-m", "lion", "check", "--simulator", "--json"], "1")]

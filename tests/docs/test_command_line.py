"""The page on the command line names every option, and every key of the JSON."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from lion.__main__ import COMMANDS, main
from lion._cli import bench, check, demo
from lion._cli.measure import WORKLOADS

TEXT = (Path(__file__).parents[2] / "docs" / "command-line.md").read_text(encoding="utf-8")


def section(command: str) -> str:
    """Return what the page says of a command."""
    return TEXT.partition(f"\n## python -m lion {command}".rstrip() + "\n")[2].partition("\n## ")[0]


@pytest.mark.parametrize("command", COMMANDS)
def test_options(capsys: pytest.CaptureFixture[str], command: str) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    options = set(re.findall(r"^  (?:-h, )?(--[a-z-]+)", capsys.readouterr().out, re.MULTILINE)) - {"--help"}
    assert {"--json"} < options
    assert set(re.findall(r"^\| `(--[a-z-]+)", section(command), re.MULTILINE)) == options


def keys(value: Any) -> set[str]:
    """Return the keys in JSON, on all levels."""
    if isinstance(value, dict):
        return set(value).union(*map(keys, value.values()))
    return set().union(*map(keys, value)) if isinstance(value, list) else set()


def test_keys_of_the_overview(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    names = set(report) | keys([report["compiled_cpu_kernels"], report["paged_state"], report["backends"]["cpu"]])
    assert not {name for name in names if f"`{name}`" not in section("")}


def test_keys_of_the_check(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "CHECKS", {"32-bit": lambda target, dtype: iter([1])})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert main(["check", "--json"]) == 0
    assert not {name for name in keys(json.loads(capsys.readouterr().out)) if f"`{name}`" not in section("check")}


def test_keys_of_the_benchmark(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    times = bench.Summary(1.0, 1.0, 1.0)
    monkeypatch.setattr(bench, "measured", lambda *arguments: [bench.Row("Lion", times, times, 1, None, 4, 0, False)])
    assert main(["bench", "--device", "cpu", "--json"]) == 0
    assert not {name for name in keys(json.loads(capsys.readouterr().out)) if f"`{name}`" not in section("bench")}


def test_keys_of_the_demo() -> None:
    names = {*demo.Result._fields, "held_out_loss", "device", "parameters", "steps", "seed", "results"}
    assert not {name for name in names if f"`{name}`" not in section("demo")}
    assert all(f"`{name}`" in section("demo") for name in demo.OPTIMIZERS)


def test_workloads() -> None:
    assert all(f"`{name}` (" in section("bench") for name in WORKLOADS)

"""``python -m lion demo`` with tiny settings, and what it says to a mistake."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from lion.__main__ import main

TINY = ["--steps", "3", "--device", "cpu"]


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text"
    path.write_bytes(b"the cat sat on the mat. " * 100)
    return str(path)


def demo(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["demo", "--json", *TINY, *arguments]) == 0
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    return report


def test_results(capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str) -> None:
    report = demo(capsys, "--data", text, "--out", str(tmp_path / "out"))
    results = {result["optimizer"]: result for result in report["results"]}
    assert list(results) == ["AdamW", "Lion", "Lion8bit", "PagedLion8bit", "Lion8bit-bf16"]
    state = {name: result["state_bytes"] / result["parameters"] for name, result in results.items()}
    assert state["AdamW"] == pytest.approx(8, abs=0.01)
    assert state["Lion"] == pytest.approx(4, abs=0.01)
    for name, low in (("Lion8bit", 0), ("PagedLion8bit", 0), ("Lion8bit-bf16", 1)):
        assert 1 < state[name] - low < 1.1
        assert results[name]["held_out_loss"] == pytest.approx(results["Lion"]["held_out_loss"], rel=0.02)
    assert results["Lion8bit"]["curve"] == results["PagedLion8bit"]["curve"]
    for name, result in results.items():
        assert result["weight_bytes"] == (2 if name == "Lion8bit-bf16" else 4) * result["parameters"]
    starts = {result["curve"][0][1] for result in results.values()}
    assert len(starts) == 1
    for result in results.values():
        assert result["held_out_loss"] < result["curve"][0][1]
        assert result["milliseconds_per_step"] > 0
        assert 0 < result["share_of_training"] < 1
        if result["peak_bytes"] is not None:  # on Linux
            # The step holds weights, state and all gradients at once.
            assert result["peak_bytes"] > 2 * result["weight_bytes"] + result["state_bytes"]


def test_seed_decides(capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str) -> None:
    def curve(seed: str) -> list[list[float]]:
        fixed = ("--data", text, "--out", str(tmp_path), "--optimizers", "Lion8bit")
        found: list[list[float]] = demo(capsys, *fixed, "--seed", seed)["results"][0]["curve"]
        return found

    assert curve("1") == curve("1") != curve("2")


def test_table_and_picture(capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str) -> None:
    pytest.importorskip("matplotlib")
    assert main(["demo", *TINY, "--data", text, "--out", str(tmp_path), "--optimizers", "Lion,AdamW"]) == 0
    out = capsys.readouterr().out
    assert "AdamW" in out and "Lion8bit" not in out
    last = " ".join(out.rpartition("\n\n")[2].split())
    assert last.startswith("Lion trains with 8.0 bytes of weights and state per parameter where AdamW needs 12.0")
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["demo", *TINY, "--data", text, "--out", str(tmp_path), "--optimizers", "AdamW"]) == 0
    captured = capsys.readouterr()
    assert "AdamW" in captured.out
    assert 'pip install "numba-lion[demo]"' in captured.err
    assert not (tmp_path / "demo.png").exists()


def test_no_room_for_paged_state(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str
) -> None:
    monkeypatch.setenv("LION_PAGE_DIR", str(tmp_path / "missing"))
    assert main(["demo", *TINY, "--data", text, "--out", str(tmp_path), "--optimizers", "PagedLion8bit"]) == 2
    assert "the environment variable LION_PAGE_DIR chooses the folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "Invalid --steps: 0; at least 1 is needed"),
        (["--seed", "-1"], "Invalid --seed: -1; at least 0 is needed"),
        (
            ["--optimizers", "Lion,Adam"],
            "Invalid --optimizers: 'Adam'; expected one of AdamW, Lion, Lion8bit, PagedLion8bit, Lion8bit-bf16",
        ),
        (["--data", "missing.txt"], "Invalid --data: missing.txt; No such file"),
        (["--data", "."], "Invalid --data: .; Is a directory"),
        (["--data", "empty"], "Invalid --data: 0 characters; at least"),
        (["--out", "empty"], "Invalid --out: empty; File exists"),
        (["--device", "tpu"], "Invalid --device: tpu; "),
        (["--device", "meta"], "Invalid --device: meta; expected cpu, cuda or the number of a GPU, such as cuda:0"),
        (["--steps", "many"], "argument --steps: invalid int value: 'many'"),
    ],
)
def test_mistakes(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").touch()
    try:
        code = main(["demo", *arguments])
    except SystemExit as exit:
        code = exit.code
    captured = capsys.readouterr()
    assert code == 2
    assert message in captured.err
    assert captured.err.count("\n") == 1 and captured.out == ""

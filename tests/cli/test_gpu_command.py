"""``python -m benchmarks.gpu``, without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import benchmarks.__main__ as benchmark
import benchmarks.gpu.__main__ as command
from benchmarks.gpu.parts import PARTS, Part
from benchmarks.gpu.variants import VARIANTS
from lion.cuda_kernels import launch, simulator

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="parts are ended as process groups")

ROOT = Path(__file__).resolve().parents[2]
TEN_SECONDS = 10

Run = Callable[..., tuple[int, dict[str, Any]]]


def dry_run(out: Path, *arguments: str, **environment: str) -> tuple[dict[str, Any], str]:
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--out", str(out), *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr + (out / "log.txt").read_text()
    return json.loads((out / "results.json").read_text()), result.stdout


def test_dry_run(tmp_path: Path) -> None:
    report, printed = dry_run(tmp_path)
    assert [outcome["name"] for outcome in report["parts"]] == [part.name for part in PARTS]
    for part, outcome in zip(PARTS, report["parts"], strict=True):
        assert outcome["outcome"] == ("passed" if part.dry_run else "skipped"), part.name
        if outcome["found"].endswith("timings"):
            rows = outcome["result"].get("rows") or outcome["result"]["runs"][0]["rows"]
            assert int(outcome["found"].split()[0]) == len(rows) > 1
        assert part.dry_run or outcome["found"] == "needs a GPU"
    rows = next(o for o in report["parts"] if o["name"] == "benchmark")["result"]["runs"][0]["rows"]
    assert {"numba-lion Lion8bit, 24 master bits", "numba-lion Lion, stochastic rounding"} < set(rows)
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "log.txt"}
    assert printed.index("wrote") < printed.index("Timings") < printed.rindex("Parts") < printed.rindex(PARTS[-1].name)


@pytest.mark.skipif(not simulator.enabled(), reason=simulator.NEEDED)
def test_dry_run_of_the_kernels_in_the_simulator(tmp_path: Path) -> None:
    report, _ = dry_run(tmp_path, "--only", "kernels", LION_BACKEND="cuda")
    on_cpu, _ = dry_run(tmp_path, "--only", "kernels", LION_BACKEND="cpu")
    rows = {part["name"]: part["result"]["rows"] for part in report["parts"]}
    assert [len(rows[name]) for name in ("kernels", "variants of the kernels")] == [24, 4 * len(VARIANTS)]
    for part in on_cpu["parts"]:
        assert [(r["what"], r["bits"]) for r in rows[part["name"]]] == [
            (r["what"], r["bits"]) for r in part["result"]["rows"]
        ]
    # Each variant gives the same bits.
    assert len({row["bits"] for row in rows["variants of the kernels"]}) == 4


def test_what_parts_run_is_there() -> None:
    parser = benchmark._parser()
    for part in PARTS:
        kind, rest = part.command[1], part.command[2:]
        if kind == "pytest":
            assert (ROOT / rest[0]).exists()
        elif kind == "benchmarks":
            assert parser.parse_args(rest).device == "cuda"
        else:
            assert part.dry_run is not None or kind == "lion"
    assert len({part.name for part in PARTS}) == len(PARTS)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Run parts given by their programs."""
    monkeypatch.setattr(command, "missing", lambda for_gpu: [])
    monkeypatch.setattr(command, "GRACE", 0.5)

    def run_parts(*parts: Part, minutes: float = 9.0) -> tuple[int, dict[str, Any]]:
        monkeypatch.setattr(command, "PARTS", parts)
        code = command.main(["--out", str(tmp_path), "--minutes", str(minutes)])
        return code, json.loads((tmp_path / "results.json").read_text())

    return run_parts


def part(name: str, program: str, seconds: float = TEN_SECONDS, result: str | None = "stdout", **more: Any) -> Part:
    return Part(name, seconds, ["-c", program], result, **more)  # type: ignore[arg-type]


def test_a_part_that_fails_does_not_end_the_others(run: Run, tmp_path: Path) -> None:
    see = (
        f"import json; parts = json.load(open({str(tmp_path / 'results.json')!r}))['parts']; "
        "print(json.dumps({'machine': ' '.join(part['name'] for part in parts)}))"
    )
    code, report = run(
        part("raises", "raise SystemExit('no such thing')"),
        part("crashes", "import os; os.abort()"),
        part("silent", "pass"),
        # Written again after every part: this one finds what the others left.
        part("sees", see),
    )
    assert code == 1
    outcomes = {o["name"]: o for o in report["parts"]}
    assert [o["outcome"] for o in report["parts"]] == ["failed", "failed", "failed", "passed"]
    assert outcomes["raises"]["found"] == "no such thing" and outcomes["crashes"]["returncode"] < 0
    assert outcomes["sees"]["found"] == "raises crashes silent"
    assert "no such thing" in (tmp_path / "log.txt").read_text()


@pytest.mark.parametrize("stubborn", [False, True])
def test_a_part_that_hangs_is_ended_and_what_it_wrote_is_kept(run: Run, stubborn: bool) -> None:
    program = (
        f"import signal, sys, time; {'signal.signal(signal.SIGINT, signal.SIG_IGN); ' * stubborn}"
        "open(sys.argv[1], 'w').write('{\"machine\": \"kept\"}'); time.sleep(60)"
    )
    hangs = Part("hangs", 2, ["-c", program, "{folder}/result.json"], "result.json")
    code, report = run(hangs, part("next", 'print(\'{"machine": "next"}\')'))
    assert code == 1
    first, second = report["parts"]
    assert (first["outcome"], first["found"], first["returncode"]) == ("out of time", "kept", None)
    assert 2 <= first["seconds"] < 20
    assert second["outcome"] == "passed"


def test_nothing_begins_when_the_time_is_over(run: Run) -> None:
    code, report = run(part("late", "raise SystemExit('ran')"), minutes=0)
    assert code == 0
    assert report["parts"] == [{"name": "late", "outcome": "skipped", "found": "no time left"}]


def test_the_time_left_is_the_limit(run: Run) -> None:
    code, report = run(part("long", "import time; time.sleep(60)", 100), part("late", "pass"), minutes=2 / 60)
    assert code == 1
    assert [o["outcome"] for o in report["parts"]] == ["out of time", "skipped"]


def test_a_part_whose_modules_are_not_installed_is_skipped(run: Run) -> None:
    code, report = run(part("other", "raise SystemExit('ran')", modules=("no_such_module",)))
    assert code == 0
    assert report["parts"][0]["found"] == "not installed: no_such_module"


def test_tests_are_counted(run: Run, tmp_path: Path) -> None:
    line = "===== 1 failed, 7 passed in 0.05s ====="
    code, report = run(
        part("summed up", f"print({line!r}); raise SystemExit(1)", result=None),
        part("cut off", "print('a.py::b PASSED [ 50%]\\na.py::c FAILED [100%]'); print('x PASSED')", result=None),
    )
    assert code == 1
    assert [o["found"] for o in report["parts"]] == ["1 failed, 7 passed in 0.05s", "1 passed, 1 failed"]
    assert line in (tmp_path / "tests.txt").read_text() and not (tmp_path / "log.txt").exists()


@pytest.mark.parametrize("name", ["numba", "torch"])
def test_what_is_not_installed_is_said_at_once(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "installed", lambda module: module != name)
    assert command.main(["--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().out == f"missing: {name} is not installed\n"
    assert not (tmp_path / "out").exists()


def test_a_numpy_too_new_for_numba_cuda_is_said_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def require() -> None:
        raise RuntimeError('numba-cuda 0.30 cannot be imported with NumPy 2.5.5: pip install "numpy<2.5"')

    monkeypatch.setattr(launch, "require", require)
    assert command.main(["--out", str(tmp_path / "out")]) == 1
    assert 'missing: numba-cuda 0.30 cannot be imported with NumPy 2.5.5: pip install "numpy<2.5"' in (
        capsys.readouterr().out
    )
    assert not (tmp_path / "out").exists()

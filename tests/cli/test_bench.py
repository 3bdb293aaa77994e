"""``python -m lion bench`` on few parameters."""

from __future__ import annotations

import json
import re
import sys

import pytest
import torch

from lion.__main__ import main
from lion._cli import bench, measure, progress_bars
from lion._cli.measure import WORKLOADS, Summary, Workload
from lion.cpu_kernels.quantization import LOOKUPS


@pytest.fixture(autouse=True)
def few_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(WORKLOADS, "one", Workload("one tensor of 64K elements", [(1 << 16,)]))
    monkeypatch.setattr(measure, "OTHER_BYTES", 1 << 20)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)  # importing it fails


def test_results(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--device", "cpu", "--rounds", "3", "--workloads", "one", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["where"].endswith(f"8-bit states by {LOOKUPS}")
    results = report["results"]
    assert [(result["workload"], result["dtype"]) for result in results] == [("one", "float32"), ("one", "bfloat16")]
    for result in results:
        rows = {row["name"]: row for row in result["rows"]}
        assert {"Lion", "Lion8bit", "torch AdamW"} <= set(rows)
        assert not any(name.startswith("bitsandbytes") for name in rows)
        for row in rows.values():
            for times in (row["ns_per_parameter"], row["cold_ns_per_parameter"]):
                assert 0 < times["low"] <= times["median"] <= times["high"]
            assert (row["share_of_bound"] is None) == (row["name"] not in ("Lion", "Lion8bit"))
            assert (row["times_ours"] is None) == (row["name"] in ("Lion", "Lion8bit"))
        assert rows["Lion"]["state_bytes_per_parameter"] == pytest.approx(4, abs=0.01)
        assert rows["Lion8bit"]["state_bytes_per_parameter"] == pytest.approx(1 + 4 / 256, abs=0.03)


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--device", "cpu", "--rounds", "1", "--workloads", "one", "--dtypes", "float16"]
    assert main(["bench", *arguments]) == 0
    out = capsys.readouterr().out
    assert "one tensor of 64K elements, float16" in out and "Lion8bit" in out and "cold" in out
    assert "quartiles" not in out


def rows() -> list[bench.Row]:
    """Return what a machine might measure of one contestant that is quiet and of others that are disturbed."""
    quiet, wide = Summary(2.0, 1.9, 2.1), Summary(2.0, 1.8, 2.4)
    return [
        bench.Row("Lion", quiet, quiet, 0.9, None, 4.0, 0.0, False),
        bench.Row("a name of several words", wide, quiet, None, 131.25, 8.0, 123.456, True),
    ]


@pytest.mark.parametrize("columns", ["60", "80", None])
def test_nothing_is_cut_and_disturbed_rows_are_marked(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: str | None
) -> None:
    monkeypatch.setattr(bench, "measured", lambda *arguments: rows())
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns:
        monkeypatch.setenv("COLUMNS", columns)
    assert main(["bench", "--device", "cpu", "--dtypes", "float32", "--workloads", "one"]) == 0
    out = capsys.readouterr().out
    lines = [line.split() for line in out.splitlines()]
    assert ["Lion", "2.000", "2.000", "90%", "4.000", "0.000"] in lines
    assert ["131", "2.000!", "2.000", "8.000", "123"] in [line[-5:] for line in lines]
    assert "\N{HORIZONTAL ELLIPSIS}" not in out and "quartiles" not in out.partition("! disturbed: ")[0]
    assert max(map(len, out.splitlines())) <= int(columns or 200)
    names = " ".join(" ".join(line) for line in lines)
    assert "a name of several words" in names if columns != "60" else "a name of several" in names


def test_details_are_quartiles(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "measured", lambda *arguments: rows())
    assert main(["bench", "--device", "cpu", "--dtypes", "float32", "--workloads", "one", "--details"]) == 0
    assert re.search(r"Lion +1.900–2.100 +1.900–2.100\n", capsys.readouterr().out)


QUIET, BUSY = [1.0, 1.0, 1.0], [1.0, 1.4, 2.0]


@pytest.mark.parametrize(
    ("seconds", "disturbed"),
    [
        ({}, set()),
        ({"torch AdamW": BUSY}, {"torch AdamW"}),
        ({"torch AdamW after other work": BUSY}, {"torch AdamW"}),
        ({"bound of Lion": [0.4, 0.6, 0.9]}, {"Lion"}),
        ({"bound of Lion8bit": [1.1, 1.1, 1.1]}, {"Lion8bit"}),
    ],
)
def test_rows_that_other_work_disturbed(
    monkeypatch: pytest.MonkeyPatch, seconds: dict[str, list[float]], disturbed: set[str]
) -> None:
    def in_turns(timers: dict[str, measure.Timer], *more: object) -> dict[str, list[float]]:
        return {name: seconds.get(name, QUIET) for name in timers}

    monkeypatch.setattr(measure, "in_turns", in_turns)
    monkeypatch.setattr(bench, "CONTESTANTS", bench.CONTESTANTS[:3])
    with progress_bars() as progress:
        bar = progress.add_task("")
        found = bench.measured("one", torch.float32, torch.device("cpu"), 3, progress, bar)
    assert {row.name for row in found if row.disturbed} == disturbed


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0.000"),
        (0.0571, "0.057"),
        (9.9994, "9.999"),
        (9.9996, "10.00"),
        (99.994, "99.99"),
        (99.996, "100"),
        (131.2, "131"),
    ],
)
def test_figures_have_at_most_five_characters(value: float, text: str) -> None:
    assert bench._figure(value) == text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "Invalid --rounds: 0; at least 1 is needed"),
        (["--threads", "0"], "Invalid --threads: 0; at least 1 is needed"),
        (["--dtypes", "float64"], "Invalid --dtypes: 'float64'; expected one of float32, float16, bfloat16"),
        (["--workloads", "two"], "Invalid --workloads: 'two'; expected one of one, gpt2, thirty, many"),
        (["--device", "tpu"], "Invalid --device: tpu; "),
    ],
)
def test_mistakes(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert main(["bench", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1 and captured.out == ""

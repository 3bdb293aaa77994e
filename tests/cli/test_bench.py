"""``python -m lion bench`` on few parameters."""

from __future__ import annotations

import json
import sys

import pytest

from lion.__main__ import main
from lion._cli import measure
from lion._cli.measure import WORKLOADS, Workload
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "Invalid --rounds: 0; at least 1 is needed"),
        (["--threads", "0"], "Invalid --threads: 0; at least 1 is needed"),
        (["--dtypes", "float64"], "Invalid --dtypes: 'float64'; expected one of float32, float16, bfloat16"),
        (["--workloads", "two"], "Invalid --workloads: 'two'; expected one of one, gpt2, many"),
        (["--device", "tpu"], "Invalid --device: tpu; "),
    ],
)
def test_mistakes(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert main(["bench", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1 and captured.out == ""

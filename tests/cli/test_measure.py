"""The measuring core of the benchmarks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lion import Lion, Lion8bit
from lion._cli import measure
from lion._cli.measure import Workload

CPU = torch.device("cpu")
SMALL = Workload("small", [(300,), (4, 256), (1,)])
ROOT = Path(__file__).resolve().parents[2]


def test_workloads() -> None:
    assert {name: w.elements for name, w in measure.WORKLOADS.items()} == {
        "one": 1 << 24,
        "gpt2": 124_439_808,
        "thirty": 999_990,
        "many": 1_000_000,
    }
    assert len(measure.WORKLOADS["gpt2"].shapes) == 148


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("state_itemsize", [4, 1])
def test_bound_changes_copies_only(dtype: torch.dtype, state_itemsize: int) -> None:
    params = measure.make_params(SMALL, dtype, CPU)
    before = [(p.detach().clone(), p.grad.clone()) for p in params]
    step = measure.bound(params, state_itemsize)
    step()
    copies, _, states = step.__defaults__[0]
    for p, copy, (param, grad) in zip(params, copies, before, strict=True):
        assert torch.equal(p, param) and torch.equal(p.grad, grad)
        words = p.numel() * p.element_size() // 4 * 4 // p.element_size()
        assert not torch.equal(copy.view(-1)[:words], param.view(-1)[:words]) or words == 0
    for state in states:
        assert torch.all(state.view(-1)[: state.numel() // 4 * 4 : 4] == 1)


def test_traffic() -> None:
    params = measure.make_params(Workload("", [(256,)]), torch.float32, CPU)
    assert measure.traffic(params, 4) == 256 * 20
    assert measure.traffic(params, 1) == 256 * 14 + 8


def test_in_turns_starts_each_round_with_another_one() -> None:
    calls: list[str] = []

    def timer(name: str) -> measure.Timer:
        return lambda: calls.append(name) or float(len(calls))  # type: ignore[func-returns-value]

    times = measure.in_turns({name: timer(name) for name in "abc"}, 3)
    assert "".join(calls) == "abcbcacab"
    assert times == {"a": [1.0, 6.0, 8.0], "b": [2.0, 4.0, 9.0], "c": [3.0, 5.0, 7.0]}


def test_summary() -> None:
    assert measure.summary([4.0, 1.0, 2.0, 3.0, 5.0]) == (3.0, 2.0, 4.0)


def test_state_bytes_counts_each_tensor_once() -> None:
    params = measure.make_params(SMALL, torch.float32, CPU)
    elements, steps = SMALL.elements, 4 * len(params)
    optimizer = Lion(params)
    optimizer.step()
    assert measure.state_bytes(optimizer.state) == 4 * elements + steps
    optimizer = Lion8bit(params, min_8bit_size=0)
    optimizer.step()
    blocks, maps = 2 + 4 + 1, 3 * 1024
    assert measure.state_bytes(optimizer.state) == elements + 4 * blocks + maps + steps


def test_peak_extra_bytes_sees_a_temporary() -> None:
    size = 1 << 26
    extra = measure.peak_extra_bytes(lambda: torch.ones(size, dtype=torch.uint8), CPU)
    if extra is None:
        pytest.skip("this system does not tell")
    assert 0.9 * size < extra < 1.5 * size


def test_benchmark_writes_its_report(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks", "--sizes", "1e4", "--rounds", "3", "--only", "fused", "--out"]
    result = subprocess.run([*command, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "benchmark.json").read_text())
    assert [(run["dtype"], run["threads"]) for run in report["runs"]] == [
        (dtype, threads) for dtype in ("float32", "bfloat16") for threads in (1, 2)
    ]
    ours = ("numba-lion Lion", "numba-lion Lion8bit")
    ways = ("24 master bits", "32 master bits", "stochastic rounding")
    for run in report["runs"]:
        kept = {f"{name}, {way}" for name in ours for way in ways} if run["dtype"] == "bfloat16" else set()
        assert set(run["rows"]) == {"bound, 32-bit state", "bound, 8-bit state", *ours, *kept, "torch fused AdamW"}
        assert all(row["nanoseconds_per_parameter"]["median"] > 0 for row in run["rows"].values())
    assert (tmp_path / "benchmark.png").stat().st_size > 1000
    assert "numba-lion Lion8bit" in result.stdout

"""``python -m benchmarks.training``: the command, what it measures, and what its tables and pictures say."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import benchmarks.training.__main__ as command
from benchmarks.training import report, worker
from benchmarks.training.contestants import ALL, BY_NAME
from benchmarks.training.store import Store
from benchmarks.training.tasks import Task, found_task
from benchmarks.training.worker import Job

pytest.importorskip("matplotlib")

PAGE = Path(__file__).parents[2] / "docs" / "trainings.md"
HERE = f"{__name__}:small_task"
OURS = [contestant.name for contestant in ALL if contestant.module in ("lion", "torch")]
WIDTH, PARAMETERS = 128, 2 * 128 * 128 + 2 * 128
CPU = torch.device("cpu")


def small_task() -> Task:
    """Return a task that trains in milliseconds, with tensors large enough for 8-bit state."""

    def batches(seed: int, count: int, size: int) -> Iterable[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(size, WIDTH, generator=generator) for _ in range(count)]

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return F.mse_loss(model(batch.to(next(model.parameters()).dtype)).float(), batch.sin())

    def make_model() -> nn.Module:
        return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))

    return Task(make_model, loss, batches, list(batches(1, 2, 64)), 1, 3e-3)


def without_bfloat16() -> Task:
    """Return a task that no bfloat16 weights can take part in."""
    task = small_task()

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        if next(model.parameters()).dtype == torch.bfloat16:
            raise RuntimeError("no bfloat16 here")
        return task.loss(model, batch)

    return task._replace(loss=loss)


def too_few_batches() -> Task:
    """Return a task that gives no batches."""
    return small_task()._replace(batches=lambda seed, count, size: [])


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    """Return a function that gives the command its arguments, without the folder, and returns its exit code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))

    def given(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["benchmarks.training", *arguments, "--out", str(tmp_path / "out")])
        return command.main()

    return given


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> list[Job]:
    """Do jobs in this process, without the seconds that another one needs to begin; return those that were done."""
    done = []

    def work(job: Job, options: Namespace) -> dict[str, Any] | str:
        done.append(job)
        try:
            return worker.work(job, options.data, CPU, lambda text: None)
        except RuntimeError as error:
            return str(error)

    monkeypatch.setattr(command, "_in_process", work)
    return done


def stored(tmp_path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((tmp_path / "out" / "training.json").read_text())
    return found


def filled(path: Path, results: dict[Job, dict[str, Any]]) -> Store:
    """Return a store with results."""
    store = Store(path / "training.json")
    store.begin({"task": "a"}, {"machine": "m", "threads": 1}, 8)
    for job, result in results.items():
        store.add(job, result)
    return store


def trained(name: str, seed: int, loss: float | None, lr: float = 1e-3) -> tuple[Job, dict[str, Any]]:
    """Return a training and its result."""
    curve = [] if loss is None else [[0, 5.0], [1, 4.0], [2, 3.0], [4, loss]]
    return Job("training", "a", name, lr, seed, 8, 4), {"curve": curve, "loss": loss, "metric": None}


def searched(name: str, lr: float, loss: float | None) -> tuple[Job, dict[str, Any]]:
    """Return a training of a search and its result."""
    return Job("search", "a", name, lr, 1000, 8, 2), {"curve": [], "loss": loss, "metric": None}


def measured(name: str, peak: int = 40 << 20) -> list[tuple[Job, dict[str, Any]]]:
    """Return measurements."""
    sizes = {"parameters": 1 << 20, "peak": peak, "weights": 4 << 20, "gradients": 4 << 20, "state": 8 << 20}
    times = {"step_seconds": 0.5, "optimizer_seconds": 0.1, "tokens_per_second": 1024.0}
    return [(Job("memory", "a", name, 1e-3, 0, 8, 3), sizes), (Job("time", "a", name, 1e-3, 0, 8, 12), times)]


def row(losses: dict[int, float]) -> report.Row:
    """Return results of AdamW with these losses."""
    return report.Row(BY_NAME["AdamW"], 1e-3, losses, [], {}, [], None, None, None, None)


def test_stopped_and_begun_again_does_no_job_twice(
    run: Callable[..., int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "RATES", (1.0,))
    monkeypatch.setattr(command, "GROWTH", 0)
    monkeypatch.setattr(command, "REPETITIONS", 1)
    (tmp_path / "text").write_bytes(b"the cat sat on the mat. " * 100)
    fixed = "--data text --steps 4 --search-steps 2 --seeds 2 --contestants AdamW".split() + ["Lion8bit in backward"]

    add, count = Store.add, 0

    def stopping(store: Store, job: Job, result: dict[str, Any]) -> None:
        nonlocal count
        add(store, job, result)
        count += 1
        if count == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(Store, "add", stopping)
    assert run("tiny", *fixed) == 130
    first = stored(tmp_path)["runs"]
    assert len(first) == 5
    assert run("tiny", *fixed) == 0
    second = stored(tmp_path)["runs"]
    assert second[:5] == first
    jobs = [Job(**result["job"]) for result in second]
    assert len(set(jobs)) == len(jobs) == count == 10
    assert [job.kind for job in jobs] == ["search"] * 2 + ["training"] * 4 + ["memory"] * 2 + ["time"] * 2
    # Steps in the backward pass change nothing in the updates: their rate is that of Lion8bit.
    assert {job.contestant for job in jobs[:2]} == {"AdamW", "Lion8bit"}
    capsys.readouterr()
    assert run("tiny", *fixed) == 0
    assert stored(tmp_path)["runs"] == second
    out = capsys.readouterr().out
    assert "rate" in out and "AdamW, float32" in out and "Lion8bit in backward" in out
    assert (tmp_path / "out" / "loss.svg").exists()

    figures = {job.contestant: run["result"] for job, run in zip(jobs, second, strict=True) if job.kind == "memory"}
    adamw, ours = figures["AdamW"], figures["Lion8bit in backward"]
    assert adamw["parameters"] == ours["parameters"] > 900_000
    assert adamw["gradients"] == adamw["weights"] == 4 * adamw["parameters"]
    assert ours["gradients"] == 0
    if adamw["peak"] is not None:  # on Linux
        assert adamw["peak"] > adamw["weights"] + adamw["gradients"] + adamw["state"]
        assert ours["peak"] < adamw["peak"]


def test_who_fails_is_skipped_with_the_reason(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = f"{__name__}:without_bfloat16"
    fixed = [task, *"--steps 2 --search-steps 2 --batch-sizes 4 --kinds training time --contestants".split()]
    reason = "RuntimeError: no bfloat16 here"
    assert run(*fixed, "Lion8bit, bf16") == 0
    assert f"not trained: Lion8bit, bf16, batch of 4: {reason}" in capsys.readouterr().out
    assert stored(tmp_path)["skipped"] == {"Lion8bit, bf16, batch of 4": reason}
    assert run(*fixed, "AdamW", "--report") == 0
    assert reason in capsys.readouterr().out


def test_a_batch_that_is_too_large_leaves_the_usual_one_alone_and_is_tried_again(
    run: Callable[..., int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    done, memory = [], 8

    def work(job: Job, options: Namespace) -> dict[str, Any] | str:
        done.append(job)
        if job.batch_size > memory:
            return "no memory"
        return measured("Lion8bit")[0][1] if job.kind == "memory" else trained("Lion8bit", 0, job.lr)[1]

    monkeypatch.setattr(command, "_in_process", work)
    fixed = [HERE, *"--steps 8 --search-steps 4 --batch-sizes 16 8 --kinds search training memory".split()]
    assert run(*fixed, "--contestants", "Lion", "Lion8bit") == 0
    assert stored(tmp_path)["skipped"] == {"Lion8bit, batch of 16": "no memory"}
    larger = [job for job in done if job.batch_size == 16]
    assert [(job.kind, job.contestant, job.steps) for job in larger] == [("search", "Lion8bit", 2)]
    assert [job.contestant for job in done if job.kind == "memory"] == ["Lion", "Lion8bit"]
    memory, count = 16, len(done)
    assert run(*fixed, "--contestants", "Lion", "Lion8bit") == 0
    assert stored(tmp_path)["skipped"] == {}
    assert {job.batch_size for job in done[count:]} == {16}
    assert [job.steps for job in done[count:] if job.kind == "training"] == [4] * 3


def test_a_process_that_is_killed_tells_the_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    begin = subprocess.Popen

    def killed(arguments: list[str], **options: Any) -> subprocess.Popen[str]:
        return begin(["/bin/sh", "-c", "echo a warning >&2; kill -9 $$"], **options)

    monkeypatch.setattr(subprocess, "Popen", killed)
    job, options = Job("search", "a", "AdamW", 1e-3, 0, 8, 2), Namespace(data=None, device="cpu", threads=1)
    assert command._in_process(job, options) == "ended by SIGKILL"


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        (["--steps", "5"], "steps 4, not 5"),
        (["--search-steps", "3"], "search_steps 2, not 3"),
        (["--batch-sizes", "8", "4"], "batch_size 8, not 4"),
        (["--batch-sizes", "16"], "batch_size 8, not 16"),
        (["--threads", "2"], "threads 1, not 2"),
    ],
)
def test_results_with_other_settings_are_not_mixed(
    run: Callable[..., int],
    one_process: list[Job],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changed: list[str],
    told: str,
) -> None:
    fixed = [HERE, *"--steps 4 --search-steps 2 --kinds time --contestants Lion --batch-sizes 8".split()]
    assert run(*fixed) == 0
    before = stored(tmp_path)
    assert run(*fixed, *changed) == 2
    assert f"holds results with {told}; choose another --out" in capsys.readouterr().err
    assert stored(tmp_path) == before
    assert run(*fixed, "--batch-sizes", "8", "16") == 0


def test_another_text_or_machine_is_not_mixed_in(
    run: Callable[..., int],
    one_process: list[Job],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "text").write_bytes(b"the cat sat on the mat. " * 100)
    fixed = "tiny --data text --kinds memory --contestants Lion".split()
    assert run(*fixed) == 0
    (tmp_path / "text").write_bytes(b"the dog sat on the mat. " * 100)
    assert run(*fixed) == 2
    assert "holds results with data text, SHA-256 " in capsys.readouterr().err
    (tmp_path / "text").write_bytes(b"the cat sat on the mat. " * 100)
    monkeypatch.setattr(command, "machine", lambda device: {"machine": "another"})
    assert run(*fixed) == 2
    assert "not another; choose another --out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tinny"], "Invalid task: tinny; tiny, small, gpt2 or module:function is allowed"),
        (["platform:machine"], "Invalid task: platform:machine; it returns str instead of a Task"),
        ([HERE], f"--steps, --search-steps and --batch-sizes are needed for {HERE}"),
        ([HERE, "--data", "text"], "Invalid --data: text; only tiny, small, gpt2 read a text"),
        (["tiny", "--data", "missing"], "Invalid --data: missing; No such file"),
        (["tiny", "--seeds", "0"], "Invalid --seeds: 0; at least 1 is needed"),
        (["tiny", "--steps", "0"], "Invalid --steps: 0; at least 1 is needed"),
        (["tiny", "--search-steps", "-1"], "Invalid --search-steps: -1; at least 1 is needed"),
        (["tiny", "--batch-sizes", "8", "0"], "Invalid --batch-sizes: 0; at least 1 is needed"),
        (["tiny", "--threads", "0"], "Invalid --threads: 0; at least 1 is needed"),
        (["tiny", "--device", "tpu"], "Invalid --device: tpu; expected cpu, cuda"),
        (["tiny", "--report"], "there is no training.json in it"),
    ],
)
def test_mistakes_are_told_in_a_line(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1 and captured.out == ""
    assert not (tmp_path / "out").exists()


def test_your_task_is_made_from_the_page_alone(
    run: Callable[..., int], one_process: list[Job], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = PAGE.read_text(encoding="utf-8").partition("## Your model")[2]
    source = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    line = re.search(r"\$ python -m benchmarks.training (my_module:my_task .*)", text.replace("\\\n", " "))
    assert source and line
    (tmp_path / "my_module.py").write_text(source[1])
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(command, "REPETITIONS", 1)
    assert run(*line[1].split(), "--contestants", "AdamW", "Lion8bit", "Lion8bit, bf16 + 24 bits") == 0
    store = Store(tmp_path / "out" / "training.json")
    found = report.rows(store, 64)
    assert [len(row.losses) for row in found] == [3, 3, 3]
    for each in found:
        assert each.curve[0][0] == 0 and each.curve[-1][0] == 200
        assert each.curve[-1][1] < 0.6 * each.curve[0][1]
        assert each.tokens_per_second and each.optimizer_seconds and each.step_seconds
        assert 0 < each.optimizer_seconds < each.step_seconds
    assert {job.kind for job in one_process} == set(worker.KINDS)


@pytest.mark.parametrize(
    ("losses", "tried"),
    [
        ({}, 6),  # the smallest is always the best
        ({0.5: 1.0}, 4),
        ({1.0: 1.0}, 4),
        ({0.25: 1.0}, 5),
        ({2.0: 1.0}, 5),
        ({2.0: 2.0, 4.0: 1.0}, 6),
        ({0.25: 3.0, 0.125: 2.0, 0.0625: 1.0}, 6),
    ],
)
@pytest.mark.parametrize("name", ["AdamW", "Lion8bit"])
def test_all_are_searched_for_with_the_same_effort(
    run: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    name: str,
    losses: dict[float, float],
    tried: int,
) -> None:
    usual = small_task().rate * BY_NAME[name].rate

    def work(job: Job, options: Namespace) -> dict[str, Any]:
        diverged = None if losses else job.lr
        return {"curve": [], "loss": losses.get(job.lr / usual, 9.0 if losses else diverged), "metric": None}

    monkeypatch.setattr(command, "_in_process", work)
    fixed = [HERE, *"--steps 4 --search-steps 2 --batch-sizes 8 --kinds search --contestants".split(), name]
    assert run(*fixed) == 0
    store = Store(tmp_path / "out" / "training.json")
    rates = [job.lr / usual for job, _ in store.runs("search")]
    assert rates[:4] == list(command.RATES) and len(rates) == tried
    best = min(losses, key=lambda factor: losses[factor]) if losses else min(rates)
    assert store.rate(BY_NAME[name], 8) == pytest.approx(best * usual)


def test_the_rate_times_the_weight_decay_is_the_same_for_all() -> None:
    for name in OURS:
        for lr in (1e-4, 2e-3):
            training = worker.Training(small_task(), BY_NAME[name], Job("search", HERE, name, lr, 0, 8, 4), CPU)
            group = training.optimizer.param_groups[0]
            assert group["initial_lr"] * group["weight_decay"] == pytest.approx(2e-4)
            assert tuple(group["betas"]) == (0.9, 0.99)


def test_all_begin_with_the_same_weights_and_see_the_same_batches(one_thread: None) -> None:
    task = found_task("tiny", None)
    starts, seen = [], []

    def batches(seed: int, count: int, size: int) -> Iterable[Tensor]:
        found = list(task.batches(seed, count, size))
        seen.append(torch.stack(found))
        return found

    for name in ("AdamW", "Lion8bit, bf16"):
        job = Job("training", "tiny", name, 1e-3, 1, 2, 1)
        few = task._replace(batches=batches, held_out=task.held_out[:1])
        training = worker.Training(few, BY_NAME[name], job, CPU)
        starts.append([p.detach().float().clone() for p in training.model.parameters()])
        worker.train(training, job, lambda text: None)
    assert all(map(torch.equal, *starts))
    assert torch.equal(*seen)


def test_steps_in_backward_train_to_the_same_bits(one_thread: None) -> None:
    results = [
        worker.work(Job("training", HERE, name, 1e-3, 3, 16, 20), None, CPU, lambda text: None)
        for name in ("Lion8bit", "Lion8bit in backward")
    ]
    assert results[0] == results[1]
    assert results[0]["loss"] < results[0]["curve"][0][1]


STEPS = 4 * 4
# A byte for each weight, a maximum for each 256 of them, and the map; biases are too small for it.
EIGHT_BITS = 2 * (WIDTH * WIDTH + WIDTH * WIDTH // 256 * 4 + 1024) + 4 * 2 * WIDTH + STEPS
STATE = {
    "AdamW": 8 * PARAMETERS + STEPS,
    "AdamW, bf16": 4 * PARAMETERS + STEPS,
    "Lion": 4 * PARAMETERS + STEPS,
    "Lion8bit, bf16 + 24 bits": EIGHT_BITS + PARAMETERS,
    "Lion8bit, bf16 + 32 bits": EIGHT_BITS + 2 * PARAMETERS,
}


@pytest.mark.parametrize("name", OURS)
def test_bytes_are_those_of_the_tensors(name: str, one_thread: None) -> None:
    job = Job("memory", HERE, name, 1e-3, 0, 16, 3)
    found = worker.work(job, None, CPU, lambda text: None)
    contestant = BY_NAME[name]
    size = contestant.dtype.itemsize
    assert found["parameters"] == PARAMETERS
    assert found["weights"] == size * PARAMETERS
    assert found["gradients"] == (0 if contestant.in_backward else size * PARAMETERS)
    assert found["state"] == STATE.get(name, EIGHT_BITS)


def test_the_optimizer_has_no_time_of_its_own_in_backward(one_thread: None) -> None:
    def times(name: str) -> dict[str, Any]:
        return worker.work(Job("time", HERE, name, 1e-3, 0, 16, 4), None, CPU, lambda text: None)

    ours = times("Lion8bit")
    assert 0 < ours["optimizer_seconds"] < ours["step_seconds"]
    assert ours["tokens_per_second"] == 16 / ours["step_seconds"]
    assert times("Lion8bit in backward")["optimizer_seconds"] is None


def test_the_metric_is_that_of_the_held_out_batches(one_thread: None) -> None:
    task = small_task()._replace(metric=lambda model, batch: batch.mean())
    job = Job("training", HERE, "Lion", 1e-3, 0, 16, 2)
    found = worker.train(worker.Training(task, BY_NAME["Lion"], job, CPU), job, lambda text: None)
    assert found["metric"] == pytest.approx(torch.stack(task.held_out).mean().item())


def test_a_training_that_diverges_ends() -> None:
    # Weights of this size overflow at once.
    found = worker.work(Job("training", HERE, "Lion", 1e30, 0, 16, 20), None, CPU, lambda text: None)
    assert found["loss"] is None and found["metric"] is None
    assert len(found["curve"]) < worker.EVALUATIONS


def test_a_model_trains_as_one_that_is_trained(one_thread: None) -> None:
    task = small_task()
    job = Job("search", HERE, "Lion", 1e-3, 0, 16, 2)
    training = worker.Training(task._replace(make_model=lambda: task.make_model().eval()), BY_NAME["Lion"], job, CPU)
    assert training.model.training
    training.held_out(task.loss)
    assert training.model.training


def test_too_few_batches_are_told() -> None:
    job = Job("search", f"{__name__}:too_few_batches", "Lion", 1e-3, 0, 16, 2)
    with pytest.raises(ValueError, match="the task gave 0 batches where 2 were asked for"):
        worker.work(job, None, CPU, lambda text: None)


def test_the_difference_is_that_of_a_paired_t_test() -> None:
    ours, theirs = row({0: 1.1, 1: 1.4, 2: 1.2, 9: 7.0}), row({0: 1.0, 1: 1.1, 2: 1.0})
    found = report.difference(ours, theirs)
    assert found is not None
    # Differences 0.1, 0.3, 0.2: mean 0.2, standard error 0.1 / sqrt(3). With two degrees of freedom, p of t is
    # 1 - t / sqrt(t * t + 2), and 95% lie within 4.302653 standard errors.
    t = 0.2 / (0.1 / 3**0.5)
    assert found.mean == pytest.approx(0.2)
    assert found.p == pytest.approx(1 - t / (t * t + 2) ** 0.5)
    assert (found.low, found.high) == pytest.approx((0.2 - 4.302653 * 0.1 / 3**0.5, 0.2 + 4.302653 * 0.1 / 3**0.5))
    other = report.difference(theirs, ours)
    assert other is not None
    assert (other.mean, other.low, other.high) == pytest.approx((-found.mean, -found.high, -found.low))


@pytest.mark.parametrize(
    ("ours", "theirs", "verdict"),
    [
        ([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], "same"),
        ([1.0, 2.0, 3.0], [1.5, 2.51, 3.49], "better"),
        ([1.5, 2.51, 3.49], [1.0, 2.0, 3.0], "worse"),
        ([1.0, 2.0], [0.5, 1.5], "worse"),  # by as much with each seed
        ([1.1, 1.4, 1.2], [1.0, 1.1, 1.0], "not told apart"),
        ([1.0, 2.0, 3.0], [1.0, 2.0, 3.1], "not told apart"),
        ([1.0], [2.0], None),
    ],
)
def test_verdicts(ours: list[float], theirs: list[float], verdict: str | None) -> None:
    found = report.difference(row(dict(enumerate(ours))), row(dict(enumerate(theirs))))
    assert (found and found.verdict) == verdict


def test_tables(tmp_path: Path) -> None:
    results = dict(
        [
            *(trained("AdamW", seed, loss) for seed, loss in enumerate((1.0, 1.1, 1.2))),
            *(trained("Lion8bit", seed, loss) for seed, loss in enumerate((0.9, 1.01, 1.09))),
            # With a rate that a search went on to find a better one than.
            trained("Lion8bit", 0, 9.0, lr=5e-4),
            trained("Lion", 0, 1.0),
            trained("Lion", 1, None),
            *(searched("AdamW", lr, loss) for lr, loss in ((5e-4, 3.0), (1e-3, 2.0), (2e-3, None))),
            *(searched("Lion8bit", lr, loss) for lr, loss in ((5e-4, 3.0), (1e-3, 2.0))),
            searched("Lion", 1e-3, 2.0),
            *measured("AdamW"),
            *measured("flashoptim FlashLion, bf16"),
        ]
    )
    found = {title: (headings, cells) for title, headings, cells in report.tables(filled(tmp_path, results))}
    headings, cells = found["Results, batch of 8"]
    assert headings == ["", "rate", "held-out loss", "peak MiB", "state B", "tokens/s", "optimizer's share"]
    assert cells == [
        ["AdamW, float32", "0.001", "1.1000 ± 0.1000", "40", "8.00", "1,024", "20.0%"],
        ["Lion, float32", "0.001", "1.0000, 1 diverged", "", "", "", ""],
        ["Lion8bit, float32", "0.001", "1.0000 ± 0.0954", "", "", "", ""],
        ["flashoptim FlashLion, bf16 + 24 bits", "", "", "40", "8.00", "1,024", "20.0%"],
    ]
    headings, cells = found["Held-out loss less that of AdamW, float32, batch of 8"]
    assert headings == ["", "difference", "95% interval", "p", "verdict"]
    assert cells == [["Lion8bit, float32", "-0.1000", "-0.1248 to -0.0752", "0.0033", "better"]]
    assert found["Held-out loss less that of Lion8bit, float32, batch of 8"][1][0][4] == "worse"
    assert found["Search for the rate, batch of 8"][1] == [
        ["AdamW, float32", "0.001: 2.000", "0.0005: 3.000, 0.002: diverged"],
        ["Lion, float32", "0.001: 2.000 (at the end)", ""],
        ["Lion8bit, float32", "0.001: 2.000 (at the end)", "0.0005: 3.000"],
    ]


def test_what_is_measured_alone_has_a_table(tmp_path: Path) -> None:
    tables = report.tables(filled(tmp_path, dict(measured("AdamW"))))
    assert [title for title, _, _ in tables] == ["Results, batch of 8"]


@pytest.fixture
def pictures(tmp_path: Path) -> tuple[Path, Store]:
    """Return a folder with the pictures of all contestants, and the store that they are of."""
    runs = [
        run
        for i, contestant in enumerate(ALL)
        for run in (
            searched(contestant.name, 1e-3, 1.0),
            trained(contestant.name, 0, 1 + i / 100),
            *measured(contestant.name, (40 + i) << 20),
        )
    ]
    store = filled(tmp_path, dict(runs))
    assert [path.name for path in report.draw(store, tmp_path)] == ["loss.svg", "memory.svg"]
    return tmp_path, store


def test_pictures_are_the_same_bytes_for_the_same_results(pictures: tuple[Path, Store]) -> None:
    folder, store = pictures
    for path in report.draw(store, folder, "again-"):
        assert path.read_bytes() == (folder / path.name.removeprefix("again-")).read_bytes()


@pytest.mark.parametrize("name", ["loss.svg", "memory.svg"])
def test_pictures_can_be_read_on_a_phone(pictures: tuple[Path, Store], name: str) -> None:
    drawing = (pictures[0] / name).read_text(encoding="utf-8")
    assert drawing.startswith('<svg class="benchmark picture" role="img" aria-label="') and "\n\n" not in drawing
    width = float(re.search(r'viewBox="0 0 ([\d.]+) ', drawing)[1])  # type: ignore[index]
    sizes = [float(size) for size in re.findall(r"font(?:-size)?:[^;\"]*?([\d.]+)px", drawing)]
    assert len(sizes) > 2 * len(ALL) - 4
    assert min(sizes) * 350 / width >= 9
    for contestant in ALL:
        assert f">{report.title(contestant)}<" in drawing
    # The colour of text follows the reader's.
    assert "var(--ink)" in drawing and "#010203" not in drawing and "#000000" not in drawing


def test_bars_are_as_long_as_the_peak(pictures: tuple[Path, Store]) -> None:
    drawing = (pictures[0] / "memory.svg").read_text(encoding="utf-8")
    assert "Peak memory in MiB: AdamW, float32 40, AdamW, bf16 41" in drawing
    ends = [float(x) for x in re.findall(r'd="M [\d.]+ [\d.]+ \nL ([\d.]+) [\d.]+ \nL \1', drawing)]
    assert len(set(ends)) > len(ALL)


def test_results_of_a_machine_whose_threads_are_not_known_go_on(tmp_path: Path) -> None:
    store = filled(tmp_path, dict(measured("AdamW")))
    told = json.loads(store.path.read_text())
    del told["machines"][0]["threads"]
    store.path.write_text(json.dumps(told))
    again = Store(store.path)
    again.begin({"task": "a"}, {"machine": "m", "threads": 1}, 8)
    assert len(list(again.runs("memory"))) == 1

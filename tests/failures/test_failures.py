"""Whatever stops a step: either nothing has changed or the exception says what has, and the next step works."""

from __future__ import annotations

import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

import lion
from lion._backends import CpuBackend
from lion._state import adapting
from lion.cpu_kernels import pool
from tests.optimizers.support import (
    KINDS,
    ByHand,
    Variant,
    assert_unchanged,
    every_kind,
    follow,
    parameter,
    set_gradients,
    snapshot,
)

SIZES_AND_DTYPES = {  # one batch for each dtype
    "first": (5000, torch.float32),
    "second": (4096, torch.bfloat16),
    "third": (7000, torch.float16),
    "fourth": (6000, torch.float32),
}

ignoring_deaths = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


class Stop(BaseException):
    """What no code expects."""


@pytest.fixture(autouse=True)
def two_threads_for_small_work(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(pool, "SMALL", 0)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def trained(make: Variant, steps: int = 2) -> tuple[lion.Lion, dict[str, nn.Parameter], dict[nn.Parameter, ByHand]]:
    """Return an optimizer after some steps, its parameters by name, and their copies."""
    params = {name: parameter(size, dtype=dtype) for name, (size, dtype) in SIZES_AND_DTYPES.items()}
    optimizer = make(params.items(), percentile_clipping=50)
    copies = {p: ByHand.of(make, p, percentile_clipping=50) for p in params.values()}
    follow(optimizer, copies, steps)
    set_gradients(copies, seed=50)
    return optimizer, params, copies


def stop(*_: object) -> None:
    raise Stop


@every_kind
@pytest.mark.parametrize("steps", [0, 2])
def test_before_the_step(make, steps):
    """A hook before the step and a closure: nothing has changed, and the exception is the one that was raised."""
    optimizer, _, copies = trained(make, steps)
    before = snapshot(optimizer)
    with pytest.raises(Stop) as caught:
        optimizer.step(stop)
    assert caught.value.__cause__ is None
    assert_unchanged(optimizer, before)
    hook = optimizer.register_step_pre_hook(stop)
    with pytest.raises(Stop):
        optimizer.step()
    hook.remove()
    assert_unchanged(optimizer, before)
    follow(optimizer, copies, 3, seed=60)


@every_kind
def test_after_the_step(make):
    """A hook after the step: all of it is done."""
    optimizer, _, copies = trained(make)
    hook = optimizer.register_step_post_hook(stop)
    for p, copy in copies.items():
        copy.step(p.grad)
    with pytest.raises(Stop):
        optimizer.step()
    hook.remove()
    for p, copy in copies.items():
        copy.check(p, optimizer)
    follow(optimizer, copies, 3, seed=60)


@every_kind
@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("moved", [False, True], ids=["before it moves", "after it moved"])
def test_between_batches(make, place, moved, monkeypatch):
    """The cause names what has been updated and what perhaps; the reference goes on from there, and so does a step."""
    optimizer, params, copies = trained(make)
    update, batches = CpuBackend.update, []

    def stopping(self, batch, *rest):
        batches.append(set(batch.params))
        if len(batches) <= place or moved:
            update(self, batch, *rest)
        if len(batches) > place:
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(CpuBackend, "update", stopping)
        with pytest.raises(Stop) as caught:
            optimizer.step()
    updated, uncertain = named(str(caught.value.__cause__))
    assert updated == {name for name, p in params.items() if any(p in batch for batch in batches[:-1])}
    assert uncertain == {name for name, p in params.items() if p in batches[-1]}
    for name, p in params.items():
        if name in updated or (moved and name in uncertain):
            copies[p].step(p.grad)
        copies[p].check(p, optimizer, name)
    follow(optimizer, copies, 3, seed=60)


@pytest.mark.parametrize("count, more", [(20, ""), (21, " and 1 more"), (23, " and 3 more")])
def test_long_reports_are_shortened(count, more, monkeypatch):
    params = {f"p{i}": parameter(3) for i in range(count)}
    for p in params.values():
        p.grad = torch.ones(3)
    optimizer = lion.Lion(params.items())
    monkeypatch.setattr(CpuBackend, "update", stop)
    with pytest.raises(Stop) as caught:
        optimizer.step()
    names = ", ".join(f"parameter 'p{i}'" for i in range(20))
    assert f"Updated: none. Updated or not, perhaps in part: {names}{more}. Unchanged" in str(caught.value.__cause__)


def named(report: str) -> tuple[set[str], set[str]]:
    """Return the names of the parameters that have been updated, and of those that perhaps have."""
    updated, uncertain = re.search(
        r"Updated: (.*?)\. Updated or not, perhaps in part: (.*?)\. Unchanged", report
    ).groups()
    return set(re.findall(r"'(.*?)'", updated)), set(re.findall(r"'(.*?)'", uncertain))


def second_call(function: Callable[..., object]) -> Callable[..., object]:
    """Return a function that runs out of memory at its second call."""
    calls = []

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise MemoryError
        return function(*args, **kwargs)

    return failing


@every_kind
def test_no_memory_for_new_state(make, monkeypatch):
    optimizer, _, copies = trained(make, steps=0)
    before = snapshot(optimizer)
    for owner, name in ((torch, "empty_strided"), (adapting, "create")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, second_call(getattr(owner, name)))
            with pytest.raises(MemoryError):
                optimizer.step()
        assert not optimizer.state
        assert_unchanged(optimizer, before)
    follow(optimizer, copies, 3)


@pytest.mark.parametrize("make, bits", [(KINDS["32bit"], 8), (KINDS["blockwise"], 32), (KINDS["tensorwise"], 32)])
def test_no_memory_to_convert_state(make, bits, monkeypatch):
    """Options were changed between steps; with the old ones, everything is as it was."""
    optimizer, _, copies = trained(make)
    before = snapshot(optimizer)
    group, old = optimizer.param_groups[0], optimizer.param_groups[0]["optim_bits"]
    group["optim_bits"] = bits
    with monkeypatch.context() as patch:
        patch.setattr(adapting, "quantized", second_call(adapting.quantized))
        with pytest.raises(MemoryError):
            optimizer.step()
    assert_unchanged(optimizer, before)
    group["optim_bits"] = old
    follow(optimizer, copies, 3, seed=60)


def workers() -> list[threading.Thread]:
    return [worker for worker in pool._pool.workers if worker.is_alive()]


def kill(workers: list[threading.Thread]) -> None:
    """End worker threads by an exception that they do not catch."""
    for _ in workers:
        pool._pool.jobs.put((sys.exit,))
    for worker in workers:
        worker.join(60)
        assert not worker.is_alive()


@ignoring_deaths
@every_kind
def test_a_worker_thread_dies(make):
    optimizer, _, copies = trained(make)
    for seed in (60, 70):
        living = workers()
        assert living
        kill(living)
        follow(optimizer, copies, 3, seed=seed)
        assert len(workers()) == len(living)
    deadline = time.monotonic() + 60
    while not pool._pool.jobs.empty():
        assert time.monotonic() < deadline, "nobody takes the jobs"
        time.sleep(0.01)


@ignoring_deaths
def test_no_worker_thread_can_be_had(monkeypatch):
    """The caller does all the work."""

    def refuse(self):
        raise RuntimeError("can't start new thread")

    optimizer, _, copies = trained(KINDS["blockwise"])
    kill(workers())
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        follow(optimizer, copies, 3, seed=60)
        assert not workers()
    follow(optimizer, copies, 3, seed=70)
    assert workers()


@every_kind
@pytest.mark.parametrize("recording", [True, False])
def test_wherever_an_interrupt_comes_autograd_goes_on_as_before(make: Variant, recording: bool) -> None:
    """Interrupts come where Python calls a function, or returns from one."""
    p = parameter(300)
    p.grad = torch.ones(300)
    optimizer = make([p], min_8bit_size=0)
    optimizer.step()
    left, before = 0, sys.gettrace()

    def interrupting(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal left
        if event in ("call", "return"):
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
        return interrupting

    interrupts = 0
    with torch.set_grad_enabled(recording):
        while True:
            left = interrupts + 1
            optimizer.step()  # so that none makes a new plan
            try:
                sys.settrace(interrupting)
                optimizer.step()
                break
            except KeyboardInterrupt:
                interrupts += 1
            finally:
                sys.settrace(before)
            assert torch.is_grad_enabled() == recording
    assert interrupts > 20


def test_keyboard_interrupt():
    """Ctrl-C during large steps, many times."""
    command = [sys.executable, "-m", "tests.failures.interrupted"]
    with subprocess.Popen(command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True) as process:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line == "stepping\n":
                time.sleep(random.uniform(0.005, 0.05))
                process.send_signal(signal.SIGINT)
    assert process.returncode == 0
    assert lines.count("stepping\n") == 20
    # The others came between two steps.
    assert lines.count("reported\n") >= 5

"""Worker threads change no result: with several callers at once, after a fork, and when a caller is interrupted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from lion import cpu_kernels, reference
from lion.cpu_kernels import pool
from tests.comparing import assert_same_bits
from tests.strategies import make_floats

ROUNDS = 100
SIZES = (70_000, 1, 0, 16_384, 257)
K = np.array(reference.coefficients(1e-3, (0.9, 0.99), 0.1), np.float32)


@pytest.fixture(autouse=True)
def many_threads_for_small_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "SMALL", 0)


class Stepper:
    """Tensors of every kind of state that can be stepped."""

    def __init__(self, seed: int) -> None:
        self.grads, self.params = self._floats("bfloat16", seed), [self._floats("bfloat16", seed + i) for i in range(3)]
        self.momentums = self._floats("float32", seed)
        self.codes = [[np.full(size, 127, np.uint8) for size in SIZES] for _ in range(2)]
        self.absmax = [np.zeros(-(-size // 256), np.float32) for size in SIZES]
        self.maxima, self.new_maxima = ([np.zeros(1, np.float32) for _ in SIZES] for _ in range(2))
        self.steps = [[np.zeros(1, np.float32) for _ in SIZES] for _ in range(3)]
        self.histories = [np.zeros(100, np.float32) for _ in SIZES]

    def _floats(self, dtype: str, seed: int) -> list[npt.NDArray[Any]]:
        return [make_floats("gradients", dtype, size, seed + i) for i, size in enumerate(SIZES)]

    def step(self, threads: int) -> None:
        sizes, scales = np.array(SIZES, np.int64), np.ones(len(SIZES), np.float32)
        grads, last = table(self.grads), (K, threads)
        params, steps, codes = ([table(arrays) for arrays in kind] for kind in (self.params, self.steps, self.codes))
        norms = cpu_kernels.squared_norm("bfloat16", grads, sizes, threads)
        cpu_kernels.percentile_clipping(norms, table(self.histories), steps[0], scales, 50, threads)
        cpu_kernels.update_32bit("bfloat16", params[0], grads, table(self.momentums), sizes, steps[0], scales, *last)
        cpu_kernels.update_8bit_blockwise(
            "bfloat16", params[1], grads, codes[0], table(self.absmax), sizes, steps[1], scales, *last
        )
        maxima = table(self.maxima), table(self.new_maxima)
        cpu_kernels.update_8bit_tensorwise(
            "bfloat16", params[2], grads, codes[1], *maxima, sizes, steps[2], scales, *last
        )

    def check(self, expected: Stepper) -> None:
        for name, arrays in vars(self).items():
            for array, other in zip(flat(arrays), flat(getattr(expected, name)), strict=True):
                assert_same_bits(array, other, what=name)


def table(arrays: list[npt.NDArray[Any]]) -> npt.NDArray[np.int64]:
    return np.array([array.ctypes.data for array in arrays], np.int64)


def flat(arrays: list[Any]) -> list[npt.NDArray[Any]]:
    return [array for inner in arrays for array in (inner if isinstance(inner, list) else [inner])]


def stepped(seed: int, rounds: int) -> Stepper:
    stepper = Stepper(seed)
    for _ in range(rounds):
        stepper.step(1)
    return stepper


def test_four_threads_step_their_own_tensors() -> None:
    steppers = [Stepper(10 * i) for i in range(4)]

    def work(stepper: Stepper) -> None:
        for _ in range(ROUNDS):
            stepper.step(2)

    threads = [threading.Thread(target=work, args=(stepper,)) for stepper in steppers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, stepper in enumerate(steppers):
        stepper.check(stepped(10 * i, ROUNDS))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_steps_after_its_parent_did() -> None:
    stepper = Stepper(0)
    for _ in range(ROUNDS // 2):
        stepper.step(2)
    child = os.fork()
    if child == 0:
        try:
            for _ in range(ROUNDS // 2):
                stepper.step(2)
            stepper.check(stepped(0, ROUNDS))
            os._exit(0)
        finally:
            sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
            os._exit(1)
    for _ in range(ROUNDS // 2):
        stepper.step(2)
    assert os.waitpid(child, 0)[1] == 0
    stepper.check(stepped(0, ROUNDS))


def test_workers_have_left_when_an_interrupted_call_ends() -> None:
    """After the exception, the caller may free the tensors: nobody may still be writing."""
    size = 3_000_000
    param, grad = np.zeros(size, np.float32), np.ones(size, np.float32)
    momentum = np.zeros(size, np.float32)
    places = [table([array]) for array in (param, grad, momentum)]
    sizes, steps, scales = np.array([size], np.int64), np.zeros(1, np.int64), np.ones(1, np.float32)
    cpu_kernels.update_32bit("float32", *places, sizes, steps, scales, K, 2)
    interrupted = 0
    previous = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        for i in range(200):
            try:
                signal.setitimer(signal.ITIMER_REAL, 1e-5 * (1 + i % 100))
                while True:
                    cpu_kernels.update_32bit("float32", *places, sizes, steps, scales, K, 2)
            except KeyboardInterrupt:
                interrupted += 1
            before = param[::1000].copy(), momentum[::1000].copy()
            if i % 20 == 0:
                time.sleep(0.005)
            assert_same_bits(param[::1000], before[0])
            assert_same_bits(momentum[::1000], before[1])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert interrupted == 200


@pytest.fixture
def fresh_pool(monkeypatch: pytest.MonkeyPatch) -> pool._Pool:
    monkeypatch.setattr(pool, "_pool", pool._Pool())
    return pool._pool


def squared(sizes: npt.NDArray[np.int64], threads: int) -> npt.NDArray[np.float32]:
    """Return the squared norms of gradients of ones."""
    grads = [np.ones(size, np.float32) for size in sizes]
    return cpu_kernels.squared_norm("float32", table(grads), sizes, threads)


def test_one_worker_less_than_threads(fresh_pool: pool._Pool) -> None:
    for threads, workers in ((1, 0), (3, 2), (2, 2)):
        squared(np.array([10_000]), threads)
        assert len(fresh_pool.workers) == workers


def test_small_work_wakes_nobody(fresh_pool: pool._Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "SMALL", 10_000)
    squared(np.array([10_000]), 2)
    assert not fresh_pool.workers
    squared(np.array([10_000, 1]), 2)
    assert len(fresh_pool.workers) == 1


def test_without_threads_to_be_had_the_caller_works_alone(
    fresh_pool: pool._Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    assert_same_bits(squared(np.array([10_000, 0, 3]), 4), np.float32([10_000, 0, 3]))
    assert fresh_pool.jobs.empty()


def test_a_worker_that_comes_after_an_interruption_finds_no_work(fresh_pool: pool._Pool) -> None:
    """The caller is interrupted when its job is in the queue and its only worker is busy with something else."""
    resume, done = threading.Event(), threading.Event()
    sizes, steps = np.array([300_000]), np.zeros(1, np.int64)
    param, grad, momentum = (np.ones(sizes[0], np.float32) for _ in range(3))
    kernel = cpu_kernels.lion._update_32bit_kernel("float32", "float32", mode=0)
    arguments = *map(table, ([param], [grad], [momentum])), sizes, steps, np.ones(1, np.float32), K, np.float32(1)

    def interrupted(control: npt.NDArray[np.int64], *args: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            raise KeyboardInterrupt
        kernel(control, *args)

    fresh_pool.submit(1, resume.wait)
    with pytest.raises(KeyboardInterrupt):
        pool.run(interrupted, 2, np.array([300_000]), *arguments)
    resume.set()
    fresh_pool.submit(1, done.set)
    assert done.wait(60)
    for array in (param, momentum):
        assert_same_bits(array, np.ones_like(array))


WAITING = """
import threading
import numpy as np
from lion.cpu_kernels import pool

control = np.zeros(pool.CONTROL_SIZE, np.int64)
control[pool.ACTIVE] = 1
waiting = threading.Thread(target=pool._close_kernel(), args=(control,))
waiting.start()
while control[pool.NEXT] == 0:
    pass
control[pool.ACTIVE] = 0
waiting.join()
"""


def test_python_goes_on_while_a_kernel_runs() -> None:
    """A kernel that waits for a number to become 0, and Python that sets it, in a process that may not end."""
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", WAITING], cwd=root, check=True, timeout=120)


def test_workers_do_not_keep_a_process_alive() -> None:
    program = "from cpu_kernels import pool; pool._pool.submit(2, print)"
    subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[2], check=True, timeout=120)


def test_a_failing_kernel_raises_for_its_caller() -> None:
    """The worker meets the same failure, reports nothing of its own, and lives on."""
    sizes = np.zeros(1, np.int64)
    with pytest.raises(TypeError):
        pool.run(
            cpu_kernels.lion._update_32bit_kernel("float32", "float32", mode=0), 2, np.array([1 << 21]), "no table"
        )
    stepped(0, 1)
    cpu_kernels.squared_norm("float32", sizes, sizes, 2)

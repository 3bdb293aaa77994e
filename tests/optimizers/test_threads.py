"""Optimizers that step at the same time in Python threads, or on both sides of a fork, give what they give alone."""

from __future__ import annotations

import os
import threading
import traceback
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.comparing import assert_same_bits
from tests.optimizers.support import VARIANTS, Variant, parameter

ROUNDS = 100
SIZES = (1_200_000, 100_007, 5_000, 3)  # the first is large enough for worker threads
NAMES = ("Lion8bit", "PagedLion8bit", "Lion", "Lion8bit-tensorwise")


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


class Training:
    """An optimizer with parameters and gradients of its own; the gradients of a round depend on its number alone."""

    def __init__(self, make: Variant, seed: int) -> None:
        self.params = [parameter(size, seed=seed + i) for i, size in enumerate(SIZES)]
        self.optimizer = make(self.params, lr=1e-3, weight_decay=0.1, percentile_clipping=40)
        self.grads = [
            [parameter(size, seed=seed + 100 * number + i).detach() for i, size in enumerate(SIZES)]
            for number in range(1, 4)
        ]
        self.rounds = 0

    def step(self, rounds: int = 1) -> None:
        for _ in range(rounds):
            for p, grad in zip(self.params, self.grads[self.rounds % len(self.grads)], strict=True):
                p.grad = grad
            self.optimizer.step()
            self.rounds += 1

    def results(self) -> list[Tensor]:
        """Return parameters and states."""
        states = [self.optimizer.state[p] for p in self.params]
        return [*self.params, *(state[key] for state in states for key in sorted(state))]

    def check(self, expected: list[Tensor]) -> None:
        for number, (actual, other) in enumerate(zip(self.results(), expected, strict=True)):
            assert_same_bits(actual, other, what=f"result {number}")


def serial(name: str, seed: int, rounds: int) -> list[Tensor]:
    """Return the results of a training on one thread, with nothing beside it."""
    torch.set_num_threads(1)
    training = Training(VARIANTS[name], seed)
    training.step(rounds)
    torch.set_num_threads(2)
    return training.results()


def test_four_threads_step_their_own_optimizers() -> None:
    trainings = [Training(VARIANTS[name], 10 * i) for i, name in enumerate(NAMES)]
    start = threading.Barrier(len(trainings))

    def work(training: Training) -> None:
        torch.set_num_threads(2)
        start.wait()
        training.step(ROUNDS)

    threads = [threading.Thread(target=work, args=(training,)) for training in trainings]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, (name, training) in enumerate(zip(NAMES, trainings, strict=True)):
        assert training.rounds == ROUNDS
        training.check(serial(name, 10 * i, ROUNDS))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize("name", ["Lion8bit", "PagedLion8bit", "Lion"])
def test_a_forked_child_steps_after_its_parent_did(name: str) -> None:
    expected = serial(name, 0, ROUNDS)
    training = Training(VARIANTS[name], 0)
    training.step(ROUNDS // 2)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            # The threads of torch's own operations do not survive a fork, those of the kernels are new.
            torch.set_num_threads(1)
            training.step()  # moves paged state, by such operations
            torch.set_num_threads(2)
            training.step(ROUNDS // 2 - 1)
            training.check(expected)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    training.step(ROUNDS // 2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    training.check(expected)

"""After a fork, parent and child each have the state of the moment of the fork, as with ordinary memory."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable

import torch

import lion
from lion._memory import paging
from tests.comparing import assert_same_bits
from tests.paging.test_paged import assert_same_state, parameters, step


def in_child(run: Callable[[], None]) -> Callable[[], None]:
    """Fork, and return a function that lets the child call ``run`` and waits for its end."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(writing)
            os.read(reading, 1)
            # The threads of OpenMP do not survive a fork; torch would wait for them.
            torch.set_num_threads(1)
            run()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(reading)

    def finish() -> None:
        os.write(writing, b"x")
        os.close(writing)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

    return finish


def paged_tensors(optimizer):
    return [tensor for state in optimizer.state.values() for tensor in state.values() if paging.is_paged(tensor)]


def trained(cls):
    optimizer = cls(parameters(), lr=1e-3)
    step(optimizer)
    return optimizer


def test_a_child_that_trains_leaves_its_parent_alone():
    optimizer, plain, sibling = trained(lion.PagedLion8bit), trained(lion.Lion8bit), trained(lion.Lion8bit)

    def train():
        for seed in (5, 6):
            step(optimizer, seed)
            step(plain, seed)
        assert_same_state(optimizer, plain)
        assert len(paged_tensors(optimizer)) == 2

    in_child(train)()
    assert_same_state(optimizer, sibling)
    step(optimizer, seed=7)
    step(sibling, seed=7)
    assert_same_state(optimizer, sibling)
    assert len(paged_tensors(optimizer)) == 2


def test_a_parent_that_trains_leaves_its_child_alone():
    optimizer, plain = trained(lion.PagedLion8bit), trained(lion.Lion8bit)
    saved = optimizer.state_dict()["state"]

    def compare():
        assert_same_state(optimizer, plain)
        for state, expected in zip(saved.values(), plain.state.values(), strict=True):
            for key in expected:
                assert_same_bits(state[key], expected[key])
        step(optimizer, seed=9)
        step(plain, seed=9)
        assert_same_state(optimizer, plain)

    finish = in_child(compare)
    for seed in (1, 2):
        step(optimizer, seed)
    finish()


def test_two_children():
    optimizer, plain = trained(lion.PagedLion), trained(lion.Lion)

    def train(seed):
        step(optimizer, seed)
        step(plain, seed)
        assert_same_state(optimizer, plain)

    first = in_child(lambda: train(1))
    second = in_child(lambda: train(2))
    first()
    second()
    train(3)


def test_a_child_that_stops_paging_leaves_its_parent_alone():
    optimizer, plain = trained(lion.PagedLion8bit), trained(lion.Lion8bit)

    def train():
        optimizer.param_groups[0]["is_paged"] = False
        step(optimizer, seed=5)
        assert not paged_tensors(optimizer)

    in_child(train)()
    assert_same_state(optimizer, plain)


def test_state_is_moved_once_for_many_forks():
    optimizer = trained(lion.PagedLion)
    state = next(iter(optimizer.state.values()))["state1"]
    step(optimizer)
    assert next(iter(optimizer.state.values()))["state1"] is state
    for _ in range(3):
        in_child(lambda: None)()
    step(optimizer)
    moved = next(iter(optimizer.state.values()))["state1"]
    assert moved is not state
    step(optimizer)
    assert next(iter(optimizer.state.values()))["state1"] is moved

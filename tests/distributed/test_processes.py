"""The harness itself: results come back, and whatever goes wrong in a process is told."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.distributed.processes import RankError, run


def gather(factor: int) -> tuple[int, torch.Tensor]:
    values = torch.tensor([factor * 2.0 ** dist.get_rank()])
    dist.all_reduce(values)
    return dist.get_rank(), values


def fail_in_one() -> None:
    if dist.get_rank() == 1:
        raise ValueError("only here")
    dist.barrier()


def die_in_one() -> None:
    if dist.get_rank() == 1:
        os._exit(3)
    dist.barrier()


def hang_in_one() -> None:
    if dist.get_rank() == 0:
        time.sleep(100)


@pytest.mark.parametrize("size", [1, 3])
def test_results(forking, size):
    assert run(forking, size, gather, 5) == [(rank, torch.tensor([5.0 * (2**size - 1)])) for rank in range(size)]


def test_a_failure_is_told_with_its_traceback(forking):
    with pytest.raises(
        RankError, match=r"^\n--- rank 1 of 2 ---\nTraceback[^$]*fail_in_one\n.*\nValueError: only here"
    ):
        run(forking, 2, fail_in_one)


def test_a_death_is_told(forking):
    with pytest.raises(RankError, match="--- rank 1 of 2 ---\nThe process died"):
        run(forking, 2, die_in_one)


def test_time_is_limited(forking):
    with pytest.raises(RankError, match=r"--- rank 0 of 2 ---\nTimeout(?s:(?!--- rank).)*in hang_in_one"):
        run(forking, 2, hang_in_one, time_limit=6.0)

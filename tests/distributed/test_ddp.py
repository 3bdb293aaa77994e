"""DistributedDataParallel: n processes end where one process on the whole batch ends, to the bit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tests.distributed.processes import run
from tests.distributed.support import FEATURES, OPTIONS, assert_same_training, make_model, train
from tests.optimizers.support import VARIANTS

MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "bucket_view": {"gradient_as_bucket_view": True},
    "static_graph": {"static_graph": True, "gradient_as_bucket_view": True},
    "small_buckets": {"bucket_cap_mb": 0.01},
}


def alone_and_wrapped(kwargs: dict[str, Any]) -> tuple[nn.Module, DistributedDataParallel]:
    alone = make_model()
    return alone, DistributedDataParallel(copy.deepcopy(alone), **kwargs)


def equals_one_process(kwargs: dict[str, Any], accumulate: int) -> None:
    for name, make in VARIANTS.items():
        alone, wrapped = alone_and_wrapped(kwargs)
        expected, optimizer = make(alone.parameters(), **OPTIONS), make(wrapped.parameters(), **OPTIONS)
        for step in range(4):
            train(alone, expected, range(step, step + 1), accumulate)
            train(wrapped, optimizer, range(step, step + 1), accumulate)
            assert len(optimizer.state) == 4
            assert_same_training(wrapped, optimizer, alone, expected, f"{name}, step {step}")


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("kwargs", MODES.values(), ids=MODES)
def test_equals_one_process(forking, kwargs, size):
    run(forking, size, equals_one_process, kwargs, 1)


def test_accumulation_without_synchronisation_equals_one_process(forking):
    run(forking, 2, equals_one_process, {}, 3)


class Branching(nn.Module):
    """A model that uses some of its parameters for some inputs only."""

    def __init__(self) -> None:
        super().__init__()
        self.main, self.branch = make_model(), make_model()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.main(inputs) + (self.branch(inputs) if inputs[0, 0] > 0 else 0)


def parameters_are_unused() -> None:
    used_by = [(0, 1), (0,), (), (1,), (0, 1)]  # the ranks whose inputs take the branch, by the step
    for name, make in VARIANTS.items():
        alone = Branching()
        wrapped = DistributedDataParallel(copy.deepcopy(alone), find_unused_parameters=True)
        expected, optimizer = make(alone.parameters(), **OPTIONS), make(wrapped.parameters(), **OPTIONS)
        for step, ranks in enumerate(used_by):
            parts = torch.ones(2, 4, FEATURES)
            for rank in {0, 1} - {*ranks}:
                parts[rank, 0, 0] = -1.0
            sum(alone(part).sum() for part in parts).backward()
            (2 * wrapped(parts[dist.get_rank()]).sum()).backward()
            assert (wrapped.module.branch[0].weight.grad is None) == (not ranks)
            for o in (expected, optimizer):
                o.step()
                o.zero_grad()
            assert_same_training(wrapped, optimizer, alone, expected, f"{name}, step {step}")


def test_parameters_that_some_or_all_ranks_leave_unused(forking):
    run(forking, 2, parameters_are_unused)


def saved_after(steps: int) -> dict[str, Any]:
    saved = {}
    for name, make in VARIANTS.items():
        model = DistributedDataParallel(make_model())
        optimizer = make(model.parameters(), **OPTIONS)
        train(model, optimizer, range(steps))
        saved[name] = {"model": model.module.state_dict(), "optimizer": optimizer.state_dict()}
    return saved


def resumes(saved: dict[str, Any], steps: int) -> None:
    for name, make in VARIANTS.items():
        alone, wrapped = alone_and_wrapped({})
        expected, optimizer = make(alone.parameters(), **OPTIONS), make(wrapped.parameters(), **{**OPTIONS, "lr": 1.0})
        train(alone, expected, range(steps + 3))
        wrapped.module.load_state_dict(saved[name]["model"])
        optimizer.load_state_dict(saved[name]["optimizer"])
        train(wrapped, optimizer, range(steps, steps + 3))
        assert_same_training(wrapped, optimizer, alone, expected, name)


@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 4), (4, 1), (1, 2)])
def test_resuming_on_another_number_of_processes(forking, before, after):
    saved = run(forking, before, saved_after, 3)
    run(forking, after, resumes, saved[-1], 3)

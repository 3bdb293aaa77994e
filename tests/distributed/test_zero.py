"""ZeroRedundancyOptimizer: parameters and consolidated state are those of the plain optimizer, to the bit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import lion
from lion._memory import paging
from lion._options import Kind
from lion._state import Form, adapting, layout
from tests.comparing import assert_same_bits
from tests.distributed.processes import run
from tests.distributed.support import OPTIONS, assert_same_state, make_model, train
from tests.optimizers.support import VARIANTS, Variant

both_views = pytest.mark.parametrize("bucket_view", [False, True], ids=["own_memory", "bucket_view"])


def zero(make: Variant, params: Any, bucket_view: bool = False, **kwargs: Any) -> ZeroRedundancyOptimizer:
    return ZeroRedundancyOptimizer(
        params, make.cls, parameters_as_bucket_view=bucket_view, **{**make.kwargs, **OPTIONS, **kwargs}
    )


def consolidated(optimizer: ZeroRedundancyOptimizer) -> dict[str, Any]:
    """Return the state of all ranks, on all ranks."""
    state = {}
    for rank in range(dist.get_world_size()):
        optimizer.consolidate_state_dict(to=rank)
        if rank == dist.get_rank():
            state = optimizer.state_dict()
    return state


def assert_equal(
    model: nn.Module, optimizer: ZeroRedundancyOptimizer, alone: nn.Module, expected: lion.Lion, what: str
) -> None:
    for (name, p), q in zip(model.named_parameters(), alone.parameters(), strict=True):
        assert_same_bits(p, q, what=f"{what} {name}")
    state, by = consolidated(optimizer), expected.state_dict()
    assert state["param_groups"] == by["param_groups"]
    assert state["state"].keys() == by["state"].keys()
    for key in by["state"]:
        assert_same_state(state["state"][key], by["state"][key], f"{what}, state {key}")


def equals_the_plain_optimizer(bucket_view: bool) -> None:
    for name, make in VARIANTS.items():
        alone = make_model()
        model = DistributedDataParallel(copy.deepcopy(alone), gradient_as_bucket_view=bucket_view)
        expected = make(alone.parameters(), **OPTIONS)
        optimizer = zero(make, model.parameters(), bucket_view)
        schedules = [torch.optim.lr_scheduler.StepLR(o, 2, 0.5) for o in (expected, optimizer)]
        for step in range(5):
            train(alone, expected, range(step, step + 1))
            train(model, optimizer, range(step, step + 1))
            for schedule in schedules:
                schedule.step()
            assert_equal(model, optimizer, alone, expected, f"{name}, step {step}")
        own = torch.tensor(len(optimizer.optim.state))
        dist.all_reduce(own)
        assert own == 4


@pytest.mark.parametrize(("size", "bucket_view"), [(1, False), (2, False), (2, True), (4, True)])
def test_equals_the_plain_optimizer(forking, size, bucket_view):
    run(forking, size, equals_the_plain_optimizer, bucket_view)


def one_parameter(bucket_view: bool) -> None:
    p, q = (nn.Parameter(torch.ones(5000)) for _ in range(2))
    optimizer, expected = zero(VARIANTS["Lion8bit"], [p], bucket_view), lion.Lion8bit([q], **OPTIONS)
    for step in range(3):
        p.grad, q.grad = (torch.arange(5000.0) - 2500.0 * step for _ in range(2))
        optimizer.step()
        expected.step()
    assert_same_bits(p, q)
    assert len(optimizer.optim.state) == (dist.get_rank() == 0)
    assert_same_state(consolidated(optimizer)["state"][0], expected.state[q], "")


@both_views
def test_ranks_without_parameters(forking, bucket_view):
    run(forking, 2, one_parameter, bucket_view)


def saved_after(steps: int) -> dict[str, Any]:
    saved = {}
    for name, make in VARIANTS.items():
        model = DistributedDataParallel(make_model())
        optimizer = zero(make, model.parameters())
        train(model, optimizer, range(steps))
        saved[name] = {"model": model.module.state_dict(), "optimizer": consolidated(optimizer)}
    return saved


def resumes(saved: dict[str, Any], steps: int, bucket_view: bool) -> None:
    """Go on by ZeroRedundancyOptimizer and by the plain optimizer, both from what the former saved."""
    for name, make in VARIANTS.items():
        uninterrupted, alone = make_model(), make_model()
        model = DistributedDataParallel(make_model())
        whole = make(uninterrupted.parameters(), **OPTIONS)
        plain, sharded = (
            make(alone.parameters(), lr=1.0, percentile_clipping=50),
            zero(make, model.parameters(), bucket_view, lr=1.0),
        )
        alone.load_state_dict(saved[name]["model"])
        model.module.load_state_dict(saved[name]["model"])
        plain.load_state_dict(saved[name]["optimizer"])
        sharded.load_state_dict(saved[name]["optimizer"])
        train(uninterrupted, whole, range(steps + 3))
        train(alone, plain, range(steps, steps + 3))
        train(model, sharded, range(steps, steps + 3))
        assert_equal(model, sharded, uninterrupted, whole, f"{name}, sharded")
        assert_equal(model, sharded, alone, plain, f"{name}, plain")
        for p, own in sharded.optim.state.items():
            assert paging.is_paged(own["state1"]) == ("Paged" in name and p.numel() > 100_000)


@pytest.mark.parametrize(("before", "after", "bucket_view"), [(2, 4, False), (4, 1, True), (1, 2, True)])
def test_resuming_on_another_number_of_processes(forking, before, after, bucket_view):
    saved = run(forking, before, saved_after, 3)
    run(forking, after, resumes, saved[-1], 3, bucket_view)


def test_a_step_that_loading_left_on_the_cpu_moves_to_the_parameter(monkeypatch):
    # The one other device that every machine has, without memory, is refused where a state is checked.
    for name in ("check", "check_memory"):
        monkeypatch.setattr(adapting, name, lambda *arguments: None)
    p, form = torch.empty(5, device="meta"), Form(Kind.FLOAT32, clipped=False, paged=False)
    loaded = {**layout.create(p, form), "step": torch.tensor(3.0)}
    assert adapting.adapted(loaded, p, form, "p")["step"].device == p.device


def overlap_is_refused() -> None:
    with pytest.raises(ValueError, match="no supported functional optimizer"):
        ZeroRedundancyOptimizer(make_model().parameters(), lion.Lion, overlap_with_ddp=True)


def test_overlap_with_ddp_is_refused_by_torch(forking):
    run(forking, 1, overlap_is_refused)

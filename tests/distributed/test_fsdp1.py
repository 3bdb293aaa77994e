"""FullyShardedDataParallel: 32-bit training has the bits of one process; what its shards do not allow is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

import lion
from tests.comparing import assert_same_bits
from tests.distributed.processes import run
from tests.distributed.support import assert_same_state, make_model, train
from tests.optimizers.support import assert_unchanged, snapshot

LR = 2.0**-4
CLASSES = (lion.Lion, lion.Lion32bit, lion.PagedLion, lion.PagedLion32bit)


def shard(model: nn.Module, **kwargs: Any) -> FullyShardedDataParallel:
    return FullyShardedDataParallel(
        copy.deepcopy(model), device_id=torch.device("cpu"), **{"use_orig_params": True, **kwargs}
    )


def assert_equal(
    model: FullyShardedDataParallel, optimizer: lion.Lion, alone: nn.Module, expected: lion.Lion, what: str
) -> None:
    with FullyShardedDataParallel.summon_full_params(model):
        for (name, p), q in zip(model.module.named_parameters(), alone.parameters(), strict=True):
            # FSDP resizes this memory, which torch does not allow once NumPy has seen it.
            assert_same_bits(p.clone(), q, what=f"{what} {name}")
    states = FullyShardedDataParallel.optim_state_dict(model, optimizer)["state"]
    for name, q in alone.named_parameters():
        assert_same_state(states[name], expected.state[q], f"{what} {name}")


def equals_one_process(kwargs: dict[str, Any]) -> None:
    for cls in CLASSES:
        alone = make_model()
        model = shard(alone, **kwargs)
        expected, optimizer = cls(alone.parameters(), lr=LR), cls(model.parameters(), lr=LR)
        for step in range(3):
            train(alone, expected, range(step, step + 1))
            train(model, optimizer, range(step, step + 1))
        assert_equal(model, optimizer, alone, expected, cls.__name__)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(
    "kwargs",
    [{}, {"sharding_strategy": ShardingStrategy.SHARD_GRAD_OP}, {"use_orig_params": False}],
    ids=["original_parameters", "gradients_only", "flat_parameters"],
)
def test_equals_one_process(forking, kwargs, size):
    run(forking, size, equals_one_process, kwargs)


def saved_after(steps: int) -> dict[str, Any]:
    model = shard(make_model())
    optimizer = lion.Lion(model.parameters(), lr=LR)
    train(model, optimizer, range(steps))
    states = FullyShardedDataParallel.optim_state_dict(model, optimizer)
    return {"model": model.state_dict(), "optimizer": states}


def resumes(saved: dict[str, Any], steps: int) -> None:
    alone, model = make_model(), shard(make_model())
    expected, optimizer = lion.Lion(alone.parameters(), lr=LR), lion.Lion(model.parameters())
    model.load_state_dict(saved["model"])
    states = FullyShardedDataParallel.optim_state_dict_to_load(model, optimizer, saved["optimizer"])
    optimizer.load_state_dict(states)
    train(alone, expected, range(steps + 3))
    train(model, optimizer, range(steps, steps + 3))
    assert_equal(model, optimizer, alone, expected, "")


@pytest.mark.parametrize(("before", "after"), [(2, 4), (4, 2)])
def test_resuming_on_another_number_of_processes(forking, before, after):
    saved = run(forking, before, saved_after, 3)
    run(forking, after, resumes, saved[0], 3)


def percentile_clipping_is_refused(kwargs: dict[str, Any]) -> None:
    model = shard(make_model(), **kwargs)
    optimizer = lion.Lion(model.parameters(), lr=LR)
    train(model, optimizer, range(1))
    optimizer.param_groups[0]["percentile_clipping"] = 99
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"Invalid percentile_clipping for parameter 0 of group 0: 99.*fully_shard"):
        optimizer.step()
    assert_unchanged(optimizer, before)


@pytest.mark.parametrize("use_orig_params", [True, False])
def test_percentile_clipping_is_refused(forking, use_orig_params):
    run(forking, 2, percentile_clipping_is_refused, {"use_orig_params": use_orig_params})


def eight_bits() -> None:
    whole, model = shard(make_model()), shard(make_model())
    expected, optimizer = (lion.Lion8bit(m.parameters(), lr=LR, min_8bit_size=0) for m in (whole, model))
    train(whole, expected, range(4))
    train(model, optimizer, range(2))
    with pytest.raises(AssertionError, match="torch.uint8"):
        FullyShardedDataParallel.optim_state_dict(model, optimizer)
    resumed = lion.Lion8bit(model.parameters(), min_8bit_size=0)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, resumed, range(2, 4))
    for (name, p), q in zip(model.named_parameters(), whole.parameters(), strict=True):
        assert_same_bits(p, q, what=name)
        assert_same_state(resumed.state.get(p, {}), expected.state.get(q, {}), name)


def test_eight_bits_resume_rank_by_rank_but_not_through_the_whole_state(forking):
    run(forking, 2, eight_bits)

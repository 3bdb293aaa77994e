"""16-bit weights in several processes: the bits of one process, however parameters are cut."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import lion
from lion import exchange
from lion._memory import sharding
from tests.comparing import assert_same_bits
from tests.distributed.processes import run
from tests.weights16.support import MASTERS, WAYS, bfloat16, gradients, take

OPTIONS = {"lr": 1e-4, "weight_decay": 0.1}
# Even and uneven over 2, 3 and 4 processes, not in groups of 8, with empty shards, and 0-dim.
SHAPES = ((64, 65), (7, 13), (5, 100), (1, 41), (3,), ())
STEPS = 4

MESHES: dict[str, tuple[tuple[int, ...], tuple[Placement, ...]]] = {
    "two": ((2,), (Shard(0),)),
    "four": ((4,), (Shard(0),)),
    "hybrid": ((2, 2), (Replicate(), Shard(0))),
    "rows_twice": ((2, 2), (Shard(0), Shard(0))),
    "columns": ((2,), (Shard(1),)),
    "both_dimensions": ((2, 2), (Shard(1), Shard(0))),
}


def sharded(values: Sequence[Tensor], shape: tuple[int, ...], placements: Sequence[Placement]) -> list[nn.Parameter]:
    """Return parameters cut as wanted; those of too few dimensions are replicated."""
    mesh, params = init_device_mesh("cpu", shape), []
    for value in values:
        own = [x if isinstance(x, Replicate) or value.ndim > x.dim else Replicate() for x in placements]
        params.append(nn.Parameter(distribute_tensor(value.detach().clone(), mesh, own)))
        params[-1].grad_dtype = torch.float32
    return params


def take_sharded(optimizer: torch.optim.Optimizer, params: Sequence[DTensor], steps: range) -> None:
    """Take the steps of :func:`take`, each process with its part of the gradients."""
    for step in steps:
        for p, g in zip(params, gradients(params, step), strict=True):
            p.grad = distribute_tensor(g, p.device_mesh, p.placements)
        optimizer.step()


def equals_one_process(shape: tuple[int, ...], placements: tuple[Placement, ...]) -> None:
    by_rows = all(isinstance(x, Replicate) or x.dim == 0 for x in placements)
    for name, way in WAYS.items():
        if name == "stochastic" and not by_rows:
            continue
        alone = [bfloat16(*size, seed=i) for i, size in enumerate(SHAPES)]
        expected = lion.Lion(alone, **way, **OPTIONS)
        params = sharded(alone, shape, placements)
        optimizer = lion.Lion(params, **way, **OPTIONS)
        for step in range(STEPS):
            take(expected, alone, [step])
            take_sharded(optimizer, params, range(step, step + 1))
            for number, (p, q) in enumerate(zip(params, alone, strict=True)):
                assert_same_bits(p.full_tensor(), q, what=f"{name}, step {step}, parameter {number}")
                low = optimizer.state[p].get("master_low")
                assert (low is None) == (name == "stochastic")
                if low is not None:
                    assert (low.placements, low.device_mesh) == (p.placements, p.device_mesh)
                    what = f"{name}, step {step}, lower part {number}"
                    assert low.dtype == expected.state[q]["master_low"].dtype
                    assert_same_bits(gathered(low), expected.state[q]["master_low"].int(), what=what)


def gathered(low: DTensor) -> Tensor:
    """Return lower parts whole, as int32: gloo and NCCL gather no int16."""
    return low.int().full_tensor()


@pytest.mark.parametrize(("shape", "placements"), MESHES.values(), ids=MESHES)
def test_shards_equal_one_process(forking, shape, placements):
    run(forking, int(np.prod(shape)), equals_one_process, shape, placements)


def first_elements() -> None:
    """Rows begin where they do in the whole; shards that are cut otherwise lie one after the other."""
    mesh = init_device_mesh("cpu", (2, 2))
    for placements in ([Shard(0), Shard(1)], [Shard(1), Shard(0)], [Shard(1), Shard(1)], [Shard(0), Shard(0)]):
        whole = torch.arange(7 * 13).view(7, 13)
        p = distribute_tensor(whole, mesh, placements)
        first, local = sharding.first_element(p), p.to_local()
        taken = [None] * 4
        dist.all_gather_object(taken, (list(range(first, first + local.numel()))))
        assert sorted(number for part in taken for number in part) == list(range(7 * 13))
        if placements == [Shard(0), Shard(0)] and local.numel():
            assert local.flatten().tolist() == list(range(first, first + local.numel()))
    assert sharding.first_element(whole) == 0


def other_cuts_are_reproducible() -> list[Tensor]:
    params = sharded([bfloat16(64, 65), bfloat16(65, 7, seed=1)], (2,), [Shard(1)])
    optimizer = lion.Lion8bit(params, **WAYS["stochastic"], **OPTIONS)
    take_sharded(optimizer, params, range(STEPS))
    first_elements_differ = {sharding.first_element(p) for p in params}
    assert (first_elements_differ == {0}) == (dist.get_rank() == 0)
    return [p.full_tensor().detach() for p in params]


def test_where_the_shards_begin(forking):
    run(forking, 4, first_elements)


def test_other_cuts_are_reproducible(forking):
    results = [run(forking, 2, other_cuts_are_reproducible)[0] for _ in range(2)]
    for one, two in zip(*results, strict=True):
        assert_same_bits(one, two)


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 67), nn.Tanh(), nn.Linear(67, 3)).bfloat16()


def set_gradients(model: nn.Module, step: int) -> None:
    """Give every parameter its part of the gradient that belongs to a step."""
    params = list(model.parameters())
    for p, g in zip(params, gradients(params, step), strict=True):
        # Of any dtype: torch.distributed.checkpoint makes state by gradients of the parameter's.
        p.grad_dtype = None
        # torch's distribute_tensor does not cut rows that are cut by tensor parallelism already.
        p.grad = sharding.laid_out_like(sharding.shard_of(g, p), p) if isinstance(p, DTensor) else g


def gathers(model: nn.Module, optimizer: lion.Lion, alone: nn.Module, expected: lion.Lion) -> None:
    """Gather the whole state, and load it without any sharding, by ``exp_avg`` too, and from the first process."""
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    way = {"master_weight_bits": expected.param_groups[0]["master_weight_bits"]}
    states = get_optimizer_state_dict(model, optimizer, options=whole)
    if dist.get_rank() == 0:
        kept = exchange.to_exp_avg(states, keep=["step", "master_low"])
        for loaded in (states, exchange.from_exp_avg(kept)):
            other = copy.deepcopy(alone)
            resumed = lion.Lion(other.parameters(), **way)
            set_optimizer_state_dict(other, resumed, loaded)
            for p, q in zip(other.parameters(), alone.parameters(), strict=True):
                assert_same_bits(resumed.state[p]["master_low"], expected.state[q]["master_low"])
    # torch makes no state to load into where there are gradients.
    optimizer.zero_grad()
    again = lion.Lion(model.parameters(), **way)
    from_first = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_optimizer_state_dict(model, again, states, options=from_first)
    for key, p in model.named_parameters():
        q = expected.state[alone.get_parameter(key)]["master_low"]
        assert again.state[p]["master_low"].dtype == q.dtype
        assert_same_bits(gathered(again.state[p]["master_low"]), q.int(), what=key)


def fsdp2_and_float32() -> None:
    """FSDP2, with rows cut by tensor parallelism too: the bits of one process, also of whole float32 weights."""
    tensors_too = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    for name, way in WAYS.items():
        for parallel in (False, True):
            alone = make_model()
            model = copy.deepcopy(alone)
            if parallel:
                parallelize_module(model, tensors_too["tensor"], {"0": ColwiseParallel()})
            fully_shard(model[2], mesh=tensors_too["data"])
            fully_shard(model, mesh=tensors_too["data"])
            expected = lion.Lion(alone.parameters(), **way, **OPTIONS)
            optimizer = lion.Lion(model.parameters(), **way, **OPTIONS)
            start = {key: value.float() + 1e-4 for key, value in alone.state_dict().items()}
            exchange.load_float32_state_dict(alone, expected, start)
            exchange.load_float32_state_dict(model, optimizer, start)
            for step in range(STEPS):
                set_gradients(alone, step)
                set_gradients(model, step)
                expected.step()
                optimizer.step()
            whole = exchange.float32_state_dict(alone, expected)
            parts = exchange.float32_state_dict(model, optimizer)
            assert list(parts) == list(whole)
            for key, value in whole.items():
                assert parts[key].placements == model.get_parameter(key).placements
                assert_same_bits(parts[key].full_tensor(), value, what=f"{name}, {parallel}, {key}")
            if not parallel and name in MASTERS:
                gathers(model, optimizer, alone, expected)
            # What was taken out in shards goes in again.
            again = lion.Lion(model.parameters(), **way)
            exchange.load_float32_state_dict(model, again, parts)
            for key, value in exchange.float32_state_dict(model, again).items():
                assert_same_bits(value.full_tensor(), whole[key], what=f"{name}, {parallel}, {key} again")


def test_fsdp2_and_float32_weights(forking):
    run(forking, 4, fsdp2_and_float32)


def saves(folder: str, cls: type[lion.Lion]) -> dict[str, Any]:
    """Train on a mesh, save, and return what the next process begins with."""
    weights = {}
    for name, way in WAYS.items():
        model = fully_shard(make_model())
        optimizer = cls(model.parameters(), **way, **OPTIONS)
        for step in range(2):
            set_gradients(model, step)
            optimizer.step()
        state = get_optimizer_state_dict(model, optimizer)
        dcp.save({"model": model.state_dict(), "optimizer": state}, checkpoint_id=f"{folder}/{name}")
        for step in range(2, 4):
            set_gradients(model, step)
            optimizer.step()
        weights[name] = {
            key: value.full_tensor() for key, value in exchange.float32_state_dict(model, optimizer).items()
        }
    return weights


def loads(folder: str, cls: type[lion.Lion], expected: dict[str, Any]) -> None:
    for name, way in WAYS.items():
        model = fully_shard(make_model())
        optimizer = cls(model.parameters(), **way)
        loaded = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
        dcp.load(loaded, checkpoint_id=f"{folder}/{name}")
        model.load_state_dict(loaded["model"])
        set_optimizer_state_dict(model, optimizer, loaded["optimizer"])
        for step in range(2, 4):
            set_gradients(model, step)
            optimizer.step()
        for key, value in exchange.float32_state_dict(model, optimizer).items():
            assert_same_bits(value.full_tensor(), expected[name][key], what=f"{name}, {key}")


@pytest.mark.parametrize(("cls", "before", "after"), [(lion.Lion, 2, 3), (lion.Lion, 3, 1), (lion.Lion8bit, 2, 2)])
def test_distributed_checkpoints_between_meshes(forking, tmp_path, cls, before, after):
    expected = run(forking, before, saves, str(tmp_path), cls)[0]
    run(forking, after, loads, str(tmp_path), cls, expected)


def ddp_and_zero() -> None:
    for name, way in WAYS.items():
        results = []
        for wrap in ("alone", "DDP", "ZeRO"):
            model = make_model() if wrap == "alone" else DistributedDataParallel(make_model())
            if wrap == "ZeRO":
                optimizer: Any = ZeroRedundancyOptimizer(model.parameters(), lion.Lion8bit, **way, **OPTIONS)
            else:
                optimizer = lion.Lion8bit(model.parameters(), **way, **OPTIONS)
            for step in range(STEPS):
                set_gradients(model, step)
                optimizer.step()
            if wrap == "ZeRO":
                optimizer.consolidate_state_dict(to=1)
                states = optimizer.state_dict()["state"] if dist.get_rank() == 1 else {}
            else:
                states = optimizer.state_dict()["state"]
            results.append(([p.detach() for p in model.parameters()], states))
        (expected, expected_states), *others = results
        # ZeRO's optimizers number the parameters of their own process.
        for params, states in others if name != "stochastic" else others[:1]:
            for p, q in zip(params, expected, strict=True):
                assert_same_bits(p, q, what=name)
            for number, state in states.items():
                for key, value in state.items():
                    assert_same_bits(value, expected_states[number][key], what=f"{name}, {number}, {key}")


def test_ddp_and_zero(forking):
    run(forking, 2, ddp_and_zero)


def whole_state_into_shards() -> None:
    for way in MASTERS.values():
        alone = [bfloat16(70, 65), bfloat16(5, seed=1)]
        expected = lion.Lion(alone, **way, **OPTIONS)
        take(expected, alone, range(2))
        params = sharded(alone, (2,), [Shard(0)])
        optimizer = lion.Lion(params, **way)
        optimizer.load_state_dict(expected.state_dict())
        take(expected, alone, range(2, 4))
        take_sharded(optimizer, params, range(2, 4))
        for p, q in zip(params, alone, strict=True):
            assert_same_bits(p.full_tensor(), q)
            assert_same_bits(gathered(optimizer.state[p]["master_low"]), expected.state[q]["master_low"].int())


def test_a_whole_state_loads_into_shards(forking):
    run(forking, 2, whole_state_into_shards)


def fsdp1_is_refused() -> None:
    model = FullyShardedDataParallel(make_model(), use_orig_params=True, device_id=torch.device("cpu"))
    optimizer = lion.Lion(model.parameters(), master_weight_bits=24)
    with pytest.raises(ValueError, match="does not hold the parameter .* itself"):
        exchange.load_float32_state_dict(model, optimizer, make_model().state_dict())


def test_float32_weights_of_fsdp1_are_refused(forking):
    run(forking, 2, fsdp1_is_refused)

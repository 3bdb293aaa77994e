"""Where processes have to do the same, though what they hold differs: none may wait for another in vain."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import lion
from lion._memory import sharding
from tests.comparing import assert_same_bits
from tests.distributed.processes import run


def sharded(value: Tensor, mesh: DeviceMesh) -> nn.Parameter:
    return nn.Parameter(distribute_tensor(value, mesh, [Shard(0)]))


def partial(p: Tensor, value: float, mesh: DeviceMesh) -> Any:
    """Return a gradient that each process has a part of."""
    return DTensor.from_local(torch.full(p.shape, value), mesh, [Partial()])


def gradients_are_summed_in_one_order() -> None:
    mesh = init_device_mesh("cpu", (2,))
    # The second one is large enough for paging on the first process only.
    params = [sharded(torch.ones(3, size), mesh) for size in (10, 50_000, 7)]
    optimizer = lion.PagedLion(params, betas=(0.9, 0.5))
    for step in range(3):
        for p, value in zip(params, (1.0, 2.0, 4.0), strict=True):
            p.grad = partial(p, value, mesh)
        if step == 1 and dist.get_rank() == 0:
            momentum = sharding.local(optimizer.state[params[0]]["state1"])
            momentum.data = momentum.clone()
        optimizer.step()
    for p, value in zip(params, (1.0, 2.0, 4.0), strict=True):
        momentum = sharding.local(optimizer.state[p]["state1"])
        assert_same_bits(momentum, torch.full_like(momentum, 2 * value * 0.875))


def absent_gradients_without_a_learning_rate() -> None:
    mesh = init_device_mesh("cpu", (2,))
    p = sharded(torch.ones(4, 4), mesh)
    optimizer = lion.Lion([p], lr=0.0, percentile_clipping=50)
    for _ in range(3):
        p.grad = None if dist.get_rank() else distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)], src_data_rank=None)
        optimizer.step()
    assert len(optimizer.state) == 1 - dist.get_rank()


def infinities_that_one_process_knows_of() -> None:
    mesh = init_device_mesh("cpu", (2,))
    first = nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Replicate()]))
    second = sharded(torch.ones(4, 4), mesh)
    optimizer = lion.Lion([first, second], percentile_clipping=50)
    for p in (first, second):
        p.grad = distribute_tensor(torch.ones(p.shape), mesh, p.placements)  # type: ignore[attr-defined]
    # torch looks for infinities over the dimensions of the mesh that its first gradient is sharded over.
    optimizer.found_inf = torch.tensor(1.0 - dist.get_rank())  # type: ignore[attr-defined]
    optimizer.step()
    assert all(state["step"] == dist.get_rank() for state in optimizer.state.values())


def fsdp1_scaler() -> None:
    torch.manual_seed(0)
    model = FullyShardedDataParallel(nn.Linear(8, 8, bias=False), use_orig_params=True, device_id=torch.device("cpu"))
    optimizer = lion.Lion(model.parameters(), lr=0.1)
    scaler = ShardedGradScaler(device="cpu", init_scale=4.0)
    scaler.scale(model(torch.ones(2, 8)).sum()).backward()
    for p in model.parameters():
        if dist.get_rank() == 0 and p.grad is not None:
            p.grad.view(-1)[0] = torch.inf
    before = [p.detach().clone() for p in model.parameters()]
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0
    assert all(map(torch.equal, before, model.parameters()))


def all_of_them() -> None:
    gradients_are_summed_in_one_order()
    absent_gradients_without_a_learning_rate()
    infinities_that_one_process_knows_of()
    fsdp1_scaler()


def test_processes_agree(forking):
    run(forking, 2, all_of_them)

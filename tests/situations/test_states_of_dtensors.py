"""What programs do to the states of ordinary parameters, done to those of DTensors, on a mesh of one process."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import lion
from lion._memory import sharding
from tests.comparing import assert_same_bits
from tests.optimizers.support import Variant, every_variant, parameter

OPTIONS: dict[str, Any] = {"min_8bit_size": 0, "percentile_clipping": 50, "lr": 1e-2}


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DeviceMesh]:
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


class Pair:
    """An optimizer of a DTensor and one of an ordinary parameter, which take the same steps."""

    def __init__(self, make: Variant, mesh: DeviceMesh, *shape: int) -> None:
        self.plain = parameter(*shape)
        self.sharded = nn.Parameter(distribute_tensor(self.plain.detach().clone(), mesh, [Shard(0)]))
        self.optimizers = make([self.sharded], **OPTIONS), make([self.plain], **OPTIONS)

    def step(self, seed: int) -> None:
        grad = torch.randn(self.plain.shape, generator=torch.Generator().manual_seed(seed))
        self.plain.grad = grad
        self.sharded.grad = distribute_tensor(grad, self.sharded.device_mesh, [Shard(0)])
        for optimizer in self.optimizers:
            optimizer.step()

    def states(self) -> list[dict[str, Any]]:
        return [next(iter(optimizer.state.values())) for optimizer in self.optimizers]

    def check(self) -> None:
        assert_same_bits(sharding.local(self.sharded), self.plain)
        sharded, plain = self.states()
        assert sharded.keys() == plain.keys()
        for key, value in plain.items():
            if isinstance(value, Tensor) and key != "mine":
                assert_same_bits(sharding.local(sharded[key]).reshape(value.shape), value, what=key)


@every_variant
def test_entries_of_a_program(make: Variant, mesh: DeviceMesh) -> None:
    """They stay from the time before the first step, through other forms and a checkpoint."""
    pair = Pair(make, mesh, 20, 31)
    for optimizer, p in zip(pair.optimizers, (pair.sharded, pair.plain), strict=True):
        optimizer.state[p].update(mine=p.detach().clone(), notes=["text"])
    for seed in range(2):
        pair.step(seed)
        pair.check()
    for optimizer in pair.optimizers:
        optimizer.param_groups[0].update(optim_bits=40 - make.bits)
    pair.step(2)
    pair.check()
    for optimizer in pair.optimizers:
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    pair.step(3)
    pair.check()
    sharded, plain = pair.states()
    assert isinstance(sharded["mine"], DTensor) and sharded["notes"] == ["text"]
    assert_same_bits(sharded["mine"].full_tensor(), plain["mine"])


@every_variant
def test_entries_of_a_checkpoint_that_is_whole(make: Variant, mesh: DeviceMesh) -> None:
    pair = Pair(make, mesh, 20, 31)
    pair.step(0)
    saved = copy.deepcopy(pair.optimizers[1].state_dict())
    saved["state"][0]["mine"] = torch.arange(3)
    for optimizer in pair.optimizers:
        optimizer.load_state_dict(saved)
    pair.step(1)
    pair.check()
    for state in pair.states():
        assert torch.equal(state["mine"], torch.arange(3))


@every_variant
def test_zeroed_state(make: Variant, mesh: DeviceMesh) -> None:
    pair, fresh = Pair(make, mesh, 20, 31), Pair(make, mesh, 20, 31)
    for seed in range(2):
        pair.step(seed)
    for state in pair.states():
        for value in state.values():
            value.zero_()
    with torch.no_grad():
        for p, q in ((fresh.plain, pair.plain), (fresh.sharded, pair.sharded)):
            sharding.local(p).copy_(sharding.local(q))
    for seed in range(2, 4):
        pair.step(seed)
        fresh.step(seed)
        pair.check()
        assert_same_bits(pair.plain, fresh.plain)


@every_variant
def test_inference_mode(make: Variant, mesh: DeviceMesh) -> None:
    pair = Pair(make, mesh, 20, 31)
    with torch.inference_mode():
        pair.step(0)
    pair.step(1)
    pair.check()
    with torch.inference_mode():
        for optimizer in pair.optimizers:
            for state in optimizer.state.values():
                state.update({key: value.clone() for key, value in state.items()})
    pair.step(2)
    pair.check()
    with torch.inference_mode():
        for optimizer in pair.optimizers:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    pair.step(3)
    pair.check()
    for state in pair.states():
        for value in state.values():
            assert not value.is_inference() and not sharding.local(value).is_inference()


def test_a_state_without_momentum_is_refused(mesh: DeviceMesh) -> None:
    p = nn.Parameter(distribute_tensor(torch.ones(20, 31), mesh, [Shard(0)]))
    optimizer = lion.Lion8bit([p], **OPTIONS)
    p.grad = torch.ones_like(p)
    optimizer.step()
    del optimizer.state[p]["state1"]
    optimizer.state[p] = dict(optimizer.state[p])
    with pytest.raises(ValueError, match="parameter 0 of group 0: the key 'state1' is missing"):
        optimizer.step()
    with pytest.raises(ValueError, match="parameter 0 of group 0"):
        optimizer.load_state_dict(optimizer.state_dict())

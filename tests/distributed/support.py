"""What the distributed tests share: a training whose gradients are exact, and the comparison of two trainings."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard

from tests.comparing import assert_same_bits

FEATURES, OUTPUTS, BATCH = 320, 16, 16
OPTIONS = {"lr": 2.0**-4, "percentile_clipping": 50, "min_8bit_size": 4096}


def make_model() -> nn.Sequential:
    """Return a model with parameters that are large enough for paging, large enough for 8 bits, and small.

    Parameters are small multiples of 1/8, as long as the learning rate is a power of two and nothing decays, so that
    forward and backward passes are exact in float32: their order, and where a batch is cut, does not matter.
    """
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.ReLU(), nn.Linear(FEATURES, OUTPUTS))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randint(-4, 5, p.shape, generator=generator) / 8)
    return model


def loss_of(model: nn.Module, step: int, rank: int = 0, size: int = 1) -> Tensor:
    """Return the mean loss of a rank's part of the batch of a step."""
    generator = torch.Generator().manual_seed(100 + step)
    inputs = torch.randint(-1, 2, (BATCH, FEATURES), generator=generator).float()
    targets = torch.randint(-1, 2, (BATCH, OUTPUTS), generator=generator).float()
    part = slice(rank * BATCH // size, (rank + 1) * BATCH // size)
    # Gradients of very different norms, for percentile clipping.
    return (model(inputs[part]) * targets[part]).sum() * (size * 4.0 ** (step % 3) / BATCH)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, accumulate: int = 1) -> None:
    """Take steps, each on this rank's part of the batches of ``accumulate`` consecutive numbers."""
    wrapped = isinstance(model, (nn.parallel.DistributedDataParallel, FullyShardedDataParallel, FSDPModule))
    rank, size = (dist.get_rank(), dist.get_world_size()) if wrapped else (0, 1)
    for step in steps:
        for i in range(accumulate):
            with model.no_sync() if wrapped and i < accumulate - 1 else nullcontext():
                loss_of(model, step * accumulate + i, rank, size).backward()
        optimizer.step()
        optimizer.zero_grad()


def assert_same_training(
    model: nn.Module, optimizer: torch.optim.Optimizer, expected: nn.Module, by: torch.optim.Optimizer, what: str
) -> None:
    """Fail unless parameters and everything that the optimizers keep about them have the same bits."""
    for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert_same_bits(p, q, what=f"{what} {name}")
        assert_same_state(optimizer.state[p], by.state[q], f"{what} {name}")


def assert_same_state(state: Mapping[str, Any], expected: Mapping[str, Any], what: str) -> None:
    """Fail unless two states of a parameter have the same keys and bits."""
    assert state.keys() == expected.keys(), what
    for key in state:
        assert_same_bits(state[key], expected[key], what=f"{what} {key}")


class Net(nn.Module):
    """Layers whose parameters are cut unevenly, or are empty on some processes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(80, 67), nn.GELU(), nn.Linear(67, 3), nn.GELU(), nn.Linear(3, 1700))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layers(inputs)


def data_mesh(shape: tuple[int, ...]) -> DeviceMesh:
    """Return a mesh that FSDP2 shards over, and replicates over if it has two dimensions."""
    return init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])


def shard_layers(model: Net, mesh: DeviceMesh, **policy: Any) -> Net:
    """Return the model after FSDP2 has sharded each of its layers, and the rest."""
    for layer in model.layers[::2]:
        fully_shard(layer, mesh=mesh, **policy)
    return fully_shard(model, mesh=mesh, **policy)

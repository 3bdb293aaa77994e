"""FSDP2 and other DTensors: every shard moves as the reference moves it, by what all shards together say."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import lion
from lion import reference
from lion._memory import paging, sharding
from tests.comparing import assert_same_bits, to_numpy
from tests.distributed.processes import run
from tests.distributed.support import OPTIONS, Net, assert_same_state, data_mesh, make_model, shard_layers, train
from tests.optimizers.support import DTYPES, VARIANTS, ByHand, Variant, parameter
from tests.strategies import make_floats

# Over 2, 3 and 4 processes: even, uneven, with empty shards, empty, 0-dim; some are large only as a whole.
SHAPES = ((64, 65), (7, 700), (5, 1000), (1, 4097), (3,), (0, 5), ())
RECIPES = ("gradients", "outlier", "mixed", "gradients")


def shard_parameters(params: Sequence[Tensor], mesh: DeviceMesh, placements: Sequence[Placement]) -> list[nn.Parameter]:
    """Return parameters sharded as wanted; those of too few dimensions are replicated."""
    sharded = []
    for p in params:
        own = [x if isinstance(x, Replicate) or p.ndim > x.dim else Replicate() for x in placements]
        sharded.append(nn.Parameter(distribute_tensor(p.detach(), mesh, own)))
    return sharded


class Shards:
    """Parameters, and the reference's copies of this process's shards.

    Args:
        make: The optimizer's class and options.
        params: DTensors.
        kwargs: More options.
    """

    def __init__(self, make: Variant, params: Sequence[DTensor], **kwargs: Any) -> None:
        self.params = params
        self.percentile = kwargs.get("percentile_clipping", 100)
        self.optimizer = make(params, **kwargs)
        min_8bit_size = {**OPTIONS, **kwargs}["min_8bit_size"]
        self.copies = []
        for p in params:
            # The reference's copy sees the shard; which precision it has follows from the whole.
            size = 0 if p.numel() >= min_8bit_size else p.numel() + 1
            self.copies.append(ByHand.of(make, p.to_local(), **{**kwargs, "min_8bit_size": size}))

    def set_gradients(self, grads: Sequence[Tensor]) -> None:
        """Give every parameter its part of a whole gradient."""
        for p, full in zip(self.params, grads, strict=True):
            p.grad = distribute_tensor(full, p.device_mesh, p.placements)

    def step(self, what: str) -> None:
        """Take a step, by the optimizer and by hand, and compare."""
        self.move_copies()
        self.optimizer.step()
        self.check_all(what)

    def move_copies(self) -> None:
        """Take a step by hand."""
        group = self.optimizer.param_groups[0]
        hyperparameters = group["lr"], group["betas"], group["weight_decay"]
        for p, copy_ in zip(self.params, self.copies, strict=True):
            norm = self.squared_norm(p) if self.percentile < 100 else None
            if p.grad is not None:
                copy_.step(p.grad.to_local(), *hyperparameters, squared_norm=norm)

    def check_all(self, what: str) -> None:
        """Fail unless all shards and their states are those of the copies."""
        for number, (p, copy_) in enumerate(zip(self.params, self.copies, strict=True)):
            self.check(p, copy_, f"{what}, parameter {number}")

    @staticmethod
    def squared_norm(p: DTensor) -> np.float32:
        """Return the sum, in float64 and rounded once, of the squared norms of the shards that have a gradient."""
        own = reference.squared_norm(to_numpy(p.grad.to_local())) if p.grad is not None else 0.0
        sums = torch.tensor([own], dtype=torch.float64)
        for i, placement in enumerate(p.placements):
            if not placement.is_replicate():
                dist.all_reduce(sums, group=p.device_mesh.get_group(i))
        with np.errstate(over="ignore"):
            return np.float32(sums.numpy()[0])

    def check(self, p: DTensor, copy_: ByHand, what: str) -> None:
        assert_same_bits(p.to_local().clone(), copy_.param, what=f"{what} param")
        state = self.optimizer.state.get(p, {})
        if not copy_.steps:
            assert not state
            return
        expected = copy_.expected_state()
        assert_same_layout(state, p, what)
        local = {key: value.to_local() if isinstance(value, DTensor) else value for key, value in state.items()}
        if "new_max1" in local:
            assert_same_bits(local.pop("new_max1"), local["max1"], what=what)
        if "absmax1" in local:
            blocks = expected["absmax1"].size
            row = local["absmax1"].reshape(-1)
            assert not row[blocks:].any()
            local["absmax1"] = row[:blocks]
        if "max1" in local:
            local["max1"] = local["max1"].reshape(-1)
        assert_same_state(local, expected, what)


def assert_same_layout(state: dict[str, Any], p: DTensor, what: str) -> None:
    """Fail unless momentum is laid out like the parameter, and what is kept for blocks can be told apart by shard."""
    momentum = state["state1"]
    assert (momentum.shape, momentum.placements, momentum.device_mesh) == (p.shape, p.placements, p.device_mesh), what
    assert momentum.stride() == torch.empty(p.shape, device="meta").stride(), what
    grid, largest = [1] * p.ndim, list(p.shape)
    for i, placement in enumerate(p.placements):
        if not placement.is_replicate():
            grid[placement.dim] *= p.device_mesh.size(i)
            largest[placement.dim] = -(-largest[placement.dim] // p.device_mesh.size(i))
    if "absmax1" in state:
        assert state["absmax1"].shape[-1] == -(-int(np.prod(largest)) // 256), what
    for key in ("absmax1", "max1", "new_max1"):
        if key in state:
            assert (list(state[key].shape[:-1]), state[key].placements) == (grid, p.placements), what
    for key in ("step", "gnorm_vec", "qmap1"):
        assert not isinstance(state.get(key), DTensor), what


def gradients(step: int, dtype: torch.dtype) -> list[Tensor]:
    name = str(dtype).removeprefix("torch.")
    flat = [make_floats(RECIPES[step], name, int(np.prod(shape)), 10 * step + i) for i, shape in enumerate(SHAPES)]
    # torch cannot read ml_dtypes' bfloat16.
    return [
        (torch.from_numpy(g.view(np.int16)).view(dtype) if g.dtype.itemsize == 2 else torch.from_numpy(g)).view(shape)
        for g, shape in zip(flat, SHAPES, strict=True)
    ]


MESHES: dict[str, tuple[tuple[int, ...], tuple[Placement, ...]]] = {
    "two": ((2,), (Shard(0),)),
    "three": ((3,), (Shard(0),)),
    "four": ((4,), (Shard(0),)),
    "columns": ((3,), (Shard(1),)),
    "replicated": ((2,), (Replicate(),)),
    "hybrid": ((2, 2), (Replicate(), Shard(0))),
    "rows_twice": ((2, 2), (Shard(0), Shard(0))),
    "both_dimensions": ((2, 2), (Shard(0), Shard(1))),
}


def equals_the_reference(shape: tuple[int, ...], placements: tuple[Placement, ...], thorough: bool) -> None:
    mesh = init_device_mesh("cpu", shape)
    for number, (name, make) in enumerate(VARIANTS.items()):
        for percentile in (100, 50) if thorough else ((100, 50)[number % 2],):
            dtype = DTYPES[(number + percentile) % 3]
            values = [parameter(*shape, dtype=dtype, seed=i) for i, shape in enumerate(SHAPES)]
            params = shard_parameters(values, mesh, placements)
            shards = Shards(make, params, lr=1e-2, weight_decay=0.1, percentile_clipping=percentile)
            for step in range(len(RECIPES)):
                what = f"{name}, {dtype}, percentile {percentile}, step {step}"
                shards.set_gradients(gradients(step, dtype))
                shards.step(what)


@pytest.mark.parametrize("thorough", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize(("shape", "placements"), MESHES.values(), ids=MESHES)
def test_every_shard_equals_the_reference(forking, shape, placements, thorough):
    run(forking, int(np.prod(shape)), equals_the_reference, shape, placements, thorough)


def gradients_are_absent() -> None:
    """Every process lacks the gradients of other parameters, and all take part in the sums of norms."""
    mesh, rank = init_device_mesh("cpu", (3,)), dist.get_rank()
    params = shard_parameters([parameter(*shape) for shape in SHAPES], mesh, [Shard(0)])
    for make in (VARIANTS["Lion"], VARIANTS["Lion8bit"]):
        shards = Shards(make, params, lr=1e-2, percentile_clipping=50)
        for step in range(5):
            shards.set_gradients([g * 4.0 ** (step % 3) for g in gradients(0, torch.float32)])
            for number, p in enumerate(params):
                if (number + step) % 4 == rank or step == 3:
                    p.grad = None
            shards.step(f"{make.cls.__name__}, step {step}")


def test_gradients_that_are_absent_on_some_processes(forking):
    run(forking, 3, gradients_are_absent)


def gradients_laid_out_otherwise() -> None:
    mesh = init_device_mesh("cpu", (2,))
    whole = torch.arange(60.0).view(6, 10) - 30
    layouts = {
        "replicated": lambda: distribute_tensor(whole, mesh, [Replicate()]),
        "other dimension": lambda: distribute_tensor(whole, mesh, [Shard(1)]),
        "not summed": lambda: DTensor.from_local(whole * (0.25 if dist.get_rank() else 0.75), mesh, [Partial()]),
    }
    [p] = shard_parameters([torch.ones(6, 10)], mesh, [Shard(0)])
    shards = Shards(VARIANTS["Lion"], [p])
    for name, gradient in layouts.items():
        shards.set_gradients([whole])
        shards.move_copies()
        p.grad = gradient()
        shards.optimizer.step()
        shards.check_all(name)


def test_gradients_laid_out_otherwise(forking):
    run(forking, 2, gradients_laid_out_otherwise)


def paged_by_the_shard() -> None:
    mesh = init_device_mesh("cpu", (2,))
    [p] = shard_parameters([parameter(199_999)], mesh, [Shard(0)])
    for name in ("PagedLion", "PagedLion8bit"):
        shards = Shards(VARIANTS[name], [p])
        for step in range(2):
            shards.set_gradients([torch.full((199_999,), float(step))])
            shards.step(name)
        assert paging.is_paged(sharding.local(shards.optimizer.state[p]["state1"])) == (dist.get_rank() == 0)


def test_paging_follows_the_size_of_the_shard(forking):
    run(forking, 2, paged_by_the_shard)


def backward(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
    (model(torch.randn(4, 80, generator=generator)).square().mean() * 4.0 ** (step % 3)).backward()


POLICIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "kept_after_forward": {"reshard_after_forward": False},
    "offloaded": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
    "mixed_precision": {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)},
}


def training_equals_the_reference(policy: str, mesh_shape: tuple[int, ...], percentile: int) -> None:
    for name, make in VARIANTS.items():
        model = shard_layers(Net(), data_mesh(mesh_shape), **POLICIES[policy])
        shards = Shards(make, list(model.parameters()), lr=1e-2, weight_decay=0.1, percentile_clipping=percentile)
        for step in range(4):
            backward(model, step)
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            shards.step(f"{name}, step {step}")
            shards.optimizer.zero_grad()


@pytest.mark.parametrize(
    ("policy", "mesh_shape", "percentile"),
    [
        ("plain", (2,), 100),
        ("plain", (4,), 50),
        ("plain", (2, 2), 99),
        ("kept_after_forward", (3,), 50),
        ("offloaded", (2,), 50),
        ("mixed_precision", (2,), 50),
    ],
)
def test_training_equals_the_reference(forking, policy, mesh_shape, percentile):
    run(forking, int(np.prod(mesh_shape)), training_equals_the_reference, policy, mesh_shape, percentile)


def tensor_parallel_too() -> None:
    """Rows are cut over one dimension of the mesh by tensor parallelism, and those shards over the other by FSDP2."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    for name, make in VARIANTS.items():
        model = parallelize_module(
            Net(), mesh["tensor"], {"layers.0": ColwiseParallel(), "layers.2": RowwiseParallel()}
        )
        fully_shard(model, mesh=mesh["data"])
        shards = Shards(make, list(model.parameters()), lr=1e-2, percentile_clipping=50)
        for step in range(3):
            for p in model.parameters():
                p.grad = torch.ones_like(p) * 4.0**step
                sharding.local(p.grad).mul_(1.0 + dist.get_rank())
            shards.step(f"{name}, step {step}")


def test_tensor_parallelism_too(forking):
    run(forking, 4, tensor_parallel_too)


def equals_one_process(mesh_shape: tuple[int, ...]) -> None:
    mesh = data_mesh(mesh_shape)
    for cls in (lion.Lion, lion.Lion32bit, lion.PagedLion, lion.PagedLion32bit):
        alone = make_model()
        model = copy.deepcopy(alone)
        for module in (model[0], model[2], model):
            fully_shard(module, mesh=mesh)
        expected, optimizer = (cls(m.parameters(), lr=2.0**-4) for m in (alone, model))
        for step in range(4):
            train(alone, expected, range(step, step + 1))
            train(model, optimizer, range(step, step + 1))
            for (name, p), q in zip(model.named_parameters(), alone.parameters(), strict=True):
                assert_same_bits(p.full_tensor(), q, what=f"{cls.__name__}, step {step}, {name}")
                state = {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in optimizer.state[p].items()}
                assert_same_state(state, expected.state[q], f"{cls.__name__}, step {step}, {name}")


@pytest.mark.parametrize("mesh_shape", [(2,), (4,), (2, 2)])
def test_32_bits_equal_one_process(forking, mesh_shape):
    run(forking, int(np.prod(mesh_shape)), equals_one_process, mesh_shape)


def plain_parameters_too() -> None:
    mesh = init_device_mesh("cpu", (2,))
    for make in VARIANTS.values():
        values = [parameter(5000, seed=i) for i in range(2)]
        by_hand = ByHand.of(make, values[1], percentile_clipping=50)
        shards = Shards(make, shard_parameters(values[:1], mesh, [Shard(0)]), percentile_clipping=50)
        shards.optimizer.add_param_group({"params": [values[1]]})
        for step in range(3):
            values[1].grad = torch.full((5000,), 4.0**step)
            shards.set_gradients([torch.full((5000,), 2.0**step)])
            by_hand.step(values[1].grad)
            shards.step(f"step {step}")
            by_hand.check(values[1], shards.optimizer, f"step {step}")


def test_plain_parameters_beside_sharded_ones(forking):
    run(forking, 2, plain_parameters_too)


def scaled_losses() -> None:
    mesh = init_device_mesh("cpu", (2,))
    for make in (VARIANTS["Lion"], VARIANTS["Lion8bit"]):
        params = shard_parameters([parameter(70, 70), parameter(1, 10)], mesh, [Shard(0)])
        shards = Shards(make, params, percentile_clipping=50)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for step in range(4):
            scaler.scale(torch.ones(()))
            grads = [torch.full((70, 70), 0.25 * 4.0**step), torch.ones(1, 10)]
            shards.set_gradients([g * scaler.get_scale() for g in grads])
            if step == 2:
                # On one process alone; none of them may move.
                sharding.local(params[0].grad)[0, 0] = float("inf") if dist.get_rank() else 1.0
            else:
                scaled = [p.grad for p in params]
                shards.set_gradients(grads)
                shards.move_copies()
                for p, grad in zip(params, scaled, strict=True):
                    p.grad = grad
            scaler.step(shards.optimizer)
            scaler.update()
            shards.check_all(f"{make.cls.__name__}, step {step}")


def test_scaled_losses(forking):
    run(forking, 2, scaled_losses)

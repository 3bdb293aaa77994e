"""Distributed checkpoints: saved by n processes and loaded by m, exactly or by a float32 export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from lion import Lion, exchange, reference
from lion._memory import sharding
from lion._state import momentum
from tests.comparing import assert_same_bits, to_numpy
from tests.distributed.processes import run
from tests.distributed.support import Net, assert_same_state, data_mesh, shard_layers
from tests.optimizers.support import QMAP, VARIANTS, Variant

SIZES = (1, 2, 3, 4)
LAYOUTS = {
    "sharded": StateDictOptions(),
    "flattened": StateDictOptions(flatten_optimizer_state_dict=True),
    "on_cpu": StateDictOptions(cpu_offload=True),
}
# A share of a block's absmax: half of the widest gap between values of the map, or what -1 lacks to the lowest one, and
# the roundings of a reciprocal and two products.
ERROR_BOUND = max(np.diff(QMAP.astype(np.float64)).max() / 2, 1.0 + QMAP[0]) + 3 * 2.0**-24
KEPT = ("step", "gnorm_vec")
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
THIRTY_TWO_BITS = {name: make for name, make in VARIANTS.items() if make.bits == 32}
EIGHT_BITS = {name: make for name, make in VARIANTS.items() if make.bits == 8}
# Classes that keep the same state in other memory, or get their options in another way, are left to the long run.
few_or_all = pytest.mark.parametrize("all_classes", [False, pytest.param(True, marks=pytest.mark.exhaustive)])


def sharded(shape: tuple[int, ...] | None = None) -> Net:
    return shard_layers(Net(), data_mesh(shape or (dist.get_world_size(),)))


def optimizer_of(make: Variant, model: nn.Module, **kwargs: Any) -> Lion:
    return make(model.parameters(), **{"lr": 1e-3, "weight_decay": 0.1, **kwargs})


def train(model: nn.Module, optimizer: Lion, steps: range) -> None:
    """Take steps whose gradients do not depend on how many processes there are."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p in model.parameters():
            grad = torch.randn(p.shape, generator=generator) * 10.0 ** (step % 3 - 2)
            p.grad = distribute_tensor(grad, p.device_mesh, p.placements) if isinstance(p, DTensor) else grad
        optimizer.step()
        optimizer.zero_grad()


def whole(values: dict[str, Any]) -> dict[str, Any]:
    return {key: v.full_tensor() if isinstance(v, DTensor) else v for key, v in values.items()}


def local(values: dict[str, Any]) -> dict[str, Any]:
    return {key: v.to_local() if isinstance(v, DTensor) else v for key, v in values.items()}


def assert_same_parts(model: nn.Module, optimizer: Lion, expected: nn.Module, by: Lion, what: str) -> None:
    """Fail unless this process holds the same shards and states."""
    for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert_same_bits(p.to_local(), q.to_local(), what=f"{what} {name}")
        assert_same_state(local(optimizer.state[p]), local(by.state[q]), f"{what} {name}")


def assert_same_whole(model: nn.Module, optimizer: Lion, alone: nn.Module, by: Lion, what: str) -> None:
    """Fail unless parameters and states, put together, are those of one process."""
    for (name, p), q in zip(model.named_parameters(), alone.parameters(), strict=True):
        assert_same_bits(p.full_tensor(), q, what=f"{what} {name}")
        assert_same_state(whole(optimizer.state[p]), by.state[q], f"{what} {name}")


def states_of(model: nn.Module, optimizer: Lion, options: StateDictOptions) -> dict[str, Any]:
    return {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
    }


def save(folder: Path, shape: tuple[int, ...] | None, names: list[str], kwargs: dict[str, Any]) -> None:
    """Train, and save in every layout."""
    for name in names:
        model = sharded(shape)
        optimizer = optimizer_of(VARIANTS[name], model, **kwargs)
        train(model, optimizer, range(3))
        for layout, options in LAYOUTS.items():
            states = states_of(model, optimizer, options)
            dcp.save(states, checkpoint_id=folder / f"{name}-{layout}")


def load(folder: Path, name: str, layout: str, model: nn.Module, optimizer: Lion) -> None:
    options = LAYOUTS[layout]
    states = states_of(model, optimizer, options)
    dcp.load(states, checkpoint_id=folder / f"{name}-{layout}")
    set_model_state_dict(model, states["model"])
    set_optimizer_state_dict(model, optimizer, states["optimizer"], options=options)


def resumes_exactly(folders: list[Path], names: list[str]) -> None:
    for name in names:
        alone = Net()
        expected = optimizer_of(VARIANTS[name], alone)
        train(alone, expected, range(5))
        for folder in folders:
            for layout in LAYOUTS if folder is folders[1] else ["sharded"]:
                model = sharded()
                optimizer = optimizer_of(VARIANTS[name], model, lr=1.0)
                load(folder, name, layout, model, optimizer)
                train(model, optimizer, range(3, 5))
                assert_same_whole(model, optimizer, alone, expected, f"{name}, {layout}, {folder.name}")


@few_or_all
def test_32_bits_on_any_number_of_processes(forking, tmp_path, all_classes):
    names = list(THIRTY_TWO_BITS) if all_classes else ["PagedLion"]
    folders = [tmp_path / str(size) for size in SIZES]
    for size, folder in zip(SIZES, folders, strict=True):
        run(forking, size, save, folder, None, names, {})
    for size in SIZES:
        run(forking, size, resumes_exactly, folders, names)


def resumes_on_the_same_shards(folder: Path, shape: tuple[int, ...], names: list[str]) -> None:
    for name in names:
        for layout in LAYOUTS:
            expected_model, model = sharded(shape), sharded(shape)
            expected = optimizer_of(VARIANTS[name], expected_model, percentile_clipping=50)
            train(expected_model, expected, range(5))
            optimizer = optimizer_of(VARIANTS[name], model, lr=1.0, percentile_clipping=50)
            load(folder, name, layout, model, optimizer)
            train(model, optimizer, range(3, 5))
            assert_same_parts(model, optimizer, expected_model, expected, f"{name}, {layout}")


@few_or_all
@pytest.mark.parametrize(
    ("before", "after"), [((1,), (1,)), ((3,), (3,)), ((2, 2), (2, 2)), ((2, 2), (2,)), ((2,), (2, 2))]
)
def test_8_bits_on_the_same_shards(forking, tmp_path, before, after, all_classes):
    names = list(EIGHT_BITS) if all_classes else ["Lion8bit", "PagedLion8bit-tensorwise"]
    kwargs = {"percentile_clipping": 50}
    run(forking, int(np.prod(before)), save, tmp_path, before, names, kwargs)
    run(forking, int(np.prod(after)), resumes_on_the_same_shards, tmp_path, after, names)


def refuses_other_shards(folder: Path) -> None:
    """A checkpoint that was saved by another number of processes does not fit, and changes nothing."""
    for name in EIGHT_BITS:
        model = sharded()
        optimizer = optimizer_of(VARIANTS[name], model)
        before = [{key: value.clone() for key, value in local(s).items()} for s in optimizer.state.values()]
        with pytest.raises(CheckpointException, match="Size mismatch"):
            load(folder, name, "sharded", model, optimizer)
        after = [local(s) for s in optimizer.state.values()]
        for state_before, state_after in zip(before, after[: len(before)], strict=True):
            assert_same_state(state_after, state_before, name)


def test_8_bits_of_other_shards_are_refused(forking, tmp_path):
    run(forking, 2, save, tmp_path, (2,), list(EIGHT_BITS), {})
    run(forking, 3, refuses_other_shards, tmp_path)


def cut(dimension: int) -> tuple[nn.Module, Lion]:
    """Return a square matrix that is cut along a dimension, and its optimizer."""
    torch.manual_seed(0)
    model = nn.Linear(64, 64, bias=False)
    mesh = data_mesh((dist.get_world_size(),))
    model.weight = nn.Parameter(distribute_tensor(model.weight.detach(), mesh, [Shard(dimension)]))
    return model, optimizer_of(VARIANTS["Lion8bit"], model)


def saved_by_rows_and_loaded_by_columns(folder: Path) -> None:
    """Both have as many shards with as many blocks."""
    model, optimizer = cut(0)
    train(model, optimizer, range(3))
    dcp.save(get_optimizer_state_dict(model, optimizer), checkpoint_id=folder)
    model, optimizer = cut(1)
    with pytest.raises(CheckpointException, match="Size mismatch"):
        dcp.load(get_optimizer_state_dict(model, optimizer), checkpoint_id=folder)


def test_8_bits_of_shards_along_another_dimension_are_refused(forking, tmp_path):
    run(forking, 2, saved_by_rows_and_loaded_by_columns, tmp_path)


def export(folder: Path, name: str) -> list[dict[str, torch.Tensor]]:
    """Save momentum as float32, and return it whole."""
    model = sharded()
    optimizer = optimizer_of(VARIANTS[name], model, percentile_clipping=50)
    train(model, optimizer, range(3))
    states = states_of(model, optimizer, StateDictOptions())
    states["optimizer"] = exchange.to_exp_avg(states["optimizer"], keep=KEPT)
    for p, saved in zip(model.parameters(), states["optimizer"]["state"].values(), strict=True):
        assert (saved["exp_avg"].shape, saved["exp_avg"].dtype) == (p.shape, torch.float32)
    dcp.save(states, checkpoint_id=folder)
    return [whole(saved) for saved in states["optimizer"]["state"].values()]


def imports(folder: Path, name: str, exported: list[dict[str, torch.Tensor]]) -> None:
    model = sharded()
    optimizer = optimizer_of(VARIANTS[name], model, lr=1.0, percentile_clipping=50)
    states = states_of(model, optimizer, StateDictOptions())
    states["optimizer"] = exchange.to_exp_avg(states["optimizer"], keep=KEPT)
    dcp.load(states, checkpoint_id=folder)
    set_model_state_dict(model, states["model"])
    set_optimizer_state_dict(model, optimizer, exchange.from_exp_avg(states["optimizer"]))
    assert optimizer.param_groups[0]["lr"] == 1e-3
    for number, (p, saved) in enumerate(zip(model.parameters(), exported, strict=True)):
        own, what = optimizer.state[p], f"{name}, parameter {number}"
        for key in KEPT:
            assert_same_bits(own[key], saved[key], what=f"{what}, {key}")
        shard = distribute_tensor(saved["exp_avg"], p.device_mesh, p.placements).to_local()
        if own["state1"].dtype == torch.float32:
            assert_same_bits(own["state1"].to_local(), shard, what=what)
            continue
        # Quantized once more, and that by the reference.
        block_size = 256 if "absmax1" in own else max(shard.numel(), 1)
        codes, absmax = reference.quantize_blockwise(to_numpy(shard), QMAP, block_size)
        assert_same_bits(own["state1"].to_local(), codes, what=what)
        key = "absmax1" if "absmax1" in own else "max1"
        assert_same_bits(own[key].to_local().reshape(-1)[: absmax.size], absmax, what=what)
        error = (sharding.local(momentum(own)) - shard).abs().numpy().reshape(-1)
        scale = np.repeat(absmax, block_size)[: error.size]
        assert (error <= ERROR_BOUND * scale).all()


@pytest.mark.parametrize(
    ("name", "before", "after"), [("Lion", 2, 3), ("Lion8bit", 2, 3), ("Lion8bit", 4, 1), ("Lion8bit-tensorwise", 1, 4)]
)
def test_float32_export_to_any_number_of_processes(forking, tmp_path, name, before, after):
    exported = run(forking, before, export, tmp_path, name)[0]
    run(forking, after, imports, tmp_path, name, exported)


def goes_through_the_whole_state() -> None:
    """What rank 0 gathers loads everywhere: into a plain optimizer, and into shards."""
    for name in THIRTY_TWO_BITS:
        model, alone = sharded(), Net()
        optimizer, plain = (optimizer_of(VARIANTS[name], m, percentile_clipping=50) for m in (model, alone))
        train(model, optimizer, range(3))
        states = get_optimizer_state_dict(model, optimizer, options=FULL)
        values = get_model_state_dict(model, options=FULL)
        received = [states, values]
        dist.broadcast_object_list(received, src=0)
        set_model_state_dict(alone, received[1])
        set_optimizer_state_dict(alone, plain, received[0])
        assert_same_whole(model, optimizer, alone, plain, name)

        again = sharded()
        resumed = optimizer_of(VARIANTS[name], again, lr=1.0, percentile_clipping=50)
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(again, values, options=options)
        set_optimizer_state_dict(again, resumed, states, options=options)
        for m, o in ((model, optimizer), (again, resumed)):
            train(m, o, range(3, 5))
        assert_same_parts(again, resumed, model, optimizer, name)


def test_whole_state_of_32_bits(forking):
    run(forking, 2, goes_through_the_whole_state)


def making_state_leaves_no_trace() -> None:
    for name, make in VARIANTS.items():
        model, untouched = sharded(), sharded()
        with torch.no_grad():
            for m in (model, untouched):
                values = sharding.local(m.layers[0].weight)
                if values.numel() > 1:
                    values.view(-1)[0], values.view(-1)[1] = float("nan"), -0.0
        optimizer, expected = (optimizer_of(make, m, percentile_clipping=50) for m in (model, untouched))
        states = get_optimizer_state_dict(model, optimizer)
        assert len(states["state"]) == len(list(model.parameters())) == len(optimizer.state)
        for p, q in zip(model.parameters(), untouched.parameters(), strict=True):
            assert p.grad is None
            assert_same_bits(p.to_local(), q.to_local(), what=name)
            own = optimizer.state[p]
            assert own["step"] == 0
            assert not own["gnorm_vec"].any()
            assert (own["state1"].to_local() == (0 if own["state1"].dtype == torch.float32 else 127)).all()
        train(model, optimizer, range(3))
        train(untouched, expected, range(3))
        assert_same_parts(model, optimizer, untouched, expected, name)


@pytest.mark.parametrize("size", [1, 2])
def test_making_state_leaves_no_trace(forking, size):
    run(forking, size, making_state_leaves_no_trace)

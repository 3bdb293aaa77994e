"""DTensors of a mesh of one process: every backend takes the path of shards, and the results are those without."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import lion
from lion._backends import use_backend
from lion._memory import paging, sharding
from lion._state import placed
from lion.cuda_kernels import simulator
from tests.comparing import assert_same_bits

CLASSES = [lion.Lion, lion.Lion8bit, lion.PagedLion, lion.PagedLion8bit]
OPTIONS: list[dict[str, Any]] = [{}, {"percentile_clipping": 5}, {"block_wise": False, "percentile_clipping": 50}]
SHAPES = ((20, 31), (7,), (0, 3), ())


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DeviceMesh]:
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def parameters(mesh: DeviceMesh | None, shapes: Any = SHAPES) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator) for shape in shapes]
    return [nn.Parameter(value if mesh is None else shared_out(value, mesh)) for value in values]


def shared_out(value: torch.Tensor, mesh: DeviceMesh) -> DTensor:
    return distribute_tensor(value, mesh, [Shard(0) if value.dim() else Replicate()])


def set_gradients(params: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        grad = torch.randn(p.shape, generator=generator) * 1000.0
        p.grad = shared_out(grad, p.device_mesh) if isinstance(p, DTensor) else grad


def assert_same(optimizer: torch.optim.Optimizer, other: torch.optim.Optimizer) -> None:
    for p, q in zip(optimizer.param_groups[0]["params"], other.param_groups[0]["params"], strict=True):
        assert_same_bits(sharding.local(p), q, what="parameter")
        for key, value in optimizer.state[p].items():
            assert isinstance(value, DTensor) == (key in ("state1", "absmax1", "max1", "new_max1"))
            assert_same_bits(sharding.local(value).reshape(other.state[q][key].shape), other.state[q][key], what=key)


def check(mesh: DeviceMesh, cls: Any, options: dict[str, Any], backend: str) -> None:
    sharded, plain = parameters(mesh), parameters(None)
    optimizer, other = (cls(some, lr=1e-2, min_8bit_size=0, **options) for some in (sharded, plain))
    for step, grad_scale in enumerate((None, 1000.0, 65536.0, None)):
        set_gradients(sharded, step)
        set_gradients(plain, step)
        optimizer.grad_scale = other.grad_scale = grad_scale
        with use_backend(backend):
            optimizer.step()
        with use_backend("reference"):
            other.step()
        assert_same(optimizer, other)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("cls", CLASSES)
def test_equals_plain_tensors(mesh: DeviceMesh, cls: Any, options: dict[str, Any], backend: str) -> None:
    check(mesh, cls, options, backend)


@pytest.mark.skipif(not simulator.enabled(), reason=simulator.NEEDED)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_plain_tensors_in_the_simulator(mesh: DeviceMesh, options: dict[str, Any]) -> None:
    check(mesh, lion.Lion8bit, options, "cuda")


def test_paged_state_stays_where_it_is(mesh: DeviceMesh) -> None:
    params = parameters(mesh, [(400, 300)])
    optimizer = lion.PagedLion8bit(params)
    momenta = []
    for step in range(2):
        set_gradients(params, step)
        optimizer.param_groups[0]["weight_decay"] = 0.1 * step
        optimizer._plans = ()
        optimizer.step()
        state = optimizer.state[params[0]]
        assert all(paging.is_paged(sharding.local(state[key])) for key in ("state1", "absmax1"))
        momenta.append(sharding.local(state["state1"]).data_ptr())
    assert momenta[0] == momenta[1]


def test_gradients_that_have_to_be_summed(mesh: DeviceMesh) -> None:
    (sharded,), (plain,) = parameters(mesh, [(8, 4)]), parameters(None, [(8, 4)])
    plain.grad = torch.randn(8, 4)
    sharded.grad = shared_out(plain.grad, mesh)
    optimizer, other = lion.Lion([sharded]), lion.Lion([plain])
    whole = DTensor.from_local(plain.grad.clone(), mesh, [Partial()])
    with torch.no_grad():
        sharded.grad = whole  # type: ignore[assignment]
    optimizer.step()
    other.step()
    assert_same(optimizer, other)


def test_partial_parameters_are_refused(mesh: DeviceMesh) -> None:
    p = nn.Parameter(DTensor.from_local(torch.ones(3), mesh, [Partial()]))
    with pytest.raises(TypeError, match=r"Invalid parameter 0 of group 0: its placements are .*Partial"):
        lion.Lion([p])


@pytest.mark.parametrize("bits", [32, 8])
def test_loads_what_every_process_has_whole(mesh: DeviceMesh, tmp_path: Path, bits: int) -> None:
    sharded, plain = parameters(mesh), parameters(None)
    optimizer, other = (lion.Lion(some, optim_bits=bits, min_8bit_size=0) for some in (sharded, plain))
    set_gradients(plain, 0)
    other.step()
    torch.save(other.state_dict(), tmp_path / "whole.pt")
    optimizer.load_state_dict(torch.load(tmp_path / "whole.pt", weights_only=True))
    for p, q in zip(sharded, plain, strict=True):
        assert_same_bits(sharding.local(optimizer.state[p]["step"]), other.state[q]["step"])
    if bits == 32:
        with torch.no_grad():
            for p, q in zip(sharded, plain, strict=True):
                sharding.local(p).copy_(q)
        assert_same(optimizer, other)


def test_state_of_another_layout_changes_nothing(mesh: DeviceMesh) -> None:
    params = parameters(mesh)
    optimizer = lion.Lion8bit(params, min_8bit_size=0)
    set_gradients(params, 0)
    optimizer.step()
    saved = optimizer.state_dict()
    absmax = saved["state"][0]["absmax1"]
    wrong = DTensor.from_local(torch.zeros(2, 1, absmax.shape[-1]), mesh, [Shard(0)])
    saved["state"][0] = {**saved["state"][0], "absmax1": wrong}
    before = {key: sharding.local(value).clone() for key, value in optimizer.state[params[0]].items()}
    with pytest.raises(ValueError, match="another layout"):
        optimizer.load_state_dict(saved)
    saved["state"][0] = {**saved["state"][0], "absmax1": absmax.to_local()}
    with pytest.raises(ValueError, match="'absmax1' must be a DTensor"):
        optimizer.load_state_dict(saved)
    for key, value in optimizer.state[params[0]].items():
        assert_same_bits(sharding.local(value), before[key], what=key)


def test_bitsandbytes_gets_no_shards(mesh: DeviceMesh) -> None:
    params = parameters(mesh)
    optimizer = lion.Lion8bit(params)
    set_gradients(params, 0)
    optimizer.step()
    with pytest.raises(ValueError, match="DTensor"):
        lion.exchange.to_bitsandbytes(optimizer.state_dict())


def test_state_of_a_parameter_sharded_otherwise_is_refused(mesh: DeviceMesh) -> None:
    rows, columns = (nn.Parameter(distribute_tensor(torch.ones(20, 31), mesh, [Shard(dim)])) for dim in (0, 1))
    optimizer, other = (lion.Lion8bit([p], min_8bit_size=0) for p in (rows, columns))
    for p, a in ((rows, optimizer), (columns, other)):
        p.grad = distribute_tensor(torch.ones(20, 31), mesh, p.placements)  # type: ignore[attr-defined]
        a.step()
    assert optimizer.state[rows]["absmax1"].shape == (1, 1, 3)
    placed = [optimizer.state[rows]["absmax1"].placements, other.state[columns]["absmax1"].placements]
    assert placed == [(Shard(0),), (Shard(1),)]
    with pytest.raises(ValueError, match="'state1' is laid out as"):
        other.load_state_dict(optimizer.state_dict())
    # What a checkpoint that is laid out anew would look like.
    mixed = optimizer.state_dict()
    mixed["state"][0] = {**mixed["state"][0], "state1": other.state[columns]["state1"]}
    with pytest.raises(ValueError, match="saved in another layout"):
        other.load_state_dict(mixed)


def test_plain_parameters_refuse_shards(mesh: DeviceMesh) -> None:
    sharded, plain = parameters(mesh), parameters(None)
    optimizer, other = lion.Lion(sharded), lion.Lion(plain)
    set_gradients(sharded, 0)
    optimizer.step()
    with pytest.raises(ValueError, match="'state1' is a DTensor, unlike the parameter"):
        other.load_state_dict(optimizer.state_dict())
    assert not other.state


@pytest.mark.parametrize("shape", [(2, 300), (600,)])
@pytest.mark.parametrize("block_wise", [True, False])
def test_what_was_gathered_is_refused(mesh: DeviceMesh, block_wise: bool, shape: tuple[int, ...]) -> None:
    (sharded,), (plain,) = parameters(mesh, [shape]), parameters(None, [shape])
    optimizer, other = (lion.Lion8bit([p], min_8bit_size=0, block_wise=block_wise) for p in (sharded, plain))
    set_gradients([sharded], 0)
    optimizer.step()
    gathered = optimizer.state_dict()
    gathered["state"][0] = {
        key: value.full_tensor() if isinstance(value, DTensor) else value for key, value in gathered["state"][0].items()
    }
    for read in (other.load_state_dict, lion.exchange.to_exp_avg, lion.exchange.to_bitsandbytes):
        with pytest.raises(ValueError, match=r"gathered from shards.*to_exp_avg"):
            read(gathered)


def test_only_what_was_gathered_is_said_to_be() -> None:
    (p,) = parameters(None, [(2, 300)])
    optimizer = lion.Lion8bit([p], min_8bit_size=0)
    set_gradients([p], 0)
    optimizer.step()
    for key, shape in (("state1", (3, 300)), ("absmax1", (4,))):
        saved = optimizer.state_dict()
        saved["state"][0] = {**saved["state"][0], key: saved["state"][0][key].new_zeros(shape)}
        with pytest.raises(ValueError, match=rf"'{key}' is .* is needed$"):
            optimizer.load_state_dict(saved)


def test_state_that_fits_is_kept(mesh: DeviceMesh) -> None:
    params = parameters(mesh)
    optimizer = lion.Lion8bit(params, min_8bit_size=0)
    kept = []
    for step in range(2):
        set_gradients(params, step)
        optimizer._plans = ()
        optimizer.step()
        kept.append([optimizer.state[p] for p in params])
    for before, after in zip(*kept, strict=True):
        assert before is after is placed(after, paged=False)


def test_state_is_contiguous(mesh: DeviceMesh) -> None:
    params = parameters(mesh, [(2, 3, 100)])
    optimizer = lion.Lion8bit(params, min_8bit_size=0)
    set_gradients(params, 0)
    optimizer.step()
    for key in ("state1", "absmax1"):
        value = optimizer.state[params[0]][key]
        assert value.stride() == torch.empty(value.shape).stride()


def test_gradients_on_their_way(mesh: DeviceMesh) -> None:
    (p,), (q,) = parameters(mesh, [(8, 4)]), parameters(None, [(8, 4)])
    q.grad = torch.randn(8, 4)
    part = DTensor.from_local(q.grad.clone(), mesh, [Partial()])
    with torch.no_grad():
        p.grad = part.redistribute(mesh, [Shard(0)], async_op=True)  # type: ignore[assignment]
    optimizer, other = lion.Lion([p]), lion.Lion([q])
    optimizer.step()
    other.step()
    assert_same(optimizer, other)

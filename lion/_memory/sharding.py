"""Parameters that are DTensors: their local shards, their state, and what their shards need to know of each other.

The kernels work on the shard of this process. What they keep for every element is a DTensor like the parameter. What
they keep for every block or shard (``absmax1``, ``max1``, ``new_max1``) is a DTensor of rows, one for each shard, as
long as the largest shard needs. It has the parameter's placements, and a leading dimension for each of the parameter's,
with the number of shards along it. So every process's part of a checkpoint is told apart, and what was saved of other
shards does not pass for the state of these.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor

from lion import reference
from lion._memory import paging

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

PER_ELEMENT = ("state1", "master_low")
_PER_SHARD = ("absmax1", "max1", "new_max1")


def is_dtensor(tensor: object) -> TypeGuard[DTensor]:
    """Return whether a tensor is a DTensor."""
    return is_dtensor_type(type(tensor))


def is_dtensor_type(kind: type) -> bool:
    """Return whether tensors of a type are DTensors."""
    # Where nobody imported the module, there is none, and importing it takes long.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and issubclass(kind, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """Return this process's shard of a DTensor, sharing its memory; any other tensor itself."""
    if not is_dtensor(tensor):
        return tensor
    with torch.no_grad():
        shard = tensor.to_local()
    # It may be on its way still, as an AsyncCollectiveTensor.
    return shard.wait() if hasattr(shard, "wait") else shard


def local_gradients(params: Sequence[Tensor], grads: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return gradients, and of the gradients of DTensors this process's shards.

    A gradient that is laid out otherwise than its parameter is gathered or summed for it, so every process has to call
    this with the same parameters.
    """
    if not any(map(is_dtensor_type, set(map(type, params)))):
        return grads
    return [_local_gradient(p, grad) if is_dtensor(p) else grad for p, grad in zip(params, grads, strict=True)]


def _local_gradient(p: DTensor, grad: Any) -> Tensor:
    if is_dtensor(grad) and (grad.placements, grad.device_mesh) != (p.placements, p.device_mesh):
        grad = grad.redistribute(p.device_mesh, p.placements)
    return local(grad)


def mesh_dimensions(tensor: DTensor) -> tuple[int, ...]:
    """Return the dimensions of its mesh that a DTensor is sharded over."""
    return tuple(i for i, placement in enumerate(tensor.placements) if not placement.is_replicate())


def wrapped(state: Mapping[str, Tensor], like: DTensor) -> dict[str, Any]:
    """Return the state of a shard as that of the whole parameter.

    Args:
        state: The shard's state.
        like: The parameter, or its momentum.
    """
    mesh, placements, new = like.device_mesh, like.placements, dict[str, Any](state)
    for key in PER_ELEMENT:
        if key in state:
            new[key] = _dtensor(state[key], mesh, placements, like.shape)
    for key in _PER_SHARD:
        if key in state:
            whole, here = _row_shapes(key, like)
            row = _lengthened(state[key], here[-1]).view(here)
            new[key] = _dtensor(row, mesh, placements, torch.Size(whole))
    return new


def unwrapped(state: Mapping[str, Any], like: DTensor, name: str) -> dict[str, Any]:
    """Return this process's part of a state whose momentum is a DTensor, sharing its memory.

    Args:
        state: The state.
        like: The parameter, or its momentum.
        name: What to call the parameter in an error.

    Raises:
        ValueError: If the state is that of another mesh, or of other placements on it.
    """
    new = dict(state)
    for key in [key for key in PER_ELEMENT if key in state]:
        whole: Any = state[key]
        if (whole.device_mesh, whole.placements) != (like.device_mesh, like.placements):
            raise ValueError(
                f"Invalid state of {name}: {key!r} is laid out as {whole.placements} on {whole.device_mesh}; "
                f"{like.placements} on {like.device_mesh} is needed, which torch.distributed.checkpoint brings it to"
            )
        new[key] = local(whole)
    for key in [key for key in _PER_SHARD if key in state]:
        found: Any = state[key]
        rows, here = _row_shapes(key, like)
        if (tuple(found.shape), found.placements, tuple(local(found).shape)) != (rows, like.placements, here):
            raise ValueError(
                f"Invalid state of {name}: {key!r} has shape {tuple(found.shape)}, {tuple(local(found).shape)} of it "
                f"here; {rows} and {here} are needed: it was saved in another layout, between which 8-bit state moves "
                "as float32 (lion.exchange.to_exp_avg)"
            )
        blocks = -(-new["state1"].numel() // reference.BLOCK_SIZE) if key == "absmax1" else 1
        new[key] = local(found).view(-1)[:blocks]
    return new


def laid_out_like(shard: Tensor, like: Tensor) -> Tensor:
    """Return a tensor of this process's part of another: a DTensor where the other is one, else the part itself."""
    return _dtensor(shard, like.device_mesh, like.placements, like.shape) if is_dtensor(like) else shard


def shard_of(full: Tensor, like: DTensor) -> Tensor:
    """Return this process's shard of a tensor that every process has whole."""
    from torch.distributed.tensor import Replicate

    mesh = like.device_mesh
    replicated = _dtensor(full, mesh, (Replicate(),) * mesh.ndim, full.shape)
    return local(replicated.redistribute(mesh, like.placements)).contiguous()


def first_element(tensor: Tensor) -> int:
    """Return the index, in the whole tensor, of the first element of this process's shard.

    Where a DTensor is cut along other dimensions than its first, a shard's elements do not follow one another in the
    whole. Then they are counted as if the shards lay one after the other, so that no two shards share a number.
    """
    if not is_dtensor(tensor):
        return 0
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sizes, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return sum(
        offset * math.prod(sizes[:dim]) * math.prod(tensor.shape[dim + 1 :]) for dim, offset in enumerate(offsets)
    )


def sum_over_shards(values: Tensor, mesh: DeviceMesh, dimensions: Iterable[int]) -> Tensor:
    """Return the sums of float64 values over the shards; every process of the mesh has to call it.

    Args:
        values: The values of this process's shards, one per parameter.
        mesh: The mesh of the parameters.
        dimensions: The dimensions of the mesh that they are sharded over.
    """
    sums = values if values.device.type == mesh.device_type else values.to(mesh.device_type)
    for dimension in dimensions:
        torch.distributed.all_reduce(sums, group=mesh.get_group(dimension))
    return sums.to(values.device)


def _row_shapes(key: str, like: DTensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of what is kept for every block or shard: of all rows, and of this process's row."""
    grid, sizes = [1] * like.ndim, list(like.shape)
    for i in mesh_dimensions(like):
        placement: Any = like.placements[i]
        grid[placement.dim] *= like.device_mesh.size(i)
        sizes[placement.dim] = -(-sizes[placement.dim] // like.device_mesh.size(i))
    length = -(-math.prod(sizes) // reference.BLOCK_SIZE) if key == "absmax1" else 1
    return (*grid, length), (*([1] * like.ndim), length)


def _lengthened(row: Tensor, length: int) -> Tensor:
    if row.numel() == length:
        return row
    longer = paging.empty_like(row, torch.Size([length]))
    longer[: row.numel()] = row
    longer[row.numel() :] = 0
    return longer


def _dtensor(local: Tensor, mesh: DeviceMesh, placements: tuple[Any, ...], shape: torch.Size) -> DTensor:
    """Return a DTensor of which a tensor is this process's part."""
    # The public from_local would move what FSDP2 offloads to the CPU back to the mesh's device.
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    stride = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    spec = DTensorSpec(mesh, placements, tensor_meta=TensorMeta(shape, stride, local.dtype))
    return DTensor(local, spec, requires_grad=False)

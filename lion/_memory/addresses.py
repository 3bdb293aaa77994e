"""Whether a tensor is ordinary memory, whose address a kernel can be given."""

from __future__ import annotations

import torch
from torch import Tensor


def layout(tensor: Tensor) -> torch.layout | str:
    """Return the layout of a tensor, "nested" where torch calls a list of tensors strided."""
    return "nested" if tensor.is_nested else tensor.layout


def extent(tensor: Tensor) -> int:
    """Return the bytes from the first element of a tensor to the end of its last one; 0 without elements."""
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.itemsize


def unaddressable(tensor: Tensor) -> str | None:
    """Return why a kernel cannot be given the address of a tensor's memory, as the end of an error; None if it can.

    It can read and write the memory of parameters, of subclasses that hold their own memory, and of the local shard of
    a DTensor, but there is none in what only stands for a tensor: meta, fake, functional, wrapper and batched ones. A
    tensor without elements needs none.

    Args:
        tensor: Any tensor; of a DTensor, its local shard.
    """
    kind = type(tensor).__name__
    if layout(tensor) != torch.strided:
        return f"its layout is {layout(tensor)}; dense tensors are supported"
    if torch.nn.parameter.is_lazy(tensor):
        return f"it is an {kind}, which has no shape yet"
    if torch._is_functional_tensor(tensor):
        return "it is a functional tensor, as torch's compilers trace with, without memory of its own"
    if tensor._is_zerotensor():
        return "it is a tensor of zeros without memory; clone() makes it an ordinary tensor"
    if tensor.is_neg():
        return "it is a view with the negative bit; resolve_neg() makes it an ordinary tensor"
    try:
        storage = tensor.untyped_storage()
    except NotImplementedError:
        return f"it is a {kind} without memory, as torch.func transforms"
    if storage.device.type != tensor.device.type or tensor.is_meta:
        return f"it is a {kind} without data, on the device meta"
    if tensor.numel() == 0:
        return None
    if tensor.storage_offset() * tensor.itemsize + extent(tensor) > storage.nbytes():
        return "it reaches beyond the end of its memory"
    try:
        exists = storage.data_ptr() != 0
    except RuntimeError:
        exists = False
    return None if exists else f"it is a {kind}, a wrapper without memory of its own"

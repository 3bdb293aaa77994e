"""Memory for optimizer state that the operating system or the CUDA driver can page out.

On a CPU it is a file without a name, mapped into memory: its pages are written to the disk and dropped when memory is
short, and the file is gone as soon as nothing maps it, also after a crash. On a CUDA device it is managed memory.
"""

from __future__ import annotations

import errno
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, MutableMapping, Sequence

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from lion.cuda_kernels import managed

DIRECTORY_VARIABLE = "LION_PAGE_DIR"

# Memory made here, as the tensor that all others there are views of, and the number of forks before. A copy of one
# is no key: it is ordinary memory.
_made: MutableMapping[Tensor, int] = WeakTensorKeyDictionary()
_forks = 0


def forks() -> int:
    """Return how often this process, or one that it descends from, has forked."""
    return _forks


def is_paged(tensor: Tensor) -> bool:
    """Return whether a tensor lies in pageable memory of this process alone.

    A file that is mapped is shared with a forked child, so after a fork neither process may go on writing to it.
    """
    forks_before = _forks_before(tensor)
    return forks_before is not None and (tensor.is_cuda or forks_before == _forks)


def _forks_before(tensor: Tensor) -> int | None:
    """Return the number of forks before the memory of a tensor was made here; None for other memory."""
    return _made.get(_base(tensor))


def _base(tensor: Tensor) -> Tensor:
    """Return the tensor that stands for the memory of a tensor and of all views of it."""
    return tensor if tensor._base is None else tensor._base


def moved(tensor: Tensor, paged: bool, strides: tuple[int, ...]) -> Tensor:
    """Return a copy of a tensor in pageable memory, or in ordinary memory; the tensor itself where it is there.

    Args:
        tensor: A tensor on a CPU or CUDA device.
        paged: Whether the memory is to be pageable.
        strides: The strides that it is to have, those of a dense tensor.

    Raises:
        OSError: If there is no room or no permission for a file.
        RuntimeError: If the platform has no pageable memory.
    """
    if tensor.stride() == strides and (is_paged(tensor) if paged else _forks_before(tensor) is None):
        return tensor
    if paged:
        place = empty(tensor.shape, tensor.dtype, tensor.device, strides)
    else:
        place = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device)
    if tensor.is_cuda:
        return place.copy_(tensor)
    # torch's threads do not survive a fork: in a child, its own copy would wait for ever.
    place.numpy()[...] = tensor.numpy()
    return place


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the strides of a contiguous tensor."""
    return tuple(math.prod(max(size, 1) for size in shape[i + 1 :]) for i in range(len(shape)))


def empty(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device, strides: tuple[int, ...] | None = None
) -> Tensor:
    """Return a tensor in pageable memory; its values are not defined.

    Args:
        shape: Its shape.
        dtype: Its dtype.
        device: A CPU or CUDA device.
        strides: The strides of a dense tensor (default: contiguous).

    Raises:
        OSError: If there is no room or no permission for a file.
        RuntimeError: If the platform has no pageable memory.
    """
    size = dtype.itemsize * math.prod(shape)
    # Views of an inference tensor do not tell whose they are.
    with torch.inference_mode(False), torch.no_grad():
        flat = _managed(size, device) if device.type == "cuda" else _mapped(size)
        tensor = flat.view(dtype).as_strided(shape, strides or contiguous_strides(shape))
    _made[_base(tensor)] = _forks
    return tensor


def empty_like(tensor: Tensor, shape: torch.Size) -> Tensor:
    """Return a tensor of another shape in memory of the same kind; its values are not defined.

    Raises:
        OSError: If there is no room or no permission for a file.
    """
    return (empty if is_paged(tensor) else torch.empty)(shape, dtype=tensor.dtype, device=tensor.device)


def ranges(tensors: Iterable[Tensor]) -> list[tuple[int, int]]:
    """Return addresses and sizes in bytes of those tensors that lie in pageable memory."""
    return [(tensor.data_ptr(), tensor.nbytes) for tensor in tensors if is_paged(tensor)]


def prefetch(ranges: Iterable[tuple[int, int]], device: int, stream: int) -> None:
    """Bring managed memory to the current CUDA device.

    Args:
        ranges: Addresses and sizes in bytes.
        device: The device's index.
        stream: Raw handle of a CUDA stream.
    """
    for address, size in ranges:
        managed.prefetch(address, size, device, stream)


def _managed(size: int, device: torch.device) -> Tensor:
    with torch.cuda.device(device):
        # The driver needs the device's context, which torch makes when it is first used.
        torch.cuda.current_stream().query()
        return torch.as_tensor(managed.Memory(size, torch.cuda.current_device()), device=device)


def _mapped(size: int) -> Tensor:
    if not hasattr(os, "posix_fallocate"):
        raise RuntimeError("Paged state of CPU tensors needs posix_fallocate, which this platform does not have")
    folder = os.environ.get(DIRECTORY_VARIABLE) or tempfile.gettempdir()
    try:
        with tempfile.TemporaryFile(dir=folder, prefix="lion-", buffering=0) as file:
            # Trying to reserve more than there is would fill the disk for a moment, for other programs too.
            if size > shutil.disk_usage(folder).free:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            # Writing to a mapped page for which the disk has no room would kill the process.
            os.posix_fallocate(file.fileno(), 0, size)
            return torch.from_file(f"/dev/fd/{file.fileno()}", shared=True, size=size, dtype=torch.uint8)
    except OSError as error:
        raise OSError(
            error.errno,
            f"Cannot make a file of {size} bytes for paged state ({error.strerror}); "
            f"the environment variable {DIRECTORY_VARIABLE} chooses the folder",
            folder,
        ) from error


def _count_fork() -> None:
    global _forks
    _forks += 1


if hasattr(os, "register_at_fork"):
    # In the parent too: its child goes on reading the file that both map.
    os.register_at_fork(before=_count_fork)

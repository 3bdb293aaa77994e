"""Memory for optimizer state that the operating system or the CUDA driver can page out.

On a CPU it is a file without a name, mapped into memory: its pages are written to the disk and dropped when memory is
short, and the file is gone as soon as nothing maps it, also after a crash. On a CUDA device it is managed memory.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, MutableMapping

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


def moved(tensor: Tensor, paged: bool) -> Tensor:
    """Return a copy of a tensor in pageable memory, or in ordinary memory; the tensor itself where it is there.

    Args:
        tensor: A contiguous tensor on a CPU or CUDA device.
        paged: Whether the memory is to be pageable.

    Raises:
        OSError: If there is no room or no permission for a file.
        RuntimeError: If the platform has no pageable memory.
    """
    if is_paged(tensor) if paged else _forks_before(tensor) is None:
        return tensor
    place = empty(tensor.shape, tensor.dtype, tensor.device) if paged else torch.empty_like(tensor)
    if tensor.is_cuda:
        return place.copy_(tensor)
    # torch's threads do not survive a fork: in a child, its own copy would wait for ever.
    place.numpy()[...] = tensor.numpy()
    return place


def empty(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a tensor in pageable memory; its values are not defined.

    Args:
        shape: Its shape.
        dtype: Its dtype.
        device: A CPU or CUDA device.

    Raises:
        OSError: If there is no room or no permission for a file.
        RuntimeError: If the platform has no pageable memory.
    """
    size = dtype.itemsize * shape.numel()
    # Views of an inference tensor do not tell whose they are.
    with torch.inference_mode(False), torch.no_grad():
        flat = _managed(size, device) if device.type == "cuda" else _mapped(size)
        tensor = flat.view(dtype).view(shape)
    _made[_base(tensor)] = _forks
    return tensor


def empty_like(tensor: Tensor, shape: torch.Size) -> Tensor:
    """Return a tensor of another shape in memory of the same kind; its values are not defined.

    Raises:
        OSError: If there is no room or no permission for a file.
    """
    return (empty if is_paged(tensor) else torch.empty)(shape, dtype=tensor.dtype, device=tensor.device)


def paged(states: Iterable[Mapping[str, object]]) -> list[Tensor]:
    """Return the tensors of some states that lie in pageable memory."""
    entries = (value for state in states for value in state.values())
    return [value for value in entries if isinstance(value, Tensor) and is_paged(value)]


def prefetch(tensors: Iterable[Tensor]) -> None:
    """Bring paged tensors of the current CUDA device to it, on torch's current stream; nothing for CPU tensors."""
    for tensor in tensors:
        if tensor.is_cuda:
            stream = torch.cuda.current_stream().cuda_stream
            managed.prefetch(tensor.data_ptr(), tensor.nbytes, tensor.device.index, stream)


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

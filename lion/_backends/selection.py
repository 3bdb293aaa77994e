"""Which implementation serves which tensor."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch

from lion._backends.cpu import CpuBackend
from lion._backends.protocol import Backend
from lion._backends.reference import ReferenceBackend

NAMES = ("reference", "cpu", "cuda")

_requested: str | None = None


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Make every optimizer of this process use one implementation while the context lasts.

    The environment variable ``LION_BACKEND``, set before the first step, does the same for a whole process.

    Args:
        name: ``"cpu"`` or ``"reference"`` for CPU tensors; ``"cuda"`` for CUDA tensors and, with
            ``NUMBA_ENABLE_CUDASIM=1`` in the environment, for CPU tensors by Numba's simulator.

    Raises:
        ValueError: If there is no such implementation.
    """
    global _requested
    before, _requested = _requested, _checked_name(name)
    try:
        yield
    finally:
        _requested = before


def requested() -> str | None:
    """Return the implementation that :func:`use_backend` asks for now; None if it asks for none."""
    return _requested


def for_device(device: torch.device) -> Backend:
    """Return the implementation that serves tensors of a device.

    Raises:
        ValueError: If none does.
    """
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"Unsupported device: {device}; cpu and cuda tensors are supported")
    name = _requested or _checked_name(os.environ.get("LION_BACKEND") or device.type)
    if device.type == "cuda" and name != "cuda":
        raise ValueError(f"Invalid backend: {name!r} does not serve tensors on {device}; 'cuda' does")
    return _make(name, device.type == "cpu")


@lru_cache
def _make(name: str, on_cpu: bool) -> Backend:
    if name == "cuda":
        from lion.cuda_kernels import launch

        launch.require()
        from lion._backends.cuda import CudaBackend

        return CudaBackend(simulated=on_cpu)
    return CpuBackend() if name == "cpu" else ReferenceBackend()


def _checked_name(name: str) -> str:
    if name not in NAMES:
        raise ValueError(f"Invalid backend: {name!r}; expected one of {', '.join(NAMES)}")
    return name

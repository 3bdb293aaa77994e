"""Numba's CUDA simulator, the only place that knows it: kernels run as Python, a thread for each of the GPU's threads.

The simulated addresses are those of ordinary memory. Kernels see the GPU through ``cuda`` of
:mod:`lion.cuda_kernels.device` and its intrinsics, whose twins run here.
"""

from __future__ import annotations

import functools
import os
import threading
import warnings
from collections.abc import Callable
from typing import Any

VARIABLE = "NUMBA_ENABLE_CUDASIM"
NEEDED = f"needs {VARIABLE}=1 in the environment"
BLOCKS = 2  # of threads, that are taken to be resident


def asked_for() -> bool:
    """Return whether the environment asks for the simulator; Numba looks there when it is imported."""
    return os.environ.get(VARIABLE) == "1"


def environment() -> dict[str, str]:
    """Return the environment of a process in which the simulator takes the GPU's place."""
    return {**os.environ, VARIABLE: "1"}


@functools.cache
def enabled() -> bool:
    """Return whether the simulator takes the GPU's place in this process."""
    from numba import config

    return bool(config.ENABLE_CUDASIM)


def run(kernel: Any, blocks: int, threads: int, *arguments: Any) -> None:
    """Run a kernel made by ``cuda.jit``.

    Args:
        kernel: The kernel.
        blocks: Number of blocks of threads.
        threads: Number of threads in a block.
        arguments: Its arguments, NumPy scalars.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        kernel[blocks, threads](*arguments)


def thread_number() -> int:
    """Return the number of this thread in its block."""
    thread: Any = threading.current_thread()
    return int(thread.thread_id)


def synchronize() -> None:
    """Wait for all threads of the block."""
    thread: Any = threading.current_thread()
    thread.syncthreads()


def exchange(value: Any, choose: Callable[[int], list[int]]) -> list[Any]:
    """Return what the chosen lanes of this thread's warp hold; every thread of the block takes part.

    Args:
        value: What this lane holds.
        choose: Returns the lanes, given this one's number.
    """
    thread: Any = threading.current_thread()
    slots = thread._manager.__dict__.setdefault("slots", {})
    number = thread_number()
    lane = number % 32
    slots[number] = value
    synchronize()
    values = [slots[number - lane + source] for source in choose(lane)]
    synchronize()
    return values

"""Worker threads: every thread runs the same kernel and pulls chunks of work from one atomic counter.

The caller takes part and leaves last, so a worker never touches memory after the call has returned.
"""

from __future__ import annotations

import functools
import os
import queue
import threading
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt

from lion.cpu_kernels.device import DEFAULT_FLOAT_MODE, atomic_add, inlined, kernel, pause, set_float_mode

Int64Array = npt.NDArray[np.int64]

# Up to this many elements, waking a thread costs more than it saves.
SMALL = 1 << 20
# The counters live in cache lines of their own.
NEXT, ACTIVE, CONTROL_SIZE = 8, 16, 24
CLOSED = 1 << 62


def run(function: Any, threads: int, sizes: Int64Array | None, *args: Any) -> None:
    """Run a kernel on several threads and return when all of them have left it.

    Args:
        function: A kernel whose first argument is the control block, see :func:`enter`.
        threads: How many threads may work, at least 1.
        sizes: Element counts of the tensors; few elements are served by the caller alone. None for a kernel that does
            not pull its work, see :func:`pull`.
        args: The other arguments of the kernel.

    Raises:
        ValueError: If ``threads`` is below 1.
    """
    if threads < 1:
        raise ValueError(f"Invalid threads: {threads}; at least 1 is needed")
    control = np.zeros(CONTROL_SIZE, np.int64)
    if threads == 1 or sizes is None or sizes.sum() <= SMALL:
        function(control, *args)
        return
    close = _close_kernel()
    try:
        _pool.submit(threads - 1, function, control, *args)
        function(control, *args)
    finally:
        close(control)


class _Pool:
    """Daemon threads that wait for jobs; a job that comes too late finds its work closed."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.jobs: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
        self.workers: list[threading.Thread] = []

    def submit(self, count: int, *job: Any) -> None:
        with self.lock:
            # A worker that was killed would leave its jobs, and all that they hold, in the queue.
            self.workers = [worker for worker in self.workers if worker.is_alive()]
            while len(self.workers) < count:
                worker = threading.Thread(target=_work, args=(self.jobs,), name="lion-worker", daemon=True)
                try:
                    worker.start()
                except RuntimeError:  # no more threads to be had: the caller does the work
                    break
                self.workers.append(worker)
            available = len(self.workers)
        for _ in range(min(count, available)):
            self.jobs.put(job)


def _work(jobs: queue.SimpleQueue[tuple[Any, ...]]) -> None:
    while True:
        function, *args = jobs.get()
        with suppress(Exception):  # the caller meets it too and raises it
            function(*args)
        del function, args


_pool = _Pool()


def _renew() -> None:
    global _pool
    _pool = _Pool()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)  # threads do not survive a fork


@inlined
def enter(control: Int64Array) -> int:
    """Begin a thread's part of a kernel; return the floating-point mode to hand to :func:`leave`.

    Nothing may raise before it has left: the caller would wait for ever.
    """
    atomic_add(control.ctypes.data + 8 * ACTIVE, 1)
    return set_float_mode(DEFAULT_FLOAT_MODE)


@inlined
def leave(control: Int64Array, mode: int) -> None:
    """End a thread's part of a kernel."""
    set_float_mode(mode)
    atomic_add(control.ctypes.data + 8 * ACTIVE, -1)


@inlined
def pull(control: Int64Array, sizes: Int64Array, chunk_size: int, tensor: int, first: int) -> tuple[int, int, int, int]:
    """Take the next chunk of work.

    A tensor is cut into chunks of ``chunk_size`` elements, the last one shorter; an empty tensor is one chunk.

    Args:
        control: The control block.
        sizes: int64 array: element counts of the tensors.
        chunk_size: Elements in a chunk.
        tensor: Index of the tensor of the chunk taken before, at first 0.
        first: Number of that tensor's first chunk, at first 0.

    Returns:
        The chunk's tensor, the number of the tensor's first chunk, the chunk's first element and its end; the
        tensor is ``sizes.size`` when no work is left.
    """
    number = atomic_add(control.ctypes.data + 8 * NEXT, 1)
    while tensor < sizes.size:
        chunks = max(1, (sizes[tensor] + chunk_size - 1) // chunk_size)
        if number < first + chunks:
            begin = (number - first) * chunk_size
            return tensor, first, begin, min(begin + chunk_size, sizes[tensor])
        first += chunks
        tensor += 1
    return tensor, first, 0, 0


@functools.cache
def _close_kernel() -> Any:
    @kernel("")
    def close(control):  # type: ignore[no-untyped-def]
        atomic_add(control.ctypes.data + 8 * NEXT, CLOSED)
        while atomic_add(control.ctypes.data + 8 * ACTIVE, 0) != 0:
            pause()

    return close

"""Run a function in several processes that form a gloo process group."""

from __future__ import annotations

import faulthandler
import io
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# How long the other ranks may go on after one has failed: they may be waiting for it.
GRACE = 3.0


class RankError(AssertionError):
    """A rank raised, died or was not done in time."""


def run(
    context: ForkServerContext, size: int, function: Callable[..., Any], *args: Any, time_limit: float = 120.0
) -> list[Any]:
    """Run a function in processes that form a gloo process group, and return what it returned.

    Args:
        context: What starts processes, the fixture ``forking``.
        size: Number of processes.
        function: Called in each; importable by name. It asks ``torch.distributed`` for its rank.
        *args: Its arguments.
        time_limit: Seconds until all of them are killed (default: 120).

    Returns:
        The results, rank by rank; whatever ``torch.save`` takes.

    Raises:
        RankError: If one failed or the time is over, with the traceback of each rank.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pipes = [context.Pipe(duplex=False) for _ in range(size)]
        processes = [
            context.Process(target=_rank, args=(rank, size, folder, time_limit, pipe, function, args), daemon=True)
            for rank, (_, pipe) in enumerate(pipes)
        ]
        try:
            for process, (_, pipe) in zip(processes, pipes, strict=True):
                process.start()
                pipe.close()
            replies = _replies([pipe for pipe, _ in pipes], time_limit)
        finally:
            for process in processes:
                process.kill()
                process.join()
        failures = [
            f"--- rank {rank} of {size} ---\n{reply[1] or _stacks(folder, rank)}"
            for rank, reply in replies.items()
            if not reply[0]
        ]
        if failures:
            raise RankError("\n".join(["", *failures]))
        return [torch.load(io.BytesIO(replies[rank][1]), weights_only=False) for rank in range(size)]


def _replies(pipes: list[Connection], time_limit: float) -> dict[int, tuple[bool, Any]]:
    """Return whether each rank succeeded, with its result or its traceback; the first that failed comes first."""
    replies: dict[int, tuple[bool, Any]] = {}
    deadline = time.monotonic() + time_limit
    while waiting := [pipe for rank, pipe in enumerate(pipes) if rank not in replies]:
        ready = wait(waiting, max(deadline - time.monotonic(), 0.0))
        if not ready:
            replies.update((pipes.index(pipe), (False, None)) for pipe in waiting)
        for pipe in ready:
            try:
                reply = pipe.recv()
            except EOFError:
                reply = (False, "The process died")
            replies[pipes.index(pipe)] = reply
            if not reply[0]:
                deadline = min(deadline, time.monotonic() + GRACE)
    return replies


def _stacks(folder: Path, rank: int) -> str:
    path = folder / f"stacks{rank}.txt"
    stacks = path.read_text() if path.exists() else ""
    return stacks or "Killed, because another rank had failed"


def _rank(
    rank: int,
    size: int,
    folder: Path,
    time_limit: float,
    pipe: Connection,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    with open(folder / f"stacks{rank}.txt", "w") as stacks:
        faulthandler.dump_traceback_later(max(time_limit - 5.0, 1.0), file=stacks)
        try:
            timeout = timedelta(seconds=time_limit)
            dist.init_process_group(
                "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size, timeout=timeout
            )
            result = io.BytesIO()
            torch.save(function(*args), result)
            dist.barrier()
            pipe.send((True, result.getvalue()))
            dist.destroy_process_group()
        except BaseException:
            pipe.send((False, traceback.format_exc()))
        finally:
            faulthandler.cancel_dump_traceback_later()

"""Runs random programs for a time, watching memory and files: ``python -m tests.soak --minutes 5``.

After a fifth of the time, for warming up, resident memory may grow by at most ``GROWTH``, however long the run goes on:
less than the allocator's ups and downs cannot be told from a leak. Open files, and files in the folder for temporary
ones, may not become more at all.
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
import time
import warnings

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from lion.cpu_kernels import pool
from tests.paging.memory import resident
from tests.soak.program import SoakProgram, run_programs

GROWTH = 64 << 20  # bytes


def usage(folder: str) -> tuple[int, int, int]:
    """Return resident memory in bytes, the number of open files, and that of files in a folder."""
    return sum(resident().values()), len(os.listdir("/proc/self/fd")), len(os.listdir(folder))


def soak(minutes: float, folder: str) -> str:
    """Run programs with temporary files in a folder; return a summary.

    Raises:
        AssertionError: If a program goes wrong, memory grows or files are left.
    """
    columns = BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    begin, seconds, growth, base = time.monotonic(), 60 * minutes, 0, None
    with Progress(*columns) as progress:
        task = progress.add_task("warming up", total=seconds)
        while base is None or time.monotonic() - begin < seconds:
            run_programs()
            now = usage(folder)
            if base is None and time.monotonic() - begin >= seconds / 5:
                base = now
            if base is not None:
                growth = max(growth, now[0] - base[0])
                assert growth <= GROWTH, f"{growth >> 20} MB more than after warming up"
                assert now[1] <= base[1] and now[2] <= base[2], f"{now[1:]} open and temporary files, {base[1:]} before"
            summary = f"{SoakProgram.steps_taken} steps, {now[0] >> 20} MB, {now[1]} open and {now[2]} temporary files"
            progress.update(task, completed=time.monotonic() - begin, description=summary)
    return f"{summary}; after warming up, memory grew by at most {growth / 2**20:.1f} MB"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=5, help="how long to run (default: 5)")
    minutes = parser.parse_args().minutes
    # Worker threads take part in small work too, and Python warns of forks beside threads.
    pool.SMALL = 0
    torch.set_num_threads(2)
    warnings.simplefilter("ignore", DeprecationWarning)
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        tempfile.tempdir = folder
        # What has been imported is not looked through at every collection: that takes half a second.
        gc.freeze()
        print(soak(minutes, folder))


if __name__ == "__main__":
    main()

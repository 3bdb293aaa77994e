"""Measures what the state of an optimizer takes: ``python -m tests.paging.memory PagedLion 25000000``.

Prints a JSON object of changes in bytes, read from ``/proc/self/status``: by three steps, and by asking the operating
system to page the state out afterwards.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys

import torch
from torch import nn

import lion
from lion._memory import paging

MADV_PAGEOUT = 21


def resident() -> dict[str, int]:
    """Return this process's resident memory in bytes: anonymous, and mapped from files."""
    with open("/proc/self/status") as file:
        lines = dict(line.split(":", 1) for line in file)
    return {name: 1024 * int(lines[key].split()[0]) for name, key in (("anonymous", "RssAnon"), ("file", "RssFile"))}


def measure(name: str, numel: int) -> dict[str, int | bool]:
    """Return the figures of one class and one parameter."""
    p = nn.Parameter(torch.ones(numel))
    p.grad = torch.ones(numel)
    small = nn.Parameter(torch.ones(200_000))
    small.grad = torch.ones(200_000)
    warm = getattr(lion, name)([small])
    warm.step()
    before = resident()
    optimizer = getattr(lion, name)([p], lr=1e-3)
    for _ in range(3):
        optimizer.step()
    after = resident()
    state = optimizer.state[p]
    result: dict[str, int | bool] = {
        "state": state["state1"].nbytes + (state["absmax1"].nbytes if "absmax1" in state else 0),
        "anonymous": after["anonymous"] - before["anonymous"],
        "file": after["file"] - before["file"],
    }
    sums = [int(t.view(torch.uint8).sum()) for t in filter(paging.is_paged, state.values())]
    libc = ctypes.CDLL(None, use_errno=True)
    os.sync()
    after = resident()
    for tensor in filter(paging.is_paged, state.values()):
        libc.madvise(ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(tensor.nbytes), MADV_PAGEOUT)
    result["file_after_paging_out"] = resident()["file"] - before["file"]
    result["contents_kept"] = sums == [int(t.view(torch.uint8).sum()) for t in filter(paging.is_paged, state.values())]
    return result


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], int(sys.argv[2]))))

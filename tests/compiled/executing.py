"""Executes the kernels' compiled PTX on the CPU, by an executor (ptxrun) that checks every access."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import ptxrun

from lion.cuda_kernels import launch
from lion.cuda_kernels.device import WARPS
from tests.compiled import building

CAPABILITY = (9, 0)
BLOCKS = 2

_launches = 0


@functools.cache
def module(name: str, dtype: str | None, capability: building.Capability, **kind: Any) -> Any:
    """Return a kernel of the project, compiled for a compute capability and ready to run."""
    return ptxrun.Module(building.ptx(launch.kernel(name, dtype, **kind), capability))


def execute(name: str, dtype: str | None, device: int, stream: int, blocks: int, *arguments: int, **kind: Any) -> None:
    """Do what ``launch._launch`` does, by the executor instead of a GPU: warps and blocks run in random order."""
    global _launches
    _launches += 1
    information = module(name, dtype, CAPABILITY, **kind).launch(
        None,
        max(1, min(blocks, BLOCKS)),
        32 * WARPS,
        [np.int64(argument) for argument in arguments],
        order="random",
        block_order="random",
        seed=_launches,
    )
    assert not information.warnings

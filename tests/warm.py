"""Imported once by the server that tests fork their processes from, so that each of them starts at once."""

from __future__ import annotations

import os

# One thread in every process: they are more than the machine has cores.
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"

import torch  # noqa: E402
import torch.distributed.checkpoint.state_dict  # noqa: E402
import torch.distributed.fsdp  # noqa: E402
import torch.distributed.optim  # noqa: E402

import lion  # noqa: E402
from tests.checkpoints.recipe import warm_up  # noqa: E402


def _load_kernels() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for optim_bits in (32, 8):
            p = torch.nn.Parameter(torch.ones(4096, dtype=dtype))
            p.grad = torch.ones_like(p)
            lion.Lion([p], optim_bits=optim_bits, percentile_clipping=50).step()


torch.set_num_threads(1)
warm_up()
_load_kernels()

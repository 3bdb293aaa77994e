"""Measures the peak memory of training steps: ``python -m tests.optimizers.gradient_memory backward 64``.

The arguments say where the step is taken, in ``backward`` or in ``step`` after it, and how many layers of 4 MB the
model has. Prints a JSON object of bytes: all gradients together, and by how much the peak of resident memory
(``VmHWM`` in ``/proc/self/status``) exceeds what was resident with parameters and momentum alone. With the environment
variable ``MALLOC_MMAP_THRESHOLD_=1000000``, glibc gives freed gradients back to the system instead of keeping some.
"""

from __future__ import annotations

import json
import sys

import torch
from torch import nn

import lion


def resident(key: str) -> int:
    """Return a figure of this process's memory in bytes."""
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(f"{key}:"))


def measure(how: str, layers: int) -> dict[str, int]:
    """Return the figures of three steps of a model."""
    torch.set_num_threads(1)
    model = nn.Sequential(*[nn.Linear(1024, 1024, bias=False) for _ in range(layers)])
    optimizer = lion.Lion(model.parameters())
    x = torch.randn(8, 1024)
    # Make the momentum, and load the kernels and whatever torch loads for a first backward.
    for layer in model:
        layer(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    if how == "backward":
        lion.StepInBackward(optimizer)
    before = resident("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak begins anew
    for _ in range(3):
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"gradients": sum(p.nbytes for p in model.parameters()), "peak": resident("VmHWM") - before}


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], int(sys.argv[2]))))

"""What measured: the date, the machine, the commit and the versions of what is compared."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from lion._cli import device_name
from lion.cpu_kernels.quantization import LOOKUPS

ROOT = Path(__file__).resolve().parent.parent
DISTRIBUTIONS = (
    *("numba-lion", "torch", "numba", "numba-cuda", "numpy", "bitsandbytes", "bitsandbytes-cpu-fork", "lion-pytorch"),
    *("torch-optimi", "pytorch-optimizer", "timm", "flashoptim", "torchao", "transformers"),
)


def machine(device: torch.device) -> dict[str, Any]:
    """Return the date, the commit, the processor or the GPU, and the versions of what is installed."""
    versions = {}
    for name in DISTRIBUTIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "machine": device_name(device) if device.type == "cuda" else models[0] if models else platform.processor(),
        "processors": os.cpu_count(),
        "lookups": LOOKUPS,
        "python": platform.python_version(),
        "versions": versions,
    }


def commit() -> str | None:
    """Return the checkout's commit, with a "+" if files are changed; None outside a checkout."""
    try:
        command = ["git", "-C", str(ROOT), "describe", "--always", "--exclude", "*", "--dirty=+"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None

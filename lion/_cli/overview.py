"""What ``python -m lion`` alone finds on this machine."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import torch
from rich.table import Table
from rich.text import Text

import lion
from lion import cpu_kernels
from lion._backends import CpuBackend, ReferenceBackend, for_device
from lion._cli import no_gpu, output, print_line, spelled
from lion._memory import paging
from lion.cuda_kernels import launch, simulator

DISTRIBUTIONS = ("torch", "numba", "numba-cuda", "numpy")
VARIABLES = ("LION_BACKEND", simulator.VARIABLE, "NUMBA_CACHE_DIR", paging.DIRECTORY_VARIABLE)


def found() -> dict[str, Any]:
    """Return the versions, devices, backends, environment variables that are set, and caches."""
    return {
        "versions": {
            "numba-lion": lion.__version__,
            "Python": platform.python_version(),
            **{name: _version(name) for name in DISTRIBUTIONS},
        },
        "devices": _devices(),
        "backends": {name: _backend(name) for name in ("cpu", "cuda")},
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "compiled_cpu_kernels": _compiled(lambda: numba.njit(cache=True)(cpu_kernels.update_32bit).stats.cache_path),
        "compiled_cuda_kernels": _compiled_cuda_kernels(),
        "paged_state": _paged_state(),
    }


def print_found(found: dict[str, Any]) -> None:
    """Print what was found, what matters most first."""
    console = output()
    devices, backends = found["devices"], found["backends"]
    gpus = [name for name in devices if name.startswith("cuda:")]
    cpu = "CPU ready" if backends["cpu"]["name"] else "CPU not ready"
    gpu = "GPU: none found"
    if gpus:
        gpu = f"{len(gpus)} GPUs" if len(gpus) > 1 else "GPU"
        gpu += " ready" if backends["cuda"]["name"] else " not ready"
    print_line(f"{cpu} · {gpu}\n", style="bold")

    rows = {
        "versions": ", ".join(f"{name} {version or 'not installed'}" for name, version in found["versions"].items())
    }
    for name, device in devices.items():
        backend = backends[name.partition(":")[0]]
        served = f"served by {backend['name']}" if backend["name"] else backend["problem"]
        rows[name] = device if served is None else f"{device}; {served}"
    rows.update(found["environment"])
    for name in ("cpu", "cuda"):
        if compiled := found[f"compiled_{name}_kernels"]:
            size = f"{compiled['files']} files, {compiled['bytes'] / 2**20:.1f} MiB"
            rows[f"{name} kernels"] = compiled["problem"] or f"{compiled['folder']} ({size})"
    paged = found["paged_state"]
    rows["paged state"] = paged["problem"] or f"{paged['folder']} ({paged['free_bytes'] / 2**30:.1f} GiB free)"
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for name, text in rows.items():
        # As text: brackets in a path are no markup.
        grid.add_row(Text(name, "bold"), Text(spelled(text)))
    console.print(grid)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> dict[str, str]:
    devices = {"cpu": f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads"}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices[f"cuda:{index}"] = (
            f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
            f"{properties.total_memory / 2**30:.0f} GiB"
        )
    if no_gpu():
        devices["cuda"] = no_gpu()
    return devices


def _backend(device: str) -> dict[str, str | None]:
    """Return the package that serves tensors of a device, or why none does."""
    try:
        backend = for_device(torch.device(device))
    except (RuntimeError, ValueError) as error:
        # Without a GPU no driver is missing.
        is_moot = device == "cuda" and no_gpu() and "CUDA driver" in str(error)
        return {"name": None, "problem": None if is_moot else str(error)}
    names = {CpuBackend: "lion.cpu_kernels", ReferenceBackend: "lion.reference"}
    where = " in Numba's simulator" * simulator.enabled()
    return {"name": names.get(type(backend), f"lion.cuda_kernels{where}"), "problem": None}


def _compiled_cuda_kernels() -> dict[str, Any] | None:
    if importlib.util.find_spec("numba_cuda") is None or simulator.enabled():
        return None
    return _compiled(launch.folder_on_disk)


def _compiled(place: Callable[[], str]) -> dict[str, Any]:
    """Return what lies in the folder where Numba keeps kernels; asking for its place compiles nothing."""
    try:
        # It follows from the place of a function's source.
        folder = Path(place())
    except (OSError, RuntimeError) as error:
        return {"folder": None, "files": 0, "bytes": 0, "problem": f"kept nowhere: {error}"}
    sizes = [path.stat().st_size for path in folder.glob("*.nb[ci]")]
    return {"folder": str(folder), "files": len(sizes), "bytes": sum(sizes), "problem": None}


def _paged_state() -> dict[str, Any]:
    folder = os.environ.get(paging.DIRECTORY_VARIABLE) or tempfile.gettempdir()
    try:
        return {"folder": folder, "free_bytes": shutil.disk_usage(folder).free, "problem": None}
    except OSError as error:
        return {"folder": folder, "free_bytes": 0, "problem": f"{folder}: {error.strerror}"}

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
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lion import cpu_kernels
from lion._backends import CpuBackend, ReferenceBackend, for_device
from lion._memory import paging
from lion.cuda_kernels import launch, simulator

DISTRIBUTIONS = ("numba-lion", "torch", "numba", "numba-cuda", "numpy")
VARIABLES = ("LION_BACKEND", simulator.VARIABLE, "NUMBA_CACHE_DIR", paging.DIRECTORY_VARIABLE)


def found() -> dict[str, Any]:
    """Return the versions, devices, backends, environment variables that are set, and caches."""
    return {
        "versions": {"Python": platform.python_version(), **{name: _version(name) for name in DISTRIBUTIONS}},
        "devices": _devices(),
        "backends": {name: _backend(name) for name in ("cpu", "cuda")},
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "compiled_cpu_kernels": _compiled(lambda: numba.njit(cache=True)(cpu_kernels.update_32bit).stats.cache_path),
        "compiled_cuda_kernels": _compiled_cuda_kernels(),
        "paged_state": _paged_state(),
    }


def print_tables(found: dict[str, Any]) -> None:
    """Print what was found."""
    paged = found["paged_state"]
    caches = {
        **{
            f"compiled {name.upper()} kernels": compiled["problem"]
            or f"{compiled['folder']} ({compiled['files']} files, {compiled['bytes'] / 2**20:.1f} MiB)"
            for name in ("cpu", "cuda")
            if (compiled := found[f"compiled_{name}_kernels"])
        },
        "paged state of CPU tensors": paged["problem"]
        or f"{paged['folder']} ({paged['free_bytes'] / 2**30:.1f} GiB free)",
    }
    served = {
        f"{name} tensors": backend["problem"] or f"served by {backend['name']}"
        for name, backend in found["backends"].items()
    }
    sections = {
        "Versions": {name: version or "not installed" for name, version in found["versions"].items()},
        "Devices": found["devices"],
        "Backends": served,
        "Environment": found["environment"],
        "Caches": caches,
    }
    console = Console()
    for title, rows in sections.items():
        if not rows:
            continue
        table = Table(title=title, title_justify="left", show_header=False)
        for name, value in rows.items():
            # As text: brackets in a path are no markup.
            table.add_row(Text(name), Text(value, overflow="fold"))
        console.print(table)


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
    if len(devices) == 1:
        devices["cuda"] = "torch finds no GPU"
    return devices


def _backend(device: str) -> dict[str, str | None]:
    """Return the package that serves tensors of a device, or why none does."""
    try:
        backend = for_device(torch.device(device))
    except (RuntimeError, ValueError) as error:
        return {"name": None, "problem": str(error)}
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

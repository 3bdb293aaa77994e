"""Managed memory: CUDA memory that the driver moves between a device and the host, page by page.

The functions need a CUDA context of the device to be current, as :mod:`lion.cuda_kernels.launch` does.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any


class Memory:
    """Managed memory of a device, freed with this object; a flat uint8 array to whatever reads CUDA arrays.

    Args:
        size: Bytes, at least 1.
        device: Index of the device, the current one.

    Raises:
        RuntimeError: If the device or its driver has no managed memory, or not enough.
    """

    def __init__(self, size: int, device: int) -> None:
        driver = _driver()
        if not _attribute(device, "CU_DEVICE_ATTRIBUTE_MANAGED_MEMORY"):
            raise RuntimeError(f"Paged state needs managed memory, which CUDA device {device} does not have")
        attach = driver.CUmemAttach_flags.CU_MEM_ATTACH_GLOBAL.value
        self.size = size
        self.address = int(
            _checked(f"allocate {size} bytes of managed memory", *driver.cuMemAllocManaged(size, attach))
        )
        context = _checked("get the current context", *driver.cuCtxGetCurrent())
        free = weakref.finalize(self, _free, context, self.address)
        # At the end of the process the driver frees everything, and may be gone already.
        free.atexit = False

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": (self.size,),
            "typestr": "|u1",
            "data": (self.address, False),
            "strides": None,
            "version": 3,
            "stream": None,
        }


def prefetch(address: int, size: int, device: int, stream: int) -> None:
    """Bring managed memory to a device, in the order of a stream; nothing where the device cannot be asked to.

    Args:
        address: Where the memory begins.
        size: Bytes.
        device: Index of the device, the current one.
        stream: Raw handle of a CUDA stream of the device, 0 for the default stream.

    Raises:
        RuntimeError: If the driver reports an error.
    """
    # Without this attribute (on Windows, for example) the driver moves all managed memory when a kernel is launched.
    if not size or not _attribute(device, "CU_DEVICE_ATTRIBUTE_CONCURRENT_MANAGED_ACCESS"):
        return
    driver = _driver()
    if driver.CUDA_VERSION < 13000:
        error = driver.cuMemPrefetchAsync(address, size, device, stream)
    else:
        location = driver.CUmemLocation()
        location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        location.id = device
        error = driver.cuMemPrefetchAsync(address, size, location, 0, stream)
    _checked(f"prefetch {size} bytes of managed memory", *error)


def _free(context: Any, address: int) -> None:
    """Free managed memory, whatever thread the last reference to it goes in."""
    driver = _driver()
    driver.cuCtxPushCurrent(context)
    driver.cuMemFree(address)
    driver.cuCtxPopCurrent()


def _driver() -> Any:
    """Return the driver API; its Python package comes with numba-cuda."""
    from cuda.bindings import driver

    return driver


@functools.cache
def _attribute(device: int, name: str) -> int:
    driver = _driver()
    attribute = getattr(driver.CUdevice_attribute, name)
    return int(_checked(f"ask for {name}", *driver.cuDeviceGetAttribute(attribute, device)))


def _checked(what: str, error: Any, value: Any = None) -> Any:
    """Return what a call of the driver returned besides the error."""
    if error.value:
        raise RuntimeError(f"Cannot {what}: {error.name}")
    return value

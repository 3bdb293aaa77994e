"""CUDA managed memory, as far as it can be tested without a GPU: which calls the driver gets, and when."""

from __future__ import annotations

import gc
import subprocess
import sys
from enum import IntEnum
from types import SimpleNamespace

import pytest

from lion.cuda_kernels import managed


class CUresult(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_OUT_OF_MEMORY = 2


class FakeDriver:
    """The part of ``cuda.bindings.driver`` that is used, for one version of CUDA."""

    def __init__(self, version, managed_memory=1, concurrent=1, room=10**9):
        self.CUDA_VERSION = version
        self.CUdevice_attribute = SimpleNamespace(
            CU_DEVICE_ATTRIBUTE_MANAGED_MEMORY=managed_memory, CU_DEVICE_ATTRIBUTE_CONCURRENT_MANAGED_ACCESS=concurrent
        )
        self.CUmemAttach_flags = SimpleNamespace(CU_MEM_ATTACH_GLOBAL=SimpleNamespace(value=1))
        self.CUmemLocationType = SimpleNamespace(CU_MEM_LOCATION_TYPE_DEVICE="device")
        self.CUmemLocation = SimpleNamespace
        self.room = room
        self.calls = []
        self.pushed = 0

    def cuDeviceGetAttribute(self, attribute, device):
        return CUresult.CUDA_SUCCESS, attribute

    def cuMemAllocManaged(self, size, flags):
        self.calls.append(("alloc", size, flags))
        if size > self.room:
            return CUresult.CUDA_ERROR_OUT_OF_MEMORY, 0
        return CUresult.CUDA_SUCCESS, 0x1000 * len(self.calls)

    def cuCtxGetCurrent(self):
        return CUresult.CUDA_SUCCESS, "context"

    def cuCtxPushCurrent(self, context):
        assert context == "context"
        self.pushed += 1
        return (CUresult.CUDA_SUCCESS,)

    def cuCtxPopCurrent(self):
        self.pushed -= 1
        return CUresult.CUDA_SUCCESS, "context"

    def cuMemFree(self, address):
        assert self.pushed == 1
        self.calls.append(("free", address))
        return (CUresult.CUDA_SUCCESS,)

    def cuMemPrefetchAsync(self, address, size, *place):
        if self.CUDA_VERSION < 13000:
            device, stream = place
        else:
            location, flags, stream = place
            assert (location.type, flags) == ("device", 0)
            device = location.id
        self.calls.append(("prefetch", address, size, device, stream))
        return (CUresult.CUDA_SUCCESS,)


@pytest.fixture(params=[12090, 13000, 13050])
def driver(request, monkeypatch):
    fake = FakeDriver(request.param)
    monkeypatch.setattr(managed, "_driver", lambda: fake)
    managed._attribute.cache_clear()
    yield fake
    managed._attribute.cache_clear()


def test_memory_is_freed_once_with_its_last_owner(driver):
    memory = managed.Memory(100_000, 0)
    assert driver.calls == [("alloc", 100_000, 1)]
    interface = memory.__cuda_array_interface__
    assert (interface["shape"], interface["typestr"], interface["data"]) == ((100_000,), "|u1", (0x1000, False))
    other = managed.Memory(50, 0)
    owner = {"tensor": memory}
    del memory
    gc.collect()
    assert len(driver.calls) == 2
    del owner
    gc.collect()
    assert driver.calls[2:] == [("free", 0x1000)]
    del other
    gc.collect()
    assert driver.calls[3:] == [("free", 0x2000)]
    assert driver.pushed == 0


def test_prefetch(driver):
    managed.prefetch(0x4000, 12345, 1, 77)
    managed.prefetch(0x8000, 0, 1, 77)
    assert driver.calls == [("prefetch", 0x4000, 12345, 1, 77)]


def test_a_device_that_cannot_prefetch(driver):
    driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_CONCURRENT_MANAGED_ACCESS = 0
    managed.prefetch(0x4000, 12345, 0, 77)
    assert driver.calls == []


def test_a_device_without_managed_memory(driver):
    driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MANAGED_MEMORY = 0
    with pytest.raises(RuntimeError, match="managed memory, which CUDA device 3 does not have"):
        managed.Memory(100, 3)
    assert driver.calls == []


def test_no_room(driver):
    with pytest.raises(RuntimeError, match="Cannot allocate 2000000000 bytes of managed memory: CUDA_ERROR_OUT_OF_"):
        managed.Memory(2 * 10**9, 0)
    gc.collect()
    assert [call[0] for call in driver.calls] == ["alloc"]


def test_the_real_driver_api_is_what_is_expected():
    """Its Python package can be imported without a driver."""
    driver = pytest.importorskip("cuda.bindings.driver")
    signature = driver.cuMemPrefetchAsync.__doc__.splitlines()[0]
    assert ("location" in signature) == (driver.CUDA_VERSION >= 13000)
    assert driver.CUmemAttach_flags.CU_MEM_ATTACH_GLOBAL.value == 1
    assert driver.CUresult.CUDA_SUCCESS.value == 0
    for name in ("MANAGED_MEMORY", "CONCURRENT_MANAGED_ACCESS"):
        assert hasattr(driver.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
    location = driver.CUmemLocation()
    location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    location.id = 3
    assert location.id == 3


def test_importing_needs_no_cuda_package():
    script = "import sys; sys.modules['cuda'] = None; import lion.cuda_kernels.managed"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=100)

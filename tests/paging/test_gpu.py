"""Paged state of CUDA tensors: managed memory, the unpaged class's bits, and freed with its tensor."""

from __future__ import annotations

import copy
import gc
import threading
import weakref

import pytest
import torch
from torch import nn

import lion
from lion._memory import paging
from tests.comparing import assert_same_bits

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

LARGE, SMALL = 1_000_003, 99_999
MIB = 2**20


def parameters(dtype=torch.float32, sizes=(LARGE, SMALL)):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(size, generator=generator).to("cuda", dtype)) for size in sizes]


def step(optimizer, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.randn(p.shape, generator=generator).to("cuda", p.dtype)
    optimizer.step()


def assert_same_state(one, other):
    for a, b in zip(one.state_dict()["state"].values(), other.state_dict()["state"].values(), strict=True):
        for key in a:
            assert_same_bits(a[key], b[key], what=key)


def is_managed(tensor):
    from cuda.bindings import driver

    attribute = driver.CUpointer_attribute.CU_POINTER_ATTRIBUTE_IS_MANAGED
    error, managed = driver.cuPointerGetAttribute(attribute, tensor.data_ptr())
    assert error.value == 0
    return bool(managed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["Lion", "Lion8bit", "Lion32bit"])
def test_bits_of_the_unpaged_class(name, dtype):
    paged = getattr(lion, f"Paged{name}")(parameters(dtype), lr=1e-3, weight_decay=0.1)
    plain = getattr(lion, name)(parameters(dtype), lr=1e-3, weight_decay=0.1)
    for seed in range(4):
        step(paged, seed)
        step(plain, seed)
    for p, q in zip(paged.state, plain.state, strict=True):
        assert_same_bits(p, q)
    assert_same_state(paged, plain)
    large, small = paged.state.values()
    assert large["state1"].is_cuda and is_managed(large["state1"])
    assert not is_managed(small["state1"])
    assert not any(is_managed(t) for t in next(iter(plain.state.values())).values())


@pytest.mark.parametrize("copied", [copy.deepcopy, None], ids=["deepcopy", "load_state_dict"])
def test_copies_are_paged(copied):
    optimizer = lion.PagedLion8bit(parameters())
    step(optimizer)
    if copied:
        other = copied(optimizer)
    else:
        other = lion.PagedLion8bit(parameters())
        other.load_state_dict(optimizer.state_dict())
    assert all(is_managed(next(iter(other.state.values()))[key]) for key in ("state1", "absmax1"))
    assert_same_state(other, optimizer)
    step(other, seed=1)
    step(optimizer, seed=1)
    assert_same_state(other, optimizer)


def test_state_is_freed():
    params = parameters(sizes=(64 * MIB,))

    def free_bytes():
        gc.collect()
        torch.cuda.synchronize()
        # Else what torch keeps of former gradients would count as taken.
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]

    step(lion.PagedLion(params))
    free = free_bytes()
    optimizer = lion.PagedLion(params)
    step(optimizer)
    # Prefetched to the device.
    assert free - free_bytes() >= 200 * MIB
    del optimizer
    assert free - free_bytes() < 32 * MIB


def test_another_stream_and_another_thread():
    optimizer, plain = lion.PagedLion8bit(parameters(), lr=1e-3), lion.Lion8bit(parameters(), lr=1e-3)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step(optimizer)
        step(optimizer, seed=1)
    stream.synchronize()
    thread = threading.Thread(target=step, args=(optimizer, 2))
    thread.start()
    thread.join()
    for seed in range(3):
        step(plain, seed)
    torch.cuda.synchronize()
    assert_same_state(optimizer, plain)


def test_portions():
    """State that is updated by several kernel calls, each with its own prefetch."""
    sizes = (70 * MIB, 70 * MIB, SMALL)
    paged, plain = lion.PagedLion(parameters(sizes=sizes)), lion.Lion(parameters(sizes=sizes))
    for each in (paged, plain):
        for p in each.param_groups[0]["params"]:
            p.grad = p.detach().flip(0)
        each.step()
        each.step()
    for a, b in zip(paged.state.values(), plain.state.values(), strict=True):
        assert torch.equal(a["state1"], b["state1"])


def test_a_fork_moves_nothing():
    assert paging.is_paged(tensor := paging.empty(torch.Size([LARGE]), torch.uint8, torch.device("cuda", 0)))
    paging._count_fork()
    assert paging.is_paged(tensor)


def test_state_is_not_given_away_before_the_step_that_moves_it_has_ended():
    """The optimizer goes while the GPU has not begun with its step, and others fill what memory comes free."""
    plain = parameters()
    other = lion.Lion8bit(plain, lr=1e-3, weight_decay=0.1)
    for seed in range(2):
        step(other, seed)
    grads = [p.grad for p in plain]
    stream, pattern = torch.cuda.Stream(), 0xA5
    for _ in range(100):
        params = parameters()
        optimizer = lion.PagedLion8bit(params, lr=1e-3, weight_decay=0.1)
        step(optimizer)
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        torch.cuda.synchronize()
        torch.cuda._sleep(5_000_000)  # clock cycles, some milliseconds
        optimizer.step()
        gone = weakref.ref(optimizer)
        del optimizer
        assert gone() is None
        with torch.cuda.stream(stream):
            filled = [
                paging.empty(torch.Size([size]), torch.uint8, torch.device("cuda", 0)).fill_(pattern)
                for size in (LARGE, 4 * -(-LARGE // 256), LARGE)
            ]
        torch.cuda.synchronize()
        for p, q in zip(params, plain, strict=True):
            assert_same_bits(p, q)
        assert all(bool((tensor == pattern).all()) for tensor in filled)

"""Paged state of CPU tensors: which tensors, always, and with the bits of the unpaged classes."""

from __future__ import annotations

import copy
import gc
import io
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import lion
from lion import _plan as plan
from lion._memory import paging
from tests.comparing import assert_same_bits

LARGE, SMALL = 100_000, 99_999
CLASSES = {
    "PagedLion": lion.Lion,
    "PagedLion32bit": lion.Lion32bit,
    "PagedLion8bit": lion.Lion8bit,
}
every_class = pytest.mark.parametrize("paged_class, plain_class", [(getattr(lion, k), v) for k, v in CLASSES.items()])


def parameters(dtype=torch.float32, sizes=(LARGE, SMALL)):
    rng = np.random.default_rng(0)
    return [nn.Parameter(torch.from_numpy(rng.normal(size=size)).to(dtype)) for size in sizes]


def step(optimizer, seed=0):
    rng = np.random.default_rng(seed)
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.from_numpy(rng.normal(size=p.numel())).reshape(p.shape).to(p.dtype)
    optimizer.step()


def paged_keys(optimizer):
    """Return the names of the paged tensors of each parameter's state."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [{key for key, value in optimizer.state[p].items() if paging.is_paged(value)} for p in params]


def assert_same_state(one, other):
    for a, b in zip(one.state_dict()["state"].values(), other.state_dict()["state"].values(), strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert_same_bits(a[key], b[key], what=key)


@every_class
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"percentile_clipping": 40}, {"block_wise": False}], ids=str)
def test_bits_of_the_unpaged_class(paged_class, plain_class, dtype, options):
    sizes = (LARGE, SMALL, 250_007, 10)
    params, others = parameters(dtype, sizes), parameters(dtype, sizes)
    paged = paged_class(params, lr=1e-3, weight_decay=0.1, **options)
    plain = plain_class(others, lr=1e-3, weight_decay=0.1, **options)
    for seed in range(4):
        step(paged, seed)
        step(plain, seed)
    for p, q in zip(params, others, strict=True):
        assert_same_bits(p, q)
    assert_same_state(paged, plain)
    keys = {"state1", "absmax1"} & set(plain.state[others[0]])
    assert paged_keys(paged) == [keys, set(), keys, set()]
    assert paged_keys(plain) == [set()] * 4


def test_the_reference_writes_into_paged_state_too():
    with lion.use_backend("reference"):
        params = parameters()
        optimizer = lion.PagedLion8bit(params)
        step(optimizer)
    other = lion.Lion8bit(parameters())
    step(other)
    assert_same_state(optimizer, other)
    assert paged_keys(optimizer) == [{"state1", "absmax1"}, set()]


# --- still paged


def loaded(optimizer):
    other = lion.PagedLion8bit(parameters())
    other.load_state_dict(optimizer.state_dict())
    return other


def loaded_from_a_file(optimizer):
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    other = lion.PagedLion8bit(parameters())
    other.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    return other


def loaded_into_unpaged_groups_that_are_overridden(optimizer):
    params = parameters()
    lion.GlobalOptimManager.get_instance().override_config(params, "is_paged", True)
    other = lion.Lion8bit(params)
    other.load_state_dict(optimizer.state_dict())
    return other


def whole_in_a_file(optimizer):
    file = io.BytesIO()
    torch.save(optimizer, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


COPIES = {
    "load_state_dict": loaded,
    "torch.load": loaded_from_a_file,
    "override": loaded_into_unpaged_groups_that_are_overridden,
    "deepcopy": copy.deepcopy,
    "pickle": lambda optimizer: pickle.loads(pickle.dumps(optimizer)),
    "torch.save": whole_in_a_file,
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_copies_are_paged(copied):
    optimizer = lion.PagedLion8bit(parameters(), lr=1e-3)
    step(optimizer)
    other = copied(optimizer)
    assert paged_keys(other) == [{"state1", "absmax1"}, set()]
    assert_same_state(other, optimizer)
    before = copy.deepcopy(optimizer.state_dict()["state"])
    step(other, seed=1)
    for saved, now in zip(before.values(), optimizer.state_dict()["state"].values(), strict=True):
        for key in saved:
            assert_same_bits(now[key], saved[key], what=key)
    step(optimizer, seed=1)
    assert_same_state(other, optimizer)
    assert paged_keys(other) == paged_keys(optimizer) == [{"state1", "absmax1"}, set()]


def test_option_changed_between_steps():
    optimizer, plain = lion.Lion8bit(parameters(), lr=1e-3), lion.Lion8bit(parameters(), lr=1e-3)
    for seed, paged in enumerate([False, True, True, False, True]):
        optimizer.param_groups[0]["is_paged"] = paged
        step(optimizer, seed)
        step(plain, seed)
        assert paged_keys(optimizer) == [{"state1", "absmax1"} if paged else set(), set()]
    assert_same_state(optimizer, plain)


def test_override_changed_between_steps():
    manager = lion.GlobalOptimManager.get_instance()
    params = parameters(sizes=(LARGE, LARGE))
    optimizer = lion.Lion(params, lr=1e-3)
    step(optimizer)
    manager.override_config(params[1], "is_paged", True)
    step(optimizer)
    assert paged_keys(optimizer) == [set(), {"state1"}]
    manager.override_config(params, "is_paged", False)
    step(optimizer)
    assert paged_keys(optimizer) == [set(), set()]


def test_groups_differ():
    one, two = parameters(sizes=(LARGE, LARGE))
    optimizer = lion.Lion([{"params": [one], "is_paged": True}, {"params": [two]}])
    optimizer.add_param_group({"params": parameters(sizes=(LARGE,)), "is_paged": True, "optim_bits": 8})
    step(optimizer)
    assert paged_keys(optimizer) == [{"state1"}, set(), {"state1", "absmax1"}]


def test_paged_state_is_stepped_in_portions(monkeypatch):
    """What one kernel call works on has to fit on a device beside everything else."""
    monkeypatch.setattr(plan, "_PORTION", 250_000)
    params = [nn.Parameter(torch.ones(size)) for size in (100_000, 100_000, 10, 100_000, 100_000)]
    optimizer = lion.PagedLion8bit(params, min_8bit_size=0)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    together = [list(part.members(range(len(params)))) for part in optimizer._plans[0]._parts]
    assert together == [[0, 1, 3], [2], [4]]


def test_conversion_of_paged_state():
    optimizer, plain = lion.PagedLion(parameters()), lion.Lion(parameters())
    for seed, bits in enumerate([32, 8, 32]):
        for each in (optimizer, plain):
            each.param_groups[0]["optim_bits"] = bits
            step(each, seed)
        assert paged_keys(optimizer)[0] == ({"state1", "absmax1"} if bits == 8 else {"state1"})
    assert_same_state(optimizer, plain)


# --- files


def mapped_files(folder):
    lines = Path("/proc/self/maps").read_text().splitlines()
    return [line for line in lines if f" {folder}/" in line]


def test_files_are_in_the_chosen_folder_and_without_name(tmp_path, monkeypatch):
    monkeypatch.setenv("LION_PAGE_DIR", str(tmp_path))
    gc.collect()
    descriptors = len(os.listdir("/proc/self/fd"))
    optimizer = lion.PagedLion8bit(parameters())
    step(optimizer)
    assert len(mapped_files(tmp_path)) == 2
    assert all(line.endswith("(deleted)") and " rw-s " in line for line in mapped_files(tmp_path))
    assert os.listdir(tmp_path) == []
    assert len(os.listdir("/proc/self/fd")) == descriptors
    copies = [copy.deepcopy(optimizer) for _ in range(3)]
    assert len(mapped_files(tmp_path)) == 8
    del copies
    gc.collect()
    assert len(mapped_files(tmp_path)) == 2
    optimizer.param_groups[0]["is_paged"] = False
    step(optimizer)
    gc.collect()
    assert mapped_files(tmp_path) == []


def test_a_tensor_outlives_its_optimizer(tmp_path, monkeypatch):
    monkeypatch.setenv("LION_PAGE_DIR", str(tmp_path))
    params = parameters()
    optimizer = lion.PagedLion(params)
    step(optimizer)
    momentum = optimizer.state[params[0]]["state1"]
    expected = momentum.clone()
    del optimizer
    gc.collect()
    assert_same_bits(momentum, expected)
    view = momentum[10:20]
    del momentum
    gc.collect()
    assert len(mapped_files(tmp_path)) == 1
    assert_same_bits(view, expected[10:20])
    del view
    gc.collect()
    assert mapped_files(tmp_path) == []


def test_the_default_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("LION_PAGE_DIR", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    step(optimizer := lion.PagedLion(parameters()))
    assert len(mapped_files(tmp_path)) == 1
    assert optimizer.state

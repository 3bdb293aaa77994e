"""No room, no folder, no permission: one clear error, and nothing half-made."""

from __future__ import annotations

import copy
import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lion
from lion._memory import paging
from tests.comparing import assert_same_bits
from tests.paging.test_paged import LARGE, parameters, step


def fill(monkeypatch):
    """Let a reservation fail after one has succeeded."""
    calls = []
    reserve = os.posix_fallocate

    def fail_later(*arguments):
        calls.append(arguments)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        reserve(*arguments)

    monkeypatch.setattr(os, "posix_fallocate", fail_later)


def no_room(monkeypatch, tmp_path):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=4 * LARGE - 1))


def missing(monkeypatch, tmp_path):
    monkeypatch.setenv("LION_PAGE_DIR", str(tmp_path / "missing"))


def not_a_folder(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("LION_PAGE_DIR", str(tmp_path / "file"))


def read_only(monkeypatch, tmp_path):
    # Not even the superuser may make files there.
    monkeypatch.setenv("LION_PAGE_DIR", "/sys")


def full(monkeypatch, tmp_path):
    fill(monkeypatch)


FAULTS = {
    missing: FileNotFoundError,
    not_a_folder: NotADirectoryError,
    read_only: OSError,
    no_room: OSError,
    full: OSError,
}
every_fault = pytest.mark.parametrize("fault, error", FAULTS.items(), ids=[f.__name__ for f in FAULTS])


@every_fault
def test_first_step(fault, error, monkeypatch, tmp_path):
    params = parameters(sizes=(LARGE, LARGE))
    before = [p.detach().clone() for p in params]
    optimizer = lion.PagedLion(params)
    monkeypatch.setenv("LION_PAGE_DIR", str(tmp_path))
    with monkeypatch.context() as patch:
        fault(patch, tmp_path)
        with pytest.raises(error, match="400000 bytes for paged state .*LION_PAGE_DIR chooses the folder"):
            step(optimizer)
    assert not optimizer.state
    for p, saved in zip(params, before, strict=True):
        assert_same_bits(p, saved)
    assert not [name for name in os.listdir(tmp_path) if name != "file"]

    step(optimizer)
    other = lion.Lion(parameters(sizes=(LARGE, LARGE)))
    step(other)
    for p, q in zip(params, other.param_groups[0]["params"], strict=True):
        assert_same_bits(p, q)


@every_fault
def test_later(fault, error, monkeypatch, tmp_path):
    """Loading, and a step that has to move state, change nothing when they fail."""
    monkeypatch.setenv("LION_PAGE_DIR", str(tmp_path))
    source = lion.Lion(parameters(sizes=(LARGE, LARGE)))
    step(source, seed=1)
    saved = copy.deepcopy(source.state_dict())

    optimizer = lion.PagedLion(parameters(sizes=(LARGE, LARGE)))
    step(optimizer)
    before = copy.deepcopy(optimizer.state_dict()["state"])
    with monkeypatch.context() as patch:
        fault(patch, tmp_path)
        with pytest.raises(error, match="paged state"):
            optimizer.load_state_dict(saved)
    for state, expected in zip(optimizer.state.values(), before.values(), strict=True):
        for key in expected:
            assert_same_bits(state[key], expected[key])
        assert paging.is_paged(state["state1"])

    params = [p.detach().clone() for p in source.state]
    source.param_groups[0]["is_paged"] = True
    with monkeypatch.context() as patch:
        fault(patch, tmp_path)
        with pytest.raises(error, match="paged state"):
            step(source)
    for p, q in zip(source.state, params, strict=True):
        assert_same_bits(p, q)
    for state, expected in zip(source.state.values(), saved["state"].values(), strict=True):
        for key in expected:
            assert_same_bits(state[key], expected[key])


def test_a_platform_without_reservation(monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate")
    optimizer = lion.PagedLion(parameters())
    with pytest.raises(RuntimeError, match="posix_fallocate"):
        step(optimizer)
    assert not optimizer.state


FULL_DISK = """
import torch, lion
p = torch.nn.Parameter(torch.zeros(200_000))
q = torch.nn.Parameter(torch.zeros(200_000))
optimizer = lion.PagedLion([p, q])
p.grad = q.grad = torch.ones(200_000)
try:
    optimizer.step()
except OSError as error:
    print(error.errno, len(optimizer.state), p.sum().item())
"""


def test_a_disk_that_is_really_full(tmp_path):
    """In a mount namespace of its own, with a file system of 1 MB: there is room for one tensor but not for two."""
    mounted = f"mount -t tmpfs -o size=1m none {tmp_path} && exec '{sys.executable}' -c '{FULL_DISK}'"
    unshared = ["unshare", "--mount", "--map-root-user"]
    if shutil.which("unshare") is None or subprocess.run([*unshared, "true"], capture_output=True).returncode:
        pytest.skip("no right to make a mount namespace")
    done = subprocess.run(
        [*unshared, "sh", "-c", mounted],
        env={**os.environ, "LION_PAGE_DIR": str(tmp_path)},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.stdout.split() == [str(errno.ENOSPC), "0", "0.0"], done.stderr


def test_too_large_for_any_disk():
    with pytest.raises(OSError, match="No space left on device") as caught:
        paging.empty(torch.Size([2**50]), torch.float32, torch.device("cpu"))
    assert caught.value.errno == errno.ENOSPC

"""Paged state takes no anonymous memory, by the process's own figures, and the operating system can page it out."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest

NUMEL = 25_600_000
# The system maps, and keeps when asked to page out, whole huge pages of 2 MiB at either end of a mapping.
NOISE = 8 * 2**20
BYTES = {"Lion": 4.0, "Lion8bit": 1 + 4 / 256}


@pytest.fixture(scope="module")
def measured():
    """Return a function that measures a class in a process of its own, once."""
    results = {}

    def measure(name):
        if name not in results:
            command = [sys.executable, "-m", "tests.paging.memory", name, str(NUMEL)]
            done = subprocess.run(
                command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, check=True, timeout=200
            )
            results[name] = json.loads(done.stdout)
        return results[name]

    return measure


pytestmark = pytest.mark.skipif(platform.system() != "Linux", reason="reads /proc/self/status")


@pytest.mark.parametrize("name", BYTES)
def test_unpaged_state_is_anonymous(name, measured):
    figures = measured(name)
    assert figures["state"] == NUMEL * BYTES[name]
    assert abs(figures["anonymous"] - figures["state"]) < NOISE
    assert figures["file"] < NOISE


@pytest.mark.parametrize("name", BYTES)
def test_paged_state_is_not(name, measured):
    figures = measured(f"Paged{name}")
    assert figures["state"] == NUMEL * BYTES[name]
    assert figures["anonymous"] < NOISE
    assert abs(figures["file"] - figures["state"]) < NOISE


@pytest.mark.parametrize("name", BYTES)
def test_paged_state_can_leave_memory_and_come_back(name, measured):
    figures = measured(f"Paged{name}")
    if figures["file_after_paging_out"] >= figures["state"]:
        pytest.skip("this system does not page out on request, or LION_PAGE_DIR lies in memory")
    assert figures["file_after_paging_out"] < NOISE
    assert figures["contents_kept"]

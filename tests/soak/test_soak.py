"""A few seconds of what ``python -m tests.soak`` does for minutes or an hour."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files in /proc")
def test_a_few_seconds() -> None:
    command = [sys.executable, "-m", "tests.soak", "--minutes", "0.1"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " steps, " in done.stdout

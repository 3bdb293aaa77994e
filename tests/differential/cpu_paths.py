"""The lookups that a processor has besides those that are chosen for it, and how to ask for them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from lion.cpu_kernels import avx2, avx512, portable, quantization

_ORDER = [avx512.NAME, avx2.NAME, portable.NAME]
OTHERS = _ORDER[_ORDER.index(quantization.LOOKUPS) + 1 :]
ENVIRONMENTS = {
    avx2.NAME: {"NUMBA_CPU_NAME": "x86-64-v3", "NUMBA_CPU_FEATURES": "+avx2,+fma"},
    portable.NAME: {"NUMBA_CPU_NAME": "x86-64-v3", "NUMBA_CPU_FEATURES": "+f16c"},
}
_SHOW = "from lion.cpu_kernels import quantization; print(quantization.LOOKUPS)"

on_others = pytest.mark.parametrize("lookups", OTHERS)


def run_tests(lookups: str, *arguments: str) -> None:
    """Run tests with other lookups in a process of its own; fail if they fail."""
    environment = {**os.environ, **ENVIRONMENTS[lookups]}
    shown = subprocess.run(
        [sys.executable, "-c", _SHOW], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    assert shown.stdout.strip() == lookups
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert result.returncode == 0, result.stdout

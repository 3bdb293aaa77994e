"""Modules by their names after `import lion` alone, whatever was imported before."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "name", ["exchange", "functional", "in_backward", "optim", "optimizers", "overrides", "reference", "trainer"]
)
def test_a_module_is_there_after_importing_the_package(name: str) -> None:
    code = f"import sys, lion; assert lion.{name} is sys.modules['lion.{name}']"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_specification_comes_without_torch() -> None:
    code = "import sys, lion; lion.reference.create_dynamic_map(); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

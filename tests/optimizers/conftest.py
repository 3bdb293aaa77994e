"""Fixtures of the optimizer tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lion import GlobalOptimManager


@pytest.fixture(autouse=True)
def no_overrides() -> Iterator[None]:
    """Forget the process-wide overrides around every test."""
    GlobalOptimManager.get_instance().initialize()
    yield
    GlobalOptimManager.get_instance().initialize()

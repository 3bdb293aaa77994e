"""Overrides are forgotten between tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import lion


@pytest.fixture(autouse=True)
def no_overrides() -> Iterator[None]:
    yield
    lion.GlobalOptimManager.get_instance().initialize()

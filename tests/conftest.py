"""Settings shared by all tests."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from multiprocessing.context import ForkServerContext

import pytest
from hypothesis import HealthCheck, Phase, settings

settings.register_profile("default", deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("thorough", parent=settings.get_profile("default"), max_examples=2000)
settings.register_profile("few", parent=settings.get_profile("default"), max_examples=5)
settings.register_profile(  # a failure is enough, the simplest one is not needed
    "mutation",
    parent=settings.get_profile("default"),
    phases=[Phase.explicit, Phase.generate],
    derandomize=True,
    database=None,
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "interop: compares with another project that has to be installed")


@pytest.fixture(scope="session")
def forking() -> ForkServerContext:
    """Return what starts processes in which everything is imported already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.warm"])
    return context


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Let torch compute in one thread: several wait for one another by spinning, for seconds beside other tests."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

"""Variants of the CUDA kernels that are timed beside each other."""

from __future__ import annotations

from collections.abc import Callable


def _as_they_are() -> None:
    pass


# What makes each of them: called in a process of its own, before the first kernel is compiled. Kernels on disk go by
# the sources alone, so one that is compiled in another way has to be compiled without that cache.
VARIANTS: dict[str, Callable[[], None]] = {"as they are": _as_they_are}

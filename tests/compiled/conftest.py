"""The linker is loaded before torch is, which may be of an older CUDA and bring a linker of its own."""

from __future__ import annotations

from contextlib import suppress

with suppress(Exception):  # where it is missing, the tests that need it say so
    from cuda.bindings import nvjitlink

    nvjitlink.version()

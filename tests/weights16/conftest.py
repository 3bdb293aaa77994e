"""Overrides are forgotten around every test."""

from tests.optimizers.conftest import no_overrides

__all__ = ["no_overrides"]

"""Tables and pictures of what is stored."""

from pathlib import Path

from rich.console import Console

from benchmarks.training.store import Store


def show(store: Store, console: Console) -> None:
    """Print."""


def draw(store: Store, folder: Path) -> list[Path]:
    """Draw."""
    return []

"""The Python examples in the README and the documentation run, page by page, from top to bottom."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from lion import GlobalOptimManager

ROOT = Path(__file__).parents[2]
PAGES = sorted({*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")} - {*(ROOT / "docs" / "_build").rglob("*.md")})
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[tuple[int, str]]:
    """Return the Python blocks of a page, each with the line that it begins on."""
    text = page.read_text()
    return [(text.count("\n", 0, found.start(1)), found[1]) for found in BLOCK.finditer(text)]


@pytest.fixture(autouse=True)
def own_folder_and_no_overrides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield
    GlobalOptimManager.get_instance().initialize()


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda p: str(p.relative_to(ROOT)))
def test_blocks_of_a_page_run(page: Path) -> None:
    namespace = {"__name__": "__main__"}
    for line, source in blocks(page):
        # Blank lines keep the page's line numbers in a traceback.
        exec(compile("\n" * line + source, str(page), "exec"), namespace)


def test_pages_have_blocks() -> None:
    with_blocks = {str(p.relative_to(ROOT)) for p in PAGES if blocks(p)}
    assert {"README.md", "docs/index.md", "docs/options.md", "docs/numerics.md"} <= with_blocks

"""How the notebooks are kept; the build of the documentation runs them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "docs" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def cells(path: Path, kind: str) -> list[tuple[str, dict[str, Any]]]:
    return [("".join(c["source"]), c) for c in json.loads(path.read_text())["cells"] if c["cell_type"] == kind]


def test_all_are_in_the_index() -> None:
    index = (FOLDER / "index.md").read_text().splitlines()
    assert len(NOTEBOOKS) == 7
    assert all(path.stem in index for path in NOTEBOOKS)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_form(path: Path) -> None:
    text = [source for source, _ in cells(path, "markdown")]
    assert "At the end you will know" in text[0]
    assert any("## Exercises" in source for source in text)
    assert path.stat().st_size < 300_000
    for source, cell in cells(path, "code"):
        assert cell["outputs"] == [] and cell["execution_count"] is None
        # What is shown comes from a cell that also checks it, or shows what the cell before it has checked.
        assert not re.search(r"^\s*(def|class) .*draw", source, re.MULTILINE)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_figures_are_checked(path: Path) -> None:
    code = [source for source, _ in cells(path, "code")]
    for previous, source in zip(["", *code], code, strict=False):
        if "show(" in source or "table(" in source and "def table" not in source:
            assert "assert " in source or "assert " in previous or "lanes(" in source, source
    answers = [source for source, cell in cells(path, "code") if "hide-input" in cell["metadata"].get("tags", [])]
    assert len(answers) == 3 and all("assert " in source for source in answers)


def test_stored_counts_are_of_the_stages() -> None:
    code = "\n".join(source for source, _ in cells(FOLDER / "from-numpy-to-cuda.ipynb", "code"))
    stored = json.loads((FOLDER / "compiled_counts.json").read_text())
    assert len(stored) == 6
    for name, counts in stored.items():
        assert f'"{name}"' in code
        assert set(counts) == {"instructions", "registers", "fused", "load bits", "store bits"}

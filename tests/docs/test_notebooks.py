"""How the notebooks are kept; the build of the documentation runs them."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "docs" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def cells(path: Path, kind: str) -> list[tuple[str, dict[str, Any]]]:
    return [("".join(c["source"]), c) for c in json.loads(path.read_text())["cells"] if c["cell_type"] == kind]


def minutes(path: Path) -> int:
    """Time to read a notebook, to five minutes: 200 words or 12 lines of unfolded code a minute."""
    words = sum(len(source.split()) for source, _ in cells(path, "markdown"))
    shown = [s for s, cell in cells(path, "code") if "hide-input" not in cell["metadata"].get("tags", [])]
    lines = sum(bool(line.strip()) for source in shown for line in source.splitlines())
    return 5 * round((words / 200 + lines / 12) / 5)


def test_the_index_has_a_card_for_each_in_order() -> None:
    index = (FOLDER / "index.md").read_text()
    titled = r"\{grid-item-card\} \[(\d)\. (.+)\]\((.+)\.ipynb\)\n\n```\{raw\} html\n:file: cards/(.+)\.html\n"
    cards = re.findall(titled + r"```\n.+\n\n\*\*(\d+) minutes\.\*\* Needs", index)
    order = index[index.index(":maxdepth: 1") :].split()[2:-1]
    assert sorted(order) == [path.stem for path in NOTEBOOKS] and len(order) == 7
    assert [(int(number), name) for number, _, name, _, _ in cards] == list(enumerate(order, start=1))
    for _, title, name, picture, time in cards:
        path = FOLDER / f"{name}.ipynb"
        assert cells(path, "markdown")[0][0].startswith(f"# {title}\n")
        assert picture == name and f'href="{name}.html"' in (FOLDER / "cards" / f"{picture}.html").read_text()
        assert int(time) == minutes(path), name


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
    checked = False
    for source, _ in cells(path, "code"):
        shown = "show(" in source or "table(" in source and "def table" not in source
        checked = "assert " in source or shown and checked
        assert not shown or checked, source


def tagged(path: Path, tag: str) -> list[str]:
    return [source for source, cell in cells(path, "code") if tag in cell["metadata"].get("tags", [])]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_exercises_are_stubs_with_folded_answers(path: Path) -> None:
    stubs, answers = tagged(path, "exercise"), tagged(path, "answer")
    assert len(stubs) == len(answers) >= 3
    for number, (stub, answer) in enumerate(zip(stubs, answers, strict=True), start=1):
        # The check stands beside the stub, and the answer has to pass it.
        name = re.search(rf"^attempt\(check_{number}, (\w+)\)$", stub, re.MULTILINE)
        assert name and "raise NotImplementedError" in stub and f"def check_{number}(mine):" in stub
        assert answer.startswith("# ") and answer.endswith(f"check_{number}({name[1]})")
    assert set(answers) <= set(tagged(path, "hide-input"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_code_fits_the_page_and_drawings_are_folded(path: Path) -> None:
    for source, cell in cells(path, "code"):
        assert all(len(line) <= 88 for line in source.splitlines()), source
        drawing = re.search(r"\b(show|table)\(", source) and "def " not in source
        assert not drawing or "hide-input" in cell["metadata"]["tags"], source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_the_end_says_what_to_read_next(path: Path) -> None:
    *_, (last, _) = cells(path, "markdown")
    assert last.startswith("## What to read next") and ".ipynb)" in last


def test_an_attempt_is_told_how_it_went(capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("exercises", FOLDER / "exercises.py")
    assert spec and spec.loader
    exercises = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(exercises)

    def check(mine: Callable[[int], int]) -> None:
        assert mine(2) == 4

    def stub(x: int) -> int:
        raise NotImplementedError

    for mine, told in ((stub, "Not filled in yet"), (lambda x: x, "assert mine(2) == 4"), (lambda x: 2 * x, "Right")):
        exercises.attempt(check, mine)
        assert told in capsys.readouterr().out


def test_stored_counts_are_of_the_stages() -> None:
    code = "\n".join(source for source, _ in cells(FOLDER / "from-numpy-to-cuda.ipynb", "code"))
    stored = json.loads((FOLDER / "compiled_counts.json").read_text())
    assert len(stored) == 6
    for name, counts in stored.items():
        assert f'"{name}"' in code
        assert set(counts) == {"instructions", "registers", "fused", "load bits", "store bits"}

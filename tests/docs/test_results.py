"""Pages and pictures show the stored results."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import results
from benchmarks.training import report
from benchmarks.training.contestants import BY_NAME
from benchmarks.training.store import Store
from lion._cli import demo

LABEL = re.compile('aria-label="(.*?)"')


def on_h100(name: str) -> str:
    return results.milliseconds(results.gpu_runs()[results.TITLES["one"], "bfloat16", 0][name])


# Sentences with figures, and the figures.
SENTENCES = {
    "bfloat16 parameters takes {} ms; torch's fused AdamW takes {} ms and bitsandbytes' `Lion8bit` {} ms": (
        ["Lion8bit", "torch AdamW", "bitsandbytes Lion8bit"],
        ["README.md", "docs/index.md"],
    ),
    "because it moves fewer bytes: {} against {} ms for 16 million bfloat16 parameters": (
        ["Lion8bit", "Lion"],
        ["docs/choosing.md"],
    ),
}


@pytest.mark.parametrize("sentence", SENTENCES)
def test_figures_in_sentences_are_those_of_the_results(sentence: str) -> None:
    names, places = SENTENCES[sentence]
    for place in places:
        text = " ".join((results.ROOT / place).read_text(encoding="utf-8").split())
        assert sentence.format(*map(on_h100, names)) in text


@pytest.mark.parametrize("page", results.pages(), ids=lambda page: page.relative_to(results.ROOT).as_posix())
def test_tables_are_those_of_the_results(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text == results.rewritten(text), "python -m benchmarks.results"


def test_the_tables_come_from_the_results() -> None:
    text = (results.ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    changed = re.sub(r"(\| `Lion` \| )[\d.]+", r"\g<1>1234", text, count=1)
    assert changed != text == results.rewritten(changed)


def test_the_picture_shows_the_stored_results() -> None:
    drawn = results.draw(results.panels(results.cpu_runs("cpu-epyc-zen4.json"), results.gpu_runs()))
    assert results.PICTURE.read_text(encoding="utf-8") == drawn, "python -m benchmarks.results"


def test_bars_are_as_long_as_others_take() -> None:
    drawing = results.draw({"a machine": {"Lion": {"times": None}, "slow": {"times": 4.0}, "slower": {"times": 29.0}}})
    assert [f'width="{length}"' in drawing for length in ("10.0", "40.0", "290.0")] == [True] * 3
    assert drawing.index(">slow<") < drawing.index(">slower<")


@pytest.mark.parametrize("name", [name for name in results.TRAININGS if (results.FOLDER / f"{name}.json").exists()])
def test_pictures_of_trainings_show_the_stored_results(name: str, tmp_path: Path) -> None:
    for drawn in report.draw(Store(results.FOLDER / f"{name}.json"), tmp_path, f"{name}-"):
        shown = results.PICTURE.parent / drawn.name
        # What is drawn besides the figures depends on matplotlib's version.
        labels = [LABEL.findall(path.read_text(encoding="utf-8")) for path in (shown, drawn)]
        assert labels[0] == labels[1] != [], "python -m benchmarks.results"


@pytest.mark.parametrize("path", list(results.FOLDER.glob("training-tiny.json")), ids=lambda path: path.name)
def test_the_demo_has_the_rates_of_the_search(path: Path) -> None:
    store = Store(path)
    found = {name: store.rate(BY_NAME[name], report.batch_sizes(store)[0]) for name in ("AdamW", "Lion")}
    assert {"AdamW": demo._ADAMW_RATE, "Lion": demo._LION_RATE} == found

"""The picture of speed is drawn from the stored results."""

from __future__ import annotations

from benchmarks import results


def test_the_picture_shows_the_stored_results() -> None:
    drawn = results.draw(results.panels(results.cpu_runs("cpu-epyc-zen4.json"), results.gpu_runs()))
    assert results.PICTURE.read_text(encoding="utf-8") == drawn, "python -m benchmarks.results"


def test_bars_are_as_long_as_others_take() -> None:
    drawing = results.draw({"a machine": {"Lion": {"times": None}, "slow": {"times": 4.0}, "slower": {"times": 29.0}}})
    assert [f'width="{length}"' in drawing for length in ("10.0", "40.0", "290.0")] == [True] * 3
    assert drawing.index(">slow<") < drawing.index(">slower<")

"""300 steps of every class, past the wrap-around of the 100 gradient norms, equal to the reference after each."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lion._state import layout
from lion.cuda_kernels import simulator
from tests.differential import training

simulated = pytest.mark.skipif(not simulator.enabled(), reason=simulator.NEEDED)
every_class = pytest.mark.parametrize("cls", training.CLASSES)


@pytest.fixture(autouse=True)
def small_state_is_paged_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "MIN_PAGED_SIZE", 256)


@every_class
@settings(max_examples=2)
@given(data=st.data())
def test_cpu(cls: str, data: st.DataObject) -> None:
    training.check_lockstep(data.draw(training.recipes(cls, max_groups=2)), "cpu", training.STEPS)


@pytest.mark.exhaustive
@every_class
@settings(max_examples=30)
@given(data=st.data())
def test_cpu_with_many_recipes(cls: str, data: st.DataObject) -> None:
    training.check_lockstep(data.draw(training.recipes(cls)), "cpu", training.STEPS)


@simulated
@every_class
@settings(max_examples=2)
@given(data=st.data())
def test_simulator(cls: str, data: st.DataObject) -> None:
    """Steps around the wrap-around; the 97 before are the CPU kernels', because the simulator is slow."""
    recipe = data.draw(training.recipes(cls, max_size=300, max_groups=1))
    training.check_lockstep(recipe, "cuda", 103, by_cpu=97)


@pytest.mark.exhaustive
@simulated
@every_class
@settings(max_examples=2)
@given(data=st.data())
def test_simulator_all_steps(cls: str, data: st.DataObject) -> None:
    recipe = data.draw(training.recipes(cls, max_size=300, max_groups=1))
    training.check_lockstep(recipe, "cuda", training.STEPS)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@every_class
@settings(max_examples=3)
@given(data=st.data())
def test_gpu(cls: str, data: st.DataObject) -> None:
    training.check_lockstep(data.draw(training.recipes(cls)), "cuda", training.STEPS, device="cuda")

"""Trainings of many steps whose kernels are executed from their compiled PTX equal the reference after each step.

Everything but the launch is what runs on a GPU: the CUDA backend, its tables, work lists and scratch memory. Only the
memory that a launch may touch is reachable, and gradients are read-only.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from lion._backends import Batch, LossScale, StepCoefficients, selection
from lion._backends import cuda as cuda_backend
from lion._backends.cuda import CudaBackend
from lion._state import layout
from lion.cuda_kernels import launch, simulator
from tests import strategies
from tests.comparing import to_numpy
from tests.differential import training, weights_training

ptxrun = pytest.importorskip("ptxrun", reason="the PTX executor is not importable")
pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")

from tests.compiled import executing  # noqa: E402

every_class = pytest.mark.parametrize("cls", training.CLASSES)


class ExecutedBackend(CudaBackend):
    """The CUDA backend on CPU tensors."""

    def __init__(self) -> None:
        super().__init__(simulated=True)
        self.launches = 0

    def update(self, batch: Batch, step: StepCoefficients, loss_scale: LossScale) -> None:
        self.batch = batch
        super().update(batch, step, loss_scale)

    def execute(self, *arguments: int, **kind: Any) -> None:
        """Launch a kernel that reaches the batch's tensors and scratch memory, and nothing else."""
        self.launches += 1
        memory = self.batch.device_memory
        states = [tensor for state in self.batch.states for tensor in state.values()]
        writable = [*self.batch.operands, *states, memory.scales, memory.partials, memory.squared_norms]
        fixed = [*self.batch.gradients, *memory.works, memory._loss_scale]
        # Rounding at random counts in a table which blocks of threads have read the step.
        (writable if self.batch.weights.seed is not None else fixed).append(memory.tables)
        fixed.append(cuda_backend._lookup(torch.device("cpu")))
        for tensor in writable:
            ptxrun.register(to_numpy(tensor).reshape(-1).view(np.uint8))
        for tensor in fixed:
            ptxrun.register(to_numpy(tensor).reshape(-1).view(np.uint8), writable=False)
        try:
            executing.execute(*arguments, **kind)
        finally:
            ptxrun.unregister()


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> ExecutedBackend:
    monkeypatch.setattr(layout, "MIN_PAGED_SIZE", 256)  # so that small state is paged too
    monkeypatch.setattr(simulator, "enabled", lambda: True)
    monkeypatch.setattr(launch, "require", lambda: None)
    monkeypatch.setattr(launch, "resident_blocks", lambda device: executing.BLOCKS)
    executed = ExecutedBackend()
    monkeypatch.setattr(launch, "_launch", executed.execute)
    make = selection._make
    monkeypatch.setattr(selection, "_make", lambda name, on_cpu: executed if name == "cuda" else make(name, on_cpu))
    return executed


@every_class
def test_training(cls: str, backend: ExecutedBackend) -> None:
    @settings(max_examples=2)
    @given(training.recipes(cls, max_groups=2))
    def check(recipe: training.Recipe) -> None:
        training.check_lockstep(recipe, "cuda", 107, by_cpu=95)

    check()
    assert backend.launches > 24


@pytest.mark.exhaustive
@every_class
def test_training_all_steps(cls: str, backend: ExecutedBackend) -> None:
    @settings(max_examples=2)
    @given(training.recipes(cls, max_groups=2))
    def check(recipe: training.Recipe) -> None:
        training.check_lockstep(recipe, "cuda", training.STEPS)

    check()
    assert backend.launches > 2 * training.STEPS


def by_executed_kernels(step: weights_training.Step, tensors: weights_training.Tensors) -> None:
    weights_training.by_cuda_kernels(step, tensors, launch, ptxrun.registered)


@pytest.mark.parametrize("update", weights_training.STATES)
@pytest.mark.parametrize("weights", weights_training.WEIGHTS, ids=str)
def test_training_of_16_bit_weights(update: str, weights: strategies.Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_launch", executing.execute)
    weights_training.check_lockstep(update, weights, "float32", by_executed_kernels)

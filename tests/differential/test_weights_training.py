"""300 steps of 16-bit weights by the CPU kernels and by the simulated CUDA kernels equal the reference after each."""

from __future__ import annotations

import contextlib

import pytest

from lion.cuda_kernels import simulator
from tests import strategies
from tests.differential import weights_training as training

simulated = pytest.mark.skipif(not simulator.enabled(), reason=simulator.NEEDED)
every_update = pytest.mark.parametrize("update", training.STATES)
all_weights = pytest.mark.parametrize("weights", training.WEIGHTS, ids=str)


@every_update
@all_weights
@pytest.mark.parametrize("grad_dtype", ["float32", "bfloat16"])
def test_cpu(update: str, weights: strategies.Weights, grad_dtype: str) -> None:
    training.check_lockstep(update, weights, grad_dtype, training.by_cpu_kernels)


def by_simulator(step: training.Step, tensors: training.Tensors) -> None:
    from lion.cuda_kernels import launch

    training.by_cuda_kernels(step, tensors, launch, lambda *arrays: contextlib.nullcontext())


@simulated
@every_update
@all_weights
def test_simulator(update: str, weights: strategies.Weights) -> None:
    training.check_lockstep(update, weights, "float32", by_simulator, 4)


@pytest.mark.exhaustive
@simulated
@every_update
@all_weights
def test_simulator_all_steps(update: str, weights: strategies.Weights) -> None:
    training.check_lockstep(update, weights, "bfloat16", by_simulator)

"""Module overrides between steps: they follow what the module has by the name, and end with the module."""

from __future__ import annotations

import contextlib
import gc

import pytest
import torch
from torch import nn

import lion
from tests.optimizers.support import Variant, every_kind, parameter

SMALL = {"min_8bit_size": 0, "lr": 0.01}


def moved_by(optimizer: lion.Lion, params: list[nn.Parameter], in_backward: bool) -> list[float]:
    """Return how far a step moves the parameters."""
    before = [p.detach().clone() for p in params]
    with lion.StepInBackward(optimizer) if in_backward else contextlib.nullcontext():
        torch.stack([p.sum() for p in params]).sum().backward()
        optimizer.step()
    optimizer.zero_grad()
    return [round((p - old).abs().max().item(), 3) for p, old in zip(params, before, strict=True)]


@pytest.mark.parametrize("in_backward", [False, True], ids=["step", "in backward"])
@every_kind
def test_parameters_that_the_optimizer_has_already_change_places(make: Variant, in_backward: bool) -> None:
    """As adapters do that take turns in a module."""
    params = [parameter(20, 20, seed=seed) for seed in range(2)]
    module = nn.Linear(20, 20, bias=False)
    optimizer = make(params, **SMALL)
    module.weight = params[0]
    lion.GlobalOptimManager.get_instance().register_module_override(module, "weight", {"lr": 0.5})
    assert moved_by(optimizer, params, in_backward) == [0.5, 0.01]
    module.weight = params[1]
    assert moved_by(optimizer, params, in_backward) == [0.01, 0.5]
    del module.weight
    assert moved_by(optimizer, params, in_backward) == [0.01, 0.01]
    module.weight = params[0]
    assert moved_by(optimizer, params, in_backward) == [0.5, 0.01]


@every_kind
def test_a_module_dies_before_its_parameter(make: Variant) -> None:
    module = nn.Linear(20, 20, bias=False)
    params = list(module.parameters())
    optimizer = make(params, **SMALL)
    manager = lion.GlobalOptimManager.get_instance()
    manager.register_module_override(module, "weight", {"lr": 0.5})
    assert moved_by(optimizer, params, False) == [0.5]
    del module
    gc.collect()
    assert moved_by(optimizer, params, False) == [0.01]
    assert not manager._modules


def test_a_parameter_that_died_leaves_no_plan_to_another() -> None:
    """One with its id, memory and state would fit the plans that were made with its override."""
    manager = lion.GlobalOptimManager.get_instance()
    p = parameter(300)
    manager.override_config(p, "lr", 0.5)
    before = manager.version
    assert manager.version == before
    del p
    assert manager.version != before

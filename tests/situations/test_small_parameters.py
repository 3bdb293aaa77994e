"""Parameters of one element or none, such as scales and temperatures: every form of their state becomes every other."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import nn

import lion
from lion import exchange
from tests.comparing import assert_same_bits

FORMS: dict[str, dict[str, Any]] = {
    "32bit": {"optim_bits": 32},
    "blockwise": {"optim_bits": 8, "block_wise": True},
    "tensorwise": {"optim_bits": 8, "block_wise": False},
}
every_shape = pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 0), (1, 1)], ids=str)


def stepped(shape: tuple[int, ...], form: str) -> tuple[nn.Parameter, lion.Lion]:
    p = nn.Parameter(torch.ones(shape))
    optimizer = lion.Lion([p], min_8bit_size=0, **FORMS[form])
    p.grad = torch.full(shape, 0.5)
    optimizer.step()
    return p, optimizer


@every_shape
@pytest.mark.parametrize(("source", "target"), list(itertools.permutations(FORMS, 2)))
@pytest.mark.parametrize("way", ["group", "override", "load"])
def test_a_form_becomes_another(shape: tuple[int, ...], source: str, target: str, way: str) -> None:
    p, optimizer = stepped(shape, source)
    if way == "group":
        optimizer.param_groups[0].update(FORMS[target])
    elif way == "override":
        lion.GlobalOptimManager.get_instance().override_config(p, key_value_dict=FORMS[target])
    else:
        saved = copy.deepcopy(optimizer.state_dict())
        optimizer = lion.Lion([p], min_8bit_size=0, **FORMS[target])
        optimizer.load_state_dict(saved)
    optimizer.step()
    expected, twin = stepped(shape, target)
    twin.step()
    assert optimizer.state[p].keys() == twin.state[expected].keys()
    for key, value in twin.state[expected].items():
        # One element, or none, is its own absmax: nothing is lost by eight bits.
        assert_same_bits(optimizer.state[p][key], value, what=key)
    assert_same_bits(p, expected)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.step()


@every_shape
@pytest.mark.parametrize("form", FORMS)
def test_momentum_that_is_given_to_others_has_the_shape_of_the_parameter(shape: tuple[int, ...], form: str) -> None:
    _, optimizer = stepped(shape, form)
    saved = exchange.to_exp_avg(optimizer.state_dict())
    assert saved["state"][0]["exp_avg"].shape == shape

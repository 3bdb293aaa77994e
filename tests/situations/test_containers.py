"""Groups and checkpoints whose lists other programs have made: tuples, and names that are none."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import lion
from tests.comparing import assert_same_bits
from tests.optimizers.support import Variant, every_kind, every_variant, parameter, set_gradients


def stepped(make: Variant, params: Any) -> lion.Lion:
    optimizer = make(params, min_8bit_size=0)
    set_gradients([p for group in optimizer.param_groups for p in group["params"]], 0)
    optimizer.step()
    return optimizer


@every_variant
@pytest.mark.parametrize("key", ["params", "param_groups"])
def test_a_checkpoint_with_tuples(make: Variant, key: str) -> None:
    optimizer = stepped(make, nn.Linear(20, 20).parameters())
    other = make(nn.Linear(20, 20).parameters(), min_8bit_size=0)
    saved = copy.deepcopy(optimizer.state_dict())
    place = saved if key == "param_groups" else saved["param_groups"][0]
    place[key] = tuple(place[key])
    other.load_state_dict(saved)
    for p, q in zip(*(one.param_groups[0]["params"] for one in (optimizer, other)), strict=True):
        for name, value in optimizer.state[p].items():
            assert_same_bits(other.state[q][name], value, what=name)
    other.step()


@every_kind
@pytest.mark.parametrize(
    "names", [None, (), "xy", 3, {"a": 1, "b": 2}, {"a", "b"}], ids=lambda names: type(names).__name__
)
@pytest.mark.parametrize("in_backward", [False, True], ids=["step", "in backward"])
def test_a_key_for_names_that_holds_none(make: Variant, names: Any, in_backward: bool) -> None:
    """It is a program's own then, and errors count the parameters."""
    params = [parameter(20, seed=seed) for seed in range(2)]
    optimizer = make([{"params": params, "param_names": names}], min_8bit_size=0)
    set_gradients(params, 0)
    optimizer.step()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert optimizer.param_groups[0]["param_names"] == names
    optimizer.step()
    optimizer.zero_grad()
    optimizer.state[params[1]]["state1"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"parameter '?1 of group 0'?: 'state1' is"):
        if in_backward:
            with lion.StepInBackward(optimizer):
                params[1].sum().backward()
        else:
            set_gradients(params, 0)
            optimizer.step()

"""Adapters beside frozen weights of any dtype and type: an optimizer may hold what never gets a gradient."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import lion
from tests.comparing import assert_same_bits
from tests.optimizers.support import every_class, parameter, set_gradients


class Quantized(Tensor):
    """A subclass that holds its own memory."""


FROZEN = {
    "int8": lambda: torch.ones(8, dtype=torch.int8),
    "4-bit base": lambda: torch.zeros(16, 1, dtype=torch.uint8),
    "float8": lambda: torch.ones(8).to(torch.float8_e4m3fn),
    "float64": lambda: torch.ones(8, dtype=torch.float64),
    "bool": lambda: torch.ones(8, dtype=torch.bool),
    "complex": lambda: torch.ones(8, dtype=torch.complex64),
    "subclass": lambda: torch.ones(8, dtype=torch.int8).as_subclass(Quantized),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "meta": lambda: torch.ones(8, device="meta"),
}
every_frozen = pytest.mark.parametrize("frozen", FROZEN.values(), ids=FROZEN.keys())


def train(optimizer: torch.optim.Optimizer, weight: nn.Parameter) -> Tensor:
    for seed in range(3):
        set_gradients([weight], seed)
        optimizer.step()
    return weight.detach().clone()


@every_class
@every_frozen
def test_a_frozen_parameter_is_held_and_left_alone(cls, frozen):
    base, weight, alone = nn.Parameter(frozen(), requires_grad=False), parameter(5000), parameter(5000)
    optimizer = cls([("base", base), ("adapter", weight)], lr=1e-2, weight_decay=0.1)
    optimizer.add_param_group({"params": [("more", nn.Parameter(frozen(), requires_grad=False))]})
    trained = train(optimizer, weight)
    assert_same_bits(trained, train(cls([alone], lr=1e-2, weight_decay=0.1), alone))
    assert list(optimizer.state) == [weight]

    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    assert list(optimizer.state) == [weight]
    assert optimizer.state_dict()["state"].keys() == saved["state"].keys() == {1}


@every_class
def test_steps_in_backward_leave_it_alone(cls):
    base, layer = nn.Parameter(torch.ones(8, dtype=torch.uint8), requires_grad=False), nn.Linear(8, 8)
    optimizer = cls([base, *layer.parameters()], lr=0.5)
    before = layer.weight.detach().clone()
    with lion.StepInBackward(optimizer):
        layer(torch.ones(8)).sum().backward()
    assert not torch.equal(layer.weight, before)


@every_class
def test_a_trained_parameter_of_another_dtype_is_refused_where_it_is_given(cls):
    weight = nn.Parameter(torch.ones(8, dtype=torch.float64))
    with pytest.raises(TypeError, match="Invalid parameter 'head.weight': torch.float64"):
        cls([("head.weight", weight)])


@every_class
def test_a_gradient_of_an_unfrozen_parameter_of_another_dtype_is_refused(cls):
    weight, late = parameter(300), nn.Parameter(torch.ones(8, dtype=torch.float64), requires_grad=False)
    optimizer = cls([weight, late], lr=0.5)
    before = weight.detach().clone()
    set_gradients([weight], 0)
    late.requires_grad_().grad = torch.ones(8, dtype=torch.float64)
    with pytest.raises(TypeError, match="Invalid parameter 1 of group 0: torch.float64"):
        optimizer.step()
    assert_same_bits(weight, before)
    assert not optimizer.state

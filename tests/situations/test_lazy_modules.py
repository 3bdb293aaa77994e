"""Optimizers over modules whose parameters get their shape in the first forward pass."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lion
from tests.comparing import assert_same_bits
from tests.optimizers.support import CLASSES, ByHand, Variant, every_dtype, every_variant, parameter, set_gradients

OPTIONS: dict[str, Any] = {"min_8bit_size": 256, "percentile_clipping": 50, "lr": 1e-2}


def lazy(dtype: torch.dtype = torch.float32) -> nn.Module:
    return nn.Sequential(nn.LazyLinear(70, dtype=dtype), nn.GELU(), nn.LazyLinear(3, dtype=dtype))


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(5, 66, generator=torch.Generator().manual_seed(0)).to(dtype)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, dtype: torch.dtype = torch.float32) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(inputs(dtype)).square().sum().backward()
        optimizer.step()


@every_variant
@every_dtype
def test_an_optimizer_made_before_the_dry_run(make: Variant, dtype: torch.dtype) -> None:
    model = lazy(dtype)
    optimizer = make(model.parameters(), **OPTIONS)
    optimizer.step()
    optimizer.zero_grad()
    assert not optimizer.state and repr(optimizer)
    model(inputs(dtype))
    copies = {p: ByHand.of(make, p, **OPTIONS) for p in model.parameters()}
    for i in range(3):
        model(inputs(dtype)).square().sum().backward()
        for p, hand in copies.items():
            hand.step(p.grad, 1e-2)
        optimizer.step()
        optimizer.zero_grad()
        for p, hand in copies.items():
            hand.check(p, optimizer, f"step {i}")


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("way", ["groups", "named", "added"])
def test_groups_and_names(cls: type[lion.Lion], way: str) -> None:
    model, first = lazy(), parameter(30)
    if way == "groups":
        optimizer = cls([{"params": [first]}, {"params": model.parameters(), "weight_decay": 0.1}])
    elif way == "named":
        optimizer = cls([("first", first), *model.named_parameters()])
    else:
        optimizer = cls([first])
        optimizer.add_param_group({"params": list(model.parameters())})
    set_gradients([first], 0)
    optimizer.step()
    train(model, optimizer, 2)
    assert [int(state["step"]) for state in optimizer.state.values()] == [1, 2, 2, 2, 2]


@every_variant
def test_beside_parameters_that_have_a_shape(make: Variant) -> None:
    """A step before the dry run moves those; overrides of both are taken."""
    model, p = lazy(), parameter(700)
    optimizer, hand = make([p, *model.parameters()], **OPTIONS), ByHand.of(make, p, **OPTIONS)
    manager = lion.GlobalOptimManager.get_instance()
    weight = model[0].weight  # type: ignore[index]
    manager.override_config(weight, "weight_decay", 0.5)
    set_gradients([p], 0)
    hand.step(p.grad, 1e-2)
    optimizer.step()
    hand.check(p, optimizer)
    model(inputs())
    weight.data.fill_(1.0)
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert_same_bits(weight, torch.full_like(weight, 1.0 - 1e-2 * 0.5))
    manager.initialize()


@every_variant
def test_a_checkpoint_loaded_before_the_dry_run(make: Variant) -> None:
    """As with AdamW: the model's checkpoint gives the parameters their shapes, before or after."""
    model = lazy()
    optimizer = make(model.parameters(), **OPTIONS)
    train(model, optimizer, 3)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, 2)
    for order in (0, 1), (1, 0):
        again = lazy()
        other = make(again.parameters(), **OPTIONS)
        for which in order:
            (again, other)[which].load_state_dict(saved[which])  # type: ignore[attr-defined]
        train(again, other, 2)
        for p, q in zip(model.parameters(), again.parameters(), strict=True):
            assert_same_bits(q, p)
            for key, value in optimizer.state[p].items():
                assert_same_bits(other.state[q][key], value, what=key)


def test_a_checkpoint_of_another_shape_is_found_out_at_the_step() -> None:
    model, again = lazy(), lazy()
    optimizer, other = lion.Lion(model.parameters()), lion.Lion(again.parameters())
    train(model, optimizer, 1)
    saved = optimizer.state_dict()
    saved["state"][0]["state1"] = torch.zeros(70, 65)
    other.load_state_dict(saved)
    with pytest.raises(ValueError, match="parameter 0 of group 0: 'state1' is .* shape .70, 65.; .*70, 66"):
        train(again, other, 1)


def test_a_checkpoint_that_does_not_fit_raises_before_the_dry_run() -> None:
    model = lazy()
    optimizer = lion.Lion8bit(model.parameters(), min_8bit_size=0)
    train(model, optimizer, 1)
    for key in ("state1", "absmax1", "step"):
        saved = copy.deepcopy(optimizer.state_dict())
        del saved["state"][0][key]
        with pytest.raises(ValueError, match=f"parameter 0 of group 0: the key '{key}' is missing"):
            lion.Lion8bit(lazy().parameters()).load_state_dict(saved)


def test_parameters_of_a_kind_that_is_not_supported_are_found_out_at_the_step() -> None:
    model = lazy(torch.float64)
    optimizer = lion.Lion(model.parameters())
    with pytest.raises(TypeError, match="parameter 0 of group 0: torch.float64"):
        train(model, optimizer, 1, torch.float64)


def test_steps_in_backward_need_the_dry_run() -> None:
    """torch has no hooks for parameters without a shape; nothing is left of the attempt."""
    model, other = lazy(), lazy()
    p = parameter(30)
    optimizer, plain = lion.Lion([p, *model.parameters()]), lion.Lion(other.parameters())
    with pytest.raises(ValueError, match="parameter 1 of group 0 has no shape yet"):
        lion.StepInBackward(optimizer)
    model(inputs())
    other.load_state_dict(model.state_dict())
    with lion.StepInBackward(optimizer):
        for _ in range(2):
            model(inputs()).square().sum().backward()
    train(other, plain, 2)
    for q, r in zip(model.parameters(), other.parameters(), strict=True):
        assert_same_bits(q, r)


def test_float32_state_dicts_need_the_dry_run() -> None:
    model = lazy(torch.bfloat16)
    optimizer = lion.Lion8bit(model.parameters(), master_weight_bits=24)
    name = next(iter(model.state_dict()))
    with pytest.raises(ValueError, match=f"Invalid model: '{name}' has no shape yet; its module has to run once"):
        lion.exchange.float32_state_dict(model, optimizer)
    saved = {key: torch.zeros(3) for key in model.state_dict()}
    with pytest.raises(ValueError, match=f"Invalid model: '{name}' has no shape yet; its module has to run once"):
        lion.exchange.load_float32_state_dict(model, optimizer, saved)
    model(inputs(torch.bfloat16))
    found = lion.exchange.float32_state_dict(model, optimizer)
    assert {value.dtype for value in found.values()} == {torch.float32}

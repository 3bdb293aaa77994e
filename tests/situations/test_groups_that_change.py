"""Programs that change the lists of groups and parameters between steps: freezing, growing and pruning do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import lion
from tests.comparing import assert_same_bits
from tests.optimizers.support import Variant, every_kind, every_variant, parameter, set_gradients

SMALL = {"min_8bit_size": 0}


def remove_the_first_group(optimizer: lion.Lion) -> None:
    optimizer.state.pop(optimizer.param_groups.pop(0)["params"][0])


def remove_the_last_group(optimizer: lion.Lion) -> None:
    optimizer.param_groups.pop()


def reverse_the_groups(optimizer: lion.Lion) -> None:
    optimizer.param_groups.reverse()


def reverse_a_group(optimizer: lion.Lion) -> None:
    optimizer.param_groups[1]["params"].reverse()


def move_a_parameter(optimizer: lion.Lion) -> None:
    optimizer.param_groups[2]["params"].append(optimizer.param_groups[1]["params"].pop(0))


def remove_a_parameter(optimizer: lion.Lion) -> None:
    optimizer.state.pop(optimizer.param_groups[1]["params"].pop(0))


def merge_the_groups(optimizer: lion.Lion) -> None:
    first, *others = optimizer.param_groups
    first["params"] = [*first["params"], *(p for group in others for p in group["params"])]
    del optimizer.param_groups[1:]


CHANGES = (
    remove_the_first_group,
    remove_the_last_group,
    reverse_the_groups,
    reverse_a_group,
    move_a_parameter,
    remove_a_parameter,
    merge_the_groups,
)
every_change = pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)


def trained(
    make: Variant, change: Callable[[lion.Lion], None], in_backward: bool, dtype: torch.dtype, **options: object
) -> tuple[list[nn.Parameter], lion.Lion]:
    """Return parameters of three groups, and their optimizer, after steps before and after a change."""
    params = [parameter(300, seed=seed, dtype=dtype) for seed in range(4)]
    groups = [
        {"params": params[:1], "lr": 0.25},
        {"params": params[1:3], "lr": 1e-3},
        {"params": params[3:], "lr": 0.5},
    ]
    optimizer = make(groups, **SMALL, **options)
    steps = lion.StepInBackward(optimizer) if in_backward else None
    for i in range(5):
        if i == 2:
            change(optimizer)
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        generator = torch.Generator().manual_seed(i)
        factors = [torch.randn(300, generator=generator).to(dtype) for _ in params]
        torch.stack([(p * factor).sum() for p, factor in zip(params, factors, strict=True)]).sum().backward()
        if steps is None:
            optimizer.step()
        else:
            # What the optimizer does not hold keeps its gradient, as where it takes the steps itself.
            assert [p.grad is None for p in params] == [id(p) in held for p in params]
        for p in params:
            p.grad = None
    return params, optimizer


@every_variant
@every_change
def test_steps_in_backward_follow(make: Variant, change: Callable[[lion.Lion], None]) -> None:
    (ours, in_backward), (theirs, plain) = (trained(make, change, way, torch.float32) for way in (True, False))
    for p, q in zip(ours, theirs, strict=True):
        assert_same_bits(p, q)
        assert (p in in_backward.state) == (q in plain.state)
        for key, value in plain.state.get(q, {}).items():
            assert_same_bits(in_backward.state[p][key], value, what=key)


@every_kind
@every_change
def test_random_bits_of_steps_in_backward_follow(make: Variant, change: Callable[[lion.Lion], None]) -> None:
    """They are told apart by a parameter's place among all."""
    options = {"stochastic_rounding": True, "rounding_seed": 5}
    (ours, _), (theirs, _) = (trained(make, change, way, torch.bfloat16, **options) for way in (True, False))
    for p, q in zip(ours, theirs, strict=True):
        assert_same_bits(p, q)


@every_variant
@pytest.mark.parametrize("change", ["append", "remove"])
def test_parameters_come_and_go_without_their_names(make: Variant, change: str) -> None:
    layer, late = nn.Linear(20, 20), parameter(20)
    optimizer = make(layer.named_parameters(), **SMALL)
    members: list[Tensor] = optimizer.param_groups[0]["params"]
    if change == "append":
        members.append(late)
    else:
        del members[0]
    for i in range(2):
        set_gradients(members, i)
        optimizer.step()
    assert [int(optimizer.state[p]["step"]) for p in members] == [2] * len(members)
    # No parameter is called by the name of another.
    members[-1].grad = torch.ones(20).to_sparse()
    with pytest.raises(TypeError, match=rf"gradient of parameter {len(members) - 1} of group 0: layout"):
        optimizer.step()


def test_a_parameter_in_the_place_of_another_has_its_name() -> None:
    layer = nn.Linear(20, 20)
    optimizer = lion.Lion(layer.named_parameters())
    optimizer.param_groups[0]["params"][1] = longer = parameter(40)
    longer.grad = torch.ones(40).to_sparse()
    with pytest.raises(TypeError, match="gradient of parameter 'bias': layout"):
        optimizer.step()

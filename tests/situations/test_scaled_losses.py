"""Losses scaled by a GradScaler, in programs where something else happens too."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import lion
from tests.comparing import assert_same_bits
from tests.optimizers.support import CLASSES, every_class, parameter

COPIES: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda optimizer: pickle.loads(pickle.dumps(optimizer)),
    "pickle of a copy": lambda optimizer: pickle.loads(pickle.dumps(copy.deepcopy(optimizer))),
}


def scaled_backward(scaler: torch.amp.GradScaler, p: nn.Parameter, values: torch.Tensor) -> None:
    p.grad = None
    scaler.scale((p * values).sum()).backward()


class Interrupted(BaseException):
    pass


def raise_interrupted() -> float:
    raise Interrupted


def broken_option(optimizer: lion.Lion) -> Callable[[], None]:
    optimizer.param_groups[0]["betas"] = (0.9, 1.5)
    return lambda: optimizer.param_groups[0].update(betas=(0.9, 0.99))


def broken_state(optimizer: lion.Lion) -> Callable[[], None]:
    [p] = optimizer.param_groups[0]["params"]
    state = optimizer.state[p].copy()
    optimizer.state[p]["state1"] = torch.zeros(2)
    return lambda: optimizer.state.update({p: state})


@pytest.mark.parametrize("breaks", [broken_option, broken_state])
@every_class
def test_a_step_that_raised_is_tried_again(cls: type[lion.Lion], breaks: Any) -> None:
    values = torch.linspace(-1, 1, 600)
    results = []
    for broken in (False, True):
        p = parameter(600)
        optimizer, scaler = cls([p], lr=1e-2, percentile_clipping=50), torch.amp.GradScaler("cpu", init_scale=1024.0)
        for i in range(3):
            scaled_backward(scaler, p, values.roll(i) * (i + 1))
            if broken and i == 1:
                mend = breaks(optimizer)
                with pytest.raises(ValueError, match="Invalid"):
                    scaler.step(optimizer)
                assert not {"grad_scale", "found_inf"} & vars(optimizer).keys()
                mend()
            scaler.step(optimizer)
            scaler.update()
        results.append((p.detach(), optimizer.state[p]))
    (p, state), (q, other) = results
    assert_same_bits(q, p)
    for key in state:
        assert_same_bits(other[key], state[key], what=key)


@pytest.mark.parametrize("values", [1.0, float("inf")])
def test_a_closure_that_raised(values: float) -> None:
    p = parameter(3)
    optimizer, scaler = lion.Lion([p]), torch.amp.GradScaler("cpu")
    scaled_backward(scaler, p, torch.full((3,), values))
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(0.0)
    with pytest.raises(Interrupted):
        optimizer.step(raise_interrupted)
    assert not {"grad_scale", "found_inf"} & vars(optimizer).keys()


def test_a_step_that_did_not_raise_leaves_the_scale_to_the_scaler() -> None:
    p = parameter(3)
    optimizer = lion.Lion([p])
    optimizer.grad_scale = torch.tensor(2.0)
    p.grad = torch.ones(3)
    optimizer.step()
    assert optimizer.grad_scale == 2


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("value", [False, True])
def test_whether_a_step_unscales_survives_a_copy(cls: type[lion.Lion], way: str, value: bool) -> None:
    """A program that wants GradScaler to unscale, for instance to look at the gradients, says so on the instance."""
    optimizer = cls([parameter(5000)], lr=1e-2)
    optimizer._step_supports_amp_scaling = value
    other = COPIES[way](optimizer)
    assert vars(other)["_step_supports_amp_scaling"] is value
    [p] = other.param_groups[0]["params"]
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaled_backward(scaler, p, torch.full((5000,), 0.5))
    scaler.step(other)
    assert_same_bits(p.grad, torch.full((5000,), 4.0 if value else 0.5))
    assert "_step_supports_amp_scaling" not in vars(COPIES[way](cls([parameter(2)])))


def test_it_stays_when_a_checkpoint_is_loaded() -> None:
    optimizer = lion.Lion([parameter(3)])
    optimizer._step_supports_amp_scaling = False
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer._step_supports_amp_scaling is False


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("cls", CLASSES)
def test_unscaling_can_be_left_to_the_scaler(cls: type[lion.Lion], way: str) -> None:
    optimizer = cls([parameter(5000)], lr=1e-2)
    assert optimizer.unscales_in_step is True
    optimizer.unscales_in_step = False
    for other in (optimizer, COPIES[way](optimizer)):
        assert other.unscales_in_step is False and other._step_supports_amp_scaling is False
        [p] = other.param_groups[0]["params"]
        p.grad = None
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        scaled_backward(scaler, p, torch.full((5000,), 0.5))
        scaler.step(other)
        assert_same_bits(p.grad, torch.full((5000,), 0.5))
    optimizer.unscales_in_step = True
    assert optimizer._step_supports_amp_scaling is True


def test_scaled_gradients_stay_where_the_step_unscales() -> None:
    p = parameter(5000)
    optimizer = lion.Lion8bit([p], lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaled_backward(scaler, p, torch.full((5000,), 0.5))
    scaler.step(optimizer)
    assert_same_bits(p.grad, torch.full((5000,), 4.0))


@pytest.mark.parametrize("value", [None, "no", 2])
def test_who_unscales_is_a_truth_value(value: Any) -> None:
    optimizer = lion.Lion([parameter(3)])
    with pytest.raises(TypeError, match="Invalid unscales_in_step value: .*; expected True or False"):
        optimizer.unscales_in_step = value
    assert optimizer.unscales_in_step is True


def test_unscaling_stays_with_the_scaler_of_fsdp1() -> None:
    p = parameter(3)
    p._fsdp_flattened = True
    optimizer = lion.Lion([p])
    assert optimizer.unscales_in_step is False
    with pytest.raises(ValueError, match="Invalid unscales_in_step value: True; FSDP1's ShardedGradScaler unscales"):
        optimizer.unscales_in_step = True
    assert optimizer.unscales_in_step is False

"""Programs that ask for another algorithm, by an option that other optimizers have."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lion
from lion import exchange
from tests.comparing import assert_same_bits
from tests.optimizers.support import (
    DTYPES,
    assert_unchanged,
    every_class,
    parameter,
    set_gradients,
    snapshot,
)

# Of torch's optimizers, and of the Lions of timm, optimi, pytorch_optimizer, lion-pytorch and bitsandbytes.
ANOTHER_ALGORITHM: list[tuple[str, Any]] = [
    ("maximize", True),
    ("maximize", np.True_),
    ("amsgrad", True),
    ("nesterov", True),
    ("momentum", 0.9),
    ("dampening", 0.5),
    ("centered", True),
    ("differentiable", True),
    ("lr_decay", 0.1),
    ("decoupled_weight_decay", False),
    ("caution", True),
    ("corrected_weight_decay", True),
    ("decouple_lr", True),
    ("kahan_sum", True),
    ("weight_decouple", False),
    ("fixed_decay", True),
    ("adanorm", True),
    ("cautious", True),
    ("ams_bound", True),
    ("use_gc", True),
    ("cautious_factor", 0.0),
    ("cautious_factor", 0.5),
    ("cautious_wd", True),
    ("max_unorm", 1.0),
    ("skip_zeros", True),
]
THE_SAME_ALGORITHM: dict[str, Any] = {
    "maximize": False,
    "amsgrad": False,
    "nesterov": np.False_,
    "momentum": 0,
    "dampening": 0.0,
    "differentiable": False,
    "decoupled_weight_decay": True,
    "kahan_sum": None,
    "weight_decouple": True,
    "cautious_factor": 1.0,
    "foreach": None,
    "fused": None,
    "capturable": True,
    "triton": None,
    "eps": 1e-8,
    "name": "body",
    "lr_scale": 0.5,
    "schedule": ["linear", 3],
}
by_option = pytest.mark.parametrize(("key", "value"), ANOTHER_ALGORITHM, ids=str)


@every_class
@by_option
def test_a_group_of_the_constructor(cls: type[lion.Lion], key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{key}=.* has no counterpart in Lion.*group 1"):
        cls([{"params": [parameter(3)]}, {"params": [parameter(3)], key: value}])


@by_option
def test_named_parameters(key: str, value: Any) -> None:
    named = list(nn.Linear(2, 2).named_parameters())
    with pytest.raises(ValueError, match=f"{key}="):
        lion.Lion([{"params": named, key: value}])


@by_option
def test_a_group_added_later(key: str, value: Any) -> None:
    optimizer = lion.Lion([parameter(3)])
    with pytest.raises(ValueError, match=f"{key}=.*group 1"):
        optimizer.add_param_group({"params": [parameter(3)], key: value})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@by_option
def test_a_group_changed_between_steps(key: str, value: Any, dtype: torch.dtype) -> None:
    params = [parameter(5000, dtype=dtype), parameter(3, dtype=dtype)]
    optimizer = lion.Lion8bit([{"params": [p]} for p in params])
    for seed in range(2):
        set_gradients(params, seed)
        optimizer.step()
    optimizer.param_groups[1][key] = value
    set_gradients(params, 2)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=f"{key}=.*has no counterpart") as raised:
        optimizer.step()
    assert "group 1" in str(raised.value)
    assert_unchanged(optimizer, before)
    del optimizer.param_groups[1][key]
    optimizer.step()


@by_option
def test_a_group_changed_between_steps_in_backward(key: str, value: Any) -> None:
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    optimizer = lion.Lion([{"params": first.parameters()}, {"params": second.parameters()}])
    with lion.StepInBackward(optimizer):
        second(first(torch.ones(2))).sum().backward()
        optimizer.param_groups[1][key] = value
        with pytest.raises(ValueError, match=f"{key}=.*has no counterpart.*group 1"):
            second(first(torch.ones(2))).sum().backward()


@by_option
@pytest.mark.parametrize("read", ["load_state_dict", "from_exp_avg"])
def test_a_checkpoint(key: str, value: Any, read: str) -> None:
    optimizer = lion.Lion([parameter(3)])
    set_gradients(optimizer.param_groups[0]["params"], 0)
    optimizer.step()
    saved = optimizer.state_dict()
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=f"group 0: {key}="):
        if read == "load_state_dict":
            saved["param_groups"][0][key] = value
            optimizer.load_state_dict(saved)
        else:
            saved = exchange.to_exp_avg(saved)
            saved["param_groups"][0][key] = value
            exchange.from_exp_avg(saved)
    assert_unchanged(optimizer, before)


def test_a_checkpoint_whose_option_may_be_lost() -> None:
    saved = {
        "state": {0: {"exp_avg": torch.ones(3), "kahan_comp": torch.zeros(3)}},
        "param_groups": [{"params": [0], "lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0.0, "kahan_sum": True}],
    }
    with pytest.raises(ValueError, match="kahan_sum=True"):
        exchange.from_exp_avg(saved, drop=["kahan_comp"])
    optimizer = lion.Lion([parameter(3)])
    optimizer.load_state_dict(exchange.from_exp_avg(saved, drop=["kahan_comp", "kahan_sum"]))
    assert_same_bits(next(iter(optimizer.state.values()))["state1"], torch.ones(3))
    assert "kahan_sum" not in optimizer.param_groups[0]


def train(optimizer: lion.Lion) -> torch.Tensor:
    [p] = optimizer.param_groups[0]["params"]
    for seed in range(3):
        set_gradients([p], seed)
        optimizer.step()
    return p.detach()


WAYS: dict[str, Callable[[], lion.Lion]] = {}


def way(make: Callable[[], lion.Lion]) -> Callable[[], lion.Lion]:
    WAYS[make.__name__] = make
    return make


@way
def constructor() -> lion.Lion:
    return lion.Lion([{"params": [parameter(600)], **THE_SAME_ALGORITHM}])


@way
def add_param_group() -> lion.Lion:
    optimizer = lion.Lion([parameter(600)])
    optimizer.param_groups.clear()
    optimizer.add_param_group({"params": [parameter(600)], **THE_SAME_ALGORITHM})
    return optimizer


@way
def between_steps() -> lion.Lion:
    optimizer = lion.Lion([parameter(600)])
    optimizer.param_groups[0].update(THE_SAME_ALGORITHM)
    return optimizer


@way
def load_state_dict() -> lion.Lion:
    optimizer = lion.Lion([parameter(600)])
    optimizer.load_state_dict(constructor().state_dict())
    return optimizer


@way
def groups_of_adamw() -> lion.Lion:
    optimizer, adamw = lion.Lion([parameter(600)]), torch.optim.AdamW([parameter(600)], lr=1e-4, weight_decay=0)
    adamw.param_groups[0]["betas"] = (0.9, 0.99)
    optimizer.load_state_dict(adamw.state_dict())
    assert optimizer.param_groups[0]["amsgrad"] is False
    return optimizer


@way
def from_exp_avg() -> lion.Lion:
    optimizer = lion.Lion([parameter(600)])
    group = {"params": [0], "lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0.0, **THE_SAME_ALGORITHM}
    optimizer.load_state_dict(exchange.from_exp_avg({"state": {}, "param_groups": [group]}))
    return optimizer


@pytest.mark.parametrize("name", WAYS)
def test_the_same_algorithm_and_keys_of_a_program(name: str) -> None:
    optimizer = WAYS[name]()
    if name != "groups_of_adamw":
        assert THE_SAME_ALGORITHM.items() <= optimizer.param_groups[0].items()
    assert_same_bits(train(optimizer), train(lion.Lion([parameter(600)])))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_unorm", 0.5),
        ("skip_zeros", True),
        ("maximize", True),
        ("amsgrad", True),
        ("cautious", True),
        ("decoupled_weight_decay", False),
        ("fused", True),
        ("foreach", True),
        ("capturable", np.True_),
    ],
)
def test_args(key: str, value: Any) -> None:
    """bitsandbytes reads the first two from `args`; the constructor refuses the others as keywords."""
    with pytest.raises(ValueError, match=f"Invalid args: {key}=.* has no counterpart in Lion.*leave it out or set it"):
        lion.Lion8bit([parameter(3)], args=types.SimpleNamespace(**{key: value}))


def test_args_of_a_program_with_several_optimizers() -> None:
    same = types.SimpleNamespace(max_unorm=0.0, skip_zeros=False, maximize=None, fused=False, eps=1e-8, optim_bits=8)
    assert lion.Lion([parameter(3)], args=same).param_groups[0]["optim_bits"] == 8
    others = types.SimpleNamespace(momentum=0.9, nesterov=True, lr_decay=0.1, optim_bits=8)
    assert lion.Lion([parameter(3)], args=others).param_groups[0]["optim_bits"] == 8


KEYWORDS = {
    "fused": (True, "one kernel call"),
    "foreach": (None, "all parameters of a kind at once"),
    "eps": (1e-8, "nothing is divided by"),
    "amsgrad": (False, "no second moment"),
    "maximize": (True, "minimize the negative loss"),
    "capturable": (True, "can be captured in a CUDA graph"),
    "differentiable": (False, "cannot be differentiated"),
    "momentum": (0.9, "betas"),
    "nesterov": (True, "leave it out"),
    "caution": (True, "leave it out"),
}


@every_class
@pytest.mark.parametrize("key", KEYWORDS)
def test_a_keyword_of_the_constructor(cls: type[lion.Lion], key: str) -> None:
    value, advice = KEYWORDS[key]
    with pytest.raises(TypeError, match=f"{cls.__name__} has no option '{key}'.*{advice}"):
        cls([parameter(3)], **{key: value})


@every_class
def test_a_keyword_that_nobody_has(cls: type[lion.Lion]) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'learning_rate'"):
        cls([parameter(3)], learning_rate=1e-4)


def test_a_class_of_a_program_with_a_keyword_of_its_own() -> None:
    class Clipped(lion.Lion8bit):
        def __init__(self, params: Any, eps: float = 1e-6, **kwargs: Any) -> None:
            super().__init__(params, **kwargs)
            self.eps = eps

    assert Clipped([parameter(3)], eps=0.5, lr=1e-3).eps == 0.5


@every_class
@pytest.mark.parametrize("lr", [-1.0, float("nan"), "fast", torch.tensor(-1.0), torch.ones(2)], ids=str)
def test_a_bad_learning_rate_names_its_group(cls: type[lion.Lion], lr: Any) -> None:
    groups = [{"params": [parameter(3)]}, {"params": [parameter(3, seed=1)], "lr": lr}]
    with pytest.raises((TypeError, ValueError), match="(learning rate|lr).*group 1"):
        cls(groups)
    optimizer = cls([groups[0]])
    with pytest.raises((TypeError, ValueError), match="(learning rate|lr).*group 1"):
        optimizer.add_param_group(groups[1])
    optimizer.add_param_group({"params": [parameter(3, seed=2)]})
    params = [p for group in optimizer.param_groups for p in group["params"]]
    set_gradients(params, 0)
    optimizer.step()
    optimizer.param_groups[1]["lr"] = lr
    before = snapshot(optimizer)
    with pytest.raises((TypeError, ValueError), match="(learning rate|lr).*group 1"):
        optimizer.step()
    assert_unchanged(optimizer, before)
    optimizer.zero_grad()
    with lion.StepInBackward(optimizer), pytest.raises((TypeError, ValueError), match="(learning rate|lr).*group 1"):
        params[1].sum().backward()

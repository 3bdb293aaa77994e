"""Checkpoints whose groups say that they are another algorithm's, or another order's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lion
from lion import exchange

EXP_AVG = {
    "state": {0: {"exp_avg": torch.ones(3)}},
    "param_groups": [{"params": [0], "lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0.0}],
}
FLAGS = [
    ("maximize", True),
    ("caution", True),
    ("cautious", True),
    ("adanorm", True),
    ("fixed_decay", True),
    ("decouple_lr", True),
    ("weight_decouple", False),
    ("momentum", 0.9),
    ("nesterov", True),
    ("amsgrad", True),
]


@pytest.mark.parametrize(("key", "value"), FLAGS)
def test_another_algorithm(key: str, value: Any) -> None:
    optimizer = lion.Lion([nn.Parameter(torch.ones(3))])
    saved = optimizer.state_dict()
    saved["param_groups"][0][key] = value
    with pytest.raises(ValueError, match=f"group 0: {key}="):
        optimizer.load_state_dict(saved)
    with pytest.raises(ValueError, match=f"group 0: {key}="):
        exchange.from_exp_avg({**EXP_AVG, "param_groups": [{**EXP_AVG["param_groups"][0], key: value}]})


@pytest.mark.parametrize(("key", "value"), [(key, type(value)(not value)) for key, value in FLAGS])
def test_the_same_algorithm_spelled_out(key: str, value: Any) -> None:
    group = {**EXP_AVG["param_groups"][0], key: value}
    optimizer = lion.Lion([nn.Parameter(torch.ones(3))])
    optimizer.load_state_dict(exchange.from_exp_avg({**EXP_AVG, "param_groups": [group]}))
    assert torch.equal(optimizer.state_dict()["state"][0]["state1"], torch.ones(3))


@pytest.mark.parametrize("key", ["lr", "betas", "weight_decay"])
def test_missing_hyperparameter(key: str) -> None:
    optimizer = lion.Lion([nn.Parameter(torch.ones(3))])
    saved = optimizer.state_dict()
    del saved["param_groups"][0][key]
    with pytest.raises(ValueError, match=f"group 0 lacks the key '{key}'"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize(("key", "value"), [("optim_bits", "x"), ("optim_bits", 4), ("lr", -1), ("block_wise", None)])
def test_option_that_is_not_allowed(key: str, value: Any) -> None:
    optimizer = lion.Lion([nn.Parameter(torch.ones(3))])
    saved = optimizer.state_dict()
    saved["param_groups"][0][key] = value
    with pytest.raises(ValueError, match=f"group 0: '{key}'"):
        optimizer.load_state_dict(saved)


def named(*names: str) -> lion.Lion:
    return lion.Lion([(name, nn.Parameter(torch.ones(3))) for name in names])


def test_permuted_names() -> None:
    with pytest.raises(ValueError, match="'param_names' have 'b' where 'a' is needed"):
        named("a", "b").load_state_dict(named("b", "a").state_dict())


def test_names_with_a_prefix() -> None:
    named("a", "b").load_state_dict(named("module.a", "module.b").state_dict())


@pytest.mark.parametrize("convert", [exchange.from_exp_avg, exchange.to_exp_avg, exchange.to_bitsandbytes])
@pytest.mark.parametrize(
    "saved", [{}, {"state": {}}, {"state": 3, "param_groups": []}, {"state": {}, "param_groups": [3]}]
)
def test_malformed(convert: Any, saved: Any) -> None:
    with pytest.raises(ValueError, match="Invalid state_dict"):
        convert(saved)


@pytest.mark.parametrize("saved", [None, "x", 3])
def test_no_dict(saved: Any) -> None:
    with pytest.raises(TypeError, match="Invalid state_dict"):
        lion.Lion([nn.Parameter(torch.ones(3))]).load_state_dict(saved)


def test_keys_of_states_that_cannot_be_keys() -> None:
    optimizer = lion.Lion([nn.Parameter(torch.ones(3))])
    saved = optimizer.state_dict()
    saved["param_groups"][0]["params"] = [[0]]
    with pytest.raises(ValueError, match="'params'"):
        optimizer.load_state_dict(saved)

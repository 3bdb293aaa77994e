"""The options of 16-bit weights: where they may be given, and what is refused before anything changes."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import lion
from lion.trainer import optimizer_cls_and_kwargs
from tests.comparing import assert_same_bits
from tests.optimizers.support import assert_unchanged, every_class, every_variant, parameter, snapshot
from tests.weights16.support import SEED, WAYS, bfloat16, every_way, gradients, take

KEYS = ("master_weight_bits", "stochastic_rounding", "rounding_seed")
GROUP = {"master_weight_bits": 24, "stochastic_rounding": False, "rounding_seed": 7}


@every_class
def test_options_of_the_constructor_and_of_groups(cls):
    optimizer = cls([{"params": [bfloat16(3)], "master_weight_bits": 32}, {"params": [bfloat16(3)]}], rounding_seed=7)
    optimizer.add_param_group({"params": [bfloat16(3)], "stochastic_rounding": True})
    assert [[group[key] for key in KEYS] for group in optimizer.param_groups] == [
        [32, False, 7],
        [None, False, 7],
        [None, True, 7],
    ]


@every_class
def test_args(cls):
    group = cls([bfloat16(3)], args=SimpleNamespace(**GROUP), master_weight_bits=32).param_groups[0]
    assert {key: group[key] for key in KEYS} == GROUP


@every_class
@pytest.mark.parametrize(
    ("key", "value", "error", "match"),
    [
        ("master_weight_bits", 16, ValueError, "16; expected None, 24 or 32"),
        ("master_weight_bits", 0, ValueError, "0; expected None, 24 or 32"),
        ("master_weight_bits", "24", TypeError, "master_weight_bits"),
        ("master_weight_bits", True, TypeError, "master_weight_bits"),
        ("stochastic_rounding", 2, TypeError, "2; expected True or False"),
        ("stochastic_rounding", None, TypeError, "None; expected True or False"),
        ("rounding_seed", -1, ValueError, "-1; expected 0 to 2"),
        ("rounding_seed", 2**64, ValueError, "18446744073709551616; expected 0 to 2"),
        ("rounding_seed", 0.5, ValueError, "0.5; expected an integer"),
        ("rounding_seed", None, TypeError, "rounding_seed"),
        ("rounding_seed", True, TypeError, "rounding_seed"),
    ],
)
def test_values_that_are_refused(cls, key, value, error, match):
    with pytest.raises(error, match=f"Invalid {key} value: .*{match}" if match != key else f"Invalid {key} value"):
        cls([bfloat16(3)], **{key: value})


@pytest.mark.parametrize("seed", [0, 2**53 + 1, 2**64 - 1, np.uint64(2**64 - 1), 5.0])
def test_seeds_are_kept_to_the_bit(seed):
    kept = lion.Lion([bfloat16(3)], rounding_seed=seed).param_groups[0]["rounding_seed"]
    assert type(kept) is int and kept == int(seed)


@every_class
def test_both_at_once_is_refused(cls):
    match = "stochastic_rounding: True beside master_weight_bits=24, .* choose one of them"
    with pytest.raises(ValueError, match=match):
        cls([bfloat16(3)], master_weight_bits=24, stochastic_rounding=True)
    optimizer = cls([bfloat16(3)], stochastic_rounding=True)
    with pytest.raises(ValueError, match=rf"{match} \(group 1\)"):
        optimizer.add_param_group({"params": [bfloat16(3)], "master_weight_bits": 24})
    assert len(optimizer.param_groups) == 1


def test_both_at_once_is_refused_by_a_step():
    p, q = bfloat16(3), bfloat16(3)
    optimizer = lion.Lion([{"params": [p], "master_weight_bits": 24}, {"params": [q], "stochastic_rounding": True}])
    take(optimizer, [p, q], [0])
    before = snapshot(optimizer)
    lion.GlobalOptimManager.get_instance().override_config(q, "master_weight_bits", 32)
    with pytest.raises(ValueError, match="for parameter 0 of group 1: True beside master_weight_bits=32"):
        optimizer.step()
    optimizer.param_groups[0]["stochastic_rounding"] = True
    with pytest.raises(ValueError, match=r"master_weight_bits=24.*\(group 0\)"):
        optimizer.step()
    assert_unchanged(optimizer, before)


@every_way
@every_class
def test_float16_is_refused(cls, way):
    key = next(iter(way))
    match = f"parameter 1 of group 0: torch.float16 with {key}={way[key]}, which is for torch.bfloat16"
    with pytest.raises(TypeError, match=match):
        cls([bfloat16(3), parameter(3, dtype=torch.float16)], **way)
    p, q = bfloat16(3), bfloat16(4)
    optimizer = cls([p, q], **way)
    take(optimizer, [p, q], [0])
    q.grad = None
    q.data = q.data.half()
    q.grad = torch.ones_like(q, dtype=torch.float32)
    before = snapshot(optimizer)
    with pytest.raises(TypeError, match=match):
        optimizer.step()
    assert_unchanged(optimizer, before)


def test_float16_that_an_override_takes_out():
    p, q = bfloat16(30), parameter(30, dtype=torch.float16)
    lion.GlobalOptimManager.get_instance().override_config(q, "master_weight_bits", None)
    optimizer = lion.Lion([p, q], master_weight_bits=32)
    p.grad, q.grad = gradients([p], 0)[0], torch.ones_like(q)
    optimizer.step()
    assert "master_low" in optimizer.state[p] and "master_low" not in optimizer.state[q]


@every_way
@every_variant
def test_float32_parameters_beside_them_are_updated_as_ever(make, way):
    p, q, narrow = parameter(5000), parameter(5000), bfloat16(5000)
    optimizer, expected = make([narrow, p], lr=1e-2, **way), make([q], lr=1e-2)
    for step in range(3):
        narrow.grad = p.grad = q.grad = gradients([p], step)[0]
        optimizer.step()
        expected.step()
    assert_same_bits(p, q)
    assert optimizer.state[p].keys() == expected.state[q].keys()
    for key, value in expected.state[q].items():
        assert_same_bits(optimizer.state[p][key], value, what=key)


@every_variant
def test_without_them_the_state_is_as_ever(make):
    p, q = bfloat16(5000), bfloat16(5000)
    optimizer, rounded = make([p]), make([q], **WAYS["stochastic"])
    take(optimizer, [p], range(2))
    take(rounded, [q], range(2))
    assert "master_low" not in optimizer.state[p]
    assert rounded.state[q].keys() == optimizer.state[p].keys()


def test_options_of_single_parameters():
    params = [bfloat16(500, seed=i) for i in range(3)]
    manager = lion.GlobalOptimManager.get_instance()
    manager.override_config(params[0], "master_weight_bits", 24)
    manager.override_config(params[1], key_value_dict={"stochastic_rounding": True, "rounding_seed": SEED})
    optimizer = lion.Lion(params, lr=1e-3)
    copies = [bfloat16(500, seed=i) for i in range(3)]
    ways = [{"params": copies[:1], "master_weight_bits": 24}, {"params": copies[1:2], **WAYS["stochastic"]}]
    expected = lion.Lion([*ways, {"params": copies[2:]}], lr=1e-3)
    take(optimizer, params, range(4))
    take(expected, copies, range(4))
    for p, q in zip(params, copies, strict=True):
        assert_same_bits(p, q)
        assert optimizer.state[p].keys() == expected.state[q].keys()


@every_class
def test_groups_without_the_options_step_and_copy(cls):
    """As those of a program that was pickled before there were any."""
    p = bfloat16(5000)
    optimizer = cls([p], lr=1e-2)
    take(optimizer, [p], range(2))
    old = copy.deepcopy(optimizer.__getstate__())
    for group in (old["defaults"], *old["param_groups"]):
        for key in KEYS:
            del group[key]
    again = cls.__new__(cls)
    again.__setstate__(pickle.loads(pickle.dumps(old)))
    [q] = again.param_groups[0]["params"]
    q.grad, q.grad_dtype = None, torch.float32
    for key in KEYS:
        del again.param_groups[0][key]
    for one in (optimizer, again):
        take(one, one.param_groups[0]["params"], [2])
    assert_same_bits(q, p)
    again.add_param_group({"params": [bfloat16(3)]})
    assert {key: again.param_groups[1][key] for key in KEYS} == dict(zip(KEYS, (None, False, 0), strict=True))


def test_the_trainers_arguments_pass_them_on():
    args = SimpleNamespace(learning_rate=1e-3, weight_decay=0.1, adam_beta1=0.9, adam_beta2=0.999)
    cls, kwargs = optimizer_cls_and_kwargs(args, lion.Lion8bit, master_weight_bits=24)
    assert cls(nn.Linear(3, 3).bfloat16().parameters(), **kwargs).param_groups[0]["master_weight_bits"] == 24

"""A checkpoint that does not fit raises, naming the place, and the optimizer is as it was."""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import nn

import lion
from tests.comparing import assert_same_bits

SIZES = (700, 300)
KINDS = {
    "32bit": {"optim_bits": 32, "percentile_clipping": 40},
    "blockwise": {"optim_bits": 8, "percentile_clipping": 40},
    "tensorwise": {"optim_bits": 8, "block_wise": False},
}


def made(kind, seed=0):
    """Return parameters and an optimizer of two groups that has taken three steps."""
    rng = np.random.default_rng(seed)
    params = {
        name: nn.Parameter(torch.from_numpy(rng.normal(size=n)).float()) for name, n in zip("ab", SIZES, strict=True)
    }
    groups = [{"params": [(name, p)], "lr": 1e-2 * (1 + i)} for i, (name, p) in enumerate(params.items())]
    optimizer = lion.Lion(groups, min_8bit_size=0, weight_decay=0.1, **KINDS[kind])
    for _ in range(3):
        for p in params.values():
            p.grad = torch.from_numpy(rng.normal(size=p.numel())).float()
        optimizer.step()
    return list(params.values()), optimizer


def remembered(optimizer):
    """Return everything that a load may change, objects and contents."""
    objects = [optimizer.state, optimizer.param_groups, *optimizer.param_groups]
    objects += [optimizer.state[p] for group in optimizer.param_groups for p in group["params"]]
    tensors = [t for state in optimizer.state.values() for t in state.values()]
    return objects, tensors, deepcopy(tensors), deepcopy([dict(g, params=None) for g in optimizer.param_groups])


def assert_unchanged(optimizer, before):
    objects, tensors, values, groups = before
    now = remembered(optimizer)
    assert all(a is b for a, b in zip(now[0], objects, strict=True))
    assert all(a is b for a, b in zip(now[1], tensors, strict=True))
    for a, b in zip(tensors, values, strict=True):
        assert_same_bits(a, b)
    assert now[3] == groups


def put(*path, value):
    def mutate(saved):
        for key in path[:-1]:
            saved = saved[key]
        saved[path[-1]] = value(saved[path[-1]]) if callable(value) else value

    return mutate


def remove(*path):
    def mutate(saved):
        for key in path[:-1]:
            saved = saved[key]
        del saved[path[-1]]

    return mutate


def entry(key, value):
    """A mutation of the second parameter's state, found wrong after the first one's has been read."""
    return put("state", 1, key, value=value), rf"parameter 'b': .*'{key}'"


def without(key):
    return remove("state", 1, key), rf"parameter 'b': .*'{key}'"


def descending(qmap):
    return qmap.flip(0)


def with_nan(qmap):
    return torch.where(torch.arange(256) == 9, torch.nan, qmap)


def in_2048_blocks_of_another_size(absmax):
    return torch.ones(2049 // 256)


STATES = [  # kinds, (mutation, message)
    (KINDS, without("step")),
    (KINDS, without("state1")),
    (KINDS, entry("step", torch.zeros(2))),
    (KINDS, entry("step", -1)),
    (KINDS, entry("step", 1.5)),
    (KINDS, entry("step", float("nan"))),
    (KINDS, entry("step", torch.tensor(float("inf")))),
    (KINDS, entry("step", "3")),
    (KINDS, entry("step", None)),
    (KINDS, entry("state1", None)),
    (KINDS, entry("state1", [0.0])),
    (KINDS, entry("state1", torch.Tensor.tolist)),
    (KINDS, entry("state1", lambda t: t[:-1])),
    (KINDS, entry("state1", lambda t: torch.cat([t, t]))),
    (KINDS, entry("state1", lambda t: t.reshape(30, 10))),
    (KINDS, entry("state1", torch.Tensor.half)),
    (KINDS, entry("state1", torch.Tensor.bfloat16)),
    (KINDS, entry("state1", torch.Tensor.double)),
    (KINDS, entry("state1", lambda t: t.to(torch.int8))),
    (KINDS, entry("state1", lambda t: t.float().to_sparse())),
    (KINDS, entry("state2", torch.zeros(300))),
    (KINDS, entry("absmax2", torch.zeros(2))),
    (KINDS, entry("unorm_vec", torch.zeros(1))),
    (KINDS, entry("notes", torch.zeros(3, device="meta"))),
    (["32bit"], entry("absmax1", torch.zeros(2))),
    (["32bit"], entry("qmap1", torch.zeros(256))),
    (["32bit"], (put("state", 1, "state1", value=lambda t: t.to(torch.uint8)), "parameter 'b': .*'qmap1'")),
    (["blockwise", "tensorwise"], (put("state", 1, "state1", value=lambda t: t.float()), "parameter 'b': unknown key")),
    (["blockwise", "tensorwise"], without("qmap1")),
    (["blockwise", "tensorwise"], entry("qmap1", lambda t: t[:255])),
    (["blockwise", "tensorwise"], entry("qmap1", torch.Tensor.half)),
    (["blockwise", "tensorwise"], entry("qmap1", descending)),
    (["blockwise", "tensorwise"], entry("qmap1", with_nan)),
    (["blockwise", "tensorwise"], entry("qmap1", torch.zeros(256))),
    (["blockwise", "tensorwise"], entry("qmap1", torch.full((256,), 0.5))),
    (["blockwise", "tensorwise"], entry("qmap1", torch.linspace(0.5, 1, 256))),
    (["blockwise"], without("absmax1")),
    (["blockwise"], entry("absmax1", lambda t: t[:0])),
    (["blockwise"], entry("absmax1", in_2048_blocks_of_another_size)),
    (["blockwise"], entry("absmax1", lambda t: t.reshape(1, 2))),
    (["blockwise"], entry("absmax1", torch.Tensor.half)),
    (["blockwise"], entry("absmax1", torch.Tensor.bfloat16)),
    (["blockwise"], (put("state", 1, "max1", value=torch.ones(1)), "parameter 'b': .*max1'")),
    (["tensorwise"], without("max1")),
    (["tensorwise"], without("new_max1")),
    (["tensorwise"], entry("max1", torch.tensor(1.0))),
    (["tensorwise"], entry("max1", torch.ones(2))),
    (["tensorwise"], entry("new_max1", torch.ones(2))),
    (["tensorwise"], entry("absmax1", torch.ones(2))),
    (["32bit", "blockwise"], entry("gnorm_vec", lambda t: t[:99])),
    (["32bit", "blockwise"], entry("gnorm_vec", torch.Tensor.half)),
    (["32bit", "blockwise"], entry("gnorm_vec", [0.0] * 100)),
    (KINDS, (put("state", 1, value=[1, 2]), "parameter 'b': a dict")),
    (KINDS, (put("state", 1, value=torch.zeros(3)), "parameter 'b': a dict")),
    (KINDS, entry("__bnb_optimizer_quant_state__", [1])),
]
GROUPS = [
    (remove("state"), "'state' is missing"),
    (remove("param_groups"), "'param_groups' is missing"),
    (put("state", value=[1]), "'state' must not be of type list"),
    (put("param_groups", value={}), "'param_groups' must not be of type dict"),
    (put("param_groups", value=[]), r"\[\] parameters; \[1, 1\]"),
    (remove("param_groups", 1), r"\[1\] parameters; \[1, 1\]"),
    (lambda saved: saved["param_groups"].append({"params": []}), r"\[1, 1, 0\]"),
    (put("param_groups", 1, "params", value=[1, 2]), r"\[1, 2\]"),
    (put("param_groups", 1, "params", value=[]), r"\[1, 0\]"),
    (put("param_groups", 1, "params", value=[0]), "more than once"),
    (put("param_groups", 1, "params", value=7), "group 1 must be a dict"),
    (remove("param_groups", 1, "params"), "group 1 must be a dict"),
    (put("param_groups", 1, value=None), "group 1 must be a dict"),
    (put("param_groups", 1, "params", value=[5]), "no group holds the parameter 1"),
    (put("state", 5, value={}), "no group holds the parameter 5"),
    (put("state", "weight", value={"step": 1.0}), "no group holds the parameter 'weight'"),
    (put("param_groups", 1, "lr", value=-1.0), "group 1: .*learning rate"),
    (put("param_groups", 1, "lr", value="fast"), "group 1: .*learning rate"),
    (put("param_groups", 1, "lr", value=float("nan")), "group 1: .*learning rate"),
    (put("param_groups", 1, "betas", value=(0.9,)), "group 1: .*betas"),
    (put("param_groups", 1, "betas", value=(0.9, 1.0)), "group 1: .*beta parameter at index 1"),
    (put("param_groups", 1, "betas", value=0.9), "group 1: .*betas"),
    (put("param_groups", 1, "weight_decay", value=None), "group 1: .*weight_decay"),
    (put("param_groups", 1, "weight_decay", value=float("inf")), "group 1: .*weight_decay"),
]


def mutated(saved, mutate):
    saved = deepcopy(saved)
    mutate(saved)
    return saved


def refuse(optimizer, saved, message):
    before = remembered(optimizer)
    given = deepcopy(saved)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert_unchanged(optimizer, before)
    assert saved.keys() == given.keys()


@pytest.mark.parametrize("kind, mutate, message", [(k, *case) for kinds, case in STATES for k in kinds])
def test_state_that_does_not_fit(kind, mutate, message):
    _, source = made(kind, seed=1)
    for _, optimizer in (made(kind), made("32bit"), made("tensorwise")):
        refuse(optimizer, mutated(source.state_dict(), mutate), message)


@pytest.mark.parametrize("mutate, message", GROUPS)
def test_groups_that_do_not_fit(mutate, message):
    _, source = made("blockwise", seed=1)
    _, optimizer = made("blockwise")
    refuse(optimizer, mutated(source.state_dict(), mutate), message)


@pytest.mark.parametrize("kind", KINDS)
def test_a_refused_checkpoint_does_not_disturb_training(kind):
    (params, optimizer), (others, other) = made(kind), made(kind)
    saved = made(kind, seed=1)[1].state_dict()
    del saved["state"][1]["state1"]
    with pytest.raises(ValueError, match="state1"):
        optimizer.load_state_dict(saved)
    optimizer.step()
    other.step()
    for p, q in zip(params, others, strict=True):
        assert_same_bits(p, q)
        for key, value in optimizer.state[p].items():
            assert_same_bits(value, other.state[q][key], what=key)


@pytest.mark.parametrize("kind", KINDS)
def test_a_good_checkpoint_is_loaded(kind):
    """What is mutated above is good before."""
    _, source = made(kind, seed=1)
    params, optimizer = made(kind)
    optimizer.load_state_dict(source.state_dict())
    for p, q in zip(params, source.state, strict=True):
        for key, value in source.state[q].items():
            assert_same_bits(optimizer.state[p][key], value, what=key)


@pytest.mark.parametrize("kind", KINDS)
def test_the_checkpoint_is_not_shared(kind):
    _, source = made(kind, seed=1)
    saved = deepcopy(source.state_dict())
    copy = deepcopy(saved)
    _, optimizer = made(kind)
    optimizer.load_state_dict(saved)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.5
    assert saved["param_groups"] == copy["param_groups"]
    for number, state in copy["state"].items():
        for key, value in state.items():
            assert_same_bits(saved["state"][number][key], value)


def test_a_parameter_without_state():
    params, source = made("blockwise", seed=1)
    saved = source.state_dict()
    for mutate in (remove("state", 1), put("state", 1, value={})):
        (first, second), optimizer = made("blockwise")
        optimizer.load_state_dict(mutated(saved, mutate))
        assert set(optimizer.state) == {first}
        optimizer.step()
        assert optimizer.state[first]["step"] == 4
        assert optimizer.state[second]["step"] == 1

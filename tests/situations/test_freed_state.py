"""What a program drops, replaces or moves away between steps is freed at once: offloading state saves memory."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

import lion
from tests.optimizers.support import every_variant, parameter, set_gradients

LARGE = 110_000  # paged where asked


def stepped(make, steps=2):
    params = [parameter(LARGE, seed=seed) for seed in range(3)]
    optimizer = make(params, lr=1e-3)
    for seed in range(steps):
        set_gradients(params, seed)
        optimizer.step()
    return optimizer, params


def memory_of(tensors):
    return [weakref.ref(tensor.untyped_storage()) for tensor in tensors]


def alive(refs):
    return [ref for ref in refs if ref() is not None]


def state_tensors(state):
    return list(state.values())


@every_variant
def test_state_that_is_cleared(make):
    optimizer, params = stepped(make)
    refs = memory_of(value for state in optimizer.state.values() for value in state_tensors(state))
    assert alive(refs)
    optimizer.state.clear()
    assert not alive(refs)


@every_variant
def test_an_entry_that_is_popped_and_one_that_is_replaced(make):
    optimizer, params = stepped(make)
    popped, replaced = (memory_of(state_tensors(optimizer.state[p])) for p in params[:2])
    optimizer.state.pop(params[0])
    optimizer.state[params[1]] = {key: value.clone() for key, value in optimizer.state[params[1]].items()}
    assert not alive(popped) and not alive(replaced)


@every_variant
def test_tensors_that_are_moved_to_other_memory_and_back(make):
    """State is offloaded between steps; the next step goes on with what comes back."""
    optimizer, params = stepped(make)
    twin, others = stepped(make)
    away = {}
    for p in params:
        state = optimizer.state[p]
        refs = memory_of(state_tensors(state))
        away[p] = {key: value.clone() for key, value in state.items()}
        state.clear()
        assert not alive(refs)
    for p in params:
        optimizer.state[p].update(away[p])
    for some, o in ((params, optimizer), (others, twin)):
        set_gradients(some, 7)
        o.step()
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


@every_variant
def test_a_group_that_is_removed(make):
    optimizer, params = stepped(make)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(LARGE))]})
    (late,) = optimizer.param_groups[1]["params"]
    set_gradients([*params, late], 3)
    optimizer.step()
    refs = memory_of([late, *state_tensors(optimizer.state[late])])
    optimizer.state.pop(late)
    optimizer.param_groups.pop()
    del late
    gc.collect()
    assert not alive(refs)


@every_variant
def test_steps_in_backward_keep_nothing(make):
    layer = nn.Linear(400, 300)
    optimizer = make(layer.parameters(), lr=1e-3)
    with lion.StepInBackward(optimizer):
        for _ in range(2):
            layer(torch.ones(2, 400)).sum().backward()
        refs = memory_of(value for state in optimizer.state.values() for value in state_tensors(state))
        assert alive(refs)
        optimizer.state.clear()
        assert not alive(refs)
        layer(torch.ones(2, 400)).sum().backward()
        assert optimizer.state[layer.weight]["step"] == 1


@every_variant
def test_a_failed_step_keeps_nothing(make):
    optimizer, params = stepped(make)
    set_gradients(params, 5)
    params[1].grad = torch.ones(LARGE).to_sparse()
    with pytest.raises(TypeError, match="sparse"):
        optimizer.step()
    refs = memory_of([params[0].grad, *state_tensors(optimizer.state[params[0]])])
    params[0].grad = None
    optimizer.state.clear()
    assert not alive(refs)


def test_sets_of_gradients_that_alternate_need_no_new_plan():
    """Experts that take turns: which parameters have gradients changes with each step."""
    params = [parameter(5000, seed=seed) for seed in range(4)]
    optimizer = lion.Lion8bit(params)
    sets = [params[:2], params[2:], params]
    for seed in range(6):
        optimizer.zero_grad()
        set_gradients(sets[seed % 3], seed)
        optimizer.step()
        if seed == 2:
            plans = set(map(id, optimizer._plans))
    assert set(map(id, optimizer._plans)) == plans

"""Convolutions in channels_last: dense parameters in another order are updated where they are."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

import lion
from tests.comparing import assert_same_bits
from tests.optimizers.support import every_variant, set_gradients


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3))


def trained(model, make, steps=3, **options):
    optimizer = make(model.parameters(), lr=1e-3, weight_decay=0.1, min_8bit_size=0, **options)
    for seed in range(steps):
        set_gradients(list(model.parameters()), seed)
        optimizer.step()
    return optimizer


@every_variant
@pytest.mark.parametrize("percentile", [100, 20])
def test_the_numbers_are_those_of_contiguous_parameters(make, percentile):
    plain, permuted = network(), network().to(memory_format=torch.channels_last)
    strides = [p.stride() for p in permuted.parameters()]
    optimizers = [trained(model, make, percentile_clipping=percentile) for model in (plain, permuted)]
    for p, q in zip(plain.parameters(), permuted.parameters(), strict=True):
        assert_same_bits(p, q)
        states = optimizers[0].state[p], optimizers[1].state[q]
        for key in states[0]:
            assert_same_bits(*(state[key].contiguous() for state in states), what=key)
    assert [p.stride() for p in permuted.parameters()] == strides


def test_float32_momentum_has_the_strides_of_its_parameter():
    model = network().to(memory_format=torch.channels_last)
    optimizer = trained(model, lion.Lion)
    for p in model.parameters():
        assert optimizer.state[p]["state1"].stride() == p.stride()
        p.grad = p.grad.to(memory_format=torch.channels_last) if p.ndim == 4 else p.grad
    # Neither the gradient nor anything else is copied.
    batches = [launch.batch for launch in optimizer._prepared()[1]]
    taken = [tensor.data_ptr() for batch in batches for tensor in (*batch.operands, *batch.gradients)]
    assert sorted(taken) == sorted(tensor.data_ptr() for p in model.parameters() for tensor in (p, p.grad))


@every_variant
@pytest.mark.parametrize("target", [torch.contiguous_format, torch.channels_last])
def test_a_checkpoint_goes_on_in_either_order(make, target):
    model = network().to(memory_format=torch.channels_last)
    optimizer = trained(model, make)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = copy.deepcopy(model).to(memory_format=target)
    resumed = make(other.parameters(), lr=1e-3, weight_decay=0.1, min_8bit_size=0)
    resumed.load_state_dict(torch.load(file))
    for some, o in ((model, optimizer), (other, resumed)):
        set_gradients(list(some.parameters()), 9)
        o.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert_same_bits(p, q)


@every_variant
def test_a_parameter_changes_its_order_between_steps(make):
    plain, changing = network(), network()
    trained_plain, optimizer = trained(plain, make, 2), trained(changing, make, 2)
    for seed, order in ((5, torch.channels_last), (6, torch.contiguous_format)):
        changing.to(memory_format=order)
        for model, o in ((plain, trained_plain), (changing, optimizer)):
            set_gradients(list(model.parameters()), seed)
            o.step()
    for p, q in zip(plain.parameters(), changing.parameters(), strict=True):
        assert_same_bits(p, q)

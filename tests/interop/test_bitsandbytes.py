"""Beside bitsandbytes on a CPU: the same path within its roundings, and its checkpoints read.

Written with bitsandbytes 0.50.2; skipped where it is not installed.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import lion
from lion import reference
from tests import strategies
from tests.comparing import assert_same_bits
from tests.interop.training import (
    MORE_STEPS,
    OPTIONS,
    SMALL,
    STEPS,
    assert_close,
    make_params,
    restore,
    snapshot,
    train,
)
from tests.optimizers.support import ByHand, every_dtype, parameter, set_gradients

bnb = pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.interop

MAP = reference.create_dynamic_map()
STEP = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


def pair(cls, dtype, **kwargs):
    """Return parameters and optimizer of ours and of bitsandbytes, from the same values."""
    sides = []
    for module in (lion, bnb.optim):
        params = [parameter(*shape, dtype=dtype, seed=i) for i, shape in enumerate(((5000,), (64, 65), (10,)))]
        sides.append((params, getattr(module, cls)(params, **kwargs)))
    return sides


def step_both(sides, seed):
    for params, optimizer in sides:
        set_gradients(params, seed)
        optimizer.step()


# --- maps and quantization


@pytest.mark.parametrize("signed", [True, False])
def test_map(signed):
    assert_same_bits(reference.create_dynamic_map(signed), bnb.functional.create_dynamic_map(signed))


@pytest.mark.parametrize("total_bits", range(2, 9))
def test_maps_of_fewer_bits(total_bits):
    for max_exponent_bits in range(1, total_bits + 1):
        expected = bnb.functional.create_dynamic_map(True, max_exponent_bits, total_bits)
        assert_same_bits(reference.create_dynamic_map(True, max_exponent_bits, total_bits), expected)


@pytest.mark.parametrize("block_size", [256, 4096])
@pytest.mark.parametrize("recipe", ["gradients", "negative", "outlier", "constant"])
def test_quantization(recipe, block_size):
    values = torch.from_numpy(strategies.make_floats(recipe, "float32", 5000, 0))
    codes, state = lion.functional.quantize_blockwise(values, blocksize=block_size)
    their_codes, their_state = bnb.functional.quantize_blockwise(values, blocksize=block_size)
    assert_same_bits(state.absmax, their_state.absmax)
    ours = lion.functional.dequantize_blockwise(codes, state)
    theirs = lion.functional.dequantize_blockwise(their_codes, absmax=their_state.absmax, blocksize=block_size)
    assert_same_bits(theirs, bnb.functional.dequantize_blockwise(their_codes, their_state))
    # Ours is the nearest entry; theirs misses by one here and there, and by four next to zero.
    absmax = state.absmax.repeat_interleave(block_size)[:5000]
    assert ((ours - values).abs() <= (theirs - values).abs() + 1e-6 * absmax).all()
    difference = (codes.int() - their_codes.int()).abs()
    assert difference[values.abs() > 1e-4 * absmax].max() <= 1


# --- optimizers


@every_dtype
@pytest.mark.parametrize("cls", ["Lion", "Lion32bit", "PagedLion", "PagedLion32bit"])
def test_32bit_steps(cls, dtype):
    """Without weight decay: both take the sign of nearly the same number."""
    lr = 1e-3
    sides = pair(cls, dtype, lr=lr)
    for seed in range(5):
        step_both(sides, seed)
        for p, q in zip(sides[0][0], sides[1][0], strict=True):
            close = (p.double() - q.double()).abs() <= 2 * STEP[dtype] * p.double().abs().clamp(min=lr)
            assert close.float().mean() > 0.999
            momentum, other = sides[0][1].state[p]["state1"], sides[1][1].state[q]["state1"]
            assert other.dtype == torch.float32
            torch.testing.assert_close(momentum, other, rtol=1e-4, atol=1e-7)


@every_dtype
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("cls", ["Lion8bit", "PagedLion8bit"])
def test_8bit_steps(cls, dtype, weight_decay):
    """Codes differ by one where the two round differently; a sign differs only where the number is almost zero."""
    lr = 1e-3
    sides = pair(cls, dtype, lr=lr, weight_decay=weight_decay)
    for seed in range(5):
        step_both(sides, seed)
        for p, q in zip(sides[0][0], sides[1][0], strict=True):
            ours, theirs = sides[0][1].state[p], sides[1][1].state[q]
            close = (p.double() - q.double()).abs() <= 2 * STEP[dtype] * p.double().abs().clamp(min=lr)
            assert close.float().mean() > 0.98
            assert ours["state1"].dtype == theirs["state1"].dtype
            if p.numel() >= 4096:
                torch.testing.assert_close(ours["absmax1"], theirs["absmax1"], rtol=0.02, atol=0)
                assert ((ours["state1"].int() - theirs["state1"].int()).abs() <= 1).float().mean() > 0.98


# --- checkpoints


@pytest.mark.parametrize("cls", ["Lion", "Lion8bit", "PagedLion", "PagedLion8bit"])
def test_its_checkpoints_load(cls):
    (ours, _), (theirs, their_optimizer) = pair(cls, torch.float32, lr=1e-3, weight_decay=0.1)
    for seed in range(3):
        set_gradients(theirs, seed)
        their_optimizer.step()
    params = [nn.Parameter(p.detach().clone()) for p in theirs]
    optimizer = getattr(lion, cls)(params)
    optimizer.load_state_dict(copy.deepcopy(their_optimizer.state_dict()))
    for p, q in zip(params, theirs, strict=True):
        state, expected = optimizer.state[p], their_optimizer.state[q]
        assert_same_bits(state["step"], np.array(3, np.float32))
        for key in set(expected) - {"step"}:
            assert_same_bits(state[key], expected[key], what=key)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (1e-3, (0.9, 0.99), 0.1)
    copies = {}
    for p in params:
        copies[p] = ByHand(p, 8 if "8bit" in cls else 32)
        copies[p].steps = 3
        state = optimizer.state[p]
        if copies[p].kind == "32bit":
            copies[p].momentum = state["state1"].numpy().copy()
        else:
            copies[p].codes, copies[p].absmax = state["state1"].numpy().copy(), state["absmax1"].numpy().copy()
    set_gradients(params, 9)
    for p in params:
        copies[p].step(p.grad, 1e-3, weight_decay=0.1)
    optimizer.step()
    for p in params:
        copies[p].check(p, optimizer)


def test_layout_of_its_checkpoints():
    """What ``tests/optimizers/test_state.py`` takes for granted."""
    theirs, optimizer = pair("Lion8bit", torch.float32, lr=1e-3)[1]
    set_gradients(theirs, 0)
    optimizer.step()
    saved = optimizer.state_dict()
    assert set(saved["param_groups"][0]) == {"lr", "betas", "eps", "weight_decay", "params"}
    assert set(saved["state"][0]) == {"step", "__bnb_optimizer_quant_state__"}
    assert set(saved["state"][0]["__bnb_optimizer_quant_state__"]) == {"state1", "qmap1", "absmax1"}
    assert type(saved["state"][0]["step"]) is int
    assert set(saved["state"][2]) == {"step", "__bnb_optimizer_quant_state__"}
    assert set(saved["state"][2]["__bnb_optimizer_quant_state__"]) == {"state1"}
    assert_same_bits(optimizer.state[theirs[0]]["qmap1"], MAP)


@every_dtype
@pytest.mark.parametrize("cls", ["Lion", "Lion8bit", "PagedLion", "PagedLion8bit"])
def test_our_checkpoints_load_there_and_training_goes_on(cls, dtype):
    params = make_params(str(dtype).removeprefix("torch."))
    optimizer = getattr(lion, cls)(params, **OPTIONS, **SMALL)
    train(optimizer, params, 0, STEPS)
    theirs = restore(snapshot(params))
    their_optimizer = getattr(bnb.optim, cls)(theirs, **SMALL)
    their_optimizer.load_state_dict(lion.exchange.to_bitsandbytes(optimizer.state_dict()))
    assert {key: their_optimizer.param_groups[0][key] for key in OPTIONS} == OPTIONS
    for p, q in zip(params, theirs, strict=True):
        for key in optimizer.state[p].keys() - {"step"}:
            assert_same_bits(their_optimizer.state[q][key], optimizer.state[p][key], what=key)
    train(optimizer, params, STEPS, MORE_STEPS)
    train(their_optimizer, theirs, STEPS, MORE_STEPS)
    assert_close(params, list(optimizer.state.values()), theirs, list(their_optimizer.state.values()))


def test_tensorwise_state_becomes_blockwise_there():
    params = make_params("float32")
    optimizer = lion.Lion8bit(params, block_wise=False, **OPTIONS, **SMALL)
    train(optimizer, params, 0, STEPS)
    theirs = restore(snapshot(params))
    their_optimizer = bnb.optim.Lion8bit(theirs, **SMALL)
    their_optimizer.load_state_dict(lion.exchange.to_bitsandbytes(optimizer.state_dict()))
    train(their_optimizer, theirs, STEPS, MORE_STEPS)
    assert all(torch.isfinite(p).all() for p in theirs)

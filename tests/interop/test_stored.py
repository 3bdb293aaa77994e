"""Checkpoints that bitsandbytes wrote, kept in ``data``, load here and training goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import lion
from lion import exchange, reference
from lion._state import adapting
from tests.comparing import assert_same_bits
from tests.interop.training import (
    CASES,
    MORE_STEPS,
    OPTIONS,
    SMALL,
    STEPS,
    assert_close,
    flat,
    make_params,
    restore,
    train,
)

DATA = Path(__file__).with_name("data")


def load(name):
    return torch.load(DATA / f"{name}.pt", weights_only=True)


@pytest.mark.parametrize("name", CASES)
def test_training_goes_on(name):
    saved = load(name)
    params = restore(saved["params"])
    optimizer = getattr(lion, CASES[name][0])(params, lr=1.0, **SMALL)
    optimizer.load_state_dict(saved["state_dict"])
    assert {key: optimizer.param_groups[0][key] for key in OPTIONS} == OPTIONS
    for p, theirs in zip(params, saved["state_dict"]["state"].values(), strict=True):
        assert_same_bits(optimizer.state[p]["state1"], flat(theirs)["state1"])
        assert optimizer.state[p]["step"].item() == STEPS

    train(optimizer, params, STEPS, MORE_STEPS)
    later = saved["later_state_dict"]["state"].values()
    assert_close(params, list(optimizer.state.values()), saved["later_params"], list(later))


@pytest.mark.parametrize("name", CASES)
def test_the_way_there_and_back(name):
    saved = load(name)["state_dict"]
    optimizer = getattr(lion, CASES[name][0])(make_params(CASES[name][1]), **SMALL)
    optimizer.load_state_dict(saved)
    there = exchange.to_bitsandbytes(optimizer.state_dict())
    assert saved["param_groups"][0].items() <= there["param_groups"][0].items()
    for theirs, ours in zip(saved["state"].values(), there["state"].values(), strict=True):
        theirs = {key: value for key, value in flat(theirs).items() if not key.startswith("__")}
        assert theirs.keys() == ours.keys()
        assert theirs["step"] == ours["step"] and type(ours["step"]) is int
        for key in theirs.keys() - {"step"}:
            assert_same_bits(ours[key], theirs[key], what=key)


@pytest.mark.parametrize("block_wise", [True, False])
@pytest.mark.parametrize("clipping", [100, 30])
@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("name", ["blocks_of_2048", "tensorwise"])
def test_old_layouts(name, bits, clipping, block_wise):
    saved = load(name)
    params = make_params("float32")
    optimizer = lion.Lion(
        params, optim_bits=bits, percentile_clipping=clipping, block_wise=block_wise, min_8bit_size=64
    )
    optimizer.load_state_dict(saved["state_dict"])
    for index, (p, momentum) in enumerate(zip(params, saved["momentum"], strict=True)):
        theirs, ours = saved["state_dict"]["state"][index], optimizer.state[p]
        absmax = theirs["max1" if name == "tensorwise" else "absmax1"]
        expected = theirs["qmap1"][theirs["state1"].int()] * absmax
        kept = adapting.momentum(ours)
        if bits == 32 or p.numel() < 64:
            assert_same_bits(kept, expected)
        elif name == "tensorwise" and not block_wise:
            assert_same_bits(ours["state1"], theirs["state1"])
            assert_same_bits(ours["max1"], theirs["max1"])
        else:
            size = 256 if block_wise else p.numel()
            codes, absmax = reference.quantize_blockwise(expected.numpy(), theirs["qmap1"].numpy(), size)
            assert_same_bits(ours["state1"], codes)
            assert_same_bits(ours["absmax1" if block_wise else "max1"], absmax)
        # Two quantizations: half of the widest gap in the map, twice.
        assert ((kept - momentum).abs() <= theirs["qmap1"].diff().max() * momentum.abs().max()).all()
        assert ours["step"].item() == 7
        assert ("gnorm_vec" in ours) == (clipping < 100)
        if clipping < 100:
            assert_same_bits(ours["gnorm_vec"], theirs["gnorm_vec"])
    train(optimizer, params, 0, 2)

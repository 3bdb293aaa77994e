"""Loading into an optimizer with other options converts the state; through files, too."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from torch import nn

import lion
from lion import reference
from lion._memory import paging
from lion._state import adapting
from tests.comparing import assert_same_bits

QMAP = reference.create_dynamic_map()
SIZE = 100_300
FORMS = {
    "32bit": {"optim_bits": 32},
    "blockwise": {"optim_bits": 8},
    "tensorwise": {"optim_bits": 8, "block_wise": False},
}


def made(dtype=torch.float32, steps=3, **options):
    rng = np.random.default_rng(0)
    p = nn.Parameter(torch.from_numpy(rng.normal(size=SIZE)).to(dtype))
    optimizer = lion.Lion([p], lr=1e-2, **options)
    for _ in range(steps):
        p.grad = torch.from_numpy(rng.normal(size=SIZE)).to(dtype)
        optimizer.step()
    return p, optimizer


def through_a_file(saved):
    file = io.BytesIO()
    torch.save(saved, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


def momentum(state):
    """Return the momentum that a state holds, computed by the reference."""
    codes = state["state1"].numpy()
    if codes.dtype == np.float32:
        return codes
    absmax, block_size = (state["absmax1"], 256) if "absmax1" in state else (state["max1"], SIZE)
    return reference.dequantize_blockwise(codes, absmax.numpy(), QMAP, block_size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("paged", [(False, False), (True, False), (False, True), (True, True)], ids=str)
@pytest.mark.parametrize("target", FORMS)
@pytest.mark.parametrize("source", FORMS)
def test_conversion(source, target, paged, dtype):
    p, old = made(dtype, is_paged=paged[0], **FORMS[source])
    q, new = made(dtype, steps=0, is_paged=paged[1], **FORMS[target])
    new.load_state_dict(through_a_file(old.state_dict()))
    before, after = old.state[p], new.state[q]
    assert_same_bits(after["step"], before["step"])
    assert paging.is_paged(after["state1"]) == paged[1]
    assert new.param_groups[0]["is_paged"] == paged[1]
    if source == target:
        for key in before:
            assert_same_bits(after[key], before[key], what=key)
    elif target == "32bit":
        assert_same_bits(after["state1"], momentum(before))
    else:
        block_size = 256 if target == "blockwise" else SIZE
        codes, absmax = reference.quantize_blockwise(momentum(before), QMAP, block_size)
        assert_same_bits(after["state1"], codes)
        assert_same_bits(after["absmax1" if target == "blockwise" else "max1"], absmax)
    if "absmax1" in after:
        assert paging.is_paged(after["absmax1"]) == paged[1]


def test_clipping_that_begins_or_ends_with_a_load():
    p, clipped = made(percentile_clipping=40)
    q, plain = made(steps=0)
    plain.load_state_dict(clipped.state_dict())
    assert "gnorm_vec" not in plain.state[q]
    r, again = made(steps=0, percentile_clipping=40)
    again.load_state_dict(plain.state_dict())
    assert_same_bits(again.state[r]["gnorm_vec"], torch.zeros(100))
    again.load_state_dict(clipped.state_dict())
    assert_same_bits(again.state[r]["gnorm_vec"], clipped.state[p]["gnorm_vec"])


@pytest.mark.parametrize("size", [1, 255, 256, 257, 2048, 2049])
@pytest.mark.parametrize("options", [FORMS["blockwise"], FORMS["tensorwise"]], ids=str)
def test_8_bits_are_taken_as_they_are(size, options):
    """Quantized again, a block whose greatest magnitude is negative would become smaller."""
    p, q = (nn.Parameter(torch.zeros(size)) for _ in range(2))
    old, new = (lion.Lion([parameter], min_8bit_size=0, **options) for parameter in (p, q))
    p.grad = -torch.arange(1.0, size + 1)
    old.step()
    new.load_state_dict(through_a_file(old.state_dict()))
    assert new.state[q].keys() == old.state[p].keys()
    for key in old.state[p]:
        assert_same_bits(new.state[q][key], old.state[p][key], what=key)


@pytest.mark.parametrize("size", [0, 1, 5])
@pytest.mark.parametrize("target", FORMS)
@pytest.mark.parametrize("source", FORMS)
def test_few_elements_are_converted(source, target, size):
    p, q = (nn.Parameter(torch.ones(size)) for _ in range(2))
    old, new = (
        lion.Lion([parameter], min_8bit_size=0, **FORMS[form]) for parameter, form in ((p, source), (q, target))
    )
    p.grad = torch.ones(size)
    old.step()
    new.load_state_dict(through_a_file(old.state_dict()))
    fresh = lion.Lion([p], min_8bit_size=0, **FORMS[target])
    fresh.step()
    assert {key: value.shape for key, value in new.state[q].items()} == {
        key: value.shape for key, value in fresh.state[p].items()
    }
    assert_same_bits(adapting.momentum(new.state[q]), adapting.momentum(old.state[p]))
    q.grad = torch.ones(size)
    new.step()


@pytest.mark.parametrize("size", [2047, 2048, 2049, 4096, 4097])
def test_blocks_of_2048(size):
    """bitsandbytes' blocks before it had those of 256."""
    values = np.random.default_rng(size).normal(size=size).astype(np.float32)
    codes, absmax = reference.quantize_blockwise(values, QMAP, 2048)
    saved = {"step": 1, "state1": codes, "absmax1": absmax, "qmap1": QMAP}
    optimizer = lion.Lion([nn.Parameter(torch.zeros(size))])
    entries = {key: torch.from_numpy(value) if key != "step" else value for key, value in saved.items()}
    optimizer.load_state_dict({**optimizer.state_dict(), "state": {0: entries}})
    loaded = next(iter(optimizer.state.values()))
    assert_same_bits(loaded["state1"], reference.dequantize_blockwise(codes, absmax, QMAP, 2048))

"""States of flattened state dicts: torch gives them the keys that the loading optimizer has, {} for what is lacking."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lion
from tests.comparing import assert_same_bits
from tests.optimizers.support import Variant, assert_unchanged, every_variant, parameter, set_gradients, snapshot

BLOCKWISE = {"optim_bits": 8}
TENSORWISE = {"optim_bits": 8, "block_wise": False}


def trained(options: dict[str, Any]) -> lion.Lion:
    """Return an optimizer of two parameters, of which the first has taken two steps."""
    params = [parameter(5000, dtype=torch.bfloat16), parameter(5000, dtype=torch.bfloat16)]
    optimizer = lion.Lion(params, **options)
    for seed in range(2):
        set_gradients(params[:1], seed)
        optimizer.step()
    return optimizer


def flattened(saved: dict[str, Any], needed: dict[str, Any]) -> dict[str, Any]:
    """Return a state dict as ``set_optimizer_state_dict`` makes it of a flattened one for an optimizer with state."""
    states = {
        number: {key: saved["state"].get(number, {}).get(key, {}) for key in state}
        for number, state in needed["state"].items()
    }
    return {**saved, "state": states}


def with_state(options: dict[str, Any]) -> lion.Lion:
    """Return an optimizer of such parameters that has made their states by a step of zeros."""
    params = [parameter(5000, dtype=torch.bfloat16), parameter(5000, dtype=torch.bfloat16)]
    optimizer = lion.Lion(params, **options)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    return optimizer


def assert_go_on_alike(one: lion.Lion, other: lion.Lion) -> None:
    for seed in (5, 6):
        for optimizer in (one, other):
            set_gradients(optimizer.param_groups[0]["params"], seed)
            optimizer.step()
    for p, q in zip(*(optimizer.param_groups[0]["params"] for optimizer in (one, other)), strict=True):
        assert_same_bits(p, q)
        assert one.state[p].keys() == other.state[q].keys()
        for key, value in other.state[q].items():
            assert_same_bits(one.state[p][key], value, what=key)


@every_variant
def test_a_parameter_without_state_begins_anew(make: Variant) -> None:
    options = {"percentile_clipping": 50, "lr": 1e-2}
    params = [parameter(5000), parameter(5000)]
    optimizer = make(params, **options)
    set_gradients(params[:1], 0)
    optimizer.step()
    resumed = make([p.detach().clone().requires_grad_() for p in params], **options)
    for p in resumed.param_groups[0]["params"]:
        p.grad = torch.zeros_like(p)
    resumed.step()
    resumed.load_state_dict(flattened(optimizer.state_dict(), resumed.state_dict()))
    assert_go_on_alike(resumed, optimizer)


@pytest.mark.parametrize(
    ("saved", "needed"),
    [
        ({}, BLOCKWISE),
        ({}, TENSORWISE),
        (BLOCKWISE, {**BLOCKWISE, "percentile_clipping": 50}),
        ({**BLOCKWISE, "percentile_clipping": 50}, BLOCKWISE),
        ({}, {"master_weight_bits": 24}),
        ({"master_weight_bits": 32}, {"master_weight_bits": 24}),
        ({"master_weight_bits": 32}, {}),
    ],
)
def test_options_that_change_with_the_load(saved: dict[str, Any], needed: dict[str, Any]) -> None:
    optimizer, resumed, expected = trained(saved), with_state(needed), with_state(needed)
    expected.load_state_dict(optimizer.state_dict())
    resumed.load_state_dict(flattened(optimizer.state_dict(), resumed.state_dict()))
    assert_go_on_alike(resumed, expected)


@pytest.mark.parametrize(
    ("saved", "needed", "key"),
    [(BLOCKWISE, {}, "qmap1"), (BLOCKWISE, TENSORWISE, "absmax1"), (TENSORWISE, BLOCKWISE, "absmax1")],
)
def test_8_bits_that_have_lost_their_scale_are_refused(saved: dict[str, Any], needed: dict[str, Any], key: str) -> None:
    optimizer, resumed = trained(saved), with_state(needed)
    before = snapshot(resumed)
    with pytest.raises(ValueError, match=f"'{key}' is missing; a flattened state dict loses it where .* optim_bits"):
        resumed.load_state_dict(flattened(optimizer.state_dict(), resumed.state_dict()))
    assert_unchanged(resumed, before)

"""A program that holds a parameter's state sees what the optimizer makes of it, as with torch's optimizers."""

from __future__ import annotations

import pytest
import torch

from tests.optimizers.support import KINDS, every_kind, every_variant, parameter, set_gradients


@every_variant
@pytest.mark.parametrize("change", [{"optim_bits": 8}, {"optim_bits": 32}, {"percentile_clipping": 40}, {}])
def test_it_stays_the_same_object_when_options_change(make, change):
    p = parameter(5000)
    optimizer = make([p], lr=1e-3)
    held = optimizer.state[p]
    for seed in range(3):
        set_gradients([p], seed)
        optimizer.step()
        assert optimizer.state[p] is held and held["step"] == seed + 1
        optimizer.param_groups[0].update(change)


@pytest.mark.parametrize("key", ["state1", "absmax1"])
def test_what_a_program_writes_to_it_counts(key):
    p = parameter(5000)
    optimizer = KINDS["blockwise"]([p], lr=1e-3)
    held = optimizer.state[p]
    set_gradients([p], 0)
    optimizer.step()
    held[key] = torch.full_like(held[key], 3)
    set_gradients([p], 1)
    optimizer.step()
    assert held["step"] == 2 and optimizer.state[p] is held


def test_float_zeros_in_the_place_of_codes_are_told_by_their_dtype():
    p = parameter(5000)
    optimizer = KINDS["blockwise"]([p])
    set_gradients([p], 0)
    optimizer.step()
    optimizer.state[p]["state1"] = torch.zeros(5000)
    with pytest.raises(ValueError, match="'state1' is torch.float32; torch.uint8"):
        optimizer.step()


@every_kind
@pytest.mark.parametrize("found", [3, "state", [1], [], torch.ones(3)], ids=str)
def test_something_else_in_its_place_is_refused_and_nothing_changes(make, found):
    params = [parameter(300, seed=seed) for seed in range(2)]
    optimizer = make(params, min_8bit_size=0)
    set_gradients(params, 0)
    optimizer.step()
    before = [p.detach().clone() for p in params]
    optimizer.state.pop(params[0])
    optimizer.state[params[1]] = found
    with pytest.raises(ValueError, match=f"parameter 1 of group 0: a dict is needed, not {type(found).__name__}"):
        optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(params, before, strict=True))
    assert params[0] not in optimizer.state and optimizer.state[params[1]] is found


@every_kind
def test_none_in_its_place_begins_anew(make):
    p = parameter(300)
    optimizer = make([p], min_8bit_size=0)
    for seed in range(2):
        set_gradients([p], seed)
        optimizer.state[p] = None
        optimizer.step()
        assert optimizer.state[p]["step"] == 1

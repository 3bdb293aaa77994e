"""A program that holds a parameter's state sees what the optimizer makes of it, as with torch's optimizers."""

from __future__ import annotations

import pytest
import torch

from tests.optimizers.support import KINDS, every_variant, parameter, set_gradients


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

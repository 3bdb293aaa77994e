"""Lower parts of weights in checkpoints: saved, loaded, converted, refused; and resumed trainings."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch

import lion
from lion import exchange, reference
from lion._memory import paging
from lion._state import join, split
from lion._state.master import with_bits
from lion.reference.rounding import BFLOAT16
from tests.comparing import assert_same_bits, to_numpy
from tests.differential.every_weight import any_parts
from tests.distributed.processes import run
from tests.optimizers.support import KINDS, VARIANTS, assert_unchanged, every_kind, every_variant, snapshot
from tests.weights16.support import SEED, WAYS, bfloat16, both_masters, every_way, take

OPTIONS = {"lr": 1e-4, "weight_decay": 0.1}


def through_a_file(saved: Any) -> Any:
    file = io.BytesIO()
    torch.save(saved, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


def trained(make: Any, steps: int = 3, **options: Any) -> tuple[list[torch.nn.Parameter], lion.Lion]:
    params = [bfloat16(70, 65, seed=1), bfloat16(30, seed=2)]
    optimizer = make(params, **OPTIONS, **options)
    take(optimizer, params, range(steps))
    return params, optimizer


@pytest.mark.parametrize("bits", [24, 32])
def test_tensors_are_joined_and_split_as_the_reference_does_it(bits):
    high, low, _ = any_parts(bits)
    wide = reference.join(high.view(BFLOAT16), low)
    tensor = torch.from_numpy(high.view(np.int16)).view(torch.bfloat16)
    joined = join(tensor, torch.from_numpy(low))
    assert_same_bits(joined, wide)
    for actual, expected in zip(split(joined, bits), reference.split(wide, bits), strict=True):
        assert_same_bits(actual, expected)


@every_way
@every_variant
def test_resuming_goes_on_to_the_bit(make, way):
    params, optimizer = trained(make, **way)
    saved = through_a_file({"optimizer": optimizer.state_dict(), "weights": [p.detach() for p in params]})
    new = [bfloat16(70, 65, seed=3), bfloat16(30, seed=4)]
    resumed = make(new, lr=1.0, **way)
    resumed.load_state_dict(saved["optimizer"])
    with torch.no_grad():
        for p, value in zip(new, saved["weights"], strict=True):
            p.copy_(value)
    take(optimizer, params, range(3, 6))
    take(resumed, new, range(3, 6))
    for p, q in zip(params, new, strict=True):
        assert_same_bits(q, p)
        assert resumed.state[q].keys() == optimizer.state[p].keys()
        for key, value in optimizer.state[p].items():
            assert_same_bits(resumed.state[q][key], value, what=key)
            assert paging.is_paged(resumed.state[q][key]) == paging.is_paged(value)


def resumes(saved: dict[str, Any]) -> dict[str, Any]:
    results = {}
    for name, way in WAYS.items():
        params, optimizer = trained(VARIANTS["Lion8bit"], 0, **way)
        optimizer.load_state_dict(saved[name]["optimizer"])
        with torch.no_grad():
            for p, value in zip(params, saved[name]["weights"], strict=True):
                p.copy_(value)
        take(optimizer, params, range(3, 6))
        results[name] = [p.detach() for p in params]
    return results


def test_resuming_in_another_process(forking):
    saved, expected = {}, {}
    for name, way in WAYS.items():
        params, optimizer = trained(VARIANTS["Lion8bit"], **way)
        saved[name] = through_a_file({"optimizer": optimizer.state_dict(), "weights": [p.detach() for p in params]})
        take(optimizer, params, range(3, 6))
        expected[name] = params
    [results] = run(forking, 1, resumes, saved)
    for name, params in expected.items():
        for p, value in zip(params, results[name], strict=True):
            assert_same_bits(value, p, what=name)


def converted(low: np.ndarray, bits: int) -> np.ndarray:
    """Return lower parts for another number of bits, by real numbers."""
    if bits == 32:
        return low.astype(np.int16) * np.int16(256)
    return np.minimum(np.rint(low / 256), 127).astype(np.int8)  # ties to even, as rint


def test_every_lower_part_is_converted():
    for bits, kind in ((24, np.int16), (32, np.int8)):
        low = np.arange(np.iinfo(kind).min, np.iinfo(kind).max + 1).astype(kind)
        assert_same_bits(with_bits(torch.from_numpy(low), bits), converted(low, bits))


@pytest.mark.parametrize("by_loading", [True, False], ids=["loaded", "changed"])
@pytest.mark.parametrize("paged", [(False, True), (True, False)], ids=str)
@pytest.mark.parametrize("target", [None, 24, 32])
@pytest.mark.parametrize("source", [None, 24, 32])
@every_kind
def test_the_number_of_bits_changes(make, source, target, paged, by_loading, monkeypatch):
    monkeypatch.setattr("lion._state.layout.MIN_PAGED_SIZE", 100)
    params, optimizer = trained(make, master_weight_bits=source, is_paged=paged[0])
    before = {p: dict(optimizer.state[p]) for p in params}
    weights = [p.detach().clone() for p in params]
    if by_loading:
        new = make(params, lr=1.0, master_weight_bits=target, is_paged=paged[1])
        new.load_state_dict(through_a_file(optimizer.state_dict()))
        assert new.param_groups[0]["master_weight_bits"] == target
    else:
        new = optimizer
        new.param_groups[0].update(master_weight_bits=target, is_paged=paged[1], lr=0.0, weight_decay=0.0)
        for p in params:
            p.grad = torch.zeros_like(p.grad)
        new.step()
    for p, value in zip(params, weights, strict=True):
        state, old = new.state[p], before[p].get("master_low")
        assert_same_bits(p, value)
        assert ("master_low" in state) == (target is not None)
        if target is not None:
            low = state["master_low"]
            assert low.dtype == {24: torch.int8, 32: torch.int16}[target]
            if old is None:
                assert_same_bits(low, torch.zeros(p.shape, dtype=low.dtype))
            else:
                assert_same_bits(low, old if source == target else converted(to_numpy(old), target))
            assert paging.is_paged(low) == (paged[1] and p.numel() >= 100)


def test_options_stay_on_load():
    params, optimizer = trained(VARIANTS["Lion"], **WAYS["stochastic"])
    new = lion.Lion(params, master_weight_bits=24, rounding_seed=3)
    new.load_state_dict(optimizer.state_dict())
    group = new.param_groups[0]
    assert (group["master_weight_bits"], group["stochastic_rounding"], group["rounding_seed"]) == (24, False, 3)
    assert through_a_file(optimizer.state_dict())["param_groups"][0]["rounding_seed"] == SEED


def test_float32_parameters_drop_the_lower_part_of_a_checkpoint():
    params, optimizer = trained(VARIANTS["Lion"], master_weight_bits=24)
    wide = [torch.nn.Parameter(p.detach().float()) for p in params]
    new = lion.Lion(wide, master_weight_bits=24)
    new.load_state_dict(optimizer.state_dict())
    assert all("master_low" not in new.state[p] for p in wide)


@every_variant
def test_checkpoints_without_lower_parts_load(make):
    """Such are bitsandbytes', and those of groups that did not know the options."""
    params, optimizer = trained(make)
    saved = exchange.to_bitsandbytes(optimizer.state_dict())
    for group in saved["param_groups"]:
        for key in ("master_weight_bits", "stochastic_rounding", "rounding_seed"):
            del group[key]
    for way in WAYS.values():
        new = [torch.nn.Parameter(p.detach().clone()) for p in params]
        loaded = make(new, **way)
        loaded.load_state_dict(saved)
        for p, q in zip(params, new, strict=True):
            assert_same_bits(loaded.state[q]["step"], optimizer.state[p]["step"])
            if way.get("master_weight_bits"):
                assert not loaded.state[q]["master_low"].any()
            q.grad_dtype = torch.float32
        take(loaded, new, [3])


@pytest.mark.parametrize(
    "low",
    [
        torch.zeros(70, 65),
        torch.zeros(70, 65, dtype=torch.int32),
        torch.zeros(65, 70, dtype=torch.int8),
        torch.zeros(70, 65, dtype=torch.int8, device="meta"),
        "zeros",
        None,
    ],
    ids=["float32", "int32", "shape", "meta", "text", "none"],
)
def test_lower_parts_that_do_not_fit_are_refused(low):
    params, optimizer = trained(VARIANTS["Lion"], master_weight_bits=24)
    saved = optimizer.state_dict()
    before = snapshot(optimizer)
    saved["state"][0] = {**saved["state"][0], "master_low": low}
    with pytest.raises(ValueError, match="parameter 0 of group 0: 'master_low'"):
        optimizer.load_state_dict(saved)
    assert_unchanged(optimizer, before)
    optimizer.state[params[0]]["master_low"] = low
    with pytest.raises(ValueError, match="parameter 0 of group 0: 'master_low'"):
        optimizer.step()


@both_masters
@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_exported_with_exp_avg(make, way):
    params, optimizer = trained(make, **way)
    exported = exchange.to_exp_avg(optimizer.state_dict(), keep=["step", "master_low"])
    assert "master_low" not in exchange.to_exp_avg(optimizer.state_dict())["state"][0]
    new = make(params, **way)
    new.load_state_dict(exchange.from_exp_avg(exported))
    for p in params:
        assert_same_bits(new.state[p]["master_low"], optimizer.state[p]["master_low"])
        assert new.state[p]["master_low"].data_ptr() != optimizer.state[p]["master_low"].data_ptr()
    saved = exchange.to_bitsandbytes(optimizer.state_dict())
    assert all("master_low" not in state for state in saved["state"].values())

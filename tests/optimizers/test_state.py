"""State: its layout, state_dict, load_state_dict, pickle, deepcopy, files, other processes."""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import lion
from lion import reference
from tests.comparing import assert_same_bits
from tests.optimizers import resume
from tests.optimizers.support import (
    KINDS,
    QMAP,
    VARIANTS,
    assert_unchanged,
    every_dtype,
    every_kind,
    every_variant,
    parameter,
    set_gradients,
    snapshot,
)

ROOT = Path(__file__).parents[2]
MIXED = {"lr": 1e-3, "weight_decay": 0.1, "percentile_clipping": 50}


def mixed_parameters(seed=0):
    dtypes = (torch.float32, torch.bfloat16)
    return [parameter(*shape, dtype=dtype, seed=seed) for dtype in dtypes for shape in ((65, 64), (7,))]


def trained(make, steps=3, **kwargs):
    params = mixed_parameters()
    optimizer = make(params, **{**MIXED, **kwargs})
    resume.train(params, optimizer, range(steps))
    return params, optimizer


def assert_same_optimizers(params, optimizer, other_params, other):
    assert len(optimizer.state) == len(other.state)
    for p, q in zip(params, other_params, strict=True):
        assert_same_bits(p, q)
        a, b = optimizer.state[p], other.state[q]
        assert a.keys() == b.keys()
        for key in a:
            assert_same_bits(a[key], b[key], what=key)


def assert_state_fits(p, state):
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    assert state["step"].shape == () and state["step"].dtype == torch.float32
    assert state["state1"].shape == p.shape
    assert all(value.device == p.device for value in state.values())
    assert all(value.is_contiguous() for key, value in state.items() if key != "state1")
    # Float32 momentum without clipping lies in memory as the parameter does, all other in the order of its elements.
    ordered = p if state["state1"].dtype == torch.float32 and "gnorm_vec" not in state else torch.empty(p.shape)
    assert state["state1"].stride() == ordered.stride()


# --- layout


@every_variant
@every_dtype
def test_keys_shapes_and_dtypes(make, dtype):
    large, small = parameter(65, 64, dtype=dtype), parameter(7, dtype=dtype)
    optimizer = make([large, small])
    set_gradients([large, small], 0)
    optimizer.step()
    state = optimizer.state[large]
    assert_state_fits(large, state)
    if make.bits == 32:
        assert state.keys() == {"step", "state1"} and state["state1"].dtype == torch.float32
    else:
        assert state["state1"].dtype == torch.uint8
        assert_same_bits(state["qmap1"], QMAP)
        if make.kwargs.get("block_wise", True):
            assert state.keys() == {"step", "state1", "qmap1", "absmax1"}
            assert state["absmax1"].shape == (17,) and state["absmax1"].dtype == torch.float32
        else:
            assert state.keys() == {"step", "state1", "qmap1", "max1", "new_max1"}
            assert state["max1"].shape == state["new_max1"].shape == (1,)
            assert state["max1"].dtype == state["new_max1"].dtype == torch.float32
    assert optimizer.state[small].keys() == {"step", "state1"}
    assert optimizer.state[small]["state1"].dtype == torch.float32


@every_variant
def test_history_is_there_when_clipping(make):
    p = parameter(65, 64)
    optimizer = make([p], percentile_clipping=5)
    set_gradients([p], 0)
    optimizer.step()
    history = optimizer.state[p]["gnorm_vec"]
    assert_same_bits(history, np.full(100, reference.squared_norm(p.grad.numpy())))


def test_every_state_has_a_map_of_its_own():
    params = [parameter(5000, seed=i) for i in range(3)]
    optimizer = lion.Lion8bit(params)
    set_gradients(params, 0)
    optimizer.step()
    assert len({optimizer.state[p]["qmap1"].data_ptr() for p in params}) == 3


@every_kind
def test_a_fresh_state_reads_as_zeros(make):
    """Made by a step that moves nothing: no gradient, no learning rate."""
    p = parameter(65, 64)
    optimizer = make([p], lr=0.0, percentile_clipping=50)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    state = optimizer.state[p]
    if make.bits == 8:
        assert (state["state1"] == 127).all()
        assert not state.get("absmax1", state.get("max1")).any()
    else:
        assert not state["state1"].any()
    assert not state["gnorm_vec"].any(), "zero gradients must leave no trace in the history"


@every_kind
def test_state_of_a_transposed_parameter_has_its_shape(make):
    p = nn.Parameter(parameter(65, 70).detach().t())
    optimizer = make([p])
    p.grad = torch.ones(70, 65)
    optimizer.step()
    assert_state_fits(p, optimizer.state[p])


# --- state_dict and load_state_dict


@every_variant
def test_round_trip(make):
    params, optimizer = trained(make)
    saved = optimizer.state_dict()
    others = [nn.Parameter(p.detach().clone()) for p in params]
    other = make(others, lr=0.5, percentile_clipping=50)
    other.load_state_dict(saved)
    assert_same_optimizers(params, optimizer, others, other)
    for key in ("lr", "betas", "weight_decay"):
        assert other.param_groups[0][key] == optimizer.param_groups[0][key]
    resume.train(params, optimizer, range(5, 8))
    resume.train(others, other, range(5, 8))
    assert_same_optimizers(params, optimizer, others, other)


@every_variant
def test_loaded_state_is_a_copy(make):
    params, optimizer = trained(make)
    saved = optimizer.state_dict()
    untouched = copy.deepcopy(saved)
    others = [nn.Parameter(p.detach().clone()) for p in params]
    other = make(others, **MIXED)
    other.load_state_dict(saved)
    resume.train(others, other, range(3))
    for i, state in untouched["state"].items():
        for key, value in state.items():
            assert_same_bits(saved["state"][i][key], value, what=key)
    assert saved["param_groups"] == untouched["param_groups"]
    assert other.param_groups[0]["params"][0] is others[0]


@every_kind
def test_state_dict_layout(make):
    params, optimizer = trained(make)
    saved = optimizer.state_dict()
    assert saved.keys() == {"state", "param_groups"}
    assert list(saved["state"]) == [0, 1, 2, 3]
    assert saved["param_groups"][0]["params"] == [0, 1, 2, 3]
    for i, p in enumerate(params):
        assert saved["state"][i].keys() == optimizer.state[p].keys()


@every_kind
def test_state_dict_is_deterministic(make):
    first, second = trained(make)[1].state_dict(), trained(make)[1].state_dict()
    assert first["param_groups"] == second["param_groups"]
    for i in first["state"]:
        for key in first["state"][i]:
            assert_same_bits(first["state"][i][key], second["state"][i][key], what=key)


@every_kind
def test_loading_before_the_first_step_and_after(make):
    params, optimizer = trained(make)
    empty = make(mixed_parameters()).state_dict()
    optimizer.load_state_dict(empty)
    assert not optimizer.state
    saved = trained(make)[1].state_dict()
    optimizer.load_state_dict(saved)
    assert len(optimizer.state) == 4
    resume.train(params, optimizer, range(2))


@every_kind
def test_loading_into_an_optimizer_that_has_stepped(make):
    """Addresses that the optimizer remembers belong to the old state."""
    params, optimizer = trained(make, 4)
    saved = copy.deepcopy(optimizer.state_dict())
    values = [p.detach().clone() for p in params]
    resume.train(params, optimizer, range(4, 8))
    expected = [p.detach().clone() for p in params]
    with torch.no_grad():
        for p, value in zip(params, values, strict=True):
            p.copy_(value)
    optimizer.load_state_dict(saved)
    resume.train(params, optimizer, range(4, 8))
    for p, value in zip(params, expected, strict=True):
        assert_same_bits(p, value)


@every_kind
def test_partial_state(make):
    params = mixed_parameters()
    optimizer = make(params, **MIXED)
    resume.train(params[:2], optimizer, range(3))
    others = [nn.Parameter(p.detach().clone()) for p in params]
    other = make(others, **MIXED)
    other.load_state_dict(optimizer.state_dict())
    assert set(other.state) == set(others[:2])
    resume.train(params, optimizer, range(3, 5))
    resume.train(others, other, range(3, 5))
    assert_same_optimizers(params, optimizer, others, other)


@every_kind
def test_parameters_of_another_dtype(make):
    """A checkpoint of a float32 model for its bfloat16 copy: codes stay codes, float32 stays float32."""
    params, optimizer = trained(make)
    others = [nn.Parameter(p.detach().bfloat16()) for p in params]
    other = make(others, **MIXED)
    other.load_state_dict(optimizer.state_dict())
    for p, q in zip(params, others, strict=True):
        for key, value in optimizer.state[p].items():
            assert_same_bits(other.state[q][key], value, what=key)


@every_kind
def test_step_as_a_number(make):
    """Old checkpoints hold a Python number."""
    params, optimizer = trained(make)
    saved = optimizer.state_dict()
    saved["state"] = {i: {**state, "step": (int, float)[i % 2](state["step"])} for i, state in saved["state"].items()}
    others = [nn.Parameter(p.detach().clone()) for p in params]
    other = make(others, **MIXED)
    other.load_state_dict(saved)
    assert_same_optimizers(params, optimizer, others, other)


def test_the_classes_read_each_other():
    """Paged or not makes no difference in the numbers; 8-bit momentum widens without loss."""
    for source, target in (("Lion8bit", "PagedLion8bit"), ("PagedLion8bit", "Lion-8"), ("PagedLion", "Lion32bit")):
        params, optimizer = trained(VARIANTS[source])
        others = [nn.Parameter(p.detach().clone()) for p in params]
        other = VARIANTS[target](others, **MIXED)
        other.load_state_dict(optimizer.state_dict())
        assert_same_optimizers(params, optimizer, others, other)
        resume.train(params, optimizer, range(3, 6))
        resume.train(others, other, range(3, 6))
        assert_same_optimizers(params, optimizer, others, other)
    params, optimizer = trained(VARIANTS["Lion8bit"])
    other = VARIANTS["Lion32bit"](params, **MIXED)
    other.load_state_dict(optimizer.state_dict())
    narrow = optimizer.state[params[0]]
    momentum = lion.functional.dequantize_blockwise(narrow["state1"], absmax=narrow["absmax1"], blocksize=256)
    assert_same_bits(other.state[params[0]]["state1"], momentum)


@every_kind
def test_a_state_dict_that_does_not_fit_changes_nothing(make):
    params, optimizer = trained(make)
    optimizer.add_param_group({"params": [parameter(5000, seed=9)], "lr": 0.25})
    good = trained(make, 5)[1]
    good.add_param_group({"params": [parameter(5000, seed=9)], "lr": 0.5})
    fine = good.state_dict()

    def changed(**edits):
        state = copy.deepcopy(fine)
        for path, value in edits.items():
            keys = path.split("__")
            inner = state["state"][0] if len(keys) == 1 else state
            inner[keys[-1]] = value
        return state

    def group_changed(index, **edits):
        state = copy.deepcopy(fine)
        state["param_groups"][index].update(edits)
        return state

    cases = {
        "fewer groups": {**fine, "param_groups": fine["param_groups"][:1]},
        "fewer parameters": group_changed(0, params=[0, 1, 2]),
        "more parameters": group_changed(1, params=[4, 5]),
        "no groups": {"state": fine["state"]},
        "no state": {"param_groups": fine["param_groups"]},
        "shape": changed(state1=torch.zeros(3)),
        "size of the step": changed(step=torch.zeros(3)),
        "no momentum": changed(state1=None),
        "history": changed(gnorm_vec=torch.zeros(7)),
        "invalid lr in the last group": group_changed(1, lr=-1.0),
        "invalid betas": group_changed(0, betas=(0.9, 1.5)),
        "unknown key": changed(state2=torch.zeros(65, 64)),
    }
    if make.bits == 8:
        cases["absmax"] = changed(**{"absmax1" if make is KINDS["blockwise"] else "max1": torch.zeros(5)})
        cases["map"] = changed(qmap1=torch.zeros(256, dtype=torch.int64))
        cases["descending map"] = changed(qmap1=torch.from_numpy(QMAP[::-1].copy()))

    def options():
        return [{key: value for key, value in g.items() if key != "params"} for g in optimizer.param_groups]

    before, groups = snapshot(optimizer), copy.deepcopy(options())
    for name, bad in cases.items():
        with pytest.raises((ValueError, TypeError, KeyError)):
            optimizer.load_state_dict(bad)
            pytest.fail(f"loaded: {name}")
        assert_unchanged(optimizer, before)
        assert options() == groups, name
    optimizer.load_state_dict(fine)
    assert optimizer.param_groups[1]["lr"] == 0.5


def test_checkpoints_in_the_layout_of_bitsandbytes():
    """Its Lion8bit nests the quantization tensors, counts steps in a Python int and keeps no options in the groups."""
    params, optimizer = trained(VARIANTS["Lion8bit"], percentile_clipping=100)
    saved = optimizer.state_dict()
    state = {}
    for i, values in saved["state"].items():
        values = dict(values)
        nested = {key: values.pop(key) for key in ("qmap1", "absmax1") if key in values}
        values["step"] = int(values["step"])
        state[i] = {**values, "__bnb_optimizer_quant_state__": nested} if nested else values
    keys = ("lr", "betas", "weight_decay", "params")
    group = {"eps": 0.0, "alpha": 0.0, "t_alpha": None, "t_beta3": None}
    groups = [{**{key: g[key] for key in keys}, **group} for g in saved["param_groups"]]
    others = [nn.Parameter(p.detach().clone()) for p in params]
    other = lion.Lion8bit(others, lr=1.0)
    other.load_state_dict({"state": state, "param_groups": groups})
    assert_same_optimizers(params, optimizer, others, other)
    resume.train(params, optimizer, range(3, 5))
    resume.train(others, other, range(3, 5))
    assert_same_optimizers(params, optimizer, others, other)


# --- copies


@every_variant
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
def test_deepcopy_and_pickle(make, copied):
    params, optimizer = trained(make)
    other = copied(optimizer)
    assert type(other) is type(optimizer)
    others = other.param_groups[0]["params"]
    assert not {p.data_ptr() for p in params} & {p.data_ptr() for p in others}
    assert_same_optimizers(params, optimizer, others, other)
    assert optimizer.defaults.items() <= other.defaults.items()
    resume.train(params, optimizer, range(3, 6))
    resume.train(others, other, range(3, 6))
    assert_same_optimizers(params, optimizer, others, other)
    other.add_param_group({"params": [parameter(3)]})
    assert len(optimizer.param_groups) == 1


@every_variant
def test_copies_of_an_optimizer_that_has_not_stepped(make):
    params = mixed_parameters()
    optimizer = make(params, **MIXED)
    other = pickle.loads(pickle.dumps(copy.deepcopy(optimizer)))
    others = other.param_groups[0]["params"]
    resume.train(params, optimizer, range(3))
    resume.train(others, other, range(3))
    assert_same_optimizers(params, optimizer, others, other)


@every_variant
def test_files_with_weights_only(make):
    params, optimizer = trained(make)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    others = [nn.Parameter(p.detach().clone()) for p in params]
    other = make(others, **MIXED)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert_same_optimizers(params, optimizer, others, other)
    file.seek(0)
    mapped = make(others, **MIXED)
    mapped.load_state_dict(torch.load(file, weights_only=True, map_location="cpu"))
    assert_same_optimizers(params, optimizer, others, mapped)


@every_kind
def test_files_mapped_into_memory(make, tmp_path):
    """A file read lazily may be read-only memory: loading copies."""
    params, optimizer = trained(make)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    others = [nn.Parameter(p.detach().clone()) for p in params]
    other = make(others, **MIXED)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True, mmap=True))
    (tmp_path / "state.pt").unlink()
    resume.train(params, optimizer, range(3, 5))
    resume.train(others, other, range(3, 5))
    assert_same_optimizers(params, optimizer, others, other)


@every_variant
def test_whole_optimizer_in_a_file(make, tmp_path):
    params, optimizer = trained(make)
    torch.save(optimizer, tmp_path / "optimizer.pt")
    other = torch.load(tmp_path / "optimizer.pt", weights_only=False)
    assert_same_optimizers(params, optimizer, other.param_groups[0]["params"], other)


# --- another process


@pytest.fixture(scope="module")
def straight():
    """Parameters and optimizers of every variant after forty steps, and what they saved after twenty."""
    results = {}
    for name, make in VARIANTS.items():
        params = resume.make_parameters()
        optimizer = make(params, **resume.OPTIONS)
        resume.train(params, optimizer, range(20))
        saved = copy.deepcopy({"params": [p.detach() for p in params], "optimizer": optimizer.state_dict()})
        resume.train(params, optimizer, range(20, 40))
        results[name] = params, optimizer.state_dict(), saved
    return results


@pytest.fixture(scope="module", params=["cpu", "reference"])
def resumed(request, straight, tmp_path_factory):
    """Folder where another process, with a backend of its own, has put what it made of the saved files."""
    folder = tmp_path_factory.mktemp(request.param)
    for name, (_, _, saved) in straight.items():
        torch.save(saved, folder / f"{name}.pt")
    subprocess.run(
        [sys.executable, "-m", "tests.optimizers.resume", str(folder)],
        cwd=ROOT,
        env={**os.environ, "LION_BACKEND": request.param},
        check=True,
        timeout=300,
    )
    return folder


@pytest.mark.parametrize("name", VARIANTS)
def test_twenty_steps_saved_loaded_in_a_new_process_and_twenty_more_are_forty(name, straight, resumed):
    params, expected, _ = straight[name]
    actual = torch.load(resumed / f"{name}-resumed.pt", weights_only=True)
    for i, p in enumerate(params):
        assert_same_bits(actual["params"][i], p, what=f"parameter {i}")
    assert actual["optimizer"]["param_groups"] == expected["param_groups"]
    assert actual["optimizer"]["state"].keys() == expected["state"].keys()
    for i, state in expected["state"].items():
        assert state.keys() == actual["optimizer"]["state"][i].keys()
        assert state["step"] == 40
        for key, value in state.items():
            assert_same_bits(actual["optimizer"]["state"][i][key], value, what=f"{key} of parameter {i}")

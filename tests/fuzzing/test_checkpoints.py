"""A damaged state dict loads and trains as the reference does from what it holds, or it raises and changes nothing."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lion
from lion._memory import paging
from lion._state.layout import OWN_KEYS
from tests.checkpoints.test_mutations import assert_unchanged, remembered
from tests.comparing import assert_same_bits, to_numpy
from tests.fuzzing.values import Subclass, anything
from tests.optimizers.support import ByHand, set_gradients
from tests.strategies import make_floats, options, seeds

KINDS: dict[str, dict[str, Any]] = {
    "32bit": {"optim_bits": 32, "percentile_clipping": 40},
    "blockwise": {"optim_bits": 8, "percentile_clipping": 40},
    "tensorwise": {"optim_bits": 8, "block_wise": False},
}


def made(kind: str, seed: int = 0, **kwargs: Any) -> lion.Lion:
    """Return an optimizer of two groups that has taken two steps; one of its parameters is a matrix."""
    rng = np.random.default_rng(seed)
    params = [nn.Parameter(torch.from_numpy(rng.normal(size=shape)).float()) for shape in ((700,), (30, 20))]
    groups = [{"params": [(name, p)]} for name, p in zip("ab", params, strict=True)]
    optimizer = lion.Lion(groups, **{"lr": 1e-2, "min_8bit_size": 0, **KINDS[kind], **kwargs})
    for step in range(2):
        set_gradients(params, 10 * seed + step)
        optimizer.step()
    return optimizer


# Changes of a tensor that change no value, and those that do.
SAME: dict[str, Callable[[torch.Tensor], Any]] = {
    "strided": lambda t: torch.stack([t, t], -1)[..., 0],
    "transposed": lambda t: t.t().contiguous().t() if t.dim() == 2 else t,
    "offset": lambda t: torch.cat([t.reshape(-1)[:1], t.reshape(-1)])[1:].view(t.shape),
    "parameter": lambda t: nn.Parameter(t, requires_grad=t.is_floating_point()),
    "not a leaf": lambda t: t.requires_grad_() * 1 if t.is_floating_point() else t,
    "subclass": lambda t: t.as_subclass(Subclass),
    "negative view": lambda t: torch._neg_view(-t),
}
OTHER: dict[str, Callable[[torch.Tensor], Any]] = {
    "expanded": lambda t: t.reshape(-1)[:1].expand(max(t.numel(), 2)),
    "double": lambda t: t.double(),
    "half": lambda t: t.half(),
    "complex": lambda t: t.to(torch.complex64),
    "conjugate": lambda t: t.to(torch.complex64).conj(),
    "bits": lambda t: t.reshape(-1).view(torch.int8),
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "csr": lambda t: t.reshape(1, -1).float().to_sparse_csr(),
    "short": lambda t: t.reshape(-1)[:-1],
    "long": lambda t: torch.cat([t.reshape(-1), t.reshape(-1)]),
    "flat": lambda t: t.reshape(-1),
    "matrix": lambda t: t.reshape(1, -1),
    "empty": lambda t: t.reshape(-1)[:0],
    "scalar": lambda t: t.reshape(-1)[0],
    "array": lambda t: t.numpy(),
    "list": lambda t: t.tolist(),
    "nested": lambda t: {"state": t},
    "huge": lambda t: torch.full_like(t, 200 if t.dtype == torch.uint8 else 3e38),
    "not finite": lambda t: torch.full_like(t, 0 if t.dtype == torch.uint8 else float("nan")),
    "negative": lambda t: -t,
}


def beyond_its_memory(tensor: torch.Tensor) -> torch.Tensor:
    tensor.untyped_storage().resize_(tensor.nbytes // 2)
    return tensor


def random_bits(tensor: torch.Tensor, seed: int) -> torch.Tensor:
    """Return other values of the same dtype and shape, any bits; no -0.0, whose place in a sorted history is open."""
    if tensor.dtype == torch.uint8:
        return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, tuple(tensor.shape), np.uint8))
    values = make_floats("mixed", "float32", tensor.numel(), seed).reshape(tuple(tensor.shape))
    return torch.from_numpy(np.where(values == 0, np.float32(0), values))


def is_pristine(tensor: torch.Tensor) -> bool:
    dense = tensor.layout == torch.strided and tensor.is_contiguous() and not tensor.is_meta
    return dense and tensor.dtype in (torch.float32, torch.uint8) and tensor.numel() > 0 and tensor.is_leaf


def mutate(data: st.DataObject, saved: dict[str, Any]) -> bool:
    """Change a state dict somewhere; return whether it says the same as before."""
    if not isinstance(saved.get("state"), dict) or not isinstance(saved.get("param_groups"), list):
        return False
    state = saved["state"].get(data.draw(st.sampled_from([0, 1])))
    group = saved["param_groups"][data.draw(st.sampled_from([0, -1]))] if saved["param_groups"] else {}
    way = data.draw(
        st.sampled_from(["same", "same", "other", "other", "bits", "put", "remove", "group", "top", "graph"])
    )
    if not isinstance(state, dict) or not isinstance(group, dict):
        return False
    # What was changed before is left alone: not every change can be made to every tensor.
    tensors = [key for key, value in state.items() if type(value) is torch.Tensor and is_pristine(value)]
    if way in ("same", "other", "bits") and tensors:
        key = data.draw(st.sampled_from(tensors))
        if way == "same":
            state[key] = SAME[data.draw(st.sampled_from(list(SAME)))](state[key].clone())
            return True
        if way == "bits":
            state[key] = random_bits(state[key], data.draw(seeds()))
        elif data.draw(st.integers(0, 20)) == 20:
            state[key] = beyond_its_memory(state[key].clone())
        else:
            state[key] = OTHER[data.draw(st.sampled_from(list(OTHER)))](state[key].clone())
    elif way == "put":
        state[data.draw(st.sampled_from([*state, "exp_avg", "absmax1", "max1", "gnorm_vec"]) | st.text())] = data.draw(
            anything()
        )
    elif way == "remove":
        container = data.draw(st.sampled_from([state, group, saved]))
        if container:
            del container[data.draw(st.sampled_from(list(container)))]
    elif way == "group":
        group[data.draw(st.sampled_from([*group, "maximize", "note"]) | st.integers())] = data.draw(anything())
    elif way == "top":
        saved[data.draw(st.sampled_from(["state", "param_groups"]) | st.text())] = data.draw(anything())
    else:
        graph: dict[str, Callable[[], Any]] = {
            "cycle in a state": lambda: state.update(note=state),
            "state as its own momentum": lambda: state.update(state1=state),
            "state nested in itself": lambda: state.update(__bnb_optimizer_quant_state__=state),
            "cycle in a group": lambda: group.update(note=group),
            "everything in a group": lambda: group.update(note=saved),
            "swapped": lambda: saved["state"].update({0: saved["state"].get(1), 1: state}),
            "shared": lambda: saved["state"].update({0: state, 1: state}),
            "other ids": lambda: group.update(params=["x"]),
            "ids that are not equal to themselves": lambda: group.update(params=[float("nan")]),
            "groups shared": lambda: saved.update(param_groups=[group, group]),
        }
        graph[data.draw(st.sampled_from(list(graph)))]()
    return False


def by_hand(p: torch.Tensor, state: dict[str, torch.Tensor]) -> ByHand:
    """Return the copy of a parameter for the state that it has."""
    kind = (32, True) if state["state1"].dtype == torch.float32 else (8, "absmax1" in state)
    copy = ByHand(p, *kind, min_8bit_size=0)
    momentum = to_numpy(state["state1"]).copy()
    if copy.kind == "32bit":
        copy.momentum = momentum
    else:
        copy.codes, copy.absmax = momentum, to_numpy(state.get("absmax1", state.get("max1"))).copy()
    # It counts in float32.
    copy.steps = int(to_numpy(state["step"]) + np.float32(1)) - 1
    if "gnorm_vec" in state:
        copy.history = to_numpy(state["gnorm_vec"]).copy()
    return copy


def step_like_the_reference(optimizer: lion.Lion, seed: int) -> None:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    set_gradients(params, seed)
    copies = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state.get(p)
            bits = (group["optim_bits"], group["block_wise"], group["percentile_clipping"], group["min_8bit_size"])
            copies[p] = by_hand(p, state) if "state1" in (state or ()) else ByHand(p, *bits)
            copies[p].percentile = group["percentile_clipping"]
            copies[p].step(p.grad, float(group["lr"]), group["betas"], group["weight_decay"])
    optimizer.step()
    with np.errstate(all="ignore"):
        for p, copy in copies.items():
            # What else is in a state is a program's, and kept.
            for key in optimizer.state[p].keys() - set(OWN_KEYS):
                del optimizer.state[p][key]
            copy.check(p, optimizer)


@given(st.data(), st.sampled_from(list(KINDS)), st.sampled_from(list(KINDS)), options(), st.integers(1, 3))
def test_damaged_state_dicts(data: st.DataObject, kind: str, target: str, kwargs: dict[str, Any], count: int) -> None:
    source = made(kind, seed=1)
    good = deepcopy(source.state_dict())
    saved = deepcopy(good)
    same = all([mutate(data, saved) for _ in range(count)])
    optimizer = made(target, **kwargs)
    before = remembered(optimizer)
    try:
        optimizer.load_state_dict(saved)
    except (ValueError, TypeError) as error:
        assert not same
        assert "Invalid" in str(error), repr(error)
        assert_unchanged(optimizer, before)
    else:
        if same:
            other = made(target, **kwargs)
            other.load_state_dict(good)
            for state, expected in zip(optimizer.state.values(), other.state.values(), strict=True):
                assert state.keys() == expected.keys()
                for key in state:
                    assert_same_bits(state[key], expected[key], what=key)
    with np.errstate(all="ignore"):
        step_like_the_reference(optimizer, 5)


def test_names_that_are_no_text() -> None:
    optimizer = made("blockwise")
    saved = deepcopy(optimizer.state_dict())
    saved["param_groups"][1]["param_names"] = [10**5000]
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[1]["param_names"] == ["b"]
    step_like_the_reference(optimizer, 5)


# --- files


class Malicious:
    """Runs a call when it is unpickled."""

    def __init__(self, call: Callable[..., Any], *args: Any) -> None:
        self.call = call, args

    def __reduce__(self) -> Any:
        return self.call


CALLS: dict[str, tuple[Any, ...]] = {
    "command": (os.system, "touch {}"),
    "eval": (eval, "open('{}', 'w')"),
    "exec": (exec, "open('{}', 'w')"),
    "open": (open, "{}", "w"),
    "path": (Path, "{}"),
    "pickle": (pickle.loads, pickle.dumps(Malicious(open, "{}", "w"))),
    "numpy": (np.save, "{}", 1),
    "torch": (torch.save, 1, "{}"),
    "load": (torch.load, "{}"),
    "file": (torch.from_file, "{}", True, 10),
    "optimizer": (lion.Lion, [torch.zeros(1)]),
    "paging": (paging.empty, (10,), torch.float32, torch.device("cpu")),
    "kernel": (lion.functional.quantize_blockwise, torch.zeros(10)),
}
PLACES = [
    ("state", 0, "state1"),
    ("state", 0, "step"),
    ("state", 0, "note"),
    ("param_groups", 0, "lr"),
    ("param_groups", 0, "note"),
    ("note",),
]


@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_a_hostile_file_executes_nothing(name: str, place: tuple[Any, ...], tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    call, *args = CALLS[name]
    if name == "pickle":
        args = [pickle.dumps(Malicious(open, str(witness), "w"))]
    args = [arg.format(witness) if isinstance(arg, str) and "{" in arg else arg for arg in args]
    saved = deepcopy(made("blockwise").state_dict())
    inner: Any = saved
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = Malicious(call, *args)
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        torch.load(file, weights_only=True)
    assert not witness.exists()


@pytest.mark.parametrize("key", ["state1", "absmax1", "qmap1", "gnorm_vec"])
@pytest.mark.parametrize(
    ("offset", "shape", "stride"),
    [(0, (10**6,), (1,)), (10**9, (600,), (1,)), (0, (600,), (10**6,)), (-5, (600,), (1,)), (0, (2**62, 4), (4, 1))],
)
def test_a_file_whose_tensor_leaves_its_storage(key: str, offset: int, shape: Any, stride: Any) -> None:
    """torch refuses to make such a tensor, so nothing can read or write there."""
    saved = deepcopy(made("blockwise").state_dict())
    storage = saved["state"][0][key]._typed_storage()
    saved["state"][0][key] = Malicious(torch._utils._rebuild_tensor_v2, storage, offset, shape, stride, False, {})
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    with pytest.raises(RuntimeError):
        torch.load(file, weights_only=True)


@pytest.mark.parametrize("key", ["state1", "absmax1", "gnorm_vec"])
def test_a_file_whose_tensor_repeats_a_number(key: str) -> None:
    """A storage of one number and strides of 0 are allowed: loading gives every element memory of its own."""
    saved = deepcopy(made("blockwise").state_dict())
    tensor = saved["state"][0][key]
    one = tensor.reshape(-1)[:1].clone()
    shape = tuple(tensor.shape)
    saved["state"][0][key] = Malicious(
        torch._utils._rebuild_tensor_v2, one._typed_storage(), 0, shape, (0,) * len(shape), False, {}
    )
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    optimizer = made("blockwise")
    optimizer.load_state_dict(torch.load(file, weights_only=True))
    p = optimizer.param_groups[0]["params"][0]
    assert_same_bits(optimizer.state[p][key], one.expand(shape).contiguous())
    step_like_the_reference(optimizer, 5)

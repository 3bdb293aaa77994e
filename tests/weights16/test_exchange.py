"""Float32 weights out of, and into, a model with master bits; and what a program's own writes do."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import lion
from lion import exchange, reference
from tests.comparing import assert_same_bits, to_numpy
from tests.optimizers.support import assert_unchanged, every_variant, snapshot
from tests.weights16.support import WAYS, bfloat16, both_masters, gradients, take, whole

OPTIONS = {"lr": 1e-4, "weight_decay": 0.1}


class Model(nn.Module):
    """Tied weights, a float32 and a frozen layer, buffers of several dtypes, and state that is no tensor."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(64, 65, dtype=dtype)
        self.norm = nn.BatchNorm1d(65)
        self.frozen = nn.Linear(65, 3, dtype=dtype).requires_grad_(False)
        self.head = nn.Linear(65, 64, dtype=dtype)
        self.head.weight = self.embedding.weight
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("scale", torch.tensor([1.0, 1 / 3], dtype=dtype))
        self.extra = 5

    def get_extra_state(self) -> int:
        return self.extra

    def set_extra_state(self, state: int) -> None:
        self.extra = state


def trainable(model: nn.Module) -> list[nn.Parameter]:
    params = [p for p in model.parameters() if p.requires_grad]
    for p in params:
        p.grad_dtype = torch.float32
    return params


def assert_same_tensors(actual: dict, expected: dict) -> None:
    assert list(actual) == list(expected)
    for key, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert_same_bits(actual[key], value, what=key)
        else:
            assert actual[key] == value


@every_variant
def test_a_start_from_float32_goes_on_as_float32(make):
    wide, narrow = Model(torch.float32), Model(torch.bfloat16)
    for name in ("embedding.weight", "head.bias"):
        wide.get_parameter(name).data += 1e-4
    start = wide.state_dict()
    assert start["_extra_state"] == 5
    narrow.extra = 0
    expected = make(trainable(wide), **OPTIONS)
    optimizer = make(trainable(narrow), master_weight_bits=32, **OPTIONS)
    exchange.load_float32_state_dict(narrow, optimizer, start)
    assert narrow.extra == 5 and len(optimizer.state) == 2
    for step in range(4):
        state = exchange.float32_state_dict(narrow, optimizer)
        # What is neither trained nor float32 is rounded.
        own = wide.state_dict()
        rounded = {key: own[key].bfloat16().float() for key in own if key.startswith(("frozen", "scale"))}
        assert_same_tensors(state, {**own, **rounded})
        assert state["head.weight"] is state["embedding.weight"]
        assert state["norm.weight"].data_ptr() == narrow.norm.weight.data_ptr()
        take(expected, trainable(wide), [step])
        take(optimizer, trainable(narrow), [step])
    again = Model(torch.float32)
    again.load_state_dict(exchange.float32_state_dict(narrow, optimizer))


@both_masters
def test_loading_splits_as_the_reference_does(way):
    p = bfloat16(70, 65)
    optimizer = lion.Lion([p], **way)
    model = nn.ParameterList([p])
    values = torch.randn(70, 65).t().contiguous().t() * 1e-3
    values[:3, 0] = torch.tensor([float("nan"), float("inf"), 3.4e38])
    address, version = p.data_ptr(), p._version
    exchange.load_float32_state_dict(model, optimizer, {"0": values})
    high, low = reference.split(to_numpy(values.contiguous()), way["master_weight_bits"])
    assert_same_bits(p, high)
    assert_same_bits(optimizer.state[p]["master_low"], low)
    assert (p.data_ptr(), optimizer.state[p]["step"]) == (address, 0) and p._version > version
    take(optimizer, [p], range(2))
    state, kept = optimizer.state[p], optimizer.state[p]["master_low"]
    exchange.load_float32_state_dict(model, optimizer, {"0": values.double()})
    assert optimizer.state[p] is state and state["master_low"] is kept and state["step"] == 2
    assert_same_bits(kept, low)
    [again] = whole(optimizer, [p])
    assert_same_bits(again, reference.join(high, low))


def test_without_master_bits_values_are_rounded_to_nearest():
    for way in ({}, WAYS["stochastic"]):
        p = bfloat16(500)
        optimizer = lion.Lion([p], **way)
        values = torch.randn(500)
        exchange.load_float32_state_dict(nn.ParameterList([p]), optimizer, {"0": values})
        assert_same_bits(p, values.bfloat16())
        assert not optimizer.state
        assert_same_bits(whole(optimizer, [p])[0], values.bfloat16().float())


def test_a_parameter_that_has_become_float32():
    p = bfloat16(300)
    optimizer = lion.Lion([p], master_weight_bits=24, **OPTIONS)
    take(optimizer, [p], range(2))
    p.grad = None
    p.data = p.data.float()
    assert_same_bits(whole(optimizer, [p])[0], p)
    take(optimizer, [p], [2])
    assert "master_low" not in optimizer.state[p]


def test_memory_order_and_several_models():
    first, second = bfloat16(30, 40), nn.Parameter(bfloat16(40, 30, seed=1).detach().t())
    second.grad_dtype = torch.float32
    optimizer = lion.Lion([first, second], master_weight_bits=32, **OPTIONS)
    take(optimizer, [first, second], range(3))
    assert optimizer.state[second]["master_low"].stride() == second.stride()
    before = whole(optimizer, [first]), whole(optimizer, [second])
    other = lion.Lion([first, second], master_weight_bits=32)
    for p, values in zip((first, second), before, strict=True):
        exchange.load_float32_state_dict(nn.ParameterList([p]), other, {"0": values[0]})
        assert_same_bits(whole(other, [p])[0], values[0])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda state: state.pop("head.bias"), "lacks key 'head.bias'"),
        (lambda state: state.update(more=torch.ones(1)), "has the unknown key 'more'"),
        (lambda state: state.update({"head.bias": torch.ones(1)}), r"'head.bias' is torch.float32 of shape \(1,\)"),
        (lambda state: state.update({"head.bias": 3}), "'head.bias' is 3; a tensor of shape"),
        (lambda state: state.update({"head.bias": torch.ones(64, dtype=torch.complex64)}), "torch.complex64"),
    ],
    ids=["missing", "unknown", "shape", "number", "complex"],
)
def test_what_does_not_fit_changes_nothing(change, match):
    model = Model(torch.bfloat16)
    optimizer = lion.Lion(trainable(model), master_weight_bits=24)
    take(optimizer, trainable(model), [0])
    state = {
        key: value + 1 if torch.is_tensor(value) and value.is_floating_point() else value
        for key, value in Model(torch.float32).state_dict().items()
    }
    change(state)
    before, own = snapshot(optimizer), copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=f"Invalid state: .*{match}"):
        exchange.load_float32_state_dict(model, optimizer, state)
    assert_unchanged(optimizer, before)
    assert_same_tensors(model.state_dict(), own)


def test_other_optimizers_and_states_are_refused():
    model = nn.Linear(3, 3)
    for call in (exchange.float32_state_dict, lambda *args: exchange.load_float32_state_dict(*args, {})):
        with pytest.raises(TypeError, match="Invalid optimizer: SGD; expected one of this package"):
            call(model, torch.optim.SGD(model.parameters()))
    with pytest.raises(TypeError, match="Invalid state: list"):
        exchange.load_float32_state_dict(model, lion.Lion(model.parameters()), [])


def test_a_model_that_hides_its_parameters_is_refused():
    class Hiding(nn.Linear):
        def _save_to_state_dict(self, destination, prefix, keep_vars):
            destination[prefix + "weight"] = self.weight.detach().clone()

    model = Hiding(3, 3, bias=False, dtype=torch.bfloat16)
    optimizer = lion.Lion(model.parameters(), master_weight_bits=24)
    with pytest.raises(ValueError, match="does not hold the parameter 'weight' itself"):
        exchange.load_float32_state_dict(model, optimizer, model.state_dict())
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()
    with pytest.raises(ValueError, match="does not hold the parameter 'weight' itself"):
        exchange.float32_state_dict(model, optimizer)


# --- programs that write to parameters


@both_masters
@every_variant
def test_the_lower_part_stays_when_a_program_writes(make, way):
    """The next step begins with the written value and the lower part that was there."""
    p = bfloat16(70, 65)
    optimizer = make([p], **way, **OPTIONS)
    take(optimizer, [p], range(3))
    low = optimizer.state[p]["master_low"].clone()
    written = torch.randn(70, 65).bfloat16()
    written[:10] = 0
    written[10:20] = -0.0
    with torch.no_grad():
        p.copy_(written)
    began = reference.join(to_numpy(written), to_numpy(low))
    assert_same_bits(whole(optimizer, [p])[0], began)
    unit = np.abs(np.spacing(to_numpy(written).astype(np.float32)) * 2.0**16)
    assert (np.abs(began - to_numpy(written).astype(np.float32)) <= unit / 2).all()
    p.grad = torch.zeros(70, 65)
    optimizer.param_groups[0].update(lr=0.0)
    optimizer.step()
    # Minus a step of 0, -0.0 becomes 0.0.
    assert_same_bits(whole(optimizer, [p])[0] + 0.0, began + np.float32(0))


@both_masters
@pytest.mark.parametrize("write", [lambda p: p.detach().zero_(), lambda p: p.data.neg_().mul_(0)], ids=["0", "-0"])
def test_zeros_stay_numbers(write, way):
    """A pruned weight, for instance, whatever its lower part was."""
    p = bfloat16(5000)
    optimizer = lion.Lion8bit([p], **way, **OPTIONS)
    for step in range(4):
        take(optimizer, [p], [step])
        assert (optimizer.state[p]["master_low"] < 0).any()
        write(p)
    take(optimizer, [p], [4])
    assert whole(optimizer, [p])[0].isfinite().all()
    assert p.isfinite().all() and p.abs().max() < 1.1e-4


@both_masters
def test_weights_that_are_swapped_out_and_in_again_lose_nothing(way):
    """As for an evaluation with averaged weights."""
    p, q = bfloat16(5000), bfloat16(5000)
    optimizer, expected = lion.Lion([p], **way, **OPTIONS), lion.Lion([q], **way, **OPTIONS)
    for step in range(4):
        take(optimizer, [p], [step])
        take(expected, [q], [step])
        kept = p.detach().clone()
        p.data.copy_(torch.randn(5000))
        p.data.copy_(kept)
    assert_same_bits(whole(optimizer, [p])[0], whole(expected, [q])[0])


def test_a_gradient_of_a_written_parameter():
    """Writing between backward and step is no different."""
    p = bfloat16(300)
    optimizer = lion.Lion([p], master_weight_bits=32, **OPTIONS)
    take(optimizer, [p], range(2))
    [p.grad] = gradients([p], 2)
    with torch.no_grad():
        p.mul_(2)
    began, momentum = whole(optimizer, [p])[0], to_numpy(optimizer.state[p]["state1"]).copy()
    k = reference.coefficients(OPTIONS["lr"], (0.9, 0.99), OPTIONS["weight_decay"])
    new, _ = reference.update_32bit(to_numpy(began), to_numpy(p.grad), momentum, k)
    optimizer.step()
    assert_same_bits(whole(optimizer, [p])[0], new)

"""Programs that begin anew by zeroing an optimizer's state in place, and what is told apart from that."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lion
from lion import exchange, functional
from tests.comparing import assert_same_bits
from tests.optimizers.support import (
    CLASSES,
    QMAP,
    ByHand,
    Variant,
    assert_unchanged,
    every_dtype,
    every_variant,
    follow,
    parameter,
    set_gradients,
    snapshot,
)

OPTIONS = {"min_8bit_size": 0, "percentile_clipping": 50, "lr": 1e-2}
EIGHT_BIT = pytest.mark.parametrize("block_wise", [True, False], ids=["blockwise", "tensorwise"])


def zero(state: dict[str, Any]) -> None:
    for value in state.values():
        value.zero_()


def zero_together(state: dict[str, Any]) -> None:
    torch._foreach_zero_([value for value in state.values() if value.dtype == torch.float32])
    state["state1"].zero_()


def zero_in_inference_mode(state: dict[str, Any]) -> None:
    with torch.inference_mode():
        zero(state)


def zeros_in_their_place(state: dict[str, Any]) -> None:
    for key, value in state.items():
        state[key] = torch.zeros_like(value)


WAYS = pytest.mark.parametrize("way", [zero, zero_together, zero_in_inference_mode, zeros_in_their_place])


@every_variant
@every_dtype
@WAYS
def test_training_begins_anew(make: Variant, dtype: torch.dtype, way: Callable[[dict[str, Any]], None]) -> None:
    """All of the state of one of two parameters: momentum, history and steps; the other one goes on."""
    p, q = parameter(3000, dtype=dtype), parameter(700, dtype=dtype, seed=1)
    optimizer = make([p, q], **OPTIONS)
    copies = {r: ByHand.of(make, r, **OPTIONS) for r in (p, q)}
    follow(optimizer, copies, 3)
    way(optimizer.state[p])
    copies[p] = ByHand.of(make, p, **OPTIONS)
    follow(optimizer, copies, 3, seed=7)
    if make.bits == 8:
        assert_same_bits(optimizer.state[p]["qmap1"], QMAP)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_large_state_that_may_be_paged(cls: type[lion.Lion]) -> None:
    p = parameter(100_001)
    optimizer, hand = cls([p], lr=1e-2), ByHand(p, 8 if "8bit" in cls.__name__ else 32)
    follow(optimizer, {p: hand}, 2)
    zero(optimizer.state[p])
    hand = ByHand(p, 8 if "8bit" in cls.__name__ else 32)
    follow(optimizer, {p: hand}, 2, seed=7)


@every_variant
def test_no_other_optimizer_notices(make: Variant) -> None:
    p, q = parameter(3000), parameter(3000, seed=1)
    first, second = make([p], **OPTIONS), make([q], **OPTIONS)
    copies = {q: ByHand.of(make, q, **OPTIONS)}
    set_gradients([p], 0)
    first.step()
    follow(second, copies, 2)
    saved = copy.deepcopy(second.state_dict())
    zero(first.state[p])
    follow(second, copies, 2)
    r = parameter(3000, seed=2)
    third = make([r], **OPTIONS)
    third.load_state_dict(saved)
    for key, value in saved["state"][0].items():
        assert_same_bits(third.state[r][key], value, what=key)
    codes, quantized = functional.quantize_blockwise(q.detach())
    assert_same_bits(quantized.code, QMAP)
    assert codes.any()


@EIGHT_BIT
def test_no_memory_is_handed_out_twice(block_wise: bool) -> None:
    """The maps of states, of copies of an optimizer, of loaded states and of the functions."""
    params = [parameter(700, seed=i) for i in range(3)]
    optimizer = lion.Lion8bit(params, min_8bit_size=0, block_wise=block_wise)
    set_gradients(params, 0)
    optimizer.step()
    loaded = lion.Lion8bit(params, min_8bit_size=0, block_wise=block_wise)
    loaded.load_state_dict(optimizer.state_dict())
    converted = lion.Lion(params, min_8bit_size=0, optim_bits=8, block_wise=not block_wise)
    converted.load_state_dict(optimizer.state_dict())
    narrowed = lion.Lion32bit(params, min_8bit_size=0, block_wise=block_wise)
    narrowed.step()
    narrowed.param_groups[0]["optim_bits"] = 8
    narrowed.step()
    maps = [s["qmap1"] for one in (optimizer, loaded, converted, narrowed) for s in one.state.values()]
    maps += [functional.quantize_blockwise(params[0])[1].code for _ in range(2)]
    maps.append(functional.create_dynamic_map())
    assert len({qmap.data_ptr() for qmap in maps}) == len(maps) == 15
    for qmap in maps:
        qmap.zero_()
    fresh = parameter(700)
    hand = ByHand(fresh, 8, block_wise=block_wise, min_8bit_size=0)
    follow(lion.Lion8bit([fresh], min_8bit_size=0, block_wise=block_wise), {fresh: hand}, 2)


@EIGHT_BIT
@pytest.mark.parametrize("then", ["save and load", "load as 32 bits", "to 32 bits", "to the other kind", "exp_avg"])
def test_what_follows_instead_of_a_step(block_wise: bool, then: str) -> None:
    """The momentum is zero whichever way it goes on."""
    p = parameter(3000)
    kwargs = {"block_wise": block_wise, "min_8bit_size": 0, "lr": 1e-2}
    optimizer = lion.Lion8bit([p], **kwargs)
    set_gradients([p], 0)
    optimizer.step()
    zero(optimizer.state[p])
    hand = ByHand(p, 8, block_wise=block_wise, min_8bit_size=0)
    if then == "save and load":
        saved = copy.deepcopy(optimizer.state_dict())
        optimizer = lion.Lion8bit([p], **kwargs)
        optimizer.load_state_dict(saved)
    elif then == "load as 32 bits":
        saved = copy.deepcopy(optimizer.state_dict())
        optimizer, hand = lion.Lion([p], lr=1e-2), ByHand(p, 32)
        optimizer.load_state_dict(saved)
        assert_same_bits(optimizer.state[p]["state1"], torch.zeros(3000))
    elif then == "to 32 bits":
        optimizer.param_groups[0]["optim_bits"], hand = 32, ByHand(p, 32)
    elif then == "to the other kind":
        optimizer.param_groups[0]["block_wise"] = not block_wise
        hand = ByHand(p, 8, block_wise=not block_wise, min_8bit_size=0)
    else:
        exported = exchange.to_exp_avg(optimizer.state_dict(), keep=["step"])
        assert not exported["state"][0]["exp_avg"].any()
        optimizer.load_state_dict(exchange.from_exp_avg(exported))
    follow(optimizer, {p: hand}, 2, seed=7)


def test_bitsandbytes_gets_no_map_of_zeros() -> None:
    """It quantizes with the map of the state: the momentum would stay zero."""
    p = parameter(3000)
    optimizer = lion.Lion8bit([p], min_8bit_size=0)
    set_gradients([p], 0)
    optimizer.step()
    zero(optimizer.state[p])
    exported = exchange.to_bitsandbytes(optimizer.state_dict())["state"][0]
    assert_same_bits(exported["qmap1"], QMAP)
    assert not (exported["qmap1"][exported["state1"].long()] * exported["absmax1"].repeat_interleave(256)[:3000]).any()


@EIGHT_BIT
@pytest.mark.parametrize("key", ["step", "gnorm_vec", "absmax1", "max1", "new_max1"])
def test_one_tensor_alone(block_wise: bool, key: str) -> None:
    p = parameter(3000)
    kwargs = {**OPTIONS, "block_wise": block_wise}
    optimizer = lion.Lion8bit([p], **kwargs)
    hand = ByHand(p, 8, block_wise=block_wise, percentile=50, min_8bit_size=0)
    follow(optimizer, {p: hand}, 3)
    if key not in optimizer.state[p]:
        return
    optimizer.state[p][key].zero_()
    if key == "step":
        hand.steps = 0
    elif key == "gnorm_vec":
        hand.history[:] = 0
    elif key != "new_max1":  # scratch
        hand.absmax[:] = 0
    follow(optimizer, {p: hand}, 3, seed=7)


@EIGHT_BIT
@pytest.mark.parametrize("change", [Tensor.zero_, lambda t: t.fill_(0.5), lambda t: t.mul_(0.5)])
def test_a_map_alone_is_refused_and_changes_nothing(block_wise: bool, change: Callable[[Tensor], Tensor]) -> None:
    p, q = parameter(3000), parameter(3000, seed=1)
    optimizer = lion.Lion8bit([p, q], **OPTIONS, block_wise=block_wise)
    set_gradients([p, q], 0)
    optimizer.step()
    zero(optimizer.state[p])
    change(optimizer.state[q]["qmap1"])
    set_gradients([p, q], 1)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="parameter 1 of group 0: 'qmap1' is not the dynamic map"):
        optimizer.step()
    assert_unchanged(optimizer, before)


MAPS = {
    "zeros": torch.zeros(256),
    "constant": torch.full((256,), 0.25),
    "without a zero": torch.linspace(-1, 1, 256),
    "positive": torch.linspace(0.1, 1, 256),
}


@EIGHT_BIT
@pytest.mark.parametrize("qmap", MAPS.values(), ids=MAPS.keys())
@pytest.mark.parametrize("bits", [8, 32])
def test_a_checkpoint_with_a_map_that_no_momentum_has(block_wise: bool, qmap: Tensor, bits: int) -> None:
    """It is refused, unless no absmax is left for it to scale."""
    p, q = parameter(3000), parameter(3000, seed=1)
    optimizer = lion.Lion8bit([p], **OPTIONS, block_wise=block_wise)
    set_gradients([p], 0)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["qmap1"].copy_(qmap)
    other = lion.Lion([q], optim_bits=bits, **OPTIONS, block_wise=block_wise)
    with pytest.raises(ValueError, match="parameter 0 of group 0: 'qmap1' is no quantization map"):
        other.load_state_dict(saved)
    assert not other.state
    saved["state"][0]["absmax1" if block_wise else "max1"].zero_()
    other.load_state_dict(saved)
    hand = ByHand(q, bits, block_wise=block_wise, percentile=50, min_8bit_size=0)
    hand.history, hand.steps = saved["state"][0]["gnorm_vec"].numpy().copy(), 1
    follow(other, {q: hand}, 3)


@EIGHT_BIT
def test_a_map_of_another_quantization_is_converted_still(block_wise: bool) -> None:
    p, q = parameter(3000), parameter(3000, seed=1)
    optimizer = lion.Lion8bit([p], **OPTIONS, block_wise=block_wise)
    set_gradients([p], 0)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    state = saved["state"][0]
    linear = torch.cat([torch.linspace(-1, 0, 128), torch.linspace(0, 1, 129)[1:]])
    state["qmap1"].copy_(linear)
    other = lion.Lion([q], **OPTIONS)
    other.load_state_dict(saved)
    absmax = state["absmax1"].repeat_interleave(256)[:3000] if block_wise else state["max1"]
    assert_same_bits(other.state[q]["state1"], linear[state["state1"].long()] * absmax)


def test_maps_are_compared_when_somebody_has_written_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Comparing waits for a GPU."""
    params = [parameter(3000, seed=i) for i in range(3)]
    optimizer = lion.Lion8bit(params, min_8bit_size=0)
    set_gradients(params, 0)
    optimizer.step()
    calls = []
    equal = torch.equal
    monkeypatch.setattr(torch, "equal", lambda *args: calls.append(args) or equal(*args))  # type: ignore[func-returns-value]
    for i in range(6):
        set_gradients(params[: 1 + i % 3], i)  # new plans
        optimizer.step()
        optimizer.zero_grad()
    assert not calls
    optimizer.state[params[0]]["qmap1"].mul_(1.0)
    for i in range(3):
        set_gradients(params, i)
        optimizer.step()
    assert len(calls) == 1


@EIGHT_BIT
def test_with_steps_in_backward(block_wise: bool) -> None:
    p, q = parameter(3000), nn.Parameter(parameter(3000).detach().clone())
    optimizers = [lion.Lion8bit([r], **OPTIONS, block_wise=block_wise) for r in (p, q)]
    grads = [torch.randn(3000) for _ in range(4)]
    with lion.StepInBackward(optimizers[0]):
        for i, grad in enumerate(grads):
            if i == 2:
                zero(optimizers[0].state[p])
            (p * grad).sum().backward()
    for i, grad in enumerate(grads):
        if i == 2:
            optimizers[1].state.clear()
        q.grad = grad
        optimizers[1].step()
    assert_same_bits(p, q)
    for key, value in optimizers[1].state[q].items():
        assert_same_bits(optimizers[0].state[p][key], value, what=key)


@EIGHT_BIT
@pytest.mark.parametrize("then", ["save and load", "copy", "to 32 bits", "steps"])
@pytest.mark.parametrize("steps", [0, 2])
def test_tensors_set_to_zero_unseen(block_wise: bool, then: str, steps: int) -> None:
    """Through ``.data`` torch does not count it as a change."""
    p, q = parameter(3000), parameter(3000)
    optimizer, fresh = (lion.Lion([r], optim_bits=8, **OPTIONS, block_wise=block_wise) for r in (p, q))
    set_gradients([p], 3)
    optimizer.step()
    with torch.no_grad():
        q.copy_(p)
    for tensor in optimizer.state[p].values():
        tensor.data.zero_()
    for seed in range(steps):
        set_gradients([p], seed)
        set_gradients([q], seed)
        optimizer.step()
        fresh.step()
    if then == "save and load":
        saved = copy.deepcopy(optimizer.state_dict())
        optimizer = lion.Lion([p], optim_bits=8, **OPTIONS, block_wise=block_wise)
        optimizer.load_state_dict(saved)
    elif then == "copy":
        optimizer = copy.deepcopy(optimizer)
        p = optimizer.param_groups[0]["params"][0]
    elif then == "to 32 bits":
        for one in (optimizer, fresh):
            one.param_groups[0]["optim_bits"] = 32
    for seed in range(4, 6):
        set_gradients([p], seed)
        set_gradients([q], seed)
        optimizer.step()
        fresh.step()
    assert_same_bits(p, q)
    optimizer.state_dict()
    for key, value in fresh.state[q].items():
        assert_same_bits(optimizer.state[p][key], value, what=key)

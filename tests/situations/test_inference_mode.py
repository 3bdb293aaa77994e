"""State that is made, moved or loaded within torch.inference_mode, where tensors cannot be changed outside of it."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import nn

import lion
from tests.comparing import assert_same_bits
from tests.optimizers.support import (
    CLASSES,
    ByHand,
    Variant,
    every_dtype,
    every_variant,
    follow,
    parameter,
    set_gradients,
)

OPTIONS = {"min_8bit_size": 0, "percentile_clipping": 50, "lr": 1e-2}


def clone(optimizer: lion.Lion) -> None:
    for state in optimizer.state.values():
        for key, value in state.items():
            state[key] = value.clone()


def to_and_back(optimizer: lion.Lion) -> None:
    for state in optimizer.state.values():
        for key, value in state.items():
            state[key] = value.to("cpu", copy=True)


def load(optimizer: lion.Lion) -> None:
    optimizer.load_state_dict(optimizer.state_dict())


def load_a_file(optimizer: lion.Lion) -> None:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    optimizer.load_state_dict(torch.load(file))


def load_a_copy(optimizer: lion.Lion) -> None:
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


@every_variant
@every_dtype
@pytest.mark.parametrize("way", [clone, to_and_back, load, load_a_file, load_a_copy])
def test_training_goes_on_outside(make: Variant, dtype: torch.dtype, way: Callable[[lion.Lion], None]) -> None:
    params = [parameter(3000, dtype=dtype), parameter(700, dtype=dtype, seed=1)]
    optimizer = make(params, **OPTIONS)
    copies = {p: ByHand.of(make, p, **OPTIONS) for p in params}
    follow(optimizer, copies, 2)
    with torch.inference_mode():
        way(optimizer)
    follow(optimizer, copies, 2, seed=7)
    assert not any(value.is_inference() for state in optimizer.state.values() for value in state.values())
    for state in optimizer.state.values():
        for value in state.values():
            value.add_(0)  # as a program may
    follow(optimizer, copies, 1, seed=9)


@every_variant
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_steps_within(make: Variant, backend: str) -> None:
    """The first one, and later ones, in turns with steps outside."""
    p = parameter(3000)
    optimizer, hand = make([p], **OPTIONS), ByHand.of(make, p, **OPTIONS)
    for i in range(6):
        set_gradients([p], i)
        hand.step(p.grad, 1e-2)
        with torch.inference_mode(i % 3 != 2), lion.use_backend(backend):
            if i == 4:
                optimizer.param_groups[0]["weight_decay"] = 0.0
                optimizer.state[p] = dict(optimizer.state[p])  # a new plan
            optimizer.step()
        hand.check(p, optimizer, f"step {i}")
    assert not any(value.is_inference() for value in optimizer.state[p].values())


@every_variant
@pytest.mark.parametrize("options", [{"optim_bits": 8}, {"optim_bits": 32}, {"block_wise": False}], ids=str)
def test_a_form_that_changes_within(make: Variant, options: dict[str, object]) -> None:
    p, q = parameter(3000), parameter(3000)
    optimizer, plain = make([p], **OPTIONS), make([q], **OPTIONS)
    for i in range(4):
        set_gradients([p], i)
        q.grad = p.grad.clone()
        if i == 1:
            for one in (optimizer, plain):
                one.param_groups[0].update(options)
        with torch.inference_mode(i == 1):
            optimizer.step()
        plain.step()
    for key, value in plain.state[q].items():
        assert_same_bits(optimizer.state[p][key], value, what=key)
    assert_same_bits(p, q)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("way", [clone, load, load_a_file])
def test_large_state_that_may_be_paged(cls: type[lion.Lion], way: Callable[[lion.Lion], None]) -> None:
    p = parameter(100_001)
    optimizer, hand = cls([p], lr=1e-2), ByHand(p, 8 if "8bit" in cls.__name__ else 32)
    with torch.inference_mode():
        set_gradients([p], 0)
        hand.step(p.grad, 1e-2)
        optimizer.step()
    hand.check(p, optimizer)
    follow(optimizer, {p: hand}, 2, seed=1)
    with torch.inference_mode():
        way(optimizer)
        set_gradients([p], 5)
        hand.step(p.grad, 1e-2)
        optimizer.step()
    follow(optimizer, {p: hand}, 2, seed=7)
    optimizer.state[p]["state1"].add_(0)
    follow(optimizer, {p: hand}, 1, seed=9)


def test_a_learning_rate_in_a_tensor_is_loaded_within() -> None:
    p = parameter(300)
    optimizer = lion.Lion([p], lr=torch.tensor(1e-2))
    set_gradients([p], 0)
    optimizer.step()
    with torch.inference_mode():
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.param_groups[0]["lr"].fill_(1e-3)
    set_gradients([p], 1)
    optimizer.step()


def test_entries_of_a_program_are_loaded_within() -> None:
    p = parameter(300)
    optimizer = lion.Lion([p])
    set_gradients([p], 0)
    optimizer.step()
    optimizer.state[p]["slow_param"] = p.detach().clone()
    with torch.inference_mode():
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.state[p]["slow_param"].lerp_(p.detach(), 0.5)


def test_an_optimizer_that_is_made_within() -> None:
    model = nn.Linear(70, 3)
    with torch.inference_mode():
        optimizer = lion.Lion8bit(model.parameters(), min_8bit_size=0)
        with_history = copy.deepcopy(optimizer.state_dict())
        optimizer.load_state_dict(with_history)
    model(torch.randn(5, 70)).sum().backward()
    optimizer.step()
    assert optimizer.state[model.weight]["step"] == 1


def test_with_steps_in_backward() -> None:
    p = parameter(3000)
    optimizer, hand = lion.Lion8bit([p], **OPTIONS), ByHand(p, 8, percentile=50, min_8bit_size=0)
    grad = torch.randn(3000)
    with lion.StepInBackward(optimizer):
        for i in range(4):
            if i == 2:
                with torch.inference_mode():
                    clone(optimizer)
            (p * grad).sum().backward()
            hand.step(grad, 1e-2)
    hand.check(p, optimizer)

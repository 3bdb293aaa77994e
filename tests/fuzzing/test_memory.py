"""A kernel reads and writes inside its tensors only: states put into an optimizer by hand are checked before it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lion
from tests.comparing import Guarded, guarded, to_numpy
from tests.optimizers.support import (
    KINDS,
    ByHand,
    Variant,
    assert_unchanged,
    every_kind,
    follow,
    parameter,
    set_gradients,
    snapshot,
)

OPTIONS = {"min_8bit_size": 0, "percentile_clipping": 50, "lr": 1e-2}
KEYS = {
    "32bit": ("step", "state1", "gnorm_vec"),
    "blockwise": ("step", "state1", "absmax1", "qmap1", "gnorm_vec"),
    "tensorwise": ("step", "state1", "max1", "new_max1", "qmap1", "gnorm_vec"),
}
EVERY_KEY = [(kind, key) for kind, keys in KEYS.items() for key in keys]


class Training:
    """An optimizer whose parameter, gradient and state lie between guard bytes; the same by hand."""

    def __init__(self, make: Variant, steps: int, size: int = 700) -> None:
        self.guards: list[Guarded] = []
        self.p = nn.Parameter(self.between_guards(parameter(size)))
        self.copy = ByHand.of(make, self.p, **OPTIONS)
        self.optimizer = make([self.p], **OPTIONS)
        self.gradient()
        self.optimizer.step()
        self.copy.step(self.p.grad, OPTIONS["lr"])
        state = self.optimizer.state[self.p]
        for key, tensor in state.items():
            state[key] = self.between_guards(tensor)
        for _ in range(steps):
            self.step()

    def between_guards(self, tensor: torch.Tensor) -> torch.Tensor:
        self.guards.append(guarded(to_numpy(tensor), offset_bytes=4 * len(self.guards)))
        return torch.from_numpy(self.guards[-1].array)

    def gradient(self) -> None:
        set_gradients([self.p], self.copy.steps)
        self.p.grad = self.between_guards(self.p.grad)

    def step(self) -> None:
        self.gradient()
        self.optimizer.step()
        self.copy.step(self.p.grad, OPTIONS["lr"])
        self.check()

    def check(self) -> None:
        self.copy.check(self.p, self.optimizer)
        for guard in self.guards:
            guard.check()

    def refuse(self, message: str) -> None:
        """Fail unless a step raises and changes nothing."""
        self.gradient()
        before = snapshot(self.optimizer)
        arrays = [guard.array.copy() for guard in self.guards]
        with pytest.raises(ValueError, match=message):
            self.optimizer.step()
        assert_unchanged(self.optimizer, before)
        for guard, array in zip(self.guards, arrays, strict=True):
            guard.check()
            np.testing.assert_array_equal(guard.array, array)


def shorter(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1)[:-1]


def resize(state: dict[str, Any], key: str) -> None:
    # Memory of NumPy cannot be resized.
    state[key] = state[key].clone()
    state[key].resize_(state[key].numel() - 1)


def set_in_place(state: dict[str, Any], key: str) -> None:
    tensor = state[key]
    tensor.set_(tensor.untyped_storage(), tensor.storage_offset(), (tensor.numel() - 1,), (1,))


def replace_data(state: dict[str, Any], key: str) -> None:
    state[key].data = shorter(state[key].data)


def replace(state: dict[str, Any], key: str) -> None:
    state[key] = shorter(state[key])


def other_type(state: dict[str, Any], key: str) -> None:
    state[key].data = state[key].data.reshape(-1).view(torch.int8 if state[key].dtype == torch.uint8 else torch.uint8)


def strided(state: dict[str, Any], key: str) -> None:
    state[key] = torch.stack([state[key], state[key]], -1)[..., 0]


def expanded(state: dict[str, Any], key: str) -> None:
    state[key] = state[key].reshape(-1)[:1].expand(*state[key].shape, 2)[..., 0]


def negative(state: dict[str, Any], key: str) -> None:
    state[key] = torch._neg_view(state[key])


def without_memory(state: dict[str, Any], key: str) -> None:
    state[key] = state[key].clone()
    state[key].untyped_storage().resize_(state[key].nbytes // 2)


def on_meta(state: dict[str, Any], key: str) -> None:
    state[key] = state[key].to("meta")


def other_object(state: dict[str, Any], key: str) -> None:
    state[key] = state[key].tolist()


def missing(state: dict[str, Any], key: str) -> None:
    del state[key]


WAYS: list[Callable[[dict[str, Any], str], None]] = [
    *(resize, set_in_place, replace_data, replace, other_type, strided, expanded, negative),
    *(without_memory, on_meta, other_object),
]


@every_kind
def test_guards_around_everything(make: Variant) -> None:
    for size in (1, 255, 256, 257, 700):
        Training(make, 3, size)


@pytest.mark.parametrize("way", [*WAYS, missing], ids=lambda way: way.__name__)
@pytest.mark.parametrize(("kind", "key"), EVERY_KEY)
def test_a_state_that_does_not_fit(kind: str, key: str, way: Callable[[dict[str, Any], str], None]) -> None:
    """Before a plan has been made, and after the plan of the state as it was has been used."""
    for steps in (0, 2):
        training = Training(KINDS[kind], steps)
        state = training.optimizer.state[training.p]
        good = {name: tensor.clone() for name, tensor in state.items()}
        if way in (strided, expanded) and state[key].numel() == 1:
            # One number is contiguous whatever its strides are.
            continue
        reshaped = key == "step" and way in (replace_data, set_in_place, resize, replace)
        if steps and (way is other_type or reshaped):
            # A plan that is kept looks at the place and the number of bytes, which is what kernels need.
            continue
        if reshaped:
            # Of no dimension, it gets one.
            state[key].data = state[key].data.reshape(1)
        else:
            way(state, key)
        if key == "gnorm_vec" and way is missing:
            # A history may be missing: it begins anew.
            training.copy.history[:] = 0
        elif key == "qmap1" and way in (replace_data, other_type) and steps:
            # Kernels have their own map, and a tensor's version does not tell of a change of its data.
            continue
        else:
            # Copies of the state could not be compared where it has no memory.
            if way in (without_memory, on_meta, other_object, other_type):
                training.gradient()
                with pytest.raises(ValueError, match=f"Invalid state of parameter 0 of group 0: .*'{key}'"):
                    training.optimizer.step()
            else:
                training.refuse(f"Invalid state of parameter 0 of group 0: .*'{key}'")
            training.optimizer.state[training.p] = good
        training.step()


@every_kind
def test_another_map_is_not_ignored(make: Variant) -> None:
    if make is KINDS["32bit"]:
        return
    for steps in (0, 2):
        training = Training(make, steps)
        state = training.optimizer.state[training.p]
        good, state["qmap1"] = state["qmap1"], torch.linspace(-1, 1, 256)
        training.refuse("'qmap1' is not the dynamic map")
        state["qmap1"] = good.clone()
        training.step()
        state["qmap1"][3] += 1e-3
        training.refuse("'qmap1' is not the dynamic map")
        state["qmap1"] = good
        training.step()


@every_kind
def test_a_map_is_written_to(make: Variant) -> None:
    """Its optimizer is told, and nobody else notices; the same values change nothing."""
    if make is KINDS["32bit"]:
        return
    p, q = parameter(700), parameter(700)
    optimizer, other = make([p], **OPTIONS), make([q], **OPTIONS)
    copies = [{p: ByHand.of(make, p, **OPTIONS)}, {q: ByHand.of(make, q, **OPTIONS)}]
    follow(optimizer, copies[0], 2)
    qmap = optimizer.state[p]["qmap1"]
    qmap.copy_(qmap.clone())
    follow(optimizer, copies[0], 1)
    assert optimizer.state[p]["qmap1"] is qmap
    qmap.mul_(0.5)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="'qmap1' is not the dynamic map"):
        optimizer.step()
    assert_unchanged(optimizer, before)
    follow(other, copies[1], 2)
    qmap.mul_(2.0)
    follow(optimizer, copies[0], 1)


@every_kind
@pytest.mark.parametrize("what", ["parameter", "gradient"])
def test_a_tensor_that_lost_its_memory(make: Variant, what: str) -> None:
    p = parameter(3000)
    set_gradients([p], 0)
    tensor = p.data if what == "parameter" else p.grad
    assert tensor is not None
    tensor.untyped_storage().resize_(tensor.nbytes // 2)
    optimizer = make([p])
    with pytest.raises(ValueError, match=r"parameter 0 of group 0: .*memory"):
        optimizer.step()
    assert not optimizer.state


@every_kind
@pytest.mark.parametrize("what", ["parameter", "gradient"])
@pytest.mark.parametrize("size", [1, 3000])
def test_a_tensor_whose_memory_was_freed_after_a_step(make: Variant, what: str, size: int) -> None:
    p = parameter(size)
    optimizer = make([p])
    set_gradients([p], 0)
    optimizer.step()
    before = {key: value.clone() for key, value in optimizer.state[p].items()}
    tensor = p.data if what == "parameter" else p.grad
    assert tensor is not None
    tensor.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"parameter 0 of group 0: .*memory"):
        optimizer.step()
    assert all(torch.equal(optimizer.state[p][key], before[key]) for key in before)


def give_other_type(grad: torch.Tensor) -> None:
    grad.data = grad.data.double()


@every_kind
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("change", [give_other_type, lambda grad: grad.resize_(2999), lambda grad: grad.resize_(4000)])
def test_a_gradient_of_another_size_or_type(make: Variant, change: Callable[..., Any], steps: int) -> None:
    """torch looks at a gradient when it is assigned, and not at what becomes of it."""
    p = parameter(3000)
    optimizer = make([p], percentile_clipping=50)
    for seed in range(steps):
        set_gradients([p], seed)
        optimizer.step()
    set_gradients([p], steps)
    change(p.grad)
    before = snapshot(optimizer)
    with pytest.raises(TypeError, match="Invalid gradient of parameter 0 of group 0: "):
        optimizer.step()
    assert_unchanged(optimizer, before)


@every_kind
def test_a_parameter_with_the_negative_bit(make: Variant) -> None:
    p = nn.Parameter(torch._neg_view(torch.ones(300)))
    with pytest.raises(TypeError, match="parameter 0 of group 0: .*negative bit"):
        make([p])


def test_steps_beyond_what_float32_counts() -> None:
    """The counter stands still at 2^24, and the history's place with it, as in the reference."""
    for steps in (2**24 - 1, 2**24, 2**24 + 2, 2**62):
        training = Training(KINDS["32bit"], 1)
        saved = training.optimizer.state_dict()
        saved["state"][0]["step"] = steps
        training.optimizer.load_state_dict(saved)
        other = lion.Lion([nn.Parameter(training.p.detach().clone())], **OPTIONS)
        other.load_state_dict(saved)
        training.gradient()
        training.optimizer.step()
        q = other.param_groups[0]["params"][0]
        q.grad = training.p.grad.clone()
        with lion.use_backend("reference"):
            other.step()
        np.testing.assert_array_equal(training.optimizer.state[training.p]["gnorm_vec"], other.state[q]["gnorm_vec"])
        np.testing.assert_array_equal(training.p.detach(), q.detach())
    saved["state"][0]["step"] = 2**63
    with pytest.raises(ValueError, match="'step' is .*below 2"):
        other.load_state_dict(saved)

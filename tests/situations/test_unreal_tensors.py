"""State that only stands for memory: a kernel that was given its address would end the process."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import lion
from lion import functional
from lion._memory import paging
from lion._memory.addresses import unaddressable
from tests.comparing import assert_same_bits
from tests.optimizers.support import KINDS, QMAP, ByHand, Variant, every_kind, follow, parameter, set_gradients

OPTIONS = {"min_8bit_size": 0, "percentile_clipping": 50}
KEYS = {
    "32bit": ("step", "state1", "gnorm_vec"),
    "blockwise": ("step", "state1", "absmax1", "qmap1", "gnorm_vec"),
    "tensorwise": ("step", "state1", "max1", "new_max1", "qmap1", "gnorm_vec"),
}


class Wrapper(Tensor):
    """A tensor without memory, made of another one."""

    @staticmethod
    def __new__(cls, inner: Tensor, offset: int = 0) -> Wrapper:
        return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined,no-any-return]
            cls, inner.shape, strides=inner.stride(), storage_offset=offset, dtype=inner.dtype, device=inner.device
        )

    def __init__(self, inner: Tensor, offset: int = 0) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args = [arg.inner if isinstance(arg, Wrapper) else arg for arg in args]
        return function(*args, **(kwargs or {}))


class Subclass(Tensor):
    """A tensor with memory of its own."""


def fake(tensor: Tensor) -> Tensor:
    return FakeTensorMode().from_tensor(tensor)


def shortened(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(tensor.nbytes - 1)
    return tensor


def seen_by(transform: Callable[[Callable[[Tensor], Tensor]], Callable[[Tensor], Any]], tensor: Tensor) -> Tensor:
    """Return what a function sees of its argument within a transform of torch.func."""
    seen = []
    transform(lambda x: (seen.append(x), x.sum())[1])(tensor)
    return seen[0]


STANDING_FOR: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "meta": (lambda t: t.to("meta"), "meta"),
    "fake": (fake, "FakeTensor"),
    "functional": (torch._to_functional_tensor, "functional"),
    "zeros": (lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype), "zeros without memory"),
    "wrapper": (Wrapper, "Wrapper"),
    "wrapper with an offset": (lambda t: Wrapper(t, 2), "Wrapper|end of its memory"),
    "freed": (shortened, "end of its memory"),
    "sparse": (lambda t: t.reshape(-1).to_sparse(), "sparse"),
    "nested": (lambda t: torch.nested.nested_tensor([t.reshape(-1), t.reshape(-1)[:2]]), "nested"),
}


@pytest.mark.parametrize(("make", "reason"), STANDING_FOR.values(), ids=STANDING_FOR.keys())
def test_the_reason_is_told(make: Callable[[Tensor], Tensor], reason: str) -> None:
    found = unaddressable(make(torch.ones(3, 4)))
    assert found is not None and any(part in found for part in reason.split("|"))


def test_more_reasons() -> None:
    ones = torch.ones(3, 4)
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
    for tensor, reason in (
        (torch._neg_view(ones), "negative bit"),
        (nested, "nested"),
        (nn.UninitializedParameter(), "shape"),
        (seen_by(torch.func.vmap, ones), "torch.func"),
        (seen_by(torch.func.grad, ones), "torch.func"),
        (torch._efficientzerotensor(5)[2:], "zeros without memory"),
    ):
        found = unaddressable(tensor)
        assert found is not None and reason in found


def test_memory_is_memory() -> None:
    ones = torch.ones(3, 4)
    with torch.inference_mode():
        inference = torch.ones(3)
    tensors: list[Tensor] = [
        *(ones, ones.T, ones[1:], ones[:0], torch.ones(()), torch.zeros(0), ones.expand(2, 3, 4)),
        *(nn.Parameter(ones), ones.as_subclass(Subclass), torch._lazy_clone(ones), inference),
        torch.from_numpy(QMAP),
        paging.empty(torch.Size([5]), torch.float32, torch.device("cpu")),
    ]
    assert [unaddressable(tensor) for tensor in tensors] == [None] * len(tensors)


def stepped(make: Variant, p: nn.Parameter) -> lion.Lion:
    optimizer = make([p], **OPTIONS)
    set_gradients([p], 0)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize(("make", "reason"), STANDING_FOR.values(), ids=STANDING_FOR.keys())
@pytest.mark.parametrize(("kind", "key"), [(kind, key) for kind, keys in KEYS.items() for key in keys])
def test_a_state_is_refused_at_a_step_and_when_it_is_loaded(
    make: Callable[[Tensor], Tensor], reason: str, kind: str, key: str
) -> None:
    p = parameter(700)
    optimizer = stepped(KINDS[kind], p)
    state, good, before = optimizer.state[p], dict(optimizer.state[p]), p.detach().clone()
    for bad in (state, {**good}):
        bad[key] = make(good[key])
        optimizer.state[p] = bad
        with pytest.raises(ValueError, match=f"parameter 0 of group 0: '{key}'.*({reason}|dense tensor)"):
            optimizer.step()
        with pytest.raises(ValueError, match=f"parameter 0 of group 0: '{key}'.*({reason}|dense tensor)"):
            KINDS[kind]([p], **OPTIONS).load_state_dict(optimizer.state_dict())
        assert torch.equal(p, before)
    optimizer.state[p] = good
    optimizer.step()
    assert good["step"] == 2


@every_kind
def test_a_state_of_a_subclass_with_memory(make: Variant) -> None:
    p = parameter(700)
    optimizer, hand = make([p], **OPTIONS), ByHand.of(make, p, **OPTIONS)
    follow(optimizer, {p: hand}, 1)
    for key, value in optimizer.state[p].items():
        optimizer.state[p][key] = value.as_subclass(Subclass)
    follow(optimizer, {p: hand}, 2, seed=3)


@every_kind
@pytest.mark.parametrize("percentile", [100, 50])
@pytest.mark.parametrize("where", ["parameter", "gradient"])
def test_a_later_step_in_fake_mode_whose_copies_are_no_memory(make: Variant, percentile: int, where: str) -> None:
    """A parameter with gaps, or a gradient in another order, is copied, and a copy made there is a fake."""
    values = torch.randn(60, 70, 2)[..., 0] if where == "parameter" else torch.randn(60, 70)
    p = nn.Parameter(values)
    optimizer = make([p], min_8bit_size=0, percentile_clipping=percentile)
    p.grad = torch.randn(60, 70) if where == "parameter" else torch.randn(70, 60).t()
    optimizer.step()
    before = p.detach().clone()
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(ValueError, match="FakeTensorMode"):
        optimizer.step()
    assert_same_bits(p, before)
    optimizer.step()
    assert optimizer.state[p]["step"] == 2


@every_kind
def test_a_first_step_in_fake_mode(make: Variant) -> None:
    """Whatever is made then is fake; afterwards everything is as if it had not been tried."""
    p = parameter(700)
    optimizer, hand = make([p], **OPTIONS), ByHand.of(make, p, **OPTIONS)
    set_gradients([p], 0)
    before = p.detach().clone()
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(ValueError, match="parameter 0 of group 0"):
        optimizer.step()
    assert torch.equal(p, before) and not optimizer.state
    follow(optimizer, {p: hand}, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(ValueError, match="parameter 0 of group 0: 'step'"):
        make([p], **OPTIONS).load_state_dict(saved)
    follow(optimizer, {p: hand}, 1, seed=5)


FIRST_OF_ALL = """
import torch, lion
from torch._subclasses.fake_tensor import FakeTensorMode
p = torch.nn.Parameter(torch.ones(5000))
p.grad = torch.ones(5000)
optimizer = {cls}([p], {kwargs})
with FakeTensorMode(allow_non_fake_inputs=True):
    try:
        optimizer.step()
    except ValueError as error:
        assert "parameter 0 of group 0" in str(error), error
    else:
        raise AssertionError
optimizer.step()
assert optimizer.state[p]["step"] == 1 and (p < 1).all()
"""


@pytest.mark.parametrize(
    ("cls", "kwargs"),
    [("lion.Lion", ""), ("lion.Lion8bit", ""), ("lion.Lion8bit", "block_wise=False"), ("lion.PagedLion8bit", "")],
)
def test_a_first_step_of_a_process_in_fake_mode(cls: str, kwargs: str) -> None:
    """What is kept for the whole process must not be made then."""
    done = subprocess.run(
        [sys.executable, "-c", FIRST_OF_ALL.format(cls=cls, kwargs=kwargs)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


CODES = torch.zeros(5000, dtype=torch.uint8)
FUNCTIONS: dict[str, Callable[[Callable[[Tensor], Tensor]], object]] = {
    "A": lambda make: functional.quantize_blockwise(make(torch.ones(5000))),
    "code": lambda make: functional.quantize_blockwise(torch.ones(5000), make(functional.create_dynamic_map())),
    "absmax": lambda make: functional.quantize_blockwise(torch.ones(5000), absmax=make(torch.ones(2))),
    "out": lambda make: functional.quantize_blockwise(torch.ones(5000), out=make(CODES.clone())),
    "codes": lambda make: functional.dequantize_blockwise(make(CODES.clone()), absmax=torch.ones(2)),
    "absmax of codes": lambda make: functional.dequantize_blockwise(CODES, absmax=make(torch.ones(2))),
    "out of codes": lambda make: functional.dequantize_blockwise(
        CODES, absmax=torch.ones(2), out=make(torch.ones(5000))
    ),
    "grad": lambda make: functional.percentile_clipping(make(torch.ones(5000)), torch.zeros(100), 1),
    "gnorm_vec": lambda make: functional.percentile_clipping(torch.ones(5000), make(torch.zeros(100)), 1),
}


@pytest.mark.parametrize("make", [make for make, _ in STANDING_FOR.values()], ids=STANDING_FOR.keys())
@pytest.mark.parametrize("argument", FUNCTIONS)
def test_functions_refuse_it_by_the_argument(argument: str, make: Callable[[Tensor], Tensor]) -> None:
    name = {"codes": "A", "absmax of codes": "absmax", "out of codes": "out"}.get(argument, argument)
    with pytest.raises((TypeError, ValueError), match=f"Invalid {name}: "):
        FUNCTIONS[argument](make)


@pytest.mark.parametrize("transform", [torch.vmap, torch.func.grad, torch.func.functionalize])
def test_functions_within_a_transform(transform: Any) -> None:
    with pytest.raises(ValueError, match="Invalid A: "):
        transform(lambda values: functional.quantize_blockwise(values)[0].sum())(torch.ones(2, 300))


def test_functions_in_fake_mode() -> None:
    values = torch.ones(5000)
    codes, quantized = functional.quantize_blockwise(values)
    with FakeTensorMode(allow_non_fake_inputs=True):
        with pytest.raises(ValueError, match="Invalid out: "):
            functional.quantize_blockwise(values)
        with pytest.raises(ValueError, match="Invalid out: "):
            functional.dequantize_blockwise(codes, quantized)
    assert_same_bits(functional.dequantize_blockwise(codes, quantized), values)

"""Scaled losses: GradScaler leaves the unscaling to the step, which gives what unscaling before it would."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lion
from lion._backends import use_backend
from lion.cuda_kernels import simulator
from tests.comparing import assert_same_bits

CLASSES = [lion.Lion, lion.Lion8bit, lion.Lion32bit, lion.PagedLion, lion.PagedLion8bit, lion.PagedLion32bit]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"percentile_clipping": 5},
    {"block_wise": False},
    {"block_wise": False, "percentile_clipping": 50},
]
SIZES = (600, 7, 0)


def params(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(size, generator=generator).to(dtype)) for size in SIZES]


def set_gradients(some: list[nn.Parameter], seed: int, factor: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in some:
        p.grad = (torch.randn(p.shape, generator=generator) * factor).to(p.dtype)


def assert_same(optimizer: torch.optim.Optimizer, other: torch.optim.Optimizer) -> None:
    for p, q in zip(optimizer.param_groups[0]["params"], other.param_groups[0]["params"], strict=True):
        assert_same_bits(p, q, what="parameter")
        assert optimizer.state[p].keys() == other.state[q].keys()
        for key, value in optimizer.state[p].items():
            assert_same_bits(value, other.state[q][key], what=key)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("scale", [65536.0, 1000.0])
def test_equals_unscaling_before_the_step(cls: Any, options: dict[str, Any], backend: str, scale: float) -> None:
    ours, plain = params(), params()
    arguments = {"lr": 1e-2, "weight_decay": 0.1, "min_8bit_size": 0, **options}
    optimizer, other = cls(ours, **arguments), cls(plain, **arguments)
    scaler, other_scaler = (torch.amp.GradScaler("cpu", init_scale=scale) for _ in range(2))
    for step in range(3):
        for some, a_scaler in ((ours, scaler), (plain, other_scaler)):
            a_scaler.scale(torch.zeros(()))  # makes the scale
            set_gradients(some, step, scale)
        before = [p.grad.clone() for p in ours]
        with use_backend(backend):
            scaler.step(optimizer)
        for p, grad in zip(ours, before, strict=True):
            assert_same_bits(p.grad, grad, what="gradient")
        other_scaler.unscale_(other)
        other.step()
        scaler.update()
        other_scaler.update()
        assert_same(optimizer, other)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("cls", CLASSES)
def test_nothing_changes_where_a_gradient_is_not_finite(cls: Any, bad: float) -> None:
    ours, plain = params(), params()
    optimizer, other = (cls(some, min_8bit_size=0, percentile_clipping=5) for some in (ours, plain))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step, factor in enumerate((bad, 1.0, bad, 1.0)):
        scaler.scale(torch.zeros(()))
        set_gradients(ours, step, 1.0)
        ours[0].grad[3] *= factor
        if factor == 1.0:
            for p in ours:
                p.grad *= scaler.get_scale()
            set_gradients(plain, step, 1.0)
            other.step()
        scaler.step(optimizer)
        scaler.update()
        if factor == bad and step == 0:
            assert not optimizer.state
        else:
            assert_same(optimizer, other)
    assert scaler.get_scale() == 1.0


def test_unscaled_by_the_user_and_clipped() -> None:
    ours, plain = params(), params()
    optimizer, other = (lion.Lion8bit(some, min_8bit_size=0) for some in (ours, plain))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.zeros(()))
    set_gradients(ours, 0, 1024.0)
    set_gradients(plain, 0)
    scaler.unscale_(optimizer)
    for some in (ours, plain):
        nn.utils.clip_grad_norm_(some, 0.5)
    scaler.step(optimizer)
    other.step()
    assert_same(optimizer, other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gradients_are_unscaled_in_float32(dtype: torch.dtype) -> None:
    ours, plain = params(dtype), params(dtype)
    optimizer, other = (lion.Lion(some, betas=(0.9, 0.5)) for some in (ours, plain))
    set_gradients(ours, 0)
    for p, q in zip(ours, plain, strict=True):
        q.grad = p.grad.clone()
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(3.0), torch.tensor(0.0)
    optimizer.step()
    other.step()
    momentum, other_momentum = optimizer.state[ours[0]]["state1"], other.state[plain[0]]["state1"]
    assert_same_bits(momentum, (plain[0].grad.float() * (torch.ones(()) / 3.0)) * 0.5)
    assert not torch.equal(momentum, other_momentum)


def test_without_gradients() -> None:
    optimizer = lion.Lion(params())
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.zeros(()))
    scaler.step(optimizer)
    assert not optimizer.state


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("grad_scale", "2", TypeError),
        ("grad_scale", torch.ones(2), ValueError),
        ("found_inf", [], TypeError),
        ("found_inf", torch.zeros(3), ValueError),
    ],
)
def test_invalid_attributes(name: str, value: object, error: type[Exception]) -> None:
    some = params()
    optimizer = lion.Lion(some)
    set_gradients(some, 0)
    before = [p.detach().clone() for p in some]
    setattr(optimizer, name, value)
    with pytest.raises(error, match=f"Invalid {name}"):
        optimizer.step()
    assert all(map(torch.equal, some, before))
    assert not optimizer.state


def test_a_first_step_of_zeros_without_a_learning_rate_makes_state_only() -> None:
    ours, plain = params(), params()
    optimizer, other = (lion.Lion8bit(some, min_8bit_size=0, percentile_clipping=5) for some in (ours, plain))
    for p in ours:
        p.grad = torch.zeros_like(p)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    assert all(optimizer.state[p]["step"] == 0 for p in ours)
    optimizer.param_groups[0]["lr"] = 1e-4
    for step in range(3):
        set_gradients(ours, step)
        set_gradients(plain, step)
        optimizer.step()
        other.step()
        assert_same(optimizer, other)


@pytest.mark.skipif(not simulator.enabled(), reason=simulator.NEEDED)
def test_simulator_skips_and_unscales() -> None:
    for options in OPTIONS:
        ours, plain = params(), params()
        optimizer, other = (lion.Lion8bit(some, min_8bit_size=0, **options) for some in (ours, plain))
        for step, found in enumerate((0.0, 1.0, 0.0)):
            optimizer.grad_scale = other.grad_scale = torch.tensor(1000.0)
            optimizer.found_inf = other.found_inf = torch.tensor(found)
            set_gradients(ours, step, 1000.0)
            set_gradients(plain, step, 1000.0)
            with use_backend("cuda"):
                optimizer.step()
            with use_backend("reference"):
                other.step()
            assert_same(optimizer, other)

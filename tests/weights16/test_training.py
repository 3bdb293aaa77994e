"""Trainings of 16-bit weights: float32's to the bit with 32 master bits, the specification's with all."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import lion
from lion import reference
from lion._memory import paging
from tests.comparing import assert_same_bits, to_numpy
from tests.optimizers.support import (
    DTYPES,
    VARIANTS,
    ByHand,
    assert_unchanged,
    every_kind,
    every_variant,
    parameter,
    snapshot,
)
from tests.weights16.support import SEED, WAYS, bfloat16, both_masters, every_way, gradients, take, whole

OPTIONS = {"lr": 1e-4, "weight_decay": 0.1}
SHAPES = ((60, 90), (41,), (), (0,))


@every_variant
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_32_master_bits_train_as_float32(make, grad_dtype):
    narrow = [bfloat16(*shape, seed=i) for i, shape in enumerate(SHAPES)]
    wide = [nn.Parameter(p.detach().float()) for p in narrow]
    optimizer = make(narrow, master_weight_bits=32, percentile_clipping=90, **OPTIONS)
    expected = make(wide, percentile_clipping=90, **OPTIONS)
    for step in range(300):
        for p, q, g in zip(narrow, wide, gradients(narrow, step), strict=True):
            p.grad_dtype = grad_dtype
            p.grad = g.to(grad_dtype)
            q.grad = p.grad.float()
        optimizer.step()
        expected.step()
        for i, (p, q, value) in enumerate(zip(narrow, wide, whole(optimizer, narrow), strict=True)):
            assert_same_bits(value, q, what=f"step {step}, parameter {i}")
            for key, entry in expected.state[q].items():
                assert_same_bits(optimizer.state[p][key], entry, what=f"step {step}, parameter {i}, {key}")


def test_a_step_too_small_for_bfloat16_counts():
    """Near 1 the next bfloat16 are 1/128 and 1/256 away; a step of 1e-4 rounded to nearest is lost."""
    moved = {}
    for name, way in {"nearest": {}, **WAYS}.items():
        p = nn.Parameter(torch.ones(10_000, dtype=torch.bfloat16))
        optimizer = lion.Lion([p], lr=1e-4, **way)
        for _ in range(100):
            p.grad = torch.ones_like(p)
            optimizer.step()
        moved[name] = [float((1 - values.double()).mean()) for values in (p.detach(), *whole(optimizer, [p]))]
    assert moved["nearest"] == [0.0, 0.0]
    for name in ("24", "32"):
        assert abs(moved[name][1] - 0.01) < 100 / 512 / 256
    assert abs(moved["stochastic"][0] - 0.01) < 1e-3


def by_hand(optimizer: lion.Lion, p: nn.Parameter, weights: object) -> list[np.ndarray]:
    """Return what a step makes of a parameter and its float32 momentum, by the reference."""
    k = reference.coefficients(OPTIONS["lr"], (0.9, 0.99), OPTIONS["weight_decay"])
    momentum = optimizer.state[p]["state1"] if optimizer.state.get(p) else torch.zeros(p.shape)
    return list(reference.update_32bit(to_numpy(p), to_numpy(p.grad), to_numpy(momentum), k, weights=weights))


def test_random_bits_are_those_of_seed_step_and_place_in_the_groups():
    """Frozen parameters and such without a gradient count, and so do float32 ones."""
    params = [bfloat16(33, seed=i) for i in range(6)]
    params[1].requires_grad_(False)
    groups = [{"params": params[:2], "rounding_seed": 5}, {"params": params[2:]}]
    optimizer = lion.Lion(groups, **WAYS["stochastic"], **OPTIONS)
    counts = [0] * 6
    for step in range(8):
        for number, p in enumerate(params):
            p.grad = gradients([p], 10 * step + number)[0] if number != 1 and (step + number) % 3 else None
        expected = {}
        for number, p in enumerate(params):
            if p.grad is not None:
                counts[number] += 1
                seed = 5 if number < 2 else SEED
                expected[p] = by_hand(optimizer, p, reference.Stochastic(seed, counts[number], number))
        optimizer.step()
        for p, (new, momentum) in expected.items():
            assert_same_bits(p, new, what=f"step {step}")
            assert_same_bits(optimizer.state[p]["state1"], momentum, what=f"step {step}")


def test_a_moved_parameter_has_the_random_bits_of_its_new_place():
    p, q = bfloat16(33), bfloat16(40)
    q.requires_grad_(False)
    optimizer = lion.Lion([p, q], **WAYS["stochastic"], **OPTIONS)
    for number in (0, 1):
        p.grad = gradients([p], number)[0]
        new, _ = by_hand(optimizer, p, reference.Stochastic(SEED, number + 1, number))
        optimizer.step()
        assert_same_bits(p, new)
        optimizer.param_groups[0]["params"].reverse()


@every_way
def test_results_do_not_depend_on_the_batch(way):
    """Other parameters, of other groups, dtypes and devices of gradients, change nothing."""
    alone = [bfloat16(700, seed=i) for i in range(3)]
    one = lion.Lion(alone, **way, **OPTIONS)
    together = [bfloat16(700, seed=i) for i in range(3)]
    others = [parameter(50, dtype=torch.bfloat16), parameter(60)]
    groups = [{"params": together[:1]}, {"params": together[1:2], "betas": (0.9, 0.99)}, {"params": together[2:]}]
    many = lion.Lion([*groups, {"params": others}], **way, **OPTIONS)
    for step in range(6):
        given = gradients(alone, step)
        for p, q, g in zip(alone, together, given, strict=True):
            p.grad = q.grad = g
        for p in others:
            p.grad = torch.ones_like(p) if step % 2 else None
        one.step()
        many.step()
    for p, q in zip(alone, together, strict=True):
        assert_same_bits(q, p)


@every_way
@every_kind
def test_steps_in_backward_are_the_ordinary_ones(make, way):
    models = [nn.Sequential(nn.Linear(70, 65), nn.Tanh(), nn.Linear(65, 3)).bfloat16() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = []
    for model in models:
        layers = [{"params": model[2].parameters()}, {"params": model[0].parameters()}]
        optimizers.append(make(layers, **way, **OPTIONS))
    with lion.StepInBackward(optimizers[1]):
        for step in range(4):
            for model, optimizer in zip(models, optimizers, strict=True):
                torch.manual_seed(step)
                model(torch.randn(5, 70, dtype=torch.bfloat16)).float().square().sum().backward()
                optimizer.step()
                optimizer.zero_grad()
    for p, q in zip(*map(nn.Module.parameters, models), strict=True):
        assert_same_bits(q, p)
        assert optimizers[1].state[q].keys() == optimizers[0].state[p].keys()
        for key, value in optimizers[0].state[p].items():
            assert_same_bits(optimizers[1].state[q][key], value, what=key)


LAYOUTS = {
    "transposed": lambda values: values.t().contiguous().t(),
    "strided": lambda values: torch.stack([values, values], -1)[..., 0],
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@every_way
@every_kind
@pytest.mark.parametrize("percentile", [100, 50])
def test_the_order_in_memory_changes_nothing(make, way, layout, percentile):
    p = bfloat16(70, 65)
    q = nn.Parameter(layout(p.detach()))
    assert not q.is_contiguous()
    q.grad_dtype = torch.float32
    results = []
    for one in (p, q):
        optimizer = make([one], percentile_clipping=percentile, **way, **OPTIONS)
        take(optimizer, [one], range(3))
        results.append(optimizer.state[one])
    assert_same_bits(q, p)
    assert results[0].keys() == results[1].keys()
    for key in results[0]:
        assert_same_bits(results[1][key], results[0][key], what=key)


@every_way
@every_kind
def test_a_skipped_step_changes_nothing(make, way):
    """Nor does it draw random bits: the steps after it are as if it had not been."""
    p, q = bfloat16(5000), bfloat16(5000)
    optimizer, expected = make([p], **way, **OPTIONS), make([q], **way, **OPTIONS)
    for step in range(4):
        take(expected, [q], [step])
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        scaler.scale(torch.ones(()))
        for infinite in (True, False):
            p.grad = gradients([p], step)[0] * 1024
            if infinite:
                p.grad[7] = float("inf")
            before = snapshot(optimizer)
            scaler.step(optimizer)
            if infinite:
                assert_unchanged(optimizer, before)
                scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
                scaler.scale(torch.ones(()))
    assert_same_bits(p, q)


@every_variant
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("percentile", [100, 50])
def test_float32_gradients_of_16_bit_parameters(make, dtype, percentile):
    params = [parameter(5000, dtype=dtype, seed=0), parameter(300, dtype=dtype, seed=1)]
    copies = [ByHand.of(make, p, percentile_clipping=percentile) for p in params]
    optimizer = make(params, percentile_clipping=percentile, **OPTIONS)
    for step in range(4):
        for p, copy, g in zip(params, copies, gradients(params, step), strict=True):
            p.grad, p.grad_dtype = None, torch.float32 if step < 3 else dtype
            p.grad = g.to(p.grad_dtype)
            copy.step(p.grad, OPTIONS["lr"], weight_decay=OPTIONS["weight_decay"])
        optimizer.step()
        for p, copy in zip(params, copies, strict=True):
            copy.check(p, optimizer, f"step {step}")


@both_masters
@pytest.mark.parametrize("name", ["PagedLion", "PagedLion8bit"])
def test_lower_parts_of_large_parameters_are_paged(name, way):
    results = []
    for cls in (name, name.removeprefix("Paged")):
        params = [bfloat16(100_001), bfloat16(5000)]
        optimizer = VARIANTS[cls](params, **way, **OPTIONS)
        take(optimizer, params, range(3))
        lows = [optimizer.state[p]["master_low"] for p in params]
        assert list(map(paging.is_paged, lows)) == [cls == name, False]
        results.append([*params, *lows])
    for actual, expected in zip(*results, strict=True):
        assert_same_bits(actual, expected)

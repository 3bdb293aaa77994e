"""Every class and dtype equals the reference bit for bit over many steps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import lion
from tests import strategies
from tests.comparing import assert_same_bits
from tests.optimizers.support import (
    DTYPES,
    VARIANTS,
    ByHand,
    every_dtype,
    every_kind,
    every_variant,
    follow,
    parameter,
    set_gradients,
)

SHAPES = ((), (0,), (1,), (3, 5), (255,), (257,), (4095,), (4096,), (4097,), (65, 64), (16, 3, 9, 11))


def parameters(dtype=torch.float32):
    return [parameter(*shape, dtype=dtype, seed=i) for i, shape in enumerate(SHAPES)]


@every_variant
@every_dtype
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_twenty_steps(make, dtype, weight_decay):
    params = parameters(dtype)
    copies = {p: ByHand.of(make, p) for p in params}
    optimizer = make(params, lr=1e-3, weight_decay=weight_decay)
    follow(optimizer, copies, 20)


@every_kind
def test_every_size_is_8bit_where_asked(make):
    params = [p for p in parameters() if p.numel()]
    copies = {p: ByHand.of(make, p, min_8bit_size=0) for p in params}
    follow(make(params, lr=1e-3, min_8bit_size=0), copies, 5)


@every_kind
def test_empty_parameters_only_count(make):
    p = parameter(0, 3)
    optimizer = make([p], min_8bit_size=0)
    for _ in range(3):
        p.grad = torch.zeros_like(p)
        optimizer.step()
    assert_same_bits(optimizer.state[p]["step"], np.array(3, np.float32))
    assert optimizer.state[p]["state1"].shape == (0, 3)


@pytest.mark.parametrize("min_8bit_size", [0, 1, 4095, 4096, 4097, 5000])
def test_min_8bit_size(min_8bit_size):
    params = [parameter(n, seed=n) for n in (1, 4095, 4096, 4097)]
    copies = {p: ByHand(p, 8, min_8bit_size=min_8bit_size) for p in params}
    optimizer = lion.Lion8bit(params, min_8bit_size=min_8bit_size)
    follow(optimizer, copies, 3)
    for p in params:
        assert optimizer.state[p]["state1"].dtype == (torch.float32 if p.numel() < min_8bit_size else torch.uint8)


@pytest.mark.parametrize("cls", ["Lion8bit", "PagedLion8bit", "Lion", "PagedLion"])
def test_large_parameters(cls):
    """At least 100,000 elements, where paged state is paged."""
    make = VARIANTS[cls]
    params = [parameter(100_000), parameter(333, 333, seed=1, dtype=torch.bfloat16)]
    follow(make(params, lr=1e-3, weight_decay=0.1), {p: ByHand.of(make, p) for p in params}, 4)


@every_kind
def test_dtypes_mixed_in_a_group(make):
    params = [parameter(n, dtype=d, seed=n) for n in (100, 5000) for d in DTYPES]
    follow(make(params, lr=1e-3), {p: ByHand.of(make, p) for p in params}, 5)


@every_variant
@every_dtype
def test_any_bits(make, dtype):
    """NaN, infinities, denormals and signed zeros in parameters and gradients, with percentile clipping on and off."""
    name = str(dtype).removeprefix("torch.")

    def tensor(recipe, seed):
        array = strategies.make_floats(recipe, name, 5000, seed)
        return torch.from_numpy(array.view(f"i{array.dtype.itemsize}")).view(dtype)

    for percentile in (100, 50):
        params = [nn.Parameter(tensor(recipe, i)) for i, recipe in enumerate(strategies.RECIPES)]
        copies = {p: ByHand.of(make, p, percentile_clipping=percentile) for p in params}
        optimizer = make(params, lr=1e-2, weight_decay=0.1, percentile_clipping=percentile)
        for step in range(4):
            for i, p in enumerate(params):
                p.grad = tensor(strategies.RECIPES[(i + step) % len(strategies.RECIPES)], 100 * step + i)
                copies[p].step(p.grad, 1e-2, (0.9, 0.99), 0.1)
            optimizer.step()
            for i, p in enumerate(params):
                copies[p].check(p, optimizer, f"step {step}, {strategies.RECIPES[i]}")


@every_kind
@pytest.mark.parametrize(
    ("lr", "betas", "weight_decay"),
    [
        (0.0, (0.9, 0.99), 0.1),
        (2e-8, (0.9, 0.99), 0.0),
        (1.0, (0.0, 0.0), 0.0),
        (1e-3, (0.95, 0.98), 1.0),
        (0.5, (0.999999999, 0.9999), 4.0),
        (1, (0, 0.5), 1),
    ],
)
def test_hyperparameters(make, lr, betas, weight_decay):
    params = [parameter(5000, dtype=d, seed=i) for i, d in enumerate((torch.float32, torch.float16, torch.bfloat16))]
    copies = {p: ByHand.of(make, p) for p in params}
    follow(make(params, lr=lr, betas=betas, weight_decay=weight_decay), copies, 4)


@every_variant
def test_percentile_clipping_over_250_steps(make):
    """Past the wrap-around at 100, with outliers, zero gradients and norms that are not finite."""
    kwargs = {"percentile_clipping": 10, "lr": 1e-3}
    params = [parameter(4500), parameter(300, dtype=torch.bfloat16, seed=1), parameter(20, dtype=torch.float16, seed=2)]
    copies = {p: ByHand.of(make, p, **kwargs) for p in params}
    rng = np.random.default_rng(0)
    scales = 10.0 ** rng.uniform(-3, 0, 250)
    scales[rng.integers(0, 250, 20)] = 0.0
    scales[:2] = 0.0
    recorded = np.zeros(3, int)

    def before(i):
        if i in (30, 31, 150):
            params[0].grad.fill_(1e25)  # finite, but its square is not
        if i == 40:
            params[2].grad[3] = float("nan")
        recorded[:] += [0 < float(p.grad.double().square().sum()) < 1e38 for p in params]

    follow(make(params, **kwargs), copies, 250, before=before, scale=lambda i: float(scales[i]))
    assert (recorded > 200).all() and (recorded < 249).all()


def test_clipping_is_seen_in_the_numbers():
    """Momentum of a spike is that of a gradient as long as the smallest before it."""
    p, grad = parameter(100), torch.full((100,), 2.0)
    optimizer = lion.Lion([p], betas=(0.9, 0.5), percentile_clipping=1)
    for _ in range(50):
        p.grad = grad.clone()
        optimizer.step()
    optimizer.state[p]["state1"].zero_()
    p.grad = grad * 1000
    optimizer.step()
    torch.testing.assert_close(optimizer.state[p]["state1"], grad * 0.5)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("percentile", [1, 50, 99])
def test_percentiles(percentile, backend):
    params = [parameter(4500), parameter(70, seed=1)]
    copies = {p: ByHand(p, 8, percentile=percentile) for p in params}
    optimizer = lion.Lion8bit(params, percentile_clipping=percentile)
    with lion.use_backend(backend):
        follow(optimizer, copies, 30, scale=lambda i: 10.0 ** (i % 5 - 3))


@every_kind
def test_gradients_are_never_written(make):
    params = [parameter(5000), parameter(70, 70, dtype=torch.bfloat16, seed=1)]
    optimizer = make(params, percentile_clipping=5)
    for step in range(5):
        set_gradients(params, step, scale=10.0**step)
        before = [p.grad.clone() for p in params]
        optimizer.step()
        for p, grad in zip(params, before, strict=True):
            assert_same_bits(p.grad, grad)


@every_variant
def test_the_reference_backend_gives_the_same_bits(make):
    results = []
    for name in ("cpu", "reference"):
        params = [parameter(n, dtype=d, seed=n) for n in (0, 1, 4100) for d in (torch.float32, torch.bfloat16)]
        optimizer = make(params, lr=1e-3, weight_decay=0.1, percentile_clipping=30)
        with lion.use_backend(name):
            for step in range(6):
                set_gradients(params, step, 10.0 ** (step % 3 - 2))
                optimizer.step()
        results.append([(p, optimizer.state[p]) for p in params])
    for (p, state), (q, other) in zip(*results, strict=True):
        assert_same_bits(p, q)
        assert state.keys() == other.keys()
        for key in state:
            assert_same_bits(state[key], other[key], what=key)


def test_backend_names():
    p = parameter(3)
    p.grad = torch.ones(3)
    with pytest.raises(ValueError, match="Invalid backend: 'gpu'"), lion.use_backend("gpu"):
        pass
    optimizer = lion.Lion([p])
    with lion.use_backend("reference"), lion.use_backend("cpu"):
        optimizer.step()
    optimizer.step()


def test_backend_of_the_environment(monkeypatch):
    p = parameter(3)
    p.grad = torch.ones(3)
    monkeypatch.setenv("LION_BACKEND", "abacus")
    optimizer = lion.Lion([p])
    with pytest.raises(ValueError, match="Invalid backend: 'abacus'"):
        optimizer.step()
    copy = ByHand(p, 32)
    monkeypatch.setenv("LION_BACKEND", "reference")
    optimizer.step()
    copy.step(p.grad)
    copy.check(p, optimizer)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_number_of_threads_does_not_show(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        params = [parameter(2_000_000), parameter(5000, seed=1)]
        copies = {p: ByHand(p, 8, percentile=50) for p in params}
        follow(lion.Lion8bit(params, percentile_clipping=50), copies, 2)
    finally:
        torch.set_num_threads(before)

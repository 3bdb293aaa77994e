"""What programs do that a contiguous parameter in a list does not show."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import lion
from tests.comparing import assert_same_bits
from tests.optimizers.support import every_kind, parameter, set_gradients


def trained(make: Any, steps: int = 3) -> tuple[nn.Parameter, lion.Lion]:
    p = parameter(5000)
    optimizer = make([p], lr=1e-2, percentile_clipping=50)
    for seed in range(steps):
        set_gradients([p], seed)
        optimizer.step()
    return p, optimizer


@every_kind
def test_another_default_device(make: Any) -> None:
    expected, _ = trained(make)
    torch.set_default_device("meta")
    try:
        p = nn.Parameter(torch.empty(5000, device="cpu"))
        optimizer = make([p], lr=1e-2, percentile_clipping=50)
    finally:
        torch.set_default_device(None)
    p.data.copy_(parameter(5000).data)
    for seed in range(3):
        set_gradients([p], seed)
        torch.set_default_device("meta")
        try:
            optimizer.step()
            state = optimizer.state_dict()
            state["state"][0] = {**state["state"][0], "step": int(state["state"][0]["step"])}
            optimizer.load_state_dict(state)
            copy.deepcopy(optimizer)
        finally:
            torch.set_default_device(None)
    assert_same_bits(p.detach(), expected.detach())


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_functional_under_another_default_device(backend: str) -> None:
    grad = torch.arange(1, 101.0)
    with lion.use_backend(backend):
        expected = lion.functional.percentile_clipping(grad, torch.ones(100), 51, 5)
        histories = torch.ones(100)
        torch.set_default_device("meta")
        try:
            found = lion.functional.percentile_clipping(grad, histories, 51, 5)
            codes, state = lion.functional.quantize_blockwise(grad, blocksize=64)
            lion.functional.dequantize_blockwise(codes, state)
        finally:
            torch.set_default_device(None)
    for a, b in zip(found, expected, strict=True):
        assert_same_bits(a, b)


@every_kind
def test_gradient_with_the_negative_bit(make: Any) -> None:
    p, q = parameter(5000), parameter(5000)
    values = torch.randn(5000)
    p.grad, q.grad = torch._neg_view(values), -values
    one, other = make([p]), make([q])
    one.step()
    other.step()
    assert_same_bits(p.detach(), q.detach())
    codes, _ = lion.functional.quantize_blockwise(torch._neg_view(values))
    assert_same_bits(codes, lion.functional.quantize_blockwise(-values)[0])


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
@pytest.mark.parametrize("same_object", [True, False])
def test_parameters_in_the_same_memory_take_turns(same_object: bool) -> None:
    values = torch.randn(1 << 21)
    results = []
    for _ in range(3):
        p = nn.Parameter(values.clone())
        q = p if same_object else nn.Parameter(p.data)
        p.grad = q.grad = values.flip(0)
        optimizer = lion.Lion([p, q], lr=0.25)
        optimizer.step()
        optimizer.step()
        results.append(p.detach())
    step = 0.25 * values.flip(0).sign()
    assert_same_bits(results[0], values - step - step - step - step)
    assert_same_bits(results[0], results[1])
    assert_same_bits(results[0], results[2])


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"args": {"optim_bits": 8}}, TypeError),
        ({"lr": 10**400}, ValueError),
        ({"block_wise": torch.tensor([1, 0])}, TypeError),
        ({"betas": (torch.ones(2), 0.9)}, TypeError),
    ],
    ids=str,
)
def test_refused_arguments(arguments: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match="Invalid"):
        lion.Lion([parameter(3)], **arguments)


def test_option_removed_from_a_group() -> None:
    p = parameter(3)
    optimizer = lion.Lion([p])
    set_gradients([p], 0)
    del optimizer.param_groups[0]["is_paged"]
    with pytest.raises(ValueError, match="'is_paged' is missing"):
        optimizer.step()


@pytest.mark.parametrize(
    "call",
    [
        lambda x: lion.functional.quantize_blockwise(x, out=3),
        lambda x: lion.functional.quantize_blockwise(x, absmax=3),
        lambda x: lion.functional.quantize_blockwise(x, code=3),
        lambda x: lion.functional.dequantize_blockwise(x.byte(), quant_state=3),
        lambda x: lion.functional.percentile_clipping(x, [0] * 100, 1),
        lambda x: lion.functional.percentile_clipping(x, torch.zeros(100), 1, "5"),
    ],
)
def test_functional_refuses_other_types(call: Any) -> None:
    with pytest.raises(TypeError, match="Invalid"):
        call(torch.ones(100))


@pytest.mark.parametrize(("step", "percentile"), [(1, 5.5), (1.5, 5), (0, 5), (1, 100)])
def test_refused_percentile_leaves_the_history(step: Any, percentile: Any) -> None:
    history = torch.zeros(100)
    with pytest.raises(ValueError, match="Invalid"):
        lion.functional.percentile_clipping(torch.ones(10), history, step, percentile)
    assert not history.any()


def test_manager_refuses_other_types() -> None:
    manager = lion.GlobalOptimManager.get_instance()
    module = nn.Linear(2, 2)
    for call in (
        lambda: manager.register_parameters([{"x": 1}]),
        lambda: manager.register_parameters(module),
        lambda: manager.register_module_override(module, "weight", 5),
        lambda: manager.override_config(module.weight, key_value_dict=5),
    ):
        with pytest.raises(TypeError, match="Invalid"):
            call()

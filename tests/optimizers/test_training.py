"""What stands around an optimizer in a training loop: accumulation, clipping, averaging, compiled models."""

from __future__ import annotations

import copy
import shutil
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn

import lion
from tests.comparing import assert_same_bits
from tests.optimizers.support import ByHand, Variant, assert_unchanged, every_kind, snapshot

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = {"lr": 1e-2, "weight_decay": 0.1, "percentile_clipping": 50}


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(60, 80), nn.BatchNorm1d(80), nn.Tanh(), nn.Linear(80, 70), nn.Linear(70, 1))


def loss_of(model: nn.Module, number: int) -> Tensor:
    """Return the loss of a batch; sizes of gradients differ by orders of magnitude."""
    x = torch.randn(8, 60, generator=torch.Generator().manual_seed(number))
    return model(x).square().sum() * 10.0 ** (number % 3)


def copies_of(make: Variant, params: list[Tensor]) -> list[ByHand]:
    return [ByHand.of(make, p, **OPTIONS) for p in params]


def step_and_check(optimizer: lion.Lion, params: list[Tensor], copies: list[ByHand], grads: list[Tensor]) -> None:
    """Take a step by the optimizer, and by hand with these gradients, and compare."""
    group = optimizer.param_groups[0]
    lr = float(group["lr"])
    optimizer.step()
    for p, hand, grad in zip(params, copies, grads, strict=True):
        hand.step(grad, lr, group["betas"], group["weight_decay"])
        hand.check(p, optimizer)


@every_kind
def test_accumulation(make: Variant) -> None:
    model = make_model()
    params = list(model.parameters())
    optimizer, copies = make(params, **OPTIONS), copies_of(make, params)
    for step in range(4):
        sums = [torch.zeros_like(p) for p in params]
        for number in range(4 * step, 4 * step + 4):
            twin = copy.deepcopy(model)
            for total, grad in zip(
                sums, torch.autograd.grad(loss_of(twin, number) / 4, twin.parameters()), strict=True
            ):
                total += grad
            (loss_of(model, number) / 4).backward()
        step_and_check(optimizer, params, copies, sums)
        for p, total in zip(params, sums, strict=True):
            assert_same_bits(p.grad, total)
        optimizer.zero_grad()


@every_kind
@pytest.mark.parametrize("foreach", [True, False])
def test_clipping_by_the_norm_of_all_gradients(make: Variant, foreach: bool) -> None:
    model = make_model()
    params = list(model.parameters())
    optimizer, copies = make(params, **OPTIONS), copies_of(make, params)
    scales = []
    for number in range(4):
        twin = copy.deepcopy(model)
        grads = torch.autograd.grad(loss_of(twin, number), twin.parameters())
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(grad) for grad in grads]))
        scales.append((50.0 / (norm + 1e-6)).clamp(max=1.0))
        loss_of(model, number).backward()
        nn.utils.clip_grad_norm_(params, 50.0, foreach=foreach)
        step_and_check(optimizer, params, copies, [grad * scales[-1] for grad in grads])
        optimizer.zero_grad()
    assert min(scales) < 0.5 < 1.0 == max(scales)


@every_kind
@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize("average", ["mean", "exponential"])
def test_averaged_models(make: Variant, in_backward: bool, average: str) -> None:
    model = make_model()
    params = list(model.parameters())
    optimizer, copies = make(params, **OPTIONS), copies_of(make, params)
    function = get_ema_multi_avg_fn(0.9) if average == "exponential" else None
    averaged, by_hand = (AveragedModel(model, multi_avg_fn=function) for _ in range(2))
    schedule = SWALR(optimizer, swa_lr=1e-3, anneal_epochs=3)
    if in_backward:
        lion.StepInBackward(optimizer)
    for number in range(5):
        twin = copy.deepcopy(model)
        grads = torch.autograd.grad(loss_of(twin, number), twin.parameters())
        loss_of(model, number).backward()
        step_and_check(optimizer, params, copies, grads)
        optimizer.zero_grad()
        schedule.step()
        averaged.update_parameters(model)
        for p, hand in zip(twin.parameters(), copies, strict=True):
            p.data = torch.from_numpy(hand.param)
        by_hand.update_parameters(twin)
    assert optimizer.param_groups[0]["lr"] == 1e-3
    for found, wanted in zip(averaged.module.parameters(), by_hand.module.parameters(), strict=True):
        assert_same_bits(found, wanted)
    # The schedule's own key of the groups survives a checkpoint.
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["swa_lr"] == 1e-3
    other = make(params, **OPTIONS)
    other.load_state_dict(saved)
    assert_unchanged(other, snapshot(optimizer))


def has_compiler() -> bool:
    return any(map(shutil.which, ("g++", "clang++", "cl")))


@every_kind
@pytest.mark.parametrize("in_backward", [False, True])
def test_compiled_model(make: Variant, in_backward: bool) -> None:
    # This backend computes as the model does without it, so all bits are comparable.
    runs: list[lion.Lion] = []
    for compiled in (False, True):
        torch.compiler.reset()
        model = make_model()
        optimizer = make(model.parameters(), **OPTIONS)
        called: Any = torch.compile(model, backend="aot_eager") if compiled else model
        if in_backward and compiled:
            lion.StepInBackward(optimizer)
        for number in range(4):
            loss_of(called, number).backward()
            optimizer.step()
            optimizer.zero_grad()
        runs.append(optimizer)
    assert_unchanged(runs[1], snapshot(runs[0]))


@pytest.mark.skipif(not has_compiler(), reason="torch.compile needs a C++ compiler")
def test_model_compiled_to_machine_code() -> None:
    make = Variant(lion.Lion8bit, {})
    torch.compiler.reset()
    model = make_model()
    compiled = torch.compile(model)
    params = list(compiled.parameters())
    optimizer, copies = make(params, **OPTIONS), copies_of(make, params)
    for number in range(4):
        loss_of(compiled, number).backward()
        step_and_check(optimizer, params, copies, [p.grad.clone() for p in params])
        optimizer.zero_grad()
    assert {state["state1"].dtype for state in optimizer.state.values()} == {torch.uint8, torch.float32}

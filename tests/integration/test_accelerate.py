"""accelerate: the steps of a loop by hand, and the same bits after a stop."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lion
from tests.comparing import assert_same_bits
from tests.integration.support import CHOSEN, OPTIONS, make_data, make_model
from tests.optimizers.support import Variant, assert_unchanged, snapshot

accelerate = pytest.importorskip("accelerate")
pytestmark = pytest.mark.usefixtures("one_thread")

some_classes = pytest.mark.parametrize("make", CHOSEN.values(), ids=CHOSEN.keys())


@pytest.fixture(autouse=True)
def no_state_left() -> Iterator[None]:
    """accelerate keeps its settings in the process."""
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def train(make: Variant, steps: range, max_norm: float | None, folder: Path | None, **settings: Any) -> Any:
    """Take steps with accelerate, on from the checkpoint where there is one."""
    accelerator = accelerate.Accelerator(cpu=True, **settings)
    module = make_model()
    optimizer = make(module.parameters(), **OPTIONS)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=8)
    model, optimizer, schedule = accelerator.prepare(module, optimizer, schedule)
    if folder is not None and folder.exists():
        accelerator.load_state(folder)
    for x, y in make_data()[steps.start : steps.stop]:
        with accelerator.accumulate(model):
            accelerator.backward(nn.functional.mse_loss(model(x), y))
            if accelerator.sync_gradients and max_norm is not None:
                accelerator.clip_grad_norm_(model.parameters(), max_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    if folder is not None:
        accelerator.save_state(folder)
    return optimizer


@some_classes
@pytest.mark.parametrize(
    ("max_norm", "settings"),
    [
        (None, {}),
        (0.1, {}),
        (None, {"gradient_accumulation_steps": 2}),
        (None, {"mixed_precision": "bf16"}),
        (0.1, {"gradient_accumulation_steps": 2, "mixed_precision": "bf16"}),
    ],
    ids=str,
)
def test_equals_a_loop_by_hand(make: Variant, max_norm: float | None, settings: dict[str, Any]) -> None:
    optimizer = train(make, range(16), max_norm, None, **settings)

    accumulated = settings.get("gradient_accumulation_steps", 1)
    model = make_model()
    by_hand = make(model.parameters(), **OPTIONS)
    schedule = torch.optim.lr_scheduler.LinearLR(by_hand, 1.0, 0.1, total_iters=8)
    for number, (x, y) in enumerate(make_data()[:16], 1):
        with torch.autocast("cpu", torch.bfloat16, enabled="mixed_precision" in settings):
            output = model(x)
        (nn.functional.mse_loss(output.float(), y) / accumulated).backward()
        if number % accumulated == 0:
            if max_norm is not None:
                assert nn.utils.clip_grad_norm_(model.parameters(), max_norm) > max_norm
            by_hand.step()
            schedule.step()
            by_hand.zero_grad()
    assert_unchanged(optimizer.optimizer, snapshot(by_hand))


@some_classes
def test_stop_and_resume(make: Variant, tmp_path: Path) -> None:
    settings = {"gradient_accumulation_steps": 2}
    whole = train(make, range(16), 0.1, None, **settings)
    train(make, range(6), 0.1, tmp_path / "saved", **settings)
    resumed = train(make, range(6, 16), 0.1, tmp_path / "saved", **settings)
    assert_unchanged(resumed.optimizer, snapshot(whole.optimizer))


@some_classes
def test_state_dict_of_the_wrapper(make: Variant) -> None:
    optimizer = train(make, range(4), None, None)
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        assert state["state1"].dtype in (torch.float32, torch.uint8)
    before = snapshot(optimizer.optimizer)
    optimizer.load_state_dict(saved)
    assert_unchanged(optimizer.optimizer, before)
    # A wrapper made for a trained optimizer passes its state through load_state_dict.
    again = accelerate.Accelerator(cpu=True).prepare(optimizer.optimizer)
    assert_unchanged(again.optimizer, before)


@pytest.mark.parametrize("unscale_first", [False, True])
@pytest.mark.parametrize("finite", [True, False])
@some_classes
def test_gradient_scaler(make: Variant, finite: bool, unscale_first: bool) -> None:
    # An Accelerator makes a scaler for GPUs only.
    accelerate.Accelerator(cpu=True)
    model = make_model()
    optimizer = accelerate.optimizer.AcceleratedOptimizer(
        make(model.parameters(), **OPTIONS), scaler=(scaler := torch.amp.GradScaler("cpu", init_scale=1024.0))
    )
    by_hand = make((other := copy.deepcopy(model)).parameters(), **OPTIONS)
    if unscale_first:
        optimizer.optimizer.unscales_in_step = False
    x, y = make_data()[0]
    torch.manual_seed(2)
    scaler.scale(nn.functional.mse_loss(model(x), y)).backward()
    if not finite:
        model[0].weight.grad[1, 2] = float("inf")
    optimizer.step()
    if finite:
        torch.manual_seed(2)
        nn.functional.mse_loss(other(x), y).backward()
        by_hand.step()
    assert scaler.get_scale() == (1024.0 if finite else 512.0)
    # A skip within the step is not seen by accelerate; docs/trainers.md says what to do.
    assert optimizer.step_was_skipped == (unscale_first and not finite)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert_same_bits(p, q)
        assert finite == ("step" in by_hand.state[q]) == bool(optimizer.state[p].get("step", 0))
        for key, value in by_hand.state[q].items():
            assert_same_bits(optimizer.state[p][key], value, what=key)


def test_the_wrapper_is_not_stepped_in_backward() -> None:
    optimizer = accelerate.Accelerator(cpu=True).prepare(lion.Lion(make_model().parameters()))
    with pytest.raises(TypeError, match="Invalid optimizer: AcceleratedOptimizer"):
        lion.StepInBackward(optimizer)
    lion.StepInBackward(optimizer.optimizer)

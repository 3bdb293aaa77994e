"""Schedules to their ends: what rounding leaves below 0 is 0, what a schedule writes can be saved."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim import lr_scheduler as schedulers

import lion
from lion import exchange
from tests.comparing import assert_same_bits
from tests.optimizers.support import (
    ByHand,
    Variant,
    assert_unchanged,
    every_class,
    every_kind,
    parameter,
    set_gradients,
    snapshot,
)

Schedule = Callable[[torch.optim.Optimizer, int], Any]
SCHEDULES: dict[str, Schedule] = {
    "LinearLR": lambda o, n: schedulers.LinearLR(o, 0.01, 0.0, n),
    "LinearLR from a third": lambda o, n: schedulers.LinearLR(o, 1 / 3, 0.0, n),
    "LinearLR from one": lambda o, n: schedulers.LinearLR(o, 1.0, 0.0, n),
    "PolynomialLR": lambda o, n: schedulers.PolynomialLR(o, n, 1.0),
    "CosineAnnealingLR": lambda o, n: schedulers.CosineAnnealingLR(o, n),
    "CosineAnnealingWarmRestarts": lambda o, n: schedulers.CosineAnnealingWarmRestarts(o, n),
    "OneCycleLR": lambda o, n: schedulers.OneCycleLR(o, 0.1, total_steps=n + 2, anneal_strategy="linear"),
    "CyclicLR": lambda o, n: schedulers.CyclicLR(o, 0.0, 0.1, n),
    "LambdaLR": lambda o, n: schedulers.LambdaLR(o, lambda epoch: 1 - sum([1 / n] * min(epoch, n))),
    "MultiplicativeLR": lambda o, n: schedulers.MultiplicativeLR(o, lambda epoch: 1 - 1 / max(1, n + 1 - epoch)),
    "SequentialLR": lambda o, n: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, 0.1, 1.0, n // 2), schedulers.LinearLR(o, 1 / 3, 0.0, n - n // 2)], [n // 2]
    ),
    "ChainedScheduler": lambda o, n: schedulers.ChainedScheduler(
        [schedulers.LinearLR(o, 1 / 3, 0.0, n), schedulers.ExponentialLR(o, 0.99)]
    ),
}
NUMBERS = {"float": float, "float64": lambda lr: torch.tensor(lr, dtype=torch.float64), "float32": torch.tensor}


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_ends(name: str, number: str) -> None:
    if (name, number) == ("CyclicLR", "float64"):
        number = "float"  # torch's CyclicLR takes no tensor of float64
    for steps in (2, 3, 7, 10, 29, 58):
        p = parameter(3)
        optimizer = lion.Lion([p], lr=NUMBERS[number](1e-2))
        schedule = SCHEDULES[name](optimizer, steps)
        for seed in range(steps + 1):
            set_gradients([p], seed)
            optimizer.step()
            schedule.step()
            saved = optimizer.state_dict()
        set_gradients([p], 0)
        optimizer.step()
        lion.Lion([parameter(3)]).load_state_dict(saved)


def linear_to_its_end(make: Variant, **options: Any) -> lion.Lion:
    """Return an optimizer whose rate a schedule has brought to a little less than 0."""
    optimizer = make([parameter(5000)], **options)
    schedule = schedulers.LinearLR(optimizer, 0.01, 0.0, 58)
    for seed in range(58):
        set_gradients(optimizer.param_groups[0]["params"], seed)
        optimizer.step()
        schedule.step()
    assert -1e-20 < optimizer.param_groups[0]["lr"] < 0
    return optimizer


@every_kind
def test_a_step_at_a_rate_that_rounding_left_below_0_is_one_at_0(make: Variant) -> None:
    optimizer = linear_to_its_end(make, lr=1e-4, weight_decay=0.1)
    other = copy.deepcopy(optimizer)
    other.param_groups[0]["lr"] = 0.0
    [p], [q] = optimizer.param_groups[0]["params"], other.param_groups[0]["params"]
    before = p.detach().clone()
    for seed in range(2):
        set_gradients([p], 100 + seed)
        q.grad = p.grad.clone()
        optimizer.step()
        other.step()
    assert_same_bits(p, before)
    for key, value in optimizer.state[p].items():
        assert_same_bits(value, other.state[q][key], what=key)


@every_class
def test_its_checkpoint_loads(cls: type[lion.Lion]) -> None:
    optimizer = linear_to_its_end(Variant(cls, {}), lr=1e-4)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = cls([parameter(5000)])
    other.load_state_dict(torch.load(file))
    assert other.param_groups[0]["lr"] == 0
    there = exchange.to_exp_avg(optimizer.state_dict(), [{**optimizer.state_dict()["param_groups"][0]}])
    other.load_state_dict(exchange.from_exp_avg(there))
    other.add_param_group({**optimizer.param_groups[0], "params": [parameter(2)]})
    assert other.param_groups[1]["lr"] == 0
    set_gradients(other.param_groups[0]["params"], 0)
    other.step()


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_steps_in_backward() -> None:
    model = torch.nn.Linear(3, 3)
    optimizer = lion.Lion(model.parameters(), lr=1e-4)
    schedule = schedulers.LinearLR(optimizer, 0.01, 0.0, 58)
    with lion.StepInBackward(optimizer):
        for _ in range(58):
            model(torch.ones(3)).sum().backward()
            schedule.step()
        assert -1e-20 < optimizer.param_groups[0]["lr"] < 0
        before = model.weight.detach().clone()
        model(torch.ones(3)).sum().backward()
    assert_same_bits(model.weight, before)


def test_a_schedule_without_a_scheduler() -> None:
    p = parameter(3)
    optimizer = lion.Lion([p], lr=1e-3)
    for seed in range(11):
        set_gradients([p], seed)
        optimizer.step()
        optimizer.param_groups[0]["lr"] -= 1e-4
    assert optimizer.param_groups[0]["lr"] < -1e-5
    with pytest.raises(ValueError, match="Invalid learning rate"):
        optimizer.step()
    optimizer.param_groups[0]["lr"] += 1e-4
    assert -1e-18 < optimizer.param_groups[0]["lr"] < 0
    before = p.detach().clone()
    optimizer.step()
    assert_same_bits(p, before)


def test_a_tensor_of_fewer_bits() -> None:
    lr = torch.tensor(1e-2)
    p = parameter(3)
    optimizer = lion.Lion([p], lr=lr)
    optimizer.param_groups[0]["initial_lr"] = torch.tensor(1e-2)
    lr.fill_(-1e-9)
    set_gradients([p], 0)
    before = p.detach().clone()
    optimizer.step()
    assert_same_bits(p, before)
    assert optimizer.param_groups[0]["lr"] is lr
    lr.fill_(-1e-7)
    with pytest.raises(ValueError, match="Invalid learning rate: -1.*group 0"):
        optimizer.step()


@pytest.mark.parametrize("noted", [{}, {"initial_lr": 1e-2}, {"initial_lr": 1e-2, "max_lr": 1.0}, {"initial_lr": 0.0}])
def test_the_largest_rate_tells_what_rounding_is(noted: dict[str, float]) -> None:
    """It is the larger of `initial_lr` and `max_lr` in the group, or 1 without them."""
    limit = max(noted.values(), default=1.0) * 2.0**-40
    p = parameter(3)
    optimizer = lion.Lion([{"params": [p], **noted}])
    saved = optimizer.state_dict()
    set_gradients([p], 0)
    optimizer.step()
    for lr, refused in ((-limit, False), (np.nextafter(-limit, -1), True), (-0.5, True), (float("-inf"), True)):
        optimizer.param_groups[0]["lr"] = saved["param_groups"][0]["lr"] = lr
        calls: list[Callable[[], Any]] = [
            optimizer.step,
            lambda saved=saved: lion.Lion([parameter(3)]).load_state_dict(saved),
            lambda lr=lr: lion.Lion([{"params": [parameter(3)], **noted, "lr": lr}]),
            lambda saved=saved: exchange.from_exp_avg({**saved, "state": {}}),
        ]
        for call in calls:
            before = snapshot(optimizer)
            if refused:
                with pytest.raises(ValueError, match="earning rate: -"):
                    call()
                assert_unchanged(optimizer, before)
            else:
                call()


# --- numbers of NumPy


def saved_and_read(optimizer: lion.Lion) -> Any:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file)


@every_class
@pytest.mark.parametrize("number", [np.float64, np.float32, np.array], ids=lambda number: number.__name__)
def test_numbers_of_numpy_are_saved_as_numbers(cls: type[lion.Lion], number: Any) -> None:
    p = parameter(600)
    optimizer = cls([p], lr=1e-2)
    by_hand = ByHand(p, 32)
    for i in range(3):
        group = optimizer.param_groups[0]
        group["lr"] = number(1e-2 * np.cos(0.25 * i))
        group["betas"] = (number(0.5), number(0.75))
        group["weight_decay"] = number(0.125)
        group["initial_lr"] = number(0.25)
        group["mine"] = {"warmup": [number(3.0)], "names": ("a", "b")}
        set_gradients([p], i)
        by_hand.step(p.grad, float(group["lr"]), (0.5, 0.75), 0.125)
        optimizer.step()
        by_hand.check(p, optimizer)
    saved = saved_and_read(optimizer)["param_groups"][0]
    assert (saved["betas"], saved["weight_decay"], saved["initial_lr"]) == ((0.5, 0.75), 0.125, 0.25)
    assert saved["mine"] == {"warmup": [3.0], "names": ("a", "b")}
    assert type(saved["lr"]) is float and saved["lr"] == float(optimizer.param_groups[0]["lr"])
    assert isinstance(optimizer.param_groups[0]["lr"], (np.generic, np.ndarray))
    other = cls([parameter(600)])
    other.load_state_dict(saved_and_read(optimizer))
    assert other.param_groups[0]["lr"] == saved["lr"]


def test_options_of_numpy_are_saved_as_numbers() -> None:
    optimizer = lion.Lion([parameter(3)])
    numbers = {"optim_bits": np.int64(8), "min_8bit_size": np.int32(7), "block_wise": np.False_}
    optimizer.param_groups[0].update(numbers, percentile_clipping=np.array(5), table=np.arange(3))
    file = io.BytesIO()
    saved = optimizer.state_dict()["param_groups"][0]
    assert np.array_equal(saved.pop("table"), np.arange(3))  # an array stays one
    torch.save(saved, file)
    file.seek(0)
    assert torch.load(file) == {
        **{key: value.item() for key, value in numbers.items()},
        **{"params": [0], "lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0.0},
        **{"percentile_clipping": 5, "is_paged": False},
        **{"master_weight_bits": None, "stochastic_rounding": False, "rounding_seed": 0},
    }


def test_a_hook_may_return_anything_as_the_state_dict() -> None:
    p = parameter(5)
    optimizer = lion.Lion([p])
    optimizer.param_groups[0]["lr"] = np.float64(0.5)
    handle = optimizer.register_state_dict_post_hook(lambda _, saved: {"optimizer": saved, "format": 2})
    assert optimizer.state_dict().keys() == {"optimizer", "format"}
    handle.remove()
    optimizer.register_state_dict_post_hook(lambda _, saved: {**saved, "format": 2})
    saved = optimizer.state_dict()
    assert saved["format"] == 2 and type(saved["param_groups"][0]["lr"]) is float

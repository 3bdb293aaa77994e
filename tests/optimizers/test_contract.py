"""What torch promises of any optimizer: closures, hooks, groups, schedulers, parameters that come and go."""

from __future__ import annotations

import copy
import gc
import os
import re
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import lion
from tests.comparing import assert_same_bits
from tests.optimizers.support import (
    KINDS,
    ByHand,
    assert_unchanged,
    every_class,
    every_kind,
    follow,
    parameter,
    set_gradients,
    snapshot,
)

# --- closures


@every_class
def test_closure(cls):
    p = parameter(5000)
    by_hand = ByHand(p, 8 if "8bit" in cls.__name__ else 32)
    optimizer = cls([p], lr=1e-2)
    calls = []

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        calls.append(loss)
        return loss

    for _ in range(5):
        before = p.detach().clone()
        returned = optimizer.step(closure)
        assert returned is calls[-1]
        assert_same_bits(returned, (before**2).sum())
        by_hand.step(2 * before, 1e-2)
        by_hand.check(p, optimizer)
    assert len(calls) == 5
    with torch.no_grad():
        optimizer.step(closure=closure)
    assert len(calls) == 6


@every_kind
def test_step_returns_nothing_without_closure(make):
    p = parameter(3)
    p.grad = torch.ones(3)
    assert make([p]).step() is None


@every_kind
def test_closure_that_fails(make):
    p = parameter(5000)
    optimizer = make([p])
    follow(optimizer, {p: ByHand.of(make, p)}, 2)
    before = snapshot(optimizer)

    def closure():
        raise ArithmeticError("loss")

    with pytest.raises(ArithmeticError, match="loss"):
        optimizer.step(closure)
    assert_unchanged(optimizer, before)


def test_training_converges():
    """A small regression, where a plain step in the sign's direction is known to work."""
    torch.manual_seed(0)
    x = torch.randn(256, 20)
    y = x @ torch.randn(20, 1)
    for make in KINDS.values():
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 1))
        optimizer = make(model.parameters(), lr=1e-2, min_8bit_size=0)
        scheduler = lr_scheduler.CosineAnnealingLR(optimizer, 100)
        losses = []
        for _ in range(100):
            loss = nn.functional.mse_loss(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())
        assert losses[-1] < 0.05 * losses[0]


# --- hooks


@every_kind
def test_step_hooks(make):
    p = parameter(5000)
    optimizer = make([p])
    seen = []
    pre = optimizer.register_step_pre_hook(lambda opt, args, kwargs: seen.append(("pre", opt, p.detach().clone())))
    post = optimizer.register_step_post_hook(lambda opt, args, kwargs: seen.append(("post", opt, p.detach().clone())))
    p.grad = torch.ones(5000)
    before = p.detach().clone()
    optimizer.step()
    assert [(name, opt) for name, opt, _ in seen] == [("pre", optimizer), ("post", optimizer)]
    assert_same_bits(seen[0][2], before)
    assert_same_bits(seen[1][2], p)
    pre.remove()
    post.remove()
    optimizer.step()
    assert len(seen) == 2


@every_kind
def test_a_pre_hook_may_replace_the_arguments_and_the_gradient(make):
    p = parameter(5000)
    by_hand = ByHand.of(make, p)
    optimizer = make([p])

    def hook(opt, args, kwargs):
        p.grad = torch.full((5000,), -2.0)
        return (opt, lambda: 42), {}

    optimizer.register_step_pre_hook(hook)
    p.grad = torch.ones(5000)
    assert optimizer.step() == 42
    by_hand.step(torch.full((5000,), -2.0))
    by_hand.check(p, optimizer)


def test_global_step_hooks():
    p = parameter(3)
    p.grad = torch.ones(3)
    optimizer = lion.Lion([p])
    seen = []
    handles = [
        register_optimizer_step_pre_hook(lambda opt, args, kwargs: seen.append("pre")),
        register_optimizer_step_post_hook(lambda opt, args, kwargs: seen.append("post")),
    ]
    try:
        optimizer.step()
    finally:
        for handle in handles:
            handle.remove()
    assert seen == ["pre", "post"]


@every_kind
def test_hooks_that_a_closure_adds_are_called_after_its_step(make):
    p = parameter(3)
    optimizer = make([p])
    seen = []

    def closure():
        handles.append(optimizer.register_step_post_hook(lambda *_: seen.append("own")))
        handles.append(register_optimizer_step_post_hook(lambda *_: seen.append("global")))
        return 1.0

    for arguments, keywords in (((closure,), {}), ((), {"closure": closure})):
        handles = []
        try:
            optimizer.step(*arguments, **keywords)
        finally:
            for handle in handles:
                handle.remove()
        assert seen == ["own", "global"]
        seen.clear()


@pytest.mark.parametrize("profile", [torch.profiler.profile, torch.autograd.profiler.profile])
@every_kind
def test_a_profile_shows_steps(make, profile):
    p = parameter(3)
    p.grad = torch.ones(3)
    optimizer = make([p])
    optimizer.step()
    with profile() as seen:
        optimizer.step()
    optimizer.step()
    shown = [(event.key, event.count) for event in seen.key_averages() if event.key.startswith("Optimizer.step")]
    assert shown == [(f"Optimizer.step#{type(optimizer).__name__}.step", 1)]


@every_kind
def test_state_dict_hooks(make):
    p = parameter(5000)
    optimizer = make([p])
    p.grad = torch.ones(5000)
    optimizer.step()
    seen = []

    def post(opt, state_dict):
        seen.append("post")
        state_dict["extra"] = 1

    optimizer.register_state_dict_pre_hook(lambda opt: seen.append("pre"))
    optimizer.register_state_dict_post_hook(post)
    optimizer.register_state_dict_post_hook(lambda opt, state_dict: {**state_dict, "more": 2})
    saved = optimizer.state_dict()
    assert seen == ["pre", "post"]
    assert (saved["extra"], saved["more"]) == (1, 2)


@every_kind
def test_load_state_dict_hooks(make):
    p = parameter(5000)
    optimizer = make([p], lr=1.0)
    p.grad = torch.ones(5000)
    optimizer.step()
    saved = optimizer.state_dict()
    untouched = copy.deepcopy(saved)
    seen = []

    def pre(opt, state_dict):
        seen.append(("pre", opt.param_groups[0]["lr"]))
        state_dict["param_groups"] = [{**state_dict["param_groups"][0], "lr": 0.5}]

    def replace(opt, state_dict):
        seen.append(("replace", state_dict["param_groups"][0]["lr"]))
        return {**state_dict, "param_groups": [{**state_dict["param_groups"][0], "weight_decay": 0.25}]}

    optimizer.register_load_state_dict_pre_hook(pre)
    optimizer.register_load_state_dict_pre_hook(replace)
    optimizer.register_load_state_dict_pre_hook(lambda opt, sd: seen.append(("first", None)), prepend=True)
    optimizer.register_load_state_dict_post_hook(lambda opt: seen.append(("post", opt.param_groups[0]["lr"])))
    handle = optimizer.register_load_state_dict_post_hook(lambda opt: seen.append(("removed", None)))
    handle.remove()
    optimizer.load_state_dict(saved)
    assert seen == [("first", None), ("pre", 1.0), ("replace", 0.5), ("post", 0.5)]
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["weight_decay"]) == (0.5, 0.25)
    assert saved["param_groups"] == untouched["param_groups"]


# --- parameter groups


@every_kind
def test_options_by_group(make):
    groups = [
        {"params": [parameter(5000, seed=1), parameter(10, seed=2)], "lr": 1e-2},
        {"params": [parameter(5000, seed=3)], "betas": (0.5, 0.75), "weight_decay": 0.5},
        {"params": parameter(300, seed=4), "lr": 0.1, "min_8bit_size": 256},
        {"params": (parameter(300, seed=5),), "optim_bits": 8, "min_8bit_size": 0, "percentile_clipping": 30},
        {"params": [parameter(300, seed=6)], "optim_bits": 8, "min_8bit_size": 0, "block_wise": False},
        {"params": [parameter(5000, seed=7)], "optim_bits": 32},
    ]
    copies = {}
    for group in groups:
        params = [group["params"]] if isinstance(group["params"], torch.Tensor) else group["params"]
        options = {key: value for key, value in group.items() if key not in ("params", "lr", "betas", "weight_decay")}
        copies.update({p: ByHand.of(make, p, **options) for p in params})
    follow(make(groups, lr=1e-3, weight_decay=0.1), copies, 8)


@every_kind
def test_add_param_group(make):
    first, second, third = (parameter(5000, seed=i) for i in range(3))
    optimizer = make([first], lr=1e-2, weight_decay=0.1)
    copies = {first: ByHand.of(make, first)}
    follow(optimizer, copies, 2)
    optimizer.add_param_group({"params": second})
    copies[second] = ByHand.of(make, second)
    follow(optimizer, copies, 2)
    optimizer.add_param_group({"params": [third], "lr": 1e-3, "betas": (0.5, 0.5), "percentile_clipping": 50})
    copies[third] = ByHand.of(make, third, percentile_clipping=50)
    follow(optimizer, copies, 3)
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 1, 1]
    assert optimizer.param_groups[1]["lr"] == 1e-2
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": third})
    with pytest.raises(TypeError):
        optimizer.add_param_group([third])
    follow(optimizer, copies, 2)


@every_kind
def test_options_changed_in_a_group_count_from_the_next_step(make):
    params = [parameter(5000), parameter(300, dtype=torch.bfloat16, seed=1)]
    copies = {p: ByHand.of(make, p) for p in params}
    optimizer = make(params, lr=1e-2)
    group = optimizer.param_groups[0]
    changes = [{"lr": 1e-3}, {"betas": (0.5, 0.6)}, {"weight_decay": 0.5}, {"lr": 0.0}, {"lr": 1, "betas": [0.1, 0.2]}]

    def before(i):
        group.update(changes[i] if i < len(changes) else {})

    follow(optimizer, copies, 7, before=before)


def test_state_options_changed_in_a_group_convert_the_state():
    p = parameter(5000)
    by_hand = ByHand(p, 8)
    optimizer = lion.Lion8bit([p])
    follow(optimizer, {p: by_hand}, 3)
    values = lion.functional.dequantize_blockwise(
        optimizer.state[p]["state1"], absmax=optimizer.state[p]["absmax1"], blocksize=256
    )
    optimizer.param_groups[0]["optim_bits"] = 32
    wide = ByHand(p, 32)
    wide.momentum, wide.steps = values.numpy(), 3
    follow(optimizer, {p: wide}, 3)
    optimizer.param_groups[0]["percentile_clipping"] = 20
    wide.percentile = 20
    follow(optimizer, {p: wide}, 3)
    optimizer.param_groups[0].update(optim_bits=8, percentile_clipping=100)
    codes, quantized = lion.functional.quantize_blockwise(optimizer.state[p]["state1"], blocksize=256)
    narrow = ByHand(p, 8)
    narrow.codes, narrow.absmax, narrow.steps = codes.numpy(), quantized.absmax.numpy(), 9
    follow(optimizer, {p: narrow}, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": -1}, "Invalid learning rate: -1"),
        ({"lr": float("nan")}, "Invalid learning rate: nan"),
        ({"lr": 1e300}, "Invalid learning rate: 1e[+]300"),
        ({"betas": (0.9, 1.5)}, "Invalid beta parameter at index 1: 1.5"),
        ({"weight_decay": -1}, "Invalid weight_decay value: -1"),
        ({"percentile_clipping": 0}, "Invalid percentile_clipping value: 0"),
        ({"optim_bits": 16}, "Invalid optim_bits value: 16"),
        ({"min_8bit_size": -1}, "Invalid min_8bit_size value: -1"),
    ],
    ids=lambda v: str(v) if isinstance(v, dict) else "",
)
@pytest.mark.parametrize("steps", [0, 2])
@every_kind
def test_invalid_option_in_a_group_changes_nothing(make, change, message, steps):
    """The first group is fine, the second is not: neither moves."""
    params = [parameter(5000), parameter(5000, seed=1)]
    optimizer = make([{"params": params[:1]}, {"params": params[1:]}], percentile_clipping=50)
    follow(optimizer, {p: ByHand.of(make, p, percentile_clipping=50) for p in params}, steps)
    set_gradients(params, 7)
    fine = dict(optimizer.param_groups[1])
    optimizer.param_groups[1].update(change)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert_unchanged(optimizer, before)
    optimizer.param_groups[1].update(fine)
    optimizer.step()
    assert all(optimizer.state[p]["step"] == steps + 1 for p in params)


@every_kind
def test_groups_rearranged_between_steps(make):
    """A group's dictionary replaced, a parameter moved to another group, a group removed."""
    params = [parameter(5000, seed=i) for i in range(4)]
    copies = {p: ByHand.of(make, p) for p in params}
    optimizer = make([{"params": params[:2], "lr": 1e-2}, {"params": params[2:], "lr": 1e-3}])
    follow(optimizer, copies, 2)
    optimizer.param_groups[0] = {**optimizer.param_groups[0], "lr": 0.1}
    follow(optimizer, copies, 2)
    optimizer.param_groups[1]["params"].insert(0, optimizer.param_groups[0]["params"].pop())
    follow(optimizer, copies, 2)
    optimizer.param_groups = [dict(group, lr=group["lr"] / 2) for group in optimizer.param_groups]
    follow(optimizer, copies, 2)
    gone = optimizer.param_groups.pop()["params"]
    for p in gone:
        del copies[p]
        p.grad = torch.ones_like(p)
    before = [p.detach().clone() for p in gone]
    follow(optimizer, copies, 2)
    for p, value in zip(gone, before, strict=True):
        assert_same_bits(p, value)


def test_named_parameters():
    model = nn.Linear(3, 2)
    optimizer = lion.Lion(model.named_parameters())
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["param_names"] == ["weight", "bias"]
    other = lion.Lion(nn.Linear(3, 2).named_parameters())
    other.load_state_dict(saved)
    assert other.param_groups[0]["param_names"] == ["weight", "bias"]
    lion.Lion(nn.Linear(3, 2).parameters()).load_state_dict(saved)


@every_class
def test_repr_shows_the_options(cls):
    shown = repr(cls([parameter(2)], lr=0.125))
    assert shown.startswith(cls.__name__) and "lr: 0.125" in shown and "betas" in shown and "min_8bit_size" in shown


# --- learning rates and schedulers


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_learning_rate_as_a_tensor(make, dtype):
    lr = torch.tensor(1e-2, dtype=dtype)
    p = parameter(5000)
    by_hand = ByHand.of(make, p)
    optimizer = make([p], lr=lr)
    assert optimizer.param_groups[0]["lr"] is lr

    def before(i):
        if i == 2:
            lr.fill_(1e-3)
        if i == 4:
            optimizer.param_groups[0]["lr"] = torch.tensor([0.5], dtype=dtype)

    follow(optimizer, {p: by_hand}, 6, before=before)
    lr.fill_(-1)
    optimizer.param_groups[0]["lr"] = lr
    with pytest.raises(ValueError, match="Invalid learning rate: -1"):
        optimizer.step()


SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "LambdaLR to zero": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: max(0.0, 1 - epoch / 3)),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3, 0.5),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 1e-2, total_steps=12),
    "OneCycleLR without momentum": lambda o: lr_scheduler.OneCycleLR(o, 1e-2, total_steps=12, cycle_momentum=False),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-4, 1e-2, step_size_up=3, cycle_momentum=True),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, 1.0, 4), lr_scheduler.ExponentialLR(o, 0.8)], [4]
    ),
}


@every_kind
@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_scheduler(make, name, tensor_lr):
    params = [parameter(5000), parameter(100, seed=1)]
    copies = {p: ByHand.of(make, p) for p in params}
    lr = 1e-3
    optimizer = make(
        [{"params": params[:1]}, {"params": params[1:], "lr": torch.tensor(2e-3) if tensor_lr else 2e-3}],
        lr=torch.tensor(lr) if tensor_lr else lr,
    )
    scheduler = SCHEDULERS[name](optimizer)
    seen = set()

    def before(i):
        if i:
            scheduler.step()
        seen.add((float(optimizer.param_groups[0]["lr"]), float(optimizer.param_groups[0]["betas"][0])))

    # the gradients are set, then the schedule moves, then both step
    optimizer.step()
    follow(optimizer, copies, 12, before=before)
    assert len({lr for lr, _ in seen}) > 2
    assert (len({beta for _, beta in seen}) > 2) is (name in ("OneCycleLR", "CyclicLR"))
    assert all(group["betas"][1] == 0.99 for group in optimizer.param_groups)


def test_reduce_on_plateau():
    p = parameter(5000)
    optimizer = lion.Lion8bit([p], lr=1e-2)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, patience=1, factor=0.5)

    def before(i):
        scheduler.step(1.0)

    follow(optimizer, {p: ByHand(p, 8)}, 8, before=before)
    assert optimizer.param_groups[0]["lr"] < 2e-3


def test_scheduler_state_survives_a_checkpoint():
    def make():
        p = parameter(5000)
        optimizer = lion.Lion8bit([p], lr=1e-3)
        return p, optimizer, lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=20)

    def train(p, optimizer, scheduler, seeds):
        for seed in seeds:
            set_gradients([p], seed)
            optimizer.step()
            scheduler.step()

    straight = make()
    train(*straight, range(16))
    first = make()
    train(*first, range(8))
    second = make()
    with torch.no_grad():
        second[0].copy_(first[0])
    second[1].load_state_dict(first[1].state_dict())
    second[2].load_state_dict(first[2].state_dict())
    train(*second, range(8, 16))
    assert_same_bits(second[0], straight[0])
    assert second[1].param_groups[0]["betas"] == straight[1].param_groups[0]["betas"]


# --- gradients that are there or not


@every_kind
def test_zero_grad(make):
    p, q = parameter(5000), parameter(5000, seed=1)
    optimizer = make([p, q])
    p.grad = torch.ones(5000)
    grad = p.grad
    optimizer.zero_grad(set_to_none=False)
    assert p.grad is grad and not grad.any() and q.grad is None
    optimizer.zero_grad()
    assert p.grad is None


@every_kind
def test_zero_gradients_still_decay(make):
    """A gradient of zeros is a gradient: momentum goes on, and so does the parameter."""
    p = parameter(5000)
    by_hand = ByHand.of(make, p)
    optimizer = make([p], lr=1e-2, weight_decay=0.1)
    follow(optimizer, {p: by_hand}, 3)
    for _ in range(3):
        optimizer.zero_grad(set_to_none=False)
        optimizer.step()
        by_hand.step(torch.zeros(5000), 1e-2, weight_decay=0.1)
        by_hand.check(p, optimizer)


@every_kind
@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0)], ids=["number", "tensor"])
def test_a_first_step_of_zeros_only_makes_state(make, lr):
    """So torch.distributed.checkpoint gets state to load into."""
    p = parameter(5000)
    optimizer, by_hand = make([p], lr=lr, percentile_clipping=50), ByHand.of(make, p, percentile_clipping=50)
    for counted in range(2):
        p.grad = torch.zeros_like(p)
        optimizer.step()
        if counted:
            by_hand.step(p.grad, 0.0)
        by_hand.check(p, optimizer)


@every_kind
@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0), 1e-2, torch.tensor(1e-2)], ids=str)
def test_any_other_first_step_counts(make, lr):
    for gradient in (1.0, 0.0) if lr == 0 else (0.0,):
        # Of two parameters one has zeros.
        params = [parameter(5000), parameter(5000, dtype=torch.bfloat16)]
        optimizer, copies = make(params, lr=lr, weight_decay=0.1), {p: ByHand.of(make, p) for p in params}
        override = 1e-2 if gradient == 0 and lr == 0 else None
        if override:
            lion.GlobalOptimManager.get_instance().override_config(params[1], "lr", override)
        for p, value in zip(params, (0.0, gradient), strict=True):
            p.grad = torch.full_like(p, value)
            copies[p].step(p.grad, override if override and p is params[1] else float(lr), weight_decay=0.1)
        optimizer.step()
        for p in params:
            copies[p].check(p, optimizer)


@every_kind
def test_a_plan_is_kept_from_step_to_step(make):
    params = [parameter(5000), parameter(300, dtype=torch.bfloat16)]
    optimizer = make(params)
    plans = []
    for seed in range(3):
        set_gradients(params, seed)
        optimizer.step()
        plans += optimizer._plans
    assert len(plans) == 3 and plans[0] is plans[1] is plans[2]


@every_kind
def test_step_without_any_gradient(make):
    p = parameter(5000)
    optimizer = make([p], weight_decay=0.1)
    before = p.detach().clone()
    optimizer.step()
    assert_same_bits(p, before)
    assert not optimizer.state


@every_kind
def test_parameters_with_gradients_now_and_then(make):
    params = [parameter(5000, seed=i) for i in range(4)]
    copies = {p: ByHand.of(make, p, percentile_clipping=40) for p in params}
    optimizer = make(params, lr=1e-2, weight_decay=0.1, percentile_clipping=40)
    rng = torch.Generator().manual_seed(0)
    for step in range(20):
        present = [p for p in params if torch.rand(1, generator=rng) < 0.6]
        optimizer.zero_grad()
        follow(optimizer, {p: copies[p] for p in present}, 1, seed=step)
    assert len({copy.steps for copy in copies.values()}) > 1
    for p in params:
        copies[p].check(p, optimizer)


@every_kind
def test_frozen_and_unfrozen(make):
    model = nn.Sequential(nn.Linear(70, 70), nn.Linear(70, 70))
    params = list(model.parameters())
    copies = {p: ByHand.of(make, p) for p in params}
    optimizer = make(params, lr=1e-3, weight_decay=0.1)

    def train(steps):
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.randn(8, 70)).square().sum().backward()
            for p in params:
                if p.grad is not None:
                    copies[p].step(p.grad, 1e-3, weight_decay=0.1)
            optimizer.step()
            for p in params:
                if p in optimizer.state:
                    copies[p].check(p, optimizer)

    model[0].requires_grad_(False)
    train(2)
    assert set(optimizer.state) == set(model[1].parameters())
    model[0].requires_grad_(True)
    train(2)
    model[1].requires_grad_(False)
    train(3)
    model[1].requires_grad_(True)
    train(2)
    assert [copies[p].steps for p in params] == [7, 7, 6, 6]


def test_plain_tensors_without_requires_grad():
    p = torch.zeros(5000)
    by_hand = ByHand(p, 32)
    follow(lion.Lion([p]), {p: by_hand}, 2)


# --- memory and process


@every_kind
def test_optimizer_and_parameters_are_freed(make):
    p = parameter(5000)
    optimizer = make([p], percentile_clipping=50)
    set_gradients([p], 0)
    optimizer.step()
    optimizer.step()
    refs = [weakref.ref(p), weakref.ref(optimizer), weakref.ref(optimizer.state[p]["state1"])]
    del p, optimizer
    gc.collect()
    assert [ref() for ref in refs] == [None, None, None]


@every_kind
@pytest.mark.parametrize("percentile", [100, 30])
def test_a_step_needs_no_memory_of_the_size_of_a_parameter(make, percentile):
    """The peak of the process, as the kernel counts it, over steps after the first."""
    reset = Path("/proc/self/clear_refs")
    if not os.access(reset, os.W_OK):
        pytest.skip("this system does not count a process's peak memory anew")

    def peak():
        return int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

    p = nn.Parameter(torch.zeros(8_000_000))
    optimizer = make([p], percentile_clipping=percentile)
    p.grad = torch.ones(8_000_000)
    for _ in range(2):
        optimizer.step()
    gc.collect()
    reset.write_text("5")
    before = peak()
    optimizer.step()
    assert peak() - before < 2_000_000  # a float32 copy has 32,000,000 bytes, a byte per parameter 8,000,000


@every_kind
def test_two_optimizers_do_not_meet(make):
    params = [parameter(5000, seed=i) for i in range(2)]
    copies = [ByHand.of(make, p) for p in params]
    optimizers = [make([p], lr=10.0**-i) for i, p in enumerate(params, 2)]
    for step in range(4):
        for p, by_hand, optimizer in zip(params, copies, optimizers, strict=True):
            follow(optimizer, {p: by_hand}, 1, seed=step)


@every_kind
def test_default_dtype_does_not_matter(make):
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        p = parameter(5000)
        follow(make([p], percentile_clipping=50), {p: ByHand.of(make, p, percentile_clipping=50)}, 3)
    finally:
        torch.set_default_dtype(before)


@every_kind
def test_flush_to_zero_does_not_matter(make):
    """torch can make its threads flush denormals; the numbers stay those of the specification."""
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        p = parameter(5000)
        optimizer = make([p], lr=1e-3)
        torch.set_flush_denormal(False)
        by_hand = ByHand.of(make, p)
        for seed in range(3):
            set_gradients([p], seed, 1e-39)
            by_hand.step(p.grad, 1e-3)
            torch.set_flush_denormal(True)
            optimizer.step()
            torch.set_flush_denormal(False)
            by_hand.check(p, optimizer)
    finally:
        torch.set_flush_denormal(False)


def test_a_model_in_half_precision():
    for dtype in (torch.float16, torch.bfloat16):
        torch.manual_seed(0)
        model = nn.Linear(80, 80).to(dtype)
        copies = {p: ByHand(p, 8) for p in model.parameters()}
        optimizer = lion.Lion8bit(model.parameters(), lr=1e-3)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(4, 80).to(dtype)).sum().backward()
            for p, by_hand in copies.items():
                by_hand.step(p.grad, 1e-3)
            optimizer.step()
            for p, by_hand in copies.items():
                by_hand.check(p, optimizer)


def test_gradient_clipping_of_torch():
    p = parameter(5000)
    by_hand = ByHand(p, 8)
    optimizer = lion.Lion8bit([p])
    for seed in range(3):
        set_gradients([p], seed, 10.0)
        nn.utils.clip_grad_norm_([p], 1.0)
        by_hand.step(p.grad)
        optimizer.step()
        by_hand.check(p, optimizer)


@every_kind
@pytest.mark.parametrize("percentile", [100, 30])
def test_grad_scaler(make, percentile):
    """Scaled by powers of two, so that unscaling is exact; a step with an overflow does nothing."""
    kwargs = {"lr": 1e-3, "percentile_clipping": percentile}
    params = [parameter(5000), parameter(10, seed=1)]
    copies = {p: ByHand.of(make, p, **kwargs) for p in params}
    optimizer = make(params, **kwargs)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    for seed in range(8):
        weights = torch.randn(5000, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        loss = (params[0] * weights).sum() + (params[1] * weights[:10]).sum() * (float("inf") if seed == 4 else 1.0)
        scaler.scale(loss).backward()
        before = snapshot(optimizer)
        scaler.step(optimizer)
        if seed == 4:
            after = [value for name, value in snapshot(optimizer) if not name.startswith("gradient")]
            kept = [value for name, value in before if not name.startswith("gradient")]
            for a, b in zip(after, kept, strict=True):
                assert_same_bits(a, b)
        else:
            for p, weight in zip(params, (weights, weights[:10]), strict=True):
                copies[p].step(weight, 1e-3)
                copies[p].check(p, optimizer, f"step {seed}")
        scaler.update()
    assert scaler.get_scale() == 2048.0


def test_step_in_the_backward_pass():
    """A hook after the accumulation of a gradient may step an optimizer of its own."""
    model = nn.Linear(70, 70)
    copies = {p: ByHand(p, 8) for p in model.parameters()}
    optimizers = {p: lion.Lion8bit([p], lr=1e-3) for p in model.parameters()}
    for p in model.parameters():

        def hook(p):
            copies[p].step(p.grad, 1e-3)
            optimizers[p].step()
            optimizers[p].zero_grad()

        p.register_post_accumulate_grad_hook(hook)
    for _ in range(3):
        model(torch.randn(4, 70)).sum().backward()
        for p, by_hand in copies.items():
            assert p.grad is None
            by_hand.check(p, optimizers[p])

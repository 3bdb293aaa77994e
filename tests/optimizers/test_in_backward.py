"""Steps in backward: the bits of the ordinary step, and no gradient that outlives its parameter's step."""

from __future__ import annotations

import copy
import gc
import json
import os
import platform
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lion
from tests.comparing import assert_same_bits
from tests.optimizers.support import DTYPES, KINDS, VARIANTS, assert_unchanged, every_kind, every_variant, snapshot

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.98), "weight_decay": 0.1, "percentile_clipping": 50}


class Model(nn.Module):
    """Parameters of every dtype, one tied, one frozen, one unused, one that is not contiguous, one for paging."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def parameter(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator).mul(0.1).to(dtype))

        self.first = nn.ParameterList([parameter(70, 64, dtype=dtype) for dtype in DTYPES])
        self.scalars = nn.ParameterList([parameter(dtype=dtype) for dtype in DTYPES])
        self.tied = parameter(64, 65)
        self.frozen = parameter(65).requires_grad_(False)
        self.unused = parameter(3)
        self.transposed = nn.Parameter(parameter(5000, 2).data.t())
        self.paged = parameter(100_001)

    def forward(self, x: Tensor) -> Tensor:
        for p, scalar in zip(self.first, self.scalars, strict=True):
            x = (x.to(p.dtype) @ p * scalar).float().tanh() @ p.detach().float().t()
        x = ((x @ self.first[0]) @ self.tied + self.frozen).tanh() @ self.tied.t()
        return x.mean() * (self.transposed.square().sum() + self.paged.cos().mean()) * 1e3


def groups(model: Model) -> list[dict[str, Any]]:
    """Return two groups, one with names, one with options of its own."""
    first = [p for name, p in model.named_parameters() if name.startswith("first")]
    others = [p for name, p in model.named_parameters() if not name.startswith("first")]
    return [{"params": others}, {"params": first, "lr": 3e-3, "weight_decay": 0.0}]


def batch(step: int) -> Tensor:
    return torch.randn(4, 70, generator=torch.Generator().manual_seed(step)) * 10.0 ** (step % 3 - 1)


def both(
    make: Any, steps: int = 8, before: Callable[[int, Model, lion.Lion], None] = lambda *_: None, **options: Any
) -> list[tuple[Model, lion.Lion]]:
    """Train by ordinary steps and by steps in backward, and compare all parameters and states after each."""
    runs = []
    for _ in range(2):
        model = Model()
        runs.append((model, make(groups(model), **{**OPTIONS, **options})))
    lion.StepInBackward(runs[1][1])
    for step in range(steps):
        for in_backward, (model, optimizer) in enumerate(runs):
            before(step, model, optimizer)
            model(batch(step)).backward()
            if in_backward:
                assert all(p.grad is None for p in model.parameters())
            else:
                optimizer.step()
                optimizer.zero_grad()
        assert_unchanged(runs[1][1], snapshot(runs[0][1]))
    return runs


@every_variant
def test_equals_the_ordinary_step(make: Any) -> None:
    (model, optimizer), _ = both(make)
    assert model.frozen not in optimizer.state and model.unused not in optimizer.state
    assert {int(state["step"]) for state in optimizer.state.values()} == {8}
    assert "gnorm_vec" in optimizer.state[model.tied]


@every_kind
def test_without_clipping(make: Any) -> None:
    both(make, percentile_clipping=100)


@every_kind
def test_options_schedules_and_overrides_are_read_at_every_step(make: Any) -> None:
    manager = lion.GlobalOptimManager.get_instance()
    schedules = {}

    def before(step: int, model: Model, optimizer: lion.Lion) -> None:
        if step == 0:
            schedules[optimizer] = torch.optim.lr_scheduler.CyclicLR(optimizer, 1e-4, 1e-2, 3)
        else:
            schedules[optimizer].step()
        if step == 2:
            manager.override_config(model.tied, "lr", 0.5)
        if step == 3:
            optimizer.param_groups[1].update(optim_bits=40 - (8 if make.bits == 8 else 32), percentile_clipping=5)
        if step == 4:
            manager.override_config(model.paged, "is_paged", True)
        if step == 5:
            optimizer.param_groups[0]["lr"] = torch.tensor(1e-3)

    both(make, before=before)


def test_states_and_options_that_are_taken_away() -> None:
    def before(step: int, model: Model, optimizer: lion.Lion) -> None:
        if step == 3:
            optimizer.state.clear()

    (_, optimizer), (model, other) = both(VARIANTS["Lion8bit"], 6, before=before)
    assert {int(state["step"]) for state in optimizer.state.values()} == {3}
    del other.param_groups[0]["is_paged"]
    with pytest.raises(ValueError, match="'is_paged' is missing"):
        model(batch(0)).backward()


@every_kind
def test_loading_while_attached(make: Any) -> None:
    saved = {}

    def before(step: int, model: Model, optimizer: lion.Lion) -> None:
        if step == 3:
            saved[optimizer] = optimizer.state_dict()
            saved[optimizer]["param_groups"][0]["lr"] = 0.05
            saved[optimizer] = copy.deepcopy(saved[optimizer])
        if step == 5:
            optimizer.load_state_dict(saved[optimizer])

    # The parameters go on from where they are, the states from step 3.
    both(make, before=before)


@pytest.mark.parametrize("first", [True, False], ids=["in backward first", "ordinary first"])
@pytest.mark.parametrize("make", [VARIANTS["PagedLion8bit"], VARIANTS["Lion"]], ids=["PagedLion8bit", "Lion"])
def test_checkpoints_pass_between_both_ways(make: Any, first: bool, tmp_path: Path) -> None:
    model = Model()
    optimizer = make(groups(model), **OPTIONS)
    for step in range(8):
        if step == 4:
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint.pt")
            saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
            model = Model()
            optimizer = make(groups(model), lr=1.0, percentile_clipping=50)
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
        if step % 4 == 0 and (step < 4) is first:
            handle = lion.StepInBackward(optimizer)
        model(batch(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 3 and first:
            handle.remove()
    (_, expected), _ = both(make)
    assert_unchanged(optimizer, snapshot(expected))


def test_remove_and_with_block() -> None:
    model = Model()
    optimizer = lion.Lion8bit(groups(model), **OPTIONS)
    handle = lion.StepInBackward(optimizer)
    model(batch(0)).backward()
    handle.remove()
    handle.remove()
    model(batch(1)).backward()
    assert model.tied.grad is not None
    optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(KeyError), lion.StepInBackward(optimizer) as handle:
        assert isinstance(handle, lion.StepInBackward)
        model(batch(2)).backward()
        raise KeyError
    model(batch(3)).backward()
    optimizer.step()
    optimizer.zero_grad()
    (_, expected), _ = both(VARIANTS["Lion8bit"], 4)
    assert_unchanged(optimizer, snapshot(expected))


def test_calling_step_as_well_changes_nothing() -> None:
    model = Model()
    optimizer = lion.Lion8bit(groups(model), **OPTIONS)
    lion.StepInBackward(optimizer)
    for step in range(4):
        model(batch(step)).backward()
        optimizer.step()

    def closure() -> float:
        model(batch(4)).backward()
        return 1.5

    assert optimizer.step(closure) == 1.5
    (_, expected), _ = both(VARIANTS["Lion8bit"], 5)
    assert_unchanged(optimizer, snapshot(expected))


@pytest.mark.filterwarnings("error")
def test_a_scheduler_sees_the_steps() -> None:
    p = nn.Parameter(torch.ones(64))
    optimizer = lion.Lion([p], lr=0.1)
    with lion.StepInBackward(optimizer):
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        for _ in range(2):
            p.sum().backward()
            schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.025


def test_a_gradient_scaler_raises() -> None:
    model = Model()
    optimizer = lion.Lion(groups(model))
    scaler = torch.amp.GradScaler("cpu")
    with lion.StepInBackward(optimizer):
        scaler.scale(model(batch(0))).backward()
        with pytest.raises(AssertionError, match="No inf checks were recorded"):
            scaler.step(optimizer)
            scaler.update()


def test_what_is_added_or_unfrozen_later_is_left_to_step() -> None:
    model, late = Model(), nn.Parameter(torch.ones(10))
    optimizer = lion.Lion(groups(model), **OPTIONS)
    lion.StepInBackward(optimizer)
    optimizer.add_param_group({"params": [late]})
    model.frozen.requires_grad_(True)
    (model(batch(0)) + late.sum()).backward()
    assert late.grad is not None and model.frozen.grad is not None and model.tied.grad is None
    optimizer.step()
    assert [optimizer.state[p]["step"] for p in (late, model.frozen, model.tied)] == [1, 1, 1]


def test_a_tensor_that_is_no_leaf_is_left_to_step() -> None:
    leaf = nn.Parameter(torch.ones(10))
    product = 2 * leaf
    product.retain_grad()
    optimizer = lion.Lion([leaf, product])
    lion.StepInBackward(optimizer)
    product.square().sum().backward()
    assert product.grad is not None and leaf.grad is None
    optimizer.step()
    assert optimizer.state[product]["step"] == optimizer.state[leaf]["step"] == 1


def test_a_gradient_that_was_there_before_counts() -> None:
    runs = []
    for in_backward in (False, True):
        model = Model()
        optimizer = lion.Lion(groups(model), **OPTIONS)
        model(batch(0)).backward()
        if in_backward:
            lion.StepInBackward(optimizer)
        model(batch(1)).backward()
        optimizer.step()
        runs.append(optimizer)
    assert_unchanged(runs[1], [entry for entry in snapshot(runs[0]) if not entry[0].startswith("gradient")])


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant: bool) -> None:
    models = []
    for in_backward in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(*[nn.Sequential(nn.Linear(72, 72), nn.Tanh()) for _ in range(4)])
        optimizer = lion.Lion8bit(model.parameters(), lr=1e-2)
        if in_backward:
            lion.StepInBackward(optimizer)
        for step in range(3):
            x = torch.randn(4, 72, generator=torch.Generator().manual_seed(step)).requires_grad_()
            for block in model:
                x = checkpoint(block, x, use_reentrant=reentrant)
            x.square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        models.append(optimizer)
    assert_unchanged(models[1], snapshot(models[0]))


def test_one_gradient_is_alive_at_a_time() -> None:
    model = nn.Sequential(*[nn.Linear(64, 64, bias=False) for _ in range(10)])
    optimizer = lion.Lion(model.parameters())
    params, counts = list(model.parameters()), []
    for p in params:
        p.register_post_accumulate_grad_hook(lambda _: counts.append(sum(q.grad is not None for q in params)))
    with lion.StepInBackward(optimizer):
        model(torch.randn(2, 64)).sum().backward()
        assert counts == [1] * 10
    counts.clear()
    model(torch.randn(2, 64)).sum().backward()
    assert counts == [*range(1, 11)]


@pytest.mark.skipif(platform.system() != "Linux", reason="reads /proc/self/status")
def test_memory_of_the_gradients_is_saved() -> None:
    peaks = {}
    for how in ("step", "backward"):
        command = [sys.executable, "-m", "tests.optimizers.gradient_memory", how, "16"]
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}
        done = subprocess.run(
            command, cwd=Path(__file__).parents[2], env=environment, stdout=subprocess.PIPE, check=True, timeout=300
        )
        peaks[how] = json.loads(done.stdout)
    gradients = peaks["step"]["gradients"]
    assert peaks["step"]["peak"] > 0.9 * gradients
    # The gradient of one layer, in the form that autograd made it and in the weight's, of 16.
    assert peaks["backward"]["peak"] < gradients * 3 / 16


def test_nothing_is_kept_alive() -> None:
    model = Model()
    optimizer = lion.Lion(groups(model))
    lion.StepInBackward(optimizer)
    model(batch(0)).backward()
    alive = [weakref.ref(optimizer), weakref.ref(model.tied)]
    del model, optimizer
    gc.collect()
    assert [ref() for ref in alive] == [None, None]


def test_a_model_outlives_its_optimizer() -> None:
    model = Model()
    optimizer = lion.Lion(groups(model))
    lion.StepInBackward(optimizer)
    del optimizer
    gc.collect()
    other = lion.Lion(groups(model))
    model(batch(0)).backward()
    assert model.tied.grad is not None and model.tied not in other.state
    with lion.StepInBackward(other):
        model(batch(0)).backward()
    assert model.tied.grad is None and other.state[model.tied]["step"] == 1


def test_an_error_names_the_parameter_and_leaves_it_as_it_is() -> None:
    table = nn.Embedding(10, 4, sparse=True)
    linear = nn.Linear(4, 2)
    for params, name in (
        ([*linear.parameters(), table.weight], "parameter '2 of group 0'"),
        ([*linear.named_parameters(), ("table", table.weight)], "parameter 'table'"),
    ):
        optimizer = lion.Lion(params)
        before = table.weight.detach().clone()
        with lion.StepInBackward(optimizer), pytest.raises(TypeError, match=f"Invalid gradient of {name}: layout"):
            linear(table(torch.tensor([1, 2]))).sum().backward()
        assert_same_bits(table.weight, before)
        assert table.weight not in optimizer.state
        table.weight.grad = None


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    with pytest.raises(TypeError, match="Invalid optimizer: SGD"):
        lion.StepInBackward(torch.optim.SGD([p]))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="parameter 1 of group 0 twice"):
        lion.StepInBackward(lion.Lion([p, p]))
    optimizer = lion.Lion([p])
    with lion.StepInBackward(optimizer):
        for other in (optimizer, lion.Lion([q, p])):
            with pytest.raises(ValueError, match="is stepped in backward already"):
                lion.StepInBackward(other)
        # What was refused has not attached itself to any parameter.
        q.sum().backward()
        assert q.grad is not None
        p.sum().backward()
        assert p.grad is None and optimizer.state[p]["step"] == 1
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    with pytest.raises(ValueError, match="parameter 0 of group 0 is not sharded; each of the 4 processes"):
        lion.StepInBackward(optimizer)


def test_kinds_are_those_of_the_model() -> None:
    # The comparisons above would say little about 8 bits if the model had no parameter large enough.
    for name, make in KINDS.items():
        model = Model()
        optimizer = make(groups(model))
        model(batch(0)).backward()
        optimizer.step()
        dtypes = {optimizer.state[p]["state1"].dtype for p in optimizer.state}
        assert dtypes == ({torch.float32} if name == "32bit" else {torch.float32, torch.uint8})


@every_kind
def test_first_steps_of_zeros_count(make: Any) -> None:
    """They only make state where all gradients are 0, which a step of one parameter cannot know."""
    p, q = (nn.Parameter(torch.ones(5000)) for _ in range(2))
    optimizer = make([p, q], lr=0.0)
    lion.StepInBackward(optimizer)
    (0.0 * p + q).sum().backward()
    assert [optimizer.state[parameter]["step"].item() for parameter in (p, q)] == [1.0, 1.0]

"""Parameters that get another content: ``Module.to`` and ``load_state_dict`` where torch swaps tensors."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import lion
from lion._memory import objects
from tests.comparing import assert_same_bits
from tests.optimizers.support import ByHand, Variant, every_class, every_kind, set_gradients


@pytest.fixture(autouse=True)
def swapping() -> Iterator[None]:
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.fixture
def manager() -> lion.GlobalOptimManager:
    return lion.GlobalOptimManager.get_instance()


def reload(model: nn.Module) -> None:
    model.load_state_dict({key: value.clone() for key, value in model.state_dict().items()})


SWAPS: dict[str, Callable[[nn.Module], Any]] = {
    "bfloat16": lambda model: model.to(torch.bfloat16),
    "half and back": lambda model: model.half().float(),
    "the same dtype": lambda model: model.to("cpu"),
    "to_empty": lambda model: model.to_empty(device="cpu").apply(refilled),
    "load_state_dict": reload,
    "twice": lambda model: model.to(torch.float16).to(torch.bfloat16),
}
every_swap = pytest.mark.parametrize("swap", SWAPS.values(), ids=SWAPS)


@torch.no_grad()
def refilled(module: nn.Module) -> None:
    for p in module.parameters(recurse=False):
        p.copy_(torch.linspace(-1, 1, p.numel()).view(p.shape))


@pytest.mark.parametrize(
    "order", ["override, swap, optimizer", "override, optimizer, swap", "optimizer, override, swap"]
)
@every_swap
def test_an_override_follows_its_parameter(swap: Any, order: str, manager: lion.GlobalOptimManager) -> None:
    model = nn.Sequential(nn.Linear(70, 70), nn.Linear(70, 70))
    chosen, optimizer = model[0].weight, None
    for part in order.split(", "):
        if part == "override":
            manager.override_config(chosen, key_value_dict={"optim_bits": 32, "lr": 0.5})
        elif part == "optimizer":
            optimizer = lion.Lion8bit(model.parameters(), lr=1e-2)
        else:
            swap(model)
    assert model[0].weight is chosen and optimizer is not None
    copies = {p: ByHand(p, 32 if p is chosen else 8) for p in model.parameters()}
    for seed in range(3):
        set_gradients(copies, seed)
        for p, by_hand in copies.items():
            by_hand.step(p.grad, 0.5 if p is chosen else 1e-2)
        optimizer.step()
        for p, by_hand in copies.items():
            by_hand.check(p, optimizer)


@every_kind
def test_training_goes_on_with_the_state_and_the_override(make: Variant, manager: lion.GlobalOptimManager) -> None:
    model = nn.Linear(70, 70)
    optimizer = make(model.parameters(), lr=1e-2)
    manager.override_config(model.weight, "lr", 0.5)
    copies = {p: ByHand.of(make, p) for p in model.parameters()}
    for seed in range(6):
        set_gradients(copies, seed)
        for p, by_hand in copies.items():
            by_hand.step(p.grad, 0.5 if p is model.weight else 1e-2)
        optimizer.step()
        for p, by_hand in copies.items():
            by_hand.check(p, optimizer)
        if seed == 2:
            model.to(torch.bfloat16)
            for p, by_hand in copies.items():
                by_hand.param = ByHand(p, 32).param


@pytest.mark.parametrize("swap", [SWAPS[name] for name in ("bfloat16", "half and back", "the same dtype")])
def test_the_gradients_go_along(swap: Any, manager: lion.GlobalOptimManager) -> None:
    model = nn.Linear(70, 70)
    manager.override_config(list(model.parameters()), "lr", 0.5)
    set_gradients(model.parameters(), 0)
    swap(model)
    before = [(p.detach().clone().float(), p.grad) for p in model.parameters()]
    lion.Lion(model.parameters()).step()
    for p, (values, grad) in zip(model.parameters(), before, strict=True):
        assert_same_bits(p, (values - 0.5 * grad.float().sign()).to(p.dtype))


@every_class
@every_swap
def test_steps_in_backward_go_on(swap: Any, cls: type[lion.Lion]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(70, 70), nn.Linear(70, 1))
    other = copy.deepcopy(model)
    optimizer, plain = cls(model.parameters(), lr=1e-2), cls(other.parameters(), lr=1e-2)
    handle = lion.StepInBackward(optimizer)
    for i in range(4):
        if i in (0, 2):
            swap(model)
            swap(other)
        inputs = torch.randn(5, 70).to(next(model.parameters()).dtype)
        for some in (model, other):
            some(inputs).sum().backward()
        plain.step()
        plain.zero_grad()
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            assert p.grad is None
            assert_same_bits(p, q)
            assert_same_bits(optimizer.state[p]["state1"], plain.state[q]["state1"])
    handle.remove()
    model(inputs).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert not any(vars(p).keys() - {"_is_param"} for p in model.parameters())


def test_a_hook_registered_after_the_swap_fires_once() -> None:
    model = nn.Linear(3, 1)
    optimizer, calls = lion.Lion(model.parameters()), []
    with lion.StepInBackward(optimizer):
        model.to(torch.bfloat16)
        model.weight.register_post_accumulate_grad_hook(calls.append)
        model(torch.ones(3, dtype=torch.bfloat16)).sum().backward()
    assert len(calls) == 1 and calls[0] is model.weight
    assert optimizer.state[model.weight]["step"] == 1


def test_a_parameter_stays_stepped_in_backward_by_one(manager: lion.GlobalOptimManager) -> None:
    model = nn.Linear(3, 1)
    optimizer = lion.Lion(model.parameters())
    with lion.StepInBackward(optimizer):
        model.to(torch.bfloat16)
        with pytest.raises(ValueError, match="stepped in backward already"):
            lion.StepInBackward(lion.Lion(model.parameters()))
    lion.StepInBackward(lion.Lion(model.parameters())).remove()


def test_two_parameters_swapped_with_each_other(manager: lion.GlobalOptimManager) -> None:
    a, b = (nn.Parameter(torch.full((3,), value)) for value in (1.0, 2.0))
    manager.override_config(a, "lr", 0.5)
    torch.utils.swap_tensors(a, b)
    optimizer = lion.Lion([a, b], lr=0.25)
    for p in (a, b):
        p.grad = torch.ones(3)
    optimizer.step()
    assert (a.tolist(), b.tolist()) == ([1.5] * 3, [0.75] * 3)
    del b, optimizer, p
    gc.collect()
    optimizer = lion.Lion([a], lr=0.25)
    optimizer.step()
    assert a.tolist() == [1.0] * 3


@pytest.mark.parametrize("swapped", [False, True])
def test_no_parameter_is_held_alive(swapped: bool, manager: lion.GlobalOptimManager) -> None:
    model = nn.Linear(70, 70)
    manager.override_config(list(model.parameters()), "lr", 0.5)
    if swapped:
        model.to(torch.bfloat16)
    assert len(manager.lookup()) == 2
    refs = [weakref.ref(p) for p in model.parameters()]
    gc.disable()  # they go at once, not when somebody looks for cycles
    try:
        del model
        assert [ref() for ref in refs] == [None, None]
        assert manager.lookup() == {}
    finally:
        gc.enable()


def test_parameters_in_a_cycle_are_forgotten(manager: lion.GlobalOptimManager) -> None:
    model = nn.Linear(70, 70)
    model.weight.owner = model.weight
    manager.override_config(model.weight, "lr", 0.5)
    del model
    gc.collect()
    assert manager.lookup() == {}


@pytest.mark.parametrize("swapped", [False, True])
def test_a_new_parameter_does_not_inherit(swapped: bool, manager: lion.GlobalOptimManager) -> None:
    for _ in range(5):
        model = nn.Linear(2, 2, bias=False)
        optimizer = lion.Lion(model.parameters(), lr=0.25)
        before = model.weight.detach().clone()
        model.weight.grad = torch.ones(2, 2)
        optimizer.step()
        assert_same_bits(model.weight, before - 0.25)
        manager.override_config(model.weight, "lr", 0.5)
        if swapped:
            model.to(torch.bfloat16)
        del model, optimizer


def test_a_mark_is_no_obstacle_to_saving_and_copying(manager: lion.GlobalOptimManager) -> None:
    model = nn.Linear(2, 2)
    manager.override_config(list(model.parameters()), "lr", 0.5)
    with lion.StepInBackward(lion.Lion(model.parameters())):
        for saved in (list(model.parameters()), model.state_dict(), model.state_dict(keep_vars=True)):
            file = io.BytesIO()
            torch.save(saved, file)
            file.seek(0)
            loaded = torch.load(file)
            read = list(loaded.values()) if isinstance(loaded, dict) else loaded
            for p, q in zip(model.parameters(), read, strict=True):
                assert_same_bits(p, q)
        for other in (copy.deepcopy(model), copy.deepcopy(nn.Linear(2, 2))):
            for p in other.parameters():
                p.grad = torch.ones(p.shape)
            before = other.weight.detach().clone()
            lion.Lion(other.parameters(), lr=0.25).step()
            assert_same_bits(other.weight, before - 0.25)


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("in_backward", [False, True])
def test_parameters_that_fsdp2_shards_are_always_swapped(
    in_backward: bool, manager: lion.GlobalOptimManager, one_process: None
) -> None:
    torch.__future__.set_swap_module_params_on_conversion(False)
    with torch.device("meta"):
        model = fully_shard(nn.Linear(70, 70), mesh=dist.init_device_mesh("cpu", (1,)))
    optimizer = lion.Lion8bit(model.parameters(), lr=0.25)
    chosen = model.weight
    manager.override_config(chosen, key_value_dict={"lr": 0.5, "optim_bits": 32})
    handle = lion.StepInBackward(optimizer) if in_backward else None
    model.to_empty(device="cpu")
    assert model.weight is chosen
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1.5)
    before = {p: p.to_local().detach().clone() for p in model.parameters()}
    model(torch.ones(2, 70)).sum().backward()
    if handle is None:
        optimizer.step()
    assert optimizer.state[chosen]["state1"].to_local().dtype == torch.float32
    for p, lr in ((model.weight, 0.5), (model.bias, 0.25)):
        assert (p.grad is None) is in_backward
        assert_same_bits(p.to_local(), before[p] - lr)


@pytest.mark.parametrize("held_by", ["module", "list", "optimizer", "nothing"])
def test_many_parameters_are_swapped_and_die_in_a_moment(
    held_by: str, manager: lion.GlobalOptimManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.ParameterList(nn.Parameter(torch.zeros(2)) for _ in range(200))
    params = list(model)
    holder = {"module": model, "list": params, "optimizer": torch.optim.SGD(params, 0.1), "nothing": None}[held_by]
    manager.override_config(params, "lr", 0.5)
    del model
    for p in params if held_by in ("module", "optimizer") else params[:10]:
        torch.utils.swap_tensors(p, nn.Parameter(torch.ones(2)))
    assert manager.lookup() == {id(p): {"lr": 0.5} for p in params}
    del p, params
    searches = []
    search = objects.search
    monkeypatch.setattr(objects, "search", lambda wanted: searches.append(1) or search(wanted))
    del holder
    assert manager.lookup() == {}
    assert len(searches) <= 4  # each looks at every object that Python has

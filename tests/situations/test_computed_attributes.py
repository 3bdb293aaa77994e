"""Module overrides of attributes that are computed from parameters: they reach these, and looking computes nothing."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import lion
from tests.comparing import assert_same_bits
from tests.optimizers.support import set_gradients

OPTIONS = {"optim_bits": 32, "lr": 0.5}
LIST = "parametrizations.weight_orig"


class Doubled(nn.Module):
    def forward(self, values: Tensor) -> Tensor:
        return 2 * values


class Counting(nn.Module):
    """A parametrization that counts how often it is computed."""

    calls = 0

    def forward(self, values: Tensor) -> Tensor:
        Counting.calls += 1
        return values.clone()


class Tied(nn.Linear):
    """A module with a computed attribute of its own."""

    computed = 0

    @property
    def scale(self) -> Tensor:
        Tied.computed += 1
        return self.weight.norm()


def parametrized(module: nn.Module, *made: nn.Module, name: str = "weight") -> nn.Module:
    for parametrization in made:
        parametrize.register_parametrization(module, name, parametrization)
    return module


def old(name: str) -> Callable[[nn.Module], nn.Module]:
    def apply(module: nn.Module) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # deprecated, and in use
            return getattr(nn.utils, name)(module)

    return apply


KINDS: dict[str, tuple[Callable[[nn.Module], Any], tuple[str, ...]]] = {
    "weight_norm, old": (old("weight_norm"), ("weight_g", "weight_v")),
    "spectral_norm, old": (old("spectral_norm"), ("weight_orig",)),
    "weight_norm": (
        parametrizations.weight_norm,
        ("parametrizations.weight.original0", "parametrizations.weight.original1"),
    ),
    "spectral_norm": (parametrizations.spectral_norm, ("parametrizations.weight.original",)),
    "orthogonal": (parametrizations.orthogonal, ("parametrizations.weight.original",)),
    "a program's own": (lambda m: parametrized(m, Doubled()), ("parametrizations.weight.original",)),
    "two of them": (lambda m: parametrized(m, Doubled(), Doubled()), ("parametrizations.weight.original",)),
    "pruning": (lambda m: prune.l1_unstructured(m, "weight", 0.5), ("weight_orig",)),
    "pruning twice": (
        lambda m: prune.random_unstructured(prune.l1_unstructured(m, "weight", 0.5), "weight", 0.5),
        ("weight_orig",),
    ),
    "nothing": (lambda m: m, ("weight",)),
}
MODULES: dict[str, Callable[[], nn.Module]] = {
    "Linear": lambda: nn.Linear(80, 80),
    "Conv1d": lambda: nn.Conv1d(20, 20, 15),
    "Embedding": lambda: nn.Embedding(100, 64),
}


def check_override(model: nn.Module, names: tuple[str, ...]) -> None:
    """Fail unless exactly the parameters of these names have the options, in a step."""
    optimizer = lion.Lion8bit(model.named_parameters(), lr=0.25, min_8bit_size=0)
    params = dict(model.named_parameters())
    set_gradients(params.values(), 0)
    before = {name: p.detach().clone() for name, p in params.items()}
    optimizer.step()
    for name, p in params.items():
        lr, dtype = (0.5, torch.float32) if name in names else (0.25, torch.uint8)
        assert optimizer.state[p]["state1"].dtype == dtype, name
        assert_same_bits(p, before[name] - lr * p.grad.sign(), what=name)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("kind", KINDS)
def test_it_reaches_the_parameters_behind(kind: str, module: str, when: str) -> None:
    apply, names = KINDS[kind]
    torch.manual_seed(0)
    model = MODULES[module]()
    manager = lion.GlobalOptimManager.get_instance()
    if when == "before":
        manager.register_module_override(model, "weight", OPTIONS)
    apply(model)
    if when == "after":
        manager.register_module_override(model, "weight", OPTIONS)
    check_override(model, names)


@pytest.mark.parametrize("remove", [nn.utils.remove_weight_norm, nn.utils.remove_spectral_norm])
def test_it_stays_when_the_computation_is_removed(remove: Callable[[nn.Module], nn.Module]) -> None:
    model = old(remove.__name__.removeprefix("remove_"))(nn.Linear(80, 80))
    lion.GlobalOptimManager.get_instance().register_module_override(model, "weight", OPTIONS)
    remove(model)
    check_override(model, ("weight",))


def test_what_is_behind_may_be_computed_too() -> None:
    for apply, names in (
        (lambda m: prune.identity(old("weight_norm")(m), "weight_v"), ("weight_g", "weight_v_orig")),
        (lambda m: nn.utils.spectral_norm(old("weight_norm")(m), "weight_v"), ("weight_g", "weight_v_orig")),
        (lambda m: parametrized(prune.identity(m, "weight"), Doubled(), name="weight_orig"), (f"{LIST}.original",)),
    ):
        model = nn.Linear(80, 80)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            apply(model)
        lion.GlobalOptimManager.get_instance().register_module_override(model, "weight", OPTIONS)
        check_override(model, names)


def test_a_scripted_module() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model = torch.jit.script(nn.Linear(80, 80))
    lion.GlobalOptimManager.get_instance().register_module_override(model, "weight", OPTIONS)
    check_override(model, ("weight",))


def test_recurrent_weights_have_long_names() -> None:
    model = nn.LSTM(8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(model, "weight_hh_l0")
    lion.GlobalOptimManager.get_instance().register_module_override(model, "weight_hh_l0", OPTIONS)
    check_override(model, ("weight_hh_l0_g", "weight_hh_l0_v"))


@pytest.mark.parametrize("name", ["weight_g", "weight_v"])
def test_a_parameter_behind_has_a_name_of_its_own(name: str) -> None:
    model = old("weight_norm")(nn.Linear(80, 80))
    lion.GlobalOptimManager.get_instance().register_module_override(model, name, OPTIONS)
    check_override(model, (name,))


@pytest.mark.parametrize("new", [False, True])
def test_looking_computes_nothing(new: bool) -> None:
    model = (parametrizations.spectral_norm if new else old("spectral_norm"))(nn.Linear(80, 80))
    if new:
        parametrize.register_parametrization(model, "weight", Counting())
    lion.GlobalOptimManager.get_instance().register_module_override(model, "weight", OPTIONS)
    optimizer = lion.Lion(model.parameters())
    vectors = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert vectors
    Counting.calls = 0
    for seed in range(3):
        set_gradients(model.parameters(), seed)
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
    assert Counting.calls == 0
    for name, buffer in model.named_buffers():
        assert_same_bits(buffer, vectors[name], what=name)


def test_a_compiled_module() -> None:
    model = nn.Linear(80, 80)
    compiled = torch.compile(model, backend="eager")
    lion.GlobalOptimManager.get_instance().register_module_override(compiled, "weight", OPTIONS)
    check_override(model, ("weight",))


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (lambda: Tied(3, 3), "scale"),
        (lambda: nn.BatchNorm1d(3), "running_mean"),
        (lambda: nn.Linear(3, 3, bias=False), "bias"),
        (lambda: nn.Linear(3, 3), "weigth"),
        (lambda: nn.Sequential(nn.Linear(3, 3)), "weight"),
        (lambda: parametrized(nn.Linear(3, 3), Doubled()), "scale"),
    ],
)
def test_what_is_no_parameter_is_refused_by_name(module: Callable[[], nn.Module], name: str) -> None:
    made, manager = module(), lion.GlobalOptimManager.get_instance()
    version = manager.version
    with pytest.raises(ValueError, match=f"'{name}'.*{type(made).__name__} has no such parameter"):
        manager.register_module_override(made, name, OPTIONS)
    assert Tied.computed == 0
    assert manager.version == version and manager.lookup() == {}


def test_a_computed_tensor_is_refused_where_a_parameter_is_meant() -> None:
    model = old("weight_norm")(nn.Linear(3, 3))
    manager = lion.GlobalOptimManager.get_instance()
    with pytest.raises(ValueError, match="computed from other tensors"):
        manager.override_config(model.weight, "lr", 0.5)
    with pytest.raises(ValueError, match="computed from other tensors"):
        manager.override_config([model.bias, model.weight], "lr", 0.5)
    assert manager.lookup() == {}
    kept = 2 * model.bias
    kept.retain_grad()  # torch's optimizers take these
    manager.override_config(kept, "lr", 0.5)
    assert manager.lookup() == {id(kept): {"lr": 0.5}}

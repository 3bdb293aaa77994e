"""GlobalOptimManager: options of single parameters, set from anywhere."""

from __future__ import annotations

import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

import lion
from lion import GlobalOptimManager
from tests.comparing import assert_same_bits
from tests.optimizers.support import (
    KINDS,
    ByHand,
    assert_unchanged,
    every_kind,
    follow,
    parameter,
    set_gradients,
    snapshot,
)


@pytest.fixture
def manager():
    return GlobalOptimManager.get_instance()


def test_there_is_one(manager):
    assert GlobalOptimManager.get_instance() is manager
    with pytest.raises(RuntimeError, match="get_instance"):
        GlobalOptimManager()


OVERRIDES = {
    "optim_bits": ({"optim_bits": 32}, {"optim_bits": 32}, {}),
    "min_8bit_size": ({"min_8bit_size": 5001}, {"min_8bit_size": 5001}, {}),
    "block_wise": ({"block_wise": False}, {"block_wise": False}, {}),
    "percentile_clipping": ({"percentile_clipping": 20}, {"percentile_clipping": 20}, {}),
    "lr": ({"lr": 0.5}, {}, {"lr": 0.5}),
    "lr and optim_bits": ({"lr": 0.5, "optim_bits": 32}, {"optim_bits": 32}, {"lr": 0.5}),
    "betas": ({"betas": (0.1, 0.2)}, {}, {"betas": (0.1, 0.2)}),
    "weight_decay": ({"weight_decay": 0.5}, {}, {"weight_decay": 0.5}),
    "is_paged": ({"is_paged": True}, {}, {}),
}


def test_is_sparse_has_no_effect_and_says_so(manager):
    layer = nn.Linear(2, 2)
    calls = (
        lambda: manager.override_config(layer.weight, key_value_dict={"is_sparse": True, "optim_bits": 8}),
        lambda: manager.register_module_override(layer, "weight", {"is_sparse": True, "optim_bits": 8}),
    )
    for call in calls:
        manager.initialize()
        with pytest.warns(UserWarning, match="'is_sparse' has no effect") as warned:
            call()
        [warning] = warned
        assert (warning.filename, warning.lineno) == (__file__, call.__code__.co_firstlineno)
        assert manager.lookup() == {id(layer.weight): {"optim_bits": 8}}


def check_steps(optimizer, copies, steps, special=None, hyperparameters=None):
    """Step with every parameter by its group's options, and ``special`` by other hyperparameters."""
    for seed in range(steps):
        set_gradients(copies, seed)
        for p, by_hand in copies.items():
            group = next(g for g in optimizer.param_groups if any(p is q for q in g["params"]))
            values = {key: group[key] for key in ("lr", "betas", "weight_decay")}
            by_hand.step(p.grad, **{**values, **(hyperparameters if p is special else {})})
        optimizer.step()
        for p, by_hand in copies.items():
            by_hand.check(p, optimizer)


@pytest.mark.parametrize("registered", [True, False])
@pytest.mark.parametrize("order", ["override, optimizer", "optimizer, override"])
@pytest.mark.parametrize(("config", "state_options", "hyperparameters"), OVERRIDES.values(), ids=OVERRIDES.keys())
def test_override(manager, registered, order, config, state_options, hyperparameters):
    params = [parameter(5000, seed=i) for i in range(3)]
    copies = {p: ByHand(p, 8) for p in params}
    copies[params[1]] = ByHand(params[1], **{"bits": state_options.get("optim_bits", 8)}, **{
        {"percentile_clipping": "percentile"}.get(k, k): v for k, v in state_options.items() if k != "optim_bits"
    })  # fmt: skip
    if registered:
        manager.register_parameters(params)
    if order == "optimizer, override":
        optimizer = lion.Lion8bit(params, lr=1e-3, weight_decay=0.1)
    if len(config) == 1:
        manager.override_config(params[1], *next(iter(config.items())))
    else:
        manager.override_config(params[1], key_value_dict=config)
    if order == "override, optimizer":
        optimizer = lion.Lion8bit(params, lr=1e-3, weight_decay=0.1)
    check_steps(optimizer, copies, 4, params[1], hyperparameters)
    assert all(optimizer.param_groups[0][key] == optimizer.defaults[key] for key in config)


def test_override_before_registration(manager):
    model = nn.Linear(80, 80)
    manager.override_config(model.weight, "optim_bits", 32)
    manager.register_parameters(model.parameters())
    optimizer = lion.Lion8bit(model.parameters())
    copies = {model.weight: ByHand(model.weight, 32), model.bias: ByHand(model.bias, 8)}
    check_steps(optimizer, copies, 2)


def test_registered_groups(manager):
    model = nn.Linear(80, 80)
    manager.register_parameters([{"params": [model.weight]}, {"params": model.bias}])
    manager.override_config([model.weight, model.bias], "lr", 0.25)
    copies = {p: ByHand(p, 8) for p in model.parameters()}
    optimizer = lion.Lion8bit(model.parameters())
    for seed in range(2):
        set_gradients(copies, seed)
        for p, by_hand in copies.items():
            by_hand.step(p.grad, 0.25)
        optimizer.step()
        for p, by_hand in copies.items():
            by_hand.check(p, optimizer)


def test_a_single_registered_tensor(manager):
    embedding = nn.Embedding(100, 80)
    manager.override_config(embedding.weight, "optim_bits", 32)
    manager.register_parameters(embedding.weight)
    optimizer = lion.Lion8bit(embedding.parameters())
    check_steps(optimizer, {embedding.weight: ByHand(embedding.weight, 32)}, 2)


def test_registered_groups_are_still_whole(manager):
    """What can be looked at once only is refused: the optimizer would get a group without parameters, unseen."""
    model = nn.Linear(80, 80)
    for members in (list(model.parameters()), nn.ParameterList(model.parameters()), {"weight": model.weight}.values()):
        groups = [{"params": members}]
        manager.register_parameters(groups)
        assert lion.Lion(groups).param_groups[0]["params"]
    groups = [{"params": model.parameters()}]
    with pytest.raises(TypeError, match="a generator, which a look at it uses up; give a list"):
        manager.register_parameters(groups)
    assert len(lion.Lion(groups).param_groups[0]["params"]) == 2


@pytest.mark.parametrize("bits", [8, 32])
def test_override_after_steps_converts_the_state(manager, bits):
    params = [parameter(5000, seed=i) for i in range(2)]
    optimizer = lion.Lion(params, lr=1e-3, optim_bits=40 - bits)
    copies = {p: ByHand(p, 40 - bits) for p in params}
    check_steps(optimizer, copies, 3)
    state = dict(optimizer.state[params[0]])
    manager.override_config(params[0], "optim_bits", bits)
    converted = ByHand(params[0], bits)
    converted.steps = 3
    if bits == 32:
        converted.momentum = lion.functional.dequantize_blockwise(
            state["state1"], absmax=state["absmax1"], blocksize=256
        ).numpy()
    else:
        codes, quantized = lion.functional.quantize_blockwise(state["state1"], blocksize=256)
        converted.codes, converted.absmax = codes.numpy(), quantized.absmax.numpy()
    copies[params[0]] = converted
    check_steps(optimizer, copies, 3)


def test_overrides_add_up_and_the_last_one_counts(manager):
    p = parameter(5000)
    optimizer = lion.Lion8bit([p], lr=1e-3)
    manager.override_config(p, "lr", 0.5)
    manager.override_config(p, key_value_dict={"betas": (0.5, 0.5), "weight_decay": 0.25})
    manager.override_config(p, "lr", 0.125)
    hyperparameters = {"lr": 0.125, "betas": (0.5, 0.5), "weight_decay": 0.25}
    check_steps(optimizer, {p: ByHand(p, 8)}, 3, p, hyperparameters)


def test_several_parameters_at_once(manager):
    params = [parameter(5000, seed=i) for i in range(3)]
    manager.override_config(params[:2], "optim_bits", 32)
    optimizer = lion.Lion8bit(params)
    check_steps(optimizer, {p: ByHand(p, bits) for p, bits in zip(params, (32, 32, 8), strict=True)}, 2)


@pytest.mark.parametrize("after", [False, True])
def test_module_override(manager, after):
    model = nn.Sequential(nn.Embedding(100, 64), nn.Linear(64, 100))
    copies = {p: ByHand(p, 32 if p is model[0].weight else 8) for p in model.parameters()}
    if not after:
        manager.register_module_override(model[0], "weight", {"optim_bits": 32})
    manager.register_parameters(model.parameters())
    optimizer = lion.Lion8bit(model.parameters())
    if after:
        manager.register_module_override(model[0], "weight", {"optim_bits": 32})
    check_steps(optimizer, copies, 3)


def test_module_override_follows_a_replaced_parameter(manager):
    module = nn.Linear(80, 80)
    manager.register_module_override(module, "weight", {"optim_bits": 32, "lr": 0.5})
    module.weight = nn.Parameter(module.weight.detach().clone())
    optimizer = lion.Lion8bit(module.parameters())
    copies = {module.weight: ByHand(module.weight, 32), module.bias: ByHand(module.bias, 8)}
    check_steps(optimizer, copies, 2, module.weight, {"lr": 0.5})
    module.weight = nn.Parameter(module.weight.detach().clone())
    optimizer = lion.Lion8bit([module.weight])
    check_steps(optimizer, {module.weight: ByHand(module.weight, 32)}, 2, module.weight, {"lr": 0.5})


def test_override_reaches_every_optimizer_that_holds_the_parameter(manager):
    p, q = parameter(5000), parameter(5000, seed=1)
    first, second = lion.Lion8bit([p]), lion.Lion8bit([q])
    manager.override_config(p, "lr", 0.5)
    check_steps(second, {q: ByHand(q, 8)}, 2)
    check_steps(first, {p: ByHand(p, 8)}, 2, p, {"lr": 0.5})


@every_kind
def test_override_between_steps(manager, make):
    params = [parameter(5000, seed=i) for i in range(2)]
    copies = {p: ByHand.of(make, p) for p in params}
    optimizer = make(params, lr=1e-3)
    check_steps(optimizer, copies, 2)
    manager.override_config(params[1], "lr", 0.5)
    check_steps(optimizer, copies, 2, params[1], {"lr": 0.5})
    manager.initialize()
    check_steps(optimizer, copies, 2)


def test_a_schedule_does_not_move_an_overridden_learning_rate(manager):
    params = [parameter(5000, seed=i) for i in range(2)]
    optimizer = lion.Lion8bit(params, lr=1e-2)
    manager.override_config(params[0], "lr", 0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    copies = {p: ByHand(p, 8) for p in params}
    for _ in range(3):
        check_steps(optimizer, copies, 1, params[0], {"lr": 0.5})
        scheduler.step()


def test_loading_respects_overrides(manager):
    params = [parameter(5000, seed=i) for i in range(2)]
    source = lion.Lion8bit(params)
    check_steps(source, {p: ByHand(p, 8) for p in params}, 2)
    others = [nn.Parameter(p.detach().clone()) for p in params]
    other = lion.Lion8bit(others)
    manager.override_config(others[0], "optim_bits", 32)
    other.load_state_dict(source.state_dict())
    dtypes = [other.state[p]["state1"].dtype for p in others]
    assert dtypes == [torch.float32, torch.uint8]


def test_no_parameter_is_held_alive(manager):
    model = nn.Sequential(nn.Linear(80, 80), nn.Linear(80, 80))
    manager.register_parameters(model.parameters())
    manager.override_config(model[0].weight, "optim_bits", 32)
    manager.override_config(list(model.parameters()), "weight_decay", 0.5)
    manager.register_module_override(model[1], "weight", {"optim_bits": 32})
    optimizer = lion.Lion8bit(model.parameters())
    set_gradients(model.parameters(), 0)
    optimizer.step()
    refs = [weakref.ref(x) for x in (*model.parameters(), *model, optimizer)]
    refs += [weakref.ref(state["state1"]) for state in optimizer.state.values()]
    del model, optimizer
    gc.collect()
    assert [ref() for ref in refs] == [None] * len(refs)


def test_a_new_parameter_does_not_inherit(manager):
    """Even where it gets the place in memory of one that is gone."""
    for _ in range(5):
        p = parameter(5000)
        optimizer = lion.Lion8bit([p])
        by_hand = ByHand(p, 8)
        check_steps(optimizer, {p: by_hand}, 1)
        manager.override_config(p, key_value_dict={"lr": 0.5, "optim_bits": 32})
        del p, optimizer, by_hand
        gc.collect()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"key": "optim_bit", "value": 8}, ValueError, "optim_bit"),
        ({"key": "optim_bits", "value": 16}, ValueError, "Invalid optim_bits value: 16"),
        ({"key": "lr", "value": -1}, ValueError, "Invalid learning rate: -1"),
        ({"key": "betas", "value": (0.9, 1.5)}, ValueError, "Invalid beta parameter at index 1: 1.5"),
        ({"key": "percentile_clipping", "value": 0}, ValueError, "Invalid percentile_clipping value: 0"),
        ({"key_value_dict": {"lr": 0.5, "weight_decay": -1}}, ValueError, "Invalid weight_decay value: -1"),
        ({}, ValueError, "no option"),
    ],
    ids=str,
)
def test_invalid_override(manager, arguments, error, message):
    p = parameter(5000)
    optimizer = lion.Lion8bit([p])
    with pytest.raises(error, match=message):
        manager.override_config(p, **arguments)
    check_steps(optimizer, {p: ByHand(p, 8)}, 2)


def test_invalid_targets(manager):
    module = nn.Linear(2, 2)
    with pytest.raises(TypeError):
        manager.override_config("weight", "lr", 0.5)
    with pytest.raises(TypeError):
        manager.override_config([module.weight, None], "lr", 0.5)
    with pytest.raises(TypeError):
        manager.register_parameters([1])
    with pytest.raises(ValueError, match="wait"):
        manager.register_module_override(module, "wait", {"lr": 0.5})
    with pytest.raises(TypeError):
        manager.register_module_override(module.weight, "weight", {"lr": 0.5})
    with pytest.raises(ValueError, match="optim_bit"):
        manager.register_module_override(module, "weight", {"optim_bit": 8})


def test_overrides_that_end_out_of_range_change_nothing(manager):
    """1 - lr * weight_decay must be finite; each on its own is fine."""
    params = [parameter(5000, seed=i) for i in range(2)]
    optimizer = lion.Lion8bit(params, weight_decay=1e30)
    check_steps(optimizer, {p: ByHand(p, 8) for p in params}, 1)
    manager.override_config(params[1], "lr", 1e30)
    set_gradients(params, 3)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="weight_decay"):
        optimizer.step()
    assert_unchanged(optimizer, before)


def test_pickle_of_an_optimizer_with_overridden_parameters(manager):
    """Overrides belong to the process; a copy has parameters of its own, without them."""
    p = parameter(5000)
    optimizer = KINDS["32bit"]([p], lr=1e-3)
    manager.override_config(p, "lr", 0.5)
    check_steps(optimizer, {p: ByHand(p, 32)}, 2, p, {"lr": 0.5})
    other = pickle.loads(pickle.dumps(optimizer))
    (q,) = other.param_groups[0]["params"]
    assert_same_bits(p, q)
    by_hand = ByHand(q, 32)
    by_hand.momentum, by_hand.steps = other.state[q]["state1"].numpy().copy(), 2
    check_steps(other, {q: by_hand}, 1)
    follow(other, {q: by_hand}, 1)

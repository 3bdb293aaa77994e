"""Random programs: whatever a program does to an optimizer between steps, the next step is that of the reference."""

from __future__ import annotations

import copy
import functools
import pickle
import tempfile
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import numpy as np
import torch
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from torch import nn

import lion
from lion import reference
from lion._memory import looks
from tests.optimizers.support import DTYPES, QMAP, VARIANTS, ByHand, parameter, set_gradients

_DESCRIBE = looks._DESCRIBE
SIZES = (0, 1, 255, 600, 4096, 100_000)  # the last one is paged where asked
OPTIONS = {
    "optim_bits": st.sampled_from([8, 32]),
    "block_wise": st.booleans(),
    "percentile_clipping": st.sampled_from([100, 50, 3]),
    "min_8bit_size": st.sampled_from([0, 256, 4096]),
    "is_paged": st.booleans(),
}
HYPERPARAMETERS = {
    "lr": st.sampled_from([1e-3, 0.0, 0.5, 2e-8]),
    "betas": st.sampled_from([(0.9, 0.99), (0.5, 0.25), (0.0, 0.9)]),
    "weight_decay": st.sampled_from([0.0, 0.1]),
}
ADAPTED = ("optim_bits", "block_wise", "percentile_clipping", "min_8bit_size")
some_seed = st.integers(0, 2**16)
index = st.integers(0, 100)


def adapt(by_hand: ByHand, bits: int, block_wise: bool, percentile: int, min_8bit_size: int) -> None:
    """Convert a copy to other options, as the optimizer does it before the next step."""
    size = by_hand.param.size
    kind = "32bit" if bits == 32 or size < min_8bit_size else "blockwise" if block_wise else "tensorwise"
    if kind != by_hand.kind:
        blocks = {"32bit": 1, "blockwise": 256, "tensorwise": max(size, 1)}
        if by_hand.kind == "32bit":
            momentum = by_hand.momentum
        else:
            absmax = by_hand.absmax if size else np.zeros(0, np.float32)
            momentum = reference.dequantize_blockwise(by_hand.codes, absmax, QMAP, blocks[by_hand.kind])
        if kind == "32bit":
            by_hand.momentum = momentum
        else:
            by_hand.codes, by_hand.absmax = reference.quantize_blockwise(momentum, QMAP, blocks[kind])
            if kind == "tensorwise" and not size:
                by_hand.absmax = np.zeros(1, np.float32)
        by_hand.kind = kind
    if percentile == 100:
        by_hand.history = np.zeros(100, np.float32)
    by_hand.percentile = percentile


def then_step(**strategies: st.SearchStrategy[Any]) -> Callable[[Callable[..., None]], Any]:
    """Return a decorator that makes a rule of a method, and takes a step after it."""

    def decorate(method: Callable[..., None]) -> Any:
        @functools.wraps(method)
        def both(self: Program, **arguments: Any) -> None:
            method(self, **arguments)
            self.step()

        return rule(**strategies)(both)

    return decorate


class Program(RuleBasedStateMachine):
    """An optimizer, and by-hand copies of its parameters."""

    @initialize(
        make=st.sampled_from(list(VARIANTS.values())),
        seed=some_seed,
        count=st.integers(1, 5),
        in_one_pass=st.booleans(),
    )
    def make(self, make, seed, count, in_one_pass):
        # Tensors are looked at by torch's function in C, or one by one, as with older releases of torch.
        looks._DESCRIBE = _DESCRIBE if in_one_pass else None
        self.manager = lion.GlobalOptimManager.get_instance()
        self.manager.initialize()
        self.params, self.copies, self.overrides, self.kept = [], [], [], []
        self.steps, self.chosen, self.shares = 0, list(range(count)), False
        for i in range(count):
            self.new_parameter(seed + i)
        self.optimizer = make(self.params, lr=1e-3, min_8bit_size=0)

    def teardown(self):
        looks._DESCRIBE = _DESCRIBE
        lion.GlobalOptimManager.get_instance().initialize()

    def new_parameter(self, seed):
        p = parameter(SIZES[seed % len(SIZES)], dtype=DTYPES[seed % len(DTYPES)], seed=seed)
        self.params.append(p)
        self.copies.append(ByHand(p, 32))
        self.overrides.append({})
        return p

    def options(self, i):
        group = next(g for g in self.optimizer.param_groups if any(self.params[i] is p for p in g["params"]))
        return {**group, **self.overrides[i]}

    def state_of(self, number):
        states = [state for state in map(self.optimizer.state.get, self.params) if state]
        return states[number % len(states)] if states else None

    @rule(present=st.lists(st.booleans(), min_size=8, max_size=8), steps=st.integers(1, 3))
    def choose_who_has_a_gradient(self, present, steps):
        self.chosen = [i for i in range(len(self.params)) if present[i % 8]]
        self.optimizer.zero_grad()
        for _ in range(steps):
            self.step()

    def step(self):
        """Step, and compare; runs after every rule."""
        self.steps += 1
        chosen = {self.params[i]: (self.copies[i], self.options(i)) for i in self.chosen}
        set_gradients(chosen, self.steps, 10.0 ** (self.steps % 5 - 3))
        for p, (by_hand, options) in chosen.items():
            adapt(by_hand, *(options[key] for key in ADAPTED))
            hyperparameters = {key: options[key] for key in HYPERPARAMETERS}
            by_hand.step(p.grad, **{**hyperparameters, "lr": float(options["lr"])})
        self.optimizer.step()
        for p, (by_hand, _) in chosen.items():
            by_hand.check(p, self.optimizer, f"step {self.steps}")

    @then_step(group=index, data=st.data(), key=st.sampled_from([*OPTIONS, *HYPERPARAMETERS]))
    def change_a_group(self, group, data, key):
        groups = self.optimizer.param_groups
        groups[group % len(groups)][key] = data.draw({**OPTIONS, **HYPERPARAMETERS}[key])

    @then_step(group=index, lr=HYPERPARAMETERS["lr"])
    def set_a_tensor_as_lr(self, group, lr):
        groups = self.optimizer.param_groups
        current = groups[group % len(groups)]["lr"]
        if isinstance(current, torch.Tensor):
            current.fill_(lr)
        else:
            groups[group % len(groups)]["lr"] = torch.tensor(lr, dtype=torch.float64)

    @then_step(i=index, data=st.data(), key=st.sampled_from([*OPTIONS, *HYPERPARAMETERS]))
    def override(self, i, data, key):
        i %= len(self.params)
        self.overrides[i][key] = value = data.draw({**OPTIONS, **HYPERPARAMETERS}[key])
        self.manager.override_config(self.params[i], key, value)

    @then_step()
    def forget_the_overrides(self):
        self.manager.initialize()
        self.overrides = [{} for _ in self.params]

    @precondition(lambda self: len(self.params) < 8)
    @then_step(seed=some_seed, data=st.data())
    def add_a_group(self, seed, data):
        options = data.draw(st.fixed_dictionaries({}, optional={**OPTIONS, **HYPERPARAMETERS}))
        self.optimizer.add_param_group({"params": self.new_parameter(seed), **options})

    @then_step(origin=index, destination=index)
    def move_a_parameter_to_another_group(self, origin, destination):
        groups = self.optimizer.param_groups
        source, target = (groups[i % len(groups)]["params"] for i in (origin, destination))
        if len(source) > 1:
            target.insert(0, source.pop())

    @then_step(group=index)
    def replace_a_group(self, group):
        groups = self.optimizer.param_groups
        groups[group % len(groups)] = dict(groups[group % len(groups)])

    @then_step(i=index, way=st.sampled_from(["clone", "strided", "offset", "dtype"]), dtype=st.sampled_from(DTYPES))
    def replace_the_data(self, i, way, dtype):
        i %= len(self.params)
        p = self.params[i]
        p.grad = None
        self.kept.append(p.data)
        p.data = {
            "clone": lambda: p.data.clone(),
            "strided": lambda: torch.stack([p.data, p.data], -1)[..., 0],
            "offset": lambda: torch.cat([p.data.new_zeros(1), p.data.reshape(-1)])[1:].view(p.shape),
            "dtype": lambda: p.data.to(dtype),
        }[way]()
        self.copies[i].param = ByHand(p, 32).param

    @then_step(number=index, way=st.sampled_from(["clone", "set", "data", "share"]), key=index)
    def replace_the_memory_of_a_state(self, number, way, key):
        state = self.state_of(number)
        if state is None:
            return
        key = sorted(set(state) - {"qmap1"})[key % len(set(state) - {"qmap1"})]
        tensor, old = state[key], state[key].data
        if way == "clone":
            state[key] = tensor.clone()
        elif way == "set":
            tensor.set_(tensor.clone())
        elif way == "data":
            tensor.data = tensor.data.clone()
        else:
            tensor.share_memory_()
            self.shares = True
        if way != "share":
            self.kept.append(old.fill_(77))

    @then_step(number=index)
    def copy_a_state(self, number):
        state = self.state_of(number)
        if state is not None:
            p = next(p for p in self.params if self.optimizer.state.get(p) is state)
            self.optimizer.state[p] = dict(state)

    @then_step(way=st.sampled_from(["state_dict", "file", "deepcopy of the state_dict"]))
    def save_and_load(self, way):
        saved = self.optimizer.state_dict()
        if way == "deepcopy of the state_dict":
            saved = copy.deepcopy(saved)
        if way == "file":
            with tempfile.TemporaryFile() as file:
                torch.save(saved, file)
                file.seek(0)
                saved = torch.load(file, weights_only=True)
        self.optimizer.load_state_dict(saved)
        for i, p in enumerate(self.params):
            if p in self.optimizer.state:
                options = self.options(i)
                adapt(self.copies[i], *(options[key] for key in ADAPTED))
                self.copies[i].check(p, self.optimizer, f"parameter {i} after loading")

    @then_step(way=st.sampled_from([copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))]))
    def go_on_with_a_copy(self, way):
        """Overrides stay with the old parameters."""
        self.optimizer, self.params = way((self.optimizer, self.params))
        self.overrides = [{} for _ in self.params]

    @then_step(i=index)
    def forget_a_state(self, i):
        i %= len(self.params)
        if self.optimizer.state.pop(self.params[i], None):
            self.copies[i] = ByHand(nn.Parameter(self.params[i].detach().clone()), 32)


TestProgram = Program.TestCase
TestProgram.settings = settings(stateful_step_count=30)

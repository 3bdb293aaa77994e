"""Many steps of any class by two implementations, in lockstep through the public API, equal after each.

A training is drawn as a small recipe, from which everything follows: what hypothesis prints when a test fails is a
reproducer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import lr_scheduler

import lion
from tests import strategies
from tests.comparing import Guarded, assert_same_bits, guarded

CLASSES = ("Lion", "Lion8bit", "Lion32bit", "PagedLion", "PagedLion8bit", "PagedLion32bit")
STEPS = 300
LAYOUTS = ("contiguous", "strided", "transposed")
SCHEDULES: dict[str, Callable[[lion.Lion], Any]] = {
    "constant": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: 1.0),
    "warm restarts": lambda optimizer: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 40),
    "one cycle": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 1e-2, 2 * STEPS),  # moves beta1 as well
    "steps": lambda optimizer: lr_scheduler.StepLR(optimizer, 30, 0.3),
}


class Parameter(NamedTuple):
    """A parameter: dtype, number of elements, layout, and bytes by which it lies beyond a 64-byte boundary."""

    dtype: str
    size: int
    layout: str
    offset: int


class Recipe(NamedTuple):
    """What a training is made of; the groups are pairs of options and parameters."""

    cls: str
    groups: list[tuple[dict[str, Any], list[Parameter]]]
    schedule: str
    lr_is_a_tensor: bool
    loss_scale: float | None
    seed: int


@st.composite
def recipes(draw: st.DrawFn, cls: str, *, max_size: int = 1200, max_groups: int = 3) -> Recipe:
    """Trainings with a class: groups with any options, each of parameters of all dtypes."""
    fixed = {"optim_bits"} if "bit" in cls else set()
    if cls.startswith("Paged"):
        fixed.add("is_paged")
    groups = []
    for _ in range(draw(st.integers(1, max_groups))):
        weights = draw(strategies.weight_options())
        options = {key: value for key, value in draw(strategies.options()).items() if key not in fixed} | weights
        members = [
            Parameter(
                dtype,
                draw(st.integers(256, max_size) | strategies.sizes(max_size)),
                draw(st.sampled_from(LAYOUTS)),
                draw(strategies.offsets(dtype)),
            )
            for dtype in draw(st.permutations(list(strategies.FLOAT_DTYPES)))
            if not (weights and dtype == "float16")
        ]
        groups.append((options, members))
    schedule, loss_scale = draw(st.sampled_from(list(SCHEDULES))), draw(st.sampled_from([1024.0, None, 3.0]))
    return Recipe(cls, groups, schedule, draw(st.booleans()), loss_scale, draw(strategies.seeds()))


def as_tensor(memory: Guarded) -> Tensor:
    """Return a torch tensor over an array's memory."""
    if memory.array.dtype == strategies.FLOAT_DTYPES["bfloat16"]:
        return torch.from_numpy(memory.array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(memory.array)


class Training:
    """A training that follows a recipe, by one implementation.

    Args:
        recipe: What to train.
        backend: Name of the implementation; may be changed between steps.
        steps: How many steps will be taken; gradients that are not finite come in the last fifth of them.
        device: Where the parameters are (default: "cpu").
    """

    def __init__(self, recipe: Recipe, backend: str, steps: int, device: str = "cpu") -> None:
        self.recipe, self.backend, self.steps, self.device = recipe, backend, steps, device
        self.taken = 0
        self.params: list[nn.Parameter] = []
        self.memories: list[Guarded] = []
        groups = [{**options, "params": [self._parameter(p) for p in members]} for options, members in recipe.groups]
        lr: Any = torch.tensor(1e-3, dtype=torch.float64) if recipe.lr_is_a_tensor else 1e-3
        # Of options that a group does not give, those that lead to more code.
        cls = getattr(lion, recipe.cls)
        self.optimizer: lion.Lion = cls(groups, lr=lr, min_8bit_size=0, percentile_clipping=10)
        self.schedule = SCHEDULES[recipe.schedule](self.optimizer)

    def _parameter(self, p: Parameter) -> nn.Parameter:
        shape: tuple[int, ...] = (p.size,)
        if p.layout == "strided":
            shape = (p.size, 2)
        elif p.layout == "transposed" and p.size % 4 == 0:
            shape = (p.size // 4, 4)
        seed = self.recipe.seed + len(self.params)
        values = strategies.make_floats("gradients", p.dtype, int(np.prod(shape)), seed).reshape(shape)
        memory = guarded(values, offset_bytes=p.offset)
        tensor = as_tensor(memory).to(self.device)
        tensor = {"strided": lambda: tensor[:, 0], "transposed": tensor.t}.get(p.layout, lambda: tensor)()
        self.params.append(nn.Parameter(tensor))
        # Gradients of float32, too.
        self.params[-1].grad_dtype = None
        self.memories.append(memory)
        return self.params[-1]

    def step(self) -> None:
        """Take a step with the gradients that belong to it."""
        for number, p in enumerate(self.params):
            p.grad = self._gradient(number, p)
        before = [None if p.grad is None else p.grad.clone() for p in self.params]
        if self.recipe.loss_scale is not None:  # as torch.amp.GradScaler does it
            infinite = float(np.random.default_rng([self.recipe.seed, self.taken]).random() < 0.05)
            self.optimizer.grad_scale = torch.tensor([self.recipe.loss_scale], device=self.device)
            self.optimizer.found_inf = torch.tensor([infinite], device=self.device)
        with lion.use_backend(self.backend):
            self.optimizer.step()
        self.schedule.step()
        self.taken += 1
        for number, (p, gradient) in enumerate(zip(self.params, before, strict=True)):
            if gradient is not None:
                assert_same_bits(p.grad, gradient, what=f"gradient of parameter {number}")
            self.memories[number].check()

    def _gradient(self, number: int, p: nn.Parameter) -> Tensor | None:
        rng = np.random.default_rng([self.recipe.seed, self.taken, number])
        finite = ("zero", "signed_zero", "denormal", "outlier", "constant", "negative")
        recipe, chance = "gradients", rng.random()
        if chance < 0.1:
            return None
        if chance < 0.25:
            recipe = str(rng.choice(finite))
        elif chance < 0.3 and self.taken >= 0.8 * self.steps:
            recipe = str(rng.choice(("one_not_finite", "finite_bits", "special", "raw_bits")))
        dtype = "float32" if rng.random() < 0.3 else str(p.dtype).removeprefix("torch.")
        values = strategies.make_floats(recipe, dtype, p.numel(), int(rng.integers(2**32)))
        memory = guarded(values, offset_bytes=int(rng.integers(64 // values.itemsize)) * values.itemsize)
        return as_tensor(memory).to(self.device).view(p.shape)

    def tensors(self) -> dict[str, Tensor]:
        """Return all that a step may change, by name."""
        found = {}
        for number, p in enumerate(self.params):
            found[f"parameter {number}"] = p.detach()
            for key, value in self.optimizer.state.get(p, {}).items():
                found[f"{key} of parameter {number}"] = value
        return found


def check_lockstep(recipe: Recipe, backend: str, steps: int, *, device: str = "cpu", by_cpu: int = 0) -> None:
    """Train by the reference and by another implementation, and fail at the first step after which a bit differs.

    Args:
        recipe: What to train.
        backend: Name of the other implementation.
        steps: Number of steps.
        device: Where the other implementation's parameters are (default: "cpu").
        by_cpu: How many of the steps, the first ones, the implementation "cpu" takes instead (default: 0).
    """
    expected = Training(recipe, "reference", steps)
    actual = Training(recipe, backend, steps, device)
    for step in range(steps):
        actual.backend = "cpu" if step < by_cpu else backend
        actual.step()
        expected.step()
        ours, theirs = actual.tensors(), expected.tensors()
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert_same_bits(ours[name], theirs[name], what=f"after step {step}, {name}")

"""Programs that hand steps to torch.compile: they run, with the bits of eager ones, and soon."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lion
from lion import functional
from tests.comparing import assert_same_bits
from tests.optimizers.support import CLASSES, KINDS, Variant, every_kind, parameter

OPTIONS: dict[str, Any] = {"min_8bit_size": 256, "lr": 1e-2}
BACKENDS = pytest.mark.parametrize("backend", ["eager", "aot_eager"])


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Let every test compile anew, and torch say what it likes about what it does not compile."""
    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.compiler.reset()


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 8))


def loss_of(model: nn.Module, i: int) -> Tensor:
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(i))
    return model(x).square().sum()  # type: ignore[no-any-return]


def trained(make: Callable[..., lion.Lion], **kwargs: Any) -> tuple[nn.Module, lion.Lion]:
    """Return a model and its optimizer after three eager steps."""
    model = network()
    optimizer = make(model.parameters(), **{**OPTIONS, **kwargs})
    for i in range(3):
        loss_of(model, i).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def assert_same(found: tuple[nn.Module, lion.Lion], expected: tuple[nn.Module, lion.Lion]) -> None:
    for p, q in zip(found[0].parameters(), expected[0].parameters(), strict=True):
        assert_same_bits(p, q)
        for key, value in expected[1].state[q].items():
            assert_same_bits(found[1].state[p][key], value, what=key)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
@BACKENDS
def test_a_compiled_step(cls: type[lion.Lion], backend: str) -> None:
    model = network()
    optimizer = cls(model.parameters(), **OPTIONS, percentile_clipping=50)
    step = torch.compile(optimizer.step, backend=backend)
    for i in range(3):
        loss_of(model, i).backward()
        step()
        optimizer.zero_grad()
    assert_same((model, optimizer), trained(cls, percentile_clipping=50))


@every_kind
@BACKENDS
@pytest.mark.parametrize("extras", [False, True], ids=["plain", "schedule and hooks"])
def test_a_compiled_training_function(make: Variant, backend: str, extras: bool) -> None:
    model = network()
    optimizer = make(model.parameters(), **OPTIONS)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 100) if extras else None
    calls: list[str] = []
    if extras:
        optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
        optimizer.register_step_post_hook(lambda *_: calls.append("after"))

    @torch.compile(backend=backend)
    def train(x: Tensor) -> Tensor:
        loss = model(x).square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss  # type: ignore[no-any-return]

    for i in range(3):
        train(torch.randn(4, 64, generator=torch.Generator().manual_seed(i)))
        assert all(p.grad is None for p in model.parameters())
        if schedule is not None:
            schedule.step()
    assert calls == (["before", "after"] * 3 if extras else [])
    assert_same((model, optimizer), trained(make))


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_hooks_and_profilers_that_come_after_compiling_see_steps(cls: type[lion.Lion]) -> None:
    model = network()
    optimizer = cls(model.parameters(), **OPTIONS)
    calls: list[str] = []

    @torch.compile(backend="eager")
    def train(x: Tensor) -> None:
        model(x).square().sum().backward()
        optimizer.step()

    for _ in range(3):
        train(torch.ones(4, 64))
    hook = optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    train(torch.ones(4, 64))
    hook.remove()
    with torch.profiler.profile() as seen:
        train(torch.ones(4, 64))
    assert calls == ["after"]
    assert f"Optimizer.step#{cls.__name__}.step" in [event.key for event in seen.key_averages()]


@every_kind
def test_a_closure(make: Variant) -> None:
    model = network()
    optimizer = make(model.parameters(), **OPTIONS)
    step = torch.compile(optimizer.step, backend="eager")
    for i in range(3):

        def closure(i: int = i) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, i)
            loss.backward()
            return loss

        assert step(closure) > 0
    assert_same((model, optimizer), trained(make))


def test_the_step_is_not_compiled_and_knows_it() -> None:
    """The model is, within the same function."""
    seen: dict[str, list[bool]] = {"model": [], "step": []}

    class Model(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen["model"].append(torch.compiler.is_compiling())
            return super().forward(x)

    class Watched(lion.Lion):
        def _update(self, *args: Any) -> None:
            seen["step"].append(torch.compiler.is_compiling())
            super()._update(*args)

    model = Model(64, 8)
    optimizer = Watched(model.parameters())

    @torch.compile(backend="eager")
    def train(x: Tensor) -> None:
        model(x).square().sum().backward()
        optimizer.step()

    train(torch.randn(4, 64))
    assert seen == {"model": [True], "step": [False]}


def test_a_full_graph_is_refused_as_with_adamw() -> None:
    for cls in (torch.optim.AdamW, lion.Lion):
        model = network()
        optimizer = cls(model.parameters(), lr=1e-2)
        loss_of(model, 0).backward()
        with pytest.raises(torch._dynamo.exc.Unsupported):
            torch.compile(optimizer.step, backend="eager", fullgraph=True)()
        assert not optimizer.state


@every_kind
def test_steps_in_a_compiled_backward(make: Variant) -> None:
    from torch._dynamo import compiled_autograd

    model = network()
    optimizer = make(model.parameters(), **OPTIONS)
    with lion.StepInBackward(optimizer), compiled_autograd._enable(torch.compile(backend="eager")):
        for i in range(3):
            loss_of(model, i).backward()
            assert all(p.grad is None for p in model.parameters())
    assert_same((model, optimizer), trained(make))


@every_kind
@pytest.mark.parametrize("compiled_autograd", [False, True])
def test_steps_in_backward_of_a_compiled_function(make: Variant, compiled_autograd: bool) -> None:
    model = network()
    optimizer = make(model.parameters(), **OPTIONS)

    @torch.compile(backend="aot_eager")
    def train(x: Tensor) -> None:
        model(x).square().sum().backward()

    with lion.StepInBackward(optimizer), torch._dynamo.config.patch(compiled_autograd=compiled_autograd):
        for i in range(3):
            train(torch.randn(4, 64, generator=torch.Generator().manual_seed(i)))
            assert all(p.grad is None for p in model.parameters())
    assert_same((model, optimizer), trained(make))


@every_kind
def test_other_methods_within_a_compiled_function(make: Variant) -> None:
    _, source = trained(make)
    saved = source.state_dict()
    model, q = network(), parameter(300)
    optimizer = make(model.parameters(), **OPTIONS)

    @torch.compile(backend="eager")
    def resume(x: Tensor) -> Tensor:
        optimizer.load_state_dict(saved)
        optimizer.add_param_group({"params": [q], "lr": 1})
        optimizer.state_dict()
        return x + 1

    resume(torch.ones(3))
    assert optimizer.param_groups[1]["lr"] == 1.0
    for p, r in zip(model.parameters(), source.state, strict=True):
        for key, value in source.state[r].items():
            assert_same_bits(optimizer.state[p][key], value, what=key)


def test_the_functions_within_a_compiled_function() -> None:
    x, histories = torch.randn(1000), torch.zeros(2, 100)

    def all_of(x: Tensor, history: Tensor) -> tuple[Tensor, ...]:
        codes, quantized = functional.quantize_blockwise(x * 2, blocksize=256)
        back = functional.dequantize_blockwise(codes, quantized) * 2
        return (codes, back, functional.create_dynamic_map(), *functional.percentile_clipping(x, history, 1, 50))

    found = torch.compile(all_of, backend="eager")(x, histories[0])
    for a, b in zip((*found, histories[0]), (*all_of(x, histories[1]), histories[1]), strict=True):
        assert_same_bits(a, b)


def test_it_takes_no_longer_than_eager_and_compiling_the_rest() -> None:
    """What torch needs for the step itself is a few graph breaks; looking into Numba took it many seconds."""
    trained(lion.Lion8bit)
    model = network()
    optimizer = lion.Lion8bit(model.parameters(), **OPTIONS)
    torch.compile(lambda x: x + 1, backend="eager")(torch.ones(3))
    loss_of(model, 0).backward()
    start = time.process_time()
    torch.compile(optimizer.step, backend="eager")()
    assert time.process_time() - start < 3


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("c++") is None, reason="inductor needs a C++ compiler")
def test_with_inductor() -> None:
    """The model's gradients are those of the compiled model; the step's bits those of a step on them."""
    model, other = network(), network()
    optimizer, plain = (lion.Lion8bit(m.parameters(), **OPTIONS) for m in (model, other))
    grads: list[list[Tensor]] = []
    optimizer.register_step_pre_hook(lambda *_: grads.append([p.grad.clone() for p in model.parameters()]))  # type: ignore[union-attr]

    @torch.compile
    def train(x: Tensor) -> None:
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    for i in range(2):
        train(torch.randn(4, 64, generator=torch.Generator().manual_seed(i)))
    assert len(grads) == 2
    for some in grads:
        for p, grad in zip(other.parameters(), some, strict=True):
            p.grad = grad
        plain.step()
    assert_same((model, optimizer), (other, plain))


IMPORTS = """
import sys
import lion
from lion import Lion, StepInBackward, exchange, functional
assert "torch._dynamo" not in sys.modules, "imported"
import torch
codes, quantized = functional.quantize_blockwise(torch.ones(300))
functional.dequantize_blockwise(codes, quantized)
assert "torch._dynamo" not in sys.modules, "by the functions"
"""


def test_nothing_is_imported_for_it() -> None:
    """torch's compiler takes seconds to import; torch's own Optimizer does so when one is made."""
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_schedule_warns_of_steps_that_are_missing_only() -> None:
    """Schedulers count the calls of ``step`` by wrapping it."""
    for compiled in (False, True):
        model = network()
        optimizer = KINDS["blockwise"](model.parameters(), **OPTIONS)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loss_of(model, 0).backward()
            step()
            schedule.step()
        assert not [w for w in caught if "lr_scheduler" in str(w.message)]
        assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3)

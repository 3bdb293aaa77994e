"""Train a small language model with several optimizers and compare loss, memory and speed.

A transformer over bytes learns the sources of Python's standard library, or a text of yours, once with each optimizer,
from the same initial weights and on the same batches. Lion8bit-bf16 is Lion8bit with bfloat16 weights and 24 master
bits; the weights of all others are float32. A table then shows the loss on held-out text, the peak of memory, the bytes
of optimizer state per parameter and the optimizer's share of a training step; a picture shows loss and memory.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import TaskID, TextColumn
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import AdamW, Optimizer

from lion._cli import (
    UsageError,
    add_device,
    add_json,
    at_least,
    checked_device,
    checked_names,
    device_name,
    language_model,
    print_json,
    print_line,
    print_table,
    progress_bars,
)
from lion._cli.language_model import Shape, Transformer, learning_rate_factor, next_byte_loss
from lion._cli.measure import peak_extra_bytes, state_bytes
from lion.optimizers import Lion, Lion8bit, PagedLion8bit

EXAMPLES = """\
python -m lion demo
python -m lion demo --optimizers AdamW,Lion8bit --steps 100 --device cpu
python -m lion demo --data book.txt --out book --json > book.json"""

SHAPE = Shape(width=192, heads=6, layers=2, context=64)
BATCH = 16
HELD_OUT_BATCHES = 8
EVALUATIONS = 20
MEBI = 1 << 20

# The rates are the best of a search with the same model, `python -m benchmarks.training tiny`. Lion's
# steps all have the same size, so it wants a smaller rate than AdamW, and as much more weight decay: the product of
# both is the same for all.
_DECAY = 2e-4
_ADAMW_RATE, _LION_RATE = 4e-3, 1e-3
_ADAMW: dict[str, Any] = {"lr": _ADAMW_RATE, "weight_decay": _DECAY / _ADAMW_RATE, "betas": (0.9, 0.99), "fused": True}
_LION: dict[str, Any] = {"lr": _LION_RATE, "weight_decay": _DECAY / _LION_RATE, "betas": (0.9, 0.99)}
OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "AdamW": lambda params: AdamW(params, **_ADAMW),
    "Lion": lambda params: Lion(params, **_LION),
    "Lion8bit": lambda params: Lion8bit(params, **_LION),
    "PagedLion8bit": lambda params: PagedLion8bit(params, **_LION),
    "Lion8bit-bf16": lambda params: Lion8bit(params, master_weight_bits=24, **_LION),
}
BFLOAT16_WEIGHTS = {"Lion8bit-bf16"}


class Result(NamedTuple):
    """What training with one optimizer gave.

    Attributes:
        optimizer: Name of the optimizer.
        curve: Pairs of step and held-out loss in nats per byte.
        weight_bytes: Bytes of the weights.
        state_bytes: Bytes of optimizer state, measured on the state's tensors.
        peak_bytes: Most memory that a training step takes, with weights and state, or None where it cannot be measured.
        parameters: How many there are.
        milliseconds_per_step: Median time of a call of ``step``.
        share_of_training: That time as a share of a whole training step.
    """

    optimizer: str
    curve: list[tuple[int, float]]
    weight_bytes: int
    state_bytes: int
    peak_bytes: int | None
    parameters: int
    milliseconds_per_step: float
    share_of_training: float

    @property
    def held_out_loss(self) -> float:
        """The loss after the last step."""
        return self.curve[-1][1]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.add_argument("--steps", type=int, default=240, help="training steps with each optimizer (default: 240)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and the batches (default: 0)")
    parser.add_argument("--out", type=Path, default=Path("lion-demo"), help="output folder (default: lion-demo)")
    parser.add_argument(
        "--optimizers",
        default=",".join(OPTIMIZERS),
        help="names separated by commas (default: all of %(default)s)",
    )
    parser.add_argument("--data", type=Path, help="text to learn (default: the sources of Python's standard library)")
    add_device(parser)
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Carry the command out and return its exit code."""
    at_least("--steps", options.steps, 1)
    at_least("--seed", options.seed, 0)
    names = checked_names("--optimizers", options.optimizers, OPTIMIZERS)
    device = checked_device(options.device)
    train, held_out = language_model.split(language_model.read(options.data), SHAPE.context)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"Invalid --out: {options.out}; {error.strerror}") from None

    def batches(text: Tensor, count: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return language_model.batches(text, count, BATCH, SHAPE.context, generator).long().to(device)

    threads = torch.get_num_threads()
    # The sums of several threads depend on their number, and so would the results; for so small a model one is enough.
    torch.set_num_threads(1)
    try:
        results = _train_all(
            names, options.seed, batches(train, options.steps, options.seed), batches(held_out, HELD_OUT_BATCHES, 0)
        )
    except OSError as error:  # there is no room for paged state
        raise UsageError(str(error)) from None
    finally:
        torch.set_num_threads(threads)

    parameters = results[0].parameters
    picture = _draw(results, options.out / "demo.png")
    if options.json:
        report = {
            "device": device_name(device),
            "parameters": parameters,
            "steps": options.steps,
            "seed": options.seed,
            "results": [{**result._asdict(), "held_out_loss": result.held_out_loss} for result in results],
        }
        print_json(report)
    else:
        _print_table(results, f"{parameters:,} parameters, {options.steps} steps, {device_name(device)}")
    messages = Console(stderr=True)
    if picture:
        messages.print(f"Loss and memory: {picture}", highlight=False, soft_wrap=True)
    else:
        messages.print('No picture was drawn: pip install "numba-lion\\[demo]" brings matplotlib.', highlight=False)
    return 0


def _train_all(names: list[str], seed: int, batches: Tensor, held_out: Tensor) -> list[Result]:
    results = []
    with progress_bars(TextColumn("{task.fields[loss]}")) as progress:
        bars = [progress.add_task(f"{name:<13}", total=len(batches), loss="", start=False) for name in names]
        for name, bar in zip(names, bars, strict=True):
            progress.start_task(bar)

            def show(step: int, loss: float, bar: TaskID = bar) -> None:
                progress.update(bar, completed=step, loss=f"held-out loss {loss:.3f}")

            torch.manual_seed(seed)
            dtype = torch.bfloat16 if name in BFLOAT16_WEIGHTS else torch.float32
            model = Transformer(SHAPE).to(batches.device, dtype)
            results.append(_train(name, model, batches, held_out, show))
    return results


def _train(
    name: str, model: nn.Module, batches: Tensor, held_out: Tensor, show: Callable[[int, float], None]
) -> Result:
    optimizer = OPTIMIZERS[name](model.parameters())
    steps = len(batches)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, steps))
    curve = [(0, _held_out_loss(model, held_out))]
    whole, own = [], []
    for step, batch in enumerate(batches, start=1):
        begin = _now(batch.device)
        _loss(model, batch).backward()
        middle = _now(batch.device)
        optimizer.step()
        end = _now(batch.device)
        optimizer.zero_grad()
        whole.append(end - begin)
        own.append(end - middle)
        schedule.step()
        if step * EVALUATIONS // steps > (step - 1) * EVALUATIONS // steps:
            curve.append((step, _held_out_loss(model, held_out)))
        show(step, curve[-1][1])
    seconds = statistics.median(own)
    weights, state = sum(p.nbytes for p in model.parameters()), state_bytes(optimizer.state)
    return Result(
        optimizer=name,
        curve=curve,
        weight_bytes=weights,
        state_bytes=state,
        peak_bytes=_peak_bytes(model, optimizer, batches[0], weights + state),
        parameters=sum(p.numel() for p in model.parameters()),
        milliseconds_per_step=1e3 * seconds,
        share_of_training=seconds / statistics.median(whole),
    )


def _peak_bytes(model: nn.Module, optimizer: Optimizer, batch: Tensor, held: int) -> int | None:
    """Return the most memory that a step takes which computes in the weights' own dtype.

    Args:
        model: The model, trained.
        optimizer: Its optimizer, which has state.
        batch: A batch.
        held: Bytes that are there before the step.
    """

    def step() -> None:
        next_byte_loss(model(batch[:, :-1]), batch[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # what the first one loads stays
    more = peak_extra_bytes(step, batch.device)
    return None if more is None else held + more


def _loss(model: nn.Module, batch: Tensor) -> Tensor:
    text, following = batch[:, :-1], batch[:, 1:]
    # Many processors compute in bfloat16 many times slower than in float32.
    weights = {name: p.float() for name, p in model.named_parameters()}
    return next_byte_loss(functional_call(model, weights, (text,)), following)


@torch.no_grad()
def _held_out_loss(model: nn.Module, batches: Tensor) -> float:
    return torch.stack([_loss(model, batch) for batch in batches]).mean().item()


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _print_table(results: list[Result], title: str) -> None:
    print_line(title, "bold")
    print_table(
        ("optimizer", "held-out\nloss", "peak,\nMiB", "state,\nbytes", "step,\nms", "of\ntraining"),
        [
            (
                result.optimizer,
                f"{result.held_out_loss:.4f}",
                "?" if result.peak_bytes is None else f"{result.peak_bytes / MEBI:.1f}",
                f"{result.state_bytes / result.parameters:.3f}",
                f"{result.milliseconds_per_step:.2f}",
                f"{result.share_of_training:.1%}",
            )
            for result in results
        ],
    )
    if sentence := _sentence({result.optimizer: result for result in results}):
        print_line(f"\n{sentence}")


def _sentence(results: dict[str, Result]) -> str | None:
    """Return what to remember: the smallest of ours beside AdamW; None if one of them is missing."""
    theirs = results.pop("AdamW", None)
    ours = min(results.values(), key=lambda result: result.weight_bytes + result.state_bytes, default=None)
    if theirs is None or ours is None:
        return None
    memory = ""
    if ours.peak_bytes is not None and theirs.peak_bytes is not None:
        less = 1 - ours.peak_bytes / theirs.peak_bytes
        memory = f", and with {abs(less):.0%} {'less' if less > 0 else 'more'} memory at the peak"
    sizes = [(result.weight_bytes + result.state_bytes) / result.parameters for result in (ours, theirs)]
    return (
        f"{ours.optimizer} trains with {sizes[0]:.1f} bytes of weights and state per parameter where AdamW needs "
        f"{sizes[1]:.1f}{memory}; held-out loss {ours.held_out_loss:.3f}, AdamW {theirs.held_out_loss:.3f}."
    )


def _draw(results: list[Result], path: Path) -> Path | None:
    if importlib.util.find_spec("matplotlib") is None:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    curves, bars = figure.subplots(1, 2, width_ratios=(2, 1))
    for i, result in enumerate(results):
        # The beginning is left out: it is the same for all and would hide the end. The curves of 32-bit and 8-bit
        # state lie on one another: the later ones are thinner, so that each stays visible.
        points = result.curve[len(result.curve) // 4 :]
        curves.plot(*zip(*points, strict=True), label=result.optimizer, linewidth=6 - 5 * i / len(results))
        parts = [("weights", result.weight_bytes, "0.6"), ("state", result.state_bytes, "C1")]
        if result.peak_bytes is not None:
            rest = result.peak_bytes - result.weight_bytes - result.state_bytes
            parts.append(("gradients and activations", rest, "0.88"))
        left = 0.0
        for title, size, color in parts:
            bars.barh(result.optimizer, size / MEBI, left=left, color=color, label=title if i == 0 else None)
            left += size / MEBI
        bars.text(left, i, f" {left:.1f}", va="center")
    curves.set(xlabel="step", ylabel="held-out loss (nats per byte)", title="Same weights, same batches")
    curves.legend()
    bars.invert_yaxis()
    bars.margins(x=0.2)
    bars.set(xlabel="MiB", title="Peak memory of a training step")
    figure.legend(*bars.get_legend_handles_labels(), loc="outside lower right", ncols=3, frameon=False)
    for axes in (curves, bars):
        axes.spines[["top", "right"]].set_visible(False)
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise UsageError(f"Invalid --out: {path}; {error.strerror}") from None
    return path

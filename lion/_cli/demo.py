"""Train a small language model with several optimizers and compare them.

A character-level transformer learns the sources of Python's standard library, or a text of yours, once with each
optimizer, from the same initial weights and on the same batches. Lion8bit-bf16 is Lion8bit with bfloat16 weights and 24
master bits; the weights of all others are float32. A table then shows the loss on held-out text, the bytes of weights
and of optimizer state per parameter and the time of an optimizer step; a picture shows the loss curves.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import statistics
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import TaskID, TextColumn
from rich.table import Table
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import AdamW, Optimizer

from lion._cli import (
    UsageError,
    add_device,
    add_json,
    at_least,
    checked_device,
    checked_names,
    device_name,
    print_json,
    progress_bars,
)
from lion._cli.measure import state_bytes
from lion.optimizers import Lion, Lion8bit, PagedLion8bit

EXAMPLES = """\
python -m lion demo
python -m lion demo --optimizers AdamW,Lion8bit --steps 100 --device cpu
python -m lion demo --data book.txt --out book --json > book.json"""

VOCABULARY = 256  # a character is a byte
CONTEXT = 64
BATCH = 16
WIDTH = 192
HEADS = 6
LAYERS = 2
WARMUP = 0.05
MAX_CHARACTERS = 4_000_000
HELD_OUT = 0.1
HELD_OUT_BATCHES = 8
EVALUATIONS = 20

# Lion's steps all have the same size, so it wants a smaller learning rate than AdamW, and as much more weight decay.
# Both rates come from a coarse search; lr times weight decay is the same for both.
_ADAMW: dict[str, Any] = {"lr": 2e-3, "weight_decay": 0.1, "betas": (0.9, 0.99), "fused": True}
_LION: dict[str, Any] = {"lr": 5e-4, "weight_decay": 0.4, "betas": (0.9, 0.99)}
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
        curve: Pairs of step and held-out loss in nats per character.
        weight_bytes_per_parameter: Bytes of the weights, which the model computes with.
        state_bytes_per_parameter: Bytes of optimizer state, measured on the state's tensors.
        milliseconds_per_step: Median time of a call of ``step``.
    """

    optimizer: str
    curve: list[tuple[int, float]]
    weight_bytes_per_parameter: float
    state_bytes_per_parameter: float
    milliseconds_per_step: float

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
    train, held_out = _split(_read(options.data))
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"Invalid --out: {options.out}; {error.strerror}") from None

    batches = _batches(train, options.steps, torch.Generator().manual_seed(options.seed), device)
    held_out_batches = _batches(held_out, HELD_OUT_BATCHES, torch.Generator().manual_seed(0), device)
    threads = torch.get_num_threads()
    # The sums of several threads depend on their number, and so would the results; for so small a model one is enough.
    torch.set_num_threads(1)
    try:
        results = _train_all(names, options, batches, held_out_batches)
    except OSError as error:  # there is no room for paged state
        raise UsageError(str(error)) from None
    finally:
        torch.set_num_threads(threads)

    parameters = sum(p.numel() for p in Transformer().parameters())
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
        messages.print(f"Loss curves: {picture}", highlight=False, soft_wrap=True)
    else:
        messages.print('No picture was drawn: pip install "numba-lion\\[demo]" brings matplotlib.', highlight=False)
    return 0


def _train_all(names: list[str], options: argparse.Namespace, batches: Tensor, held_out: Tensor) -> list[Result]:
    results = []
    with progress_bars(TextColumn("{task.fields[loss]}")) as progress:
        bars = [progress.add_task(f"{name:<13}", total=options.steps, loss="", start=False) for name in names]
        for name, bar in zip(names, bars, strict=True):
            progress.start_task(bar)

            def show(step: int, loss: float, bar: TaskID = bar) -> None:
                progress.update(bar, completed=step, loss=f"held-out loss {loss:.3f}")

            torch.manual_seed(options.seed)
            dtype = torch.bfloat16 if name in BFLOAT16_WEIGHTS else torch.float32
            model = Transformer().to(batches.device, dtype)
            results.append(_train(name, model, batches, held_out, show))
    return results


class Transformer(nn.Module):
    """A small causal transformer over bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.places = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)
        for p in (self.tokens.weight, self.places.weight):
            nn.init.normal_(p, std=0.3)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(p.bfloat16())  # so that weights of 16 bits begin where those of 32 do

    def forward(self, text: Tensor) -> Tensor:
        """Return the logits of each next character: (batch, context) -> (batch, context, VOCABULARY)."""
        x = self.tokens(text) + self.places.weight[: text.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


class Block(nn.Module):
    """Attention and a feed-forward layer, each on normalized input and added to it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.feed_forward_norm = nn.LayerNorm(WIDTH)
        self.feed_forward = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output: (batch, context, WIDTH) -> the same."""
        batch, length, _ = x.shape
        q, k, v = self.qkv(self.attention_norm(x)).view(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        # The other implementations of attention are not deterministic on a GPU.
        with sdpa_kernel(SDPBackend.MATH):
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, WIDTH))
        return x + self.feed_forward(self.feed_forward_norm(x))


def _train(
    name: str, model: nn.Module, batches: Tensor, held_out: Tensor, show: Callable[[int, float], None]
) -> Result:
    optimizer = OPTIMIZERS[name](model.parameters())
    steps = len(batches)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _learning_rate_factor(step, steps))
    curve = [(0, _held_out_loss(model, held_out))]
    times = []
    for step, batch in enumerate(batches, start=1):
        _loss(model, batch).backward()
        begin = _now(batch.device)
        optimizer.step()
        times.append(_now(batch.device) - begin)
        schedule.step()
        optimizer.zero_grad()
        if step * EVALUATIONS // steps > (step - 1) * EVALUATIONS // steps:
            curve.append((step, _held_out_loss(model, held_out)))
        show(step, curve[-1][1])
    parameters = sum(p.numel() for p in model.parameters())
    return Result(
        name,
        curve,
        sum(p.nbytes for p in model.parameters()) / parameters,
        state_bytes(optimizer.state) / parameters,
        1e3 * statistics.median(times),
    )


def _learning_rate_factor(step: int, steps: int) -> float:
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))


def _loss(model: nn.Module, batch: Tensor) -> Tensor:
    text, following = batch[:, :-1], batch[:, 1:]
    # Many processors compute in bfloat16 many times slower than in float32.
    weights = {name: p.float() for name, p in model.named_parameters()}
    return F.cross_entropy(functional_call(model, weights, (text,)).flatten(0, 1), following.flatten())


@torch.no_grad()
def _held_out_loss(model: nn.Module, batches: Tensor) -> float:
    return torch.stack([_loss(model, batch) for batch in batches]).mean().item()


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _read(path: Path | None) -> bytes:
    if path is None:
        modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        return b"".join(module.read_bytes() for module in modules)[:MAX_CHARACTERS]
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"Invalid --data: {path}; {error.strerror}") from None


def _split(text: bytes) -> tuple[Tensor, Tensor]:
    """Return training and held-out text; the latter from the end of each of ten parts, so that both are alike."""
    characters = torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else torch.empty(0, dtype=torch.uint8)
    train, held_out = [], []
    for part in characters.tensor_split(10):
        end = round(len(part) * (1 - HELD_OUT))
        train.append(part[:end])
        held_out.append(part[end:])
    parts = torch.cat(train), torch.cat(held_out)
    if len(parts[1]) <= CONTEXT:
        raise UsageError(
            f"Invalid --data: {len(text)} characters; at least {math.ceil((CONTEXT + 10) / HELD_OUT)} are needed"
        )
    return parts


def _batches(text: Tensor, count: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Return batches of random pieces of a text: int64 of shape (count, BATCH, CONTEXT + 1)."""
    begins = torch.randint(len(text) - CONTEXT, (count, BATCH, 1), generator=generator)
    return text[begins + torch.arange(CONTEXT + 1)].long().to(device)


def _print_table(results: list[Result], title: str) -> None:
    table = Table(title=title, title_justify="left")
    table.add_column("Optimizer")
    table.add_column("Held-out loss\n(nats per character)", justify="right")
    table.add_column("Weights\n(bytes per parameter)", justify="right")
    table.add_column("Optimizer state\n(bytes per parameter)", justify="right")
    table.add_column("Optimizer step\n(ms, median)", justify="right")
    for result in results:
        table.add_row(
            result.optimizer,
            f"{result.held_out_loss:.4f}",
            f"{result.weight_bytes_per_parameter:.3f}",
            f"{result.state_bytes_per_parameter:.3f}",
            f"{result.milliseconds_per_step:.2f}",
        )
    Console().print(table)


def _draw(results: list[Result], path: Path) -> Path | None:
    if importlib.util.find_spec("matplotlib") is None:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    curves, bars = figure.subplots(1, 2, width_ratios=(2, 1))
    for i, result in enumerate(results):
        # Lion's curves coincide: the later ones are thinner, so that each stays visible.
        curves.plot(*zip(*result.curve, strict=True), label=result.optimizer, linewidth=6 - 5 * i / len(results))
        weights, state = result.weight_bytes_per_parameter, result.state_bytes_per_parameter
        bars.barh(result.optimizer, weights, color="lightgrey")
        bar = bars.barh(result.optimizer, state, left=weights, color=f"C{i}")
        bars.bar_label(bar, [f" {weights:.0f} + {state:.2f}"])
    curves.set(xlabel="step", ylabel="held-out loss (nats per character)", title="Same weights, same batches")
    curves.legend()
    bars.invert_yaxis()
    bars.margins(x=0.25)
    bars.set(xlabel="bytes per parameter", title="Weights (grey) and optimizer state")
    for axes in (curves, bars):
        axes.spines[["top", "right"]].set_visible(False)
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise UsageError(f"Invalid --out: {path}; {error.strerror}") from None
    return path

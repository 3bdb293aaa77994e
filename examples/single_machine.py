"""Trains a small language model on one machine, and goes on from its checkpoint when it is started again.

    python examples/single_machine.py --checkpoint model.pt

Stop it at any moment, even with ``kill -9``, and start it again: the result has the same bits.
"""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lion

CONTEXT = 64
BATCH = 16
WIDTH = 96


class Model(nn.Module):
    """A transformer that predicts the next byte of a text."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = nn.Embedding(256, WIDTH)
        self.places = nn.Embedding(CONTEXT, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.last = nn.Linear(WIDTH, 256)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(CONTEXT), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bytes(x) + self.places.weight
        return self.last(self.layers(x, mask=self.mask, is_causal=True))


def read_text() -> Tensor:
    """Return text that every machine has: sources of Python's standard library."""
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in files)), dtype=torch.uint8)


def batch(text: Tensor, step: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return inputs and targets of a step; they depend on its number alone, so a resumed run sees the same."""
    generator = torch.Generator().manual_seed(step)
    begins = torch.randint(len(text) - CONTEXT - 1, (BATCH,), generator=generator)
    rows = torch.stack([text[begin : begin + CONTEXT + 1] for begin in begins.tolist()]).long().to(device)
    return rows[:, :-1], rows[:, 1:]


def make_optimizer(model: nn.Module, steps: int) -> tuple[lion.Lion, torch.optim.lr_scheduler.LRScheduler]:
    """Return the optimizer and its schedule."""
    # Biases and the weights of normalization are not decayed; matrices are.
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    # With AdamW it would be lr=5e-3 and weight_decay=0.02: Lion takes a fifth of the rate and five times the decay.
    optimizer = lion.Lion8bit([{"params": matrices, "weight_decay": 0.1}, {"params": others}], lr=1e-3)
    # Lion's steps do not get shorter by themselves, so the learning rate goes down to 0.
    warm_up = max(1, steps // 10)

    def factor(step: int) -> float:
        return min((step + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * step / steps))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def save(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a checkpoint so that the path holds a whole one at any moment: the old one or the new one."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.resolve().parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def train(path: Path, steps: int, save_every: int) -> None:
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = Model().to(device)
    optimizer, schedule = make_optimizer(model, steps)
    # What must fit together is in one file. The schedule knows the rates to come, the optimizer the momentum.
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    begin = 0
    if path.exists():
        checkpoint = torch.load(path, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
        begin = checkpoint["step"]
        print(f"going on after step {begin}", flush=True)

    text = read_text()
    for step in range(begin, steps):
        x, y = batch(text, step, device)
        # Weights, and what the optimizer sees, stay float32: at small learning rates bfloat16 weights stand still.
        with torch.autocast(device.type, torch.bfloat16):
            loss = nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        print(f"step {step + 1}: {loss.item():.3f} nats per byte", flush=True)
        if (step + 1) % save_every == 0 or step + 1 == steps:
            save({"step": step + 1, **{name: part.state_dict() for name, part in parts.items()}}, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=Path("model.pt"), help="file to write, and to go on from")
    parser.add_argument("--steps", type=int, default=100, help="number of the last step (default: 100)")
    parser.add_argument("--save-every", type=int, default=10, help="steps between checkpoints (default: 10)")
    arguments = parser.parse_args()
    train(arguments.checkpoint, arguments.steps, arguments.save_every)


if __name__ == "__main__":
    main()

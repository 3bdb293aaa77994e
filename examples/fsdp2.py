"""Trains a small language model whose parameters are sharded over several processes (FSDP2), with 8-bit momentum.

    torchrun --nproc-per-node 4 examples/fsdp2.py --checkpoints checkpoints

Stop it at any moment and start it again, on another number of processes if you like: it goes on from its last
checkpoint. It runs on GPUs where there are some, otherwise on CPUs.
"""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import lion
from lion.exchange import from_exp_avg, to_exp_avg

CONTEXT = 64
BATCH = 12
WIDTH = 96
LR = 1e-3


class Model(nn.Module):
    """A transformer that predicts the next byte of a text."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = nn.Embedding(256, WIDTH)
        self.places = nn.Embedding(CONTEXT, WIDTH)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(2)
        )
        self.last = nn.Linear(WIDTH, 256)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(CONTEXT), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bytes(x) + self.places.weight
        for layer in self.layers:
            x = layer(x, src_mask=self.mask.to(x.dtype), is_causal=True)
        return self.last(x).float()


def make_model(device: torch.device) -> nn.Module:
    """Return the model, each process holding its shard of every parameter."""
    torch.manual_seed(0)
    model = Model().to(device)
    # The shards, which the optimizer sees, stay float32; what is gathered for a layer is bfloat16.
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.layers:
        fully_shard(layer, mp_policy=policy)
    return fully_shard(model, mp_policy=policy)


def read_text() -> Tensor:
    """Return text that every machine has: sources of Python's standard library."""
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in files)), dtype=torch.uint8)


def batch(text: Tensor, step: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return this process's part of the inputs and targets of a step; the whole depends on the step's number alone."""
    generator = torch.Generator().manual_seed(step)
    begins = torch.randint(len(text) - CONTEXT - 1, (BATCH,), generator=generator)
    own = begins[dist.get_rank() :: dist.get_world_size()].tolist()
    rows = torch.stack([text[begin : begin + CONTEXT + 1] for begin in own]).long().to(device)
    return rows[:, :-1], rows[:, 1:]


def states(model: nn.Module, optimizer: lion.Lion) -> dict[str, Any]:
    """Return what a checkpoint holds; all of it can be sharded in another way when it is loaded."""
    model_state, optimizer_state = get_state_dict(model, optimizer)
    # 8-bit momentum belongs to the shards that it was quantized in; as float32 it belongs to the parameter.
    return {"model": model_state, "optimizer": to_exp_avg(optimizer_state, keep=["step"]), "steps": 0}


def save(model: nn.Module, optimizer: lion.Lion, steps: int, folder: Path) -> None:
    dcp.save({**states(model, optimizer), "steps": steps}, checkpoint_id=folder / f"{steps:06}")


def load(model: nn.Module, optimizer: lion.Lion, folder: Path) -> int:
    """Load the last whole checkpoint, if there is one, and return the number of steps taken before it."""
    # The metadata are written when all processes have written their parts.
    whole = sorted(path.parent for path in folder.glob("*/.metadata"))
    if not whole:
        return 0
    loaded = states(model, optimizer)
    dcp.load(loaded, checkpoint_id=whole[-1])
    optimizer_state = from_exp_avg(loaded["optimizer"])
    set_state_dict(model, optimizer, model_state_dict=loaded["model"], optim_state_dict=optimizer_state)
    return loaded["steps"]


def train(folder: Path, steps: int, save_every: int) -> None:
    on_gpus = torch.cuda.is_available()
    if on_gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpus else "gloo")
    device = torch.device("cuda" if on_gpus else "cpu")
    rank, size = dist.get_rank(), dist.get_world_size()
    if BATCH % size:
        raise SystemExit(f"{BATCH} sequences a step cannot be shared out evenly among {size} processes")

    model = make_model(device)
    optimizer = lion.Lion8bit(model.parameters(), lr=LR, weight_decay=0.1)
    begin = load(model, optimizer, folder)
    if begin and rank == 0:
        print(f"going on after step {begin} with {size} processes", flush=True)

    text = read_text()
    for step in range(begin, steps):
        # Lion's steps do not get shorter by themselves, so the learning rate goes down to 0.
        for group in optimizer.param_groups:
            group["lr"] = LR * min((step + 1) / 10, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        x, y = batch(text, step, device)
        loss = nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach() / size
        dist.all_reduce(mean)
        if rank == 0:
            print(f"step {step + 1}: {mean.item():.3f} nats per byte", flush=True)
        if (step + 1) % save_every == 0 or step + 1 == steps:
            save(model, optimizer, step + 1, folder)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoints", type=Path, default=Path("checkpoints"), help="folder to write, and to go on from"
    )
    parser.add_argument("--steps", type=int, default=100, help="number of the last step (default: 100)")
    parser.add_argument("--save-every", type=int, default=10, help="steps between checkpoints (default: 10)")
    arguments = parser.parse_args()
    train(arguments.checkpoints, arguments.steps, arguments.save_every)


if __name__ == "__main__":
    main()

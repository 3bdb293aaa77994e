"""Hugging Face's Trainer: the steps of a loop by hand, and the same bits after a stop."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lion
from lion.trainer import optimizer_cls_and_kwargs
from tests.optimizers.support import VARIANTS, Variant, assert_unchanged, snapshot

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = {"percentile_clipping": 50}
CHOSEN = {name: VARIANTS[name] for name in ("Lion", "Lion8bit", "PagedLion8bit-tensorwise")}
some_classes = pytest.mark.parametrize("make", CHOSEN.values(), ids=CHOSEN.keys())


def make_model(dropout: float = 0.0) -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=260, n_positions=16, n_embd=64, n_layer=2, n_head=2, loss_type="ForCausalLM",
        resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout, bos_token_id=256, eos_token_id=256,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def examples(count: int = 64) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(0, 256, (16,), generator=generator) for _ in range(count)]
    return [{"input_ids": row, "labels": row} for row in rows]


def arguments(folder: Path, **more: Any) -> Any:
    defaults: dict[str, Any] = {
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "per_device_train_batch_size": 2,
        "max_steps": 8,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return transformers.TrainingArguments(str(folder), **{**defaults, **more})


def make_trainer(model: Any, args: Any, make: Variant, **more: Any) -> Any:
    chosen = optimizer_cls_and_kwargs(args, make.cls, **{**make.kwargs, **OPTIONS})
    return transformers.Trainer(model, args, train_dataset=examples(), optimizer_cls_and_kwargs=chosen, **more)


def assert_same_training(one: Any, other: Any) -> None:
    """Fail unless two trainers have the same parameters and optimizer states, to the bit."""
    optimizers = [getattr(trainer.optimizer, "optimizer", trainer.optimizer) for trainer in (one, other)]
    assert_unchanged(optimizers[0], snapshot(optimizers[1]))
    assert {state["step"].item() for state in optimizers[0].state.values()} == {8}


def test_groups_get_what_the_arguments_say(tmp_path: Path) -> None:
    trainer = make_trainer(make_model(), arguments(tmp_path), VARIANTS["Lion8bit"])
    optimizer = trainer.create_optimizer()
    assert type(optimizer) is lion.Lion8bit
    decayed, others = optimizer.param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert all(p.ndim >= 2 for p in decayed["params"]) and any(p.ndim < 2 for p in others["params"])
    for group in (decayed, others):
        assert (group["lr"], group["betas"], group["percentile_clipping"]) == (1e-3, (0.9, 0.99), 50)


@some_classes
@pytest.mark.parametrize("way", ["optimizer_cls_and_kwargs", "optimizers"])
def test_stop_and_resume(way: str, make: Variant, tmp_path: Path) -> None:
    def trainer(folder: Path, **more: Any) -> Any:
        args, model = arguments(folder, **more), make_model(dropout=0.1)
        if way == "optimizer_cls_and_kwargs":
            return make_trainer(model, args, make)
        optimizer = make(model.parameters(), lr=1e-3, weight_decay=0.1, **OPTIONS)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=8)
        return transformers.Trainer(model, args, train_dataset=examples(), optimizers=(optimizer, schedule))

    whole = trainer(tmp_path / "whole")
    whole.train()
    saving = {"save_strategy": "steps", "save_steps": 3}
    trainer(tmp_path / "stopped", **saving).train()
    resumed = trainer(tmp_path / "stopped", **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "stopped" / "checkpoint-3"))
    assert_same_training(resumed, whole)


@pytest.mark.parametrize(
    "options",
    [{"master_weight_bits": 24}, {"master_weight_bits": 32}, {"stochastic_rounding": True, "rounding_seed": 5}],
    ids=str,
)
@pytest.mark.parametrize("cls", [lion.Lion, lion.Lion8bit])
def test_bfloat16_weights_stop_and_resume(cls: type[lion.Lion], options: dict[str, Any], tmp_path: Path) -> None:
    def trainer(folder: Path) -> Any:
        args = arguments(folder, save_strategy="steps", save_steps=3, learning_rate=1e-5)
        model = make_model(dropout=0.1).to(torch.bfloat16)
        chosen = optimizer_cls_and_kwargs(args, cls, **options)
        return transformers.Trainer(model, args, train_dataset=examples(), optimizer_cls_and_kwargs=chosen)

    whole = trainer(tmp_path / "whole")
    whole.train()
    trainer(tmp_path / "stopped").train()
    resumed = trainer(tmp_path / "stopped")
    resumed.train(resume_from_checkpoint=str(tmp_path / "stopped" / "checkpoint-3"))
    assert_same_training(resumed, whole)
    for one, other in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert one.dtype == torch.bfloat16
        assert torch.equal(one.view(torch.int16), other.view(torch.int16))


@some_classes
@pytest.mark.parametrize(
    "more",
    [
        {"max_grad_norm": 0.05},
        {"max_grad_norm": 0.0, "gradient_accumulation_steps": 3},
        {"bf16": True},
        {"max_grad_norm": 0.05, "gradient_accumulation_steps": 2, "bf16": True},
    ],
    ids=str,
)
def test_equals_a_loop_by_hand(make: Variant, more: dict[str, Any], tmp_path: Path) -> None:
    model = make_model()
    by_hand = copy.deepcopy(model)
    batches: list[dict[str, Any]] = []
    model.register_forward_pre_hook(lambda module, args, kwargs: batches.append(kwargs), with_kwargs=True)
    args = arguments(tmp_path, **more)
    trainer = make_trainer(model, args, make)
    trainer.train()

    decayed = trainer.get_decay_parameter_names(by_hand)
    named = dict(by_hand.named_parameters())
    optimizer = make(
        [
            {"params": [p for name, p in named.items() if name in decayed], "weight_decay": 0.1},
            {"params": [p for name, p in named.items() if name not in decayed]},
        ],
        lr=1e-3,
        **OPTIONS,
    )
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, 2, 8)
    accumulated = args.gradient_accumulation_steps
    assert len(batches) == 8 * accumulated
    norms = []
    for number, batch in enumerate(batches, 1):
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            loss = by_hand(**batch).loss
        loss.backward()
        if number % accumulated == 0:
            if args.max_grad_norm:
                norms.append(torch.nn.utils.clip_grad_norm_(by_hand.parameters(), args.max_grad_norm))
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    if args.max_grad_norm == 0.05:
        assert min(norms) > 0.05
    assert_unchanged(trainer.optimizer.optimizer, snapshot(optimizer))


def test_steps_in_backward(tmp_path: Path) -> None:
    trainers = []
    for in_backward in (False, True):
        model, args = make_model(), arguments(tmp_path, max_grad_norm=0.0)
        optimizer = lion.Lion8bit(model.parameters(), lr=1e-3, **OPTIONS)
        if in_backward:
            lion.StepInBackward(optimizer)
        trainers.append(transformers.Trainer(model, args, train_dataset=examples(), optimizers=(optimizer, None)))
        trainers[-1].train()
    assert_same_training(*trainers)


def test_the_name_lion_8bit_is_another_class(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    args = arguments(tmp_path, optim="lion_8bit")
    cls, kwargs = transformers.Trainer.get_optimizer_cls_and_kwargs(args)
    assert cls.__module__.startswith("bitsandbytes")
    assert kwargs["betas"] == (0.9, 0.999)

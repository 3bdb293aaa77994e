"""What ``lion.trainer`` makes of TrainingArguments; runs without transformers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import lion
from lion.trainer import optimizer_cls_and_kwargs


def arguments(**more: Any) -> SimpleNamespace:
    defaults = {
        "learning_rate": 3e-4,
        "weight_decay": 0.1,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_epsilon": 1e-8,
        "optim_args": None,
    }
    return SimpleNamespace(**{**defaults, **more})


def test_defaults_of_adam_become_those_of_lion() -> None:
    cls, kwargs = optimizer_cls_and_kwargs(arguments())
    assert cls is lion.Lion
    group = cls([torch.ones(3)], **kwargs).param_groups[0]
    assert (group["lr"], group["weight_decay"], group["betas"]) == (3e-4, 0.1, (0.9, 0.99))


@pytest.mark.parametrize("betas", [(0.95, 0.98), (0.9, 0.98), (0.8, 0.999)])
def test_chosen_betas_stay(betas: tuple[float, float]) -> None:
    _, kwargs = optimizer_cls_and_kwargs(arguments(adam_beta1=betas[0], adam_beta2=betas[1]))
    assert kwargs["betas"] == betas


def test_keywords_go_first() -> None:
    cls, kwargs = optimizer_cls_and_kwargs(
        arguments(), lion.PagedLion8bit, lr=1.0, betas=(0.9, 0.999), percentile_clipping=95
    )
    assert cls is lion.PagedLion8bit
    assert kwargs == {"lr": 1.0, "weight_decay": 0.1, "betas": (0.9, 0.999), "percentile_clipping": 95}


def test_refusals() -> None:
    with pytest.raises(ValueError, match="Invalid optim_args: 'percentile_clipping=95'"):
        optimizer_cls_and_kwargs(arguments(optim_args="percentile_clipping=95"))
    for cls in (torch.optim.AdamW, lion.Lion([torch.ones(3)]), "lion_8bit"):
        with pytest.raises(TypeError, match="Invalid cls"):
            optimizer_cls_and_kwargs(arguments(), cls)  # type: ignore[arg-type]

"""Lightning: the steps of a loop by hand, and the same bits after a stop."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lion
from tests.integration.support import CHOSEN, OPTIONS, make_data, make_model
from tests.optimizers.support import Variant, assert_unchanged, snapshot

lightning = pytest.importorskip("lightning.pytorch")
pytestmark = pytest.mark.usefixtures("one_thread")

some_classes = pytest.mark.parametrize("make", CHOSEN.values(), ids=CHOSEN.keys())


class Module(lightning.LightningModule):
    def __init__(self, make: Variant, unscale_first: bool = False) -> None:
        super().__init__()
        self.model = make_model()
        self.make = make
        self.unscale_first = unscale_first

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        # Lightning draws random numbers between the batches, and does not save the generator.
        torch.manual_seed(index)
        return nn.functional.mse_loss(self.model(batch[0]).float(), batch[1])

    def configure_optimizers(self) -> Any:
        optimizer = self.make(self.parameters(), **OPTIONS)
        # Otherwise Lightning refuses to clip gradients in mixed precision.
        optimizer.unscales_in_step = not self.unscale_first
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=8)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def train(
    make: Variant,
    folder: Path,
    checkpoint: Path | None = None,
    module: Module | None = None,
    **settings: Any,
) -> lion.Lion:
    """Take steps with Lightning's Trainer, 8 unless told otherwise, and return the optimizer."""
    module = module or Module(make)
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, default_root_dir=folder, logger=False,
        enable_progress_bar=False, enable_model_summary=False,
        **{"max_steps": 8, "enable_checkpointing": False, **settings},
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have many workers")
        warnings.filterwarnings("ignore", "Be aware that when using `ckpt_path`")
        warnings.filterwarnings("ignore", "`isinstance.treespec, LeafSpec.` is deprecated")
        trainer.fit(module, torch.utils.data.DataLoader(make_data(), batch_size=None), ckpt_path=checkpoint)
    return module.optimizers().optimizer


@some_classes
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_clip_val": 0.1},
        {"accumulate_grad_batches": 2},
        {"precision": "bf16-mixed"},
        {"gradient_clip_val": 0.1, "accumulate_grad_batches": 2, "precision": "bf16-mixed"},
    ],
    ids=str,
)
def test_equals_a_loop_by_hand(make: Variant, settings: dict[str, Any], tmp_path: Path) -> None:
    optimizer = train(make, tmp_path, module=Module(make, unscale_first="precision" in settings), **settings)

    accumulated = settings.get("accumulate_grad_batches", 1)
    module = Module(make)
    chosen = module.configure_optimizers()
    by_hand, schedule = chosen["optimizer"], chosen["lr_scheduler"]["scheduler"]
    for index, batch in enumerate(make_data()[: 8 * accumulated]):
        with torch.autocast("cpu", torch.bfloat16, enabled="precision" in settings):
            loss = module.training_step(batch, index)
        (loss / accumulated).backward()
        if (index + 1) % accumulated == 0:
            if "gradient_clip_val" in settings:
                assert nn.utils.clip_grad_norm_(module.parameters(), 0.1) > 0.1
            by_hand.step()
            schedule.step()
            by_hand.zero_grad()
    optimizer.zero_grad()
    assert_unchanged(optimizer, snapshot(by_hand))


@some_classes
def test_stop_and_resume(make: Variant, tmp_path: Path) -> None:
    # Within an epoch Lightning would begin anew with a plain loader's first batch, so the stop is after one of two.
    settings = {"max_steps": -1, "limit_train_batches": 4, "gradient_clip_val": 0.1}
    whole = train(make, tmp_path, max_epochs=2, **settings)
    saving = lightning.callbacks.ModelCheckpoint(tmp_path, "stopped")
    train(make, tmp_path, max_epochs=1, enable_checkpointing=True, callbacks=[saving], **settings)
    resumed = train(make, tmp_path, checkpoint=tmp_path / "stopped.ckpt", max_epochs=2, **settings)
    for optimizer in (whole, resumed):
        optimizer.zero_grad()
        assert {state["step"].item() for state in optimizer.state.values()} == {8}
    assert_unchanged(resumed, snapshot(whole))


def float16() -> Any:
    # Lightning makes a scaler for GPUs only; one of its own can be given.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**18)
    return lightning.plugins.MixedPrecision("16-mixed", "cpu", scaler)


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@some_classes
@pytest.mark.parametrize("clip", [None, 0.1])
def test_float16_with_a_scaler(make: Variant, clip: float | None, tmp_path: Path) -> None:
    # What may not be clipped is unscaled in the step, unlike by hand.
    module = Module(make, unscale_first=clip is not None)
    optimizer = train(make, tmp_path, module=module, plugins=(plugin := float16()), gradient_clip_val=clip)

    module, scaler = Module(make, unscale_first=True), float16().scaler
    chosen = module.configure_optimizers()
    by_hand, schedule = chosen["optimizer"], chosen["lr_scheduler"]["scheduler"]
    for index, batch in enumerate(make_data()[:8]):
        with torch.autocast("cpu", torch.float16):
            loss = module.training_step(batch, index)
        scaler.scale(loss).backward()
        scaler.unscale_(by_hand)
        if clip is not None:
            nn.utils.clip_grad_norm_(module.parameters(), clip)
        scaler.step(by_hand)
        scaler.update()
        schedule.step()
        by_hand.zero_grad()
    # Steps were skipped, and others not.
    assert plugin.scaler.get_scale() == scaler.get_scale() < 2.0**18
    assert {0 < state["step"].item() < 8 for state in optimizer.state.values()} == {True}
    optimizer.zero_grad()
    assert_unchanged(optimizer, snapshot(by_hand))


@pytest.mark.parametrize("make", [Variant(torch.optim.AdamW, {"fused": True}), CHOSEN["Lion"]], ids=["AdamW", "Lion"])
def test_clipping_in_mixed_precision_is_refused_by_lightning(make: Variant, tmp_path: Path) -> None:
    # Also of torch's own optimizers that unscale in the step; docs/trainers.md says what to do.
    module = Module(make)
    module.configure_optimizers = lambda: make(module.parameters())  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        train(make, tmp_path, module=module, precision="bf16-mixed", gradient_clip_val=0.1)


def test_steps_in_backward(tmp_path: Path) -> None:
    class InBackward(Module):
        def configure_optimizers(self) -> Any:
            chosen = super().configure_optimizers()
            lion.StepInBackward(chosen["optimizer"])
            return chosen

    make = CHOSEN["Lion8bit"]
    expected = train(make, tmp_path)
    expected.zero_grad()
    assert_unchanged(train(make, tmp_path, module=InBackward(make)), snapshot(expected))

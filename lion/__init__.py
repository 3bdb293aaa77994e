"""Lion optimizers with 32-bit and 8-bit state for PyTorch, equal to their specification bit for bit."""

from lion import exchange, functional
from lion.backends import use_backend
from lion.in_backward import StepInBackward
from lion.optimizers import Lion, Lion8bit, Lion32bit, PagedLion, PagedLion8bit, PagedLion32bit
from lion.overrides import GlobalOptimManager

__all__ = [
    "GlobalOptimManager",
    "Lion",
    "Lion8bit",
    "Lion32bit",
    "PagedLion",
    "PagedLion8bit",
    "PagedLion32bit",
    "StepInBackward",
    "exchange",
    "functional",
    "use_backend",
]

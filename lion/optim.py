"""The optimizers under the name that bitsandbytes has for them: ``lion.optim.Lion8bit``."""

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
]

"""Lion optimizers with 32-bit and 8-bit state for PyTorch, equal to their specification bit for bit."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lion import exchange, functional, optim
    from lion._backends import use_backend
    from lion.in_backward import StepInBackward
    from lion.optimizers import Lion, Lion8bit, Lion32bit, PagedLion, PagedLion8bit, PagedLion32bit
    from lion.overrides import GlobalOptimManager

__version__ = "0.1.0"

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
    "optim",
    "use_backend",
]

_MODULES = {
    "GlobalOptimManager": "overrides",
    "StepInBackward": "in_backward",
    "exchange": "exchange",
    "functional": "functional",
    "optim": "optim",
    "use_backend": "_backends",
}


# Modules whose names work after `import lion` alone, as if it had imported them.
_NAMED = ("in_backward", "optimizers", "overrides", "reference", "trainer")


# What needs torch is imported when it is asked for: the specification and the kernels are read and run without it.
def __getattr__(name: str) -> Any:
    if name in _NAMED:
        return import_module(f"lion.{name}")
    if name not in __all__:
        raise AttributeError(f"module 'lion' has no attribute {name!r}")
    module = _MODULES.get(name, "optimizers")
    found = import_module(f"lion.{module}")
    value = found if name == module else getattr(found, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

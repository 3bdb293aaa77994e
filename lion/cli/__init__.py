"""The commands of ``python -m lion``."""

from __future__ import annotations

from collections.abc import Collection

import torch


class UsageError(Exception):
    """A mistake of the user: shown as one line, without a traceback."""


def checked_device(name: str) -> torch.device:
    """Return the device of a name, or raise UsageError if this machine does not have it."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"Invalid --device: {name}; {str(error).splitlines()[0]}") from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"Invalid --device: {name}; cpu and cuda devices are supported")
    return device


def at_least(name: str, value: int, minimum: int) -> None:
    """Raise UsageError if the value of an option is below its minimum."""
    if value < minimum:
        raise UsageError(f"Invalid {name}: {value}; at least {minimum} is needed")


def checked_names(option: str, given: str, allowed: Collection[str]) -> list[str]:
    """Return the names in a list separated by commas, or raise UsageError if one is not allowed."""
    names = [name.strip() for name in given.split(",")]
    for name in names:
        if name not in allowed:
            raise UsageError(f"Invalid {option}: {name!r}; {', '.join(allowed)} are allowed")
    return list(dict.fromkeys(names))


def device_name(device: torch.device) -> str:
    """Return what to call a device in a table."""
    if device.type == "cuda":
        return f"{device}: {torch.cuda.get_device_name(device)}"
    return str(device)

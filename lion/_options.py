"""The options of a parameter group: their allowed values, checked in one place."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Set
from enum import Enum
from itertools import islice
from typing import Any

import numpy as np
from torch import Tensor

from lion import reference

HYPERPARAMETERS = ("lr", "betas", "weight_decay")
STATE_OPTIONS = ("optim_bits", "min_8bit_size", "percentile_clipping", "block_wise", "is_paged")


class Kind(Enum):
    """How the momentum of a parameter is kept."""

    FLOAT32 = "32bit"
    BLOCKWISE = "8bit_blockwise"
    TENSORWISE = "8bit_tensorwise"


def check_value(key: str, value: Any) -> Any:
    """Return an option's value in its canonical type.

    Args:
        key: Name of the option, one of :data:`CHECKS`.
        value: The value given.

    Raises:
        TypeError: If the value has the wrong type.
        ValueError: If the value is not allowed.
    """
    return CHECKS[key](key, value)


def check_group(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return all options of a group, checked."""
    missing = [key for key in CHECKS if key not in group]
    if missing:
        raise ValueError(f"Invalid parameter group: the option {missing[0]!r} is missing")
    checked = {key: check_value(key, group[key]) for key in CHECKS}
    if not isinstance(checked["lr"], Tensor):
        reference.coefficients(*(checked[key] for key in HYPERPARAMETERS))
    return checked


def _learning_rate(key: str, lr: Any) -> float | Tensor:
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"Tensor lr must be 1-element; its shape is {tuple(lr.shape)}")
        if not lr.is_floating_point():
            raise TypeError(f"Invalid learning rate: {lr.dtype}; a floating-point tensor is allowed")
        if lr.is_meta:
            raise ValueError("Invalid learning rate: a tensor without data, on the device meta")
        # Reading a tensor of another device would wait for that device.
        if lr.device.type == "cpu":
            _non_negative("learning rate:", lr.item())
        return lr
    return _non_negative("learning rate:", lr)


def _weight_decay(key: str, weight_decay: Any) -> float:
    return _non_negative("weight_decay value:", weight_decay)


def _betas(key: str, betas: Any) -> tuple[float, float]:
    try:
        pair = () if isinstance(betas, (Iterator, Mapping, Set)) else tuple(islice(betas, 3))
    except Exception as error:
        raise TypeError(f"Invalid betas: {shown(betas)}; a pair of numbers is allowed") from error
    if len(pair) != 2:
        raise ValueError(f"Invalid betas: {shown(betas)}; a pair of numbers is allowed")
    first, second = (_number(f"beta parameter at index {index}:", beta) for index, beta in enumerate(pair))
    for index, beta in enumerate((first, second)):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid beta parameter at index {index}: {beta}; at least 0 and below 1 is allowed")
    return first, second


def _optim_bits(key: str, optim_bits: Any) -> int:
    bits = integer(key, optim_bits)
    if bits not in (8, 32):
        raise ValueError(f"Invalid optim_bits value: {bits}; 8 and 32 are allowed")
    return bits


def _min_8bit_size(key: str, min_8bit_size: Any) -> int:
    size = integer(key, min_8bit_size)
    if size < 0:
        raise ValueError(f"Invalid min_8bit_size value: {size}; at least 0 is allowed")
    return size


def _percentile_clipping(key: str, percentile_clipping: Any) -> int:
    percentile = integer(key, percentile_clipping)
    if not 1 <= percentile <= 100:
        raise ValueError(f"Invalid percentile_clipping value: {percentile}; 1 to 100 is allowed")
    return percentile


def _non_negative(name: str, value: Any) -> float:
    number = _number(name, value)
    if not 0.0 <= number < math.inf:
        raise ValueError(f"Invalid {name} {number}; at least 0 and finite is allowed")
    return number


def _number(name: str, value: Any) -> float:
    if type(value) is float:
        return value
    # float() reads text and bytes too, and drops the imaginary part of NumPy's complex numbers.
    is_number = hasattr(type(value), "__float__") or hasattr(type(value), "__index__")
    if not is_number or getattr(getattr(value, "dtype", None), "kind", "f") in "cmMSU":
        raise TypeError(f"Invalid {name} {shown(value)}; a number is allowed")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"Invalid {name} {shown(value)}; it is too large") from None
    except Exception as error:
        raise TypeError(f"Invalid {name} {shown(value)}; a number is allowed") from error


def shown(value: object) -> str:
    """Return what to show of a value in an error, however long it is and whatever its ``repr`` does."""
    try:
        text = repr(value)
    except Exception:
        text = f"an object of type {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:200]}..."


def flag(key: str, value: Any) -> bool:
    """Return a truth value that may be given as 0 or 1.

    Args:
        key: What to call it in an error.
        value: The value given.

    Raises:
        TypeError: If it is anything else.
    """
    if not isinstance(value, (bool, int, np.bool_)) or value not in (0, 1):
        raise TypeError(f"Invalid {key} value: {shown(value)}; True and False are allowed")
    return bool(value)


def integer(key: str, value: Any) -> int:
    """Return an integer that may be given as an integral float, such as 5.0.

    Args:
        key: What to call it in an error.
        value: The value given.

    Raises:
        TypeError: If it is no number, or a truth value.
        ValueError: If it is not integral.
    """
    if isinstance(value, (bool, np.bool_)):
        raise TypeError(f"Invalid {key} value: {value}; an integer is allowed")
    number = _number(f"{key} value:", value)
    if not number.is_integer():
        raise ValueError(f"Invalid {key} value: {number}; an integer is allowed")
    return int(number)


CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "lr": _learning_rate,
    "betas": _betas,
    "weight_decay": _weight_decay,
    "optim_bits": _optim_bits,
    "min_8bit_size": _min_8bit_size,
    "percentile_clipping": _percentile_clipping,
    "block_wise": flag,
    "is_paged": flag,
}

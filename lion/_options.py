"""The options of a parameter group: their allowed values, checked in one place."""

from __future__ import annotations

import difflib
import functools
import math
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping, Set
from enum import Enum
from itertools import islice
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from lion import reference

HYPERPARAMETERS = ("lr", "betas", "weight_decay")
# How 16-bit weights are kept, with the values that groups have which do not say.
WEIGHT_OPTIONS: dict[str, Any] = {"master_weight_bits": None, "stochastic_rounding": False, "rounding_seed": 0}
STATE_OPTIONS = ("optim_bits", "min_8bit_size", "percentile_clipping", "block_wise", "is_paged", *WEIGHT_OPTIONS)

# Options of other optimizers, torch's and other projects' Lions, that change what a step computes, with the value that
# does not.
OTHER_ALGORITHMS: dict[str, Any] = {
    "adanorm": False,
    "ams_bound": False,
    "amsgrad": False,
    "caution": False,
    "cautious": False,
    "cautious_factor": 1,
    "cautious_wd": False,
    "centered": False,
    "corrected_weight_decay": False,
    "dampening": 0,
    "decouple_lr": False,
    "decoupled_weight_decay": True,
    "differentiable": False,
    "fixed_decay": False,
    "kahan_sum": False,
    "lr_decay": 0,
    "max_unorm": 0,
    "maximize": False,
    "momentum": 0,
    "nesterov": False,
    "skip_zeros": False,
    "use_gc": False,
    "weight_decouple": True,
}
# What to do without an option that programs give to torch's optimizers.
_ADVICE = {
    "amsgrad": "there is no second moment to take the maximum of",
    "capturable": "every step on CUDA tensors can be captured in a CUDA graph",
    "differentiable": "a step cannot be differentiated",
    "eps": "nothing is divided by",
    "foreach": "a step takes all parameters of a kind at once as it is",
    "fused": "a step is one kernel call per batch of parameters as it is",
    "maximize": "minimize the negative loss",
    "momentum": "its weights are betas",
}
# Attributes that `args` may not have: what the constructor refuses as a keyword, with the value that asks for nothing.
# Numbers of SGD, RMSprop and Adagrad may be there, for programs keep those of all their optimizers in one object.
_NOT_IN_ARGS: dict[str, Any] = {
    key: value
    for key, value in {**OTHER_ALGORITHMS, "capturable": False, "foreach": False, "fused": False}.items()
    if key not in ("centered", "dampening", "lr_decay", "momentum", "nesterov")
}
# How alike an unknown key and the name of an option have to be for one to be taken for the other.
_ALIKE = 0.88
# A negative learning rate of at most this share of the largest one of its group is what rounding left of 0: in the
# arithmetic of a schedule, or in that of a tensor of fewer bits.
_ROUNDING, _ROUNDING_OF_TENSORS = 2.0**-40, 2.0**-20

_Init = TypeVar("_Init", bound=Callable[..., None])


class Kind(Enum):
    """How the momentum of a parameter is kept."""

    FLOAT32 = "32bit"
    BLOCKWISE = "8bit_blockwise"
    TENSORWISE = "8bit_tensorwise"


def check_value(key: str, value: Any, group: Mapping[str, Any] | None = None) -> Any:
    """Return an option's value in its canonical type.

    Args:
        key: Name of the option, one of :data:`CHECKS`.
        value: The value given.
        group: The group that it is for, which tells a learning rate that rounding left below 0 (default: none).

    Raises:
        TypeError: If the value has the wrong type.
        ValueError: If the value is not allowed.
    """
    if key == "lr" and group is not None:
        return _learning_rate(key, value, group)
    return CHECKS[key](key, value)


def check_group(group: Mapping[str, Any], number: int | None = None) -> dict[str, Any]:
    """Return all options of a group, checked; those of 16-bit weights may be missing.

    Args:
        group: The group.
        number: Its number, which errors name (default: it has none).

    Raises:
        TypeError: If a value has the wrong type.
        ValueError: If a value is missing or not allowed, or an option of another optimizer changes what a step does.
    """
    group = {**WEIGHT_OPTIONS, **group}
    try:
        missing = [key for key in CHECKS if key not in group]
        if missing:
            raise ValueError(f"Invalid parameter group: the option {missing[0]!r} is missing")
        check_algorithm(group)
        checked = {key: check_value(key, group[key], group) for key in CHECKS}
        check_rounding(checked)
        if not isinstance(checked["lr"], Tensor):
            reference.coefficients(*(checked[key] for key in HYPERPARAMETERS))
    except (TypeError, ValueError) as error:
        if number is None:
            raise
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{error} (group {number})") from error
    return checked


def check_rounding(options: Mapping[str, Any], name: str = "") -> None:
    """Raise if weights were to have master bits and to be rounded at random, too.

    Args:
        options: All options of a group or of a parameter.
        name: What to call the parameter in the error (default: there is none).

    Raises:
        ValueError: If both are asked for.
    """
    bits = options["master_weight_bits"]
    if bits is not None and options["stochastic_rounding"]:
        raise ValueError(
            f"Invalid stochastic_rounding{name and f' for {name}'}: True beside master_weight_bits={bits}, which leave "
            "nothing to round; choose one of them"
        )


def check_algorithm(group: Mapping[str, Any], number: int | None = None) -> None:
    """Raise if an option of another optimizer in a group would change what a step does.

    Args:
        group: The group; keys that are nobody's option are left alone.
        number: Its number, which the error names (default: it has none).

    Raises:
        ValueError: Naming the option.
    """
    for key, value in group.items():
        if key in OTHER_ALGORITHMS and not _is_scalar(value, OTHER_ALGORITHMS[key]):
            where = "parameter group" if number is None else f"group {number}"
            raise ValueError(
                f"Invalid {where}: {key}={shown(value)} has no counterpart in Lion{_advice(key)}; "
                f"leave it out or set it to {OTHER_ALGORITHMS[key]}"
            )


def check_args(args: object) -> dict[str, Any]:
    """Return the options that an object supplies as attributes.

    Args:
        args: The object, or None.

    Raises:
        TypeError: If it is a dict.
        ValueError: If an attribute asks for what the constructor refuses as a keyword.
    """
    if isinstance(args, Mapping):
        raise TypeError(f"Invalid args: {shown(args)}; expected an object with attributes, not a dict")
    for key, nothing in _NOT_IN_ARGS.items():
        value = getattr(args, key, None)
        if not _is_scalar(value, nothing):
            raise ValueError(
                f"Invalid args: {key}={shown(value)} has no counterpart in Lion{_advice(key)}; "
                f"leave it out or set it to {nothing}"
            )
    return {key: getattr(args, key) for key in STATE_OPTIONS if hasattr(args, key)}


def warn_of_misspelled(group: Mapping[str, Any], number: int) -> None:
    """Warn of keys of a group that are nobody's option and nearly the name of one.

    Args:
        group: The group.
        number: Its number.
    """
    for key in group:
        if isinstance(key, str) and (option := _meant_by(key)):
            warnings.warn(
                f"The key {shown(key)} of group {number} has no effect; did you mean {option!r}?", stacklevel=2
            )


def _meant_by(key: str) -> str | None:
    """Return the option whose name a key nearly is; None for an option's own name, ours or another optimizer's."""
    if key in CHECKS or key in OTHER_ALGORITHMS:
        return None
    return next(iter(difflib.get_close_matches(key, CHECKS, n=1, cutoff=_ALIKE)), None)


def _advice(key: str) -> str:
    return f": {_ADVICE[key]}" if key in _ADVICE else ""


def _is_scalar(value: Any, wanted: Any) -> bool:
    """Return whether a value is None or a number or a truth value equal to another."""
    is_scalar = isinstance(value, (bool, int, float, np.generic))
    return value is None or (is_scalar and bool(value == wanted))


def explains_keywords(init: _Init) -> _Init:
    """Make a constructor say what to do without a keyword that other optimizers have; its signature stays."""

    @functools.wraps(init)
    def explaining(self: Any, *args: Any, **kwargs: Any) -> None:
        for key in kwargs:
            if key in OTHER_ALGORITHMS or key in _ADVICE:
                raise TypeError(f"{type(self).__name__} has no option {key!r}{_advice(key)}; leave it out")
            if option := _meant_by(key):
                raise TypeError(f"{type(self).__name__} has no option {key!r}; did you mean {option!r}?")
        init(self, *args, **kwargs)

    return cast(_Init, explaining)


def _learning_rate(key: str, lr: Any, group: Mapping[str, Any] | None = None) -> float | Tensor:
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"Tensor lr must be 1-element; its shape is {tuple(lr.shape)}")
        if not lr.is_floating_point():
            raise TypeError(f"Invalid learning rate: {lr.dtype}; expected a floating-point tensor")
        if lr.is_meta:
            raise ValueError("Invalid learning rate: a tensor without data, on the device meta")
        # Reading a tensor of another device would wait for that device.
        if lr.device.type == "cpu":
            rate_on_host(lr, group)
        return lr
    return _rate(lr, group, _ROUNDING)


def rate_on_host(lr: Tensor, group: Mapping[str, Any] | None) -> float:
    """Return the learning rate in a tensor, checked; waits for its device."""
    return _rate(lr.item(), group, _ROUNDING if lr.dtype == torch.float64 else _ROUNDING_OF_TENSORS)


def _rate(lr: Any, group: Mapping[str, Any] | None, rounding: float) -> float:
    number = _number("learning rate:", lr)
    if number < 0.0 and group is not None and -number <= rounding * _largest_rate(group):
        return 0.0
    return _non_negative("learning rate:", number)


def _largest_rate(group: Mapping[str, Any]) -> float:
    """Return the largest rate that schedulers noted in a group; 1 where there is none."""
    noted = [group[key] for key in ("initial_lr", "max_lr") if key in group]
    numbers = [
        float(rate)
        for rate in noted
        if isinstance(rate, (int, float, np.integer, np.floating))
        or (isinstance(rate, Tensor) and rate.numel() == 1 and rate.device.type == "cpu")
    ]
    return max(numbers, default=1.0)


def _weight_decay(key: str, weight_decay: Any) -> float:
    return _non_negative("weight_decay value:", weight_decay)


def _betas(key: str, betas: Any) -> tuple[float, float]:
    try:
        pair = () if isinstance(betas, (Iterator, Mapping, Set)) else tuple(islice(betas, 3))
    except Exception as error:
        raise TypeError(f"Invalid betas: {shown(betas)}; expected a pair of numbers") from error
    if len(pair) != 2:
        raise ValueError(f"Invalid betas: {shown(betas)}; expected a pair of numbers")
    first, second = (_number(f"beta parameter at index {index}:", beta) for index, beta in enumerate(pair))
    for index, beta in enumerate((first, second)):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid beta parameter at index {index}: {beta}; expected at least 0 and below 1")
    return first, second


def _optim_bits(key: str, optim_bits: Any) -> int:
    bits = integer(key, optim_bits)
    if bits not in (8, 32):
        raise ValueError(f"Invalid optim_bits value: {bits}; expected 8 or 32")
    return bits


def _min_8bit_size(key: str, min_8bit_size: Any) -> int:
    size = integer(key, min_8bit_size)
    if size < 0:
        raise ValueError(f"Invalid min_8bit_size value: {size}; expected at least 0")
    return size


def _percentile_clipping(key: str, percentile_clipping: Any) -> int:
    if isinstance(percentile_clipping, (bool, np.bool_)):
        raise TypeError(
            f"Invalid percentile_clipping value: {percentile_clipping}; expected an integer from 1 to 100. "
            "In bitsandbytes since 0.50, is_paged is the argument at this place: give it by name"
        )
    number = _number("percentile_clipping value:", percentile_clipping)
    if not (number.is_integer() and 1 <= number <= 100):
        guess = f"; did you mean {number * 100:.0f}?" if 0.01 <= number < 1 else ""
        raise ValueError(
            f"Invalid percentile_clipping value: {shown(percentile_clipping)}; expected an integer from 1 to 100{guess}"
        )
    return int(number)


def _master_weight_bits(key: str, master_weight_bits: Any) -> int | None:
    bits = None if master_weight_bits is None else integer(key, master_weight_bits)
    if bits not in (None, 24, 32):
        raise ValueError(f"Invalid master_weight_bits value: {bits}; expected None, 24 or 32")
    return bits


def _rounding_seed(key: str, rounding_seed: Any) -> int:
    # As a float, a seed would lose its lower bits.
    is_integer = isinstance(rounding_seed, (int, np.integer)) and not isinstance(rounding_seed, bool)
    seed = operator.index(rounding_seed) if is_integer else integer(key, rounding_seed)
    if not 0 <= seed < 2**64:
        raise ValueError(f"Invalid rounding_seed value: {shown(seed)}; expected 0 to 2**64 - 1")
    return seed


def _non_negative(name: str, value: Any) -> float:
    number = _number(name, value)
    if not 0.0 <= number < math.inf:
        raise ValueError(f"Invalid {name} {number}; expected a finite number, at least 0")
    return number


def _number(name: str, value: Any) -> float:
    if type(value) is float:
        return value
    # float() reads text and bytes too, and drops the imaginary part of NumPy's complex numbers.
    is_number = hasattr(type(value), "__float__") or hasattr(type(value), "__index__")
    if not is_number or getattr(getattr(value, "dtype", None), "kind", "f") in "cmMSU":
        raise TypeError(f"Invalid {name} {shown(value)}; expected a number")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"Invalid {name} {shown(value)}; it is too large") from None
    except Exception as error:
        raise TypeError(f"Invalid {name} {shown(value)}; expected a number") from error


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
        raise TypeError(f"Invalid {key} value: {shown(value)}; expected True or False")
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
        raise TypeError(f"Invalid {key} value: {value}; expected an integer")
    number = _number(f"{key} value:", value)
    if not number.is_integer():
        raise ValueError(f"Invalid {key} value: {number}; expected an integer")
    return int(number)


CHECKS: dict[str, Callable[..., Any]] = {
    "lr": _learning_rate,
    "betas": _betas,
    "weight_decay": _weight_decay,
    "optim_bits": _optim_bits,
    "min_8bit_size": _min_8bit_size,
    "percentile_clipping": _percentile_clipping,
    "block_wise": flag,
    "is_paged": flag,
    "master_weight_bits": _master_weight_bits,
    "stochastic_rounding": flag,
    "rounding_seed": _rounding_seed,
}

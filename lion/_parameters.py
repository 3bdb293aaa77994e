"""Parameters and their gradients: what to call them in an error, and what is supported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lion._backends import DTYPES
from lion._memory import addresses, sharding
from lion._options import check_rounding

Group = Mapping[str, Any]


def parameter_name(group: Group, number: int, index: int) -> str:
    """Return what to call a parameter in an error."""
    name = own_name(group, index)
    return f"parameter {index} of group {number}" if name is None else f"parameter {name!r}"


def own_name(group: Group, index: int) -> Any:
    """Return the name that a parameter was given; None without one, or where parameters came or went without theirs."""
    names = names_of(group)
    return names[index] if len(names) == len(group["params"]) else None


def names_of(group: Group) -> Sequence[Any]:
    """Return the names of a group's parameters: none where a program has put something else under their key."""
    names = group.get("param_names")
    return names if isinstance(names, (list, tuple)) else ()


def check_parameter(p: Tensor, name: str) -> None:
    """Raise unless a parameter can be updated, as far as that is known before it has a gradient."""
    if torch.nn.parameter.is_lazy(p):
        # A lazy module gives it a dtype and a shape in its first forward pass, without which it has no gradient.
        return
    if addresses.layout(p) != torch.strided:
        raise TypeError(f"Invalid {name}: layout {addresses.layout(p)}; dense tensors are supported")
    if sharding.is_dtensor(p) and any(placement.is_partial() for placement in p.placements):
        raise TypeError(f"Invalid {name}: its placements are {p.placements}; sharded and replicated ones are supported")
    if p.dtype not in DTYPES:
        raise TypeError(f"Invalid {name}: {p.dtype}; {', '.join(map(str, DTYPES))} are supported")
    if p.is_neg():
        raise TypeError(f"Invalid {name}: a view with the negative bit; resolve_neg() makes it an ordinary tensor")


def check_weights(p: Tensor, options: Mapping[str, Any], name: str) -> None:
    """Raise unless a parameter can be kept as its options say.

    Args:
        p: The parameter.
        options: All its options.
        name: What to call it in an error.

    Raises:
        ValueError: If it was to have master bits and to be rounded at random, too.
        TypeError: If it is float16 and was to have one of them.
    """
    check_rounding(options, name)
    if p.dtype == torch.float16 and (options["master_weight_bits"] is not None or options["stochastic_rounding"]):
        asked = "master_weight_bits" if options["master_weight_bits"] is not None else "stochastic_rounding"
        raise TypeError(
            f"Invalid {name}: {p.dtype} with {asked}={options[asked]}, which is for torch.bfloat16; make it that, or "
            "switch the option off for it, in a group of its own or by GlobalOptimManager"
        )


def check_gradient(p: Tensor, grad: Tensor, name: str) -> None:
    """Raise unless a parameter can be updated by its gradient."""
    check_parameter(p, name)
    if addresses.layout(grad) != torch.strided:
        raise TypeError(f"Invalid gradient of {name}: layout {addresses.layout(grad)}; dense tensors are supported")
    if sharding.is_dtensor(grad) != sharding.is_dtensor(p):
        raise TypeError(
            f"Invalid gradient of {name}: {type(grad).__name__}; a DTensor is needed where the parameter is one"
        )
    dtypes = dict.fromkeys((p.dtype, torch.float32))
    if grad.dtype not in dtypes or grad.shape != p.shape or grad.device != p.device:
        raise TypeError(
            f"Invalid gradient of {name}: {grad.dtype} of shape {tuple(grad.shape)} on {grad.device}; "
            f"{' or '.join(map(str, dtypes))} of shape {tuple(p.shape)} on {p.device} is needed"
        )
    memory, local_grad = sharding.local(p), sharding.local(grad)
    if any(stride == 0 and size > 1 for stride, size in zip(memory.stride(), memory.shape, strict=True)):
        raise ValueError(f"Invalid {name}: its elements share memory (strides {p.stride()})")
    # A copy of a gradient has no negative bit.
    plain_grad = local_grad._neg_view() if local_grad.is_neg() else local_grad
    for what, tensor in ((name, memory), (f"gradient of {name}", plain_grad)):
        if reason := addresses.unaddressable(tensor):
            raise ValueError(f"Invalid {what}: {reason}")

"""Values that nobody expects: numbers of all types, tensors of all kinds, objects whose methods raise."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import torch
from hypothesis import strategies as st

NUMPY_TYPES = (np.float16, np.float32, np.float64, np.longdouble, ml_dtypes.bfloat16, np.int8, np.uint64, np.complex64)
TORCH_TYPES = (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.complex64, torch.bool)


class Subclass(torch.Tensor):
    """A tensor of another class."""


class Raising:
    """An object whose methods raise, those that turn it into a number or a text included."""

    def __init__(self, error: type[Exception]) -> None:
        self.error = error

    def _raise(self, *args: object) -> Any:
        raise self.error

    __float__ = __index__ = __int__ = __iter__ = __len__ = __getitem__ = __bool__ = _raise
    __repr__ = __eq__ = __lt__ = __gt__ = __le__ = __ge__ = __contains__ = __sub__ = __deepcopy__ = _raise
    __hash__ = object.__hash__


class Nan:
    """An object that is a number, but none that can be used."""

    def __float__(self) -> float:
        return float("nan")


def _tensors() -> st.SearchStrategy[torch.Tensor]:
    number = torch.tensor(0.5)
    kinds: list[Callable[[], torch.Tensor]] = [
        lambda: number.clone(),
        lambda: torch.ones(1),
        lambda: torch.ones(2),
        lambda: torch.ones(0),
        lambda: torch.zeros((), device="meta"),
        lambda: number.clone().requires_grad_(),
        lambda: number.clone().requires_grad_() * 1,
        lambda: torch.nn.Parameter(number.clone()),
        lambda: number.clone().as_subclass(Subclass),
        lambda: torch._neg_view(-number),
        lambda: torch.ones(1).to_sparse(),
        lambda: torch.ones(1).expand(300),
        lambda: torch.tensor(float("nan")),
        lambda: torch.tensor(1e39, dtype=torch.float64),
        lambda: torch.tensor(-0.0),
        lambda: number.to(torch.float8_e4m3fn),
    ]
    return st.sampled_from(kinds).map(lambda make: make()) | st.sampled_from(TORCH_TYPES).map(number.to)


def numbers() -> st.SearchStrategy[Any]:
    """Numbers of all types, the huge ones, the tiny ones and those that are none included."""
    small = st.sampled_from([0, 1, 8, 32, 100, 0.5, 0.9, 1e-3, -1, -0.0])
    return st.one_of(
        small,
        small.map(Decimal),
        small.map(Fraction),
        st.builds(lambda kind, x: kind(x), st.sampled_from(NUMPY_TYPES[:6]), st.sampled_from([0, 1, 8, 32, 100, 0.5])),
        st.builds(lambda kind: np.ones(1, kind), st.sampled_from(NUMPY_TYPES)),
        st.builds(lambda kind: np.array(1, kind), st.sampled_from(NUMPY_TYPES)),
        st.integers(),
        st.floats(),
        st.booleans(),
        st.complex_numbers(),
        st.sampled_from([2**63, 1e39, 1e-46, np.complex64(1 + 1j), np.timedelta64(1, "s")]),
        # Too large for a float, and too large for a text.
        st.sampled_from([400, 5000]).map(lambda digits: 10**digits),
        st.builds(Nan),
        _tensors(),
    )


def anything() -> st.SearchStrategy[Any]:
    """Any value at all."""
    flat = st.one_of(
        numbers(),
        st.text(max_size=5),
        st.binary(max_size=5),
        st.sampled_from([b"1", bytearray(b"1"), memoryview(b"1"), "0.5", "x" * 10_000, np.array("0.5")]),
        st.none(),
        st.builds(Raising, st.sampled_from([KeyError, ZeroDivisionError, ValueError, RecursionError, OSError])),
        st.sampled_from([object(), int, len, itertools, ...]),
        st.builds(itertools.repeat, st.just(0.5)),
    )
    nested = st.recursive(
        flat,
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.tuples(inner, inner),
            st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3),
        ),
        max_leaves=5,
    )
    sets = st.sets(st.sampled_from([0.25, 0.5, 0.9]), max_size=3)
    return nested | st.tuples(numbers(), numbers()) | sets | sets.map(iter) | sets.map(frozenset)

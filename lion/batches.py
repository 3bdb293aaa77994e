"""Parameters that one kernel call updates, and the table of addresses that it gets."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter, is_, itemgetter
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from lion.options import Kind

_data_ptr = Tensor.data_ptr
_numel = Tensor.numel
_is_contiguous = Tensor.is_contiguous
_is_neg = Tensor.is_neg
_dtype = attrgetter("dtype")
_shape = attrgetter("shape")

# Rows of a batch's table of addresses.
PARAM, GRAD, STATE, ABSMAX, NEW_ABSMAX, SIZE, STEP, HISTORY = range(8)


class StaleBatch(Exception):
    """A parameter or its state is no longer what the batch was made for."""


class Batch:
    """Parameters that are updated by one kernel call: same device, dtype, kind of state and options.

    The table of addresses is kept from step to step; :meth:`refresh` writes only the gradients' addresses anew and
    finds out whether anything else has moved.

    Args:
        kind: How the momentum is kept.
        percentile: Percentile clipping of all these parameters; 100 is off.
        params: The parameters; their gradients and states have been checked.
        states: Their states.
    """

    def __init__(self, kind: Kind, percentile: int, params: list[Tensor], states: list[dict[str, Any]]) -> None:
        self.kind = kind
        self.percentile = percentile
        self.params = params
        self.states = states
        self.device = params[0].device
        self.dtype = params[0].dtype
        self.table = np.zeros((8, len(params)), np.int64)
        self.table[PARAM] = self._addresses = _addresses(params)
        self.table[SIZE] = _counts(params)
        rows = {"state1": STATE, "step": STEP, "absmax1": ABSMAX, "max1": ABSMAX, "new_max1": NEW_ABSMAX}
        if percentile < 100:
            rows["gnorm_vec"] = HISTORY
        self._state_rows = [(row, key, [s[key] for s in states]) for key, row in rows.items() if key in states[0]]
        for row, _, tensors in self._state_rows:
            self.table[row] = _addresses(tensors)
        self._shapes = list(map(_shape, params))
        self._contiguous = all(map(_is_contiguous, params))
        self.operands: list[Tensor] = params
        self.gradients: Sequence[Tensor] = ()
        # The CUDA backend's.
        self.device_memory: Any = None

    def refresh(self, grads: Sequence[Tensor]) -> None:
        """Take this step's gradients, and contiguous copies of the tensors that need one.

        Args:
            grads: The gradients, in the order of the parameters.

        Raises:
            StaleBatch: If a tensor changed its dtype, shape or place since the batch was made.
        """
        if not (self._params_fit() and self._states_fit() and self._fit(grads)):
            raise StaleBatch
        table = self.table
        if not self._contiguous:
            self.operands = [p.detach().contiguous() for p in self.params]
            table[PARAM] = _addresses(self.operands)
        plain = all(map(_is_contiguous, grads)) and not any(map(_is_neg, grads))
        self.gradients = grads if plain else [g.resolve_neg().contiguous() for g in grads]
        table[GRAD] = _addresses(self.gradients)
        if not table[: STATE + 1, table[SIZE] > 0].all():
            raise StaleBatch

    def _params_fit(self) -> bool:
        params = self.params
        return (
            set(map(_dtype, params)) == {self.dtype}
            and list(map(_shape, params)) == self._shapes
            and all(map(_is_contiguous, params)) is self._contiguous
            and np.array_equal(_addresses(params), self._addresses)
        )

    def _states_fit(self) -> bool:
        return all(
            all(map(is_, map(itemgetter(key), self.states), tensors))
            and np.array_equal(_addresses(tensors), self.table[row])
            for row, key, tensors in self._state_rows
        )

    def _fit(self, grads: Sequence[Tensor]) -> bool:
        return set(map(_dtype, grads)) == {self.dtype} and np.array_equal(_counts(grads), self.table[SIZE])

    def finish(self) -> None:
        """Write staged parameters back into their own storage and let go of the gradients."""
        if not self._contiguous:
            for p, operand in zip(self.params, self.operands, strict=True):
                if operand.data_ptr() != p.data_ptr():
                    p.copy_(operand)
        self.release()

    def release(self) -> None:
        """Let go of the gradients and of all copies."""
        self.operands = self.params
        self.gradients = ()


def _counts(tensors: Sequence[Tensor]) -> npt.NDArray[np.int64]:
    return np.fromiter(map(_numel, tensors), np.int64, len(tensors))


def _addresses(tensors: Sequence[Tensor]) -> npt.NDArray[np.int64]:
    return np.fromiter(map(_data_ptr, tensors), np.int64, len(tensors))

"""Parameters that one kernel call updates, and the table of addresses that it gets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import attrgetter, eq, is_, itemgetter
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from lion._memory import sharding
from lion._options import Kind

_data_ptr = Tensor.data_ptr
_numel = Tensor.numel
_is_contiguous = Tensor.is_contiguous
_is_neg = Tensor.is_neg
_dtype = attrgetter("dtype")
_shape = attrgetter("shape")
_nbytes = attrgetter("nbytes")

# Rows of a batch's table of addresses.
PARAM, GRAD, STATE, ABSMAX, NEW_ABSMAX, SIZE, STEP, HISTORY = range(8)
_ROWS = {
    "state1": STATE,
    "step": STEP,
    "absmax1": ABSMAX,
    "max1": ABSMAX,
    "new_max1": NEW_ABSMAX,
    "gnorm_vec": HISTORY,
}


class StaleBatch(Exception):
    """A parameter or its state is no longer what the batch was made for."""


class Batch:
    """Parameters that are updated by one kernel call: same device, dtype, kind of state and options.

    The table of addresses is kept from step to step; :meth:`refresh` writes only the gradients' addresses anew and
    finds out whether anything else has moved.

    Args:
        kind: How the momentum is kept.
        percentile: Percentile clipping of all these parameters; 100 is off.
        params: The parameters, all of them DTensors or none; their gradients and states have been checked.
        states: Their states.

    Attributes:
        states: The states that this process works on: of DTensors, those of their local shards.
        operands: The parameters' memory during a step, contiguous.
        gradients: The gradients' memory during a step, contiguous.
        squared_norms: The gradients' squared norms, float32 of shape (n,), where shards had to be summed up for them.
        places: Where these stand among those that are summed, as indices on the device.
        device_memory: What the CUDA backend keeps.
    """

    def __init__(self, kind: Kind, percentile: int, params: list[Tensor], states: list[dict[str, Any]]) -> None:
        self.kind = kind
        self.percentile = percentile
        self.params = params
        self.sharded = sharding.is_dtensor(params[0])
        self.states = states
        if self.sharded:
            self.states = [
                sharding.unwrapped(state, p, "a parameter")  # type: ignore[arg-type]
                for state, p in zip(states, params, strict=True)
            ]
        self.device = params[0].device
        self.dtype = params[0].dtype
        self.table = np.zeros((8, len(params)), np.int64)
        operands = self._local(params)
        self.table[PARAM] = self._addresses = _addresses(operands)
        self.table[SIZE] = _counts(operands)
        self._state_rows = []
        for key, row in _ROWS.items():
            if key in states[0]:
                tensors = [s[key] for s in self.states]
                self.table[row] = _addresses(tensors)
                self._state_rows.append((row, key, [s[key] for s in states], tensors, list(map(_nbytes, tensors))))
        self._all_states = states
        self._maps = [s.get("qmap1") for s in states]
        self._map_versions = {id(qmap): (qmap, qmap._version) for qmap in self._maps if qmap is not None}
        self._shapes = list(map(_shape, operands))
        self._contiguous = all(map(_is_contiguous, operands))
        self._in_place: Sequence[Tensor] = ()
        self.operands: Sequence[Tensor] = ()
        self.gradients: Sequence[Tensor] = ()
        self.squared_norms: Tensor | None = None
        self.places: Tensor | None = None
        self.device_memory: Any = None

    def _local(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return [sharding.local(tensor) for tensor in tensors] if self.sharded else tensors

    def refresh(self, shards: Mapping[Tensor, Tensor]) -> None:
        """Take this step's gradients, and contiguous copies of the tensors that need one.

        Args:
            shards: This process's shards of the gradients of DTensors.

        Raises:
            StaleBatch: If a tensor changed its dtype, shape or place since the batch was made.
        """
        params = self._local(self.params)
        grads: Any = [shards[p] if self.sharded else p.grad for p in self.params]
        if not (self._params_fit(params) and self._states_fit() and self._maps_fit() and self._fit(grads)):
            raise StaleBatch
        table = self.table
        self.operands = self._in_place = params
        if not self._contiguous:
            self.operands = [p.detach().contiguous() for p in params]
            table[PARAM] = _addresses(self.operands)
        plain = all(map(_is_contiguous, grads)) and not any(map(_is_neg, grads))
        self.gradients = grads if plain else [g.resolve_neg().contiguous() for g in grads]
        table[GRAD] = _addresses(self.gradients)
        if not table[[PARAM, GRAD]].all(where=table[SIZE] > 0):
            raise StaleBatch

    def _params_fit(self, params: Sequence[Tensor]) -> bool:
        return (
            set(map(_dtype, params)) == {self.dtype}
            and all(map(eq, map(_shape, params), self._shapes))
            and all(map(_is_contiguous, params)) is self._contiguous
            and np.array_equal(_addresses(params), self._addresses)
        )

    def _states_fit(self) -> bool:
        return all(
            all(map(is_, map(itemgetter(key), self._all_states), owners))
            and np.array_equal(_addresses(tensors), self.table[row])
            and list(map(_nbytes, tensors)) == nbytes
            for row, key, owners, tensors, nbytes in self._state_rows
        )

    def _maps_fit(self) -> bool:
        return self.kind is Kind.FLOAT32 or (
            all(map(is_, map(itemgetter("qmap1"), self._all_states), self._maps))
            and all(qmap._version == version for qmap, version in self._map_versions.values())
        )

    def _fit(self, grads: Sequence[Tensor]) -> bool:
        return set(map(_dtype, grads)) == {self.dtype} and np.array_equal(_counts(grads), self.table[SIZE])

    def finish(self) -> None:
        """Write staged parameters back into their own storage and let go of the gradients."""
        if not self._contiguous:
            for p, operand in zip(self._in_place, self.operands, strict=True):
                if operand.data_ptr() != p.data_ptr():
                    p.copy_(operand)
        self.release()

    def release(self) -> None:
        """Let go of the gradients and of all copies."""
        self.operands = self._in_place = self.gradients = ()
        self.squared_norms = None


def _counts(tensors: Sequence[Tensor]) -> npt.NDArray[np.int64]:
    return np.fromiter(map(_numel, tensors), np.int64, len(tensors))


def _addresses(tensors: Sequence[Tensor]) -> npt.NDArray[np.int64]:
    return np.fromiter(map(_data_ptr, tensors), np.int64, len(tensors))

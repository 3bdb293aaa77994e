"""Parameters that one kernel call updates, and the table of addresses that it gets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lion._memory import paging, sharding
from lion._options import Kind

State = dict[str, Any]

_data_ptr = Tensor.data_ptr
_numel = Tensor.numel
_is_contiguous = Tensor.is_contiguous
_is_neg = Tensor.is_neg
_stride: Callable[[Tensor], tuple[int, ...]] = Tensor.stride
_dtype = attrgetter("dtype")
_shape = attrgetter("shape")
_nbytes = attrgetter("nbytes")
_version = attrgetter("_version")

# Rows of a batch's table of addresses.
PARAM, GRAD, STATE, ABSMAX, NEW_ABSMAX, SIZE, STEP, HISTORY, LOW, FIRST_ELEMENT, NUMBER = range(11)
_ROWS = {
    "state1": STATE,
    "step": STEP,
    "absmax1": ABSMAX,
    "max1": ABSMAX,
    "new_max1": NEW_ABSMAX,
    "gnorm_vec": HISTORY,
    "master_low": LOW,
}


class Weights(NamedTuple):
    """How the parameters of a batch are kept; rounded to nearest unless one of these is given.

    Attributes:
        master_bits: Bits of the master values that they are the upper parts of, 24 or 32 (default: None).
        seed: The seed that they are rounded at random with, 0 to 2**64 - 1 (default: None).
    """

    master_bits: int | None = None
    seed: int | None = None


NEAREST = Weights()


class StaleBatch(Exception):
    """A parameter or its state is no longer what the batch was made for."""


class Batch:
    """Parameters that are updated by one kernel call: same device, dtypes, kind of state and options.

    Between steps it holds numbers only, so that what a program drops, replaces or moves is freed at once. A step
    brings its tensors with :meth:`take`, which finds out whether the numbers still hold, and ends with :meth:`release`.

    Args:
        kind: How the momentum is kept.
        percentile: Percentile clipping of all these parameters; 100 is off.
        params: The parameters, all of them DTensors or none; their gradients and states have been checked.
        states: Their states.
        in_memory_order: Whether the parameters are dense and not contiguous, and their momentum has their strides.
        grad_dtype: The gradients' dtype (default: that of the parameters).
        weights: How the parameters are kept (default: rounded to nearest).

    Attributes:
        params: The parameters, during a step.
        operands: The parameters' memory during a step: contiguous, or dense and in the order of the momentum.
        gradients: The gradients' memory during a step, in the order of the operands.
        squared_norms: The gradients' squared norms, float32 of shape (n,), where shards had to be summed up for them.
        places: Where these stand among those that are summed, as indices on the device.
        paged: Addresses and sizes in bytes of the state that lies in pageable memory.
        device_memory: What the CUDA backend keeps.
    """

    def __init__(
        self,
        kind: Kind,
        percentile: int,
        params: Sequence[Tensor],
        states: Sequence[State],
        in_memory_order: bool = False,
        grad_dtype: torch.dtype | None = None,
        weights: Weights = NEAREST,
    ) -> None:
        self.kind = kind
        self.percentile = percentile
        self.weights = weights
        self.sharded = sharding.is_dtensor(params[0])
        self.device = params[0].device
        self.dtype = params[0].dtype
        self.grad_dtype = grad_dtype or self.dtype
        self.table = np.zeros((11, len(params)), np.int64)
        operands = self._local(params)
        self._addresses = list(map(_data_ptr, operands))
        self._sizes = list(map(_numel, operands))
        self._shapes = list(map(_shape, operands))
        self.table[PARAM], self.table[SIZE] = self._addresses, self._sizes
        self._strides = list(map(_stride, operands)) if in_memory_order else None
        self._staged = not in_memory_order and not all(map(_is_contiguous, operands))
        self._identities = _identities(states)
        self._entries = []
        self.paged: list[tuple[int, int]] = []
        for key, row in _ROWS.items():
            if key in states[0]:
                tensors = [state[key] for state in states]
                place = self._place(tensors)
                self._entries.append((key, place))
                self.table[row] = place[0]
                self.paged += paging.ranges(self._local(tensors))
        self.table[FIRST_ELEMENT] = list(map(sharding.first_element, params)) if weights.seed is not None else 0
        self._maps = None if kind is Kind.FLOAT32 else _versions(states)
        self.params: Sequence[Tensor] = ()
        self._states: Sequence[State] = ()
        self._in_place: Sequence[Tensor] = ()
        self.operands: Sequence[Tensor] = ()
        self.gradients: Sequence[Tensor] = ()
        self.squared_norms: Tensor | None = None
        self.places: Tensor | None = None
        self.device_memory: Any = None

    @property
    def states(self) -> Sequence[State]:
        """The states that this process works on, during a step: of DTensors, those of their local shards."""
        if not self.sharded:
            return self._states
        pairs = zip(self._states, self.params, strict=True)
        return [sharding.unwrapped(state, p, "a parameter") for state, p in pairs]  # type: ignore[arg-type]

    def _local(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return [sharding.local(tensor) for tensor in tensors] if self.sharded else tensors

    def take(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Sequence[State],
        numbers: Sequence[int] | None = None,
    ) -> None:
        """Take the tensors of a step, and copies of those that have to be in another order.

        Args:
            params: The parameters.
            grads: Their gradients; of DTensors, this process's shards of them.
            states: Their states.
            numbers: For rounding at random: the parameters' places in their optimizer (default: zeros).

        Raises:
            StaleBatch: If a tensor changed its dtype, shape or place since the batch was made.
        """
        operands = self._local(params)
        if not (self._params_fit(operands) and self._states_fit(states) and self._grads_fit(grads)):
            raise StaleBatch
        self.params, self._states = params, states
        self.operands = self._in_place = operands
        if self._staged:
            self.operands = [p.detach().contiguous() for p in operands]
            self.table[PARAM] = list(map(_data_ptr, self.operands))
        self.gradients = self._in_order(grads)
        self.table[GRAD] = list(map(_data_ptr, self.gradients))
        if numbers is not None:
            self.table[NUMBER] = numbers
        # Memory that a program took away, and copies that have none.
        if not self.table[[PARAM, GRAD]].all(where=self.table[SIZE] > 0):
            raise StaleBatch

    def _params_fit(self, operands: Sequence[Tensor]) -> bool:
        if self._strides is not None:
            ordered = list(map(_stride, operands)) == self._strides
        else:
            ordered = self._staged or all(map(_is_contiguous, operands))
        return (
            ordered
            and list(map(_data_ptr, operands)) == self._addresses
            and list(map(_shape, operands)) == self._shapes
            and set(map(_dtype, operands)) == {self.dtype}
        )

    def _states_fit(self, states: Sequence[State]) -> bool:
        return (
            _identities(states) == self._identities
            and all(self._place(list(map(itemgetter(key), states))) == place for key, place in self._entries)
            and (self._maps is None or _versions(states) == self._maps)
        )

    def _place(self, tensors: Sequence[Tensor]) -> tuple[list[int], list[int], set[torch.dtype], list[int]]:
        """Return where tensors of states are and what a kernel takes for granted of them."""
        local = self._local(tensors)
        return list(map(_data_ptr, local)), list(map(_nbytes, local)), set(map(_dtype, local)), list(map(id, tensors))

    def _grads_fit(self, grads: Sequence[Tensor]) -> bool:
        return set(map(_dtype, grads)) == {self.grad_dtype} and list(map(_numel, grads)) == self._sizes

    def _in_order(self, grads: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return gradients whose elements lie in memory as those of the operands do."""
        if self._strides is not None:
            if list(map(_stride, grads)) != self._strides or any(map(_is_neg, grads)):
                return [
                    torch.empty_strided(g.shape, strides, dtype=g.dtype, device=g.device).copy_(g)
                    for g, strides in zip(grads, self._strides, strict=True)
                ]
        elif not all(map(_is_contiguous, grads)) or any(map(_is_neg, grads)):
            return [g.resolve_neg().contiguous() for g in grads]
        return grads

    def finish(self) -> None:
        """Write staged parameters back into their own storage and let go of all tensors."""
        if self._staged:
            for p, operand in zip(self._in_place, self.operands, strict=True):
                if operand.data_ptr() != p.data_ptr():
                    p.copy_(operand)
        self.release()

    def release(self) -> None:
        """Let go of the tensors of a step, and of all copies."""
        self.params = self._states = self.operands = self._in_place = self.gradients = ()
        self.squared_norms = None


def _identities(states: Sequence[State]) -> tuple[list[int], list[int]]:
    """Return what tells whether states were replaced, or have got an entry more or less."""
    return list(map(id, states)), list(map(len, states))


def _versions(states: Sequence[State]) -> tuple[list[int], list[int]]:
    """Return what tells whether the maps of states were replaced or written to; the kernels have them built in."""
    maps = list(map(itemgetter("qmap1"), states))
    return list(map(id, maps)), list(map(_version, maps))

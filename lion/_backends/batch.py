"""Parameters that one kernel call updates, and the table of addresses that it gets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
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
_nbytes = attrgetter("nbytes")
_version = attrgetter("_version")
_map = itemgetter("qmap1")

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
        table: A row of numbers for each of the names of this module, PARAM to NUMBER, with a place for every parameter.
        rows: The rows of the table.
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
        self._grad_dtypes = [self.grad_dtype] * len(params)
        self.table = np.zeros((11, len(params)), np.int64)
        self.rows = tuple(self.table)
        operands = self._local(params)
        self._sizes = list(map(_numel, operands))
        self._strides = list(map(_stride, operands))
        self._param_memory, self._dtypes = _memory(operands), [self.dtype] * len(params)
        self.table[PARAM], self.table[SIZE] = self._param_memory[0], self._sizes
        self._in_memory_order = in_memory_order
        self._staged = not in_memory_order and not all(map(_is_contiguous, operands))
        self._lengths = list(map(len, states))
        keys = [key for key in _ROWS if key in states[0]]
        self._entries = itemgetter(*keys)
        tensors = list(chain.from_iterable(map(self._entries, states)))
        local = self._local(tensors)
        self._state_ids, self._state_memory = list(map(id, tensors)), _memory(local)
        for column, key in enumerate(keys):
            self.table[_ROWS[key]] = self._state_memory[0][column :: len(keys)]
        self.paged = paging.ranges(local)
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
        if not (self._params_fit(operands) and self._states_fit(states)):
            raise StaleBatch
        self.params, self._states = params, states
        self.operands = self._in_place = operands
        if self._staged:
            self.operands = [p.detach().contiguous() for p in operands]
            self.table[PARAM] = self._addresses(self.operands)
        self._take_gradients(grads)
        if numbers is not None:
            self.table[NUMBER] = numbers

    def _params_fit(self, operands: Sequence[Tensor]) -> bool:
        # With the sizes, the strides tell the shapes.
        return (
            _memory(operands) == self._param_memory
            and list(map(_dtype, operands)) == self._dtypes
            and list(map(_stride, operands)) == self._strides
        )

    def _states_fit(self, states: Sequence[State]) -> bool:
        tensors = list(chain.from_iterable(map(self._entries, states)))
        return (
            list(map(len, states)) == self._lengths
            and list(map(id, tensors)) == self._state_ids
            and _memory(self._local(tensors)) == self._state_memory
            and (self._maps is None or _versions(states) == self._maps)
        )

    def _take_gradients(self, grads: Sequence[Tensor]) -> None:
        """Take gradients, or copies whose elements lie in memory as those of the operands do."""
        if list(map(_numel, grads)) != self._sizes or list(map(_dtype, grads)) != self._grad_dtypes:
            raise StaleBatch
        negative = any(map(_is_neg, grads))
        self.gradients = grads
        if self._in_memory_order:
            if negative or list(map(_stride, grads)) != self._strides:
                self.gradients = [
                    torch.empty_strided(g.shape, strides, dtype=g.dtype, device=g.device).copy_(g)
                    for g, strides in zip(grads, self._strides, strict=True)
                ]
        elif negative or not all(map(_is_contiguous, grads)):
            self.gradients = [g.resolve_neg().contiguous() for g in grads]
        self.table[GRAD] = self._addresses(self.gradients)

    def _addresses(self, tensors: Sequence[Tensor]) -> list[int]:
        addresses = list(map(_data_ptr, tensors))
        # Memory that a program took away, and copies that have none.
        if not all(addresses) and any(size and not at for size, at in zip(self._sizes, addresses, strict=True)):
            raise StaleBatch
        return addresses

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


def _memory(tensors: Sequence[Tensor]) -> tuple[list[int], list[int]]:
    """Return where tensors are: addresses and sizes in bytes."""
    return list(map(_data_ptr, tensors)), list(map(_nbytes, tensors))


def _versions(states: Sequence[State]) -> tuple[list[int], list[int]]:
    """Return what tells whether the maps of states were replaced or written to; the kernels have them built in."""
    maps = list(map(_map, states))
    return list(map(id, maps)), list(map(_version, maps))

"""Parameters that one kernel call updates, and the table of addresses that it gets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lion._memory import looks, paging, sharding
from lion._memory.looks import Look
from lion._options import Kind

State = dict[str, Any]

_numel = Tensor.numel
_is_contiguous = Tensor.is_contiguous
_is_neg = Tensor.is_neg
_stride: Callable[[Tensor], tuple[int, ...]] = Tensor.stride
_dtype = attrgetter("dtype")
_MAP = "qmap1"

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
        self._gradient_dtypes = [self.grad_dtype] * len(params)
        self.table = np.zeros((11, len(params)), np.int64)
        self.rows = tuple(self.table)
        operands = self._local(params)
        self._sizes = list(map(_numel, operands))
        self._strides = list(map(_stride, operands))
        self._in_memory_order = in_memory_order
        self._staged = not in_memory_order and not all(map(_is_contiguous, operands))
        self._lengths = list(map(len, states))
        keys = [key for key in (*_ROWS, _MAP) if key in states[0]]
        self._entries = itemgetter(*keys)
        tensors = self._tensors(states)
        local = self._local(tensors)
        self._identities = looks.identities(tensors)
        # What a step compares: parameters and states; and the gradients that it last took as they were.
        own, n = [*operands, *local], len(params)
        kept = looks.look(own)
        self._addresses = kept.addresses.tobytes()
        # From both ways to look: gradients may need the slower one.
        self._forms = {type(forms): forms for forms in (kept.forms, looks.asked(own).forms)}
        self._gradient_forms: Sequence[Any] = ()
        self.table[PARAM], self.table[SIZE] = kept.addresses[:n], self._sizes
        for column, key in enumerate(keys):
            if key in _ROWS:
                self.table[_ROWS[key]] = kept.addresses[n + column :: len(keys)]
        # A place of each map, as a rule one for all. The kernels have its values built in.
        places = range(keys.index(_MAP), len(tensors), len(keys)) if _MAP in keys else ()
        self._map_places = list({id(tensors[place]): place for place in places}.values())
        self._map_versions = self._versions(tensors)
        self.paged = paging.ranges(local)
        self.table[FIRST_ELEMENT] = list(map(sharding.first_element, params)) if weights.seed is not None else 0
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
        operands, tensors = self._local(params), self._tensors(states)
        look = looks.look([*operands, *self._local(tensors), *grads])
        if look.missing or not self._fits(look, tensors, states):
            raise StaleBatch
        self.params, self._states = params, states
        self.operands = self._in_place = operands
        if self._staged:
            self.operands = [p.detach().contiguous() for p in operands]
            self.table[PARAM] = _addresses(self.operands)
        self._take_gradients(grads, look)
        if numbers is not None:
            self.table[NUMBER] = numbers

    def _tensors(self, states: Sequence[State]) -> list[Tensor]:
        return list(chain.from_iterable(map(self._entries, states)))

    def _fits(self, look: Look, tensors: Sequence[Tensor], states: Sequence[State]) -> bool:
        """Return whether parameters and states are as they were when the batch was made."""
        forms = self._forms.get(type(look.forms))
        return (
            forms is not None
            and look.addresses[: -len(states)].tobytes() == self._addresses
            and look.forms[: len(forms)] == forms
            and list(map(len, states)) == self._lengths
            and looks.identities(tensors) == self._identities
            and self._versions(tensors) == self._map_versions
        )

    def _versions(self, tensors: Sequence[Tensor]) -> list[int]:
        return [tensors[place]._version for place in self._map_places]

    def _take_gradients(self, grads: Sequence[Tensor], look: Look) -> None:
        """Take gradients, or copies whose elements lie in memory as those of the operands do."""
        self.gradients, forms = grads, look.forms[len(self._forms[type(look.forms)]) :]
        negative = any(map(_is_neg, grads))
        if forms != self._gradient_forms or negative:
            if list(map(_numel, grads)) != self._sizes or list(map(_dtype, grads)) != self._gradient_dtypes:
                raise StaleBatch
            if self._in_memory_order:
                fit = list(map(_stride, grads)) == self._strides
            else:
                fit = all(map(_is_contiguous, grads))
            if not fit or negative:
                self.gradients = list(map(self._copied, grads, self._strides))
                self.table[GRAD] = _addresses(self.gradients)
                return
            self._gradient_forms = forms
        self.table[GRAD] = look.addresses[-len(grads) :]

    def _copied(self, grad: Tensor, strides: Sequence[int]) -> Tensor:
        """Return a gradient, or a copy of it, whose elements lie in memory as those of its parameter do."""
        if self._in_memory_order:
            return torch.empty_strided(grad.shape, strides, dtype=grad.dtype, device=grad.device).copy_(grad)
        return grad.resolve_neg().contiguous()

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


def _addresses(tensors: Sequence[Tensor]) -> npt.NDArray[np.int64]:
    """Return where copies are, which have no memory under torch's FakeTensorMode, for one."""
    # torch's function in C would warn of fake ones on the standard error.
    seen = looks.asked(tensors)
    if seen.missing:
        raise StaleBatch
    return seen.addresses

"""The step taken within the backward pass, so that a gradient lives only until its parameter has moved."""

from __future__ import annotations

import weakref
from types import TracebackType

from torch import Tensor, distributed
from torch._compile import _disable_dynamo
from torch.nn.parameter import is_lazy

from lion._memory import objects
from lion._memory.sharding import is_dtensor
from lion._options import check_group
from lion._parameters import own_name, parameter_name
from lion.optimizers import Lion

_MARK = "_lion_in_backward"
_all: weakref.WeakSet[StepInBackward] = weakref.WeakSet()


class StepInBackward:
    """Steps each parameter as soon as its gradient is complete, and sets the gradient to None.

    The numbers are those of :meth:`Lion.step`, bit for bit, percentile clipping included. Learning rates, other
    options and overrides are read at every step, and the states are the optimizer's: schedulers, ``state_dict`` and
    ``load_state_dict`` work as ever.

    Every backward pass is a step of all parameters that it reaches. So gradients cannot be accumulated, clipped
    together or scaled by a ``GradScaler``. :meth:`Lion.step` may still be called: it steps what has a gradient left,
    such as parameters that were added or unfrozen later, and otherwise does nothing.

    A parameter that ``Module.to`` gives other memory goes on being stepped, and so does one that moves to another
    group, by the options of that. What is taken out of the optimizer keeps its gradient. It all ends with
    :meth:`remove`, or with a ``with`` block, or with the optimizer.

    Args:
        optimizer: The optimizer; those of its parameters that require a gradient now are stepped in backward.

    Raises:
        TypeError: If ``optimizer`` is none of this package.
        ValueError: If a parameter is in the optimizer twice, is stepped in backward already, is one of a lazy module
            that has not run yet, or is not sharded while there are several processes, which would average gradients
            only after backward.
    """

    @_disable_dynamo
    def __init__(self, optimizer: Lion) -> None:
        if not isinstance(optimizer, Lion):
            raise TypeError(f"Invalid optimizer: {type(optimizer).__name__}; expected one of this package")
        self._optimizer = optimizer
        # For each parameter the optimizer that takes its steps.
        self._steppers: dict[Tensor, Lion] = {}
        # The number of its group and its place in it when it was last stepped.
        self._places: dict[Tensor, tuple[int, int]] = {}
        processes = distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
        for number, group in enumerate(optimizer.param_groups):
            for index, p in enumerate(group["params"]):
                if not (p.requires_grad and p.is_leaf):
                    continue
                name = parameter_name(group, number, index)
                if is_lazy(p):
                    raise ValueError(f"Invalid optimizer: {name} has no shape yet; its module has to run once before")
                if p in self._steppers:
                    raise ValueError(f"Invalid optimizer: it holds {name} twice")
                if any(p in other._steppers for other in _all):
                    raise ValueError(f"Invalid optimizer: {name} is stepped in backward already")
                if processes > 1 and not is_dtensor(p):
                    raise ValueError(
                        f"Invalid optimizer: {name} is not sharded; each of the {processes} processes would step on "
                        "its own gradient"
                    )
                stepper = Lion([p])
                # A first step of zeros counts: other parameters may have gradients.
                stepper._stepped = True
                self._steppers[p] = stepper
                self._places[p] = number, index
        # torch does not show a hook to the garbage collector: one that held the optimizer would keep it forever.
        owner = weakref.ref(self)
        optimizer._in_backward = self

        @_disable_dynamo
        def hook(p: Tensor) -> None:
            if (alive := owner()) is not None:
                alive._step(p)

        self._hooks = [p.register_post_accumulate_grad_hook(hook) for p in self._steppers]
        self._marks: dict[Tensor, objects.Mark] = {}
        for p in self._steppers:
            self._watch(p)
        _all.add(self)

    def _watch(self, p: Tensor) -> None:
        owner = weakref.ref(self)

        def lost() -> None:
            if (alive := owner()) is not None and p in alive._steppers:
                # It has got another content, on which its hooks do not fire until they are set again.
                p._post_accumulate_grad_hooks = p._post_accumulate_grad_hooks
                alive._watch(p)

        self._marks[p] = objects.mark(p, _MARK, lost)

    def _step(self, p: Tensor) -> None:
        place = self._place(p)
        if place is None:
            # The optimizer has it no more: its gradient is left alone, as by the optimizer's own step.
            return
        (number, index), stepper = place, self._steppers[p]
        states, groups = self._optimizer.state, self._optimizer.param_groups
        # What random bits are told apart by.
        first_number = sum(len(group["params"]) for group in groups[:number]) + index
        if first_number != stepper._first_number:
            stepper._first_number, stepper._plans = first_number, ()
        name = own_name(groups[number], index) or f"{index} of group {number}"
        group = stepper.param_groups[0]
        group.clear()
        group.update({**groups[number], "params": [p], "param_names": [name]})
        stepper.state.clear()
        if p in states:
            stepper.state[p] = states[p]
        try:
            stepper.step()
        except (TypeError, ValueError):
            # What is wrong with the group is said of the group.
            check_group(groups[number], number)
            raise
        states.update(stepper.state)
        # What torch's schedulers ask before they warn that no step came before theirs.
        vars(self._optimizer)["_opt_called"] = True
        # The states are the optimizer's, and freed with it.
        stepper.state.clear()
        p.grad = None

    def _place(self, p: Tensor) -> tuple[int, int] | None:
        """Return the number of a parameter's group and its place in it, which programs change; None without one."""
        groups, (number, index) = self._optimizer.param_groups, self._places[p]
        if number >= len(groups) or not any(q is p for q in groups[number]["params"][index : index + 1]):
            places = ((i, j) for i, group in enumerate(groups) for j, q in enumerate(group["params"]) if q is p)
            found = next(places, None)
            if found is None:
                return None
            self._places[p] = found
        return self._places[p]

    @_disable_dynamo
    def remove(self) -> None:
        """End the steps in backward; the optimizer goes on with its own ``step``."""
        for hook in self._hooks:
            hook.remove()
        self._marks.clear()
        for p in self._steppers:
            vars(p).pop(_MARK, None)
        self._steppers.clear()
        self._places.clear()
        self._hooks.clear()

    def __enter__(self) -> StepInBackward:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()

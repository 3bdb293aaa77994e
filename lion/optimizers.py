"""The six optimizers: bitsandbytes' Lion family on torch.optim.Optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from operator import attrgetter
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.autograd import profiler
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from lion import _dynamic_map
from lion._backends import LossScale, StaleBatch, requested
from lion._memory import paging, sharding
from lion._options import (
    STATE_OPTIONS,
    WEIGHT_OPTIONS,
    check_algorithm,
    check_args,
    check_group,
    explains_keywords,
    flag,
    warn_of_misspelled,
)
from lion._parameters import check_parameter, check_weights, parameter_name
from lion._plan import Launch, Plan
from lion._state import converted, for_communication, form_of, placed, python_numbers
from lion.overrides import GlobalOptimManager

_KEPT_PLANS = 4
_grad = attrgetter("grad")

Params = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]


class Lion(Optimizer):
    """Lion with momentum in 32 or 8 bits (Chen et al. 2023, arXiv 2302.06675).

    Every step computes, in float32 and rounded as :func:`lion.reference.update_32bit` says::

        c        = beta1 * momentum + (1 - beta1) * grad
        param    = param * (1 - lr * weight_decay) - lr * sign(c)
        momentum = beta2 * momentum + (1 - beta2) * grad

    Parameters are float32, float16 or bfloat16 tensors on CPU or CUDA devices. ``optim_bits``, ``min_8bit_size``,
    ``percentile_clipping``, ``block_wise``, ``is_paged`` and the keyword-only ones are options of the parameter groups,
    like ``lr``, ``betas`` and ``weight_decay``; :class:`lion.GlobalOptimManager` sets them for single parameters.

    Example::

        model = torch.nn.Linear(1000, 10)
        optimizer = lion.Lion(model.parameters(), lr=1e-4, weight_decay=0.1)
        model(torch.randn(32, 1000)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    Args:
        params: Parameters, named parameters or parameter groups.
        lr: Learning rate, a float or a tensor of one element (default: 1e-4). A CUDA tensor is never read by the
            host, so a captured CUDA graph follows it.
        betas: Weights of the momentum in the update and in the new momentum, each in [0, 1) (default: (0.9, 0.99)).
        weight_decay: Decoupled weight decay (default: 0).
        optim_bits: Bits of the momentum, 32 or 8 (default: 32).
        args: An object whose attributes replace arguments of the same names: ``optim_bits`` and all that follow it
            here (default: None).
        min_8bit_size: Parameters with fewer elements keep 32-bit momentum (default: 4096).
        percentile_clipping: Scale a gradient down to this percentile of the parameter's last 100 gradient norms,
            1 to 100; 100 is off (default: 100).
        block_wise: Quantize 8-bit momentum in blocks of 256 elements rather than whole (default: True).
        is_paged: Keep the momentum of large parameters in memory that can be paged out (default: False).
        master_weight_bits: Keep bfloat16 weights as the upper parts of master values of 24 or 32 bits; the lower parts
            are in the state. None keeps no more than the weights (default: None).
        stochastic_rounding: Round bfloat16 weights at random instead of to nearest (default: False).
        rounding_seed: Seed of the random bits, 0 to 2**64 - 1 (default: 0).

    Raises:
        ValueError: If a value is not allowed.
        TypeError: If a value has the wrong type, or a parameter's dtype or layout is not supported.

    Source:
        bitsandbytes 0.44, ``optim/lion.py``.
    """

    # The plans of the last steps, the newest first.
    _plans: tuple[Plan, ...] = ()
    _stepped = False
    _in_backward: object = None
    # What the first parameter counts as where random bits are drawn.
    _first_number = 0
    # torch.amp.GradScaler leaves the unscaling of the gradients to the step.
    _step_supports_amp_scaling = True

    @explains_keywords
    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0,
        optim_bits: int = 32,
        args: object | None = None,
        min_8bit_size: int = 4096,
        percentile_clipping: int = 100,
        block_wise: bool = True,
        is_paged: bool = False,
        *,
        master_weight_bits: int | None = None,
        stochastic_rounding: bool = False,
        rounding_seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "weight_decay": weight_decay,
            "optim_bits": optim_bits,
            "min_8bit_size": min_8bit_size,
            "percentile_clipping": percentile_clipping,
            "block_wise": block_wise,
            "is_paged": is_paged,
            "master_weight_bits": master_weight_bits,
            "stochastic_rounding": stochastic_rounding,
            "rounding_seed": rounding_seed,
        }
        _check_no_model(params)
        super().__init__(params, check_group({**defaults, **check_args(args)}))

    @_disable_dynamo
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; options that it does not give are those of the constructor.

        Args:
            param_group: A dictionary with the key ``params`` and any options.

        Raises:
            ValueError: If a value is not allowed.
            TypeError: If a value has the wrong type, or a parameter's dtype or layout is not supported.
        """
        if isinstance(param_group, dict) and "params" not in param_group:
            raise ValueError("Invalid parameter group: the key 'params' is missing")
        if isinstance(param_group, dict):
            _check_no_model(param_group["params"])
        super().add_param_group(param_group)
        try:
            group = self.param_groups[-1]
            group.update(check_group(group, len(self.param_groups) - 1))
            overrides = GlobalOptimManager.get_instance().lookup()
            for index, p in enumerate(group["params"]):
                # What never gets a gradient may be anything.
                if p.requires_grad:
                    name = parameter_name(group, len(self.param_groups) - 1, index)
                    check_parameter(p, name)
                    check_weights(p, {**group, **overrides.get(id(p), {})}, name)
            # A warning may be made an error.
            warn_of_misspelled(group, len(self.param_groups) - 1)
        except (TypeError, ValueError, Warning):
            self.param_groups.pop()
            raise
        self._leave_unscaling_to_fsdp1()

    @property
    def unscales_in_step(self) -> bool:
        """Whether :meth:`step` unscales the gradients that a ``torch.amp.GradScaler`` has scaled (default: True).

        Set it to False to leave that to the scaler, which then divides the gradients themselves, as for most other
        optimizers: for programs that look at unscaled gradients, or that refuse optimizers which unscale them. Copies
        and pickles keep it. With FSDP1 it is False, and stays so.
        """
        return self._step_supports_amp_scaling

    @unscales_in_step.setter
    def unscales_in_step(self, value: bool) -> None:
        value = flag("unscales_in_step", value)
        if value and self._holds_fsdp1():
            raise ValueError("Invalid unscales_in_step value: True; FSDP1's ShardedGradScaler unscales itself")
        self._step_supports_amp_scaling = value

    def _holds_fsdp1(self) -> bool:
        return any(getattr(p, "_fsdp_flattened", False) for group in self.param_groups for p in group["params"])

    def _leave_unscaling_to_fsdp1(self) -> None:
        # Its ShardedGradScaler tells all processes of an infinity only where it unscales itself.
        if self._holds_fsdp1():
            self._step_supports_amp_scaling = False

    @staticmethod
    def profile_hook_step(func: Callable[..., Any]) -> Callable[..., Any]:
        """Return a step that calls hooks and shows in profiles, as torch's optimizers do, and is quick without them.

        torch replaces an optimizer's step with it.

        Args:
            func: The step of a class.
        """
        watched = Optimizer.profile_hook_step(func)

        # torch.compile calls it as it is: Numba has compiled it already, and hooks may come later.
        @_disable_dynamo
        @wraps(func)
        def step(self: Lion, *args: Any, **kwargs: Any) -> Any:
            # A closure may add hooks, too.
            return (watched if args or kwargs or _is_watched(self) else func)(self, *args, **kwargs)

        return step

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update all parameters that have a gradient.

        Args:
            closure: Evaluates the model again and returns the loss (default: None).

        Returns:
            What the closure returned.

        Raises:
            ValueError: If an option, a gradient or a state is not allowed; nothing has changed then.
            TypeError: If a gradient's dtype or layout is not supported; nothing has changed then.
            BaseException: Whatever stops a step halfway, an interrupt for instance. Its ``__cause__`` is then a
                RuntimeError that names the parameters that have moved; the next step goes on from there.
        """
        try:
            # In less time than no_grad().
            with torch.set_grad_enabled(False):
                return self._step(closure)
        except BaseException:
            LossScale.forget(self)
            raise

    def _step(self, closure: Callable[[], float] | None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        loss_scale = LossScale.of(self)
        skips = loss_scale.skips_on_host()
        if skips and not any(sharding.is_dtensor(p) for group in self.param_groups for p in group["params"]):
            return loss
        first = not self._stepped
        plan, launches = self._prepared()
        # Whether a process has gradients must not decide what it does next to others.
        self._stepped = self._stepped or bool(launches or plan.meshes)
        try:
            plan.sum_norms(launches, loss_scale)
            # torch.distributed.checkpoint makes state by a first step of zeros; what follows shall not notice.
            if not skips and not (first and plan.changes_nothing(self.param_groups, launches)):
                self._update(launches, loss_scale)
        finally:
            for launch in launches:
                launch.batch.release()
        return loss

    def _update(self, launches: Sequence[Launch], loss_scale: LossScale) -> None:
        params = [launch.batch.params for launch in launches]
        done = 0
        try:
            for some in params:
                torch.autograd.graph.increment_version(some)
            for batch, step, backend in launches:
                backend.update(batch, step, loss_scale)
                batch.finish()
                done += 1
        except BaseException as error:
            self._plans = ()
            raise error from self._halfway(params, done, error.__cause__)

    def _halfway(self, batches: Sequence[Sequence[Tensor]], done: int, cause: BaseException | None) -> RuntimeError:
        """Return the exception that tells which batches of a step have been updated."""
        names = {
            p: parameter_name(group, number, index)
            for number, group in enumerate(self.param_groups)
            for index, p in enumerate(group["params"])
        }
        updated, uncertain = (
            [names[p] for batch in some for p in batch] for some in (batches[:done], batches[done:][:1])
        )
        report = RuntimeError(
            f"The step stopped halfway. Updated: {_shortened(updated)}. "
            f"Updated or not, perhaps in part: {_shortened(uncertain)}. Unchanged: all others."
        )
        report.__cause__ = cause
        return report

    def state_dict(self) -> dict[str, Any]:
        """Return the state and the groups, to be saved; NumPy's numbers in the groups become Python's.

        Lower parts of 32 master bits of a DTensor are shown as bfloat16, which torch can communicate.

        Returns:
            A dict with the keys ``state``, by a parameter's number, and ``param_groups``; its tensors are the
            optimizer's own.
        """
        self._renew_maps()
        saved = super().state_dict()
        # A hook of the program may have put anything in its place.
        if not isinstance(saved, dict) or not {"state", "param_groups"} <= saved.keys():
            return saved
        states = {key: for_communication(state) for key, state in saved["state"].items()}
        groups = saved["param_groups"]
        if isinstance(groups, list):
            groups = list(map(python_numbers, groups))
        return {**saved, "state": states, "param_groups": groups}

    @_disable_dynamo
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load the state and the hyperparameters of a checkpoint; all or nothing.

        States keep their dtypes and go to the parameters' devices. ``lr``, ``betas``, ``weight_decay`` and whatever
        else the checkpoint's groups hold is taken from it; ``optim_bits``, ``min_8bit_size``,
        ``percentile_clipping``, ``block_wise``, ``is_paged``, ``master_weight_bits``, ``stochastic_rounding`` and
        ``rounding_seed`` stay as they are here, and states are converted to them: 8-bit momentum to 32 bits without
        loss, 32-bit momentum to 8 bits by quantization, and the lower parts of weights likewise. Checkpoints of
        bitsandbytes' Lion classes load too.

        Args:
            state_dict: What :meth:`state_dict` returned.

        Raises:
            ValueError: If the checkpoint does not fit; nothing has changed then.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"Invalid state_dict: {type(state_dict).__name__}; a dict is needed")
        loaded = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = pre_hook(self, loaded)
            if replaced is not None:
                loaded = replaced
        self.__setstate__(converted(loaded, self.param_groups))
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _renew_maps(self) -> None:
        for state in self.state.values():
            if isinstance(state, Mapping):
                _dynamic_map.renew(state.get("qmap1"))

    def __getstate__(self) -> dict[str, Any]:
        self._renew_maps()
        kept = ("_step_supports_amp_scaling",)
        return {**super().__getstate__(), **{key: vars(self)[key] for key in kept if key in vars(self)}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # What was pickled by a release without these options lacks them.
        for group in (self.defaults, *self.param_groups):
            for key, value in WEIGHT_OPTIONS.items():
                group.setdefault(key, value)
        self._plans = ()
        self._stepped = False
        self._leave_unscaling_to_fsdp1()
        # A copy of paged state is ordinary memory.
        overrides = GlobalOptimManager.get_instance().lookup()
        for group in self.param_groups:
            for p in group["params"]:
                if "state1" in self.state.get(p, ()):
                    self._stepped = True
                    if torch.nn.parameter.is_lazy(p):
                        continue
                    form = form_of(p, {**group, **overrides.get(id(p), {})})
                    self.state[p] = placed(self.state[p], form.paged)

    def _prepared(self) -> tuple[Plan, list[Launch]]:
        """Return the plan of this step and its batches, checked and ready to run."""
        manager, groups = GlobalOptimManager.get_instance(), self.param_groups
        for number, group in enumerate(groups):
            check_algorithm(group, number)
        params: list[Tensor] = []
        grads: list[Tensor] = []
        options = []
        for group in groups:
            own = group["params"]
            places = list(map(_grad, own))
            present = [grad for grad in places if grad is not None]
            all_present = len(present) == len(own)
            params += own if all_present else [p for p, grad in zip(own, places, strict=True) if grad is not None]
            grads += present
            options.append((len(own), len(present), *map(group.get, STATE_OPTIONS)))
        signature = (manager.version, paging.forks(), requested(), options)
        # Before anything that one process may do and another not: it may have to gather.
        shards = sharding.local_gradients(params, grads)
        for plan in self._plans:
            # An option that cannot be compared raises whatever it likes, a tensor without memory RuntimeError, a state
            # without a key KeyError: a new plan says it better.
            try:
                if plan.fits(params, signature):
                    prepared = plan.prepared(groups, params, shards, self.state)
                    self._keep(plan)
                    return plan, prepared
            except Exception:
                self._plans = tuple(kept for kept in self._plans if kept is not plan)
        plan = Plan(groups, self.state, manager.lookup(), signature, self._first_number)
        try:
            prepared = plan.prepared(groups, params, shards, self.state)
        except StaleBatch:
            raise ValueError(
                "Invalid step: copies of its parameters or gradients have no memory, as under torch's FakeTensorMode"
            ) from None
        self._keep(plan)
        return plan, prepared

    def _keep(self, plan: Plan) -> None:
        """Put a plan in front of those that are kept: which parameters have a gradient may change from step to step."""
        if not self._plans or self._plans[0] is not plan:
            self._plans = (plan, *(kept for kept in self._plans if kept is not plan))[:_KEPT_PLANS]


def _is_watched(optimizer: Optimizer) -> bool:
    """Return whether hooks or a profiler wait for an optimizer's steps."""
    return bool(
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or _global_optimizer_pre_hooks
        or _global_optimizer_post_hooks
        or profiler._is_profiler_enabled
    )


def _check_no_model(params: object) -> None:
    """Raise if a model, or its method, was given instead of its parameters."""
    if isinstance(params, Iterable):
        # A ParameterList is a module, but also a list of parameters.
        wrong = isinstance(params, nn.Module) and not all(isinstance(item, Tensor) for item in params)
    else:
        wrong = isinstance(params, nn.Module) or callable(params)
    if wrong:
        raise TypeError(f"Invalid params: {type(params).__name__}; pass model.parameters()")


def _shortened(names: Sequence[str]) -> str:
    """Return names for a sentence, the first 20 of them if there are more."""
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return (", ".join(names[:20]) or "none") + more


class Lion8bit(Lion):
    """:class:`Lion` with 8-bit momentum: about one byte a parameter.

    Example::

        weight = torch.nn.Parameter(torch.randn(1000, 1000))
        optimizer = lion.Lion8bit([weight], lr=1e-4, weight_decay=0.1)
        weight.square().mean().backward()
        optimizer.step()
        assert optimizer.state[weight]["state1"].dtype == torch.uint8

    Arguments as :class:`Lion`, without ``optim_bits``. Parameters with fewer than ``min_8bit_size`` elements keep
    32-bit momentum.

    Raises:
        ValueError: As :class:`Lion`.
        TypeError: As :class:`Lion`.
    """

    @explains_keywords
    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0,
        args: object | None = None,
        min_8bit_size: int = 4096,
        percentile_clipping: int = 100,
        block_wise: bool = True,
        is_paged: bool = False,
        *,
        master_weight_bits: int | None = None,
        stochastic_rounding: bool = False,
        rounding_seed: int = 0,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            weight_decay,
            8,
            args,
            min_8bit_size,
            percentile_clipping,
            block_wise,
            is_paged,
            master_weight_bits=master_weight_bits,
            stochastic_rounding=stochastic_rounding,
            rounding_seed=rounding_seed,
        )


class Lion32bit(Lion):
    """:class:`Lion` with 32-bit momentum: four bytes a parameter.

    Example::

        weight = torch.nn.Parameter(torch.randn(1000, 1000))
        optimizer = lion.Lion32bit([weight], lr=1e-4, weight_decay=0.1)
        weight.square().mean().backward()
        optimizer.step()
        assert optimizer.state[weight]["state1"].dtype == torch.float32

    Arguments as :class:`Lion`, without ``optim_bits``. ``min_8bit_size`` and ``block_wise`` matter only where
    ``optim_bits`` is set to 8 for a group or for single parameters.

    Raises:
        ValueError: As :class:`Lion`.
        TypeError: As :class:`Lion`.
    """

    @explains_keywords
    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0,
        args: object | None = None,
        min_8bit_size: int = 4096,
        percentile_clipping: int = 100,
        block_wise: bool = True,
        is_paged: bool = False,
        *,
        master_weight_bits: int | None = None,
        stochastic_rounding: bool = False,
        rounding_seed: int = 0,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            weight_decay,
            32,
            args,
            min_8bit_size,
            percentile_clipping,
            block_wise,
            is_paged,
            master_weight_bits=master_weight_bits,
            stochastic_rounding=stochastic_rounding,
            rounding_seed=rounding_seed,
        )


class PagedLion(Lion):
    """:class:`Lion` whose momentum, for parameters of at least 100,000 elements, is in memory that can be paged out.

    Example::

        weight = torch.nn.Parameter(torch.randn(1000, 1000))
        optimizer = lion.PagedLion([weight], lr=1e-4, optim_bits=8)
        weight.square().mean().backward()
        optimizer.step()

    Arguments as :class:`Lion`, without ``is_paged``. The numbers are those of :class:`Lion`, bit for bit.

    Raises:
        ValueError: As :class:`Lion`.
        TypeError: As :class:`Lion`.
    """

    @explains_keywords
    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0,
        optim_bits: int = 32,
        args: object | None = None,
        min_8bit_size: int = 4096,
        percentile_clipping: int = 100,
        block_wise: bool = True,
        *,
        master_weight_bits: int | None = None,
        stochastic_rounding: bool = False,
        rounding_seed: int = 0,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            weight_decay,
            optim_bits,
            args,
            min_8bit_size,
            percentile_clipping,
            block_wise,
            True,
            master_weight_bits=master_weight_bits,
            stochastic_rounding=stochastic_rounding,
            rounding_seed=rounding_seed,
        )


class PagedLion8bit(Lion8bit):
    """:class:`Lion8bit` whose momentum, for parameters of at least 100,000 elements, can be paged out.

    Example::

        weight = torch.nn.Parameter(torch.randn(1000, 1000))
        optimizer = lion.PagedLion8bit([weight], lr=1e-4, weight_decay=0.1)
        weight.square().mean().backward()
        optimizer.step()

    Arguments as :class:`Lion`, without ``optim_bits`` and ``is_paged``. The numbers are those of :class:`Lion8bit`,
    bit for bit.

    Raises:
        ValueError: As :class:`Lion`.
        TypeError: As :class:`Lion`.
    """

    @explains_keywords
    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0,
        args: object | None = None,
        min_8bit_size: int = 4096,
        percentile_clipping: int = 100,
        block_wise: bool = True,
        *,
        master_weight_bits: int | None = None,
        stochastic_rounding: bool = False,
        rounding_seed: int = 0,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            weight_decay,
            args,
            min_8bit_size,
            percentile_clipping,
            block_wise,
            True,
            master_weight_bits=master_weight_bits,
            stochastic_rounding=stochastic_rounding,
            rounding_seed=rounding_seed,
        )


class PagedLion32bit(Lion32bit):
    """:class:`Lion32bit` whose momentum, for parameters of at least 100,000 elements, can be paged out.

    Example::

        weight = torch.nn.Parameter(torch.randn(1000, 1000))
        optimizer = lion.PagedLion32bit([weight], lr=1e-4, weight_decay=0.1)
        weight.square().mean().backward()
        optimizer.step()

    Arguments as :class:`Lion`, without ``optim_bits`` and ``is_paged``. The numbers are those of :class:`Lion32bit`,
    bit for bit.

    Raises:
        ValueError: As :class:`Lion`.
        TypeError: As :class:`Lion`.
    """

    @explains_keywords
    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0,
        args: object | None = None,
        min_8bit_size: int = 4096,
        percentile_clipping: int = 100,
        block_wise: bool = True,
        *,
        master_weight_bits: int | None = None,
        stochastic_rounding: bool = False,
        rounding_seed: int = 0,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            weight_decay,
            args,
            min_8bit_size,
            percentile_clipping,
            block_wise,
            True,
            master_weight_bits=master_weight_bits,
            stochastic_rounding=stochastic_rounding,
            rounding_seed=rounding_seed,
        )

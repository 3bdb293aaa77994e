"""Options of single parameters, set from anywhere in a program, as in bitsandbytes."""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from lion._memory import objects
from lion._options import CHECKS, check_value, shown

_IGNORED_UPSTREAM = frozenset({"is_sparse"})
_MARK = "_lion_overrides"
# So many parameters that nobody holds may die, one after the other, before others are taken for dead unseen.
_SEARCHES = 4


@dataclass
class _Override:
    """The options of a parameter.

    Attributes:
        config: The options.
        mark: What tells when the parameter has died or has got another content.
        holders: Who had the parameter when it was last searched for, as far as that is worth anything.
    """

    config: dict[str, Any]
    mark: objects.Mark
    holders: Sequence[objects.Holder] = ()


class GlobalOptimManager:
    """Registry of options that single parameters get instead of those of their group.

    There is one per process: :meth:`get_instance`. Options may be set before or after a parameter is registered and
    before or after an optimizer holds it; they take effect with the optimizer's next step, and state that exists
    already is converted. No parameter is held alive; its options stay with the object, also when ``Module.to`` gives
    it other memory.

    Overridable are ``lr``, ``betas``, ``weight_decay``, ``optim_bits``, ``min_8bit_size``, ``percentile_clipping``,
    ``block_wise``, ``is_paged``, ``master_weight_bits``, ``stochastic_rounding`` and ``rounding_seed``.

    Source:
        bitsandbytes' ``GlobalOptimManager``; there, overrides of registered parameters also reach other optimizers'
        parameters that have the same index. Here an override belongs to its parameter alone.
    """

    _instance: GlobalOptimManager | None = None

    def __init__(self) -> None:
        raise RuntimeError("Call GlobalOptimManager.get_instance() instead")

    @classmethod
    def get_instance(cls) -> GlobalOptimManager:
        """Return the manager of this process."""
        if cls._instance is None:
            cls._instance = cls.__new__(cls)
            cls._instance.initialize()
        return cls._instance

    def initialize(self) -> None:
        """Forget all overrides."""
        # By the id of a parameter.
        self._configs: dict[int, _Override] = {}
        self._searches_in_vain = 0
        self._modules: list[tuple[weakref.ref[nn.Module], str, dict[str, Any]]] = []
        self._version = object()

    @property
    def version(self) -> tuple[object, ...]:
        """What changes with what :meth:`lookup` returns: by overrides, and by what modules have under the names."""
        return self._version, *(id(p) for module, name, _ in self._modules for p in _of_module(module, name))

    def register_parameters(self, params: Tensor | Iterable[Tensor] | Iterable[dict[str, Any]]) -> None:
        """Accept parameters or parameter groups, as upstream asks for before a model moves to a GPU.

        Overrides follow the parameter object here, so registering is not needed; the argument is only checked.

        Args:
            params: One tensor or several, or dictionaries with the key ``params``.

        Raises:
            TypeError: If an item is neither.
        """
        if not isinstance(params, Iterable):
            raise TypeError(f"Invalid params: {type(params).__name__}; expected tensors or parameter groups")
        for item in [params] if isinstance(params, Tensor) else params:
            members = item.get("params") if isinstance(item, dict) else item
            if isinstance(members, Iterator):
                raise TypeError(f"Invalid params: a {type(members).__name__}, which a look at it uses up; give a list")
            if isinstance(members, Tensor) or not isinstance(members, Iterable):
                members = [members]
            for p in members:
                _check_tensor("params", p)

    def override_config(
        self,
        parameters: Tensor | Iterable[Tensor],
        key: str | None = None,
        value: Any = None,
        key_value_dict: Mapping[str, Any] | None = None,
    ) -> None:
        """Set options of parameters; options set earlier stay unless they are set again.

        Args:
            parameters: One tensor or several.
            key: Name of an option, together with ``value`` (default: None).
            value: Its value.
            key_value_dict: Several options at once (default: None).

        Raises:
            TypeError: If ``parameters`` holds something else than tensors, or a value has the wrong type.
            ValueError: If no option is given, or an option is unknown or its value not allowed.
        """
        if not isinstance(key_value_dict, (Mapping, type(None))):
            raise TypeError(f"Invalid key_value_dict: {shown(key_value_dict)}; expected a dict of options")
        config = dict(key_value_dict or {})
        if not isinstance(key, (str, type(None))):
            raise TypeError(f"Invalid key: {shown(key)}; expected the name of an option")
        if key is not None:
            if key in config:
                raise ValueError(f"Invalid key: {key!r} is also in key_value_dict; give it once")
            config[key] = value
        config = _checked(config)
        try:
            items = iter([parameters] if isinstance(parameters, Tensor) else parameters)
        except Exception as error:
            raise TypeError(f"Invalid parameters: {shown(parameters)}; expected tensors") from error
        tensors = []
        for p in items:
            _check_tensor("parameters", p)
            tensors.append(p)
        for p in tensors:
            self._merge(p, config)

    def register_module_override(self, module: nn.Module, param_name: str, config: Mapping[str, Any]) -> None:
        """Set options of a module's parameter by name; a parameter put in its place later has them too.

        Where an attribute is computed from parameters, by a parametrization, a normalization or pruning of
        ``torch.nn.utils``, the options are those of these parameters.

        Args:
            module: The module.
            param_name: Name of the parameter in the module, for instance ``"weight"``.
            config: The options.

        Raises:
            TypeError: If ``module`` is not a module or a value has the wrong type.
            ValueError: If the module has no such parameter, or an option is unknown or its value not allowed.
        """
        if not isinstance(module, nn.Module):
            raise TypeError(f"Invalid module: {type(module).__name__}; expected a torch.nn.Module")
        if not isinstance(param_name, str):
            raise TypeError(f"Invalid param_name: {shown(param_name)}; expected a name")
        if not _parameters_behind(module, param_name):
            raise ValueError(
                f"Invalid param_name: {param_name!r}; {type(module).__name__} has no such parameter, nor any that is "
                f"known to be behind it; it has {', '.join(module._parameters) or 'none'}"
            )
        self._modules.append((weakref.ref(module, self._forget), param_name, _checked(config)))
        self._version = object()

    def _forget(self, module: weakref.ref[nn.Module]) -> None:
        self._modules = [kept for kept in self._modules if kept[0] is not module]
        self._version = object()

    # A mark is put among the attributes of a tensor, which torch.compile cannot trace.
    @_disable_dynamo
    def _merge(self, p: Tensor, config: dict[str, Any]) -> None:
        # Without its old mark, which must not report that a new one takes its place.
        before = self._configs.pop(id(p), None)
        self._keep(p, config if before is None else {**before.config, **config})
        self._searches_in_vain = 0
        self._version = object()

    def _keep(self, p: Tensor, config: dict[str, Any], holders: Sequence[objects.Holder] = ()) -> None:
        identity = id(p)
        mark = objects.mark(p, _MARK, lambda: self._follow(identity))
        self._configs[identity] = _Override(config, mark, holders)

    def _follow(self, identity: int) -> None:
        """Forget the options of a parameter that has died; keep those of one that has got another content."""
        override = self._configs.pop(identity, None)
        if override is None or sys.is_finalizing():
            return
        holders = override.holders
        if holders:
            p = objects.held(identity, holders)
        elif self._searches_in_vain == _SEARCHES:
            p = None
        else:
            # It takes long, so it is done for all others at the same time.
            living, found = objects.search({identity, *self._configs})
            for other, others in found.items():
                if other in self._configs:
                    self._configs[other].holders = others
            p, holders = living.get(identity), found.get(identity, ())
            self._searches_in_vain = self._searches_in_vain + 1 if p is None else 0
        if p is not None:
            self._keep(p, override.config, holders)
        else:
            # Another object may get its id.
            self._version = object()

    def lookup(self) -> dict[int, dict[str, Any]]:
        """Return the options of every parameter that has some, by the parameter's id."""
        found = {}
        self._searches_in_vain = 0
        for identity, override in self._configs.copy().items():
            found[identity] = override.config
            override.holders = ()
        for module, name, config in self._modules:
            for p in _of_module(module, name):
                found[id(p)] = {**found.get(id(p), {}), **config}
        return found


def _of_module(ref: weakref.ref[nn.Module], name: str) -> list[Tensor]:
    module = ref()
    return [] if module is None else _parameters_behind(module, name)


def _parameters_behind(module: nn.Module, name: str) -> list[Tensor]:
    """Return a module's parameter, or those that an attribute of this name is computed from; computes nothing.

    ``torch.nn.utils.parametrize`` keeps the latter in a list of their own; pruning, and ``weight_norm`` and
    ``spectral_norm`` as they were before it, keep them in the module, under longer names.
    """
    while "_orig_mod" in module._modules:  # what torch.compile wraps
        module = module._modules["_orig_mod"]  # type: ignore[assignment]
    own: Any = module._parameters
    lists: Any = module._modules["parametrizations"] if "parametrizations" in module._modules else {}
    if name in own:
        return [] if own[name] is None else [own[name]]
    if name in lists:
        return [p for p in lists[name]._parameters.values() if p is not None]
    # What one of them keeps under a longer name another may compute, under a name that is longer still.
    longer = [name + end for end in ("_orig", "_g", "_v")]
    known = [*own.keys(), *lists]
    return [
        p for start in longer if any(key.startswith(start) for key in known) for p in _parameters_behind(module, start)
    ]


def _checked(config: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(config, Mapping):
        raise TypeError(f"Invalid override: {shown(config)}; expected a dict of options")
    if not config:
        raise ValueError("Invalid override: no option given")
    checked = {}
    for key, value in config.items():
        if key in _IGNORED_UPSTREAM:
            warnings.warn(f"The override {key!r} has no effect on Lion, here as in bitsandbytes", stacklevel=3)
        elif key not in CHECKS:
            raise ValueError(f"Invalid override: {shown(key)}; expected one of {', '.join(CHECKS)}")
        else:
            checked[key] = check_value(key, value)
    return checked


def _check_tensor(name: str, p: object) -> None:
    if not isinstance(p, torch.Tensor):
        raise TypeError(f"Invalid {name}: an item is {type(p).__name__}; expected tensors")
    if not (p.is_leaf or p.retains_grad):
        raise ValueError(f"Invalid {name}: an item is computed from other tensors; give the parameters among these")

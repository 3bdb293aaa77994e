"""From parameters with gradients to batches: everything a step does before its kernels run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from operator import is_
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from lion import reference
from lion._backends import Batch, LossScale, StepCoefficients, for_device
from lion._memory import sharding
from lion._options import HYPERPARAMETERS, check_group, check_value, rate_on_host
from lion._parameters import Group, check_gradient, check_parameter, parameter_name
from lion._state import State, adapted, form_of

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

# A mesh, and the dimensions of it that a parameter is sharded over.
_Shards: TypeAlias = "tuple[DeviceMesh, tuple[int, ...]]"

# Paged state updated by one kernel call, in bytes: it has to fit on a device beside everything else.
_PORTION = 256 * 2**20
_rounded = lru_cache(reference.coefficients)


class Plan:
    """The batches of a step, kept for the next ones as long as they fit.

    Making one checks all parameters, gradients and options first, then makes and converts states.

    Args:
        groups: The optimizer's parameter groups.
        states: The optimizer's states; missing ones are added, and others converted where options changed.
        overrides: Options of single parameters, by their id.
        signature: Whatever, besides the tensors, the plan depends on.

    Raises:
        ValueError: If an option, a parameter, a gradient or a state is not allowed.
        TypeError: If a dtype or a layout is not supported.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        states: dict[Tensor, State],
        overrides: Mapping[int, Mapping[str, Any]],
        signature: object,
    ) -> None:
        self._signature = signature
        self._params: list[Tensor] = []
        # Parameters whose norms have to be summed over their shards, whether they have a gradient here or not.
        self._norms: dict[_Shards, dict[Tensor, int]] = {}
        self._groups = groups
        sharded = [p for group in groups for p in group["params"] if sharding.is_dtensor(p)]
        self.meshes = {p.device_mesh: None for p in sharded}
        members: list[tuple[Tensor, str, int, Mapping[str, Any], dict[str, Any], _Shards | None]] = []
        for number, group in enumerate(groups):
            checked = check_group(group, number)
            for index, p in enumerate(group["params"]):
                override = overrides.get(id(p), {})
                options = {**checked, **override}
                shards = _shards(p, options)
                if shards is not None:
                    places = self._norms.setdefault(shards, {})
                    places[p] = len(places)
                if p.grad is None:
                    continue
                name = parameter_name(group, number, index)
                check_parameter(p, name)
                check_gradient(p, p.grad, name)
                for_device(p.device)
                _coefficients(group, override, p.device)
                members.append((p, name, number, override, options, shards))
                self._params.append(p)

        new_states = {}
        batches: dict[tuple[Any, ...], list[Tensor]] = {}
        paged_bytes = 0
        # Parameters in the same memory take turns: within one call several threads would write to it at once.
        turns: Counter[int] = Counter()
        for p, name, number, override, options, shards in members:
            form, percentile = form_of(p, options), options["percentile_clipping"]
            if percentile < 100 and getattr(p, "_fsdp_flattened", False):
                raise ValueError(
                    f"Invalid percentile_clipping for {name}: {percentile}; 100 is allowed with FSDP1, whose shards "
                    "do not tell the whole parameter's norm; those of torch.distributed.fsdp.fully_shard do"
                )
            new_states[p] = adapted(states.get(p), p, form, name)
            hyperparameters = tuple(override.get(key) for key in HYPERPARAMETERS)
            portion = paged_bytes // _PORTION
            memory = sharding.local(p)
            paged_bytes += sharding.local(new_states[p]["state1"]).nbytes if form.paged else 0
            turn = turns[memory.data_ptr()] if memory.numel() else 0
            turns[memory.data_ptr()] += 1
            layout = shards, sharding.is_dtensor(p)
            key = (form, percentile, number, hyperparameters, p.device, p.dtype, layout, form.paged and portion, turn)
            batches.setdefault(key, []).append(p)
        states.update(new_states)

        self._all_states = list(states.values())
        self._batches = [
            (
                Batch(form.kind, percentile, params, [states[p] for p in params]),
                groups[number],
                {key: value for key, value in zip(HYPERPARAMETERS, override, strict=True) if value is not None},
            )
            for (form, percentile, number, override, *_), params in batches.items()
        ]

    def fits(self, params: Sequence[Tensor], states: Mapping[Tensor, State], signature: object) -> bool:
        """Return whether the plan was made for these parameters, states and options."""
        return (
            signature == self._signature
            and len(params) == len(self._params)
            and all(map(is_, params, self._params))
            and len(states) == len(self._all_states)
            and all(map(is_, states.values(), self._all_states))
        )

    def refreshed(self, shards: Mapping[Tensor, Tensor]) -> list[tuple[Batch, StepCoefficients]]:
        """Return the batches with this step's gradients and coefficients.

        Args:
            shards: This process's shards of the gradients of DTensors.

        Raises:
            StaleBatch: If a tensor changed its dtype, size or place.
            ValueError: If a hyperparameter is not allowed.
        """
        prepared = [(batch, _coefficients(group, override, batch.device)) for batch, group, override in self._batches]
        for batch, _ in prepared:
            batch.refresh(shards)
        return prepared

    def sum_norms(self, prepared: Sequence[tuple[Batch, StepCoefficients]], loss_scale: LossScale) -> None:
        """Bring to the batches the norms of the gradients whose shards other processes have, too.

        Every process that takes part in a step has to call it, whatever gradients it has.

        Args:
            prepared: What :meth:`refreshed` returned.
            loss_scale: The scaling of the loss.
        """
        for shards, places in self._norms.items():
            device = next(iter(places)).device
            mine = [(batch, step) for batch, step in prepared if batch.params[0] in places]
            norms = torch.zeros(len(places), dtype=torch.float64, device=device)
            for batch, step in mine:
                squared = for_device(batch.device).squared_norms(batch, step, loss_scale)
                norms[self._places(batch, places)] = squared.to(device, torch.float64)
            sums = sharding.sum_over_shards(norms, *shards).float()
            for batch, _ in mine:
                batch.squared_norms = sums[self._places(batch, places)].to(batch.device)

    def _places(self, batch: Batch, places: Mapping[Tensor, int]) -> Tensor:
        """Return where the norms of a batch are, as indices on its device, made once: making them waits for it."""
        if batch.places is None:
            batch.places = torch.tensor([places[p] for p in batch.params], device=batch.device)
        return batch.places

    def changes_nothing(self, prepared: Sequence[tuple[Batch, StepCoefficients]]) -> bool:
        """Return whether all learning rates and all gradients are zero, on every process.

        It waits for the devices, except where a learning rate is not zero or a tensor on one of them.
        """
        rates = [group["lr"] for group in self._groups]
        on_device = any(isinstance(lr, Tensor) and lr.device.type != "cpu" for lr in rates)
        on_gpu = any(batch.device.type == "cuda" for batch, _ in prepared)
        if on_device or any(map(bool, rates)) or (on_gpu and torch.cuda.is_current_stream_capturing()):
            return False
        changes = any(
            step.device_lr is not None or step.values.lr != 0 or any(map(Tensor.any, batch.gradients))
            for batch, step in prepared
        )
        for mesh in self.meshes:
            flag = torch.tensor([changes], dtype=torch.float64, device="cpu")
            changes = bool(sharding.sum_over_shards(flag, mesh, range(mesh.ndim)))
        return not changes


def _shards(p: Tensor, options: Mapping[str, Any]) -> _Shards | None:
    """Return what the norm of a parameter's gradient has to be summed over, if it is clipped and has shards."""
    if options["percentile_clipping"] < 100 and sharding.is_dtensor(p):
        dimensions = sharding.mesh_dimensions(p)
        return (p.device_mesh, dimensions) if dimensions else None
    return None


def _coefficients(group: Group, override: Mapping[str, Any], device: torch.device) -> StepCoefficients:
    lr, betas, weight_decay = (check_value(key, override.get(key, group[key]), group) for key in HYPERPARAMETERS)
    if isinstance(lr, Tensor):
        if lr.device == device and device.type == "cuda":
            return StepCoefficients(_rounded(0.0, betas, weight_decay), lr, weight_decay)
        lr = rate_on_host(lr, group)
    return StepCoefficients(_rounded(lr, betas, weight_decay), None, weight_decay)

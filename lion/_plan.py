"""From parameters with gradients to batches: everything a step does before its kernels run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from lion import reference
from lion._backends import Backend, Batch, LossScale, StaleBatch, StepCoefficients, Weights, for_device
from lion._memory import addresses, looks, sharding
from lion._options import HYPERPARAMETERS, check_group, check_value, rate_on_host
from lion._parameters import Group, check_gradient, check_weights, parameter_name
from lion._state import Form, State, adapted, form_of, put, rounding_seed_of

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class Launch(NamedTuple):
    """A batch with the tensors of a step, the numbers of the step, and who computes it."""

    batch: Batch
    step: StepCoefficients
    backend: Backend


# A mesh, and the dimensions of it that a parameter is sharded over.
_Shards: TypeAlias = "tuple[DeviceMesh, tuple[int, ...]]"

_Picker: TypeAlias = Callable[[Sequence[Any]], Sequence[Any]]

# Paged state updated by one kernel call, in bytes: it has to fit on a device beside everything else.
_PORTION = 256 * 2**20
_rounded = lru_cache(reference.coefficients)


class _Member(NamedTuple):
    """A parameter that has a gradient, and what its update depends on."""

    p: Tensor
    name: str
    group: int
    override: Mapping[str, Any]
    form: Form
    seed: int | None
    percentile: int
    shards: _Shards | None


class _Part(NamedTuple):
    """A batch of the plan, with what picks its parameters out of all that have a gradient, and their states."""

    batch: Batch
    backend: Backend
    members: _Picker
    states: _Picker
    group: int
    override: Mapping[str, Any]


class _Norms(NamedTuple):
    """Norms that are summed over the same shards.

    There is a place for every clipped parameter, whether it has a gradient in this process or not.
    """

    device: torch.device
    places: dict[int, int]


class Plan:
    """The batches of a step, kept for the next ones as long as they fit.

    Making one checks all parameters, gradients and options first, then makes and converts states. Kept are numbers:
    no parameter, gradient or state is held from step to step.

    Args:
        groups: The optimizer's parameter groups.
        states: The optimizer's states; missing ones are added, and others converted where options changed.
        overrides: Options of single parameters, by their id.
        signature: Whatever, besides the tensors, the plan depends on.
        first_number: The number of the first parameter of the first group, by which random bits are told apart
            (default: 0).

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
        first_number: int = 0,
    ) -> None:
        self._signature = signature
        self._first_number = first_number
        self.meshes = {
            p.device_mesh: None for group in groups for p in group["params"] if sharding.is_dtensor(p)
        }  # a dict, to keep their order
        self._norms: dict[_Shards, _Norms] = {}
        members = self._members(groups, overrides)
        # What is copied and set to zero for a new plan would be done when the graph is replayed, not now.
        if any(for_device(device).is_capturing(device) for device in {member.p.device for member in members}):
            raise RuntimeError(
                "A step cannot be captured before one with the same parameters, gradients, states and options was "
                "taken: warm up with such steps first"
            )
        self._ids = looks.identities([member.p for member in members])
        for member, new in [(m, adapted(states.get(m.p), m.p, m.form, m.name)) for m in members]:
            put(states, member.p, new)
        self._order = looks.identities(states)
        places = {id(p): place for place, p in enumerate(states)}
        self._parts = [
            _part(members, numbers, states, places) for numbers in _together(members, [states[m.p] for m in members])
        ]

    def _members(self, groups: Sequence[Group], overrides: Mapping[int, Mapping[str, Any]]) -> list[_Member]:
        """Return the parameters that have a gradient, checked, and note whose norms are summed over shards."""
        members = []
        for number, group in enumerate(groups):
            checked = check_group(group, number)
            for index, p in enumerate(group["params"]):
                override = overrides.get(id(p), {})
                options = {**checked, **override}
                shards = _shards(p, options)
                if shards is not None:
                    places = self._norms.setdefault(shards, _Norms(p.device, {})).places
                    places[id(p)] = len(places)
                if p.grad is not None:
                    members.append(_member(group, number, index, override, options, shards))
        return members

    def fits(self, params: Sequence[Tensor], signature: object) -> bool:
        """Return whether the plan was made for these parameters and options."""
        return signature == self._signature and looks.identities(params) == self._ids

    def prepared(
        self,
        groups: Sequence[Group],
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Mapping[Tensor, State],
    ) -> list[Launch]:
        """Return the batches with this step's tensors and coefficients.

        Args:
            groups: The optimizer's parameter groups.
            params: The parameters that have a gradient.
            grads: Their gradients; of DTensors, this process's shards of them.
            states: The optimizer's states.

        Raises:
            StaleBatch: If a tensor changed its dtype, size or place, or states were taken away.
            ValueError: If a hyperparameter is not allowed.
        """
        steps = [_coefficients(groups[part.group], part.override, part.batch.device) for part in self._parts]
        # Found by their order, since a tensor's hash is a function in Python.
        if not looks.identities(states).startswith(self._order):
            raise StaleBatch
        entries = list(states.values())
        prepared: list[Launch] = []
        seeded = any(part.batch.weights.seed is not None for part in self._parts)
        numbers = self._numbers(groups, params) if seeded else []
        try:
            for part, step in zip(self._parts, steps, strict=True):
                own_numbers = part.members(numbers) if numbers else None
                part.batch.take(part.members(params), part.members(grads), part.states(entries), own_numbers)
                prepared.append(Launch(part.batch, step, part.backend))
        except BaseException:
            for launch in prepared:
                launch.batch.release()
            raise
        return prepared

    def _numbers(self, groups: Sequence[Group], params: Sequence[Tensor]) -> list[int]:
        """Return the numbers of parameters: their places among all, whether those have a gradient or not."""
        everything = (p for group in groups for p in group["params"])
        numbers = {id(p): number for number, p in enumerate(everything, self._first_number)}
        return [numbers[id(p)] for p in params]

    def sum_norms(self, prepared: Sequence[Launch], loss_scale: LossScale) -> None:
        """Bring to the batches the norms of the gradients whose shards other processes have, too.

        Every process that takes part in a step has to call it, whatever gradients it has.

        Args:
            prepared: What :meth:`prepared` returned.
            loss_scale: The scaling of the loss.
        """
        for shards, (device, places) in self._norms.items():
            mine = [launch for launch in prepared if id(launch.batch.params[0]) in places]
            norms = torch.zeros(len(places), dtype=torch.float64, device=device)
            for batch, step, backend in mine:
                squared = backend.squared_norms(batch, step, loss_scale)
                norms[_places(batch, places)] = squared.to(device, torch.float64)
            sums = sharding.sum_over_shards(norms, *shards).float()
            for batch, *_ in mine:
                batch.squared_norms = sums[_places(batch, places)].to(batch.device)

    def changes_nothing(self, groups: Sequence[Group], prepared: Sequence[Launch]) -> bool:
        """Return whether all learning rates and all gradients are zero, on every process.

        It waits for the devices, except where a learning rate is not zero or a tensor on one of them.
        """
        rates = [group["lr"] for group in groups]
        on_device = any(isinstance(lr, Tensor) and lr.device.type != "cpu" for lr in rates)
        on_gpu = any(launch.batch.device.type == "cuda" for launch in prepared)
        if on_device or any(map(bool, rates)) or (on_gpu and torch.cuda.is_current_stream_capturing()):
            return False
        changes = any(
            step.device_lr is not None or step.values.lr != 0 or any(map(Tensor.any, batch.gradients))
            for batch, step, _ in prepared
        )
        for mesh in self.meshes:
            flag = torch.tensor([changes], dtype=torch.float64, device="cpu")
            changes = bool(sharding.sum_over_shards(flag, mesh, range(mesh.ndim)))
        return not changes


def _member(
    group: Group,
    number: int,
    index: int,
    override: Mapping[str, Any],
    options: Mapping[str, Any],
    shards: _Shards | None,
) -> _Member:
    """Return a parameter that has a gradient, or raise if it cannot be updated."""
    p, name, percentile = group["params"][index], parameter_name(group, number, index), options["percentile_clipping"]
    check_gradient(p, p.grad, name)
    check_weights(p, options, name)
    for_device(p.device)
    _coefficients(group, override, p.device)
    if percentile < 100 and getattr(p, "_fsdp_flattened", False):
        raise ValueError(
            f"Invalid percentile_clipping for {name}: {percentile}; 100 is allowed with FSDP1, whose shards "
            "do not tell the whole parameter's norm; those of torch.distributed.fsdp.fully_shard do"
        )
    hyperparameters = {key: override[key] for key in HYPERPARAMETERS if key in override}
    form, seed = form_of(p, options), rounding_seed_of(p, options)
    return _Member(p, name, number, hyperparameters, form, seed, percentile, shards)


def _together(members: Sequence[_Member], states: Sequence[State]) -> list[list[int]]:
    """Return which members one kernel call can update, by their numbers."""
    batches: dict[tuple[Any, ...], list[int]] = {}
    paged_bytes = 0
    # Parameters that share memory take turns: within one call several threads would write to it at once.
    turns = _turns([sharding.local(member.p) for member in members])
    for number, (member, state, turn) in enumerate(zip(members, states, turns, strict=True)):
        p, form = member.p, member.form
        portion = paged_bytes // _PORTION
        large = [state[key] for key in sharding.PER_ELEMENT if key in state]
        paged_bytes += sum(sharding.local(tensor).nbytes for tensor in large) if form.paged else 0
        layout = member.shards, sharding.is_dtensor(p)
        override = tuple(member.override.get(key) for key in HYPERPARAMETERS)
        options = member.group, override, member.percentile, member.seed
        dtypes = p.dtype, p.grad.dtype  # type: ignore[union-attr]
        key = (turn, form, options, p.device, dtypes, layout, form.paged and portion)
        batches.setdefault(key, []).append(number)
    return [batches[key] for key in sorted(batches, key=itemgetter(0))]


def _turns(memories: Sequence[Tensor]) -> list[int]:
    """Return when each tensor is to be updated: after all tensors before it that may share memory with it."""
    ranges = [(memory.data_ptr(), memory.data_ptr() + addresses.extent(memory)) for memory in memories]
    # Tensors that overlap, one with the next.
    chains: list[list[int]] = []
    end = 0
    for number in sorted(range(len(ranges)), key=ranges.__getitem__):
        first, behind = ranges[number]
        if first >= end:
            chains.append([])
        chains[-1].append(number)
        end = max(end, behind)
    turns = [0] * len(ranges)
    for chain in map(sorted, chains):
        for place, number in enumerate(chain):
            first, behind = ranges[number]
            before = [other for other in chain[:place] if ranges[other][0] < behind and first < ranges[other][1]]
            turns[number] = max((turns[other] + 1 for other in before), default=0)
    return turns


def _part(
    members: Sequence[_Member], numbers: list[int], states: Mapping[Tensor, State], places: Mapping[int, int]
) -> _Part:
    first, params = members[numbers[0]], [members[i].p for i in numbers]
    kind, _, _, in_memory_order, master_bits = first.form
    grad_dtype, weights = first.p.grad.dtype, Weights(master_bits, first.seed)  # type: ignore[union-attr]
    own = [states[p] for p in params]
    batch = Batch(kind, first.percentile, params, own, in_memory_order, grad_dtype, weights)
    picked, picked_states = _picker(numbers), _picker([places[id(p)] for p in params])
    return _Part(batch, for_device(batch.device), picked, picked_states, first.group, first.override)


def _picker(places: list[int]) -> _Picker:
    """Return what picks the items at some places out of a list."""
    together = range(places[0], places[-1] + 1)
    return itemgetter(slice(together.start, together.stop)) if places == list(together) else itemgetter(*places)


def _places(batch: Batch, places: Mapping[int, int]) -> Tensor:
    """Return where the norms of a batch are, as indices on its device, made once: making them waits for it."""
    if batch.places is None:
        batch.places = torch.tensor([places[id(p)] for p in batch.params], device=batch.device)
    return batch.places


def _shards(p: Tensor, options: Mapping[str, Any]) -> _Shards | None:
    """Return what the norm of a parameter's gradient has to be summed over, if it is clipped and has shards."""
    if options["percentile_clipping"] < 100 and sharding.is_dtensor(p):
        dimensions = sharding.mesh_dimensions(p)
        return (p.device_mesh, dimensions) if dimensions else None
    return None


@lru_cache
def _coefficients_of_numbers(*given: Any) -> StepCoefficients:
    lr, betas, weight_decay = map(check_value, HYPERPARAMETERS, given)
    return StepCoefficients(reference.coefficients(lr, betas, weight_decay), None, weight_decay)


def _coefficients(group: Group, override: Mapping[str, Any], device: torch.device) -> StepCoefficients:
    """Return the numbers of a step, checked; those of plain numbers are kept."""
    given: Any = tuple(override.get(key, group[key]) for key in HYPERPARAMETERS)
    lr, betas, weight_decay = given
    if type(lr) is float and lr >= 0 and type(betas) is tuple and {*map(type, betas), type(weight_decay)} == {float}:
        return _coefficients_of_numbers(*given)
    lr, betas, weight_decay = (
        check_value(key, value, group) for key, value in zip(HYPERPARAMETERS, given, strict=True)
    )
    if isinstance(lr, Tensor):
        if lr.device.type == device.type == "cuda":
            return StepCoefficients(_rounded(0.0, betas, weight_decay), lr, weight_decay)
        lr = rate_on_host(lr, group)
    return StepCoefficients(_rounded(lr, betas, weight_decay), None, weight_decay)

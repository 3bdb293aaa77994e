"""Programs that keep something of their own in an optimizer's state, as lookahead and offloading wrappers do."""

from __future__ import annotations

import copy
import io
from collections import OrderedDict, deque, namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lion
from lion import exchange
from tests.comparing import assert_same_bits
from tests.optimizers.support import (
    KINDS,
    ByHand,
    Variant,
    every_dtype,
    every_kind,
    every_variant,
    parameter,
    set_gradients,
)

SMALL = {"min_8bit_size": 0}
Pair = namedtuple("Pair", ["first", "second"])


class Helper:
    """An object that cannot be copied."""

    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("not to be copied")


def stepped(make: Variant, *params: nn.Parameter, **kwargs: Any) -> lion.Lion:
    optimizer = make(params, **{**SMALL, **kwargs})
    set_gradients(params, 0)
    optimizer.step()
    return optimizer


def own_bits(optimizer: lion.Lion, p: Tensor) -> dict[str, Tensor]:
    """Return copies of the entries of a state that are the optimizer's."""
    keys = ("step", "state1", "absmax1", "max1", "new_max1", "qmap1", "gnorm_vec")
    return {key: optimizer.state[p][key].clone() for key in keys if key in optimizer.state[p]}


@every_variant
@every_dtype
def test_an_entry_stays_from_plan_to_plan_and_changes_no_bit(make: Variant, dtype: torch.dtype) -> None:
    params = [parameter(300, dtype=dtype, seed=1), parameter(700, dtype=dtype, seed=2)]
    others = [nn.Parameter(p.detach().clone()) for p in params]
    optimizer, plain = make(params, **SMALL), make(others, **SMALL)
    slow = {}
    for i in range(4):
        for some, one in ((params, optimizer), (others, plain)):
            set_gradients(some, i)
            if i % 2:
                some[1].grad = None  # a new plan
            one.step()
        for p in params if not i else ():
            slow[p] = optimizer.state[p]["slow_param"] = p.detach().clone()
            optimizer.state[p]["notes"] = ["text", 3, None]
    for p, q in zip(params, others, strict=True):
        assert optimizer.state[p]["slow_param"] is slow[p]
        assert optimizer.state[p]["notes"] == ["text", 3, None]
        assert_same_bits(p, q)
        for key, value in plain.state[q].items():
            assert_same_bits(optimizer.state[p][key], value, what=key)


@every_variant
def test_an_entry_that_is_there_before_the_first_step(make: Variant) -> None:
    p = parameter(700)
    hand = ByHand.of(make, p, **SMALL)
    optimizer = make([p], **SMALL)
    optimizer.state[p]["slow_param"] = slow = p.detach().clone()
    again = make([p], **SMALL)
    again.load_state_dict(optimizer.state_dict())
    assert list(again.state[p]) == ["slow_param"]
    assert_same_bits(again.state[p]["slow_param"], slow)
    for one in (optimizer, again):
        set_gradients([p], 0)
        one.step()
        if one is optimizer:
            hand.step(p.grad)
            assert optimizer.state[p].pop("slow_param") is slow
            hand.check(p, optimizer)
    assert again.state[p]["step"] == 1


def test_a_first_step_that_makes_state_only_does_so_beside_an_entry() -> None:
    p = parameter(700)
    optimizer = lion.Lion8bit([p], lr=0.0, **SMALL)
    optimizer.state[p]["mine"] = 1
    again = copy.deepcopy(optimizer)
    for one in (optimizer, again):
        (q,) = one.param_groups[0]["params"]
        q.grad = torch.zeros_like(q)
        one.step()
        assert one.state[q]["step"] == 0 and one.state[q]["mine"] == 1


VALUES: dict[str, Any] = {
    "number": 3.5,
    "text": "abc",
    "bytes": b"abc",
    "none": None,
    "bool": True,
    "list": [1, [2, "x"]],
    "tuple": (1, "x"),
    "named tuple": Pair(1, "x"),
    "set": {1, 2},
    "frozenset": frozenset({1}),
    "dict": {"a": {"b": 1}},
    "ordered": OrderedDict(b=1, a=2),
    "deque": deque([1, 2]),
    "function": len,
    "object": Helper(),
    "array": torch.arange(3).numpy(),
}


@every_kind
@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES.keys())
def test_any_value_is_loaded(make: Variant, value: Any) -> None:
    p, q = parameter(300), parameter(300)
    optimizer = stepped(make, p)
    optimizer.state[p]["mine"] = value
    other = make([q], **SMALL)
    other.load_state_dict(optimizer.state_dict())
    loaded = other.state[q]["mine"]
    assert type(loaded) is type(value)
    assert (loaded == value) if not hasattr(value, "shape") else (loaded == value).all()


@every_kind
@every_dtype
def test_tensors_are_loaded_with_their_dtypes_and_not_shared(make: Variant, dtype: torch.dtype) -> None:
    p, q = parameter(300, dtype=dtype), parameter(300, dtype=dtype)
    optimizer = stepped(make, p)
    entries: dict[str, Tensor] = {
        "wide": torch.randn(300, dtype=torch.float64),
        "narrow": torch.randn(3, 4).to(torch.bfloat16),
        "integers": torch.arange(5),
        "transposed": torch.randn(3, 4).T,
        "parameter": nn.Parameter(torch.randn(3)),
        "sparse": torch.eye(3).to_sparse(),
        "none": torch.zeros(0),
    }
    optimizer.state[p].update(entries)
    optimizer.state[p]["nested"] = {"list": [entries["wide"], (entries["integers"],)]}
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    for saved in (optimizer.state_dict(), torch.load(file, weights_only=True)):
        other = make([q], **SMALL)
        other.load_state_dict(saved)
        state = other.state[q]
        for key, value in entries.items():
            assert state[key].dtype == value.dtype and state[key].device == value.device, key
            assert torch.equal(state[key].to_dense(), value.to_dense()), key
            assert state[key] is not saved["state"][0][key]
        (wide, (integers,)) = state["nested"]["list"]
        assert torch.equal(wide, entries["wide"]) and torch.equal(integers, entries["integers"])
        wide.zero_()
        state["integers"].zero_()
        assert entries["wide"].any() and entries["integers"].any()
        set_gradients([q], 1)
        other.step()


@every_kind
def test_a_tensor_that_cannot_be_loaded_changes_nothing(make: Variant) -> None:
    p = parameter(300)
    optimizer = stepped(make, p)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["mine"] = [torch.zeros(3, device="meta")]
    before = own_bits(optimizer, p)
    with pytest.raises(ValueError, match="parameter 0 of group 0: 'mine' cannot be copied"):
        optimizer.load_state_dict(saved)
    for key, value in before.items():
        assert_same_bits(optimizer.state[p][key], value, what=key)


@every_kind
@pytest.mark.parametrize(
    "options",
    [{"optim_bits": 8}, {"optim_bits": 32}, {"percentile_clipping": 50}, {"block_wise": False}, {"is_paged": True}],
    ids=str,
)
def test_an_entry_stays_when_the_form_changes(make: Variant, options: dict[str, Any]) -> None:
    """By an option of a group, by loading, and by a copy of the optimizer."""
    p = parameter(120_000)
    optimizer = stepped(make, p)
    mine = optimizer.state[p]["mine"] = torch.arange(3)
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.param_groups[0].update(options)
    q = parameter(120_000)
    other = lion.Lion([q], **{**SMALL, "optim_bits": make.bits, **make.kwargs, **options})
    other.load_state_dict(saved)
    copied = copy.deepcopy(optimizer)
    for one in (optimizer, other, copied):
        (r,) = one.param_groups[0]["params"]
        set_gradients([r], 1)
        one.step()
        assert torch.equal(one.state[r]["mine"], mine)
    assert optimizer.state[p]["mine"] is mine
    assert optimizer.state[p].keys() == other.state[q].keys()
    for key, value in own_bits(optimizer, p).items():
        assert_same_bits(other.state[q][key], value, what=key)


@every_kind
def test_an_entry_stays_with_steps_in_backward(make: Variant) -> None:
    p = parameter(300)
    optimizer = make([p], **SMALL)
    optimizer.state[p]["before"] = 1
    with lion.StepInBackward(optimizer):
        for i in range(3):
            (p * torch.randn(300)).sum().backward()
            optimizer.state[p][f"after {i}"] = i
            optimizer.param_groups[0]["percentile_clipping"] = 50 + 50 * (i % 2)
    assert optimizer.state[p]["step"] == 3
    assert [optimizer.state[p][key] for key in ("before", "after 0", "after 1", "after 2")] == [1, 0, 1, 2]


@every_kind
def test_entries_beside_the_states_of_parameters(make: Variant) -> None:
    """torch's optimizers keep those too."""
    p, q = parameter(300), parameter(300)
    optimizer = stepped(make, p)
    optimizer.state["rounds"] = 7  # type: ignore[index]
    optimizer.state["buffers"] = {"a": torch.arange(3)}  # type: ignore[index]
    for _ in range(2):
        set_gradients([p], 1)
        optimizer.step()
    other = make([q], **SMALL)
    other.load_state_dict(optimizer.state_dict())
    assert other.state["rounds"] == 7  # type: ignore[index]
    assert torch.equal(other.state["buffers"]["a"], torch.arange(3))  # type: ignore[index]
    copied = copy.deepcopy(other)
    for one, r in ((other, q), (copied, copied.param_groups[0]["params"][0])):
        set_gradients([r], 2)
        one.step()
        assert one.state[r]["step"] == 4


FOREIGN_TO_THE_FORM = {
    "32bit": ("absmax1", "qmap1", "max1", "new_max1"),
    "blockwise": ("max1", "new_max1"),
    "tensorwise": ("absmax1",),
}


@pytest.mark.parametrize(("kind", "key"), [(kind, key) for kind, keys in FOREIGN_TO_THE_FORM.items() for key in keys])
def test_an_entry_of_another_form_is_told_apart(kind: str, key: str) -> None:
    """It would be state of ours that was lost, so it is refused: at a step and when it is loaded."""
    p = parameter(700)
    optimizer = stepped(KINDS[kind], p)
    size = {"absmax1": 3, "qmap1": 256, "max1": 1, "new_max1": 1}[key]
    optimizer.state[p] = {**optimizer.state[p], key: torch.ones(size)}
    set_gradients([p], 1)
    with pytest.raises(ValueError, match=r"Invalid state of parameter 0 of group 0: .*(max1|qmap1)'"):
        optimizer.step()
    with pytest.raises(ValueError, match=r"Invalid state of parameter 0 of group 0: .*(max1|qmap1)'"):
        KINDS[kind]([p], **SMALL).load_state_dict(optimizer.state_dict())


@every_kind
@pytest.mark.parametrize("key", ["state2", "qmap2", "absmax2", "max2", "new_max2", "unorm_vec"])
def test_state_of_another_algorithm_of_bitsandbytes_is_refused(make: Variant, key: str) -> None:
    p = parameter(300)
    optimizer = stepped(make, p)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0][key] = torch.zeros(300)
    with pytest.raises(ValueError, match=f"unknown key '{key}'"):
        optimizer.load_state_dict(saved)


def test_the_momentum_of_another_project_is_not_taken_for_an_entry() -> None:
    p = parameter(300)
    group = {"params": [0], "lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0.0}
    for state in ({"exp_avg": torch.ones(300)}, {"exp_avg": torch.ones(300), "step": torch.tensor(3.0)}):
        with pytest.raises(
            ValueError, match="group 0 is another optimizer's, with 'exp_avg' for 'state1'; lion.exchange"
        ):
            lion.Lion([p]).load_state_dict({"state": {0: state}, "param_groups": [group]})
    other = {"momentum_buffer": torch.ones(300)}
    with pytest.raises(ValueError, match="parameter 0 of group 0: the key 'state1' is missing"):
        lion.Lion([p]).load_state_dict({"state": {0: other}, "param_groups": [group]})


@every_kind
def test_entries_go_to_bitsandbytes(make: Variant) -> None:
    p = parameter(300)
    optimizer = stepped(make, p)
    optimizer.state[p]["mine"] = [1]
    optimizer.state["rounds"] = 7  # type: ignore[index]
    saved = exchange.to_bitsandbytes(optimizer.state_dict())
    assert saved["state"][0]["mine"] == [1] and saved["state"]["rounds"] == 7
    assert exchange.to_exp_avg(optimizer.state_dict())["state"][0].keys() == {"exp_avg"}
    other = make([parameter(300)], **SMALL)
    other.load_state_dict(saved)
    assert next(iter(other.state.values()))["mine"] == [1]


class Lookahead:
    """Every second step moves halfway back to where the parameter was (Zhang et al. 2019)."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.steps = optimizer, 0
        for group in optimizer.param_groups:
            for p in group["params"]:
                optimizer.state[p]["slow_param"] = p.detach().clone()

    @torch.no_grad()
    def step(self) -> None:
        self.optimizer.step()
        self.steps += 1
        for group in self.optimizer.param_groups if self.steps % 2 == 0 else ():
            for p in group["params"]:
                slow = self.optimizer.state[p]["slow_param"]
                p.copy_(slow.lerp_(p, 0.5))


@every_variant
def test_lookahead_goes_on_after_a_checkpoint(make: Variant) -> None:
    def train(optimizer: lion.Lion, p: Tensor, rounds: range, outer: Lookahead) -> None:
        for i in rounds:
            set_gradients([p], i)
            outer.step()

    p, q = parameter(700), parameter(700)
    optimizer = make([p], lr=1e-2, **SMALL)
    outer = Lookahead(optimizer)
    train(optimizer, p, range(4), outer)
    saved, q.data = copy.deepcopy(optimizer.state_dict()), p.detach().clone()
    train(optimizer, p, range(4, 8), outer)
    resumed = make([q], lr=1e-2, **SMALL)
    again = Lookahead(resumed)
    resumed.load_state_dict(saved)
    train(resumed, q, range(4, 8), again)
    assert_same_bits(p, q)
    for key, value in optimizer.state[p].items():
        assert_same_bits(resumed.state[q][key], value, what=key)


@every_kind
def test_an_entry_that_contains_itself(make: Variant) -> None:
    """It lives beside a state and in a group, and is refused by name where it would have to be copied."""
    p = parameter(300)
    optimizer = stepped(make, p)
    entry: list[Any] = []
    entry.append(entry)
    optimizer.state[p]["mine"] = optimizer.param_groups[0]["mine"] = entry
    set_gradients([p], 1)
    optimizer.step()
    saved = optimizer.state_dict()
    before = p.detach().clone()
    with pytest.raises(ValueError, match="'mine' contains itself"):
        optimizer.load_state_dict(saved)
    assert_same_bits(p, before)
    assert optimizer.state[p]["mine"] is entry

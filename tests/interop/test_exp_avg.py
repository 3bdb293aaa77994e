"""Momentum to and from Lions that call it ``exp_avg``."""

from __future__ import annotations

import re

import pytest
import torch

import lion
from lion import exchange
from lion._state import momentum
from tests.comparing import assert_same_bits
from tests.interop.training import MORE_STEPS, OPTIONS, SMALL, STEPS, ULP, make_params, restore, snapshot, train


class PlainLion(torch.optim.Optimizer):
    """Lion as in the paper, written with torch; its state is ``exp_avg`` in the parameter's dtype."""

    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr, (beta1, beta2) = group["lr"], group["betas"]
            for p in group["params"]:
                exp_avg = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                update = (exp_avg * beta1 + p.grad * (1 - beta1)).sign()
                p.mul_(1 - lr * group["weight_decay"]).sub_(lr * update)
                exp_avg.mul_(beta2).add_(p.grad, alpha=1 - beta2)


def lion_pytorch(params, **options):
    return pytest.importorskip("lion_pytorch").Lion(params, **{"lr": 1e-4, **options})


def optimi(params, **options):
    return pytest.importorskip("optimi").Lion(params, **{"lr": 1e-4, "kahan_sum": False, "triton": False, **options})


PEERS = {
    "plain": (PlainLion, {}),
    "lion_pytorch": (lion_pytorch, {}),
    "optimi": (optimi, {"kahan_comp": None}),
}
every_peer = pytest.mark.parametrize("make, entries", PEERS.values(), ids=PEERS)
every_dtype = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


def assert_params_close(ours, theirs, steps):
    for p, q in zip(ours, theirs, strict=True):
        bound = 2 * steps * ULP[p.dtype] * torch.maximum(p.abs(), q.abs()).float()
        # A sign may turn where momentum and gradient cancel: at most one in a hundred here.
        assert ((p.float() - q.float()).abs() <= bound).float().mean() > 0.99


@every_dtype
@every_peer
def test_import(make, entries, dtype):
    theirs = make_params(dtype)
    other = make(theirs, **OPTIONS)
    train(other, theirs, 0, STEPS)
    params = restore(snapshot(theirs))
    optimizer = lion.Lion(params)
    optimizer.load_state_dict(exchange.from_exp_avg(other.state_dict()))
    assert {key: optimizer.param_groups[0][key] for key in OPTIONS} == OPTIONS
    for p, q in zip(params, theirs, strict=True):
        assert optimizer.state[p].keys() == {"step", "state1"}
        assert_same_bits(optimizer.state[p]["state1"], other.state[q]["exp_avg"].float())
    train(optimizer, params, STEPS, MORE_STEPS)
    train(other, theirs, STEPS, MORE_STEPS)
    assert_params_close(params, theirs, MORE_STEPS)


@every_dtype
@every_peer
def test_export(make, entries, dtype):
    params = make_params(dtype)
    optimizer = lion.Lion(params, **OPTIONS)
    train(optimizer, params, 0, STEPS)
    theirs = restore(snapshot(params))
    other = make(theirs)
    groups = other.state_dict()["param_groups"]
    other.load_state_dict(exchange.to_exp_avg(optimizer.state_dict(), groups, entries))
    assert other.param_groups[0].keys() == groups[0].keys()
    for p, q in zip(params, theirs, strict=True):
        assert_same_bits(other.state[q]["exp_avg"], optimizer.state[p]["state1"].to(p.dtype))
    train(optimizer, params, STEPS, MORE_STEPS)
    train(other, theirs, STEPS, MORE_STEPS)
    assert_params_close(params, theirs, MORE_STEPS)


@pytest.mark.parametrize("block_wise", [True, False])
def test_the_way_there_and_back_keeps_8bit_momentum(block_wise):
    params = make_params("float32")
    optimizer = lion.Lion8bit(params, block_wise=block_wise, **OPTIONS, **SMALL)
    train(optimizer, params, 0, STEPS)
    there = exchange.to_exp_avg(optimizer.state_dict())
    assert there["param_groups"] == [{**OPTIONS, "params": [0, 1]}]
    again = lion.Lion32bit(restore(params))
    again.load_state_dict(exchange.from_exp_avg(there))
    for p, q in zip(params, again.param_groups[0]["params"], strict=True):
        assert_same_bits(again.state[q]["state1"], momentum(optimizer.state[p]))


def state_dict(entries, **options):
    group = {**OPTIONS, "params": [0], **options}
    return {"state": {0: entries}, "param_groups": [group]}


def without_betas(**options):
    saved = state_dict({"exp_avg": torch.zeros(3)}, **options)
    del saved["param_groups"][0]["betas"]
    return saved


@pytest.mark.parametrize(
    "saved, message",
    [
        (state_dict({}), "parameter 0: 'exp_avg'"),
        (state_dict({"exp_avg": torch.zeros(3, dtype=torch.int32)}), "parameter 0: 'exp_avg'"),
        (state_dict({"exp_avg": 0.0}), "parameter 0: 'exp_avg'"),
        (state_dict({"exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(3)}), "'exp_avg_sq' has no counterpart"),
        (state_dict({"exp_avg": torch.zeros(3), "kahan_comp": torch.zeros(3)}), "'kahan_comp' has no counterpart"),
        (state_dict({"exp_avg": torch.zeros(3)}, decouple_lr=True), "decouple_lr"),
        (without_betas(), "group 0 lacks the key 'betas'"),
        (without_betas(beta1=0.9), "group 0 lacks the key 'betas'"),
        (without_betas(beta2=0.99), "group 0 lacks the key 'betas'"),
    ],
)
def test_what_cannot_be_imported(saved, message):
    with pytest.raises(ValueError, match=message):
        exchange.from_exp_avg(saved)


@pytest.mark.parametrize(
    "saved",
    [
        without_betas(beta1=0.5, beta2=0.75),
        state_dict({"exp_avg": torch.zeros(3)}, betas=(0.5, 0.75)),
        state_dict({"exp_avg": torch.zeros(3)}, betas=(0.5, 0.75), beta2=0.1),
        state_dict({"exp_avg": torch.zeros(3)}, betas=(0.5, 0.75), beta1=0.1, beta2=0.1),
    ],
)
def test_betas_have_one_key_or_two(saved):
    imported = exchange.from_exp_avg(saved)
    assert imported["param_groups"][0]["betas"] == (0.5, 0.75)
    assert imported["state"][0]["step"] == 0


def test_entries_may_be_dropped():
    saved = state_dict({"exp_avg": torch.ones(3), "kahan_comp": torch.zeros(3), "step": torch.tensor(4.0)})
    imported = exchange.from_exp_avg(saved, drop=["kahan_comp"])
    assert imported["state"][0].keys() == {"step", "state1"}
    assert imported["state"][0]["step"] == 4


def test_groups_that_do_not_fit():
    optimizer = lion.Lion(make_params("float32"))
    with pytest.raises(ValueError, match="param_groups"):
        exchange.to_exp_avg(optimizer.state_dict(), [{"params": [0]}])


@pytest.mark.parametrize("keep", [[], ["step"], ["gnorm_vec"], ["step", "gnorm_vec"]])
def test_what_is_kept(keep):
    params = make_params("float32")
    optimizer = lion.Lion(params, percentile_clipping=50)
    train(optimizer, params, 0, 1)
    saved = exchange.to_exp_avg(optimizer.state_dict(), keep=keep)
    for p, entries in zip(params, saved["state"].values(), strict=True):
        assert entries.keys() == {"exp_avg", *keep}
        for key in keep:
            assert_same_bits(entries[key], optimizer.state[p][key])


@pytest.mark.parametrize("export", [exchange.to_exp_avg, exchange.to_bitsandbytes])
@pytest.mark.parametrize("own", [3, {}, {"state1": 3.0}, {"exp_avg": torch.zeros(3)}], ids=str)
def test_states_that_are_none(export, own):
    with pytest.raises(ValueError, match="Invalid state of parameter 0: a dict with a tensor 'state1' is needed"):
        export(state_dict(own))


def test_bitsandbytes_groups_have_an_eps():
    assert exchange.to_bitsandbytes(state_dict({"state1": torch.zeros(3), "step": torch.tensor(1.0)}))[
        "param_groups"
    ] == [{**OPTIONS, "params": [0], "eps": 0.0}]


def test_kept_entries_have_names():
    with pytest.raises(ValueError, match="Invalid keep: .*'qmap1'"):
        exchange.to_exp_avg(lion.Lion(make_params("float32")).state_dict(), keep=["step", "qmap1"])


@pytest.mark.parametrize(("cls", "drop"), [(torch.optim.AdamW, ["exp_avg_sq"]), (PlainLion, [])])
def test_the_state_dict_of_another_optimizer_names_what_converts_it(cls, drop):
    params = make_params("float32")
    other = cls(params)
    for p in params:
        p.grad = torch.ones_like(p)
    other.step()
    saved, optimizer = other.state_dict(), lion.Lion8bit(params)
    call = f"lion.exchange.from_exp_avg(state_dict{', drop=' + str(drop) if drop else ''})".replace("'", '"')
    with pytest.raises(ValueError, match=re.escape(f"'exp_avg' for 'state1'; {call} makes of it what is needed here")):
        optimizer.load_state_dict(saved)
    assert not optimizer.state
    for group in saved["param_groups"]:  # as in optimi's Lion
        group["beta1"], group["beta2"] = group.pop("betas")
    with pytest.raises(ValueError, match=re.escape(call)):
        optimizer.load_state_dict(saved)
    optimizer.load_state_dict(exchange.from_exp_avg(saved, drop=drop))
    assert len(optimizer.state) == len(params)

"""What torch checks of its own optimizers, driven by its ``OptimizerInfo``; SGD and AdamW show that the checks hold.

``torch.testing._internal`` needs the package expecttest.
"""

from __future__ import annotations

import copy
import functools
import io
import sys

import pytest
import torch
from torch.nn import Parameter
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import ExponentialLR, LinearLR, PolynomialLR, ReduceLROnPlateau, StepLR

from tests.comparing import assert_same_bits
from tests.optimizers.support import CLASSES, DTYPES, every_dtype

pytest.importorskip("expecttest")

from torch.testing._internal.common_optimizers import (  # noqa: E402
    ErrorOptimizerInput,
    OptimizerErrorEnum,
    OptimizerInfo,
    OptimizerInput,
    get_error_inputs_for_all_optims,
    optim_db,
)


def lion_inputs(device, dtype=None, *, cls):
    """Return constructor arguments in torch's form."""
    cases = {
        "default": {},
        "non-default lr": {"lr": 1e-3},
        "tensor lr": {"lr": torch.tensor(1e-3)},
        "non-zero weight_decay": {"weight_decay": 0.1},
        "non-default betas": {"betas": (0.5, 0.75)},
        "percentile clipping": {"percentile_clipping": 50},
        "everything in 8 bits": {"min_8bit_size": 0},
        "tensor-wise": {"min_8bit_size": 0, "block_wise": False},
    }
    if cls.__name__ in ("Lion", "PagedLion"):
        cases["8 bits"] = {"optim_bits": 8, "min_8bit_size": 0}
    return [OptimizerInput(params=None, kwargs=kwargs, desc=desc) for desc, kwargs in cases.items()]


def lion_error_inputs(device, dtype):
    """Return constructor arguments that torch's optimizers refuse, in their words."""
    cases = [
        ({"lr": -1}, "Invalid learning rate: -1"),
        ({"lr": 1e-2, "betas": (1.0, 0.0)}, "Invalid beta parameter at index 0: 1.0"),
        ({"lr": 1e-2, "betas": (0.0, 1.0)}, "Invalid beta parameter at index 1: 1.0"),
        ({"lr": 1e-2, "weight_decay": -1}, "Invalid weight_decay value: -1"),
    ]
    return get_error_inputs_for_all_optims(device, dtype) + [
        ErrorOptimizerInput(OptimizerInput(None, kwargs, words), error_type=ValueError, error_regex=words)
        for kwargs, words in cases
    ]


SCHEDULERS = [
    [],
    [lambda opt: StepLR(opt, gamma=0.9, step_size=10)],
    [lambda opt: ExponentialLR(opt, gamma=0.9), lambda opt: ReduceLROnPlateau(opt)],
    [lambda opt: LinearLR(opt, 0.4, total_iters=4), lambda opt: PolynomialLR(opt, power=0.9, total_iters=4)],
]
INFOS = [
    OptimizerInfo(
        cls,
        optim_inputs_func=functools.partial(lion_inputs, cls=cls),
        optim_error_inputs_func=lion_error_inputs,
        scheduler_inputs=SCHEDULERS,
        supported_impls=(),
        not_og_supported_flags=(),
        supports_complex=False,
    )
    for cls in CLASSES
]
PEERS = [info for info in optim_db if info.optim_cls in (SGD, AdamW)]
every_info = pytest.mark.parametrize("info", INFOS + PEERS, ids=lambda info: info.name)


def inputs(info):
    cases = info.optim_inputs_func(device="cpu")
    return [(case.kwargs, case.desc) for case in cases if not case.kwargs.get("maximize")]


def problem(dtype=torch.float32, contiguous=True):
    """Return the parameters of a small regression and its closure."""
    torch.manual_seed(0)
    if contiguous:
        weight, bias = Parameter(torch.randn((10, 5), dtype=dtype)), Parameter(torch.randn(10, dtype=dtype))
    else:
        weight = Parameter(torch.randn((10, 5, 2), dtype=dtype)[..., 0])
        bias = Parameter(torch.randn((10, 2), dtype=dtype)[..., 0])
    x = torch.randn(5, dtype=dtype)

    def loss_of():
        loss = (weight.mv(x) + bias).pow(2).sum()
        loss.backward()
        return loss

    return [weight, bias], loss_of


@every_info
def test_errors(info):
    for case in info.optim_error_inputs_func(device="cpu", dtype=torch.float32):
        assert case.error_on is OptimizerErrorEnum.CONSTRUCTION_ERROR
        if "foreach" in str(case.optimizer_error_input.kwargs) or "betas" in str(case.optimizer_error_input.kwargs):
            if info in PEERS:
                continue
        params = case.optimizer_error_input.params or [Parameter(torch.randn(2, 3))]
        if issubclass(case.error_type, Warning):
            with pytest.warns(case.error_type, match=case.error_regex):
                info.optim_cls(params, **case.optimizer_error_input.kwargs)
        else:
            with pytest.raises(case.error_type, match=case.error_regex):
                info.optim_cls(params, **case.optimizer_error_input.kwargs)


@every_info
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("schedulers", range(len(SCHEDULERS)))
def test_goes_the_right_direction(info, contiguous, schedulers):
    for kwargs, desc in inputs(info):
        params, loss_of = problem(contiguous=contiguous)
        optimizer = info.optim_cls(params, **copy.deepcopy(kwargs))
        made = [make(optimizer) for make in SCHEDULERS[schedulers]]
        losses = []
        for _ in range(20):
            optimizer.zero_grad()
            losses.append(optimizer.step(loss_of).item())
            for scheduler in made:
                scheduler.step(*([losses[-1]] if isinstance(scheduler, ReduceLROnPlateau) else []))
        assert losses[-1] < losses[0], desc


@every_info
def test_param_groups_with_schedulers_go_the_right_direction(info):
    for kwargs, desc in inputs(info):
        (weight, bias), loss_of = problem()
        kwargs = {**kwargs, "lr": 1e-2}
        optimizer = info.optim_cls([{"params": [weight]}, {"params": [bias], "lr": 1e-3}], **kwargs)
        scheduler = StepLR(optimizer, gamma=0.9, step_size=5)
        losses = []
        for _ in range(20):
            optimizer.zero_grad()
            losses.append(optimizer.step(loss_of).item())
            scheduler.step()
        assert losses[-1] < losses[0], desc
        assert optimizer.param_groups[1]["lr"] < 1e-3


@every_info
@pytest.mark.parametrize("shape", [(), (1,)])
def test_tensor_lr_is_the_same_as_a_float(info, shape):
    if shape and info in PEERS and not hasattr(sys.modules[torch.optim.Optimizer.__module__], "_to_scalar"):
        pytest.skip("torch's own optimizers take no tensor of one dimension yet")
    for kwargs, desc in inputs(info):
        results = []
        for lr in (1e-2, torch.full(shape, 1e-2, dtype=torch.float64)):
            params, loss_of = problem()
            optimizer = info.optim_cls(params, **{**kwargs, "lr": lr})
            for _ in range(5):
                optimizer.zero_grad()
                optimizer.step(loss_of)
            results.append(params)
        for p, q in zip(*results, strict=True):
            torch.testing.assert_close(p, q, msg=desc, rtol=0 if info in INFOS else 1e-5, atol=0)


@every_info
@every_dtype
def test_step_does_nothing_without_gradients(info, dtype):
    for kwargs, _ in inputs(info):
        params = [Parameter(torch.randn(3, 4, dtype=dtype)), Parameter(torch.randn(0, dtype=dtype))]
        before = [p.detach().clone() for p in params]
        optimizer = info.optim_cls(params, **kwargs)
        optimizer.step()
        for p, value in zip(params, before, strict=True):
            assert_same_bits(p, value)


@every_info
def test_step_does_nothing_for_zero_gradients(info):
    for kwargs, _ in inputs(info):
        kwargs = {**kwargs, "weight_decay": 0}
        param = Parameter(torch.randn(3, 4))
        param.grad = torch.zeros_like(param)
        before = param.detach().clone()
        optimizer = info.optim_cls([param], **kwargs)
        optimizer.step()
        optimizer.step()
        assert_same_bits(param, before)


@every_info
def test_can_be_printed(info):
    for kwargs, _ in inputs(info):
        assert repr(info.optim_cls([Parameter(torch.randn(3))], **kwargs)).startswith(info.name)


@every_info
def test_state_is_not_empty_after_a_step(info):
    for kwargs, _ in inputs(info):
        params, loss_of = problem()
        optimizer = info.optim_cls(params, **kwargs)
        optimizer.step(loss_of)
        if info.optim_cls is not SGD:
            assert all(optimizer.state[p] for p in params)


@every_info
def test_state_dict_is_deterministic_and_survives_a_file(info):
    for kwargs, desc in inputs(info):
        (weight, bias), loss_of = problem()
        optimizer = info.optim_cls([{"params": [weight]}, {"params": [bias], "lr": 1e-3}], **copy.deepcopy(kwargs))
        for _ in range(3):
            optimizer.zero_grad()
            optimizer.step(loss_of)
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        for saved in (copy.deepcopy(optimizer.state_dict()), torch.load(file, weights_only=True)):
            (weight_copy, bias_copy), loss_of_copy = problem()
            with torch.no_grad():
                weight_copy.copy_(weight)
                bias_copy.copy_(bias)
            groups = [{"params": [weight_copy]}, {"params": [bias_copy], "lr": 0.5}]
            other = info.optim_cls(groups, **copy.deepcopy(kwargs))
            other.load_state_dict(saved)
            original = copy.deepcopy(optimizer)
            twins = [group["params"][0] for group in original.param_groups]
            for _ in range(3):
                for twin, twin_copy in zip(twins, (weight_copy, bias_copy), strict=True):
                    twin.grad = torch.ones_like(twin)
                    twin_copy.grad = torch.ones_like(twin_copy)
                original.step()
                other.step()
            for twin, twin_copy in zip(twins, (weight_copy, bias_copy), strict=True):
                assert_same_bits(twin_copy, twin, what=desc)
            for a, b in zip(other.param_groups, original.param_groups, strict=True):
                assert {k: v for k, v in a.items() if k != "params"} == {k: v for k, v in b.items() if k != "params"}


@every_info
def test_loads_a_step_that_is_no_tensor(info):
    for kwargs, _ in inputs(info):
        params, loss_of = problem()
        optimizer = info.optim_cls(params, **kwargs)
        optimizer.step(loss_of)
        saved = optimizer.state_dict()
        for state in saved["state"].values():
            if torch.is_tensor(state.get("step")):
                state["step"] = state["step"].item()
        optimizer.load_state_dict(saved)
        optimizer.step(loss_of)


@every_info
def test_deepcopy_copies_all_public_attributes(info):
    for kwargs, _ in inputs(info):
        params, loss_of = problem()
        optimizer = info.optim_cls(params, **copy.deepcopy(kwargs))
        for _ in range(2):
            optimizer.step(loss_of)

        def public(optimizer):
            return {name for name in optimizer.__dict__ if not name.startswith("_")}

        assert public(copy.deepcopy(optimizer)) == public(optimizer)


@every_info
def test_param_groups_weight_decay_and_lr(info):
    for kwargs, desc in inputs(info):
        (weight, bias), loss_of = problem()
        groups = [
            {"params": [weight], "weight_decay": 0.5, "lr": 1e-2},
            {"params": [bias], "weight_decay": 0, "lr": torch.tensor(0.0)},
        ]
        optimizer = info.optim_cls(groups, **kwargs)
        before = bias.detach().clone(), loss_of()
        for _ in range(10):
            optimizer.zero_grad()
            loss = optimizer.step(loss_of)
        assert loss < before[1], desc
        assert torch.equal(bias, before[0])


@every_info
def test_dtypes_of_a_group_may_differ(info):
    for kwargs, _ in inputs(info):
        params = [Parameter(torch.randn(3, 4).to(dtype)) for dtype in DTYPES]
        before = [p.detach().clone() for p in params]
        optimizer = info.optim_cls(params, **{**kwargs, "lr": 0.5, "weight_decay": 0})
        for _ in range(3):
            for p in params:
                p.grad = torch.ones_like(p)
            optimizer.step()
        assert all((p < value).all() for p, value in zip(params, before, strict=True))

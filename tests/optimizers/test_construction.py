"""Signatures, defaults, and what the constructors refuse."""

from __future__ import annotations

import inspect
import types
from decimal import Decimal

import numpy as np
import pytest
import torch
from torch import nn

import lion
from tests.optimizers.support import CLASSES, ByHand, every_class, follow, parameter, set_gradients

DEFAULTS = {
    "lr": 1e-4,
    "betas": (0.9, 0.99),
    "weight_decay": 0,
    "optim_bits": 32,
    "args": None,
    "min_8bit_size": 4096,
    "percentile_clipping": 100,
    "block_wise": True,
    "is_paged": False,
}
KEYWORD_ONLY = {"master_weight_bits": None, "stochastic_rounding": False, "rounding_seed": 0}
LEFT_OUT = {
    lion.Lion: (),
    lion.Lion8bit: ("optim_bits",),
    lion.Lion32bit: ("optim_bits",),
    lion.PagedLion: ("is_paged",),
    lion.PagedLion8bit: ("optim_bits", "is_paged"),
    lion.PagedLion32bit: ("optim_bits", "is_paged"),
}


@every_class
def test_signature_and_defaults(cls):
    parameters = list(inspect.signature(cls).parameters.values())
    assert parameters[0].name == "params" and parameters[0].default is inspect.Parameter.empty
    expected = {name: value for name, value in DEFAULTS.items() if name not in LEFT_OUT[cls]}
    assert [(p.name, p.default) for p in parameters[1:]] == [*expected.items(), *KEYWORD_ONLY.items()]
    for p in parameters:
        assert p.kind is (p.KEYWORD_ONLY if p.name in KEYWORD_ONLY else p.POSITIONAL_OR_KEYWORD)


@every_class
def test_positional_arguments(cls):
    values = {**DEFAULTS, "lr": 0.5, "betas": (0.1, 0.2), "weight_decay": 0.3, "min_8bit_size": 7, "block_wise": False}
    values = {name: value for name, value in values.items() if name not in LEFT_OUT[cls]}
    group = cls([parameter(2)], *values.values()).param_groups[0]
    for name in ("lr", "betas", "weight_decay", "min_8bit_size", "percentile_clipping", "block_wise"):
        assert group[name] == values[name], name


@every_class
def test_options_live_in_the_groups(cls):
    optimizer = cls([parameter(2)])
    assert isinstance(optimizer, torch.optim.Optimizer) and isinstance(optimizer, lion.Lion)
    expected = {key: value for key, value in {**DEFAULTS, **KEYWORD_ONLY}.items() if key != "args"}
    expected["optim_bits"] = 8 if "8bit" in cls.__name__ else 32
    expected["is_paged"] = "Paged" in cls.__name__
    group = optimizer.param_groups[0]
    assert {key: group[key] for key in expected} == expected
    assert {key: optimizer.defaults[key] for key in expected} == expected
    assert set(group) - {"params"} == set(expected)


def test_exported_names():
    assert {cls.__name__ for cls in CLASSES} <= set(lion.__all__)
    assert {"functional", "GlobalOptimManager"} <= set(lion.__all__)


# --- args


def test_args_supply_the_options_that_they_have():
    args = types.SimpleNamespace(optim_bits=8, min_8bit_size=16, block_wise=False)
    group = lion.Lion([parameter(2)], percentile_clipping=7, min_8bit_size=5, args=args).param_groups[0]
    assert (group["optim_bits"], group["min_8bit_size"], group["block_wise"]) == (8, 16, False)
    assert (group["percentile_clipping"], group["is_paged"]) == (7, False)


@pytest.mark.parametrize(
    ("name", "value"),
    [("optim_bits", 8), ("min_8bit_size", 1), ("percentile_clipping", 5), ("block_wise", False), ("is_paged", True)],
)
def test_args_with_a_single_attribute(name, value):
    group = lion.Lion([parameter(2)], args=types.SimpleNamespace(**{name: value})).param_groups[0]
    expected = {**DEFAULTS, name: value}
    expected.pop("args")
    assert {key: group[key] for key in expected} == expected


@every_class
def test_args_of_any_kind(cls):
    class Args:
        percentile_clipping = 5
        unrelated = "text"

        @property
        def min_8bit_size(self):
            return 10

    group = cls([parameter(2)], args=Args()).param_groups[0]
    assert (group["percentile_clipping"], group["min_8bit_size"]) == (5, 10)
    assert cls([parameter(2)], args=object()).param_groups[0]["percentile_clipping"] == 100


def test_args_have_their_effect():
    p = parameter(600)
    args = types.SimpleNamespace(optim_bits=8, min_8bit_size=16, block_wise=False, percentile_clipping=20)
    copy = ByHand(p, 8, block_wise=False, percentile=20, min_8bit_size=16)
    follow(lion.Lion([p], args=args), {p: copy}, 5)


def test_args_are_checked():
    with pytest.raises(ValueError, match="percentile_clipping.*101"):
        lion.Lion([parameter(2)], args=types.SimpleNamespace(percentile_clipping=101))


# --- invalid hyperparameters

NAN, INF = float("nan"), float("inf")
INVALID = [
    ({"lr": -1}, ValueError, "Invalid learning rate: -1"),
    ({"lr": -1e-9}, ValueError, "Invalid learning rate: -1e-09"),
    ({"lr": NAN}, ValueError, "Invalid learning rate: nan"),
    ({"lr": INF}, ValueError, "Invalid learning rate: inf; expected a finite number, at least 0"),
    ({"lr": 1e39}, ValueError, r"Invalid learning rate: 1e\+39; it must be finite in float32"),
    ({"lr": "fast"}, TypeError, "Invalid learning rate: 'fast'"),
    ({"lr": "0.1"}, TypeError, "Invalid learning rate: '0.1'"),
    ({"lr": b"0.1"}, TypeError, "Invalid learning rate: b'0.1'"),
    ({"lr": np.complex64(0.1)}, TypeError, "Invalid learning rate"),
    ({"lr": np.str_("0.1")}, TypeError, "Invalid learning rate"),
    ({"lr": None}, TypeError, "Invalid learning rate: None"),
    ({"lr": [1e-3]}, TypeError, "Invalid learning rate"),
    ({"lr": 1j}, TypeError, "Invalid learning rate"),
    ({"lr": torch.tensor([0.1, 0.2])}, ValueError, "Tensor lr must be 1-element"),
    ({"lr": torch.tensor(-1.0)}, ValueError, "Invalid learning rate: -1"),
    ({"lr": torch.tensor(NAN)}, ValueError, "Invalid learning rate: nan"),
    ({"lr": torch.tensor(1 + 1j)}, (TypeError, ValueError), "Invalid learning rate"),
    ({"betas": (1.5, 0.99)}, ValueError, "Invalid beta parameter at index 0: 1.5"),
    ({"betas": (1.0, 0.99)}, ValueError, "Invalid beta parameter at index 0: 1.0"),
    ({"betas": (-0.1, 0.99)}, ValueError, "Invalid beta parameter at index 0: -0.1"),
    ({"betas": (0.9, 1.0)}, ValueError, "Invalid beta parameter at index 1: 1.0"),
    ({"betas": (0.9, NAN)}, ValueError, "Invalid beta parameter at index 1: nan"),
    ({"betas": (0.9,)}, ValueError, "Invalid betas"),
    ({"betas": (0.9, 0.99, 0.999)}, ValueError, "Invalid betas"),
    ({"betas": 0.9}, TypeError, "Invalid betas: 0.9"),
    ({"betas": ("a", 0.9)}, TypeError, "Invalid beta parameter at index 0"),
    ({"betas": None}, TypeError, "Invalid betas: None"),
    ({"weight_decay": -1}, ValueError, "Invalid weight_decay value: -1"),
    ({"weight_decay": NAN}, ValueError, "Invalid weight_decay value: nan"),
    ({"weight_decay": INF}, ValueError, "Invalid weight_decay value: inf; expected a finite number, at least 0"),
    (
        {"lr": 1e30, "weight_decay": 1e30},
        ValueError,
        r"Invalid weight_decay value: 1e\+30; 1 - lr",
    ),
    ({"weight_decay": "much"}, TypeError, "Invalid weight_decay value: 'much'"),
    ({"min_8bit_size": -1}, ValueError, "Invalid min_8bit_size value: -1"),
    ({"min_8bit_size": 0.5}, (TypeError, ValueError), "Invalid min_8bit_size value: 0.5"),
    ({"min_8bit_size": "big"}, TypeError, "Invalid min_8bit_size value: 'big'"),
    ({"percentile_clipping": 0}, ValueError, "Invalid percentile_clipping value: 0"),
    ({"percentile_clipping": 101}, ValueError, "Invalid percentile_clipping value: 101"),
    ({"percentile_clipping": -5}, ValueError, "Invalid percentile_clipping value: -5"),
    ({"percentile_clipping": 5.5}, (TypeError, ValueError), "Invalid percentile_clipping value: 5.5"),
    ({"percentile_clipping": 0.95}, ValueError, r"value: 0.95; expected an integer from 1 to 100; did you mean 95\?"),
    ({"percentile_clipping": 0.001}, ValueError, "value: 0.001; expected an integer from 1 to 100(?!;)"),
    ({"percentile_clipping": NAN}, ValueError, "value: nan; expected an integer from 1 to 100(?!;)"),
    ({"percentile_clipping": True}, TypeError, "value: True; .*since 0.50, is_paged is the argument at this place"),
    ({"percentile_clipping": None}, TypeError, "Invalid percentile_clipping value: None"),
    ({"block_wise": None}, TypeError, "Invalid block_wise value: None"),
    ({"block_wise": "no"}, TypeError, "Invalid block_wise value: 'no'"),
    ({"block_wise": 2}, (TypeError, ValueError), "Invalid block_wise value: 2"),
]
BITS = [(bits, "Invalid optim_bits value") for bits in (0, 4, 16, 31, 64, -8, NAN, "8bit", None)]
every_invalid = pytest.mark.parametrize(("kwargs", "error", "message"), INVALID, ids=[str(case[0]) for case in INVALID])


@every_class
@every_invalid
def test_invalid_argument(cls, kwargs, error, message):
    with pytest.raises(error, match=message):
        cls([parameter(2)], **kwargs)


@every_class
@pytest.mark.parametrize(
    "kwargs",
    [
        *({"lr": 0}, {"betas": (0.0, 0.0)}, {"betas": (1 - 2.0**-53, 1 - 2.0**-53)}, {"weight_decay": 0}),
        *({"min_8bit_size": 0}, {"percentile_clipping": 1}, {"percentile_clipping": 100}),
    ],
    ids=str,
)
def test_argument_at_the_end_of_what_is_allowed(cls, kwargs):
    group = cls([parameter(2)], **kwargs).param_groups[0]
    assert {key: group[key] for key in kwargs} == kwargs


def test_least_size_for_8_bits():
    params = [parameter(size) for size in (511, 512, 513)]
    optimizer = lion.Lion8bit(params, min_8bit_size=512)
    set_gradients(params, 0)
    optimizer.step()
    assert [optimizer.state[p]["state1"].dtype for p in params] == [torch.float32, torch.uint8, torch.uint8]


def test_a_history_up_to_percentile_99():
    for percentile, keys in ((99, {"step", "state1", "gnorm_vec"}), (100, {"step", "state1"})):
        p = parameter(5)
        optimizer = lion.Lion([p], percentile_clipping=percentile)
        set_gradients([p], 0)
        optimizer.step()
        assert optimizer.state[p].keys() == keys


@pytest.mark.parametrize("index", [0, 1, 7])
def test_the_first_option_that_a_group_has_lost_is_named(index):
    names = [name for name in DEFAULTS if name != "args"]
    p = parameter(5)
    optimizer = lion.Lion([p])
    set_gradients([p], 0)
    for name in names[index:]:
        del optimizer.param_groups[0][name]
    with pytest.raises(ValueError, match=f"the option '{names[index]}' is missing"):
        optimizer.step()


@pytest.mark.parametrize(("length", "shown"), [(198, f"'{'x' * 198}'"), (199, f"'{'x' * 199}...")])
def test_values_beyond_200_characters_are_cut_in_errors(length, shown):
    with pytest.raises(TypeError) as caught:
        lion.Lion([parameter(2)], lr="x" * length)
    assert str(caught.value) == f"Invalid learning rate: {shown}; expected a number"


@pytest.mark.parametrize("cls", [lion.Lion, lion.PagedLion])
@pytest.mark.parametrize(("bits", "message"), BITS)
def test_invalid_optim_bits(cls, bits, message):
    with pytest.raises((TypeError, ValueError), match=message):
        cls([parameter(2)], optim_bits=bits)


@pytest.mark.parametrize("is_paged", [None, "yes", 3])
def test_invalid_is_paged(is_paged):
    with pytest.raises((TypeError, ValueError), match="Invalid is_paged value"):
        lion.Lion([parameter(2)], is_paged=is_paged)


@every_invalid
def test_invalid_option_of_a_group(kwargs, error, message):
    with pytest.raises(error, match=message):
        lion.Lion([{"params": [parameter(2)], **kwargs}])
    optimizer = lion.Lion([parameter(2)])
    with pytest.raises(error, match=message):
        optimizer.add_param_group({"params": [parameter(2)], **kwargs})
    assert len(optimizer.param_groups) == 1


@every_class
@pytest.mark.parametrize("name", ["lion_beta", "eps", "maximize"])
def test_unknown_argument(cls, name):
    with pytest.raises(TypeError, match=name):
        cls([parameter(2)], **{name: 1})


@pytest.mark.parametrize(("cls", "place"), [(lion.Lion, 7), (lion.Lion8bit, 6), (lion.Lion32bit, 6)])
def test_is_paged_at_its_place_in_bitsandbytes(cls, place):
    arguments = list(inspect.signature(cls).parameters.values())
    given = [[parameter(2)], *(argument.default for argument in arguments[1:place]), True]
    with pytest.raises(TypeError, match="In bitsandbytes since 0.50, is_paged is the argument at this place"):
        cls(*given)


MODELS = [
    nn.Linear(2, 2),
    nn.Sequential(nn.Linear(2, 2)),
    nn.ParameterDict({"a": torch.zeros(2)}),
    nn.Linear(2, 2).parameters,
]


@every_class
@pytest.mark.parametrize("model", MODELS, ids=["module", "iterable module", "dict", "method"])
def test_a_model_instead_of_its_parameters(cls, model):
    name = type(model).__name__
    for params in (model, [{"params": model}]):
        with pytest.raises(TypeError, match=rf"Invalid params: {name}; pass model.parameters\(\)"):
            cls(params)


@every_class
def test_a_list_of_parameters_that_is_a_module(cls):
    params = nn.ParameterList([parameter(3), parameter(2)])
    for given in (params, [{"params": params}]):
        optimizer = cls(given)
        assert list(map(id, optimizer.param_groups[0]["params"])) == list(map(id, params))
    optimizer.add_param_group({"params": nn.ParameterList([parameter(4)])})
    assert len(optimizer.param_groups[1]["params"]) == 1


@pytest.mark.parametrize(
    ("key", "option"),
    [
        *(("weight_deacy", "weight_decay"), ("weightdecay", "weight_decay"), ("beta", "betas"), ("bettas", "betas")),
        *(("percentile_cliping", "percentile_clipping"), ("optim_bit", "optim_bits"), ("blockwise", "block_wise")),
    ],
)
def test_a_misspelled_option_of_a_group(key, option):
    with pytest.warns(
        UserWarning, match=f"The key '{key}' of group 1 has no effect; did you mean '{option}'"
    ) as caught:
        optimizer = lion.Lion8bit([{"params": [parameter(2)]}, {"params": [parameter(2)], key: 0.5}])
        set_gradients([p for group in optimizer.param_groups for p in group["params"]], 0)
        optimizer.step()
    assert len(caught) == 1


@pytest.mark.filterwarnings("error")
def test_a_group_that_a_warning_refuses_is_not_added():
    optimizer = lion.Lion8bit([parameter(2)])
    with pytest.raises(UserWarning, match="did you mean 'weight_decay'"):
        optimizer.add_param_group({"params": [parameter(2)], "weight_decays": 0.5})
    assert len(optimizer.param_groups) == 1


@every_class
def test_a_misspelled_argument(cls):
    with pytest.raises(TypeError, match=f"{cls.__name__} has no option 'weight_deacy'; did you mean 'weight_decay'"):
        cls([parameter(2)], weight_deacy=0.1)


@pytest.mark.filterwarnings("error")
def test_keys_that_are_no_misspelled_option():
    keys = ("initial_lr", "max_lr", "min_lr", "swa_lr", "lr_scale", "base_momentum", "max_momentum", "eps", "fused")
    more = ("decoupled_weight_decay", "weight_decouple", "param_names", "name", "beta1", "wd_scale")
    group = {key: None for key in (*keys, *more)}
    lion.Lion([{**group, "params": [("weight", parameter(2))]}])


def test_numbers_of_other_types_are_numbers():
    kwargs = {
        "lr": np.float64(1e-3),
        "betas": [np.float32(0.5), Decimal("0.25")],
        "weight_decay": np.float32(0.5),
        "optim_bits": np.int64(8),
        "min_8bit_size": np.int32(0),
        "percentile_clipping": 100.0,
        "block_wise": np.bool_(True),
    }
    p = parameter(300)
    copy = ByHand(p, 8, min_8bit_size=0)
    optimizer = lion.Lion([p], **kwargs)
    p.grad = torch.ones(300)
    optimizer.step()
    copy.step(p.grad, 1e-3, (0.5, 0.25), 0.5)
    copy.check(p, optimizer)


# --- invalid parameters


@every_class
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.complex128, torch.float8_e4m3fn])
def test_unsupported_dtype(cls, dtype):
    """Of a parameter that is trained; what never gets a gradient may be anything."""
    p = torch.zeros(3, dtype=dtype, requires_grad=True)
    with pytest.raises(TypeError, match=str(dtype)):
        cls([parameter(2), p])
    optimizer = cls([parameter(2)])
    with pytest.raises(TypeError, match=str(dtype)):
        optimizer.add_param_group({"params": p})
    assert len(optimizer.param_groups) == 1


@every_class
@pytest.mark.parametrize(
    ("make", "layout"),
    [
        (lambda t: t.to_sparse(), "torch.sparse_coo"),
        (lambda t: torch.nested.nested_tensor([t, t[:2]]), "nested"),
    ],
)
def test_parameters_of_another_layout(cls, make, layout):
    p = make(torch.zeros(3, 3)).requires_grad_()
    with pytest.raises(TypeError, match=f"parameter 0 of group 0: layout {layout}; dense"):
        cls([p])


def test_the_error_names_the_parameter():
    bad = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    with pytest.raises(TypeError, match="head.weight"):
        lion.Lion([("body.weight", parameter(2)), ("head.weight", bad)])


@every_class
def test_params_must_be_given(cls):
    with pytest.raises(ValueError, match="empty parameter list"):
        cls([])
    with pytest.raises(TypeError, match="iterable of Tensors or dicts"):
        cls(parameter(2))
    with pytest.raises(TypeError, match="can only optimize Tensors"):
        cls([1, 2])
    with pytest.raises(ValueError, match="non-leaf"):
        cls([parameter(2) * 2])
    p = parameter(2)
    with pytest.raises(ValueError, match="more than one parameter group"):
        cls([{"params": [p]}, {"params": [p]}])


def test_parameters_on_a_device_without_implementation():
    p = nn.Parameter(torch.zeros(3, device="meta"))
    with pytest.raises((TypeError, ValueError), match="meta"):
        optimizer = lion.Lion([p])
        p.grad = torch.zeros(3, device="meta")
        optimizer.step()

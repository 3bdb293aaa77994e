"""Whatever an argument is, it gives a working optimizer or a TypeError or ValueError that names it."""

from __future__ import annotations

import inspect
import itertools
import re
import traceback
import types
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import lion
from lion import functional as F
from lion._options import CHECKS, STATE_OPTIONS, check_value
from tests.comparing import assert_same_bits
from tests.fuzzing import values
from tests.fuzzing.values import anything, numbers
from tests.optimizers.support import CLASSES, ByHand, assert_unchanged, parameter, set_gradients, snapshot
from tests.optimizers.test_programs import ADAPTED, adapt

REFUSED = (TypeError, ValueError)
NAMES = {"lr": "learning rate|Tensor lr", "betas": "beta", "weight_decay": "weight_decay"}


def step_as_reported(optimizer: lion.Lion, options: dict[str, Any]) -> None:
    """Take a step and compare it with the reference's under the options that the optimizer reports."""
    p = optimizer.param_groups[-1]["params"][0]
    set_gradients([p], 0)
    lr = float(options["lr"])
    copy = ByHand(p, *(options[key] for key in ("optim_bits", "block_wise", "percentile_clipping", "min_8bit_size")))
    before = snapshot(optimizer)
    try:
        optimizer.step()
    except REFUSED as error:
        # A tensor as learning rate is read, and a combination checked, when it is used.
        assert re.search("learning rate|weight_decay", str(error))
        assert isinstance(options["lr"], torch.Tensor)
        assert_unchanged(optimizer, before)
    else:
        copy.step(p.grad, lr, options["betas"], options["weight_decay"])
        copy.check(p, optimizer)


def check_refusal(error: Exception, name: str) -> None:
    assert re.search(NAMES.get(name, name), str(error)), f"{error!r} does not name {name}"
    assert len(str(error)) < 1000


@given(st.data(), st.sampled_from(CLASSES), st.sampled_from(["argument", "group", "added group", "args"]))
def test_constructor(data: st.DataObject, cls: type[lion.Lion], way: str) -> None:
    own = [name for name in inspect.signature(cls).parameters if name in CHECKS]
    name = data.draw(st.sampled_from({"argument": own, "args": STATE_OPTIONS}.get(way, list(CHECKS))))
    value = data.draw(anything())
    p, optimizer = parameter(600), None
    try:
        if way == "argument":
            optimizer = cls([p], **{name: value})
        elif way == "group":
            optimizer = cls([{"params": [p], name: value}])
        elif way == "args":
            optimizer = cls([p], args=types.SimpleNamespace(**{name: value}))
        else:
            optimizer = cls([parameter(2)])
            optimizer.add_param_group({"params": [p], name: value})
    except REFUSED as error:
        check_refusal(error, name)
        assert optimizer is None or len(optimizer.param_groups) == 1
    else:
        step_as_reported(optimizer, optimizer.param_groups[-1])


def equal(value: Any, other: Any) -> bool:
    try:
        return bool(value == other)
    except Exception:
        return False


@given(st.sampled_from(list(CHECKS)), anything(), st.booleans())
@example("percentile_clipping", np.array(50.0), False)
@example("betas", iter({0.25, 0.5}), True)
def test_option_changed_later(name: str, value: Any, cached: bool) -> None:
    p = parameter(600)
    optimizer = lion.Lion8bit([p], min_8bit_size=0, percentile_clipping=50)
    copy = ByHand(p, 8, percentile=50, min_8bit_size=0)
    set_gradients([p], 1)
    if cached:
        optimizer.step()
        copy.step(p.grad)
    old, optimizer.param_groups[0][name] = optimizer.param_groups[0][name], value
    before = snapshot(optimizer)
    try:
        optimizer.step()
    except REFUSED as error:
        check_refusal(error, name)
        assert_unchanged(optimizer, before)
        assert optimizer.param_groups[0][name] is value
    else:
        if cached and name in STATE_OPTIONS and equal(value, old):
            # Nothing has changed, and nothing is checked anew.
            optimizer.param_groups[0][name] = old
        options = {key: check_value(key, option) for key, option in optimizer.param_groups[0].items() if key in CHECKS}
        adapt(copy, *(options[key] for key in ADAPTED))
        copy.step(p.grad, float(options["lr"]), options["betas"], options["weight_decay"])
        copy.check(p, optimizer)


@given(st.sampled_from(list(CHECKS)) | anything(), anything(), st.sampled_from(["key", "dict", "module", "config"]))
@example("lr", np.array(1.0), "config")
@example("lr", itertools.repeat(0.5), "config")
def test_override(name: Any, value: Any, way: str) -> None:
    manager = lion.GlobalOptimManager.get_instance()
    manager.initialize()
    module = torch.nn.Linear(20, 30, bias=False)
    p = module.weight
    optimizer = lion.Lion([p], optim_bits=8, min_8bit_size=0)
    set_gradients([p], 0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if way == "key":
                manager.override_config(p, name, value)
            elif way == "dict":
                manager.override_config(p, key_value_dict={name: value} if isinstance(name, str) else name)
            elif way == "module":
                manager.register_module_override(module, "weight", {name: value} if isinstance(name, str) else name)
            else:
                manager.override_config(value, "lr", 0.5)
    except REFUSED as error:
        assert "Invalid" in str(error) or "Tensor lr" in str(error)
        assert not manager.lookup()
    else:
        config = manager.lookup().get(id(p), {})
        step_as_reported(optimizer, {**optimizer.param_groups[0], **config})


@given((anything() | st.lists(anything(), max_size=2)).filter(lambda params: not isinstance(params, itertools.repeat)))
def test_params(params: Any) -> None:
    try:
        optimizer = lion.Lion(params)
    except REFUSED:
        return
    except Exception as error:
        # What iterating over the argument, or over a part of it, raises is passed on.
        assert traceback.extract_tb(error.__traceback__)[-1].filename == values.__file__
        return
    for group in optimizer.param_groups:
        for p in group["params"]:
            # What never gets a gradient may be anything.
            if p.requires_grad or p.dtype in (torch.float32, torch.float16, torch.bfloat16):
                p.grad = torch.zeros_like(p)
    try:
        optimizer.step()
    except (TypeError, ValueError) as error:
        # A parameter may get memory of its own after it was given to an optimizer, and a gradient unfreezes it.
        assert re.search("on the device meta|its elements share memory|layout|negative bit", str(error))
        assert not optimizer.state


def test_what_args_raise_is_passed_on() -> None:
    class Args:
        @property
        def optim_bits(self) -> int:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        lion.Lion([parameter(2)], args=Args())


# --- functional API

LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "plain": lambda t: t,
    "strided": lambda t: torch.stack([t, t], -1)[..., 0],
    "expanded": lambda t: t[:1].expand(t.shape) if t.dim() else t,
    "offset": lambda t: torch.cat([t.reshape(-1)[:0].new_zeros(1), t.reshape(-1)])[1:].view(t.shape),
    "negative": lambda t: torch._neg_view(t.clone()) if t.dtype != torch.bool else t,
    "gradient": lambda t: t.clone().requires_grad_() if t.is_floating_point() else t,
    "sparse": lambda t: t.to_sparse(),
    "meta": lambda t: t.to("meta"),
    "double": lambda t: t.double(),
    "half": lambda t: t.half(),
    "short": lambda t: t[:-1] if t.dim() else t,
    "matrix": lambda t: t.reshape(1, -1),
}


def laid_out(tensor: torch.Tensor) -> st.SearchStrategy[torch.Tensor]:
    """Tensors like one that an argument needs, in all layouts."""
    names = st.just("plain") | st.sampled_from(list(LAYOUTS))
    return names.map(lambda name: LAYOUTS[name](tensor.clone()))


def sometimes(good: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return good | good | anything()


@given(st.data(), st.sampled_from(["quantize", "dequantize", "dequantize by state", "clip", "map"]))
def test_functional(data: st.DataObject, function: str) -> None:
    values, codes = torch.linspace(-1, 1, 300), torch.arange(300).to(torch.uint8)
    absmax, qmap, history = torch.linspace(1, 2, 5), F.create_dynamic_map(), torch.linspace(0, 1, 100)
    size = sometimes(st.just(64))
    places: dict[str, Any]
    if function == "quantize":
        places = {"code": qmap, "absmax": torch.zeros(5), "out": torch.zeros(300, dtype=torch.uint8)}
        first = [data.draw(sometimes(laid_out(values)))]
        chosen = {name: data.draw(sometimes(laid_out(place)) | st.none()) for name, place in places.items()}
        chosen["blocksize"] = data.draw(size)
        call, written = F.quantize_blockwise, ("absmax", "out")
    elif function == "dequantize":
        places = {"absmax": absmax, "code": qmap, "out": torch.zeros(300)}
        first = [data.draw(sometimes(laid_out(codes)))]
        chosen = {name: data.draw(sometimes(laid_out(place)) | st.none()) for name, place in places.items()}
        chosen["blocksize"] = data.draw(size)
        call, written = F.dequantize_blockwise, ("out",)
    elif function == "dequantize by state":
        fields = [data.draw(sometimes(laid_out(t))) for t in (absmax, qmap)]
        dtype = data.draw(sometimes(st.sampled_from([torch.float32, torch.bfloat16, torch.float64])))
        first = [codes, F.QuantState(*fields, data.draw(size), dtype)]
        call, chosen, written = F.dequantize_blockwise, {}, ()
    elif function == "clip":
        first = [data.draw(sometimes(laid_out(values))), data.draw(sometimes(laid_out(history)))]
        chosen = {"step": data.draw(sometimes(st.just(3))), "percentile": data.draw(sometimes(st.just(50)))}
        call, written = F.percentile_clipping, ()
    else:
        first, chosen, call, written = [], {}, F.create_dynamic_map, ()
        for name, good in (("signed", True), ("max_exponent_bits", 7), ("total_bits", 8)):
            chosen[name] = data.draw(sometimes(st.just(good) | numbers()))

    def run(backend: str) -> tuple[Any, list[Any]]:
        def copied(value: Any) -> Any:
            return value.detach().clone() if isinstance(value, torch.Tensor) and value.is_contiguous() else value

        arguments = {name: copied(value) if name in written else value for name, value in chosen.items()}
        firsts = [copied(value) for value in first]
        before = [copied(arguments[name]) for name in written]
        with lion.use_backend(backend):
            try:
                result = call(*firsts, **arguments)
            except REFUSED as error:
                assert "Invalid" in str(error), repr(error)
                for name, value in zip(written, before, strict=True):
                    if isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_meta:
                        assert_same_bits(arguments[name].resolve_neg(), value.resolve_neg())
                return "refused", []
        results = list(result) if isinstance(result, tuple) else [result]
        if isinstance(results[-1], F.QuantState):
            results[-1] = results[-1].absmax
        return "done", results

    (outcome, results), (expected_outcome, expected) = run("cpu"), run("reference")
    assert outcome == expected_outcome
    for actual, other in zip(results, expected, strict=True):
        assert_same_bits(actual, other)

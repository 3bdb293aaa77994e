"""lion.functional equals the reference on tensors of every kind."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lion
from lion import functional as F
from lion import reference
from tests import strategies
from tests.comparing import assert_same_bits, to_numpy
from tests.optimizers.support import every_dtype, parameter

BLOCK_SIZES = tuple(2**i for i in range(6, 17))
MAP = reference.create_dynamic_map()


def tensor(array):
    """Return a torch tensor of the bits of an array, bfloat16 included."""
    if array.dtype == strategies.FLOAT_DTYPES["bfloat16"]:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [(7, 8), (3, 5), (1, 2)])
def test_create_dynamic_map(signed, bits):
    assert_same_bits(F.create_dynamic_map(signed, *bits), reference.create_dynamic_map(signed, *bits))
    with pytest.raises(ValueError, match="max_exponent_bits"):
        F.create_dynamic_map(signed, 9, 8)


@pytest.mark.parametrize("bits", range(2, 9))
def test_few_bits(bits):
    """Values that the map has come back as they are, whatever the backend."""
    qmap = F.create_dynamic_map(True, bits, bits)
    assert_same_bits(qmap, reference.create_dynamic_map(True, bits, bits))
    values = qmap.repeat(2)[-300:]
    for name in ("cpu", "reference"):
        with lion.use_backend(name):
            codes, state = F.quantize_blockwise(values, code=qmap, blocksize=256)
            assert_same_bits(codes, reference.quantize_blockwise(values.numpy(), qmap.numpy(), 256)[0])
            assert_same_bits(F.dequantize_blockwise(codes, state), values)


@given(st.data(), strategies.dtypes(), strategies.sizes(), st.sampled_from(BLOCK_SIZES))
def test_quantize_and_dequantize(data, dtype, size, block_size):
    values = data.draw(strategies.floats(dtype, size))
    codes, state = F.quantize_blockwise(tensor(values), blocksize=block_size)
    expected_codes, expected_absmax = reference.quantize_blockwise(values, MAP, block_size)
    assert_same_bits(codes, expected_codes, what="codes")
    assert_same_bits(state.absmax, expected_absmax, what="absmax")
    back = F.dequantize_blockwise(codes, state)
    expected = reference.dequantize_blockwise(expected_codes, expected_absmax, MAP, block_size)
    assert_same_bits(back, expected.astype(strategies.FLOAT_DTYPES[dtype]), what="values")
    wide = F.dequantize_blockwise(codes, absmax=state.absmax, blocksize=block_size)
    assert_same_bits(wide, expected, what="float32 values")


@given(st.data(), strategies.sizes(600), st.sampled_from(["unsigned", "even", "padded", "random", "constant"]))
def test_other_maps(data, size, name):
    qmap = {
        "unsigned": lambda: reference.create_dynamic_map(False),
        "even": lambda: np.linspace(-1, 1, 256, dtype=np.float32),
        "padded": lambda: reference.create_dynamic_map(True, 3, 5),
        "random": lambda: np.sort(strategies.make_floats("finite_bits", "float32", 256, data.draw(strategies.seeds()))),
        "constant": lambda: np.full(256, 0.5, np.float32),
    }[name]()
    values = data.draw(strategies.floats("float32", size))
    codes, state = F.quantize_blockwise(tensor(values), code=torch.from_numpy(qmap), blocksize=64)
    expected_codes, expected_absmax = reference.quantize_blockwise(values, qmap, 64)
    assert_same_bits(codes, expected_codes, what="codes")
    assert_same_bits(state.absmax, expected_absmax, what="absmax")
    with np.errstate(all="ignore"):
        expected = reference.dequantize_blockwise(expected_codes, expected_absmax, qmap, 64)
    assert_same_bits(F.dequantize_blockwise(codes, state), expected)


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_shapes_and_layouts(name):
    with lion.use_backend(name):
        for values in (
            parameter(),
            parameter(0),
            parameter(3, 0, 2),
            parameter(30, 40).detach().t(),
            parameter(2000).detach()[1::3],
            parameter(4, 5, 6, 7).detach().to(memory_format=torch.channels_last),
            parameter(1).detach().expand(300),
        ):
            before = values.detach().clone()
            codes, state = F.quantize_blockwise(values, blocksize=64)
            expected_codes, expected_absmax = reference.quantize_blockwise(before.contiguous().numpy(), MAP, 64)
            assert_same_bits(codes, expected_codes)
            assert_same_bits(state.absmax, expected_absmax)
            assert_same_bits(values, before)
            assert F.dequantize_blockwise(codes, state).shape == values.shape
            assert not codes.requires_grad


@every_dtype
def test_out_and_absmax_are_filled(dtype):
    values = parameter(1000, dtype=dtype)
    out, absmax = torch.empty(1000, dtype=torch.uint8), torch.empty(4)
    codes, state = F.quantize_blockwise(values, absmax=absmax, out=out, blocksize=256)
    assert codes is out and state.absmax is absmax and state.dtype == dtype
    plain = F.quantize_blockwise(values, blocksize=256)
    assert_same_bits(out, plain[0])
    assert_same_bits(absmax, plain[1].absmax)
    for target in (torch.float32, torch.float16, torch.bfloat16):
        place = torch.empty(1000, dtype=target)
        assert F.dequantize_blockwise(codes, state, out=place) is place
        assert_same_bits(place, F.dequantize_blockwise(codes, absmax=absmax, blocksize=256).to(target))


def test_non_contiguous_codes():
    values = parameter(40, 30)
    codes, state = F.quantize_blockwise(values, blocksize=64)
    again = F.dequantize_blockwise(codes.t().contiguous().t(), state)
    assert_same_bits(again, F.dequantize_blockwise(codes, state))


@pytest.mark.parametrize("block_size", [8192, 16384, 32768, 65536])
@pytest.mark.parametrize("name", ["cpu", "reference"])
@every_dtype
def test_large_blocks(dtype, name, block_size):
    values = parameter(3 * block_size + 17, dtype=dtype)
    for i in range(4):
        values.data[i * block_size + 5] *= 10.0**i
    codes, state = F.quantize_blockwise(values, blocksize=block_size)
    with lion.use_backend(name):
        codes, state = F.quantize_blockwise(values, blocksize=block_size)
        back = F.dequantize_blockwise(codes, state)
    array = to_numpy(values)
    expected_codes, expected_absmax = reference.quantize_blockwise(array, MAP, block_size)
    assert expected_absmax.shape == (4,)
    assert_same_bits(codes, expected_codes, what="codes", block_size=block_size)
    assert_same_bits(state.absmax, expected_absmax, what="absmax")
    expected = reference.dequantize_blockwise(expected_codes, expected_absmax, MAP, block_size)
    assert_same_bits(back, expected.astype(array.dtype), what="values", block_size=block_size)


def test_default_block_size_is_4096():
    codes, state = F.quantize_blockwise(parameter(5000))
    assert state.absmax.shape == (2,) and state.blocksize == 4096
    assert_same_bits(F.dequantize_blockwise(codes, absmax=state.absmax), F.dequantize_blockwise(codes, state))


@pytest.mark.parametrize("block_size", [0, -64, 1, 32, 63, 100, 12288, 131072, 256.5, None])
def test_block_size_out_of_range(block_size):
    with pytest.raises((ValueError, TypeError), match="blocksize"):
        F.quantize_blockwise(parameter(100), blocksize=block_size)
    with pytest.raises((ValueError, TypeError), match="blocksize"):
        F.dequantize_blockwise(torch.zeros(100, dtype=torch.uint8), absmax=torch.ones(2), blocksize=block_size)


VALUES, CODES, QMAP = torch.zeros(100), torch.zeros(100, dtype=torch.uint8), F.create_dynamic_map()


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param({"A": VALUES.double()}, id="float64"),
        pytest.param({"A": CODES}, id="integers"),
        pytest.param({"A": VALUES.to_sparse()}, id="sparse"),
        pytest.param({"A": VALUES.numpy()}, id="not a tensor"),
        pytest.param({"code": torch.zeros(16)}, id="map of another size"),
        pytest.param({"code": torch.zeros(256).double()}, id="map of another dtype"),
        pytest.param({"code": torch.zeros(256).bfloat16()}, id="bfloat16 map"),
        pytest.param({"code": torch.linspace(1, -1, 256)}, id="descending map"),
        pytest.param({"code": torch.full((256,), float("nan"))}, id="map of NaN"),
        pytest.param({"absmax": torch.zeros(3)}, id="absmax of another size"),
        pytest.param({"absmax": torch.zeros(2).half()}, id="absmax of another dtype"),
        pytest.param({"out": CODES[:50]}, id="out of another size"),
        pytest.param({"out": VALUES}, id="out of another dtype"),
        pytest.param({"out": torch.zeros(200, dtype=torch.uint8)[::2]}, id="strided out"),
        pytest.param({"A": torch.zeros(100, device="meta")}, id="device"),
    ],
)
def test_quantize_refuses(arguments):
    with pytest.raises((TypeError, ValueError)):
        F.quantize_blockwise(**{"A": VALUES, "blocksize": 64, **arguments})


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param({"absmax": None}, id="no absmax"),
        pytest.param({"A": VALUES}, id="float codes"),
        pytest.param({"absmax": torch.ones(3)}, id="absmax of another size"),
        pytest.param({"absmax": torch.ones(2).double()}, id="absmax of another dtype"),
        pytest.param({"code": torch.linspace(1, -1, 256)}, id="descending map"),
        pytest.param({"out": VALUES[:50]}, id="out of another size"),
        pytest.param({"out": VALUES.double()}, id="out of another dtype"),
        pytest.param({"quant_state": 3}, id="no QuantState"),
        pytest.param({"quant_state": F.QuantState(torch.ones(2), QMAP, 64, "float32")}, id="name of a dtype"),
        pytest.param({"quant_state": F.QuantState(torch.ones(2), QMAP, 64, torch.float64)}, id="another dtype"),
    ],
)
def test_dequantize_refuses(arguments):
    with pytest.raises((TypeError, ValueError)):
        F.dequantize_blockwise(**{"A": CODES, "absmax": torch.ones(2), "blocksize": 64, **arguments})


def test_dequantize_says_which_dtypes_there_are():
    with pytest.raises(TypeError, match=r"^Invalid dtype: torch.float64; torch.float32, .*allowed$"):
        F.dequantize_blockwise(CODES, F.QuantState(torch.ones(2), QMAP, 64, torch.float64))


@pytest.mark.parametrize("name", ["cpu", "reference"])
@every_dtype
def test_percentile_clipping(name, dtype):
    history, expected = torch.zeros(100), np.zeros(100, np.float32)
    grads = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
    with lion.use_backend(name):
        for step in range(1, 130):
            array = strategies.make_floats("zero" if step % 11 == 0 else "gradients", grads[dtype], 300, step)
            grad = tensor(array).reshape(20, 15)
            squared = reference.squared_norm(array)
            expected, norm, threshold, scale = reference.percentile_clipping(expected, squared, step, 30)
            actual = F.percentile_clipping(grad.t().contiguous().t(), history, step, 30)
            assert_same_bits(history, expected, what="history")
            assert_same_bits(actual[0], norm, what="norm")
            assert_same_bits(actual[1], threshold, what="threshold")
            assert_same_bits(actual[2], scale, what="scale")


def test_percentile_clipping_refuses():
    grad, history = torch.ones(5), torch.zeros(100)
    for arguments in (
        {"grad": grad.double()},
        {"gnorm_vec": torch.zeros(99)},
        {"gnorm_vec": torch.zeros(100).double()},
        {"gnorm_vec": torch.zeros(200)[::2]},
        {"step": 0},
        {"step": -3},
        {"percentile": 0},
        {"percentile": 100},
    ):
        with pytest.raises((TypeError, ValueError)):
            F.percentile_clipping(**{"grad": grad, "gnorm_vec": history, "step": 1, "percentile": 5, **arguments})
        assert not history.any()


@pytest.mark.parametrize("percentile", [1, 99])
def test_percentile_clipping_at_the_ends(percentile):
    history = torch.arange(100.0)
    _, threshold, _ = F.percentile_clipping(torch.full((1,), 7.0), history, 100, percentile)
    assert_same_bits(threshold, history.sort().values[percentile].sqrt())


def test_percentile_clipping_defaults_to_5():
    histories = torch.arange(100.0), torch.arange(100.0)
    first = F.percentile_clipping(torch.ones(500), histories[0], 3)
    second = F.percentile_clipping(torch.ones(500), histories[1], 3, 5)
    for a, b in zip(first, second, strict=True):
        assert_same_bits(a, b)

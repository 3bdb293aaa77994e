"""The comparing helper itself: it sees what it must see, and what it prints reproduces the inputs."""

from __future__ import annotations

import ctypes
import re

import ml_dtypes
import numpy as np
import pytest
import torch

from tests import strategies
from tests.comparing import assert_same_bits, assert_same_outcome, guarded


def raised(actual, expected, **kwargs) -> str:
    with pytest.raises(AssertionError) as info:
        assert_same_bits(actual, expected, **kwargs)
    return str(info.value)


@pytest.mark.parametrize("dtype", strategies.FLOAT_DTYPES)
def test_every_bit_of_every_element_counts(dtype):
    values = strategies.make_floats("finite_bits", dtype, 300, 0)
    pattern = values.view(f"u{values.itemsize}")
    for place in (0, 255, 256, 299):
        for bit in range(8 * values.itemsize):
            other = pattern.copy()
            other[place] ^= other.dtype.type(1 << bit)
            if not np.isnan(other.view(values.dtype)[place]):
                message = raised(other.view(values.dtype), values, what="it")
                assert message.startswith("it: 1 of 300 elements differ")
                assert f"element {place} (block {place // 256}, place {place % 256})" in message
    assert_same_bits(values.copy(), values)


def test_nan_equals_nan_and_nothing_else():
    nans = np.array([0x7FC00000, 0x7F800001, 0xFFD55555], np.uint32).view(np.float32)
    assert_same_bits(nans, nans[::-1])
    assert "element 0" in raised(nans, np.full(3, np.inf, np.float32))
    assert "0x80000000" in raised(np.array([-0.0], np.float32), np.zeros(1, np.float32))


def test_dtype_and_shape():
    assert "dtype float32, expected float64" in raised(np.zeros(3, np.float32), np.zeros(3))
    assert "shape (3,), expected (3, 1)" in raised(np.zeros(3, np.float32), np.zeros((3, 1), np.float32))
    assert_same_bits(torch.ones(3, dtype=torch.bfloat16), np.ones(3, ml_dtypes.bfloat16))
    with pytest.raises(TypeError, match="cannot compare the bits of float"):
        assert_same_bits(1.0, 1.0)


def test_the_reproducer_makes_the_block_anew():
    grad = strategies.make_floats("raw_bits", "bfloat16", 600, 1)
    inputs = {
        "param": torch.arange(600.0),
        "grad": grad,
        "codes": strategies.make_codes(600, 2),
        "absmax": np.array([1, 2, 3], np.float32),
        "scale": np.float32(0.5),
        "hyper": (1e-3, (0.9, 0.99), 0.1),
    }
    message = raised(np.arange(600) + np.eye(1, 600, 300)[0], np.arange(600.0), inputs=inputs)
    assert "inputs of block 1, where element 300 is number 44" in message
    made = {"np": np, "ml_dtypes": ml_dtypes}
    exec("\n".join(re.findall(r"^\w+ = .*$", message, re.MULTILINE)), made)
    assert_same_bits(made["param"], np.arange(256, 512, dtype=np.float32))
    assert_same_bits(made["grad"].view(np.uint16), grad[256:512].view(np.uint16))
    assert_same_bits(made["codes"], inputs["codes"][256:512])
    assert_same_bits(made["absmax"], np.array([2], np.float32))
    assert_same_bits(made["scale"], np.array([0.5], np.float32))
    assert made["hyper"] == inputs["hyper"]


def test_exceptions_are_compared_by_class():
    def fail(error):
        raise error

    assert_same_outcome(lambda: fail(ValueError("a")), lambda: fail(ValueError("b")))
    assert_same_outcome(lambda: (np.ones(2), np.zeros(1)), lambda: (np.ones(2), np.zeros(1)))
    for actual in (lambda: fail(TypeError("a")), lambda: np.ones(1), lambda: fail(UnicodeError())):
        with pytest.raises(AssertionError, match="expected ValueError"):
            assert_same_outcome(actual, lambda: fail(ValueError("b")))
    with pytest.raises(AssertionError, match="it: ValueError.*, expected None"):
        assert_same_outcome(lambda: fail(ValueError("b")), lambda: np.ones(1), what="it")
    with pytest.raises(AssertionError, match="1 of 1 elements"):
        assert_same_outcome(lambda: np.ones(1), lambda: np.zeros(1))
    with pytest.raises(KeyboardInterrupt):
        assert_same_outcome(lambda: fail(KeyboardInterrupt()), lambda: np.ones(1))


@pytest.mark.parametrize("offset", [0, 1, 2, 13, 63])
@pytest.mark.parametrize("where", [-64, -1, 0, 63])
def test_guard_bytes(offset, where):
    array, check = guarded(np.arange(10, dtype=np.uint8), offset_bytes=offset)
    assert array.ctypes.data % 64 == offset
    check()
    array[:] = 0
    check()
    outside = where if where < 0 else array.size + where
    ctypes.c_uint8.from_address(array.ctypes.data + outside).value ^= 1
    with pytest.raises(AssertionError, match=f"1 bytes outside the array were written, the first at byte {outside}"):
        check()

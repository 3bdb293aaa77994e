"""The arithmetic of lookups for instruction sets, in NumPy: on processors that do not have them as well."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import numpy.typing as npt
import pytest

from lion import reference
from lion.cpu_kernels import avx2, avx512
from tests.comparing import assert_same_bits
from tests.differential import llvm_in_numpy
from tests.differential.every_float import THRESHOLDS, around

QMAP = reference.create_dynamic_map()
ONE = np.float32(1.0)

pytestmark = pytest.mark.parametrize("grouped", [avx512, avx2], ids=lambda module: module.NAME)


def quantize(
    grouped: ModuleType, values: npt.NDArray[np.float32]
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
    """Return the codes of groups of values, the last one filled up, and which groups are sure."""
    groups = np.resize(values, (-(-values.size // grouped.GROUP), grouped.GROUP))
    codes, sure = np.empty(groups.shape, np.uint8), np.empty(len(groups), np.bool_)
    for i, group in enumerate(groups):
        sure[i] = llvm_in_numpy.run(grouped.quantize_group, group.ctypes.data, ONE, codes[i].ctypes.data)
    return codes.reshape(-1)[: values.size], sure


@pytest.mark.parametrize("shift", [0, 8, 16, 24])
def test_every_code(grouped: ModuleType, shift: int) -> None:
    codes = np.roll(np.arange(256, dtype=np.uint8), shift)
    values = np.empty(256, np.float32)
    for i in range(0, 256, grouped.GROUP):
        places = codes[i:].ctypes.data, values[i:].ctypes.data
        llvm_in_numpy.run(grouped.dequantize_group, *places)
    assert_same_bits(values, QMAP[codes])


def test_codes_next_to_thresholds_are_the_nearest_or_not_sure(grouped: ModuleType) -> None:
    values = around(THRESHOLDS)
    nearest = np.searchsorted(THRESHOLDS, values, side="left")
    for group in (np.repeat(value, grouped.GROUP) for value in values[quantize(grouped, values)[0] != nearest]):
        assert not quantize(grouped, group)[1].any()


def test_codes_away_from_thresholds_are_the_nearest_and_sure(grouped: ModuleType) -> None:
    ends = np.array([0.0, 2.0**-149, 2.0**-126, 2.0**-32, 2.0**-31, 2.0**-23, 1 - 2.0**-24, 1 + 2.0**-22], np.float32)
    entries = around(QMAP)
    values = np.concatenate(
        [entries[np.abs(entries) < 1.5], ends, -ends, np.random.default_rng(0).uniform(-1, 1, 3000)]
    )
    values = values.astype(np.float32)
    codes, sure = quantize(grouped, values)
    np.testing.assert_array_equal(codes, np.searchsorted(THRESHOLDS, values, side="left"))
    assert sure.all()


def test_values_are_divided_by_the_greatest(grouped: ModuleType) -> None:
    values = np.random.default_rng(1).standard_normal(grouped.GROUP).astype(np.float32)
    reciprocal, codes = ONE / np.abs(values).max(), np.empty(grouped.GROUP, np.uint8)
    assert llvm_in_numpy.run(grouped.quantize_group, values.ctypes.data, reciprocal, codes.ctypes.data)
    np.testing.assert_array_equal(codes, np.searchsorted(THRESHOLDS, values * reciprocal, side="left"))

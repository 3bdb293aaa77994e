"""The arithmetic of lookups for instruction sets, in NumPy: on processors that do not have them as well."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import numpy.typing as npt
import pytest

from lion import reference
from lion.cpu_kernels import avx2, avx512
from tests.comparing import assert_same_bits, guarded
from tests.differential import llvm_in_numpy
from tests.differential.every_float import THRESHOLDS, around

QMAP = reference.create_dynamic_map()
ONE = np.float32(1.0)

pytestmark = [
    pytest.mark.parametrize("grouped", [avx512, avx2], ids=lambda module: module.NAME),
    pytest.mark.parametrize("paired", [False, True]),
]


def dequantize(grouped: ModuleType, paired: bool, codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Return the values of groups of codes."""
    run, parts = (grouped.dequantize_pairs, 2) if paired else (grouped.dequantize_group, 1)
    values = np.empty((codes.size // grouped.GROUP, grouped.GROUP), np.float32)
    for i, group in enumerate(values):
        buffers = [guarded((grouped.GROUP // parts,), np.float32) for _ in range(parts)]
        addresses = [buffer.array.ctypes.data for buffer in buffers]
        llvm_in_numpy.run(run, codes[i * grouped.GROUP :].ctypes.data, *addresses)
        for place, buffer in enumerate(buffers):
            group[place::parts] = buffer.array
            buffer.check()
    return values.reshape(-1)


def quantize(
    grouped: ModuleType, paired: bool, values: npt.NDArray[np.float32], reciprocal: np.float32 = ONE
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
    """Return the codes of groups of values, the last one filled up, and which groups are sure."""
    run, parts = (grouped.quantize_pairs, 2) if paired else (grouped.quantize_group, 1)
    groups = np.resize(values, (-(-values.size // grouped.GROUP), grouped.GROUP))
    codes, sure = np.empty(groups.shape, np.uint8), np.empty(len(groups), np.bool_)
    for i, group in enumerate(groups):
        buffer = guarded((grouped.GROUP,), np.uint8)
        ordered = np.ascontiguousarray(group.reshape(-1, parts).T)
        sure[i] = llvm_in_numpy.run(run, *(part.ctypes.data for part in ordered), reciprocal, buffer.array.ctypes.data)
        codes[i] = buffer.array
        buffer.check()
    return codes.reshape(-1)[: values.size], sure


@pytest.mark.parametrize("shift", [0, 1, 8, 15, 16, 24])
def test_every_code(grouped: ModuleType, paired: bool, shift: int) -> None:
    codes = np.roll(np.arange(256, dtype=np.uint8), shift)
    assert_same_bits(dequantize(grouped, paired, codes), QMAP[codes])


def test_codes_next_to_thresholds_are_the_nearest_or_not_sure(grouped: ModuleType, paired: bool) -> None:
    values = around(THRESHOLDS)
    nearest = np.searchsorted(THRESHOLDS, values, side="left")
    for group in (np.repeat(value, grouped.GROUP) for value in values[quantize(grouped, paired, values)[0] != nearest]):
        assert not quantize(grouped, paired, group)[1].any()


def test_codes_away_from_thresholds_are_the_nearest_and_sure(grouped: ModuleType, paired: bool) -> None:
    ends = np.array([0.0, 2.0**-149, 2.0**-126, 2.0**-32, 2.0**-31, 2.0**-23, 1 - 2.0**-24, 1 + 2.0**-22], np.float32)
    entries = around(QMAP)
    values = np.concatenate(
        [entries[np.abs(entries) < 1.5], ends, -ends, np.random.default_rng(0).uniform(-1, 1, 3000)]
    )
    values = values.astype(np.float32)
    codes, sure = quantize(grouped, paired, values)
    np.testing.assert_array_equal(codes, np.searchsorted(THRESHOLDS, values, side="left"))
    assert sure.all()


def test_values_are_divided_by_the_greatest(grouped: ModuleType, paired: bool) -> None:
    values = np.random.default_rng(1).standard_normal(grouped.GROUP).astype(np.float32)
    reciprocal = ONE / np.abs(values).max()
    codes, sure = quantize(grouped, paired, values, reciprocal)
    np.testing.assert_array_equal(codes, np.searchsorted(THRESHOLDS, values * reciprocal, side="left"))
    assert sure.all()

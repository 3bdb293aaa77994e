"""The error of 8-bit quantization on momentum of several distributions; ``pytest -rP`` shows the figures.

Compared are bitsandbytes' bounds for dynamic blockwise quantization, from its ``tests/test_functional.py``, and what
the paper (Dettmers et al. 2021, arXiv 2110.02861, sections 1.3 and 2.1) says of it in words.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats

from lion import reference

QMAP = reference.create_dynamic_map()
THRESHOLDS = reference.quantize_thresholds(QMAP)
LINEAR = np.append(np.linspace(-1, 1, 255, dtype=np.float32), np.float32(1))
SIZE = 1 << 18
DISTRIBUTIONS = {"normal": stats.norm(), "Laplace": stats.laplace(), "Student's t, 3 degrees": stats.t(3)}

every_distribution = pytest.mark.parametrize("name", DISTRIBUTIONS)


class Error(NamedTuple):
    """Mean absolute and mean relative error, as bitsandbytes measures them, and the absolute one of each element."""

    absolute: float
    relative: float
    elements: npt.NDArray[np.float64]


def momentum(distribution: Any, seed: int = 0) -> npt.NDArray[np.float32]:
    return distribution.rvs(SIZE, random_state=seed).astype(np.float32)


def error(values: npt.NDArray[np.float32], block_size: int, qmap: npt.NDArray[np.float32] = QMAP) -> Error:
    codes, absmax = reference.quantize_blockwise(values, qmap, block_size)
    back = reference.dequantize_blockwise(codes, absmax, qmap, block_size)
    elements = np.abs(back.astype(np.float64) - values)
    return Error(elements.mean(), (elements / (np.abs(values.astype(np.float64)) + 1e-8)).mean(), elements)


def expected_error(distribution: Any, block_size: int, maxima: int = 64, points: int = 4000) -> float:
    """Return the mean absolute error that follows from a symmetric distribution and the map, without quantizing.

    The greatest magnitude of n values has the n-th power of the magnitude's distribution function for its own; below
    it, the others have the distribution cut off there. Both are averaged over evenly spaced quantiles.
    """
    total = 0.0
    for i in range(maxima):
        upper = 0.5 + 0.5 * ((i + 0.5) / maxima) ** (1 / block_size)
        maximum = distribution.ppf(upper)
        x = distribution.ppf(1 - upper + (np.arange(points) + 0.5) / points * (2 * upper - 1))
        nearest = QMAP[np.searchsorted(THRESHOLDS, x / maximum)]
        of_maximum = 0.5 * maximum * (1 + QMAP[0])  # exact where it is positive
        total += ((block_size - 1) * np.abs(x - maximum * nearest).mean() + of_maximum) / block_size
    return total / maxima


@every_distribution
def test_error_is_what_the_distribution_leads_to(name: str) -> None:
    """Within four standard errors of the mean over blocks: a chance of 1 in 16,000, decided once by the seed."""
    measured = error(momentum(DISTRIBUTIONS[name]), 256)
    blocks = measured.elements.reshape(-1, 256).mean(axis=1)
    expected = expected_error(DISTRIBUTIONS[name], 256)
    print(f"{name}: mean absolute error {measured.absolute:.5f}, expected {expected:.5f}")
    assert abs(measured.absolute - expected) < 4 * stats.sem(blocks)


@pytest.mark.parametrize("block_size", [64, 128, 256, 512, 1024, 2048, 4096])
def test_error_is_within_the_bounds_of_bitsandbytes(block_size: int) -> None:
    normal = error(momentum(stats.norm()), block_size)
    uniform = error(momentum(stats.uniform()), block_size)
    for name, found in (("normal", normal), ("uniform from 0 to 1", uniform)):
        print(f"blocks of {block_size}, {name}: absolute {found.absolute:.5f}, relative {found.relative:.5f}")
    assert normal.absolute < 0.011 and normal.relative < 0.018
    assert uniform.absolute < 0.0035 and uniform.relative < 0.015


@every_distribution
def test_against_a_linear_map(name: str) -> None:
    """The relative error is at most half of a linear map's; the absolute one is less where the tails are heavy."""
    values = momentum(DISTRIBUTIONS[name])
    dynamic, linear = error(values, 256), error(values, 256, LINEAR)
    for kind, found in (("dynamic", dynamic), ("linear", linear)):
        print(f"{name}, {kind}: absolute {found.absolute:.5f}, relative {found.relative:.5f}")
    assert dynamic.relative < 0.5 * linear.relative
    assert bool(dynamic.absolute < linear.absolute) is (name == "Student's t, 3 degrees")


def test_an_outlier_harms_its_own_block_alone() -> None:
    values = momentum(stats.norm())
    with_outlier = values.copy()
    with_outlier[SIZE // 2] = 1000
    blocks, whole = (error(with_outlier, size) for size in (256, SIZE))
    print(f"an outlier of 1000: absolute {blocks.absolute:.5f} in blocks, {whole.absolute:.5f} whole")
    elements = blocks.elements.reshape(-1, 256)
    other = np.arange(len(elements)) != SIZE // 2 // 256
    np.testing.assert_array_equal(elements[other], error(values, 256).elements.reshape(-1, 256)[other])
    assert whole.absolute > 4 * error(values, SIZE).absolute


@every_distribution
def test_the_greatest_is_kept_where_it_is_positive(name: str) -> None:
    """The paper says without error; it holds for the positive ones, because the map ends at -0.993."""
    values = momentum(DISTRIBUTIONS[name]).reshape(-1, 256)
    codes, absmax = reference.quantize_blockwise(values, QMAP, 256)
    back = reference.dequantize_blockwise(codes, absmax, QMAP, 256)
    greatest = np.abs(values).argmax(axis=1)[:, None]
    before, after = (np.take_along_axis(array, greatest, 1)[:, 0] for array in (values, back))
    np.testing.assert_array_equal(after[before > 0], before[before > 0])
    np.testing.assert_allclose(after[before < 0] / before[before < 0], -QMAP[0], rtol=1e-6)

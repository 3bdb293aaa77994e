"""Hypothesis strategies: any float bits, any size, any alignment, any options.

Large inputs are drawn as a recipe and a seed and made by NumPy, which is fast and shrinks to simple recipes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from lion import reference

Array = npt.NDArray[Any]

FLOAT_DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
EDGE_SIZES = (0, 1, 2, 7, 8, 31, 32, 33, 255, 256, 257, 511, 512, 513, 4095, 4096, 4097)
BLOCK = 256

_SPECIAL = {  # quiet, signalling and negative NaN, infinities, zeros, denormals, smallest normal, largest, one
    2: {
        "float16": (0x7E00, 0x7C01, 0xFE55, 0x7C00, 0xFC00, 0, 0x8000, 1, 0x8001, 0x3FF, 0x400, 0x7BFF, 0xFBFF, 0x3C00),
        "bfloat16": (0x7FC0, 0x7F81, 0xFFD5, 0x7F80, 0xFF80, 0, 0x8000, 1, 0x8001, 0x7F, 0x80, 0x7F7F, 0xFF7F, 0x3F80),
    },
    4: {
        "float32": (
            *(0x7FC00000, 0x7F800001, 0xFFD55555, 0x7F800000, 0xFF800000, 0, 0x80000000, 1, 0x80000001),
            *(0x7FFFFF, 0x800000, 0x7F7FFFFF, 0xFF7FFFFF, 0x3F800000),
        ),
    },
}


def special_values(dtype: str) -> Array:
    """Return the special values of a dtype: NaNs, infinities, zeros, denormals, the extremes, and 1."""
    itemsize = FLOAT_DTYPES[dtype].itemsize
    return np.array(_SPECIAL[itemsize][dtype], f"u{itemsize}").view(FLOAT_DTYPES[dtype])


def _raw_bits(rng: np.random.Generator, dtype: str, size: int) -> Array:
    itemsize = FLOAT_DTYPES[dtype].itemsize
    return rng.integers(0, 256**itemsize, size, dtype=f"u{itemsize}").view(FLOAT_DTYPES[dtype])


def _finite_bits(rng: np.random.Generator, dtype: str, size: int) -> Array:
    values = _raw_bits(rng, dtype, size)
    return np.where(np.isfinite(values.astype(np.float32)), values, FLOAT_DTYPES[dtype].type(1))


def _special(rng: np.random.Generator, dtype: str, size: int) -> Array:
    return rng.choice(special_values(dtype), size)


def _gradients(rng: np.random.Generator, dtype: str, size: int) -> Array:
    return (rng.standard_normal(size) * 10.0 ** rng.uniform(-6, 0)).astype(FLOAT_DTYPES[dtype])


def _outlier(rng: np.random.Generator, dtype: str, size: int) -> Array:
    values = (rng.standard_normal(size) * 1e-4).astype(FLOAT_DTYPES[dtype])
    if size:
        values[rng.integers(size)] = 1000.0
    return values


def _one_not_finite(rng: np.random.Generator, dtype: str, size: int) -> Array:
    values = _gradients(rng, dtype, size)
    if size:
        values[rng.integers(size)] = rng.choice([np.nan, np.inf, -np.inf])
    return values


def _negative(rng: np.random.Generator, dtype: str, size: int) -> Array:
    return (-np.abs(rng.standard_normal(size)) * 1e-2 - 1e-6).astype(FLOAT_DTYPES[dtype])


def _constant(rng: np.random.Generator, dtype: str, size: int) -> Array:
    return np.full(size, rng.standard_normal()).astype(FLOAT_DTYPES[dtype])


def _denormal(rng: np.random.Generator, dtype: str, size: int) -> Array:
    mantissa_bits = {"float32": 23, "float16": 10, "bfloat16": 7}[dtype]
    itemsize = FLOAT_DTYPES[dtype].itemsize
    magnitude = rng.integers(0, 2**mantissa_bits, size, dtype=f"u{itemsize}")
    sign = rng.integers(0, 2, size, dtype=f"u{itemsize}") << np.array(8 * itemsize - 1, f"u{itemsize}")
    return (magnitude | sign).view(FLOAT_DTYPES[dtype])


def _zero(rng: np.random.Generator, dtype: str, size: int) -> Array:
    return np.zeros(size, FLOAT_DTYPES[dtype])


def _signed_zero(rng: np.random.Generator, dtype: str, size: int) -> Array:
    return rng.choice(np.array([0.0, -0.0], FLOAT_DTYPES[dtype]), size)


_RECIPES = {
    "zero": _zero,
    "constant": _constant,
    "gradients": _gradients,
    "negative": _negative,
    "outlier": _outlier,
    "signed_zero": _signed_zero,
    "denormal": _denormal,
    "one_not_finite": _one_not_finite,
    "finite_bits": _finite_bits,
    "special": _special,
    "raw_bits": _raw_bits,
}
RECIPES = (*_RECIPES, "mixed")


def make_floats(recipe: str, dtype: str, size: int, seed: int) -> Array:
    """Return a flat array made by a recipe.

    Args:
        recipe: One of ``RECIPES``; "mixed" takes a recipe of its own for every 256 elements.
        dtype: "float32", "float16" or "bfloat16".
        size: Number of elements.
        seed: Seed of the generator.

    Returns:
        Array of shape (size,) and the dtype.
    """
    rng = np.random.default_rng(seed)
    with np.errstate(all="ignore"):
        if recipe != "mixed":
            return _RECIPES[recipe](rng, dtype, size)
        array = np.empty(size, FLOAT_DTYPES[dtype])
        names = list(_RECIPES)
        for begin in range(0, size, BLOCK):
            block = array[begin : begin + BLOCK]
            block[:] = _RECIPES[names[rng.integers(len(names))]](rng, dtype, block.size)
        return array


def make_codes(size: int, seed: int) -> npt.NDArray[np.uint8]:
    """Return ``size`` random codes."""
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


def absmax_sweep(mantissas: int, seed: int = 0) -> npt.NDArray[np.float32]:
    """Return finite float32 of every exponent, each with the least, the greatest and random mantissas, sorted."""
    chosen = np.random.default_rng(seed).integers(0, 1 << 23, mantissas, dtype=np.uint32)
    chosen[:2] = 0, (1 << 23) - 1
    exponents = np.arange(255, dtype=np.uint32) << np.uint32(23)
    return (exponents[:, None] | np.sort(chosen)).reshape(-1).view(np.float32)


def dtypes() -> st.SearchStrategy[str]:
    """Names of the parameter dtypes."""
    return st.sampled_from(tuple(FLOAT_DTYPES))


def grad_dtypes(dtype: str) -> st.SearchStrategy[str]:
    """Names of the dtypes that gradients of a parameter may have: its own, and float32."""
    return st.sampled_from((dtype, "float32"))


def sizes(max_size: int = 5000) -> st.SearchStrategy[int]:
    """Element counts from 0 up to ``max_size``, half of them edges of a block or chunk."""
    return st.sampled_from([size for size in EDGE_SIZES if size <= max_size]) | st.integers(0, max_size)


def seeds() -> st.SearchStrategy[int]:
    """Seeds of generators."""
    return st.integers(0, 2**32 - 1)


def offsets(dtype: str) -> st.SearchStrategy[int]:
    """Byte offsets from a 64-byte boundary that are legal for a dtype: multiples of its item size."""
    itemsize = np.dtype(FLOAT_DTYPES.get(dtype, dtype)).itemsize
    return st.integers(0, 64 // itemsize - 1).map(lambda items: items * itemsize)


def byte_offsets() -> st.SearchStrategy[int]:
    """Byte offsets from a 64-byte boundary that a torch view can have, odd ones included: torch.frombuffer's."""
    return st.integers(0, 63)


def floats(dtype: str, size: int) -> st.SearchStrategy[Array]:
    """Flat arrays of a dtype and size, by any recipe."""
    return st.builds(make_floats, st.sampled_from(RECIPES), st.just(dtype), st.just(size), seeds())


def finite_floats(dtype: str, size: int) -> st.SearchStrategy[Array]:
    """Flat arrays of a dtype and size without NaN and infinity."""
    recipes = [r for r in RECIPES if r not in ("one_not_finite", "special", "raw_bits", "mixed")]
    return st.builds(make_floats, st.sampled_from(recipes), st.just(dtype), st.just(size), seeds())


def codes(size: int) -> st.SearchStrategy[npt.NDArray[np.uint8]]:
    """Flat uint8 arrays: any codes."""
    return st.builds(make_codes, st.just(size), seeds())


def learning_rates() -> st.SearchStrategy[float]:
    """Learning rates from 0 up, the tiny ones included that half precision cannot hold."""
    return st.sampled_from([1e-4, 0.0, 2e-8, 1e-3, 0.1, 1.0, 1e-45, 1e30]) | st.floats(0.0, 2.0)


def betas() -> st.SearchStrategy[tuple[float, float]]:
    """Pairs in [0, 1), the default and the ends included."""
    beta = st.sampled_from([0.9, 0.99, 0.0, 0.5, 1.0 - 2.0**-53]) | st.floats(0.0, 1.0, exclude_max=True)
    return st.just((0.9, 0.99)) | st.tuples(beta, beta)


def weight_decays() -> st.SearchStrategy[float]:
    """Weight decays, most often 0, up to those that turn the parameter's sign."""
    return st.sampled_from([0.0, 0.01, 1e-3, 1.0, 30.0]) | st.floats(0.0, 2.0)


def hyperparameters() -> st.SearchStrategy[tuple[float, tuple[float, float], float]]:
    """Arguments of ``lion.reference.coefficients``: lr, betas, weight_decay."""
    return st.tuples(learning_rates(), betas(), weight_decays())


class Unscaling(NamedTuple):
    """What undoes the scaling of a loss: torch's ``grad_scale`` and ``found_inf``, each may be missing."""

    grad_scale: np.float32 | None
    found_inf: np.float32 | None

    def inv_scale(self) -> np.float32:
        """Return the factor of the gradients."""
        with np.errstate(all="ignore"):
            return np.float32(1) if self.grad_scale is None else np.float32(1) / self.grad_scale


NO_UNSCALING = Unscaling(None, None)


def unscalings() -> st.SearchStrategy[Unscaling]:
    """Scalings of a loss: torch's powers of two, others, any float32 bits; infinities found and not."""
    usual = st.sampled_from([65536.0, 1.0, 1000.0, 3.0, 2.0**-20, 2.0**127]).map(np.float32)
    any_bits = st.integers(0, 2**32 - 1).map(lambda pattern: np.uint32(pattern).view(np.float32))
    found_inf = st.sampled_from([None, np.float32(0.0), np.float32(0.0), np.float32(1.0)])
    return st.builds(Unscaling, st.none() | usual | any_bits, found_inf)


def inv_scales() -> st.SearchStrategy[np.float32]:
    """Factors that undo the scaling of a loss."""
    return unscalings().map(Unscaling.inv_scale)


def scales() -> st.SearchStrategy[np.float32]:
    """Factors of the gradient: 1, those of clipping, and any float32 bits."""
    clipping = st.floats(0.0, 1.0, width=32, exclude_min=True)
    any_bits = st.integers(0, 2**32 - 1).map(lambda pattern: np.uint32(pattern).view(np.float32))
    return st.just(np.float32(1.0)) | clipping.map(np.float32) | any_bits


class Weights(NamedTuple):
    """How parameters are kept: with so many master bits, or rounded at random by a seed, or, by neither, to nearest."""

    bits: int | None = None
    seed: int | None = None

    @property
    def low_dtype(self) -> str:
        """The dtype of the lower parts."""
        return "int16" if self.bits == 32 else "int8"

    def lows(self, size: int) -> st.SearchStrategy[Array]:
        """Lower parts: any bits, and fresh ones; empty where there are none."""
        return seeds().map(lambda seed: self.make_lows(size, seed) * bool(seed % 4))

    def make_lows(self, size: int, seed: int) -> Array:
        """Return random lower parts; empty where there are none."""
        ends = np.iinfo(self.low_dtype)
        drawn = np.random.default_rng(seed).integers(ends.min, ends.max + 1, 0 if self.bits is None else size)
        return drawn.astype(self.low_dtype)

    def of_reference(self, low: Array, step: np.float32, parameter: int, offset: int) -> Any:
        """Return what the reference's updates take for a parameter whose step counter holds ``step``."""
        if self.seed is not None:
            return reference.Stochastic(self.seed, int(step + np.float32(1)), parameter, offset)
        return None if self.bits is None else reference.Master(low)


NEAREST = Weights()


def weights(dtype: str) -> st.SearchStrategy[Weights]:
    """Ways in which parameters of a dtype may be kept."""
    if dtype != "bfloat16":
        return st.just(NEAREST)
    at_random = (st.integers(0, 2**64 - 1) | st.just(0)).map(lambda seed: Weights(seed=seed))
    return st.just(NEAREST) | st.sampled_from([Weights(24), Weights(32)]) | at_random


def parameter_numbers() -> st.SearchStrategy[int]:
    """Places of a parameter among all that share a seed."""
    return st.integers(0, 3) | st.integers(0, 2**32 - 1)


def first_elements() -> st.SearchStrategy[int]:
    """Indices of a shard's first element in the whole parameter: multiples of 8, others, and beyond 2**35."""
    return (
        st.just(0)
        | st.integers(0, 2**20).map(lambda group: 8 * group)
        | st.integers(2**35 - 5000, 2**35)
        | (st.integers(0, 2**62))
    )


def step_counts() -> st.SearchStrategy[np.float32]:
    """Values of a step counter, the last included, at which it stays."""
    return (st.integers(0, 1000) | st.sampled_from([2**24 - 2, 2**24 - 1, 2**24])).map(np.float32)


def weight_options() -> st.SearchStrategy[dict[str, Any]]:
    """Options of 16-bit weights, as keyword arguments of an optimizer of no float16 parameters."""
    seeds = st.integers(0, 2**64 - 1).map(lambda seed: {"stochastic_rounding": True, "rounding_seed": seed})
    return st.sampled_from([{}, {"master_weight_bits": 24}, {"master_weight_bits": 32}]) | seeds


def options() -> st.SearchStrategy[dict[str, Any]]:
    """Any options of a parameter group, as keyword arguments of an optimizer; missing ones are the defaults."""
    return st.fixed_dictionaries(
        {},
        optional={
            "lr": st.sampled_from([1e-3, 1e-4, 0.1, 2e-8, 0.0, 1e-45]) | st.floats(0.0, 0.1),
            "betas": betas(),
            "weight_decay": weight_decays(),
            "optim_bits": st.sampled_from([8, 32]),
            "min_8bit_size": st.sampled_from([0, 0, 256, 4096]),
            "percentile_clipping": st.sampled_from([100, 1, 5, 99]) | st.integers(1, 100),
            "block_wise": st.booleans(),
            "is_paged": st.booleans(),
        },
    )

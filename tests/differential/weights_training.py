"""Many steps of 16-bit weights by the kernels of an implementation, in lockstep with the reference, equal after each.

Everything is there at once: gradients of float32 and bfloat16, scaled losses, clipping, learning rates that change,
tensors that begin in the middle of a parameter, and such that are empty or not aligned.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from lion import cpu_kernels, reference
from lion.cuda_kernels.table import table, work_list
from lion.reference.rounding import STOCHASTIC
from tests import strategies
from tests.comparing import Array, assert_same_bits, guarded

STEPS = 300
STATES = {
    "update_32bit": ("momentum",),
    "update_8bit_blockwise": ("codes", "absmax"),
    "update_8bit_tensorwise": ("codes", "absmax", "new_absmax"),
}
WEIGHTS = (strategies.Weights(24), strategies.Weights(32), strategies.Weights(seed=2**64 - 59))
QMAP = reference.create_dynamic_map()
# Element counts, elements by which all arrays are off alignment, and the first elements' places in whole parameters.
LAYOUT = ((700, 0, 0), (300, 1, 8), (0, 0, 0), (530, 0, 2**35 + 16), (41, 0, 3))

Tensors = list[dict[str, Array]]


class Step(NamedTuple):
    """What a step of all tensors takes: the update's name, how parameters are kept, and the numbers of the step."""

    update: str
    weights: strategies.Weights
    grad_dtype: str
    k: reference.Coefficients
    inv_scale: np.float32

    @property
    def states(self) -> tuple[str, ...]:
        """Names of the arrays that keep the momentum."""
        return STATES[self.update]


def tensors(update: str, weights: strategies.Weights, grad_dtype: str) -> Tensors:
    """Return parameters and their fresh states."""
    made = []
    for i, (size, offset, _) in enumerate(LAYOUT):
        blocks = 1 if update == "update_8bit_tensorwise" else -(-size // 256)
        low = np.zeros(0 if weights.bits is None else size, weights.low_dtype)
        arrays = {
            "param": strategies.make_floats("gradients", "bfloat16", size, i),
            "grad": np.zeros(size, strategies.FLOAT_DTYPES[grad_dtype]),
            "momentum": np.zeros(size, np.float32),
            "codes": np.full(size, 127, np.uint8),
            "absmax": np.zeros(blocks, np.float32),
            "new_absmax": np.zeros(1, np.float32),
            "step": np.zeros(1, np.float32),
            "low": low,
            "scale": np.ones(1, np.float32),
        }
        placed = {name: guarded(array, offset_bytes=offset * array.itemsize) for name, array in arrays.items()}
        made.append({name: memory.array for name, memory in placed.items()})
    return made


def by_reference(step: Step, all_tensors: Tensors) -> None:
    """Take a step in place."""
    for i, t in enumerate(all_tensors):
        kept = step.weights.of_reference(t["low"], t["step"][0], i, LAYOUT[i][2])
        options: dict[str, Any] = {"scale": t["scale"][0], "inv_scale": step.inv_scale, "weights": kept}
        if step.update == "update_32bit":
            new = reference.update_32bit(t["param"], t["grad"], t["momentum"], step.k, **options)
        elif t["param"].size:
            parts = t["param"], t["grad"], t["codes"], t["absmax"]
            new = getattr(reference, step.update)(*parts, QMAP, step.k, **options)
        else:
            new = ()
        for name, array in zip(("param", *step.states[:2], "low"), new, strict=False):
            t[name][...] = array
        if "new_absmax" in step.states:
            t["new_absmax"][...] = t["absmax"]
        t["step"] += np.float32(1)


def addresses(all_tensors: Tensors, name: str) -> Array:
    """Return where arrays of a name lie."""
    return np.array([t[name].ctypes.data for t in all_tensors])


def by_cpu_kernels(step: Step, all_tensors: Tensors) -> None:
    """Take a step in place."""
    first_elements = np.array([first for _, _, first in LAYOUT])
    kept: Any = cpu_kernels.Stochastic(step.weights.seed or 0, np.arange(len(LAYOUT)), first_elements)
    if step.weights.bits is not None:
        kept = cpu_kernels.Master(step.weights.bits, addresses(all_tensors, "low"))
    getattr(cpu_kernels, step.update)(
        "bfloat16",
        *(addresses(all_tensors, name) for name in ("param", "grad", *step.states)),
        np.array([size for size, _, _ in LAYOUT]),
        addresses(all_tensors, "step"),
        np.concatenate([t["scale"] for t in all_tensors]),
        np.array(step.k),
        2,
        step.inv_scale,
        step.grad_dtype,
        kept,
    )


def by_cuda_kernels(step: Step, all_tensors: Tensors, launch: Any, reach: Callable[..., Any]) -> None:
    """Take a step in place.

    Args:
        step: The step.
        all_tensors: The tensors.
        launch: The module that launches.
        reach: Called with arrays; a context in which kernels can reach them.
    """
    from lion.cuda_kernels.quantization import lookup_table  # not importable without numba-cuda

    sizes, lookup = np.array([size for size, _, _ in LAYOUT]), lookup_table()
    items, inv_scale = work_list(sizes, 256, 2), np.array([step.inv_scale])
    words = table(
        np.array(step.k),
        sizes,
        work=items.ctypes.data,
        items=len(items),
        params=addresses(all_tensors, "param"),
        grads=addresses(all_tensors, "grad"),
        states=addresses(all_tensors, step.states[0]),
        absmax=addresses(all_tensors, "absmax"),
        new_absmax=addresses(all_tensors, "new_absmax"),
        steps=addresses(all_tensors, "step"),
        scales=addresses(all_tensors, "scale"),
        lows=addresses(all_tensors, "low"),
        first_elements=np.array([first for _, _, first in LAYOUT]),
        parameters=np.arange(len(LAYOUT)),
        lookup=lookup.ctypes.data,
        inv_scale=inv_scale.ctypes.data,
        seed=step.weights.seed or 0,
    )
    counts = (len(items), len(sizes)) if step.update == "update_8bit_tensorwise" else (len(items),)
    how = STOCHASTIC if step.weights.bits is None else step.weights.bits
    with reach(items, inv_scale, words, lookup, *(array for t in all_tensors for array in t.values())):
        getattr(launch, step.update)("bfloat16", words.ctypes.data, *counts, 0, 0, True, step.grad_dtype, how)


def check_lockstep(
    update: str,
    weights: strategies.Weights,
    grad_dtype: str,
    take: Callable[[Step, Tensors], None],
    steps: int = STEPS,
) -> None:
    """Train by the reference and by kernels, and fail at the first step after which a bit differs.

    Args:
        update: Name of the update.
        weights: How the parameters are kept.
        grad_dtype: The dtype of the gradients.
        take: Takes a step by the kernels.
        steps: Number of steps; gradients that are not finite come in the last ten (default: 300).
    """
    expected, actual = tensors(update, weights, grad_dtype), tensors(update, weights, grad_dtype)
    histories = [np.zeros(100, np.float32) for _ in LAYOUT]
    rng = np.random.default_rng(0)
    inv_scale = np.float32(1 / 1024)
    for number in range(steps):
        k = reference.coefficients(1e-3 * 0.99**number, (0.9, 0.99), 0.1)
        step = Step(update, weights, grad_dtype, k, inv_scale)
        for i, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
            recipe = "special" if number >= steps - 10 and rng.random() < 0.1 else "gradients"
            grad = strategies.make_floats(recipe, grad_dtype, ours["grad"].size, int(rng.integers(2**32)))
            squared = reference.squared_norm(grad, inv_scale)
            histories[i], _, _, scale = reference.percentile_clipping(histories[i], squared, number + 1, 50)
            for t in (ours, theirs):
                t["grad"][...], t["scale"][0] = grad, scale
        take(step, actual)
        by_reference(step, expected)
        for i, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
            for name, array in ours.items():
                assert_same_bits(array, theirs[name], what=f"after step {number}, {name} of tensor {i}")
    moved = tensors(update, weights, grad_dtype)
    assert (moved[0]["param"] != actual[0]["param"]).mean() > 0.5
    assert actual[0]["step"][0] == steps

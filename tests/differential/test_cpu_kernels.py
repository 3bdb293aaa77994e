"""The CPU kernels equal the reference, to the bit, and touch nothing but their tensors."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lion import cpu_kernels, reference
from lion.cpu_kernels import avx2, avx512, pool, portable, quantization
from lion.cpu_kernels.quantization import dequantize_paired, quantize_paired
from lion.cpu_kernels.rounding import RANDOM_ITEMS, prepare
from lion.reference.rounding import STOCHASTIC
from tests import strategies
from tests.comparing import Guarded, assert_same_bits, guarded
from tests.differential import cpu_paths, cpu_twins
from tests.differential.every_float import around, paired

Array = npt.NDArray[Any]

QMAP = reference.create_dynamic_map()
THRESHOLDS = reference.quantize_thresholds(QMAP)
THREADS = st.sampled_from([1, 2])


@pytest.fixture(autouse=True)
def many_threads_for_small_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "SMALL", 0)
    if cpu_twins.DISABLE_JIT:
        cpu_twins.install(monkeypatch)


BUFFERS = ("param", "grad", "momentum", "codes", "absmax", "step", "low")


class Tensor(NamedTuple):
    """A parameter and all that goes with it, each between guard bytes."""

    param: Guarded
    grad: Guarded
    momentum: Guarded
    codes: Guarded
    absmax: Guarded
    step: Guarded
    low: Guarded
    scale: np.float32
    parameter: int = 0
    offset: int = 0


def addresses(buffers: list[Guarded]) -> npt.NDArray[np.int64]:
    return np.array([buffer.array.ctypes.data for buffer in buffers], np.int64)


@st.composite
def tensors(
    draw: st.DrawFn,
    dtype: str,
    grad_dtype: str,
    weights: strategies.Weights,
    *,
    tensorwise: bool = False,
    max_size: int = 5000,
) -> list[Tensor]:
    drawn = []
    for _ in range(draw(st.integers(1, 3))):
        size = draw(strategies.sizes(max_size))
        blocks = 1 if tensorwise else -(-size // 256)
        kinds = {
            "param": strategies.floats(dtype, size),
            "grad": strategies.floats(grad_dtype, size),
            "momentum": strategies.floats("float32", size),
            "codes": strategies.codes(size),
            "absmax": strategies.floats("float32", blocks).map(np.abs),
            "step": strategies.step_counts().map(lambda step: np.array([step])),
            "low": weights.lows(size),
        }
        buffers = {
            name: guarded(draw(values), offset_bytes=draw(strategies.byte_offsets())) for name, values in kinds.items()
        }
        place = draw(strategies.parameter_numbers()), draw(strategies.first_elements())
        drawn.append(Tensor(**buffers, scale=draw(strategies.scales()), parameter=place[0], offset=place[1]))
    return drawn


def table(drawn: list[Tensor], *names: str) -> list[npt.NDArray[np.int64]]:
    return [addresses([getattr(tensor, name) for tensor in drawn]) for name in names]


def sizes_of(drawn: list[Tensor]) -> npt.NDArray[np.int64]:
    return np.array([tensor.param.array.size for tensor in drawn], np.int64)


def scales_of(drawn: list[Tensor]) -> npt.NDArray[np.float32]:
    return np.array([tensor.scale for tensor in drawn], np.float32)


def weights_of(drawn: list[Tensor], weights: strategies.Weights) -> Any:
    """Return how the tensors are kept, as the kernels take it."""
    if weights.seed is not None:
        parameters, offsets = (np.array([getattr(t, name) for t in drawn]) for name in ("parameter", "offset"))
        return cpu_kernels.Stochastic(weights.seed, parameters, offsets)
    return None if weights.bits is None else cpu_kernels.Master(weights.bits, *table(drawn, "low"))


def reference_of(t: Tensor, old: dict[str, Array], weights: strategies.Weights) -> Any:
    """Return how a tensor is kept, as the reference takes it."""
    return weights.of_reference(old["low"], old["step"][0], t.parameter, t.offset)


def check(
    drawn: list[Tensor], before: list[dict[str, Array]], expected: list[dict[str, Array]], k: reference.Coefficients
) -> None:
    for tensor, old, new in zip(drawn, before, expected, strict=True):
        for name in old:
            buffer = getattr(tensor, name)
            inputs = {**old, "scale": tensor.scale, "k": k}
            assert_same_bits(buffer.array, new.get(name, old[name]), what=name, inputs=inputs)
            buffer.check()


def copies(drawn: list[Tensor]) -> list[dict[str, Array]]:
    return [
        {name: buffer.array.copy() for name, buffer in zip(t._fields, t, strict=True) if name in BUFFERS} for t in drawn
    ]


@given(st.data(), strategies.dtypes(), strategies.hyperparameters(), strategies.inv_scales(), THREADS)
def test_update_32bit(
    data: st.DataObject, dtype: str, hyper: tuple[Any, ...], inv_scale: np.float32, threads: int
) -> None:
    grad_dtype, weights = data.draw(strategies.grad_dtypes(dtype)), data.draw(strategies.weights(dtype))
    drawn = data.draw(tensors(dtype, grad_dtype, weights))
    k = reference.coefficients(*hyper)
    before = copies(drawn)
    expected = []
    for t, old in zip(drawn, before, strict=True):
        kept = reference_of(t, old, weights)
        new = reference.update_32bit(old["param"], old["grad"], old["momentum"], k, t.scale, inv_scale, kept)
        expected.append(dict(zip(("param", "momentum", "low"), new, strict=False), step=old["step"] + np.float32(1)))
    cpu_kernels.update_32bit(
        dtype,
        *table(drawn, "param", "grad", "momentum"),
        sizes_of(drawn),
        *table(drawn, "step"),
        scales_of(drawn),
        np.array(k, np.float32),
        threads,
        inv_scale,
        grad_dtype,
        weights_of(drawn, weights),
    )
    check(drawn, before, expected, k)


@given(st.data(), strategies.dtypes(), strategies.hyperparameters(), strategies.inv_scales(), THREADS)
def test_update_8bit_blockwise(
    data: st.DataObject, dtype: str, hyper: tuple[Any, ...], inv_scale: np.float32, threads: int
) -> None:
    grad_dtype, weights = data.draw(strategies.grad_dtypes(dtype)), data.draw(strategies.weights(dtype))
    drawn = data.draw(tensors(dtype, grad_dtype, weights))
    k = reference.coefficients(*hyper)
    before = copies(drawn)
    expected = []
    for t, old in zip(drawn, before, strict=True):
        parts = old["param"], old["grad"], old["codes"], old["absmax"]
        kept = reference_of(t, old, weights)
        new = reference.update_8bit_blockwise(*parts, QMAP, k, t.scale, inv_scale=inv_scale, weights=kept)
        names = ("param", "codes", "absmax", "low")
        expected.append(dict(zip(names, new, strict=False), step=old["step"] + np.float32(1)))
    cpu_kernels.update_8bit_blockwise(
        dtype,
        *table(drawn, "param", "grad", "codes", "absmax"),
        sizes_of(drawn),
        *table(drawn, "step"),
        scales_of(drawn),
        np.array(k, np.float32),
        threads,
        inv_scale,
        grad_dtype,
        weights_of(drawn, weights),
    )
    check(drawn, before, expected, k)


@given(st.data(), strategies.dtypes(), strategies.hyperparameters(), strategies.inv_scales(), THREADS)
def test_update_8bit_tensorwise(
    data: st.DataObject, dtype: str, hyper: tuple[Any, ...], inv_scale: np.float32, threads: int
) -> None:
    grad_dtype, weights = data.draw(strategies.grad_dtypes(dtype)), data.draw(strategies.weights(dtype))
    drawn = data.draw(tensors(dtype, grad_dtype, weights, tensorwise=True))
    k = reference.coefficients(*hyper)
    before = copies(drawn)
    expected = []
    for t, old in zip(drawn, before, strict=True):
        new = {"step": old["step"] + np.float32(1)}
        if old["param"].size:
            names = ("param", "codes", "absmax", "low")
            parts = old["param"], old["grad"], old["codes"], old["absmax"]
            kept = reference_of(t, old, weights)
            updated = reference.update_8bit_tensorwise(*parts, QMAP, k, t.scale, inv_scale, kept)
            new.update(zip(names, updated, strict=False))
        expected.append(new)
    scratch = [guarded(np.full(1, np.nan, np.float32)) for _ in drawn]
    cpu_kernels.update_8bit_tensorwise(
        dtype,
        *table(drawn, "param", "grad", "codes", "absmax"),
        addresses(scratch),
        sizes_of(drawn),
        *table(drawn, "step"),
        scales_of(drawn),
        np.array(k, np.float32),
        threads,
        inv_scale,
        grad_dtype,
        weights_of(drawn, weights),
    )
    check(drawn, before, expected, k)
    for t, new_absmax in zip(drawn, scratch, strict=True):
        assert_same_bits(new_absmax.array, t.absmax.array, what="new_absmax")
        new_absmax.check()


@pytest.mark.parametrize("sizes", [(300,), (300, 700)])
def test_update_8bit_tensorwise_of_ordinary_numbers(sizes: tuple[int, ...]) -> None:
    """Random bits make most absmax NaN, which hides a tensor that is updated twice."""
    random = np.random.default_rng(0)
    k = reference.coefficients(1e-2, (0.9, 0.99), 0.1)
    drawn = [
        Tensor(
            param=guarded(random.normal(size=size).astype(np.float32)),
            grad=guarded(random.normal(size=size).astype(np.float32)),
            momentum=guarded(np.zeros(size, np.float32)),
            codes=guarded(random.integers(0, 256, size).astype(np.uint8)),
            absmax=guarded(np.array([0.5], np.float32)),
            step=guarded(np.zeros(1, np.float32)),
            low=guarded(np.zeros(0, np.int8)),
            scale=np.float32(1),
        )
        for size in sizes
    ]
    before = copies(drawn)
    expected = []
    for old in before:
        updated = reference.update_8bit_tensorwise(old["param"], old["grad"], old["codes"], old["absmax"], QMAP, k)
        expected.append(dict(zip(("param", "codes", "absmax"), updated, strict=True), step=np.ones(1, np.float32)))
    scratch = [guarded(np.zeros(1, np.float32)) for _ in drawn]
    cpu_kernels.update_8bit_tensorwise(
        "float32",
        *table(drawn, "param", "grad", "codes", "absmax"),
        addresses(scratch),
        sizes_of(drawn),
        *table(drawn, "step"),
        scales_of(drawn),
        np.array(k, np.float32),
        1,
    )
    check(drawn, before, expected, k)


@pytest.mark.parametrize("name", cpu_kernels.__all__)
def test_updates_and_norms_have_the_defaults_of_the_reference(name: str) -> None:
    own, wanted = (inspect.signature(getattr(package, name)).parameters for package in (cpu_kernels, reference))
    for shared in own.keys() & wanted.keys():
        assert own[shared].default == wanted[shared].default
    if "update" in name or "norm" in name:
        assert "inv_scale" in own.keys() & wanted.keys()
    if "update" in name:
        assert "weights" in own.keys() & wanted.keys()


@pytest.mark.parametrize("update", ["update_32bit", "update_8bit_blockwise", "update_8bit_tensorwise"])
def test_step_without_a_counter(update: str) -> None:
    size = 300
    param, grad, state = (guarded(np.ones(size, np.float32)) for _ in range(3))
    codes, absmax, new_absmax = (guarded((2,), np.float32) for _ in range(3))
    codes = guarded(np.full(size, 127, np.uint8))
    states = {"update_32bit": [state], "update_8bit_blockwise": [codes, absmax]}.get(
        update, [codes, absmax, new_absmax]
    )
    k = reference.coefficients(0.5, (0.9, 0.99), 0.0)
    getattr(cpu_kernels, update)(
        "float32",
        *(addresses([buffer]) for buffer in (param, grad, *states)),
        np.array([size], np.int64),
        np.zeros(1, np.int64),
        np.ones(1, np.float32),
        np.array(k, np.float32),
        1,
    )
    assert_same_bits(param.array, np.full(size, 0.5, np.float32))


@pytest.mark.parametrize("update", ["update_32bit", "update_8bit_blockwise", "update_8bit_tensorwise"])
def test_rounding_at_random_without_a_counter_is_that_of_the_first_step(update: str) -> None:
    """Some of these elements move, so that the random bits matter."""
    size = 300
    params = [guarded(np.ones(size, strategies.FLOAT_DTYPES["bfloat16"])) for _ in range(2)]
    grads, momenta, codes = (
        np.ones(size, np.float32),
        np.zeros((2, size), np.float32),
        np.full((2, size), 127, np.uint8),
    )
    absmax, maxima, step = np.zeros((2, 2), np.float32), np.zeros((2, 1), np.float32), np.zeros(1, np.float32)
    states = {"update_32bit": [momenta], "update_8bit_blockwise": [codes, absmax]}.get(update, [codes, absmax, maxima])
    getattr(cpu_kernels, update)(
        "bfloat16",
        addresses(params),
        np.full(2, grads.ctypes.data),
        *(np.array([row.ctypes.data for row in state]) for state in states),
        np.array([size, size], np.int64),
        np.array([0, step.ctypes.data]),
        np.ones(2, np.float32),
        np.array(reference.coefficients(1e-3, (0.9, 0.99), 0.0), np.float32),
        1,
        grad_dtype="float32",
        weights=cpu_kernels.Stochastic(7, np.zeros(2, np.int64), np.zeros(2, np.int64)),
    )
    u = reference.random_bits(size, 0, 1, 0, 7)
    expected = reference.stochastic_round(np.full(size, 1 - np.float32(1e-3)), u)
    assert 0 < (expected == 1).sum() < size
    for param in params:
        assert_same_bits(param.array, expected)


def test_bits_for_rounding_at_random_fill_their_room() -> None:
    """A block's random bits take most where it begins with the last element of a group of eight."""
    seed = 2**63 + 3
    for first in range(8):
        room = guarded(np.zeros(RANDOM_ITEMS, np.uint32))
        rows = np.array([[seed - 2**64, first, 5, 7]])
        place = prepare(STOCHASTIC, rows, 0, 0, reference.BLOCK_SIZE, room.array.ctypes.data)
        begin = (place - room.array.ctypes.data) // 2
        found = room.array.view(np.uint16)[begin : begin + reference.BLOCK_SIZE]
        assert_same_bits(found, reference.random_bits(reference.BLOCK_SIZE, first, 7, 5, seed))
        room.check()
    assert 2 * RANDOM_ITEMS == reference.BLOCK_SIZE + 8, "more room than is needed"


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("update", ["update_32bit", "update_8bit_blockwise", "update_8bit_tensorwise"])
def test_all_chunks_of_a_tensor_are_rounded_by_the_step_before_it_is_counted(update: str, threads: int) -> None:
    """Chunks are worked on while the thread that has the first one counts the step."""
    size = (1 if cpu_twins.DISABLE_JIT else 40) * 16384 + 100
    param = guarded(np.ones(size, strategies.FLOAT_DTYPES["bfloat16"]))
    grad, step = np.ones(size, strategies.FLOAT_DTYPES["bfloat16"]), np.full(1, 41, np.float32)
    codes, absmax = np.full(size, 127, np.uint8), np.zeros(-(-size // 256), np.float32)
    states = {"update_32bit": [np.zeros(size, np.float32)], "update_8bit_blockwise": [codes, absmax]}.get(
        update, [codes, absmax, np.zeros(1, np.float32)]
    )
    getattr(cpu_kernels, update)(
        "bfloat16",
        *(np.array([array.ctypes.data]) for array in (param.array, grad, *states)),
        np.array([size]),
        np.array([step.ctypes.data]),
        np.ones(1, np.float32),
        np.array(reference.coefficients(1e-3, (0.9, 0.99), 0.0), np.float32),
        threads,
        weights=cpu_kernels.Stochastic(2**64 - 1, np.array([2**32 - 1]), np.array([2**40 + 3])),
    )
    u = reference.random_bits(size, 2**40 + 3, 42, 2**32 - 1, 2**64 - 1)
    assert_same_bits(param.array, reference.stochastic_round(np.full(size, 1 - np.float32(1e-3)), u))
    assert step[0] == 42


@given(st.data(), strategies.dtypes(), strategies.inv_scales(), THREADS)
def test_squared_norm(data: st.DataObject, dtype: str, inv_scale: np.float32, threads: int) -> None:
    sizes = data.draw(st.lists(strategies.sizes(9000), min_size=1, max_size=3))
    # Over 32 chunks, the totals take part.
    sizes.append(data.draw(st.sampled_from([0, 32 * 4096, 33 * 4096 + 1])))
    grads = [
        guarded(data.draw(strategies.floats(dtype, size)), offset_bytes=data.draw(strategies.byte_offsets()))
        for size in sizes
    ]
    norms = cpu_kernels.squared_norm(dtype, addresses(grads), np.array(sizes, np.int64), threads, inv_scale)
    assert_same_bits(norms, np.array([reference.squared_norm(grad.array, inv_scale) for grad in grads], np.float32))


def test_squared_norm_takes_the_last_element_of_a_chunk_of_one() -> None:
    grads = [guarded(np.zeros(4097, np.float32)), guarded(np.ones(1, np.float32))]
    grads[0].array[-1] = 3.0
    norms = cpu_kernels.squared_norm("float32", addresses(grads), np.array([4097, 1], np.int64), 1)
    assert_same_bits(norms, np.float32([9.0, 1.0]))


def test_squared_norm_of_empty_tensors_between_others() -> None:
    grads = [guarded(np.full(size, 2.0, np.float32)) for size in (0, 2, 0, 0, 4097, 1)]
    sizes = np.array([grad.array.size for grad in grads], np.int64)
    norms = cpu_kernels.squared_norm("float32", addresses(grads), sizes, 1)
    assert_same_bits(norms, np.float32([0, 8, 0, 0, 4 * 4097, 4]))


def test_squared_norm_adds_every_32nd_chunk() -> None:
    """In float64, 2**24 + 1 swallows 2**-29 twice; added to each other first, the two would decide the rounding."""
    grad = guarded(np.zeros(96 * 4096 + 2, np.float32))
    grad.array[0], grad.array[32 * 4096] = 2.0**12, 1.0
    for chunk in (64, 96):
        grad.array[chunk * 4096 : chunk * 4096 + 2] = 2.0**-15
    norms = cpu_kernels.squared_norm("float32", addresses([grad]), np.array([grad.array.size], np.int64), 1)
    assert_same_bits(norms, np.float32([2.0**24]))
    assert_same_bits(norms[0], reference.squared_norm(grad.array))


@given(st.data(), st.integers(1, 99), THREADS)
def test_percentile_clipping(data: st.DataObject, percentile: int, threads: int) -> None:
    count = data.draw(st.integers(1, 3))
    first = data.draw(st.sampled_from([0, 1, 97, 99, 100, 1000]))
    history = data.draw(st.sampled_from(["empty", "recorded", "any"]))
    made = {
        "empty": lambda: np.zeros(100, np.float32),
        "recorded": lambda: np.random.default_rng(first).random(100, np.float32),
        "any": lambda: np.abs(data.draw(strategies.floats("float32", 100))),
    }[history]
    gnorm_vecs = [guarded(made()) for _ in range(count)]
    steps = [guarded(np.array([first], np.float32)) for _ in range(count)]
    for _ in range(3):
        squared_norms = np.abs(data.draw(strategies.floats("float32", count)))
        expected = []
        with np.errstate(all="ignore"):
            for norm, vec, step in zip(squared_norms, gnorm_vecs, steps, strict=True):
                new, _, _, scale = reference.percentile_clipping(vec.array, norm, int(step.array[0]) + 1, percentile)
                expected.append((new, scale))
        scales = guarded((count,), np.float32)
        cpu_kernels.percentile_clipping(
            squared_norms,
            addresses(gnorm_vecs),
            addresses(steps),
            scales.array,
            percentile,
            threads,
        )
        assert_same_bits(scales.array, np.array([scale for _, scale in expected], np.float32), what="scales")
        scales.check()
        for vec, step, (new, _) in zip(gnorm_vecs, steps, expected, strict=True):
            assert_same_bits(vec.array, new, what="gnorm_vec")
            vec.check()
            step.array[0] += 1


def maps() -> st.SearchStrategy[npt.NDArray[np.float32]]:
    random = strategies.seeds().map(
        lambda seed: np.sort(np.random.default_rng(seed).uniform(-1, 1, 256).astype(np.float32))
    )
    few = strategies.seeds().map(
        lambda seed: np.sort(np.random.default_rng(seed).choice(np.float32([-1, -0.5, 0, 1e-3, 1]), 256))
    )
    return st.sampled_from([QMAP, reference.create_dynamic_map(signed=False)]) | random | few


@given(st.data(), strategies.dtypes(), st.sampled_from([1, 64, 100, 256, 4096, 65536, 10**6]), maps(), THREADS)
def test_quantize_and_dequantize_blockwise(
    data: st.DataObject, dtype: str, block_size: int, qmap: npt.NDArray[np.float32], threads: int
) -> None:
    size = data.draw(strategies.sizes())
    offset = data.draw(strategies.byte_offsets())
    values = guarded(data.draw(strategies.floats(dtype, size)), offset_bytes=offset)
    old = values.array.copy()
    codes = guarded((size,), np.uint8, offset_bytes=data.draw(strategies.byte_offsets()))
    absmax = guarded((-(-size // block_size),), np.float32, offset_bytes=data.draw(strategies.byte_offsets()))
    places = [buffer.array.ctypes.data for buffer in (values, codes, absmax)]
    cpu_kernels.quantize_blockwise(dtype, *places, size, qmap, block_size, threads)
    expected_codes, expected_absmax = reference.quantize_blockwise(old, qmap, block_size)
    assert_same_bits(absmax.array, expected_absmax, what="absmax", block_size=block_size)
    inputs = {"values": old, "qmap": qmap, "block_size": block_size}
    assert_same_bits(codes.array, expected_codes, what="codes", block_size=block_size, inputs=inputs)
    assert_same_bits(values.array, old, what="values")
    cpu_kernels.dequantize_blockwise(dtype, *places[1:], places[0], size, qmap, block_size, threads)
    with np.errstate(all="ignore"):
        expected = reference.dequantize_blockwise(expected_codes, expected_absmax, qmap, block_size).astype(old.dtype)
    assert_same_bits(values.array, expected, what="dequantized", block_size=block_size)
    for buffer in (values, codes, absmax):
        buffer.check()


@pytest.mark.parametrize("dtype", strategies.FLOAT_DTYPES)
def test_dequantize_every_code(dtype: str) -> None:
    absmax = np.concatenate([2.0 ** np.arange(-149.0, 128.0), [0.0, np.nan, np.inf, 3.4028235e38, 0.1]]).astype(
        np.float32
    )
    codes = np.tile(np.arange(256, dtype=np.uint8), absmax.size)
    values = guarded((codes.size,), strategies.FLOAT_DTYPES[dtype])
    cpu_kernels.dequantize_blockwise(
        dtype, codes.ctypes.data, absmax.ctypes.data, values.array.ctypes.data, codes.size, QMAP, 256, 1
    )
    with np.errstate(all="ignore"):
        expected = reference.dequantize_blockwise(codes, absmax, QMAP, 256).astype(values.array.dtype)
    assert_same_bits(values.array, expected)


def test_dequantize_every_code_at_every_place_of_a_group() -> None:
    codes = np.concatenate([np.roll(np.arange(256, dtype=np.uint8), place) for place in range(64)])
    absmax, values = np.ones(64, np.float32), guarded((codes.size,), np.float32)
    places = codes.ctypes.data, absmax.ctypes.data, values.array.ctypes.data
    cpu_kernels.dequantize_blockwise("float32", *places, codes.size, QMAP, 256, 1)
    assert_same_bits(values.array, QMAP[codes])


def test_the_dynamic_map_with_another_zero_is_another_map() -> None:
    qmap, codes, absmax = QMAP.copy(), np.array([127], np.uint8), np.ones(1, np.float32)
    qmap[127] = -0.0
    value = guarded((1,), np.float32)
    places = codes.ctypes.data, absmax.ctypes.data, value.array.ctypes.data
    cpu_kernels.dequantize_blockwise("float32", *places, 1, qmap, 256, 1)
    assert_same_bits(value.array, np.float32([-0.0]))


@pytest.mark.parametrize("dtype", strategies.FLOAT_DTYPES)
def test_quantize_at_the_ends_of_the_normal_numbers(dtype: str) -> None:
    """What is below them is stored as 0, what is above as NaN."""
    ends = np.array([0x007FFFFF, 0x00800000, 0x00800001, 0x7F7FFFFF, 0x7F800000], np.uint32).view(np.float32)
    with np.errstate(all="ignore"):
        values = ends.astype(strategies.FLOAT_DTYPES[dtype])
    codes, absmax = guarded((values.size,), np.uint8), guarded((values.size,), np.float32)
    places = [array.ctypes.data for array in (values, codes.array, absmax.array)]
    cpu_kernels.quantize_blockwise(dtype, *places, values.size, QMAP, 1, 1)
    expected_codes, expected_absmax = reference.quantize_blockwise(values, QMAP, 1)
    assert_same_bits(absmax.array, expected_absmax)
    assert_same_bits(codes.array, expected_codes)
    if dtype == "float32":
        assert_same_bits(absmax.array, np.array([0.0, *ends[1:4], np.nan], np.float32))


def test_codes_come_back() -> None:
    """With absmax of every exponent the codes stay, until the smallest values are no longer normal numbers."""
    absmax = strategies.absmax_sweep(8)
    codes = np.tile(np.arange(256, dtype=np.uint8), absmax.size)
    values = guarded((codes.size,), np.float32)
    again, again_absmax = guarded((codes.size,), np.uint8), guarded((absmax.size,), np.float32)
    places = codes.ctypes.data, absmax.ctypes.data, values.array.ctypes.data
    cpu_kernels.dequantize_blockwise("float32", *places, codes.size, QMAP, 256, 1)
    expected = reference.dequantize_blockwise(codes, absmax, QMAP, 256)
    assert_same_bits(values.array, expected)
    places = (values.array.ctypes.data, again.array.ctypes.data, again_absmax.array.ctypes.data)
    cpu_kernels.quantize_blockwise("float32", *places, codes.size, QMAP, 256, 1)
    expected_codes, expected_absmax = reference.quantize_blockwise(expected, QMAP, 256)
    assert_same_bits(again.array, expected_codes)
    assert_same_bits(again_absmax.array, expected_absmax)
    kept = absmax >= 2.0**-104
    assert_same_bits(again_absmax.array[kept], absmax[kept])
    assert_same_bits(again.array.reshape(-1, 256)[kept], codes.reshape(-1, 256)[kept])


@pytest.mark.parametrize("update", ["update_8bit_blockwise", "update_8bit_tensorwise"])
def test_codes_at_thresholds(update: str) -> None:
    """With beta2 = 0 and absmax 1, the new momentum is the gradient and its own quotient."""
    buckets = (np.arange(0, 0x3F800000, 1 << 17, dtype=np.int64)).astype(np.int32).view(np.float32)
    x = np.concatenate([around(THRESHOLDS), around(QMAP), around(buckets[1:]), around(-buckets[1:])])
    x = x[np.abs(x) <= 1]
    x = np.pad(x, (0, -x.size % 255)).reshape(-1, 255)
    grad = np.concatenate([np.ones((len(x), 1), np.float32), x], axis=1).reshape(-1)
    param, codes = np.zeros_like(grad), np.full(grad.size, 127, np.uint8)
    absmax = np.zeros(len(x) if update == "update_8bit_blockwise" else 1, np.float32)
    new_absmax = [] if update == "update_8bit_blockwise" else [np.zeros(1, np.float32)]
    getattr(cpu_kernels, update)(
        "float32",
        *(np.array([array.ctypes.data], np.int64) for array in (param, grad, codes, absmax, *new_absmax)),
        np.array([grad.size], np.int64),
        np.zeros(1, np.int64),
        np.ones(1, np.float32),
        np.array(reference.coefficients(1e-4, (0.0, 0.0), 0.0), np.float32),
        1,
    )
    assert_same_bits(absmax, np.ones_like(absmax))
    assert_same_bits(codes, np.searchsorted(THRESHOLDS, grad, side="left").astype(np.uint8))


@pytest.mark.parametrize("places", [0, 1, 31, 64])
def test_codes_of_a_paired_block_at_thresholds(places: int) -> None:
    """Turned by so many places: each value is found at an even and at an odd one."""
    x = np.concatenate([around(THRESHOLDS), around(QMAP)])
    x = np.roll(np.resize(x[np.abs(x) <= 1], (10, 256)), places)
    for block in x:
        codes, entries = guarded((256,), np.uint8), guarded((256,), np.uint32)
        pairs = guarded(paired(block[None])[0])
        quantize_paired(pairs.array.ctypes.data, entries.array.ctypes.data, np.float32(1.0), codes.array.ctypes.data)
        assert_same_bits(codes.array, np.searchsorted(THRESHOLDS, block, side="left").astype(np.uint8))
        for buffer in (codes, entries, pairs):
            buffer.check()


@pytest.mark.parametrize("absmax", [0.0, np.nan])
def test_codes_of_a_paired_block_without_an_absmax_to_quantize_by(absmax: float) -> None:
    codes, pairs, entries = guarded((256,), np.uint8), np.ones(256, np.float32), np.empty(256, np.uint32)
    quantize_paired(pairs.ctypes.data, entries.ctypes.data, np.float32(absmax), codes.array.ctypes.data)
    assert_same_bits(codes.array, np.full(256, 127, np.uint8))
    codes.check()


def test_dequantize_every_code_at_every_place_of_a_paired_block() -> None:
    for place in range(64):
        codes, block = np.roll(np.arange(256, dtype=np.uint8), place), guarded((256,), np.float32)
        dequantize_paired(codes.ctypes.data, block.array.ctypes.data)
        assert_same_bits(block.array, paired(QMAP[codes][None])[0])
        block.check()


@pytest.mark.skipif(cpu_twins.DISABLE_JIT, reason="Python is too slow for so many values")
@pytest.mark.parametrize("kept", [strategies.NEAREST, *map(strategies.Weights, (24, 32)), strategies.Weights(seed=7)])
@pytest.mark.parametrize(
    ("hyper", "extra"), [((0.0, (0.9, 0.99), 0.0), 0), ((1e-2, (0.9, 0.99), 0.1), 1), ((1.0, (0.0, 0.0), 2.0), 255)]
)
def test_update_8bit_blockwise_of_every_bfloat16(kept: strategies.Weights, hyper: tuple[Any, ...], extra: int) -> None:
    """Every parameter with some gradient, every gradient with some parameter, and a short block at the end.

    Ascending gradients leave all blocks finite but those of infinities and NaN.
    """
    random, dtype = np.random.default_rng(extra), strategies.FLOAT_DTYPES["bfloat16"]
    size = (1 << 16) + extra
    every, some = np.arange(size).astype(np.uint16).view(dtype), random.normal(size=size).astype(dtype)
    drawn = [
        Tensor(
            param=guarded(param, offset_bytes=1),
            grad=guarded(grad, offset_bytes=2),
            momentum=guarded(np.zeros(0, np.float32)),
            codes=guarded(random.integers(0, 256, size).astype(np.uint8)),
            absmax=guarded(random.random(-(-size // 256), np.float32)),
            step=guarded(np.zeros(1, np.float32)),
            low=guarded(kept.make_lows(size, extra), offset_bytes=3),
            scale=np.float32(1),
            offset=extra,
        )
        for param, grad in [(every, some), (some, every)]
    ]
    k, before = reference.coefficients(*hyper), copies(drawn)
    expected = []
    for t, old in zip(drawn, before, strict=True):
        parts = old["param"], old["grad"], old["codes"], old["absmax"]
        new = reference.update_8bit_blockwise(*parts, QMAP, k, weights=reference_of(t, old, kept))
        expected.append(dict(zip(("param", "codes", "absmax", "low"), new, strict=False), step=np.ones(1, np.float32)))
    cpu_kernels.update_8bit_blockwise(
        "bfloat16",
        *table(drawn, "param", "grad", "codes", "absmax"),
        sizes_of(drawn),
        *table(drawn, "step"),
        scales_of(drawn),
        np.array(k, np.float32),
        1,
        weights=weights_of(drawn, kept),
    )
    check(drawn, before, expected, k)


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="reads what /proc/cpuinfo says")
@pytest.mark.skipif("NUMBA_CPU_FEATURES" in os.environ, reason="another processor is asked for")
def test_the_fast_code_runs_on_processors_that_have_it() -> None:
    flags = set(Path("/proc/cpuinfo").read_text().split())
    wanted = {avx512.NAME: {"avx512f", "avx512bw", "avx512vbmi"}, avx2.NAME: {"avx2", "fma"}, portable.NAME: set()}
    assert quantization.LOOKUPS == next(name for name, needed in wanted.items() if needed <= flags)


@cpu_paths.on_others
def test_other_code_that_the_processor_has(lookups: str) -> None:
    cpu_paths.run_tests(lookups, "-k", "8bit or thresholds or quantize or codes_come", __file__)


@pytest.mark.skipif(cpu_twins.DISABLE_JIT, reason="kernels that run as Python keep the caller's mode")
def test_flush_to_zero_of_the_caller_changes_nothing() -> None:
    torch = pytest.importorskip("torch")
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        param, grad, momentum = (strategies.make_floats("denormal", "float32", 1000, seed) for seed in range(3))
        k = reference.coefficients(1e-40, (0.9, 0.99), 0.1)
        result = [param.copy(), momentum.copy()]
        places = (np.array([array.ctypes.data], np.int64) for array in (result[0], grad, result[1]))
        size, one = np.array([1000], np.int64), np.ones(1, np.float32)
        cpu_kernels.update_32bit("float32", *places, size, np.zeros(1, np.int64), one, np.array(k, np.float32), 1)
        assert np.float32(1e-39) * np.float32(0.5) == 0, "the caller's mode is kept"
    finally:
        torch.set_flush_denormal(False)
    expected = reference.update_32bit(param, grad, momentum, k)
    assert_same_bits(result[0], expected[0])
    assert_same_bits(result[1], expected[1])


NO_TENSORS = np.zeros(0, np.int64)


def update_with(dtype: str, grad_dtype: str | None, weights: Any) -> None:
    tables, scales = [NO_TENSORS] * 5, np.zeros(0, np.float32)
    cpu_kernels.update_32bit(dtype, *tables, scales, np.zeros(6, np.float32), 1, 1.0, grad_dtype, weights)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cpu_kernels.squared_norm("float64", *[np.zeros(1, np.int64)] * 2, 1), "Invalid dtype: 'float64'"),
        (lambda: cpu_kernels.squared_norm("float32", *[np.zeros(1, np.int64)] * 2, 0), "Invalid threads: 0"),
        (lambda: update_with("float64", None, None), "Invalid dtype: 'float64'"),
        (lambda: update_with("bfloat16", "int8", None), "Invalid dtype: 'int8'"),
        (lambda: update_with("float32", None, cpu_kernels.Master(32, NO_TENSORS)), "Invalid dtype: 'float32'; stoch"),
        (lambda: update_with("float16", None, cpu_kernels.Stochastic(0, NO_TENSORS, NO_TENSORS)), "'float16'; stoch"),
        (lambda: update_with("bfloat16", None, cpu_kernels.Master(16, NO_TENSORS)), "Invalid bits: 16; 24 or 32"),
        (lambda: cpu_kernels.quantize_blockwise("float32", 0, 0, 0, 0, QMAP, 0, 1), "Invalid block_size: 0"),
        (lambda: cpu_kernels.dequantize_blockwise("float32", 0, 0, 0, 0, QMAP[::-1], 64, 1), "Invalid qmap"),
    ],
)
def test_invalid_arguments(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("percentile", [0, 100])
def test_percentile_out_of_range(percentile: int) -> None:
    tables = [np.zeros(1, np.int64)] * 2
    with pytest.raises(ValueError, match=f"Invalid percentile: {percentile};"):
        cpu_kernels.percentile_clipping(np.zeros(1, np.float32), *tables, np.ones(1, np.float32), percentile, 1)

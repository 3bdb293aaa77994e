"""What the CUDA kernels are held to, wherever they run: in the simulator, as executed PTX, on a GPU.

Each case draws its inputs, puts them where the kernels can reach them, launches, and compares every buffer with the
reference, those that must not change included.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from lion import reference
from lion.cuda_kernels import launch
from lion.cuda_kernels.quantization import lookup_table
from lion.cuda_kernels.table import DONE, ROW_BYTES, ROWS, WIDEST, table, work_list
from lion.cuda_kernels.tuning import Tuning
from lion.reference.rounding import STOCHASTIC
from tests import strategies
from tests.comparing import assert_same_bits
from tests.differential import conversions

Array = npt.NDArray[Any]

QMAP = reference.create_dynamic_map()
BLOCK_SIZES = tuple(2**i for i in range(6, 17))


class Buffer(Protocol):
    """An array that kernels can reach."""

    address: int

    def read(self) -> Array:
        """Return what it holds now, after checking that the bytes around it are as they were."""


class Memory(Protocol):
    """Where kernels run, and how arrays get there."""

    resident_blocks: int

    def put(self, values: Array, offset_bytes: int = 0) -> Buffer:
        """Return a copy, off by so many bytes from a 64-byte boundary."""


class Kinds(NamedTuple):
    """The dtypes of parameters and gradients, and how the parameters are kept."""

    dtype: str
    grad_dtype: str
    weights: strategies.Weights = strategies.NEAREST


FLOAT32 = Kinds("float32", "float32")
WEIGHTS = (strategies.Weights(24), strategies.Weights(32), strategies.Weights(seed=2**63 + 12345))


@st.composite
def kinds(draw: st.DrawFn, dtype: str) -> Kinds:
    """Kinds of parameters of a dtype."""
    return Kinds(dtype, draw(strategies.grad_dtypes(dtype)), draw(strategies.weights(dtype)))


def way_of(weights: strategies.Weights) -> int:
    """Return how parameters are kept, as kernels are told."""
    return weights.bits or (weights.seed is not None) * STOCHASTIC


def alignments(dtype: str) -> st.SearchStrategy[int]:
    """What kernels may be told that the addresses of gradients of a dtype are multiples of."""
    return st.sampled_from((WIDEST, strategies.FLOAT_DTYPES[dtype].itemsize))


@st.composite
def tensors(
    draw: st.DrawFn, kinds: Kinds, *, tensorwise: bool = False, max_size: int = 5000, max_tensors: int = 3
) -> list[dict[str, tuple[Array, int]]]:
    """Tensors as dicts from names to (array, offset in bytes).

    A third of them are so aligned that wide accesses are used, another but for the gradient, as in a bucket of several.
    """
    drawn = []
    for _ in range(draw(st.integers(1, max_tensors))):
        size = draw(strategies.sizes(max_size))
        blocks = 1 if tensorwise else -(-size // 256)
        parts: dict[str, tuple[str, Any]] = {
            "param": (kinds.dtype, strategies.floats(kinds.dtype, size)),
            "grad": (kinds.grad_dtype, strategies.floats(kinds.grad_dtype, size)),
            "momentum": ("float32", strategies.floats("float32", size)),
            "codes": ("uint8", strategies.codes(size)),
            "absmax": ("float32", strategies.floats("float32", blocks).map(np.abs)),
            "new_absmax": ("float32", strategies.floats("float32", 1)),
            "step": ("float32", strategies.step_counts().map(lambda step: np.array([step]))),
            "scale": ("float32", strategies.scales().map(lambda scale: np.array([scale], np.float32))),
            "low": (kinds.weights.low_dtype, kinds.weights.lows(size)),
            "parameter": ("int64", strategies.parameter_numbers().map(lambda number: np.array([number]))),
            "first_element": ("int64", strategies.first_elements().map(lambda first: np.array([first]))),
        }
        anywhere: Any = draw(st.sampled_from([(), ("grad",), tuple(parts)]))
        tensor = {}
        for name, (kind, values) in parts.items():
            tensor[name] = (draw(values), draw(strategies.offsets(kind)) if name in anywhere else 0)
        drawn.append(tensor)
    return drawn


def _expected(
    kind: str,
    weights: strategies.Weights,
    old: dict[str, Array],
    k: reference.Coefficients,
    scale: np.float32,
    inv_scale: np.float32,
    missing: int,
) -> dict[str, Array]:
    new = {"step": old["step"] + np.float32(1)}
    if not old["param"].size:
        return new
    first = int(old["first_element"][0]) + missing
    kept = weights.of_reference(old["low"], old["step"][0], int(old["parameter"][0]), first)
    if kind == "update_32bit":
        names: tuple[str, ...] = ("param", "momentum")
        updated: tuple[Any, ...] = reference.update_32bit(
            old["param"], old["grad"], old["momentum"], k, scale, inv_scale, kept
        )
    else:
        names = ("param", "codes", "absmax")
        update = getattr(reference, kind)
        parts = old["param"], old["grad"], old["codes"], old["absmax"]
        updated = update(*parts, QMAP, k, scale, inv_scale=inv_scale, weights=kept)
        new["new_absmax"] = updated[2] if kind == "update_8bit_tensorwise" else old["new_absmax"]
    return new | dict(zip((*names, "low"), updated, strict=weights.bits is not None))


def _put_unscaling(memory: Memory, unscaling: strategies.Unscaling) -> tuple[Buffer, Buffer]:
    values = unscaling.inv_scale(), unscaling.found_inf or 0
    inv_scale, found_inf = (memory.put(np.array([value], np.float32)) for value in values)
    return inv_scale, found_inf


def check_update(
    memory: Memory,
    kind: str,
    kinds: Kinds,
    drawn: list[dict[str, tuple[Array, int]]],
    hyper: Any,
    scaled: bool,
    missing: int = 0,
    unscaling: strategies.Unscaling = strategies.NO_UNSCALING,
    grad_alignment: int = WIDEST,
) -> None:
    """Launch one of the updates and compare all of its tensors.

    The gradients may lie anywhere, whatever ``grad_alignment`` says. The first ``missing`` elements of each, a multiple
    of 256, are not there, and no work item touches them: so the rest of a tensor too large for memory is reached
    through the addresses the whole would have.
    """
    (dtype, grad_dtype, weights), k = kinds, reference.coefficients(*hyper)
    before = [{name: array for name, (array, _) in tensor.items()} for tensor in drawn]
    buffers = [{name: memory.put(*part) for name, part in tensor.items()} for tensor in drawn]
    sizes = np.array([old["param"].size for old in before], np.int64)
    items = work_list(sizes, 256, memory.resident_blocks) + [0, missing // 256, missing // 256]
    work, lookup = memory.put(items), memory.put(lookup_table())
    columns = {
        "params": "param",
        "grads": "grad",
        "states": "momentum" if kind == "update_32bit" else "codes",
        "absmax": "absmax",
        "new_absmax": "new_absmax",
        "steps": "step",
        "scales": "scale",
        "lows": "low",
    }
    addresses: dict[str, Any] = {
        column: np.array([tensor[name].address for tensor in buffers], np.int64) for column, name in columns.items()
    }
    if not scaled:
        del addresses["scales"]
    for column, name in (("params", "param"), ("grads", "grad"), ("lows", "low")):
        addresses[column] -= missing * drawn[0][name][0].itemsize
    addresses["states"] -= missing * (4 if kind == "update_32bit" else 1)
    if kind == "update_8bit_blockwise":
        addresses["absmax"] -= missing // 256 * 4
    inv_scale, found_inf = _put_unscaling(memory, unscaling)
    if unscaling.grad_scale is not None:
        addresses["inv_scale"] = inv_scale.address
    if unscaling.found_inf is not None:
        addresses["found_inf"] = found_inf.address
    how = way_of(weights)
    words = table(
        np.array(k, np.float32),
        sizes + missing,
        work=work.address,
        items=len(items),
        lookup=lookup.address,
        first_elements=np.concatenate([old["first_element"] for old in before]),
        parameters=np.concatenate([old["parameter"] for old in before]),
        done=missing // 256 if how == STOCHASTIC and kind != "update_8bit_tensorwise" else 0,
        seed=weights.seed or 0,
        **addresses,
    )
    place = memory.put(words)
    words[ROWS // 8 :].reshape(-1, ROW_BYTES // 8)[:, DONE // 8] = 0
    counts = (len(items), len(sizes)) if kind == "update_8bit_tensorwise" else (len(items),)
    scaled_loss = unscaling.grad_scale is not None
    getattr(launch, kind)(dtype, place.address, *counts, 0, 0, scaled_loss, grad_dtype, how, grad_alignment)
    for tensor, old in zip(buffers, before, strict=True):
        scale = old["scale"][0] if scaled else np.float32(1)
        new = {}
        if not unscaling.found_inf:
            new = _expected(kind, weights, old, k, scale, unscaling.inv_scale(), missing)
        for name, buffer in tensor.items():
            assert_same_bits(buffer.read(), new.get(name, old[name]), what=name, inputs={**old, "k": k})
    for buffer, values in ((work, items), (lookup, lookup_table()), (place, words)):
        assert_same_bits(buffer.read(), values, what="table")


def _tensor(param: Array, grad: Array, offset_bytes: int = 0, **states: Array) -> dict[str, tuple[Array, int]]:
    """Return a tensor whose parts that no kernel is to read are empty."""
    parts = {"param": param, "momentum": np.zeros(0, np.float32), "codes": np.zeros(0, np.uint8)}
    parts |= {"absmax": np.zeros(0, np.float32), "new_absmax": np.zeros(1, np.float32)}
    parts |= {"step": np.zeros(1, np.float32), "scale": np.ones(1, np.float32), "low": np.zeros(0, np.int8)}
    parts |= {"parameter": np.zeros(1, np.int64), "first_element": np.zeros(1, np.int64), **states}
    return {"grad": (grad, offset_bytes), **{name: (array, 0) for name, array in parts.items()}}


def check_codes_at_thresholds(memory: Memory, kind: str, maximum: np.float32) -> None:
    """Give the new momentum, with beta2 = 0 the gradient, the values at and around all thresholds and all buckets.

    They are scaled by ``maximum``, the greatest magnitude of each block.
    """
    # The boundaries of the lookup table's buckets lie between those of the floats' upper 15 bits.
    buckets = np.arange(0, 0x3F800000, 1 << 17, dtype=np.int32).view(np.float32)
    order = np.concatenate([reference.quantize_thresholds(QMAP), buckets, -buckets]).view(np.int32)
    order = (order ^ ((order >> 31) & 0x7FFFFFFF))[:, None] + np.arange(-2, 3, dtype=np.int32)
    order = order.reshape(-1)
    x = (order ^ ((order >> 31) & 0x7FFFFFFF)).view(np.float32)
    x = x[np.abs(x) <= 1] * maximum
    x = np.pad(x, (0, -x.size % 255)).reshape(-1, 255)
    grad = np.concatenate([np.full((len(x), 1), maximum), x], axis=1).reshape(-1)
    absmax = np.zeros(len(x) if kind == "update_8bit_blockwise" else 1, np.float32)
    tensor = _tensor(np.zeros_like(grad), grad, codes=np.full(grad.size, 127, np.uint8), absmax=absmax)
    check_update(memory, kind, FLOAT32, [tensor], (1e-4, (0.0, 0.0), 0.0), False)


def make_tensor(
    kind: str, kinds: Kinds, size: int, seed: int = 0, offset_bytes: int = 0
) -> dict[str, tuple[Array, int]]:
    """Return a tensor of ordinary values in the middle of a training; only its gradient may lie off."""
    blocks = 1 if kind == "update_8bit_tensorwise" else -(-size // 256)
    return _tensor(
        strategies.make_floats("gradients", kinds.dtype, size, seed),
        strategies.make_floats("mixed", kinds.grad_dtype, size, 10 + seed),
        offset_bytes,
        momentum=strategies.make_floats("gradients", "float32", size, 20 + seed),
        codes=strategies.make_codes(size, 30 + seed),
        absmax=np.full(blocks, 0.01, np.float32),
        low=kinds.weights.make_lows(size, 40 + seed),
        scale=np.full(1, 0.3, np.float32),
    )


def check_gradients_in_a_bucket(memory: Memory, kind: str, kinds: Kinds, grad_alignment: int) -> None:
    """Gradients off by multiples of ``grad_alignment``, all else aligned; clipped, and of a scaled loss."""
    offsets = grad_alignment, 0, 64 - grad_alignment
    drawn = [make_tensor(kind, kinds, 2 * 256 + 40, seed, offset) for seed, offset in enumerate(offsets)]
    unscaling, hyper = strategies.Unscaling(np.float32(1024), None), (1e-3, (0.9, 0.99), 0.1)
    check_update(memory, kind, kinds, drawn, hyper, True, unscaling=unscaling, grad_alignment=grad_alignment)


# How kernels can be made that programs do not get unless a measurement says so, and kinds that differ in them.
TUNINGS = [Tuning(halves=False), Tuning(ahead=True)]
TUNED = [FLOAT32, Kinds("bfloat16", "float32"), *(Kinds("bfloat16", "bfloat16", weights) for weights in WEIGHTS)]


def check_tuning(memory: Memory, kind: str, kinds: Kinds, size: int) -> None:
    """A tensor of which a warp takes several blocks, and a rest."""
    check_update(memory, kind, kinds, [make_tensor(kind, kinds, size)], (1e-3, (0.9, 0.99), 0.1), True)


# Greatest magnitudes of a block: ordinary, extreme, and with a reciprocal that is denormal.
MAXIMA = [np.float32(x) for x in (1.0, 0.7, 2.0**-126, 1.2e-38, 3.4e-5, 2.0**22, 2.0**126, 3.4028235e38)]


# What gradients lie off by multiples of, and kinds of parameters: each size of a load, each way of keeping weights.
BUCKETS = [
    *((Kinds("float32", "float32"), alignment) for alignment in (8, 4)),
    *((Kinds("bfloat16", "bfloat16"), alignment) for alignment in (8, 4, 2)),
    *((Kinds("float16", "float16"), 4), (Kinds("bfloat16", "float32"), 4)),
    *((Kinds("bfloat16", "bfloat16", weights), 4) for weights in WEIGHTS),
    *((Kinds("bfloat16", "float32", weights), 8) for weights in WEIGHTS),
]


def check_beyond_32_bits(memory: Memory, kind: str, dtype: str, weights: strategies.Weights) -> None:
    """The last 300 elements of a tensor of more than 2**33, reached by 128-bit accesses and element by element."""
    low = weights.make_lows(300, 5)
    blocks = 1 if kind == "update_8bit_tensorwise" else 2
    tensor = {
        "param": (strategies.make_floats("gradients", dtype, 300, 1), 0),
        "grad": (strategies.make_floats("gradients", dtype, 300, 2), 0),
        "momentum": (strategies.make_floats("gradients", "float32", 300, 3), 0),
        "codes": (strategies.make_codes(300, 4), 0),
        "absmax": (np.full(blocks, 0.01, np.float32), 0),
        "new_absmax": (np.zeros(1, np.float32), 0),
        "step": (np.zeros(1, np.float32), 0),
        "scale": (np.ones(1, np.float32), 0),
        "low": (low, 0),
        "parameter": (np.ones(1, np.int64), 0),
        "first_element": (np.full(1, 2**36), 0),
    }
    # No item begins at block 0, so that none but the tensor-wise update's first kernel counts the step.
    if kind != "update_8bit_tensorwise":
        tensor["step"] = (np.full(1, 2.0**24, np.float32), 0)
    check_update(memory, kind, Kinds(dtype, dtype, weights), [tensor], (1e-3, (0.9, 0.99), 0.1), True, missing=2**33)


def check_squared_norm(
    memory: Memory,
    dtype: str,
    grads: list[tuple[Array, int]],
    unscaling: strategies.Unscaling = strategies.NO_UNSCALING,
    grad_alignment: int = WIDEST,
) -> None:
    """Launch the squared norms and compare them; the gradients may lie anywhere."""
    _check_norms(memory, dtype, grads, "squared_norm", None, 0, 100, unscaling, grad_alignment)


def check_percentile_clipping(
    memory: Memory,
    dtype: str,
    grads: list[tuple[Array, int]],
    history: Array,
    step: int,
    percentile: int,
    unscaling: strategies.Unscaling = strategies.NO_UNSCALING,
) -> None:
    """Launch the clipping and compare histories and scales."""
    _check_norms(memory, dtype, grads, "percentile_clipping", history, step, percentile, unscaling)


def _check_norms(
    memory: Memory,
    dtype: str,
    grads: list[tuple[Array, int]],
    kind: str,
    history: Array | None,
    step: int,
    percentile: int,
    unscaling: strategies.Unscaling,
    grad_alignment: int = WIDEST,
) -> None:
    n = len(grads)
    sizes = np.array([array.size for array, _ in grads], np.int64)
    items = work_list(sizes, 4096, memory.resident_blocks)
    work = memory.put(items)
    places = [memory.put(*grad) for grad in grads]
    partials = [memory.put(np.full(-(-size // 4096), np.nan, np.float32)) for size in sizes]
    scales = [memory.put(np.full(1, np.nan, np.float32)) for _ in grads]
    steps = [memory.put(np.array([step], np.float32)) for _ in grads]
    histories = [memory.put(np.zeros(100, np.float32) if history is None else history) for _ in grads]

    def column(buffers: list[Buffer]) -> npt.NDArray[np.int64]:
        return np.array([buffer.address for buffer in buffers], np.int64)

    inv_scale, found_inf = _put_unscaling(memory, unscaling)
    words = table(
        np.zeros(6, np.float32),
        sizes,
        work=work.address,
        items=len(items),
        grads=column(places),
        steps=column(steps),
        scales=column(scales),
        gnorm_vecs=column(histories),
        partials=column(partials),
        percentile=percentile,
        inv_scale=0 if unscaling.grad_scale is None else inv_scale.address,
        found_inf=0 if unscaling.found_inf is None else found_inf.address,
    )
    place = memory.put(words)
    launch.partial_norms(dtype, place.address, len(items), 0, 0, grad_alignment)
    getattr(launch, kind)(place.address, n, 0, 0)
    for i, (grad, _) in enumerate(grads):
        squared = reference.squared_norm(grad, unscaling.inv_scale())
        if unscaling.found_inf:
            assert_same_bits(scales[i].read(), np.full(1, np.nan, np.float32), what="scale")
            assert_same_bits(histories[i].read(), np.zeros(100, np.float32) if history is None else history)
            continue
        if history is None:
            assert_same_bits(scales[i].read(), np.array([squared]), what="squared norm")
            continue
        with np.errstate(all="ignore"):
            new, _, _, scale = reference.percentile_clipping(history, squared, step + 1, percentile)
        assert_same_bits(scales[i].read(), np.array([scale], np.float32), what="scale")
        assert_same_bits(histories[i].read(), new, what="gnorm_vec")
        assert_same_bits(steps[i].read(), np.array([step], np.float32), what="step")
        assert_same_bits(places[i].read(), grad, what="grad")
        partials[i].read()


@st.composite
def gradients(draw: st.DrawFn, dtype: str, max_size: int, *, largest: tuple[int, ...] = ()) -> list[tuple[Array, int]]:
    """Gradients as (array, offset in bytes), sometimes one of the ``largest`` sizes."""
    sizes = draw(st.lists(strategies.sizes(max_size), min_size=1, max_size=3))
    if largest:
        sizes.append(draw(st.sampled_from(largest)))
    aligned = st.just(0)
    return [(draw(strategies.floats(dtype, size)), draw(aligned | strategies.offsets(dtype))) for size in sizes]


def histories() -> st.SearchStrategy[Array]:
    """Histories: empty, recorded, with equal values, and partly empty or not finite as a checkpoint may hold them."""

    def make(seed: int) -> Array:
        rng = np.random.default_rng(seed)
        history = rng.random(100, np.float32) * np.float32(10.0) ** rng.integers(-30, 30)
        if seed % 4 == 1:
            history = rng.choice(history[:3], 100)
        if seed % 4 == 2:
            history[rng.integers(0, 100, 30)] = 0
        if seed % 4 == 3:
            history[rng.integers(0, 100, 30)] = rng.choice([np.nan, np.inf, 1e-45], 30)
        return history.astype(np.float32)

    return st.just(np.zeros(100, np.float32)) | strategies.seeds().map(make)


def maps() -> st.SearchStrategy[Array]:
    """Ascending maps: the dynamic ones, random ones, and ones with few different entries."""

    def make(seed: int) -> Array:
        rng = np.random.default_rng(seed)
        if seed % 2:
            return np.sort(rng.choice(np.array([-1, -0.5, 0, 1e-3, 1], np.float32), 256))
        return np.sort(rng.uniform(-1, 1, 256).astype(np.float32))

    return st.sampled_from([QMAP, reference.create_dynamic_map(signed=False)]) | strategies.seeds().map(make)


def check_quantize_and_dequantize(
    memory: Memory, dtype: str, values: tuple[Array, int], block_size: int, qmap: Array
) -> None:
    """Quantize with any map and read back, comparing codes, absmax and values."""
    size = values[0].size
    blocks = -(-size // block_size)
    place = memory.put(*values)
    codes = memory.put(np.zeros(size, np.uint8), 1)
    absmax = memory.put(np.zeros(blocks, np.float32), 4)
    entries, thresholds = memory.put(qmap), memory.put(reference.quantize_thresholds(qmap))
    launch.quantize_blockwise(
        dtype, place.address, codes.address, absmax.address, size, thresholds.address, block_size, 0, 0
    )
    expected_codes, expected_absmax = reference.quantize_blockwise(values[0], qmap, block_size)
    assert_same_bits(absmax.read(), expected_absmax, what="absmax")
    inputs = {"values": values[0], "qmap": qmap, "block_size": block_size}
    assert_same_bits(codes.read(), expected_codes, what="codes", block_size=block_size, inputs=inputs)
    assert_same_bits(place.read(), values[0], what="values")
    launch.dequantize_blockwise(
        dtype, codes.address, absmax.address, place.address, size, entries.address, block_size, 0, 0
    )
    with np.errstate(all="ignore"):
        expected = reference.dequantize_blockwise(expected_codes, expected_absmax, qmap, block_size)
        assert_same_bits(place.read(), expected.astype(values[0].dtype), what="dequantized")


def check_widening(memory: Memory, dtype: str) -> None:
    """Read all 65,536 values of a 16-bit dtype: with beta2 = 0 the new momentum is the gradient."""
    grad = np.arange(1 << 16, dtype=np.uint16).view(strategies.FLOAT_DTYPES[dtype])
    for offset in (0, 2):  # by eight, and one at a time
        tensor = _tensor(np.zeros_like(grad), grad, offset, momentum=np.full(grad.size, -0.0, np.float32))
        check_update(memory, "update_32bit", Kinds(dtype, dtype), [tensor], (0.0, (0.0, 0.0), 0.0), False)


def check_rounding(
    memory: Memory, dtype: str, values: npt.NDArray[np.float32], expected: npt.NDArray[np.uint16]
) -> None:
    """Round float32 values to a 16-bit dtype: the code of 1, with each value as the absmax of a block of its own."""
    codes, absmax = memory.put(np.full(values.size, 255, np.uint8)), memory.put(values)
    entries, found = memory.put(QMAP), memory.put(np.zeros(values.size, np.uint16))
    launch.dequantize_blockwise(
        dtype, codes.address, absmax.address, found.address, values.size, entries.address, 1, 0, 0
    )
    conversions.assert_patterns(found.read(), expected, dtype)


def check_rounding_of_parameters(memory: Memory, dtype: str) -> None:
    """Halve every value, and take three quarters of it, in an update: all ties of denormals, and bits to round off."""
    param = np.arange(1 << 16, dtype=np.uint16).view(strategies.FLOAT_DTYPES[dtype])
    for weight_decay in (0.5, 0.25, 2.0**-9 + 2.0**-20):
        tensor = _tensor(param, np.zeros_like(param), momentum=np.zeros(param.size, np.float32))
        check_update(memory, "update_32bit", Kinds(dtype, dtype), [tensor], (1.0, (0.9, 0.99), weight_decay), False)


def check_codes_come_back(memory: Memory, absmax: npt.NDArray[np.float32]) -> None:
    """Dequantize and quantize again all 256 codes with each of some absmax values."""
    codes = np.tile(np.arange(256, dtype=np.uint8), absmax.size)
    with np.errstate(all="ignore"):
        values = reference.dequantize_blockwise(codes, absmax, QMAP, 256)
    check_quantize_and_dequantize(memory, "float32", (values, 0), 256, QMAP)
    tensor = _tensor(np.zeros_like(values), np.zeros_like(values), codes=codes, absmax=absmax)
    # A beta2 just below 1 is 1 in float32: the update only dequantizes and quantizes.
    check_update(memory, "update_8bit_blockwise", FLOAT32, [tensor], (0.0, (0.0, 1 - 2.0**-53), 0.0), False)

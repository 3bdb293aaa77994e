"""Compare every kernel with the reference, bit for bit, on the devices of this machine.

Optimizers and functions run through the public API on the CPU and on every CUDA GPU, and the same calculation is done
with the functions of :mod:`lion.reference`. The first value whose bits differ is named and ends the check with exit
code 1. The last line says what was compared, and what was not.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.text import Text
from torch import Tensor, nn

from lion import functional, reference
from lion._backends import DTYPES, as_numpy, use_backend
from lion._cli import (
    add_json,
    device_name,
    no_gpu,
    print_json,
    print_line,
    print_table,
    progress_bars,
)
from lion.cuda_kernels import simulator
from lion.optimizers import Lion
from lion.reference.clipping import HISTORY
from lion.reference.rounding import LOW_DTYPES, Weights

EXAMPLES = """\
python -m lion check
python -m lion check --simulator
python -m lion check --json > check.json"""

Array = npt.NDArray[Any]

_NUMPY_DTYPES: dict[torch.dtype, npt.DTypeLike] = {
    torch.float32: np.float32,
    torch.float16: np.float16,
    torch.bfloat16: ml_dtypes.bfloat16,
}
_QMAP = reference.create_dynamic_map()
_PADDING = 8


class Extent(NamedTuple):
    """How much is compared; the simulator is a million times slower than a GPU."""

    sizes: tuple[int, ...]
    large: int
    steps: int
    clipped_sizes: tuple[int, ...]
    clipped_steps: int
    block_sizes: tuple[int, ...]


FULL = Extent((1, 2, 7, 255, 256, 257, 4095, 4096, 4097), 100_003, 5, (1, 257, 5001), 110, functional.BLOCK_SIZES)
SIMULATED = Extent((1, 257), 513, 2, (257,), 3, (64,))


class Target(NamedTuple):
    """A device to check.

    Attributes:
        name: What to call it.
        device: Where the tensors are.
        extent: How much to compare.
        backend: Makes the context in which the device's kernels are used.
    """

    name: str
    device: torch.device
    extent: Extent
    backend: Callable[[], AbstractContextManager[None]]


class Difference(Exception):
    """A value whose bits are not those of the reference."""


Check = Callable[[Target, torch.dtype], Iterator[int]]
Gradients = Callable[[int, int], Array]
Recipe = Callable[[np.random.Generator, int, torch.dtype], Array]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.add_argument(
        "--simulator",
        action="store_true",
        help="check the CUDA kernels in Numba's simulator instead: slow, on few values, and needs no GPU",
    )
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Carry the command out and return its exit code."""
    if options.simulator and not simulator.asked_for():
        # Numba reads the variable when it is imported, which has happened already.
        command = [sys.executable, "-m", "lion", "check", "--simulator", *["--json"] * options.json]
        # Ctrl-C reaches both processes: the other one says so and ends.
        before = signal.signal(signal.SIGINT, lambda *_: None)
        try:
            return subprocess.run(command, env=simulator.environment()).returncode
        finally:
            signal.signal(signal.SIGINT, before)

    targets = _targets(options.simulator)
    results: list[dict[str, Any]] = []
    difference, verdict = None, "OK"
    with progress_bars() as progress:
        cells = [(feature, dtype) for feature in CHECKS for dtype in DTYPES if _takes(feature, dtype)]
        bar = progress.add_task("", total=len(targets) * len(cells))
        for target, (feature, dtype) in ((target, cell) for target in targets for cell in cells):
            progress.update(bar, description=f"{target.name}, {feature}, {DTYPES[dtype]}")
            result: dict[str, Any] = {"device": target.name, "feature": feature, "dtype": DTYPES[dtype]}
            results.append(result)
            begin = time.perf_counter()
            try:
                with target.backend(), np.errstate(all="ignore"):
                    result["values"] = sum(CHECKS[feature](target, dtype))
            except (Difference, RuntimeError, ValueError, OSError) as error:
                difference = f"{target.name}, {feature}, {DTYPES[dtype]}: {error}"
                verdict = "DIFFERENCE" if isinstance(error, Difference) else "FAILED"
                break
            result["seconds"] = round(time.perf_counter() - begin, 3)
            progress.advance(bar)

    not_checked = "CPU and GPUs" if options.simulator else f"CUDA: {no_gpu()}" if no_gpu() else None
    values = sum(result.get("values", 0) for result in results)
    if options.json:
        report = {"passed": difference is None, "difference": difference, "values": values, "not_checked": not_checked}
        print_json({**report, "results": results})
        return 1 if difference else 0
    _print_tables(targets, results)
    if difference:
        Console(stderr=True).print(Text(f"{verdict}: {difference}", "red"), soft_wrap=True)
        return 1
    what, _, why = (not_checked or "").partition(": ")
    missing = f"; {what} not checked" * bool(what) + f": {why} (try --simulator)" * bool(why)
    print_line(f"{verdict}: {_rounded(values)} values, 0 differences{missing}", "green")
    return 0


def _takes(feature: str, dtype: torch.dtype) -> bool:
    return dtype == torch.bfloat16 or not feature.endswith(tuple(WAYS_OF_KEEPING))


def _targets(simulator: bool) -> list[Target]:
    cpu = torch.device("cpu")
    if simulator:
        return [Target("CUDA kernels in the simulator", cpu, SIMULATED, lambda: use_backend("cuda"))]
    gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return [
        Target("cpu", cpu, FULL, lambda: use_backend("cpu")),
        *(Target(device_name(gpu), gpu, FULL, nullcontext) for gpu in gpus),
    ]


def _rounded(count: int) -> str:
    """Return a number of values in at most six characters."""
    for unit, name in ((1_000_000, " M"), (1_000, " K")):
        if count >= unit:
            return f"{count / unit:.{0 if count >= 10 * unit else 1}f}{name}"
    return str(count)


def _print_tables(targets: list[Target], results: list[dict[str, Any]]) -> None:
    for target in targets:
        cells = {(r["feature"], r["dtype"]): r for r in results if r["device"] == target.name}
        if not cells:
            continue
        seconds = sum(r.get("seconds", 0) for r in cells.values())
        print_line(f"{target.name}: values compared, {seconds:.0f} s", "bold")
        rows = []
        for feature in CHECKS:
            row = [cells.get((feature, name)) for name in DTYPES.values()]
            marks = ("" if r is None else f"{_rounded(r['values'])} ✓" if "values" in r else "✗" for r in row)
            rows.append((feature, *marks))
        print_table(("feature", *DTYPES.values()), rows)
        print_line("")


def _compare(what: str, actual: Tensor, expected: Array | np.generic, block_size: int = reference.BLOCK_SIZE) -> int:
    """Return the number of values, or raise Difference at the first one whose bits differ; NaN equals NaN."""
    found, wanted = as_numpy(actual.detach().cpu().contiguous()).reshape(-1), np.asarray(expected).reshape(-1)
    if found.dtype != wanted.dtype or found.size != wanted.size:
        raise Difference(f"{what}: {found.size} {found.dtype}, expected {wanted.size} {wanted.dtype}")
    found_bits, wanted_bits = found.view(f"u{found.itemsize}"), wanted.view(f"u{wanted.itemsize}")
    differs = found_bits != wanted_bits
    if differs.any() and found.dtype != np.uint8:
        differs &= ~(np.isnan(found) & np.isnan(wanted))
    if differs.any():
        i, digits = int(differs.argmax()), 2 * found.itemsize
        raise Difference(
            f"{what}: element {i} (block {i // block_size}) is 0x{found_bits[i]:0{digits}x} = {found[i]}, "
            f"expected 0x{wanted_bits[i]:0{digits}x} = {wanted[i]}; {differs.sum()} of {found.size} differ"
        )
    return found.size


def _normal(rng: np.random.Generator, size: int, dtype: torch.dtype) -> Array:
    return (rng.standard_normal(size) * 10.0 ** rng.uniform(-4, 0)).astype(_NUMPY_DTYPES[dtype])


def _any_bits(rng: np.random.Generator, size: int, dtype: torch.dtype) -> Array:
    bits = f"u{dtype.itemsize}"
    return rng.integers(0, 256**dtype.itemsize, size, bits).view(_NUMPY_DTYPES[dtype])


def _denormal(rng: np.random.Generator, size: int, dtype: torch.dtype) -> Array:
    tiny = torch.finfo(dtype).tiny
    return (rng.uniform(-2, 2, size) * tiny).astype(_NUMPY_DTYPES[dtype])


def _special(rng: np.random.Generator, size: int, dtype: torch.dtype) -> Array:
    limits = torch.finfo(dtype)
    values = [0.0, -0.0, 1.0, np.inf, -np.inf, np.nan, limits.tiny, -limits.smallest_normal / 2, limits.max, limits.min]
    return rng.choice(np.array(values, np.float64), size).astype(_NUMPY_DTYPES[dtype])


_RECIPES = (_normal, _any_bits, _denormal, _special)


class _Copy:
    """A parameter on the device, at an odd offset in a larger buffer, and its copy that the reference moves."""

    def __init__(
        self,
        target: Target,
        values: Array,
        number: int,
        dtype: torch.dtype,
        grad_alignment: int,
        master_bits: int | None,
        seed: int | None,
    ) -> None:
        self.expected, self.number, self.seed = values, number, seed
        self.low = None if master_bits is None else np.zeros(values.size, LOW_DTYPES[master_bits])
        self.buffers = [torch.ones(values.size + _PADDING, dtype=dtype, device=target.device) for _ in range(2)]
        self.offsets = number % _PADDING, grad_alignment // dtype.itemsize % _PADDING
        param, self.gradient = (
            buffer[offset : offset + values.size] for buffer, offset in zip(self.buffers, self.offsets, strict=True)
        )
        param.copy_(_tensor(values, dtype))
        self.param = nn.Parameter(param)
        self.param.grad = self.gradient
        self.steps = 0
        self.history = np.zeros(HISTORY, np.float32)
        self.momentum: Array = np.zeros(values.size, np.float32)
        self.absmax = np.zeros(0, np.float32)

    def begin_8bit(self, blocks: int) -> None:
        """Give the copy 8-bit momentum."""
        self.momentum = np.full(self.expected.size, np.flatnonzero(_QMAP == 0)[0], np.uint8)
        self.absmax = np.zeros(blocks, np.float32)

    def _weights(self) -> Weights:
        if self.low is not None:
            return reference.Master(self.low)
        return None if self.seed is None else reference.Stochastic(self.seed, self.steps, self.number)

    def step(
        self, grad: Array, k: reference.Coefficients, absmax_key: str, percentile: int, inv_scale: np.float32
    ) -> None:
        """Move the copy and set the parameter's gradient."""
        self.steps += 1
        self.gradient.copy_(_tensor(grad, self.gradient.dtype))
        scale = np.float32(1)
        if percentile < HISTORY:
            norm = reference.squared_norm(grad, inv_scale)
            self.history, _, _, scale = reference.percentile_clipping(self.history, norm, self.steps, percentile)
        if not absmax_key:
            self.expected, self.momentum, *low = reference.update_32bit(
                self.expected, grad, self.momentum, k, scale, inv_scale, self._weights()
            )
        else:
            update = reference.update_8bit_blockwise if absmax_key == "absmax1" else reference.update_8bit_tensorwise
            more: dict[str, Any] = {"inv_scale": inv_scale, "weights": self._weights()}
            self.expected, self.momentum, self.absmax, *low = update(
                self.expected, grad, self.momentum, self.absmax, _QMAP, k, scale, **more
            )
        if low:
            self.low = low[0]

    def compare(self, what: str, state: dict[str, Tensor], grad: Array, absmax_key: str) -> Iterator[int]:
        """Compare everything that the step may have changed, and what it may not."""
        yield _compare(f"{what}, parameter", self.param, self.expected)
        yield _compare(f"{what}, state1", state["state1"], self.momentum)
        if absmax_key:
            yield _compare(f"{what}, {absmax_key}", state[absmax_key], self.absmax, block_size=1)
        if self.low is not None:
            yield _compare(f"{what}, master_low", state["master_low"], self.low)
        if "gnorm_vec" in state:
            yield _compare(f"{what}, gnorm_vec", state["gnorm_vec"], self.history)
        yield _compare(f"{what}, step", state["step"], np.float32(self.steps))
        yield _compare(f"{what}, gradient", self.gradient, grad)
        for buffer, offset in zip(self.buffers, self.offsets, strict=True):
            around = torch.cat([buffer[:offset], buffer[offset + grad.size :]])
            yield _compare(f"{what}, memory around it", around, _ones(_PADDING, buffer.dtype))


def _tensor(values: Array, dtype: torch.dtype) -> Tensor:
    tensor = torch.empty(values.shape, dtype=dtype)
    as_numpy(tensor)[...] = values
    return tensor


def _ones(count: int, dtype: torch.dtype) -> Array:
    return np.ones(count, _NUMPY_DTYPES[dtype])


def _follow(
    target: Target,
    dtype: torch.dtype,
    members: Sequence[tuple[int, Gradients]],
    steps: int,
    loss_scale: float | None = None,
    grad_alignment: int = 16,
    **options: Any,
) -> Iterator[int]:
    """Step parameters through the optimizer and through the reference, comparing after each step.

    Args:
        target: Where.
        dtype: dtype of the parameters.
        members: For each parameter its size, and what returns its gradient for a step and a size; step 0 gives the
            initial values.
        steps: Number of steps.
        loss_scale: Factor of the loss that the steps undo, as with a GradScaler (default: none).
        grad_alignment: Bytes that the gradients' addresses are multiples of: 16 (default) or, as in a bucket, fewer.
        options: Arguments of the optimizer.
    """
    hyper = {"lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.0, **options}
    k = reference.coefficients(hyper["lr"], hyper["betas"], hyper["weight_decay"])
    absmax_key = "" if options["optim_bits"] == 32 else "absmax1" if options.get("block_wise", True) else "max1"
    master_bits, seed = options.get("master_weight_bits"), options.get("rounding_seed")
    copies = [
        _Copy(target, make(0, n), i, dtype, grad_alignment, master_bits, seed) for i, (n, make) in enumerate(members)
    ]
    for (n, _), copy in zip(members, copies, strict=True):
        if absmax_key:
            copy.begin_8bit(1 if absmax_key == "max1" else -(-n // reference.BLOCK_SIZE))
    optimizer: Any = Lion([copy.param for copy in copies], min_8bit_size=0, **hyper)
    inv_scale = np.float32(1)
    if loss_scale is not None:
        optimizer.grad_scale = torch.tensor(loss_scale, device=target.device)
        optimizer.found_inf = torch.zeros((), device=target.device)
        inv_scale /= np.float32(loss_scale)
    for step in range(1, steps + 1):
        grads = [make(step, n) for n, make in members]
        for copy, grad in zip(copies, grads, strict=True):
            copy.step(grad, k, absmax_key, options.get("percentile_clipping", HISTORY), inv_scale)
        optimizer.step()
        for (n, _), copy, grad in zip(members, copies, grads, strict=True):
            what = f"step {step}, {n} elements, offset {copy.param.storage_offset()}"
            yield from copy.compare(what, optimizer.state[copy.param], grad, absmax_key)


def _update(**options: Any) -> Check:
    """Return a check of the update over all sizes and all kinds of values."""

    def check(target: Target, dtype: torch.dtype) -> Iterator[int]:
        extent, rng = target.extent, np.random.default_rng(0)

        def made_by(recipe: Recipe) -> Gradients:
            return lambda step, n: recipe(rng, n, dtype)

        members = [(n, made_by(recipe)) for n in extent.sizes for recipe in _RECIPES]
        members.append((extent.large, made_by(_normal)))
        yield from _follow(target, dtype, members, extent.steps, **options)

    return check


def _in_buckets(**options: Any) -> Check:
    """Return a check of the update with gradients that lie as views of a bucket do."""

    def check(target: Target, dtype: torch.dtype) -> Iterator[int]:
        for grad_alignment in (8, 4, 2):
            if grad_alignment >= dtype.itemsize:
                yield from _update(grad_alignment=grad_alignment, **options)(target, dtype)

    return check


def _clipped(**options: Any) -> Check:
    """Return a check of the update with percentile clipping: past the history's end, zero and NaN gradients."""

    def check(target: Target, dtype: torch.dtype) -> Iterator[int]:
        extent, rng = target.extent, np.random.default_rng(1)

        def finite(step: int, n: int) -> Array:
            return np.zeros_like(_normal(rng, n, dtype)) if step % 7 == 2 else _normal(rng, n, dtype)

        def with_nan(step: int, n: int) -> Array:
            grad = finite(step, n)
            if step % 50 == 3:
                grad[n // 2] = np.nan
            return grad

        members = [(n, make) for n in extent.clipped_sizes for make in (finite, with_nan)]
        yield from _follow(target, dtype, members, extent.clipped_steps, percentile_clipping=10, **options)

    return check


def _paged(target: Target, dtype: torch.dtype) -> Iterator[int]:
    rng = np.random.default_rng(2)
    members = [(target.extent.large, lambda step, n: _normal(rng, n, dtype))]
    yield from _follow(target, dtype, members, target.extent.steps, optim_bits=8, is_paged=True)


def _quantize(target: Target, dtype: torch.dtype) -> Iterator[int]:
    for what, values, tensor, qmap, code, block_size in _blocks(target, dtype):
        codes, state = functional.quantize_blockwise(tensor, code=code, blocksize=block_size)
        expected_codes, expected_absmax = reference.quantize_blockwise(values, qmap, block_size)
        yield _compare(f"{what}, absmax", state.absmax, expected_absmax, block_size=1)
        yield _compare(f"{what}, codes", codes, expected_codes, block_size)


def _dequantize(target: Target, dtype: torch.dtype) -> Iterator[int]:
    for what, values, _, qmap, code, block_size in _blocks(target, dtype):
        codes, absmax = reference.quantize_blockwise(values, qmap, block_size)
        expected = reference.dequantize_blockwise(codes, absmax, qmap, block_size).astype(_NUMPY_DTYPES[dtype])
        on_device = [torch.from_numpy(a).to(target.device) for a in (codes, absmax)]
        state = functional.QuantState(on_device[1], code, block_size, dtype)
        yield _compare(what, functional.dequantize_blockwise(on_device[0], state), expected, block_size)


def _blocks(target: Target, dtype: torch.dtype) -> Iterator[tuple[str, Array, Tensor, Array, Tensor, int]]:
    rng = np.random.default_rng(3)
    for signed in (True, False):
        qmap = reference.create_dynamic_map(signed)
        code = torch.from_numpy(qmap).to(target.device)
        for block_size in target.extent.block_sizes:
            for size in (1, block_size, 5 * block_size + 1):
                for recipe in _RECIPES:
                    values = recipe(rng, size, dtype)
                    what = f"{size} elements in blocks of {block_size}, {'signed' if signed else 'unsigned'} map"
                    yield what, values, _tensor(values, dtype).to(target.device), qmap, code, block_size


def _norms(target: Target, dtype: torch.dtype) -> Iterator[int]:
    rng = np.random.default_rng(4)
    for n in (*target.extent.sizes, target.extent.large):
        gnorm_vec, history = torch.zeros(HISTORY, device=target.device), np.zeros(HISTORY, np.float32)
        for step, recipe in enumerate((*_RECIPES, _normal, _normal), start=1):
            grad = recipe(rng, n, dtype)
            found = functional.percentile_clipping(_tensor(grad, dtype).to(target.device), gnorm_vec, step, 50)
            history, *expected = reference.percentile_clipping(history, reference.squared_norm(grad), step, 50)
            for name, actual, wanted in zip(("norm", "threshold", "scale"), found, expected, strict=True):
                yield _compare(f"step {step}, {n} elements, {name}", actual, wanted)
            yield _compare(f"step {step}, {n} elements, gnorm_vec", gnorm_vec, history)


# How bfloat16 weights can be kept besides rounded to nearest.
WAYS_OF_KEEPING: dict[str, dict[str, Any]] = {
    "24 master bits": {"master_weight_bits": 24},
    "32 master bits": {"master_weight_bits": 32},
    "stochastic rounding": {"stochastic_rounding": True, "rounding_seed": 2**63 + 1},
}


def _kept(name: str, **options: Any) -> dict[str, Check]:
    """Return a check of each way of keeping 16-bit weights."""
    ways = WAYS_OF_KEEPING.items()
    return {f"{name}, {title}": _update(weight_decay=0.1, **way, **options) for title, way in ways}


CHECKS: dict[str, Check] = {
    "32-bit": _update(optim_bits=32),
    "32-bit, weight decay": _update(optim_bits=32, weight_decay=0.1),
    "32-bit, percentile clipping": _clipped(optim_bits=32),
    "32-bit, scaled loss": _update(optim_bits=32, loss_scale=1536.0),
    "32-bit, gradients in buckets": _in_buckets(optim_bits=32),
    **_kept("32-bit", optim_bits=32),
    "8-bit blockwise": _update(optim_bits=8),
    "8-bit blockwise, weight decay": _update(optim_bits=8, weight_decay=0.1),
    "8-bit blockwise, percentile clipping": _clipped(optim_bits=8),
    "8-bit blockwise, scaled loss": _update(optim_bits=8, loss_scale=1536.0),
    "8-bit blockwise, scaled loss, clipping": _clipped(optim_bits=8, loss_scale=1536.0),
    "8-bit blockwise, paged": _paged,
    "8-bit blockwise, gradients in buckets": _in_buckets(optim_bits=8),
    **_kept("8-bit blockwise", optim_bits=8),
    "8-bit tensor-wise": _update(optim_bits=8, block_wise=False),
    "8-bit tensor-wise, weight decay": _update(optim_bits=8, block_wise=False, weight_decay=0.1),
    "8-bit tensor-wise, percentile clipping": _clipped(optim_bits=8, block_wise=False),
    "8-bit tensor-wise, scaled loss": _update(optim_bits=8, block_wise=False, loss_scale=1536.0),
    "8-bit tensor-wise, gradients in buckets": _in_buckets(optim_bits=8, block_wise=False),
    **_kept("8-bit tensor-wise", optim_bits=8, block_wise=False),
    "functional.quantize_blockwise": _quantize,
    "functional.dequantize_blockwise": _dequantize,
    "functional.percentile_clipping": _norms,
}

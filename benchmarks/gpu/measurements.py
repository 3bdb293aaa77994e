"""What is measured beside the benchmark: ``python -m benchmarks.gpu.measurements NAME --out FILE``.

The file is JSON, written again after every row. On a CPU everything is as small as it can be.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.gpu.variants import VARIANTS
from benchmarks.machine import machine
from benchmarks.peers import BETAS, LR, WEIGHT_DECAY
from lion import Lion, Lion8bit, PagedLion8bit
from lion._cli import measure, overview
from lion._cli.check import WAYS_OF_KEEPING
from lion._cli.measure import Workload
from lion.cuda_kernels import launch
from lion.cuda_kernels.tuning import DEFAULT, Tuning

Row = dict[str, Any]

DTYPES = (torch.float32, torch.bfloat16)
ARGUMENTS: dict[str, Any] = {"lr": LR, "betas": BETAS, "weight_decay": WEIGHT_DECAY}
CARD = "name,driver_version,memory.total,clocks.max.sm,clocks.max.memory,power.limit"
SMALL = 600
HASHED = 1 << 22


class Kind(NamedTuple):
    """A kind of update.

    Attributes:
        name: What to call it.
        options: Arguments of the optimizer.
        state_itemsize: Bytes of momentum per element.
        low_itemsize: Bytes of master values beyond the parameter, per element.
        reads_twice: Whether gradients and momentum are read twice.
    """

    name: str
    options: dict[str, Any]
    state_itemsize: int
    low_itemsize: int = 0
    reads_twice: bool = False

    def traffic(self, params: list[nn.Parameter]) -> int:
        """Return the bytes that a step has to move."""
        more = sum(
            p.numel() * (2 * self.low_itemsize + self.reads_twice * (p.element_size() + self.state_itemsize))
            for p in params
        )
        return measure.traffic(params, self.state_itemsize) + more


LION = Kind("Lion", {"optim_bits": 32}, 4)
LION_8BIT = Kind("Lion8bit", {"optim_bits": 8, "min_8bit_size": 0}, 1)
TENSOR_WISE = Kind("Lion8bit, tensor-wise", {**LION_8BIT.options, "block_wise": False}, 1, reads_twice=True)


def _kinds(dtype: torch.dtype) -> Iterator[Kind]:
    yield from (LION, LION_8BIT, TENSOR_WISE)
    if dtype == torch.bfloat16:
        for kind in (LION, LION_8BIT):
            for title, options in WAYS_OF_KEEPING.items():
                low = options.get("master_weight_bits", 16) // 8 - 2
                yield kind._replace(name=f"{kind.name}, {title}", options={**kind.options, **options}, low_itemsize=low)


class Contestant(NamedTuple):
    """An optimizer that has taken a first step.

    Attributes:
        optimizer: The optimizer.
        params: Its parameters.
        kind: Its kind of update.
        bits: A hash of what its steps gave; two runs with the same hash agree.
        tuning: How the kernels are made.
    """

    optimizer: Lion
    params: list[nn.Parameter]
    kind: Kind
    bits: str = ""
    tuning: Tuning = DEFAULT

    def step(self) -> None:
        """Take a step."""
        launch.TUNING = self.tuning
        self.optimizer.step()


def _contestant(params: list[nn.Parameter], kind: Kind, tuning: Tuning = DEFAULT) -> Contestant:
    contestant = Contestant(Lion(params, **ARGUMENTS, **kind.options), params, kind, tuning=tuning)
    for _ in range(2):
        contestant.step()
    state = contestant.optimizer.state[params[0]]
    return contestant._replace(bits=_hash([params[0], *state.values()]))


def _hash(tensors: list[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().reshape(-1)[:HASHED].cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


def kernels(device: torch.device) -> Iterator[Row]:
    """One tensor beyond any cache by every kind of update, then one whose gradient begins where no wide access can."""
    large, smaller = (1 << 28, 1 << 26) if device.type == "cuda" else (SMALL, SMALL)
    for dtype in DTYPES:
        for kind in _kinds(dtype):
            params = measure.make_params(Workload("", [(large,)]), dtype, device)
            yield from _timed({kind.name: _contestant(params, kind)}, dtype, device)
            del params
    for dtype in DTYPES:
        for kind in (LION, LION_8BIT):
            yield from _timed(
                {
                    f"{kind.name}, gradient {offset} bytes off": _contestant(
                        _with_gradient_off(offset, smaller, dtype, device), kind
                    )
                    for offset in (0, 8, dtype.itemsize)
                },
                dtype,
                device,
            )


def variants(device: torch.device) -> Iterator[Row]:
    """One tensor beyond any cache, by every variant of the kernels in turns."""
    for dtype in DTYPES:
        for kind in (LION, LION_8BIT):
            params = measure.make_params(Workload("", [(1 << 28 if device.type == "cuda" else SMALL,)]), dtype, device)
            values, contestants = params[0].detach().clone(), {}
            for name, tuning in VARIANTS.items():
                params[0].data.copy_(values)
                contestants[f"{kind.name}, {name}"] = _contestant(params, kind, tuning)
            yield from _timed(contestants, dtype, device)
            del params, values, contestants


def _with_gradient_off(offset: int, size: int, dtype: torch.dtype, device: torch.device) -> list[nn.Parameter]:
    """Return a parameter whose gradient lies as in a bucket of several: so many bytes off a multiple of 16."""
    params = measure.make_params(Workload("", [(size,)]), dtype, device)
    first, grad = offset // dtype.itemsize, params[0].grad
    assert grad is not None
    params[0].grad = torch.zeros(first + size, dtype=dtype, device=device)[first:].copy_(grad)
    return params


def paged(device: torch.device) -> Iterator[Row]:
    """Paged 8-bit state that fits into the GPU's memory, and twice as much as fits."""
    shapes: list[tuple[int, ...]] = [(1 << 27,)] * 16 if device.type == "cuda" else [(SMALL,)]
    params = measure.make_params(Workload("", shapes), torch.bfloat16, device)
    optimizers = {cls.__name__: cls(params, **ARGUMENTS, min_8bit_size=0) for cls in (Lion8bit, PagedLion8bit)}
    for optimizer in optimizers.values():
        optimizer.step()
    yield from _timed(
        {name: Contestant(optimizer, params, LION_8BIT) for name, optimizer in optimizers.items()},
        torch.bfloat16,
        device,
    )
    if device.type != "cuda":
        return
    optimizers.clear()
    del optimizer
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    state = sum(p.numel() for p in params)
    taken = torch.empty(torch.cuda.mem_get_info()[0] - state // 2, dtype=torch.uint8, device=device)
    optimizer = PagedLion8bit(params, **ARGUMENTS, min_8bit_size=0)
    optimizer.step()
    # Without the copy that others are compared with, for which there is no room.
    times = measure.in_turns({"step": measure.timer(optimizer.step, device)}, 3)
    traffic, seconds = LION_8BIT.traffic(params), measure.summary(times["step"])
    yield _row("PagedLion8bit, half of the state fits", torch.bfloat16, traffic, seconds)
    del taken


def _timed(contestants: dict[str, Contestant], dtype: torch.dtype, device: torch.device) -> Iterator[Row]:
    """Time optimizers, in turns with a copy of as many bytes as the first has to move."""
    first = next(iter(contestants.values()))
    copy = measure.bound(first.params, first.kind.state_itemsize)
    copy()
    timers = {name: measure.timer(contestant.step, device) for name, contestant in contestants.items()}
    timers["copy"] = measure.timer(copy, device)
    times = measure.in_turns(timers, 15 if device.type == "cuda" else 1)
    per_second = measure.traffic(first.params, first.kind.state_itemsize) / measure.summary(times["copy"]).median
    for name, contestant in contestants.items():
        traffic, seconds = contestant.kind.traffic(contestant.params), measure.summary(times[name])
        share = traffic / seconds.median / per_second
        yield _row(name, dtype, traffic, seconds, share_of_copy=share, bits=contestant.bits)


def _row(name: str, dtype: torch.dtype, traffic: int, seconds: measure.Summary, **more: Any) -> Row:
    ms = {key: 1e3 * value for key, value in seconds._asdict().items()}
    return {"what": f"{name}, {str(dtype)[6:]}", "ms": ms, "gb_per_s": traffic / seconds.median / 1e9, **more}


def card(device: torch.device) -> dict[str, Any]:
    """Return versions, devices and what the driver says of the card."""
    found, benchmark = overview.found(), machine(device)
    told = ""
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", f"--query-gpu={CARD}", "--format=csv"]
        told = subprocess.run(command, capture_output=True, text=True).stdout
    versions = {**found["versions"], **benchmark["versions"], "CUDA of torch": torch.version.cuda}
    return {**found, **benchmark, "versions": versions, "nvidia-smi": told.splitlines()}


MEASUREMENTS: dict[str, Callable[[torch.device], Iterator[Row]]] = {
    "kernels": kernels,
    "variants": variants,
    "paged": paged,
}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.measurements", description=(__doc__ or "").strip())
    parser.add_argument("name", choices=["card", *MEASUREMENTS])
    parser.add_argument("--device", default="cuda", help="cuda or cpu (default: cuda)")
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    options = parser.parse_args()
    device = torch.device(options.device)
    if options.name == "card":
        options.out.write_text(json.dumps(card(device), indent=1))
        return
    rows: list[Row] = []
    for row in MEASUREMENTS[options.name](device):
        rows.append(row)
        print(json.dumps(row), flush=True)
        options.out.write_text(json.dumps({"rows": rows}, indent=1))


if __name__ == "__main__":
    main()

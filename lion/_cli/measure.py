"""Timing optimizers fairly: in turns, on the same tensors, against what the memory could do."""

from __future__ import annotations

import ctypes
import functools
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lion.cpu_kernels.device import INTEGER, TABLE, kernel, load, store
from lion.cpu_kernels.pool import enter, leave, pull, run

Step = Callable[[], object]
Timer = Callable[[], float]

STREAM_CHUNK, STREAM_TILE = 16384, 4096
OTHER_BYTES = 1 << 28
CLEAR_PEAK = "5"
# Clock cycles of a GPU, about 3 ms: a step whose host work takes longer shows it.
HEAD_START = 5_000_000


class Workload(NamedTuple):
    """Tensors to step.

    Attributes:
        title: What to call them in a table.
        shapes: Their shapes.
    """

    title: str
    shapes: list[tuple[int, ...]]

    @property
    def elements(self) -> int:
        """Elements in all tensors."""
        return sum(torch.Size(shape).numel() for shape in self.shapes)


class Summary(NamedTuple):
    """Median and quartiles of times in seconds."""

    median: float
    low: float
    high: float


def gpt2_small_shapes() -> list[tuple[int, ...]]:
    """Return the shapes of GPT-2 small's 148 parameters, 124 million elements."""
    d = 768
    block: list[tuple[int, ...]] = [(d,), (d,), (d, 3 * d), (3 * d,), (d, d), (d,)]
    block += [(d,), (d,), (d, 4 * d), (4 * d,), (4 * d, d), (d,)]
    return [(50257, d), (1024, d), *block * 12, (d,), (d,)]


WORKLOADS = {
    "one": Workload("one tensor of 16M elements", [(1 << 24,)]),
    "gpt2": Workload("GPT-2 small, 148 tensors, 124M elements", gpt2_small_shapes()),
    "thirty": Workload("30 tensors, 1M elements", [(33_333,)] * 30),
    "many": Workload("1,000 tensors of 1,000 elements", [(1000,)] * 1000),
}


def make_params(workload: Workload, dtype: torch.dtype, device: torch.device) -> list[nn.Parameter]:
    """Return random parameters, of standard deviation 0.02, with random gradients."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(shape: tuple[int, ...]) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * 0.02).to(dtype)

    params = [nn.Parameter(normal(shape)) for shape in workload.shapes]
    for p in params:
        p.grad = normal(tuple(p.shape))
    return params


def traffic(params: Iterable[Tensor], state_itemsize: int) -> int:
    """Return the bytes a Lion step has to move: it reads the gradients, and reads and writes the rest.

    Args:
        params: The parameters, with gradients of their dtype.
        state_itemsize: Bytes of momentum per element: 4, or 1 with a float32 absmax per 256 elements.
    """
    absmax = 8 / 256 if state_itemsize == 1 else 0
    return sum(int(p.numel() * (3 * p.element_size() + 2 * state_itemsize + absmax)) for p in params)


def bound(params: list[nn.Parameter], state_itemsize: int) -> Step:
    """Return a step that moves the bytes of a Lion step and does nothing else: the bound that memory sets.

    On a CPU it changes buffers of the parameters' and the state's sizes in place, reading the gradients, in as many
    threads as torch uses. On a GPU it copies half as many bytes, so that as many are read and written.

    Args:
        params: The parameters, with gradients.
        state_itemsize: Bytes of momentum per element, 4 or 1.
    """
    device = params[0].device
    if device.type == "cuda":
        source = torch.zeros(traffic(params, state_itemsize) // 2, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        return functools.partial(target.copy_, source)
    copies = [p.detach().clone() for p in params]
    states = [torch.zeros(p.numel() * state_itemsize, dtype=torch.uint8) for p in params]
    grads = [p.grad for p in params if p.grad is not None]
    tables = [np.array([t.data_ptr() for t in tensors], np.int64) for tensors in (copies, grads, states)]
    sizes = np.array([p.numel() for p in params], np.int64)
    per_word = 4 // params[0].element_size(), 4 // state_itemsize
    stream = _stream_kernel()

    def step(keep_alive: Any = (copies, grads, states)) -> None:
        run(stream, torch.get_num_threads(), sizes, *tables, sizes, *per_word)

    return step


@functools.cache
def _stream_kernel() -> Any:
    @kernel("", TABLE, TABLE, TABLE, TABLE, INTEGER, INTEGER)
    def stream(control, params, grads, states, sizes, params_per_word, states_per_word):  # type: ignore[no-untyped-def]
        mode = enter(control)
        tensor, first, begin, end = pull(control, sizes, STREAM_CHUNK, 0, 0)
        while tensor < sizes.size:
            param, grad, state = params[tensor], grads[tensor], states[tensor]
            while begin < end:
                stop = min(begin + STREAM_TILE, end)
                for i in range(begin // params_per_word, stop // params_per_word):
                    store("uint32", param, i, np.uint32(load("uint32", param, i) ^ load("uint32", grad, i)))
                for i in range(begin // states_per_word, stop // states_per_word):
                    store("uint32", state, i, np.uint32(load("uint32", state, i) ^ np.uint32(1)))
                begin = stop
            tensor, first, begin, end = pull(control, sizes, STREAM_CHUNK, tensor, first)
        leave(control, mode)

    return stream


def other_work(device: torch.device) -> Step:
    """Return a step that changes more memory than caches hold, in as many threads as torch uses."""
    return functools.partial(torch.zeros(OTHER_BYTES, dtype=torch.uint8, device=device).add_, 1)


def timer(step: Step, device: torch.device, before: Step = lambda: None) -> Timer:
    """Return a function that takes a step and returns its seconds, by CUDA events on a GPU.

    Args:
        step: The step.
        device: Where it works.
        before: What is done first and not timed (default: nothing).
    """
    if device.type == "cuda":

        def timed_by_events() -> float:
            before()
            with torch.cuda.device(device):
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                stream = torch.cuda.current_stream()
                # In training the host runs ahead of the GPU; without a head start its launches would be timed.
                torch.cuda._sleep(HEAD_START)
                begin.record(stream)
                step()
                end.record(stream)
                end.synchronize()
            return begin.elapsed_time(end) / 1e3

        return timed_by_events

    def timed() -> float:
        before()
        begin = time.perf_counter()
        step()
        return time.perf_counter() - begin

    return timed


def in_turns(
    timers: Mapping[str, Timer], rounds: int, on_step: Callable[[], object] = lambda: None
) -> dict[str, list[float]]:
    """Time contestants in turns, so that whatever else the machine does meets them all alike.

    Args:
        timers: Contestants by name; each has taken its first step, which may compile.
        rounds: How often each is timed; every round starts with another one.
        on_step: Called after each step.

    Returns:
        The seconds of each contestant, one per round.
    """
    names = list(timers)
    times: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        start = i % len(names)
        for name in names[start:] + names[:start]:
            times[name].append(timers[name]())
            on_step()
    return times


def summary(times: list[float]) -> Summary:
    """Return median and quartiles."""
    low, median, high = np.quantile(times, [0.25, 0.5, 0.75])
    return Summary(float(median), float(low), float(high))


def state_bytes(state: Any) -> int:
    """Return the bytes of all tensors in an optimizer's state, each counted once."""
    storages: dict[int, int] = {}

    def visit(value: Any) -> None:
        if isinstance(value, Tensor):
            if hasattr(value, "__tensor_flatten__"):  # a tensor made of tensors, such as torchao's
                for name in value.__tensor_flatten__()[0]:
                    visit(getattr(value, name))
            else:
                storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, Mapping):
            for item in value.values():
                visit(item)
        elif isinstance(value, list | tuple):
            for item in value:
                visit(item)

    visit(dict(state))
    return sum(storages.values())


def peak_extra_bytes(step: Step, device: torch.device) -> int | None:
    """Return by how many bytes memory grows in the middle of a step, or None where that cannot be seen.

    Args:
        step: A step; not the first, which makes state.
        device: On a GPU torch's allocator is asked, on a CPU Linux, for the pages of the process.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not (status.exists() and os.access(clear, os.W_OK)):
        return None
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    try:
        clear.write_text(CLEAR_PEAK)
    except OSError:
        return None
    before = _kibibytes(status, "VmRSS")
    step()
    return (_kibibytes(status, "VmHWM") - before) * 1024


def _kibibytes(status: Path, field: str) -> int:
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(field + ":"))

"""The optimizers on this machine's GPU: the bits of the CPU, without waiting, without allocating, in CUDA graphs."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

import lion
from tests.comparing import assert_same_bits
from tests.optimizers.support import move_to_bucket

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

OPTIONS: list[dict[str, Any]] = [
    {"optim_bits": 32},
    {"optim_bits": 8, "min_8bit_size": 0},
    {"optim_bits": 8, "min_8bit_size": 0, "block_wise": False},
    {"optim_bits": 32, "percentile_clipping": 5},
    {"optim_bits": 8, "min_8bit_size": 1000, "percentile_clipping": 50},
    {"optim_bits": 8, "min_8bit_size": 0, "block_wise": False, "percentile_clipping": 95},
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SIZES = [0, 1, 255, 256, 257, 4095, 4097, 70_001]
GPU = torch.device("cuda", 0)


def parameters(device: torch.device) -> list[Tensor]:
    """Parameters of all dtypes and many sizes, among them views at odd offsets and a transposed one."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for dtype in DTYPES:
        for size in SIZES:
            made.append(torch.randn(size, generator=generator).to(device, dtype))
        flat = torch.randn(3000, generator=generator).to(device, dtype)
        made += [flat[1:1001], flat[1001:2500]]
        made.append(torch.randn(70, 90, generator=generator).to(device, dtype).t())
    return [p.requires_grad_() for p in made]


def gradients(params: list[Tensor], step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    made = []
    for number, p in enumerate(params):
        g = torch.randn(p.shape, generator=generator) * 10.0 ** ((number + step) % 7 - 3)
        if step % 5 == 3 and p.numel() > 10:
            g.view(-1)[number % 10] = (float("nan"), float("inf"), float("-inf"), 1e-44)[number % 4]
        if step % 6 == 5:
            g.zero_()
        made.append(g.to(p.device, p.dtype))
    return made


def trained(device: torch.device, steps: int, **options: Any) -> list[Tensor]:
    params = parameters(device)
    optimizer = lion.Lion(params, lr=1e-2, weight_decay=0.1, **options)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-2 / (step + 1)
        for p, g in zip(params, gradients(params, step), strict=True):
            p.grad = g
        optimizer.step()
    return [p.detach() for p in params] + [v for p in params for v in optimizer.state[p].values()]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gpu_equals_cpu(options: dict[str, Any]) -> None:
    steps = 110 if "percentile_clipping" in options else 8
    for i, (actual, expected) in enumerate(
        zip(trained(GPU, steps, **options), trained(torch.device("cpu"), steps, **options), strict=True)
    ):
        assert_same_bits(actual.cpu(), expected, what=f"tensor {i}")


@pytest.mark.parametrize("alignment", [8, 4])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradients_in_a_bucket(options: dict[str, Any], alignment: int) -> None:
    """Views of one buffer, as those of DistributedDataParallel: off by 8 or 4 bytes."""

    def moved(device: torch.device) -> list[Tensor]:
        params = parameters(device)
        optimizer = lion.Lion(params, lr=1e-2, weight_decay=0.1, **options)
        for step in range(4):
            for p, g in zip(params, gradients(params, step), strict=True):
                p.grad = g
            for dtype in DTYPES:
                move_to_bucket([p for p in params if p.dtype == dtype], alignment)
            optimizer.step()
        return [p.detach() for p in params] + [v for p in params for v in optimizer.state[p].values()]

    for i, (actual, expected) in enumerate(zip(moved(GPU), moved(torch.device("cpu")), strict=True)):
        assert_same_bits(actual.cpu(), expected, what=f"tensor {i}")


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_steps_in_backward(options: dict[str, Any]) -> None:
    params = parameters(GPU)
    optimizer = lion.Lion(params, lr=1e-2, weight_decay=0.1, **options)
    lion.StepInBackward(optimizer)
    for step in range(8):
        optimizer.param_groups[0]["lr"] = 1e-2 / (step + 1)
        loss = sum((p.float() * g.float()).sum() for p, g in zip(params, gradients(params, step), strict=True))
        assert isinstance(loss, Tensor)
        loss.backward()
        assert all(p.grad is None for p in params)
    found = [p.detach() for p in params] + [v for p in params for v in optimizer.state[p].values()]
    for i, (actual, expected) in enumerate(zip(found, trained(GPU, 8, **options), strict=True)):
        assert_same_bits(actual.cpu(), expected.cpu(), what=f"tensor {i}")


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_step_neither_waits_nor_allocates(options: dict[str, Any]) -> None:
    params = [p for p in parameters(GPU) if p.is_contiguous()]
    optimizer = lion.Lion(params, lr=torch.tensor(1e-3, device=GPU), weight_decay=0.1, **options)
    for p, g in zip(params, gradients(params, 0), strict=True):
        p.grad = g
    optimizer.step()
    optimizer.step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_graph_replays_follow_the_learning_rate(options: dict[str, Any]) -> None:
    def start() -> tuple[list[Tensor], Tensor, lion.Lion]:
        params = [p for p in parameters(GPU) if p.is_contiguous()]
        lr = torch.tensor(1e-3, device=GPU)
        optimizer = lion.Lion(params, lr=lr, weight_decay=0.1, **options)
        for p, g in zip(params, gradients(params, 0), strict=True):
            p.grad = g
        for _ in range(3):
            optimizer.step()
        return params, lr, optimizer

    params, lr, optimizer = start()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    other, other_lr, eager = start()
    for step in range(1, 8):
        for tensors, rate in ((params, lr), (other, other_lr)):
            rate.fill_(1e-3 / step)
            for p, g in zip(tensors, gradients(tensors, step), strict=True):
                assert p.grad is not None
                p.grad.copy_(g)
        if step == 4:
            optimizer.step()
        else:
            graph.replay()
        eager.step()
    torch.cuda.synchronize()
    for p, q in zip(params, other, strict=True):
        assert_same_bits(p.detach().cpu(), q.detach().cpu())
        for key, value in optimizer.state[p].items():
            assert_same_bits(value.cpu(), eager.state[q][key].cpu(), what=key)


def captured(optimizer: lion.Lion, p: torch.nn.Parameter) -> torch.cuda.CUDAGraph:
    p.grad = torch.ones_like(p)
    for _ in range(2):
        optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    return graph


def test_a_graph_keeps_a_learning_rate_that_is_a_number() -> None:
    p = torch.nn.Parameter(torch.zeros(5000, device=GPU))
    optimizer = lion.Lion8bit([p], lr=0.5)
    graph = captured(optimizer, p)
    optimizer.param_groups[0]["lr"] = 0.25
    before = p.detach().clone()
    graph.replay()
    assert_same_bits(p.detach().cpu(), (before - 0.5).cpu())


def test_a_first_step_in_a_capture_is_refused() -> None:
    p = torch.nn.Parameter(torch.zeros(5000, device=GPU))
    optimizer = lion.Lion8bit([p], lr=0.5)
    p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="warm up with such steps first"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()
    assert not optimizer.state
    optimizer.step()
    assert optimizer.state[p]["step"] == 1


def test_a_graph_moves_the_state_that_was_there_when_it_was_captured() -> None:
    p = torch.nn.Parameter(torch.zeros(5000, device=GPU))
    optimizer = lion.Lion8bit([p], lr=0.5)
    graph = captured(optimizer, p)
    old = optimizer.state[p]["step"]
    optimizer.load_state_dict(optimizer.state_dict())
    graph.replay()
    assert (float(old), float(optimizer.state[p]["step"])) == (3, 2)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_learning_rate_on_another_gpu_is_copied_without_waiting() -> None:
    p = torch.nn.Parameter(torch.zeros(5000, device=GPU))
    p.grad = torch.ones_like(p)
    optimizer = lion.Lion8bit([p], lr=torch.tensor(0.5, device="cuda:1"))
    optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same_bits(p.detach().cpu(), torch.full((5000,), -1.0))


def test_other_streams_and_threads() -> None:
    results: list[list[Tensor]] = []

    def work() -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            results.append([t.cpu() for t in trained(GPU, 4, optim_bits=8, min_8bit_size=0)])

    threads = [threading.Thread(target=work) for _ in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(results) == 3
    expected = trained(torch.device("cpu"), 4, optim_bits=8, min_8bit_size=0)
    for result in results:
        for actual, wanted in zip(result, expected, strict=True):
            assert_same_bits(actual, wanted)


def test_first_steps_of_several_threads_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a device's threads share is made by one of them, and kept for all."""
    from lion._backends import cuda  # not importable without numba-cuda

    size, threads = 3000, 3
    values = [torch.randn(size, generator=torch.Generator().manual_seed(seed)) for seed in range(5)]

    def steps(device: torch.device) -> list[Tensor]:
        p = torch.nn.Parameter(values[0].to(device))
        optimizer = lion.Lion8bit([p], lr=1e-2, min_8bit_size=0)
        for value in values[1:]:
            p.grad = value.to(device)
            optimizer.step()
        return [t.cpu() for t in (p.detach(), *optimizer.state[p].values())]

    expected = steps(torch.device("cpu"))
    for _ in range(50):
        monkeypatch.setattr(cuda, "_lookups", {})
        barrier = threading.Barrier(threads)

        def work(barrier: threading.Barrier = barrier) -> list[Tensor]:
            barrier.wait(60)
            return steps(GPU)

        with ThreadPoolExecutor(threads) as pool:
            results = [future.result() for future in [pool.submit(work) for _ in range(threads)]]
        for result in results:
            for actual, wanted in zip(result, expected, strict=True):
                assert_same_bits(actual, wanted)


SCALE = 1024.0
SCALED_STEPS = 6
INFINITE_STEP = 3


def scaled_training(
    device: torch.device, dtype: torch.dtype, unscaled: bool, options: dict[str, Any]
) -> tuple[list[Tensor], Tensor]:
    """Steps under a GradScaler, one of them with an infinite gradient; on a GPU none may wait for it.

    Returns:
        Parameters and states, and the scale.
    """
    generator = torch.Generator().manual_seed(3)
    params = [torch.randn(size, generator=generator).to(device, dtype).requires_grad_() for size in (5000, 255, 1)]
    optimizer = lion.Lion(params, lr=1e-2, weight_decay=0.1, **options)
    scaler = torch.amp.GradScaler(device.type, init_scale=SCALE, growth_interval=1000)
    scaler.scale(torch.zeros((), device=device))  # makes the scale
    for step in range(SCALED_STEPS):
        # The scale is halved at the infinite step; no gradient but that one overflows float16.
        scale = SCALE if step <= INFINITE_STEP else SCALE / 2
        for p in params:
            p.grad = (torch.randn(p.shape, generator=generator) * scale).to(device, dtype)
        if step == INFINITE_STEP:
            params[0].grad[7] = float("inf")  # type: ignore[index]
        if device.type == "cuda":
            torch.cuda.synchronize()
            # The first steps bring tables to the device.
            torch.cuda.set_sync_debug_mode("error" if step > 1 else "default")
        try:
            if unscaled:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    state = [value for p in params for value in optimizer.state[p].values()]
    return [p.detach() for p in params] + state, scaler._scale  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("dtype", "unscaled"),
    [(torch.float16, False), (torch.float32, False), (torch.float32, True)],  # torch unscales no float16 gradients
    ids=str,
)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_grad_scaler_skips_an_infinite_step_without_waiting(
    options: dict[str, Any], dtype: torch.dtype, unscaled: bool
) -> None:
    found, scale = scaled_training(GPU, dtype, unscaled, options)
    expected, _ = scaled_training(torch.device("cpu"), dtype, unscaled, options)
    assert float(scale) == SCALE / 2
    for i, (actual, wanted) in enumerate(zip(found, expected, strict=True)):
        assert_same_bits(actual.cpu(), wanted, what=f"tensor {i}")


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_graph_replays_follow_the_scale_and_skip(options: dict[str, Any]) -> None:
    def start() -> tuple[list[Tensor], lion.Lion]:
        params = [p for p in parameters(GPU) if p.is_contiguous() and p.dtype == torch.float16]
        optimizer = lion.Lion(params, lr=1e-2, weight_decay=0.1, **options)
        optimizer.grad_scale = torch.tensor(SCALE, device=GPU)  # type: ignore[attr-defined]
        optimizer.found_inf = torch.tensor(0.0, device=GPU)  # type: ignore[attr-defined]
        for p in params:
            p.grad = torch.ones_like(p)
        for _ in range(2):
            optimizer.step()
        return params, optimizer

    (params, optimizer), (other, eager) = start(), start()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for step in range(SCALED_STEPS):
        for tensors, each in ((params, optimizer), (other, eager)):
            each.grad_scale.fill_(SCALE / (step + 1))  # type: ignore[attr-defined]
            each.found_inf.fill_(float(step == INFINITE_STEP))  # type: ignore[attr-defined]
            for p, g in zip(tensors, gradients(tensors, 0 if step == INFINITE_STEP else step), strict=True):
                assert p.grad is not None
                p.grad.copy_(g)
        graph.replay()
        eager.step()
    torch.cuda.synchronize()
    for p, q in zip(params, other, strict=True):
        assert_same_bits(p.detach().cpu(), q.detach().cpu())
        assert optimizer.state[p]["step"] == 2 + SCALED_STEPS - 1 or not p.numel()
        for key, value in optimizer.state[p].items():
            assert_same_bits(value.cpu(), eager.state[q][key].cpu(), what=key)


def test_functional() -> None:
    values = torch.randn(10_007, device=GPU)
    values[5], values[3000], values[9000:] = float("nan"), float("inf"), 0.0
    for dtype in DTYPES:
        for blocksize in lion.functional.BLOCK_SIZES:
            x = values.to(dtype)
            codes, quantized = lion.functional.quantize_blockwise(x, blocksize=blocksize)
            cpu_codes, cpu_quantized = lion.functional.quantize_blockwise(x.cpu(), blocksize=blocksize)
            assert_same_bits(codes.cpu(), cpu_codes)
            assert_same_bits(quantized.absmax.cpu(), cpu_quantized.absmax)
            assert_same_bits(
                lion.functional.dequantize_blockwise(codes, quantized).cpu(),
                lion.functional.dequantize_blockwise(cpu_codes, cpu_quantized),
            )
        history, cpu_history = torch.zeros(100, device=GPU), torch.zeros(100)
        for step in range(1, 105):
            g = torch.full((5000,), 0.1 * (step % 13), device=GPU).to(dtype)
            on_gpu = lion.functional.percentile_clipping(g, history, step, 20)
            on_cpu = lion.functional.percentile_clipping(g.cpu(), cpu_history, step, 20)
            for a, b in zip((*on_gpu, history), (*on_cpu, cpu_history), strict=True):
                assert_same_bits(a.cpu(), b)

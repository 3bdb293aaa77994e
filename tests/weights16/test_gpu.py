"""16-bit weights on this machine's GPU: the bits of the CPU, in CUDA graphs too."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import lion
from lion import exchange
from tests.comparing import assert_same_bits
from tests.optimizers.support import VARIANTS, Variant, every_variant
from tests.weights16.support import bfloat16, both_masters, every_way, gradients

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

OPTIONS = {"lr": 1e-4, "weight_decay": 0.1, "min_8bit_size": 0}
SHAPES = ((0,), (1,), (257,), (70, 65), (100_001,))


def on_gpu(params: list[nn.Parameter]) -> list[nn.Parameter]:
    copies = [nn.Parameter(p.detach().cuda()) for p in params]
    for p in copies:
        p.grad_dtype = torch.float32
    return copies


def compare(make: Variant, way: dict[str, Any], params: list[nn.Parameter], steps: int, graphed: bool) -> None:
    """Train on both, on the GPU by replays of a graph from the third step on, and compare after each step."""
    copies = on_gpu(params)
    expected, optimizer = make(params, **way, **OPTIONS), make(copies, **way, **OPTIONS)
    for p in copies:
        p.grad = torch.zeros_like(p, dtype=torch.float32)
    graph = torch.cuda.CUDAGraph()
    for step in range(steps):
        for p, q, g in zip(params, copies, gradients(params, step), strict=True):
            p.grad = g
            q.grad.copy_(g)
        expected.step()
        if graphed and step == 2:
            with torch.cuda.graph(graph):
                optimizer.step()
        if graphed and step >= 2:
            graph.replay()
        else:
            optimizer.step()
        for number, (p, q) in enumerate(zip(params, copies, strict=True)):
            assert_same_bits(q, p, what=f"step {step}, parameter {number}")
            for key, value in expected.state[p].items():
                assert_same_bits(optimizer.state[q][key], value, what=f"step {step}, parameter {number}, {key}")


@pytest.mark.parametrize("graphed", [False, True], ids=["eager", "graph"])
@every_way
@every_variant
def test_the_bits_of_the_cpu(make, way, graphed):
    compare(make, way, [bfloat16(*shape, seed=i) for i, shape in enumerate(SHAPES)], 6, graphed)


@every_way
def test_parameters_in_another_order(way):
    p = nn.Parameter(bfloat16(70, 65).detach().t())
    p.grad_dtype = torch.float32
    compare(VARIANTS["Lion"], way, [p], 4, False)


@every_way
def test_a_skipped_step_draws_nothing(way):
    p = bfloat16(5000)
    [q] = on_gpu([p])
    expected, optimizer = lion.Lion([p], **way, **OPTIONS), lion.Lion([q], **way, **OPTIONS)
    for step in range(4):
        [p.grad] = gradients([p], step)
        q.grad = p.grad.cuda()
        optimizer.grad_scale = torch.ones((), device="cuda")
        for infinite in (1.0, 0.0):
            optimizer.found_inf = torch.full((), infinite, device="cuda")
            optimizer.step()
        expected.step()
        assert_same_bits(q, p, what=f"step {step}")


@both_masters
def test_float32_weights(way):
    torch.manual_seed(0)
    wide = nn.Linear(65, 70)
    narrow = copy.deepcopy(wide).to("cuda", torch.bfloat16)
    optimizer = lion.Lion(narrow.parameters(), **way, **OPTIONS)
    exchange.load_float32_state_dict(narrow, optimizer, wide.state_dict())
    on_cpu = copy.deepcopy(wide).bfloat16()
    expected = lion.Lion(on_cpu.parameters(), **way, **OPTIONS)
    exchange.load_float32_state_dict(on_cpu, expected, wide.state_dict())
    whole = exchange.float32_state_dict(narrow, optimizer)
    for key, value in exchange.float32_state_dict(on_cpu, expected).items():
        assert whole[key].is_cuda
        assert_same_bits(whole[key], value, what=key)

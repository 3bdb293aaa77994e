"""How far Lion8bit goes with Lion on a small regression; ``pytest -rP`` shows the figures.

The bounds leave about half of what was measured for other machines, whose matrix products differ in the last bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import lion

STEPS = 300


class Result(NamedTuple):
    """Fraction of elements that moved alike, distance of the parameters over the path from the start, and losses."""

    alike: float
    distance: float
    losses: tuple[float, float]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def train(seed: int, block_wise: bool, shared_gradients: bool) -> Result:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1024, 32, generator=generator)
    hidden = torch.tanh(x @ torch.randn(32, 16, generator=generator) / 32**0.5)
    y = hidden @ torch.randn(16, 1, generator=generator) / 4
    models = [model(seed), model(seed)]
    params = [list(m.parameters()) for m in models]
    optimizers = [
        lion.Lion(params[0], lr=1e-3),
        lion.Lion8bit(params[1], lr=1e-3, min_8bit_size=0, block_wise=block_wise),
    ]
    start, alike = flat(params[0]), 0.0
    for _ in range(STEPS):
        batch = torch.randint(0, len(x), (64,), generator=generator)
        before = [flat(some) for some in params]
        for m, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            nn.functional.mse_loss(m(x[batch]), y[batch]).backward()
        if shared_gradients:
            for p, q in zip(*params, strict=True):
                q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
        moves = [(flat(some) - old).sign() for some, old in zip(params, before, strict=True)]
        alike += float((moves[0] == moves[1]).float().mean()) / STEPS
    ends = [flat(some) for some in params]
    losses = [nn.functional.mse_loss(m(x), y).item() for m in models]
    return Result(alike, float((ends[0] - ends[1]).norm() / (ends[0] - start).norm()), (losses[0], losses[1]))


@pytest.mark.parametrize("block_wise", [True, False])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_same_gradients(seed: int, block_wise: bool) -> None:
    found = train(seed, block_wise, True)
    print(f"block_wise={block_wise}: {found.alike:.2%} of all moves alike, distance {found.distance:.3f} of the path")
    assert 0.96 < found.alike < 1
    assert 0 < found.distance < 0.22


@pytest.mark.parametrize("block_wise", [True, False])
@pytest.mark.parametrize("seed", [0, 1])
def test_their_own_gradients(seed: int, block_wise: bool) -> None:
    found = train(seed, block_wise, False)
    print(
        f"block_wise={block_wise}: {found.alike:.2%} of all moves alike, distance {found.distance:.3f} of the path, "
        f"loss {found.losses[0]:.5f} with 32 bits, {found.losses[1]:.5f} with 8"
    )
    assert 0.9 < found.alike < 1
    assert 0 < found.distance < 0.35
    assert found.losses[1] < 1.3 * found.losses[0]

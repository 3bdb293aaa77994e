"""Steps in backward of models that are sharded by FSDP2: the bits of the ordinary step; others are refused."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import lion
from lion._memory import sharding
from tests.comparing import assert_same_bits
from tests.distributed.processes import run
from tests.optimizers.support import KINDS, VARIANTS

OPTIONS = {"lr": 1e-2, "weight_decay": 0.1, "percentile_clipping": 50}


def make_model() -> nn.Sequential:
    """Return a model with parameters that cannot be shared out evenly, and one that is empty on all ranks but one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(65, 201), nn.Tanh(), nn.Linear(201, 67), nn.Tanh(), nn.Linear(67, 1))
    for layer in (*model, model):
        fully_shard(layer, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))
    return model


def equals_the_ordinary_step() -> None:
    for name, make in {**KINDS, "paged": VARIANTS["PagedLion8bit"]}.items():
        models = [make_model(), make_model()]
        optimizers = [make(model.parameters(), **OPTIONS) for model in models]
        handle = lion.StepInBackward(optimizers[1])
        for step in range(5):
            for model in models:
                torch.manual_seed(10 * step + dist.get_rank())
                model(torch.randn(3, 65)).float().square().sum().mul(10.0 ** (step % 3)).backward()
            assert all((p.grad is None) == (step < 4) for p in models[1].parameters())
            optimizers[0].step()
            optimizers[0].zero_grad()
            if step == 3:  # and the last step is an ordinary one
                handle.remove()
            optimizers[1].step()
            optimizers[1].zero_grad()
            for p, q in zip(models[1].parameters(), models[0].parameters(), strict=True):
                assert_same_bits(sharding.local(p), sharding.local(q), what=f"{name}, step {step}")
                state, expected = optimizers[1].state[p], optimizers[0].state[q]
                assert state.keys() == expected.keys() and state["step"] == step + 1
                for key in state:
                    assert_same_bits(
                        sharding.local(state[key]), sharding.local(expected[key]), what=f"{name}, step {step}, {key}"
                    )


def refuses_replicas() -> None:
    model = DistributedDataParallel(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="parameter 0 of group 0 is not sharded; each of the 2 processes"):
        lion.StepInBackward(lion.Lion(model.parameters()))


def test_equals_the_ordinary_step(forking):
    run(forking, 2, equals_the_ordinary_step)


def test_refuses_replicas(forking):
    run(forking, 2, refuses_replicas)

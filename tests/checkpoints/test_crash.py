"""A training that is killed while it writes checkpoints leaves a loadable one, and goes on to the same bits."""

from __future__ import annotations

import os
import random
import signal
import time

import torch

from tests.checkpoints.recipe import train
from tests.comparing import assert_same_bits

KILLS = 50
ENDLESS = 10**6


def begin(context, path, steps):
    """Start a training in a process of its own and wait until it has loaded its checkpoint."""
    started = context.Event()
    process = context.Process(target=train, args=(path, steps, started.set), daemon=True)
    process.start()
    assert started.wait(100)
    return process


def finish(context, path, steps):
    process = begin(context, path, steps)
    process.join()
    assert process.exitcode == 0
    return torch.load(path, weights_only=True)


def test_killed_while_writing(tmp_path, forking):
    path = tmp_path / "checkpoint.pt"
    moments = random.Random(0)
    reached = written_halfway = resumed = 0
    for _ in range(KILLS):
        process = begin(forking, path, ENDLESS)
        time.sleep(moments.uniform(0.0, 0.1))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        if path.exists():
            step = torch.load(path, weights_only=True)["step"]
            assert step >= reached
            resumed += step > reached > 0
            reached = step
        else:
            assert not reached
        temporary = path.with_suffix(".tmp")
        written_halfway += temporary.exists()
        temporary.unlink(missing_ok=True)
    # Otherwise the moments were not those that matter.
    assert written_halfway >= 5
    assert resumed >= 5

    killed = finish(forking, path, reached + 3)
    whole = finish(forking, tmp_path / "whole.pt", reached + 3)
    assert killed["step"] == whole["step"] == reached + 3
    for p, q in zip(killed["params"], whole["params"], strict=True):
        assert_same_bits(p, q)
    assert killed["optimizer"]["param_groups"] == whole["optimizer"]["param_groups"]
    for number, state in whole["optimizer"]["state"].items():
        for key, value in state.items():
            assert_same_bits(killed["optimizer"]["state"][number][key], value, what=key)
    print(f"{KILLS} kills, {written_halfway} of them while a file was written, {reached + 3} steps")

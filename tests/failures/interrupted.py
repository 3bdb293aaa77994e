"""Takes large steps and is interrupted; then compares what has moved with what the exception names.

Prints ``stepping`` when it may be interrupted, and ``reported`` when the exception had a cause.
"""

from __future__ import annotations

import signal

import torch
from torch import nn

import lion
from lion._backends import DTYPES
from tests.comparing import to_numpy
from tests.failures.test_failures import named
from tests.optimizers.support import KINDS, ByHand, follow, set_gradients

TIMES, SIZE = 20, 1_500_000


def copies_of(optimizer: lion.Lion) -> dict[torch.Tensor, ByHand]:
    """Return copies of an optimizer's parameters and of their 32-bit state, as they are now."""
    copies = {}
    for p in optimizer.param_groups[0]["params"]:
        copies[p] = ByHand.of(KINDS["32bit"], p)
        copies[p].momentum = to_numpy(optimizer.state[p]["state1"]).copy()
        copies[p].steps = int(optimizer.state[p]["step"])
    return copies


def main() -> None:
    # A shell's background job ignores it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(2)
    params = {str(dtype): nn.Parameter(torch.zeros(SIZE, dtype=dtype)) for dtype in DTYPES}
    optimizer = lion.Lion(params.items())
    set_gradients(params.values(), seed=0)
    optimizer.step()
    for attempt in range(TIMES):
        before = [int(optimizer.state[p]["step"]) for p in params.values()]
        taken = 0
        try:
            print("stepping", flush=True)
            while True:
                optimizer.step()
                taken += 1
        except KeyboardInterrupt as interrupt:
            report = interrupt.__cause__
        moved = {
            name: int(optimizer.state[p]["step"]) - was - taken
            for (name, p), was in zip(params.items(), before, strict=True)
        }
        if report is None:  # between two steps
            assert set(moved.values()) in ({0}, {1}), moved
        else:
            assert isinstance(report, RuntimeError)
            updated, uncertain = named(str(report))
            for name, count in moved.items():
                assert count in ({1} if name in updated else {0, 1} if name in uncertain else {0}), (moved, report)
            print("reported", flush=True)
        if attempt % 5 == 0:
            follow(optimizer, copies_of(optimizer), 1, seed=attempt)


if __name__ == "__main__":
    main()

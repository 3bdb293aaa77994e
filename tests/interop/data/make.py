"""Makes the checkpoints in this folder with bitsandbytes: ``python -m tests.interop.data.make``.

Each file holds the parameters and the state dict after a few steps on a CPU, and both again after a few more. Two more
files hold momentum that bitsandbytes has quantized, in the layouts that its older releases had: blocks of 2048
elements, and no blocks; with a history of gradient norms.
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import bitsandbytes
import torch

from tests.interop.training import CASES, MORE_STEPS, OPTIONS, SMALL, STEPS, make_params, snapshot, train

FOLDER = Path(__file__).parent


def main() -> None:
    """Write all files."""
    for name, (cls, dtype) in CASES.items():
        params = make_params(dtype)
        optimizer = getattr(bitsandbytes.optim, cls)(params, **OPTIONS, **SMALL)
        train(optimizer, params, 0, STEPS)
        made = {
            "bitsandbytes": bitsandbytes.__version__,
            "params": snapshot(params),
            "state_dict": deepcopy(optimizer.state_dict()),
        }
        train(optimizer, params, STEPS, MORE_STEPS)
        made["later_params"] = snapshot(params)
        made["later_state_dict"] = optimizer.state_dict()
        torch.save(made, FOLDER / f"{name}.pt")
    momentum = [0.01 * p.detach() for p in make_params("float32")]
    qmap = bitsandbytes.functional.create_dynamic_map(signed=True)
    for name, block_size in (("blocks_of_2048", 2048), ("tensorwise", 4096)):
        states = {}
        for index, m in enumerate(momentum):
            codes, quantized = bitsandbytes.functional.quantize_blockwise(m, code=qmap, blocksize=block_size)
            state = {"step": 7, "state1": codes, "qmap1": qmap, "gnorm_vec": torch.linspace(1.0, 2.0, 100)}
            if name == "tensorwise":
                state.update(max1=quantized.absmax, new_max1=torch.zeros(1))
            else:
                state["absmax1"] = quantized.absmax
            states[index] = state
        group = {**OPTIONS, "eps": 0.0, "params": list(range(len(momentum)))}
        torch.save(
            {"momentum": momentum, "state_dict": {"state": states, "param_groups": [group]}}, FOLDER / f"{name}.pt"
        )


if __name__ == "__main__":
    main()

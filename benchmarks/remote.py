"""A peer in a Python environment of its own, stepped on command.

Run as a program it reads JSON lines and answers each with one; it needs torch and the peer only.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


class Remote:
    """The side that commands.

    Args:
        python: The interpreter of the peer's environment.
    """

    def __init__(self, python: str) -> None:
        self.process = subprocess.Popen(
            [python, "-m", "benchmarks.remote"], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, **command: Any) -> Any:
        """Send a command and return the answer."""
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps(command), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the peer's process ended with code {self.process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.wait()


def serve() -> None:
    """Obey commands until the input ends."""
    import torch

    from benchmarks.peers import peers

    answers, sys.stdout = sys.stdout, sys.stderr  # a peer may print
    steps: dict[str, Any] = {}
    params: list[torch.nn.Parameter] = []
    for line in sys.stdin:
        command = json.loads(line)
        answer: Any = None
        if command["do"] == "names":
            answer = [name for name in peers() if name.startswith("bitsandbytes")]
        elif command["do"] == "make":
            steps.clear()
            dtype = getattr(torch, command["dtype"])
            params = [torch.nn.Parameter((torch.randn(shape) * 0.02).to(dtype)) for shape in command["shapes"]]
            for p in params:
                p.grad = (torch.randn_like(p, dtype=torch.float32) * 0.02).to(dtype)
        elif command["do"] == "first":
            torch.set_num_threads(command["threads"])
            if command["name"] not in steps:
                steps[command["name"]] = peers()[command["name"]](params).step
            steps[command["name"]]()
        elif command["do"] == "step":
            begin = time.perf_counter()
            steps[command["name"]]()
            answer = time.perf_counter() - begin
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve()

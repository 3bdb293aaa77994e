"""The example for several processes: it is killed in its midst and goes on with another number of processes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
LINE = re.compile(r"step (\d+): ([\d.]+) nats per byte")


def run(folder: Path, processes: int, kill_after: int | None = None) -> tuple[list[str], dict[int, float]]:
    """Run the example, kill all its processes after a step where asked to, and return its lines and losses."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += [str(ROOT / "examples" / "fsdp2.py"), "--checkpoints", str(folder), "--steps", "16", "--save-every", "6"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    lines, losses = [], {}
    with subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.strip())
            if found := LINE.fullmatch(line.strip()):
                losses[int(found[1])] = float(found[2])
                if int(found[1]) == kill_after:
                    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
                    for pid in (process.pid, *map(int, children)):
                        os.kill(pid, signal.SIGKILL)
        assert process.wait(200) == (0 if kill_after is None else -signal.SIGKILL), lines
    return lines, losses


def test_killed_and_started_again_with_another_number_of_processes(tmp_path):
    _, before = run(tmp_path, 3, kill_after=8)
    # As if it had been killed while it wrote.
    (tmp_path / "000012").mkdir()
    (tmp_path / "000012" / "__0_0.distcp").write_bytes(b"torn")

    lines, after = run(tmp_path, 2)
    assert "going on after step 6 with 2 processes" in lines
    assert sorted(after) == list(range(7, 17))
    # The parameters are those of the checkpoint, and so is the batch.
    assert abs(after[7] - before[7]) <= 0.002
    assert abs(after[8] - before[8]) <= 0.02
    assert after[16] < before[1] - 1
    assert (tmp_path / "000016" / ".metadata").exists()

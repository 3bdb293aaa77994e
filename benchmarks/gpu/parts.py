"""The parts of the command, most important first."""

from __future__ import annotations

import importlib.util
from typing import NamedTuple


class Part(NamedTuple):
    """Something to run in a process of its own.

    Attributes:
        name: What to call it.
        seconds: How long it may take.
        command: Arguments of Python; "{folder}" in them is a folder for what it writes.
        result: The JSON file that it writes there, or "stdout" for what it prints; None for tests, which are counted.
        dry_run: The arguments for its smallest form on a CPU, None where it needs a GPU.
        modules: What has to be installed besides what every part needs.
    """

    name: str
    seconds: int
    command: list[str]
    result: str | None
    dry_run: list[str] | None = None
    modules: tuple[str, ...] = ()


def _tests(path: str, seconds: int, workers: int = 1) -> Part:
    several = ["-n", str(workers)] if workers > 1 and importlib.util.find_spec("xdist") else []
    command = ["-m", "pytest", path, *several, "-v", "--tb=short", "--durations=5"]
    return Part(path, seconds, command, None, modules=("pytest", "hypothesis"))


def _measurement(name: str, title: str, seconds: int) -> Part:
    command = ["-m", "benchmarks.gpu.measurements", name, "--out", "{folder}/result.json"]
    return Part(title, seconds, [*command, "--device", "cuda"], "result.json", [*command, "--device", "cpu"])


_BENCHMARK = ["-m", "benchmarks", "--no-picture", "--out", "{folder}"]
_ON_GPU = [*_BENCHMARK, "--device", "cuda", "--workloads", "one", "gpt2", "many"]
_PEERS = ["--only", "bitsandbytes", "torch fused AdamW", "flashoptim"]
_MEASURED = ["--out", "{folder}", "--kinds", "memory", "time"]
_TRAINED = ["AdamW", "AdamW, bf16", "Lion8bit", "Lion8bit, bf16 + 24 bits"]
_SMALL = ["--sizes", "600", "--dtypes", "bfloat16", "--threads", "1", "--rounds", "1"]

PARTS = (
    _measurement("card", "versions and the card", 60),
    Part("check", 180, ["-m", "lion", "check", "--json"], "stdout"),
    _tests("tests/gpu", 120, workers=8),
    # One process: it looks at how much memory is free.
    _tests("tests/paging/test_gpu.py", 60),
    _tests("tests/differential/test_cuda_gpu.py", 120, workers=8),
    _measurement("paged", "paged state", 45),
    _measurement("kernels", "kernels", 90),
    _measurement("variants", "variants of the kernels", 60),
    Part("benchmark", 120, [*_ON_GPU, *_PEERS], "benchmark.json", [*_BENCHMARK, *_SMALL, "--only", "fused"]),
    # Apart from the others, for it compiles for long.
    Part("benchmark of torchao", 60, [*_ON_GPU, "--only", "torchao"], "benchmark.json", modules=("torchao",)),
    # Last, where it takes the time that the others leave.
    Part(
        "training",
        150,
        ["-m", "benchmarks.training", "gpt2", *_MEASURED, "--device", "cuda", "--contestants", *_TRAINED],
        "training.json",
        ["-m", "benchmarks.training", "tiny", *_MEASURED, "--contestants", "Lion8bit"],
        modules=("matplotlib", "scipy"),
    ),
)

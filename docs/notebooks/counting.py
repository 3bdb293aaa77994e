"""What the notebooks count about kernels: memory traffic in the simulator, and what the compiler makes of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt

ROOT = Path(__file__).resolve().parent.parent.parent
STORED = Path(__file__).with_name("compiled_counts.json")

# Bytes that each intrinsic moves, and where its address is.
ACCESSES = {
    "load_f32": 4,
    "load_u32": 4,
    "load_u8": 1,
    "load_2_words": 8,
    "load_4_words": 16,
    "store_f32": 4,
    "store_u8": 1,
    "store_2_words": 8,
    "store_4_words": 16,
    "atomic_max_u32": 4,
}


def traffic(
    namespace: dict[str, Any],
    run: Callable[[], None],
    arrays: Mapping[str, npt.NDArray[Any]],
) -> Counter[tuple[str, str]]:
    """Count the bytes that kernels touch while they run in the simulator.

    A byte that is read several times counts once, as on a GPU, where the cache serves the others.

    Args:
        namespace: The globals of the kernels, whose intrinsics are replaced for the time of the run.
        run: Launches the kernels.
        arrays: The arrays whose traffic is counted, by name.

    Returns:
        Bytes by the name of the array and "read" or "written".
    """
    touched: dict[tuple[str, str, int], int] = {}
    ranges = {
        name: (a.ctypes.data, a.ctypes.data + a.nbytes) for name, a in arrays.items()
    }

    def recorded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def access(address: Any, *values: Any) -> Any:
            for array, (begin, end) in ranges.items():
                if begin <= address < end:
                    touched[
                        array,
                        "read" if name.startswith("load") else "written",
                        int(address),
                    ] = ACCESSES[name]
            return function(address, *values)

        return access

    originals = {name: namespace[name] for name in ACCESSES if name in namespace}
    namespace.update(
        {name: recorded(name, function) for name, function in originals.items()}
    )
    try:
        run()
    finally:
        namespace.update(originals)
    counted: Counter[tuple[str, str]] = Counter()
    for (array, direction, _), count in touched.items():
        counted[array, direction] += count
    return counted


def compiled(
    sources: Mapping[str, str], kernels: Mapping[str, tuple[str, int]]
) -> dict[str, dict[str, Any]]:
    """Return what the compiler makes of kernels for compute capability 9.0; no GPU is needed.

    Without numba-cuda's compiler or nvdisasm, or when asked by ``LION_DOCS_STORED_COUNTS=1``, the counts stored
    beside this file are returned.

    Args:
        sources: Source of every device function and kernel, by name, in order.
        kernels: For each kernel the name to report, its function and the elements that one thread handles at a time.

    Returns:
        For each kernel: instructions per element in its main loop, or in all of it if it has none; registers;
        fused multiply-adds; widest load and store in bits.
    """
    if os.environ.get("LION_DOCS_STORED_COUNTS") != "1":
        request = json.dumps(
            {"sources": list(sources.values()), "kernels": dict(kernels)}
        )
        environment = {
            **os.environ,
            "NUMBA_ENABLE_CUDASIM": "0",
            "PYTHONPATH": str(ROOT),
        }
        result = subprocess.run(
            [sys.executable, __file__],
            input=request,
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        if result.returncode == 0:
            print("compiled here, for compute capability 9.0")
            return json.loads(result.stdout.splitlines()[-1])
        print("not compiled here:", result.stderr.strip().splitlines()[-1])
    print("counts stored with this notebook, for compute capability 9.0")
    return json.loads(STORED.read_text())


def _main() -> None:
    """Compile what standard input describes and print the counts."""
    import re
    import tempfile

    request = json.loads(sys.stdin.read())
    header = (
        "import numpy as np\nfrom lion.cuda_kernels.device import *\n"
        "from lion.cuda_kernels.device import device\nINFINITY_BITS = np.uint32(0x7F800000)\n"
        "SMALLEST_NORMAL_BITS = np.uint32(0x00800000)\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "stages.py").write_text(header + "\n\n".join(request["sources"]))
        sys.path.insert(0, folder)
        import stages
        from tests.compiled import building

        counts = {}
        for name, (function, elements) in request["kernels"].items():
            binary = building.link_time_optimized(getattr(stages, function), (9, 0))
            instructions = building.disassemble(binary.cubin)
            names = [i.name for i in _hot(instructions)]

            def widest(prefix: str, names: list[str] = names) -> int:
                found = [n for n in names if n.startswith(prefix)]
                sizes = [
                    int(m[0])
                    if (m := re.findall(r"\b(64|128)\b", n))
                    else 8
                    if "U8" in n
                    else 32
                    for n in found
                ]
                return max(sizes, default=0)

            counts[name] = {
                "instructions": round(len(names) / elements, 1),
                "registers": binary.registers,
                "fused": sum(n.startswith("FFMA") for n in names),
                "load bits": widest("LDG"),
                "store bits": widest("STG"),
            }
        print(json.dumps(counts))


def _hot(instructions: list[Any]) -> list[Any]:
    """Return the instructions of the innermost loop that stores, or all up to the last store where there is none."""
    loops = [
        [j for j in instructions if i.target <= j.offset <= i.offset]
        for i in instructions
        if i.target is not None and i.target < i.offset
    ]
    storing = [body for body in loops if any(i.name.startswith("STG") for i in body)]
    if storing:
        return min(storing, key=len)
    last = max(n for n, i in enumerate(instructions) if i.name == "EXIT")
    return instructions[: last + 1]


if __name__ == "__main__":
    _main()

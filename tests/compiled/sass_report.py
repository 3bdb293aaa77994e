"""Prints what each kernel costs on each architecture, as counts from its machine code: no GPU is needed.

python -m tests.compiled.sass_report                    every architecture, as a Markdown page
python -m tests.compiled.sass_report 9.0 12.0           some
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from typing import NamedTuple

from benchmarks.gpu.variants import VARIANTS
from lion.cuda_kernels import launch, simulator
from lion.cuda_kernels.tuning import Tuning
from lion.reference.rounding import MASTER_24, MASTER_32, NEAREST, STOCHASTIC
from tests.compiled import building

ELEMENTS = 8  # of a lane, in a turn of the loop
READ = {  # bytes read per element, with 4-byte and with 2-byte elements
    "update_32bit": (12, 8),
    "update_8bit_blockwise": (9, 5),
    "measure_tensorwise": (5, 3),
    "update_tensorwise": (9, 5),
    "partial_norms": (4, 2),
}
BYTES = {  # read and written, per element, with 4-byte and with 2-byte elements
    "update_32bit": (20.0, 14.0),
    "update_8bit_blockwise": (14.03, 8.03),
    "measure_tensorwise": (5.0, 3.0),
    "update_tensorwise": (14.0, 8.0),
    "partial_norms": (4.0, 2.0),
}
WEIGHTS = {NEAREST: "", STOCHASTIC: ", stochastic", MASTER_24: ", 24 bits", MASTER_32: ", 32 bits"}
LOW_BYTES = {MASTER_24: 2.0, MASTER_32: 4.0}  # read and written, per element
# Instructions per element that can be issued, at 70% of the peak rate, while memory moves the 8.03 bytes that the
# blockwise 8-bit update of a bfloat16 element takes.
BUDGETS = {"A100": 62, "RTX 4090": 250, "H100": 54, "H200": 38, "B200": 28}
BUDGET_BYTES = 8.03


class Row(NamedTuple):
    """What one kernel costs on one architecture."""

    kernel: str
    dtype: str
    capability: str
    instructions: float
    registers: int
    spill_bytes: int
    shared_bytes: int
    loads: str
    stores: str
    loads_first: int


def _widths(body: list[building.Instruction], prefix: str) -> Counter[int]:
    """Return how many accesses of which width in bits there are."""
    widths: Counter[int] = Counter()
    for instruction in body:
        if instruction.name.startswith(prefix):
            parts = instruction.name.split(".")
            named = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128}
            widths[next((named[part] for part in parts if part in named), 32)] += 1
    return widths


def _in_words(widths: Counter[int]) -> str:
    """Return them such as ``4×128 1×64``."""
    return " ".join(f"{count}×{width}" for width, count in sorted(widths.items(), reverse=True)) or "none"


def row(kernel: building.Kernel, capability: building.Capability) -> Row:
    """Return the counts of a kernel, from its link-time optimised machine code."""
    limit = kernel.tuning.most_registers(kernel.name)
    binary = building.link_time_optimized(launch.kernel(*kernel), capability, limit)
    body = building.main_loop(building.disassemble(binary.cubin))
    loads, names = _widths(body, "LDG"), [instruction.name for instruction in body]
    read = READ[kernel.name][kernel.dtype != "float32"] + LOW_BYTES.get(kernel.weights, 0) / 2
    turns = round(sum(width * count for width, count in loads.items()) / (8 * ELEMENTS * read))
    return Row(
        kernel.name,
        f"{kernel.dtype}{WEIGHTS[kernel.weights]}",
        f"{capability[0]}.{capability[1]}",
        len(body) / (ELEMENTS * turns),
        binary.registers,
        binary.spill_bytes,
        binary.shared_bytes,
        _in_words(loads),
        _in_words(_widths(body, "STG")),
        sum(name.startswith("LDG") for name in names[: names.index("FMUL")]),
    )


def _print_counts(capabilities: list[building.Capability]) -> dict[tuple[str, str, str], float]:
    print("| kernel | dtype | arch | instructions | registers | spills | shared bytes | loads | stores |")
    print("| --- | --- | --- | ---: | ---: | ---: | ---: | --- | --- |")
    kernels = [building.Kernel(name, dtype) for name in READ for dtype in building.DTYPES]
    kernels += [building.Kernel(name, "bfloat16", weights=how) for name in launch.UPDATES for how in building.WEIGHTS]
    instructions = {}
    for kernel in kernels:
        for capability in capabilities:
            counts = row(kernel, capability)
            cells = [f"`{counts.kernel}`", *counts[1:3], f"{counts.instructions:.1f}", *map(str, counts[4:9])]
            print("| " + " | ".join(cells) + " |", flush=True)
            instructions[counts[:3]] = counts.instructions
    return instructions


def _print_budgets() -> None:
    print("| kernel | element | bytes | " + " | ".join(BUDGETS) + " |")
    print("| --- | --- | ---: | " + " | ".join("---:" for _ in BUDGETS) + " |")
    for kernel, both in BYTES.items():
        for element, moved in zip(("4 bytes", "2 bytes"), both, strict=True):
            budgets = (f"{budget * moved / BUDGET_BYTES:.0f}" for budget in BUDGETS.values())
            print(f"| `{kernel}` | {element} | {moved:g} | " + " | ".join(budgets) + " |")
    for kernel in launch.UPDATES:
        for how, more in LOW_BYTES.items():
            moved = BYTES[kernel][1] + more
            budgets = (f"{budget * moved / BUDGET_BYTES:.0f}" for budget in BUDGETS.values())
            print(f"| `{kernel}` | 2 bytes{WEIGHTS[how]} | {moved:g} | " + " | ".join(budgets) + " |")


def _sectors() -> dict[tuple[str, str, int, bool], list[int]]:
    """Return what ``tests.differential.sectors`` counts, by kernel, dtype, way of keeping and whether in halves."""
    command = [sys.executable, "-m", "tests.differential.sectors"]
    counted = subprocess.run(command, env=simulator.environment(), capture_output=True, text=True, check=True).stdout
    return {(name, dtype, how, halves): count for name, dtype, how, halves, *count in json.loads(counted)}


def _print_halves(sectors: dict[tuple[str, str, int, bool], list[int]]) -> None:
    print("| kernel | dtype | lane's elements | instructions | registers | accesses | sectors | asked of L2 |")
    print("| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for name, dtype, how, halves in sectors:
        if name == "update_8bit_blockwise" and dtype != "float32":
            continue
        counts = row(building.Kernel(name, dtype, weights=how, tuning=Tuning(halves=halves)), (9, 0))
        numbers = [f"{counts.instructions:.1f}", counts.registers, *sectors[name, dtype, how, halves]]
        cells = [f"`{name}`", counts.dtype, "in halves" if halves else "together", *map(str, numbers)]
        print("| " + " | ".join(cells) + " |", flush=True)


def _print_buckets() -> None:
    print("| kernel | dtype | aligned to | instructions | registers | loads | stores |")
    print("| --- | --- | --- | ---: | ---: | --- | --- |")
    for name in launch.UPDATES:
        for dtype, alignments in (("float32", (16, 8, 4)), ("bfloat16", (16, 8, 4, 2))):
            for alignment in alignments:
                counts = row(building.Kernel(name, dtype, grad_alignment=alignment), (9, 0))
                numbers = [f"{counts.instructions:.1f}", str(counts.registers), counts.loads, counts.stores]
                print("| " + " | ".join([f"`{name}`", dtype, f"{alignment} bytes", *numbers]) + " |", flush=True)


def _print_variants() -> None:
    print("| kernel | dtype | variant | instr. | regs | spills | loads first |")
    print("| --- | --- | --- | ---: | ---: | ---: | ---: |")
    for name in ("update_32bit", "update_8bit_blockwise"):
        for dtype in ("float32", "bfloat16"):
            for title, tuning in VARIANTS.items():
                if tuning.max_registers and tuning.most_registers(name) is None:
                    continue
                counts = row(building.Kernel(name, dtype, tuning=tuning), (9, 0))
                loads = sum(int(part.split("×")[0]) for part in counts.loads.split())
                first = f"{counts.loads_first} of {loads}" if not tuning.ahead else "a turn ahead"
                numbers = [f"{counts.instructions:.1f}", str(counts.registers), str(counts.spill_bytes), first]
                print("| " + " | ".join([f"`{name}`", dtype, title, *numbers]) + " |", flush=True)


def main() -> None:
    chosen = sys.argv[1:] or [f"{major}.{minor}" for major, minor in building.CAPABILITIES]
    capabilities = [(int(major), int(minor)) for major, minor in (name.split(".") for name in chosen)]
    print("# What the CUDA kernels cost, in instructions\n")
    print("Counts from the machine code that the compiler makes, by link-time optimisation, for each architecture;")
    print("not measured speed. *Instructions* are those of the main loop, with the branches for rare values, per")
    print("element and lane. *Loads* and *stores* are the accesses to global memory in one turn of that loop, as")
    print("count×bits. `python -m tests.compiled.sass_report` prints this page anew.\n")
    instructions = _print_counts(capabilities)
    print("\n## The budget\n")
    print("While memory moves the bytes of one element, a GPU can issue so many instructions for it, at 70% of its")
    print("peak rate; a kernel below that is bound by memory.\n")
    _print_budgets()
    if "9.0" not in chosen:
        return
    on_9 = {key[:2]: f"{count:.1f}" for key, count in instructions.items() if key[2] == "9.0"}
    names = {"the 32-bit update": "update_32bit", "the block-wise 8-bit one": "update_8bit_blockwise"}
    for title, name in names.items():
        float32, bfloat16 = on_9[name, "float32"], on_9[name, "bfloat16"]
        kept = ", ".join(f"{on_9[name, f'bfloat16{how}']} with{how[1:]}" for how in list(WEIGHTS.values())[1:])
        print(f"\nOn 9.0, {title} takes {float32} instructions (float32), {bfloat16} (bfloat16),")
        print(f"{kept}.")
    print("\nOn an H100 all are bound by memory; on a B200 the 8-bit updates of 2-byte elements are bound by")
    print("instructions, but for those with 32 master bits.")
    print("\n## Whole sectors\n")
    print("Memory is moved in sectors of 32 bytes. Eight 4-byte elements of a lane are two accesses of 16 bytes. Where")
    print("they lie together, each access of a warp touches all its sectors by half: the L1 cache answers the second")
    print("load, but both stores go to the L2 cache in full. So kernels that store 4-byte values give a lane four")
    print("elements and the four 128 further on: each access of a warp is to consecutive bytes. Two lanes draw the")
    print("random bits of stochastic rounding for each other then. Instructions and registers are those on 9.0,")
    print("accesses and sectors those of a warp for a block of 256 elements, counted in the simulator; the last column")
    print("leaves out loads from sectors that another load of the block has brought.\n")
    _print_halves(_sectors())
    print("\n## Gradients in buckets\n")
    print("Gradients whose addresses are no multiples of 16 bytes have kernels of their own: all else moves as before.")
    print("Counted on 9.0.\n")
    _print_buckets()
    print("\n## Variants\n")
    print("Other ways to the same bits, which `python -m benchmarks.gpu` times beside each other: only a GPU can tell")
    print("whether they pay. Left to itself, the compiler puts some loads behind the first arithmetic, to save")
    print("registers: fewer registers, more warps. With the limits of *all loads first* it does not. At 48 registers,")
    print("a multiprocessor holds 40 warps of the 8-bit update instead of 32, but values are spilled. Loading the")
    print(
        "*next block ahead* costs registers for what waits, and moves between them. Counted on 9.0, spills in bytes.\n"
    )
    _print_variants()


if __name__ == "__main__":
    main()

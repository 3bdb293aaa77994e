"""What the compiler makes of the kernels: one rounding per operation, no float64, no spills, wide accesses.

Both routes are read: the PTX, and the machine code that link-time optimisation makes, which is what a GPU gets.
"""

from __future__ import annotations

import functools
import re
from collections import Counter

import pytest

from lion.cuda_kernels import launch
from lion.cuda_kernels.table import WIDEST
from lion.reference.rounding import MASTER_24, MASTER_32, STOCHASTIC
from tests.compiled import building

pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")


def is_usual(capability: building.Capability, kernel: building.Kernel) -> bool:
    """Return whether a kernel is built for a capability in every run; the other builds take long."""
    if kernel._replace(name="", dtype=None, scaled_loss=False) == building.Kernel("", None):
        return capability in [(7, 5), (9, 0), (12, 0)]
    return capability == (9, 0)


every_build = pytest.mark.parametrize(
    ("capability", "kernel"),
    [
        pytest.param(
            capability,
            kernel,
            id=f"{capability[0]}.{capability[1]}-{kernel}",
            marks=[] if is_usual(capability, kernel) else pytest.mark.exhaustive,
        )
        for capability in building.CAPABILITIES
        for kernel in building.KERNELS
    ],
)

# The total of the partial norms is the one place where float64 is specified.
FLOAT64 = {"squared_norm", "percentile_clipping"}
FLOAT64_OPERATIONS = {"add.rn.f64", "cvt.f64.f32", "cvt.rn.f32.f64", "mov.f64", "selp.f64"}
WIDE_LOADS = {"update_32bit", "update_8bit_blockwise", "measure_tensorwise", "update_tensorwise", "partial_norms"}
WIDE_STORES = {"update_32bit", "update_8bit_blockwise", "update_tensorwise"}
DIVIDING = {"update_8bit_blockwise", "update_tensorwise", "quantize_blockwise", "percentile_clipping"}


def loads_wide(kernel: building.Kernel) -> bool:
    """Return whether a kernel has loads of 128 bits: of parameters, momentum, or gradients that allow it."""
    return kernel.name in (WIDE_LOADS if kernel.grad_alignment == WIDEST else WIDE_STORES)


def operations(ptx: str) -> set[str]:
    return set(re.findall(r"^\s*(?:\{\s*)?(?:@!?%p\d+ )?([a-z][a-z0-9]*(?:\.\w+)*(?:::\w+)*(?:\.\w+)*)\s", ptx, re.M))


def in_loops(ptx: str) -> str:
    """Return the lines that lie between a label and a jump back to it."""
    lines = ptx.splitlines()
    labels = {match[1]: i for i, line in enumerate(lines) if (match := re.match(r"\s*(\$\w+):", line))}
    inside: set[int] = set()
    for i, line in enumerate(lines):
        jump = re.search(r"\bbra(?:\.uni)?\s+(\$\w+);", line)
        if jump and labels[jump[1]] < i:
            inside.update(range(labels[jump[1]], i))
    return "\n".join(lines[i] for i in sorted(inside))


@every_build
def test_ptx(capability: building.Capability, kernel: building.Kernel) -> None:
    name, ptx = kernel.name, building.ptx(launch.kernel(*kernel), capability)
    found, repeated = operations(ptx), operations(in_loops(ptx))
    assert repeated, "no loop was found"
    assert {op for op in found if op.startswith(("ld.global", "st.global"))}, "the pattern finds nothing"
    rounding = {op for op in found if re.match(r"(add|sub|mul|div|rcp|sqrt)\.(?!rn\.).*f32", op)}
    assert not rounding, "rounded otherwise, or open to contraction"
    assert not {op for op in found if op.startswith(("fma", "mad")) and op.endswith(("f32", "f64"))}
    assert not {op for op in found if ".ftz" in op or ".approx" in op or ".full" in op}
    assert {op for op in found if "f64" in op} <= (FLOAT64_OPERATIONS if name in FLOAT64 else set())
    assert not {op for op in found if ".local" in op}
    assert not {op for op in repeated if re.match(r"(div|rem)\..*64", op)}, "64-bit division in a loop"
    assert not {op for op in found if op.startswith("call")}, "something was not inlined"
    assert not loads_wide(kernel) or {op for op in found if re.match(r"ld\.global\.v4\.\w32", op)}
    assert name not in WIDE_STORES or {op for op in found if re.match(r"st\.global\.v4\.\w32", op)}


@every_build
def test_machine_code(capability: building.Capability, kernel: building.Kernel) -> None:
    name, function = kernel.name, launch.kernel(*kernel)
    for route in ("assembled", "link-time optimised"):
        if route == "assembled":
            binary = building.assemble(building.ptx(function, capability), capability)
        else:
            binary = building.link_time_optimized(function, capability)
        assert binary.registers > 0, "the assembler's report was not understood"
        assert (binary.spill_bytes, binary.stack_bytes) == (0, 0), route
        if building.nvdisasm() is None:
            pytest.skip("nvdisasm was not found; `pip install nvidia-cuda-nvdisasm` brings it")
        names = {instruction.name for instruction in building.disassemble(binary.cubin)}
        assert any(op.startswith("LDG") for op in names), "the disassembly was not understood"
        assert not {op for op in names if op.startswith(("LDL", "STL"))}, route
        assert name in FLOAT64 or not {op for op in names if re.match(r"D(ADD|MUL|FMA|SETP)|F2F\.F(64|32\.F64)", op)}
        # A division is made of fused operations; nothing else may be.
        assert name in DIVIDING or not {op for op in names if op.startswith("FFMA")}, route
        assert not loads_wide(kernel) or {op for op in names if op.startswith("LDG") and ".128" in op}, route
        assert name not in WIDE_STORES or {op for op in names if op.startswith("STG") and ".128" in op}, route


# Instructions of the main loop for eight elements, on compute capability 9.0.
NEAREST_COUNTS = {
    ("update_32bit", "float32"): 120,
    ("update_32bit", "float16"): 140,
    ("update_32bit", "bfloat16"): 140,
    ("update_8bit_blockwise", "float32"): 258,
    ("update_8bit_blockwise", "float16"): 274,
    ("update_8bit_blockwise", "bfloat16"): 274,
    ("update_tensorwise", "float32"): 230,
    ("update_tensorwise", "float16"): 247,
    ("update_tensorwise", "bfloat16"): 247,
}
MOST = {
    "update_32bit": {STOCHASTIC: 28.5, MASTER_24: 25.8, MASTER_32: 24.9},
    "update_8bit_blockwise": {STOCHASTIC: 44.5, MASTER_24: 41.9, MASTER_32: 41.3},
    "update_tensorwise": {STOCHASTIC: 41, MASTER_24: 38.5, MASTER_32: 38.2},
}


@functools.cache
def binary_of(kernel: building.Kernel) -> building.Binary:
    return building.link_time_optimized(launch.kernel(*kernel), (9, 0))


def main_loop(binary: building.Binary) -> list[building.Instruction]:
    return building.main_loop(building.disassemble(binary.cubin))


@pytest.mark.skipif(building.nvdisasm() is None, reason="nvdisasm was not found")
@pytest.mark.parametrize(("name", "dtype"), NEAREST_COUNTS)
def test_rounding_to_nearest_costs_no_more_for_what_it_does_not_use(name: str, dtype: str) -> None:
    assert len(main_loop(binary_of(building.Kernel(name, dtype)))) <= NEAREST_COUNTS[name, dtype]


WIDTHS = {16: "128", 8: "64", 4: "32", 2: "U16"}  # by bytes, as instructions are named


def widths(instructions: list[building.Instruction], prefix: str) -> Counter[str]:
    """Return how many accesses of which width there are."""
    return Counter(
        next((width for width in WIDTHS.values() if width in i.name.split(".")), "32")
        for i in instructions
        if i.name.startswith(prefix)
    )


BUCKETS = [
    *(building.Kernel("", "float32", grad_alignment=alignment) for alignment in (8, 4)),
    *(building.Kernel("", "bfloat16", grad_alignment=alignment) for alignment in (8, 2)),
    *(building.Kernel("", "bfloat16", weights=weights, grad_alignment=4) for weights in building.WEIGHTS),
    building.Kernel("", "bfloat16", grad_dtype="float32", grad_alignment=4),
    building.Kernel("", "float16", scaled_loss=True, grad_alignment=4),
]


@pytest.mark.skipif(building.nvdisasm() is None, reason="nvdisasm was not found")
@pytest.mark.parametrize("kind", BUCKETS, ids=str)
@pytest.mark.parametrize("name", launch.UPDATES)
def test_only_gradients_in_a_bucket_are_loaded_in_smaller_pieces(name: str, kind: building.Kernel) -> None:
    """Parameters, lower parts, momentum and codes move as on the path of aligned gradients, in as many registers."""
    kernel = kind._replace(name=name)
    wide, narrow = binary_of(kernel._replace(grad_alignment=WIDEST)), binary_of(kernel)
    assert narrow.registers <= wide.registers + 8 and narrow.spill_bytes == narrow.stack_bytes == 0
    before, after = main_loop(wide), main_loop(narrow)
    assert widths(after, "STG") == widths(before, "STG")
    alignment, grad_bytes = kind.grad_alignment, 32 if "float32" in (kind.dtype, kind.grad_dtype) else 16
    # In halves, four elements of 2 bytes are all that lies together.
    widest = 8 if name == "update_32bit" and grad_bytes == 16 else 16
    expected = widths(before, "LDG")
    expected[WIDTHS[widest]] -= grad_bytes // widest
    expected[WIDTHS[alignment]] += grad_bytes // alignment
    assert widths(after, "LDG") == +expected


@pytest.mark.skipif(building.nvdisasm() is None, reason="nvdisasm was not found")
@pytest.mark.parametrize("weights", building.WEIGHTS)
@pytest.mark.parametrize("name", MOST)
def test_16_bit_weights_stay_bound_by_memory(name: str, weights: int) -> None:
    """And their lower parts are moved eight at once."""
    body = main_loop(binary_of(building.Kernel(name, "bfloat16", weights=weights)))
    plain = main_loop(binary_of(building.Kernel(name, "bfloat16")))
    assert len(body) / 8 <= MOST[name][weights]
    for prefix in ("LDG", "STG"):
        expected = widths(plain, prefix)
        if weights != STOCHASTIC:
            low_bytes, pieces = 8 * (1 if weights == MASTER_24 else 2), 2 if name == "update_32bit" else 1
            expected[WIDTHS[low_bytes // pieces]] += pieces
        assert widths(body, prefix) == expected

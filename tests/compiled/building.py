"""Builds kernels without a GPU or a driver, by both routes, and takes the result apart."""

from __future__ import annotations

import contextlib
import glob
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from lion.cuda_kernels import launch
from lion.cuda_kernels.table import WIDEST
from lion.cuda_kernels.tuning import DEFAULT, Tuning
from lion.reference.rounding import MASTER_24, MASTER_32, NEAREST, STOCHASTIC

Capability = tuple[int, int]

CAPABILITIES: list[Capability] = [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]
DTYPES = ("float32", "float16", "bfloat16")
WEIGHTS = (STOCHASTIC, MASTER_24, MASTER_32)


class Kernel(NamedTuple):
    """A kernel: the arguments of :func:`lion.cuda_kernels.launch.kernel`."""

    name: str
    dtype: str | None
    scaled_loss: bool = False
    grad_dtype: str | None = None
    weights: int = NEAREST
    grad_alignment: int = WIDEST
    tuning: Tuning = DEFAULT

    def __str__(self) -> str:
        parts = [self.name, self.dtype, "scaled" * self.scaled_loss, self.grad_dtype]
        parts += [f"weights{self.weights}" * bool(self.weights)]
        parts += [f"aligned{self.grad_alignment}" * (self.grad_alignment < WIDEST)]
        return "-".join(filter(None, parts))


KERNELS = [
    *(
        Kernel(name, dtype, scaled_loss)
        for name in (*launch.UPDATES, "measure_tensorwise")
        for dtype in DTYPES
        for scaled_loss in (False, True)
    ),
    *(
        Kernel(name, "bfloat16", scaled_loss, grad_dtype, weights)
        for name in launch.UPDATES
        for scaled_loss, grad_dtype in ((False, None), (True, None), (False, "float32"))
        for weights in WEIGHTS
    ),
    *(Kernel(name, dtype, False, "float32") for name in launch.UPDATES for dtype in ("float16", "bfloat16")),
    *(
        Kernel(name, dtype, grad_alignment=alignment)
        for name in launch.READING_GRADIENTS
        for dtype, alignment in (("float32", 4), ("bfloat16", 2))
    ),
    *(
        Kernel(name, dtype)
        for name in ("partial_norms", "quantize_blockwise", "dequantize_blockwise")
        for dtype in DTYPES
    ),
    *(Kernel(name, None) for name in ("begin_tensorwise", "end_tensorwise", "squared_norm", "percentile_clipping")),
]
"""Every kernel, and all that it differs in, though not all of that at once."""


class Binary(NamedTuple):
    """What the assembler made of a kernel."""

    cubin: bytes
    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int


@contextlib.contextmanager
def _device_of(capability: Capability) -> Iterator[None]:
    """Let numba-cuda compile as if a device of this compute capability were current."""
    from numba.cuda import compiler, dispatcher

    class Device:
        compute_capability = capability

    modules: list[Any] = [dispatcher, compiler]
    saved = [module.get_current_device for module in modules]
    for module in modules:
        module.get_current_device = Device
    try:
        yield
    finally:
        for module, function in zip(modules, saved, strict=True):
            module.get_current_device = function


def _compile(kernel: Callable[..., None], capability: Capability, output: str) -> list[Any]:
    from numba.cuda import compiler, types

    arguments = (types.int64,) * kernel.__code__.co_argcount
    with _device_of(capability):
        signature = types.void(*arguments)
        codes, _ = compiler.compile_all(kernel, signature, device=False, cc=capability, abi="numba", output=output)
    return [getattr(code, "code", code) for code in codes]


def ptx(kernel: Callable[..., None], capability: Capability) -> str:
    """Return the PTX of a kernel."""
    (text,) = _compile(kernel, capability, "ptx")
    return text if isinstance(text, str) else bytes(text).decode()


def _link(inputs: list[tuple[Any, bytes]], options: list[str]) -> tuple[bytes, str]:
    from cuda.bindings import nvjitlink

    handle = nvjitlink.create(len(options), options)
    try:
        for kind, data in inputs:
            nvjitlink.add_data(handle, kind, data, len(data), "input")
        nvjitlink.complete(handle)
        code = bytearray(nvjitlink.get_linked_cubin_size(handle))
        nvjitlink.get_linked_cubin(handle, code)
        log = bytearray(nvjitlink.get_info_log_size(handle))
        nvjitlink.get_info_log(handle, log)
    finally:
        nvjitlink.destroy(handle)
    return bytes(code), log.decode(errors="replace")


def _binary(cubin: bytes, log: str) -> Binary:
    def number(pattern: str) -> int:
        return sum(int(found) for found in re.findall(pattern, log))

    return Binary(
        cubin,
        registers=number(r"Used (\d+) registers"),
        spill_bytes=number(r"(\d+) bytes spill"),
        stack_bytes=number(r"(\d+) bytes stack frame"),
        shared_bytes=number(r"(\d+) bytes smem"),
    )


def assemble(text: str, capability: Capability) -> Binary:
    """Return the machine code of a kernel's PTX."""
    from cuda.bindings import nvjitlink

    arch = f"-arch=sm_{capability[0]}{capability[1]}"
    return _binary(*_link([(nvjitlink.InputType.PTX, text.encode() + b"\0")], [arch, "-Xptxas=-v"]))


def link_time_optimized(
    kernel: Callable[..., None], capability: Capability, max_registers: int | None = None
) -> Binary:
    """Return the machine code by the route that ``@cuda.jit`` takes when nvJitLink is there."""
    from cuda.bindings import nvjitlink

    arch = f"-arch=sm_{capability[0]}{capability[1]}"
    inputs = [(nvjitlink.InputType.LTOIR, bytes(code)) for code in _compile(kernel, capability, "ltoir")]
    limit = [] if max_registers is None else [f"-maxrregcount={max_registers}"]
    return _binary(*_link(inputs, ["-lto", arch, "-Xptxas=-v", *limit]))


def nvdisasm() -> str | None:
    """Return the path of the disassembler, if there is one."""
    folders = [folder for entry in sys.path for folder in glob.glob(os.path.join(entry, "nvidia", "cu*", "bin"))]
    return shutil.which("nvdisasm") or shutil.which("nvdisasm", path=os.pathsep.join(folders))


class Instruction(NamedTuple):
    """A machine instruction: its offset in bytes, its text, and where it jumps to, if it does."""

    offset: int
    text: str
    target: int | None

    @property
    def name(self) -> str:
        return re.sub(r"^@!?U?P\w+ ", "", self.text).split()[0]


def disassemble(cubin: bytes) -> list[Instruction]:
    """Return the instructions of a kernel, without those that only fill up."""
    program = nvdisasm()
    if program is None:
        raise RuntimeError("nvdisasm was not found; `pip install nvidia-cuda-nvdisasm` brings it")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        lines = subprocess.run([program, "-c", file.name], capture_output=True, text=True, check=True).stdout
    labels: dict[str, int] = {}
    waiting: list[str] = []
    found: list[tuple[int, str]] = []
    for line in lines.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            waiting.append(label[1])
        elif instruction := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(\S.*?)\s*;", line):
            offset = int(instruction[1], 16)
            labels.update(dict.fromkeys(waiting, offset))
            waiting = []
            if instruction[2] != "NOP":
                found.append((offset, instruction[2]))
    result = []
    for offset, text in found:
        jump = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", text)
        result.append(Instruction(offset, text, labels.get(jump[1]) if jump else None))
    return result


def main_loop(instructions: list[Instruction]) -> list[Instruction]:
    """Return the instructions of the innermost loop that moves 128 bits and computes float32."""
    loops = []
    for instruction in instructions:
        if instruction.target is not None and instruction.target < instruction.offset:
            body = [i for i in instructions if instruction.target <= i.offset <= instruction.offset]
            names = [i.name for i in body]
            if any(n.startswith(("LDG", "STG")) and ".128" in n for n in names) and "FMUL" in names:
                loops.append(body)
    return min(loops, key=len)

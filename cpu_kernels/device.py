"""Every intrinsic of the CPU kernels, and the decorator that compiles them.

Kernels work on raw addresses (int64), so that one call serves many tensors and no array is ever wrapped.
"""

from __future__ import annotations

import functools
import hashlib
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite
import llvmlite.binding
import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic

I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
HALF, FLOAT = ir.HalfType(), ir.FloatType()
TABLE, FLOATS, INTEGER, FLOAT32 = types.int64[::1], types.float32[::1], types.int64, types.float32
ROWS = types.int64[:, ::1]
MAGNITUDE = np.uint32(0x7FFFFFFF)
FLOAT_DTYPES = ("float32", "float16", "bfloat16")
INTEGERS = {"uint64": I64, "uint32": I32, "uint16": I16, "int16": I16, "uint8": I8, "int8": I8}
MEMORY_TYPES = {"float32": FLOAT, "float16": HALF, "bfloat16": I16, **INTEGERS}
MACHINE = platform.machine().lower()
X86, ARM = MACHINE in ("x86_64", "amd64"), MACHINE in ("aarch64", "arm64")
# What the processor has that Numba generates code for: this one, or one that the user described.
_DESCRIBED = get_host_cpu_features() if numba.config.CPU_FEATURES is None else numba.config.CPU_FEATURES
FEATURES = frozenset(feature[1:] for feature in _DESCRIBED.split(",") if feature.startswith("+"))
# Round to nearest even, keep denormals, raise nothing: the reset value of MXCSR or FPCR.
DEFAULT_FLOAT_MODE = 0x1F80 if X86 else 0

# A helper of kernels: compiled into each kernel that calls it.
inlined = numba.njit(nogil=True, error_model="numpy")


def kernel(dtype: str, *arguments: types.Type, nogil: bool = True) -> Callable[[Callable[..., None]], Any]:
    """Return a decorator that compiles a kernel, or loads it from the disk.

    A cached kernel has a file name of its own for the content of all sources, the dtype and the processor: Numba
    itself would see changes of one file only, and processes that fill its cache at once may mix up kernels that
    share a name.

    Args:
        dtype: What is in the kernel's closure, if anything.
        arguments: Numba types of the kernel's arguments, without the control block, which comes first.
        nogil: Whether it runs without the GIL (default: True).
    """

    def compiled(function: Callable[..., None]) -> Any:
        function.__qualname__ += f"_{dtype}_{_fingerprint()}"
        jit = functools.partial(numba.njit, types.void(TABLE, *arguments), nogil=nogil, error_model="numpy")
        try:
            return jit(cache=True)(function)
        except (OSError, RuntimeError):  # there is no folder that can be written, or the disk is full
            return jit()(function)

    return compiled


@functools.cache
def _fingerprint() -> str:
    processor = llvmlite.binding.get_host_cpu_name(), llvmlite.binding.get_host_cpu_features().flatten()
    chosen = numba.config.CPU_NAME, numba.config.CPU_FEATURES
    machine = f"{processor} {chosen} {numba.__version__} {llvmlite.__version__}"
    digest = hashlib.sha256(machine.encode())
    root = Path(__file__).resolve().parent.parent
    for package in ("cpu_kernels", "reference"):
        for path in sorted((root / package).glob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def by_dtype(make: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that makes the kernels of some dtypes, and of options, once, and refuses other dtypes."""

    @functools.cache
    def made(*dtypes: str, **options: int) -> Any:
        for dtype in dtypes:
            if dtype not in FLOAT_DTYPES:
                raise ValueError(f"Invalid dtype: {dtype!r}; {', '.join(FLOAT_DTYPES)} are allowed")
        return make(*dtypes, **options)

    return made


def _pointer(builder: ir.IRBuilder, address: ir.Value, index: ir.Value, item: ir.Type) -> ir.Value:
    return builder.gep(builder.inttoptr(address, item.as_pointer()), [index])


@intrinsic(prefer_literal=True)
def load(typingctx, dtype, address, index):  # type: ignore[no-untyped-def]
    """load(dtype, address, index): the item as float32, or an integer as uint32 or uint64; at any address."""
    name = dtype.literal_value
    result = (types.uint64 if name == "uint64" else types.uint32) if name in INTEGERS else types.float32

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        item = MEMORY_TYPES[name]
        value = builder.load(_pointer(builder, args[1], args[2], item), align=1)
        if name == "float16":
            return builder.fpext(value, FLOAT)
        if name == "bfloat16":
            return builder.bitcast(builder.shl(builder.zext(value, I32), I32(16)), FLOAT)
        if name in ("uint8", "uint16"):
            return builder.zext(value, I32)
        if name in ("int8", "int16"):
            return builder.sext(value, I32)
        return value

    return result(dtype, types.int64, types.int64), codegen


@intrinsic(prefer_literal=True)
def store(typingctx, dtype, address, index, value):  # type: ignore[no-untyped-def]
    """store(dtype, address, index, value): a float32 rounded to nearest even, or an integer cut off; at any address."""
    name = dtype.literal_value
    operand = (types.uint64 if name == "uint64" else types.uint32) if name in INTEGERS else types.float32

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        item, value = MEMORY_TYPES[name], args[3]
        if name == "float16":
            value = builder.fptrunc(value, HALF)
        elif name == "bfloat16":
            value = _round_to_bfloat16(builder, value)
        elif name in ("uint8", "uint16"):
            value = builder.trunc(value, item)
        builder.store(value, _pointer(builder, args[1], args[2], item), align=1)
        return context.get_dummy_value()

    return types.void(dtype, types.int64, types.int64, operand), codegen


def _round_to_bfloat16(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    # LLVM's own fptrunc may use an instruction that flushes denormals.
    bits = builder.bitcast(value, I32)
    odd = builder.and_(builder.lshr(bits, I32(16)), I32(1))
    rounded = builder.lshr(builder.add(bits, builder.add(odd, I32(0x7FFF))), I32(16))
    nan = builder.fcmp_unordered("uno", value, value)
    return builder.trunc(builder.select(nan, I32(0x7FC0), rounded), I16)


@intrinsic(prefer_literal=True)
def stack(typingctx, count):  # type: ignore[no-untyped-def]
    """stack(count): the address of so many 4-byte items on the stack, on cache lines of their own.

    An array would not do: Numba frees it after its last use, and does not see the uses of its address.
    """
    items = count.literal_value

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        with builder.goto_entry_block():
            block = builder.alloca(ir.ArrayType(I32, items))
            block.align = 64
        return builder.ptrtoint(block, I64)

    return types.int64(count), codegen


@intrinsic
def float_to_bits(typingctx, value):  # type: ignore[no-untyped-def]
    """float_to_bits(value): the bits of a float32 as uint32."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.bitcast(args[0], I32)

    return types.uint32(types.float32), codegen


@intrinsic
def bits_to_float(typingctx, bits):  # type: ignore[no-untyped-def]
    """bits_to_float(bits): the float32 with the bits of a uint32."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.bitcast(args[0], FLOAT)

    return types.float32(types.uint32), codegen


@intrinsic
def atomic_add(typingctx, address, value):  # type: ignore[no-untyped-def]
    """atomic_add(address, value): add to an int64 and return what was there before."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.atomic_rmw("add", builder.inttoptr(args[0], I64.as_pointer()), args[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def atomic_max_bits(typingctx, address, value):  # type: ignore[no-untyped-def]
    """atomic_max_bits(address, value): raise a uint32 to at least a value."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.atomic_rmw("umax", builder.inttoptr(args[0], I32.as_pointer()), args[1], "seq_cst")

    return types.uint32(types.int64, types.uint32), codegen


@intrinsic
def pause(typingctx):  # type: ignore[no-untyped-def]
    """pause(): let the core's other thread run while spinning."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        if X86:
            function = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, function, "llvm.x86.sse2.pause"), [])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def set_float_mode(typingctx, mode):  # type: ignore[no-untyped-def]
    """set_float_mode(mode): set the thread's floating-point control register and return the old one.

    ``torch.set_flush_denormal``, for one, changes it for its thread.
    """

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        if X86:
            slot = cgutils.alloca_once(builder, I32)
            pointer = builder.bitcast(slot, I8.as_pointer())
            control = ir.FunctionType(ir.VoidType(), [I8.as_pointer()])
            builder.call(cgutils.get_or_insert_function(builder.module, control, "llvm.x86.sse.stmxcsr"), [pointer])
            old = builder.load(slot)
            builder.store(builder.trunc(args[0], I32), slot)
            builder.call(cgutils.get_or_insert_function(builder.module, control, "llvm.x86.sse.ldmxcsr"), [pointer])
            return builder.zext(old, I64)
        if ARM:
            get, put = ir.FunctionType(I64, []), ir.FunctionType(ir.VoidType(), [I64])
            old = builder.call(cgutils.get_or_insert_function(builder.module, get, "llvm.aarch64.get.fpcr"), [])
            builder.call(cgutils.get_or_insert_function(builder.module, put, "llvm.aarch64.set.fpcr"), [args[0]])
            return old
        return I64(0)

    return types.int64(types.int64), codegen

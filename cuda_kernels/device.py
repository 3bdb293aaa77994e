"""Every intrinsic of the CUDA kernels, each with its twin for the simulator, and Numba's names that they use.

Floating-point operations are rounded one by one: ``a * b + c`` in a kernel would be compiled to a fused multiply-add,
so kernels call :func:`mul` and :func:`add`. Memory is reached through int64 addresses in the global address space.
"""

from __future__ import annotations

import ctypes
import inspect
import threading
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
from llvmlite import ir
from numba import cuda as cuda
from numba import float32 as float32
from numba import float64 as float64
from numba import int32 as int32
from numba import uint32 as uint32
from numba.cuda import types
from numba.cuda.extending import intrinsic

from lion.cuda_kernels import simulator, table
from lion.cuda_kernels.simulator import exchange, synchronize
from lion.reference.rounding import QUIET_NAN

SIMULATOR = simulator.enabled()

FLOAT32, FLOAT16, BFLOAT16 = 0, 1, 2

# Elements from the first to the second four of a lane's eight.
TOGETHER, HALVES = 4, 128

# The simulator is fastest with one warp in a block of threads.
WARPS = 1 if SIMULATOR else table.WARPS

_void, _u8, _u16, _u32 = types.void, types.uint8, types.uint16, types.uint32
_i32, _i64, _f32, _f64 = types.int32, types.int64, types.float32, types.float64

_FLOAT, _DOUBLE, _HALF = ir.FloatType(), ir.DoubleType(), ir.HalfType()
_I8, _I16, _I32, _I64 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
_ALL_LANES = ir.Constant(_I32, 0xFFFFFFFF)


def device(function: Callable[..., Any]) -> Any:
    """Compile a device function that is always inlined; the simulator runs it as it is."""
    return function if SIMULATOR else cuda.jit(device=True, forceinline=True)(function)


def _intrinsic(signature: Any, twin: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Turn a function that emits LLVM code into an intrinsic of ``signature``; in the simulator, into its twin."""

    def decorate(emit: Callable[..., Any]) -> Any:
        if SIMULATOR:
            return twin

        def template(typing_context: Any, *arguments: Any) -> Any:
            def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
                result = emit(builder, *values)
                if isinstance(signature.return_type, types.BaseTuple):
                    return context.make_tuple(builder, signature.return_type, result)
                return context.get_dummy_value() if signature.return_type == _void else result

            return signature, generate

        template.__name__ = emit.__name__
        template.__doc__ = emit.__doc__
        names = ["typing_context", *list(inspect.signature(emit).parameters)[1:]]
        template.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
        )
        return intrinsic(template)

    return decorate


def _call(builder: Any, name: str, result: Any, *values: Any) -> Any:
    function_type = ir.FunctionType(result, [value.type for value in values])
    function = builder.module.globals.get(name) or ir.Function(builder.module, function_type, name)
    return builder.call(function, values)


def _assembly(builder: Any, text: str, result: Any, constraints: str, *values: Any, side_effect: bool = False) -> Any:
    function_type = ir.FunctionType(result, [value.type for value in values])
    return builder.call(ir.InlineAsm(function_type, text, constraints, side_effect), values)


def _pointer(builder: Any, address: Any, pointee: Any) -> Any:
    return builder.inttoptr(address, ir.PointerType(pointee, addrspace=1))


def _load(builder: Any, address: Any, pointee: Any, align: int) -> Any:
    return builder.load(_pointer(builder, address, pointee), align=align)


def _store(builder: Any, address: Any, value: Any, align: int) -> None:
    builder.store(value, _pointer(builder, address, value.type), align=align)


def _choose(builder: Any, newer: Callable[[], Any], older: Callable[[], Any]) -> Any:
    """Emit two versions, for compute capability 8.0 and for those before; the compiler keeps the one that fits.

    Choosing here would not do: numba-cuda compiles a device function once, even for devices that differ.
    """
    reflect_type = ir.FunctionType(_I32, [ir.PointerType(_I8)])
    reflect = builder.module.globals.get("__nvvm_reflect") or ir.Function(
        builder.module, reflect_type, "__nvvm_reflect"
    )
    architecture = builder.call(reflect, [_string(builder, "__CUDA_ARCH")])
    with builder.if_else(builder.icmp_unsigned(">=", architecture, ir.Constant(_I32, 800))) as (then, otherwise):
        with then:
            new, new_block = newer(), builder.block
        with otherwise:
            old, old_block = older(), builder.block
    result = builder.phi(new.type)
    result.add_incoming(new, new_block)
    result.add_incoming(old, old_block)
    return result


def _string(builder: Any, text: str) -> Any:
    name = f"lion_{text}"
    value = ir.Constant(ir.ArrayType(_I8, len(text) + 1), bytearray(text.encode() + b"\0"))
    variable = builder.module.globals.get(name)
    if variable is None:
        variable = ir.GlobalVariable(builder.module, value.type, name)
        variable.initializer, variable.global_constant, variable.linkage = value, True, "internal"
    return builder.gep(variable, [ir.Constant(_I32, 0), ir.Constant(_I32, 0)])


# Arithmetic -----------------------------------------------------------------------------------------------------------


@_intrinsic(_f32(_f32, _f32), lambda a, b: np.float32(a * b))
def mul(builder: Any, a: Any, b: Any) -> Any:
    """Return ``a * b`` rounded to float32."""
    return _call(builder, "llvm.nvvm.mul.rn.f", _FLOAT, a, b)


@_intrinsic(_f32(_f32, _f32), lambda a, b: np.float32(a + b))
def add(builder: Any, a: Any, b: Any) -> Any:
    """Return ``a + b`` rounded to float32."""
    return _call(builder, "llvm.nvvm.add.rn.f", _FLOAT, a, b)


@_intrinsic(_f32(_f32, _f32), lambda a, b: np.float32(a - b))
def sub(builder: Any, a: Any, b: Any) -> Any:
    """Return ``a - b`` rounded to float32."""
    return _call(builder, "llvm.nvvm.add.rn.f", _FLOAT, a, builder.fsub(ir.Constant(_FLOAT, -0.0), b))


@_intrinsic(_f64(_f64, _f64), lambda a, b: np.float64(a + b))
def add_f64(builder: Any, a: Any, b: Any) -> Any:
    """Return ``a + b`` rounded to float64."""
    return _call(builder, "llvm.nvvm.add.rn.d", _DOUBLE, a, b)


@_intrinsic(_f32(_f32), lambda a: np.float32(1) / np.float32(a))
def reciprocal(builder: Any, a: Any) -> Any:
    """Return ``1 / a`` rounded to float32."""
    return _call(builder, "llvm.nvvm.rcp.rn.f", _FLOAT, a)


@_intrinsic(_f32(_f32, _f32), lambda a, b: np.float32(a) / np.float32(b))
def div(builder: Any, a: Any, b: Any) -> Any:
    """Return ``a / b`` rounded to float32."""
    return _call(builder, "llvm.nvvm.div.rn.f", _FLOAT, a, b)


@_intrinsic(_f32(_f32), lambda a: np.sqrt(np.float32(a)))
def sqrt(builder: Any, a: Any) -> Any:
    """Return the square root of ``a`` rounded to float32."""
    return _call(builder, "llvm.nvvm.sqrt.rn.f", _FLOAT, a)


def _abs_max_twin(a: Any, b: Any) -> Any:
    return np.maximum(np.abs(np.float32(a)), np.abs(np.float32(b)))


@_intrinsic(_f32(_f32, _f32), _abs_max_twin)
def abs_max(builder: Any, a: Any, b: Any) -> Any:
    """Return the greater magnitude, NaN if one is NaN."""
    patterns = [builder.and_(builder.bitcast(x, _I32), ir.Constant(_I32, 0x7FFFFFFF)) for x in (a, b)]
    magnitudes = [builder.bitcast(pattern, _FLOAT) for pattern in patterns]
    return _choose(
        builder,
        lambda: _assembly(builder, "max.NaN.f32 $0, $1, $2;", _FLOAT, "=f,f,f", *magnitudes),
        lambda: builder.select(builder.icmp_unsigned(">", *patterns), *magnitudes),
    )


# Bits -----------------------------------------------------------------------------------------------------------------


@_intrinsic(_u32(_f32), lambda value: np.float32(value).view(np.uint32))
def bits(builder: Any, value: Any) -> Any:
    """Return the bits of a float32."""
    return builder.bitcast(value, _I32)


@_intrinsic(_f32(_u32), lambda pattern: np.uint32(pattern).view(np.float32))
def from_bits(builder: Any, pattern: Any) -> Any:
    """Return the float32 with these bits."""
    return builder.bitcast(pattern, _FLOAT)


@_intrinsic(_i32(_u32), lambda pattern: np.uint32(pattern).view(np.int32))
def as_signed(builder: Any, pattern: Any) -> Any:
    """Return the int32 with these bits."""
    return pattern


@_intrinsic(_u32(_u32, _u32), lambda a, b: np.uint32((int(a) + int(b)) & 0xFFFFFFFF))
def wrapping_add(builder: Any, a: Any, b: Any) -> Any:
    """Return ``a + b`` modulo 2**32."""
    return builder.add(a, b)


def _add_or_zero_twin(a: Any, b: Any) -> Any:
    return np.uint32(max(int(np.uint32((int(a) + int(b)) & 0xFFFFFFFF).astype(np.int32)), 0))


@_intrinsic(_u32(_u32, _u32), _add_or_zero_twin)
def add_or_zero(builder: Any, a: Any, b: Any) -> Any:
    """Return ``a + b`` modulo 2**32, or 0 where that is negative as an int32: one instruction from 9.0 on."""
    return _assembly(builder, "{ .reg .b32 t; add.s32 t, $1, $2; max.s32 $0, t, 0; }", _I32, "=r,r,r", a, b)


def _ordered_twin(pattern: Any) -> Any:
    return np.uint32(pattern ^ np.uint32(0x7FFFFFFF)) if pattern >> np.uint32(31) else np.uint32(pattern)


@_intrinsic(_u32(_u32), _ordered_twin)
def ordered(builder: Any, pattern: Any) -> Any:
    """Return an integer that is ordered, as an int32, like the float32 with these bits."""
    sign = builder.ashr(pattern, ir.Constant(_I32, 31))
    return builder.xor(pattern, builder.and_(sign, ir.Constant(_I32, 0x7FFFFFFF)))


@_intrinsic(_u32(_u32, _u32), lambda word, place: np.uint32((int(word) >> (8 * int(place))) & 0xFF))
def byte(builder: Any, word: Any, place: Any) -> Any:
    """Return one of a word's bytes, the lowest at place 0."""
    selector = builder.or_(place, ir.Constant(_I32, 0x4440))
    return _call(builder, "llvm.nvvm.prmt", _I32, word, ir.Constant(_I32, 0), selector)


def _permuted(builder: Any, a: Any, b: Any, selector: int) -> Any:
    return _call(builder, "llvm.nvvm.prmt", _I32, a, b, ir.Constant(_I32, selector))


def _bytes_twin(place: int) -> Callable[..., Any]:
    return lambda *words: np.uint32(sum((int(word) >> (8 * place) & 0xFF) << (8 * i) for i, word in enumerate(words)))


@_intrinsic(_u32(_u32, _u32, _u32, _u32), _bytes_twin(3))
def top_bytes(builder: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """Return the uppermost bytes of four words, that of ``a`` lowest."""
    return _permuted(builder, _permuted(builder, a, b, 0x0073), _permuted(builder, c, d, 0x0073), 0x5410)


@_intrinsic(_u32(_u32, _u32, _u32, _u32), _bytes_twin(1))
def second_bytes(builder: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """Return the second lowest bytes of four words, that of ``a`` lowest."""
    return _permuted(builder, _permuted(builder, a, b, 0x0051), _permuted(builder, c, d, 0x0051), 0x5410)


@_intrinsic(_u32(_u32, _u32), lambda a, b: np.uint32(int(a) & 0xFFFF | (int(b) & 0xFFFF) << 16))
def low_halves(builder: Any, a: Any, b: Any) -> Any:
    """Return the lower halves of two words, that of ``a`` lower."""
    return _permuted(builder, a, b, 0x5410)


@_intrinsic(_u32(_u32, _u32), lambda a, b: np.uint32(int(a) >> 16 | int(b) >> 16 << 16))
def high_halves(builder: Any, a: Any, b: Any) -> Any:
    """Return the upper halves of two words, that of ``a`` lower."""
    return _permuted(builder, a, b, 0x7632)


@_intrinsic(_u32(_u32, _u32), lambda word, place: (word >> np.uint32(16 * place)).astype(np.int16).astype(np.uint32))
def signed_half(builder: Any, word: Any, place: Any) -> Any:
    """Return one of a word's halves, the lower at place 0, with its sign extended."""
    shift = builder.shl(place, ir.Constant(_I32, 4))
    return builder.sext(builder.trunc(builder.lshr(word, shift), _I16), _I32)


def _half_above_byte_twin(word: Any, low_word: Any, place: Any) -> Any:
    half, low = int(word) >> 16 * (int(place) % 2) & 0xFFFF, int(low_word) >> 8 * int(place) & 0xFF
    return np.uint32(half << 16 | low << 8 | low)


@_intrinsic(_u32(_u32, _u32, _u32), _half_above_byte_twin)
def half_above_byte(builder: Any, word: Any, low_word: Any, place: Any) -> Any:
    """Return a word's half at ``place % 2`` above another's byte at ``place``, which fills the lowest byte, too."""
    byte = builder.mul(place, ir.Constant(_I32, 0x0011))
    half = builder.mul(builder.and_(place, ir.Constant(_I32, 1)), ir.Constant(_I32, 0x2200))
    selector = builder.add(builder.add(byte, half), ir.Constant(_I32, 0x1044))
    return _call(builder, "llvm.nvvm.prmt", _I32, word, low_word, selector)


def _add_rounding_24_twin(pattern: Any) -> Any:
    return np.uint32((int(pattern) + 0x807F + (int(pattern) >> 8 & 1)) & 0xFFFFFFFF)


@_intrinsic(_u32(_u32), _add_rounding_24_twin)
def add_rounding_24(builder: Any, pattern: Any) -> Any:
    """Return ``pattern + 0x807F + (pattern >> 8 & 1)`` modulo 2**32, by two instructions.

    The bytes 255, 255, 255, 255 times 127, -1, 3, 0 are 0x807F; where bit 8 is 1, the second is 254.
    """
    text = "{ .reg .b32 t; lop3.b32 t, $1, 0xfffffeff, 0, 0xcf; dp4a.u32.s32 $0, t, 0x0003ff7f, $1; }"
    return _assembly(builder, text, _I32, "=r,r", pattern)


def _multiply_twin(a: Any, b: Any) -> Any:
    product = int(a) * int(b)
    return np.uint32(product & 0xFFFFFFFF), np.uint32(product >> 32)


@_intrinsic(types.UniTuple(_u32, 2)(_u32, _u32), _multiply_twin)
def multiply_words(builder: Any, a: Any, b: Any) -> Any:
    """Return the lower and the upper word of a product."""
    product = builder.mul(builder.zext(a, _I64), builder.zext(b, _I64))
    return builder.trunc(product, _I32), builder.trunc(builder.lshr(product, ir.Constant(_I64, 32)), _I32)


def _quiet_twin(value: Any) -> Any:
    return np.uint32(QUIET_NAN) if np.isnan(value) else np.float32(value).view(np.uint32)


@_intrinsic(_u32(_f32), _quiet_twin)
def quiet_bits(builder: Any, value: Any) -> Any:
    """Return the bits of a result of arithmetic, those of the quiet NaN for a NaN.

    The NaN of arithmetic, 0x7FFFFFFF, is the one pattern that is greater than 0x7FC00000 as a signed integer.
    """
    pattern, nan = builder.bitcast(value, _I32), ir.Constant(_I32, QUIET_NAN)
    return builder.select(builder.icmp_signed("<", pattern, nan), pattern, nan)


# Memory ---------------------------------------------------------------------------------------------------------------


def _load_twin(dtype: Any) -> Callable[[Any], Any]:
    size = np.dtype(dtype).itemsize

    def load(address: Any) -> Any:
        return np.frombuffer(ctypes.string_at(int(address), size), dtype)[0]

    return load


def _store_twin(dtype: Any) -> Callable[[Any, Any], None]:
    size = np.dtype(dtype).itemsize

    def store(address: Any, value: Any) -> None:
        ctypes.memmove(int(address), np.asarray(value).astype(dtype).tobytes(), size)

    return store


def _load_words_twin(count: int) -> Callable[[Any], Any]:
    def load(address: Any) -> Any:
        if address % (4 * count):
            raise ValueError(f"misaligned {32 * count}-bit load at {address:#x}")
        return tuple(np.frombuffer(ctypes.string_at(int(address), 4 * count), np.uint32))

    return load


def _store_words_twin(address: Any, *words: Any) -> None:
    if address % (4 * len(words)):
        raise ValueError(f"misaligned {32 * len(words)}-bit store at {address:#x}")
    ctypes.memmove(int(address), np.array(words, np.uint32).tobytes(), 4 * len(words))


def _load_words(builder: Any, address: Any, count: int) -> list[Any]:
    vector = _load(builder, address, ir.VectorType(_I32, count), 4 * count)
    return [builder.extract_element(vector, ir.Constant(_I32, i)) for i in range(count)]


def _store_words(builder: Any, address: Any, words: tuple[Any, ...]) -> None:
    vector = ir.Constant(ir.VectorType(_I32, len(words)), ir.Undefined)
    for i, word in enumerate(words):
        vector = builder.insert_element(vector, word, ir.Constant(_I32, i))
    _store(builder, address, vector, 4 * len(words))


@_intrinsic(types.UniTuple(_u32, 4)(_i64), _load_words_twin(4))
def load_4_words(builder: Any, address: Any) -> Any:
    """Return four uint32 by one 128-bit load; the address is a multiple of 16."""
    return _load_words(builder, address, 4)


@_intrinsic(_void(_i64, _u32, _u32, _u32, _u32), _store_words_twin)
def store_4_words(builder: Any, address: Any, a: Any, b: Any, c: Any, d: Any) -> None:
    """Write four uint32 by one 128-bit store; the address is a multiple of 16."""
    _store_words(builder, address, (a, b, c, d))


@_intrinsic(types.UniTuple(_u32, 2)(_i64), _load_words_twin(2))
def load_2_words(builder: Any, address: Any) -> Any:
    """Return two uint32 by one 64-bit load; the address is a multiple of 8."""
    return _load_words(builder, address, 2)


@_intrinsic(_void(_i64, _u32, _u32), _store_words_twin)
def store_2_words(builder: Any, address: Any, a: Any, b: Any) -> None:
    """Write two uint32 by one 64-bit store; the address is a multiple of 8."""
    _store_words(builder, address, (a, b))


@_intrinsic(_i64(_i64), _load_twin(np.int64))
def load_i64(builder: Any, address: Any) -> Any:
    """Return the int64 at an address."""
    return _load(builder, address, _I64, 8)


@_intrinsic(_void(_i64, _i64), _store_twin(np.int64))
def store_i64(builder: Any, address: Any, value: Any) -> None:
    """Write an int64."""
    _store(builder, address, value, 8)


@_intrinsic(_u32(_i64), _load_twin(np.uint32))
def load_u32(builder: Any, address: Any) -> Any:
    """Return the uint32 at an address."""
    return _load(builder, address, _I32, 4)


@_intrinsic(_void(_i64, _u32), _store_twin(np.uint32))
def store_u32(builder: Any, address: Any, value: Any) -> None:
    """Write a uint32."""
    _store(builder, address, value, 4)


@_intrinsic(_f32(_i64), _load_twin(np.float32))
def load_f32(builder: Any, address: Any) -> Any:
    """Return the float32 at an address."""
    return _load(builder, address, _FLOAT, 4)


@_intrinsic(_void(_i64, _f32), _store_twin(np.float32))
def store_f32(builder: Any, address: Any, value: Any) -> None:
    """Write a float32."""
    _store(builder, address, value, 4)


@_intrinsic(_u32(_i64), lambda address: np.uint32(_load_twin(np.uint16)(address)))
def load_u16(builder: Any, address: Any) -> Any:
    """Return the uint16 at an address, zero-extended."""
    return builder.zext(_load(builder, address, _I16, 2), _I32)


@_intrinsic(_void(_i64, _u32), _store_twin(np.uint16))
def store_u16(builder: Any, address: Any, value: Any) -> None:
    """Write the low 16 bits of a uint32."""
    _store(builder, address, builder.trunc(value, _I16), 2)


@_intrinsic(_u32(_i64), lambda address: np.uint32(_load_twin(np.uint8)(address)))
def load_u8(builder: Any, address: Any) -> Any:
    """Return the uint8 at an address, zero-extended."""
    return builder.zext(_load(builder, address, _I8, 1), _I32)


@_intrinsic(_void(_i64, _u32), _store_twin(np.uint8))
def store_u8(builder: Any, address: Any, value: Any) -> None:
    """Write the low 8 bits of a uint32."""
    _store(builder, address, builder.trunc(value, _I8), 1)


_atomic_lock = threading.Lock()


def _atomic_add_twin(address: Any, value: Any) -> Any:
    with _atomic_lock:
        before = load_i64(address)
        store_i64(address, before + value)
        return before


@_intrinsic(_i64(_i64, _i64), _atomic_add_twin)
def atomic_add_i64(builder: Any, address: Any, value: Any) -> Any:
    """Add to the int64 at an address and return what it was."""
    return builder.atomic_rmw("add", _pointer(builder, address, _I64), value, "monotonic")


def _atomic_max_twin(address: Any, value: Any) -> None:
    with _atomic_lock:
        store_u32(address, max(load_u32(address), value))


@_intrinsic(_void(_i64, _u32), _atomic_max_twin)
def atomic_max_u32(builder: Any, address: Any, value: Any) -> None:
    """Raise the uint32 at an address to ``value`` if it is less."""
    builder.atomic_rmw("umax", _pointer(builder, address, _I32), value, "monotonic")


# Conversions ----------------------------------------------------------------------------------------------------------


def _half_twin(pattern: Any) -> Any:
    return np.float32(np.uint16(pattern & np.uint32(0xFFFF)).view(np.float16))


@_intrinsic(_f32(_u32), _half_twin)
def from_half(builder: Any, pattern: Any) -> Any:
    """Return the float16 in the low 16 bits as a float32."""
    return builder.fpext(builder.bitcast(builder.trunc(pattern, _I16), _HALF), _FLOAT)


def _pair_twin(dtype: Any) -> Callable[[Any, Any], Any]:
    return lambda low, high: np.array([low, high], np.float32).astype(dtype).view(np.uint32)[0]


@_intrinsic(_u32(_f32, _f32), _pair_twin(np.float16))
def to_half_pair(builder: Any, low: Any, high: Any) -> Any:
    """Return two float32 rounded to float16, packed into 32 bits."""

    def by_parts() -> Any:
        halves = [builder.zext(builder.bitcast(builder.fptrunc(x, _HALF), _I16), _I32) for x in (low, high)]
        return builder.or_(halves[0], builder.shl(halves[1], ir.Constant(_I32, 16)))

    return _choose(
        builder,
        lambda: _assembly(builder, "cvt.rn.f16x2.f32 $0, $1, $2;", _I32, "=r,f,f", high, low),
        by_parts,
    )


@_intrinsic(_u32(_f32, _f32), _pair_twin(ml_dtypes.bfloat16))
def to_bfloat16_pair(builder: Any, low: Any, high: Any) -> Any:
    """Return two float32 rounded to bfloat16, packed into 32 bits."""

    def by_integers() -> Any:
        rounded = []
        for x in (low, high):
            pattern = builder.bitcast(x, _I32)
            odd = builder.and_(builder.lshr(pattern, ir.Constant(_I32, 16)), ir.Constant(_I32, 1))
            nearest = builder.add(builder.add(pattern, ir.Constant(_I32, 0x7FFF)), odd)
            nan = builder.fcmp_unordered("uno", x, x)
            rounded.append(builder.select(nan, ir.Constant(_I32, 0x7FC00000), nearest))
        high_bits = builder.and_(rounded[1], ir.Constant(_I32, 0xFFFF0000))
        return builder.or_(builder.lshr(rounded[0], ir.Constant(_I32, 16)), high_bits)

    return _choose(
        builder,
        lambda: _assembly(builder, "cvt.rn.bf16x2.f32 $0, $1, $2;", _I32, "=r,f,f", high, low),
        by_integers,
    )


# Warps ----------------------------------------------------------------------------------------------------------------


def _shuffle_xor(builder: Any, pattern: Any, mask: Any) -> Any:
    clamp = ir.Constant(_I32, 31)
    return _call(builder, "llvm.nvvm.shfl.sync.bfly.i32", _I32, _ALL_LANES, pattern, mask, clamp)


@_intrinsic(_f32(_f32, _i32), lambda value, mask: exchange(value, lambda lane: [lane ^ mask])[0])
def shuffle_xor(builder: Any, value: Any, mask: Any) -> Any:
    """Return ``value`` of the lane whose number differs in the bits of ``mask``; all lanes take part."""
    return builder.bitcast(_shuffle_xor(builder, builder.bitcast(value, _I32), mask), _FLOAT)


@_intrinsic(_u32(_u32, _i32), lambda value, mask: exchange(value, lambda lane: [lane ^ mask])[0])
def shuffle_xor_u32(builder: Any, value: Any, mask: Any) -> Any:
    """Return ``value`` of the lane whose number differs in the bits of ``mask``; all lanes take part."""
    return _shuffle_xor(builder, value, mask)


@_intrinsic(_f64(_f64, _i32), lambda value, mask: exchange(value, lambda lane: [lane ^ mask])[0])
def shuffle_xor_f64(builder: Any, value: Any, mask: Any) -> Any:
    """Return ``value`` of the lane whose number differs in the bits of ``mask``; all lanes take part."""
    pattern = builder.bitcast(value, _I64)
    low = _shuffle_xor(builder, builder.trunc(pattern, _I32), mask)
    high = _shuffle_xor(builder, builder.trunc(builder.lshr(pattern, ir.Constant(_I64, 32)), _I32), mask)
    both = builder.or_(builder.zext(low, _I64), builder.shl(builder.zext(high, _I64), ir.Constant(_I64, 32)))
    return builder.bitcast(both, _DOUBLE)


@_intrinsic(_u32(_u32), lambda value: max(exchange(value, lambda lane: list(range(32)))))
def warp_max_u32(builder: Any, value: Any) -> Any:
    """Return the greatest ``value`` of the warp; all lanes take part."""

    def by_shuffles() -> Any:
        greatest = value
        for mask in (16, 8, 4, 2, 1):
            other = _shuffle_xor(builder, greatest, ir.Constant(_I32, mask))
            greatest = builder.select(builder.icmp_unsigned(">", other, greatest), other, greatest)
        return greatest

    return _choose(
        builder,
        lambda: _assembly(
            builder, "redux.sync.max.u32 $0, $1, $2;", _I32, "=r,r,r", value, _ALL_LANES, side_effect=True
        ),
        by_shuffles,
    )


@_intrinsic(_void(), synchronize)
def sync_warp(builder: Any) -> None:
    """Wait for all lanes of the warp; what they wrote before is seen by all after."""
    _call(builder, "llvm.nvvm.bar.warp.sync", ir.VoidType(), _ALL_LANES)


# Elements of tensors --------------------------------------------------------------------------------------------------


@device
def load_float(dtype: int, address: int) -> np.float32:
    """Return the element at an address as a float32."""
    if dtype == FLOAT32:
        return load_f32(address)
    if dtype == FLOAT16:
        return from_half(load_u16(address))
    return from_bits(np.uint32(load_u16(address) << np.uint32(16)))


@device
def store_float(dtype: int, address: int, value: np.float32) -> None:
    """Write a float32, rounded to the dtype."""
    if dtype == FLOAT32:
        store_f32(address, value)
    elif dtype == FLOAT16:
        store_u16(address, to_half_pair(value, value))
    else:
        store_u16(address, to_bfloat16_pair(value, value))


@device
def load_2_u16(address: int) -> np.uint32:
    """Return the two uint16 at an address in one word."""
    return np.uint32(load_u16(address) | np.uint32(load_u16(address + 2) << np.uint32(16)))


@device
def load_8_bytes(alignment: int, address: int) -> Any:
    """Return two uint32 by loads of at most ``alignment`` bytes, a power of two that divides the address."""
    if alignment >= 8:
        return load_2_words(address)
    if alignment == 4:
        return load_u32(address), load_u32(address + 4)
    return load_2_u16(address), load_2_u16(address + 4)


@device
def load_16_bytes(alignment: int, address: int) -> Any:
    """Return four uint32 by loads of at most ``alignment`` bytes, a power of two that divides the address."""
    if alignment == 16:
        return load_4_words(address)
    low, high = load_8_bytes(alignment, address), load_8_bytes(alignment, address + 8)
    return low[0], low[1], high[0], high[1]


# Eight elements of a lane: four, and four that begin ``gap`` elements further on. Those that lie together take the
# fewest accesses; halves of a block of 256 apart, each access of a warp is to consecutive bytes.


@device
def load_8_of_1(gap: int, address: int) -> Any:
    """Return eight elements of 1 byte in two words."""
    if gap == TOGETHER:
        return load_2_words(address)
    return load_u32(address), load_u32(address + gap)


@device
def store_8_of_1(gap: int, address: int, a: np.uint32, b: np.uint32) -> None:
    """Write eight elements of 1 byte."""
    if gap == TOGETHER:
        store_2_words(address, a, b)
    else:
        store_u32(address, a)
        store_u32(address + gap, b)


@device
def load_8_of_2(gap: int, alignment: int, address: int) -> Any:
    """Return eight elements of 2 bytes in four words."""
    if gap == TOGETHER:
        return load_16_bytes(alignment, address)
    low, high = load_8_bytes(alignment, address), load_8_bytes(alignment, address + 2 * gap)
    return low[0], low[1], high[0], high[1]


@device
def store_8_of_2(gap: int, address: int, a: np.uint32, b: np.uint32, c: np.uint32, d: np.uint32) -> None:
    """Write eight elements of 2 bytes."""
    if gap == TOGETHER:
        store_4_words(address, a, b, c, d)
    else:
        store_2_words(address, a, b)
        store_2_words(address + 2 * gap, c, d)


@device
def load_8(dtype: int, gap: int, alignment: int, address: int, words: np.ndarray) -> None:
    """Fill ``words`` with the bits of eight elements, by loads of at most ``alignment`` bytes."""
    if dtype == FLOAT32:
        low, high = load_16_bytes(alignment, address), load_16_bytes(alignment, address + 4 * gap)
        for i in range(4):
            words[i], words[i + 4] = low[i], high[i]
    else:
        pairs = load_8_of_2(gap, alignment, address)
        for i in range(4):
            words[i] = pairs[i]


@device
def to_floats(dtype: int, words: np.ndarray, values: np.ndarray) -> None:
    """Fill ``values`` with the eight elements whose bits :func:`load_8` has loaded."""
    if dtype == FLOAT32:
        for i in range(8):
            values[i] = from_bits(words[i])
    else:
        for i in range(4):
            if dtype == FLOAT16:
                values[2 * i] = from_half(words[i])
                values[2 * i + 1] = from_half(np.uint32(words[i] >> np.uint32(16)))
            else:
                values[2 * i] = from_bits(np.uint32(words[i] << np.uint32(16)))
                values[2 * i + 1] = from_bits(np.uint32(words[i] & np.uint32(0xFFFF0000)))


@device
def store_8(dtype: int, gap: int, address: int, values: np.ndarray) -> None:
    """Write eight float32, rounded to the dtype, by accesses as wide as can be."""
    if dtype == FLOAT32:
        store_4_words(address, bits(values[0]), bits(values[1]), bits(values[2]), bits(values[3]))
        store_4_words(address + 4 * gap, bits(values[4]), bits(values[5]), bits(values[6]), bits(values[7]))
    elif dtype == FLOAT16:
        store_8_of_2(
            gap,
            address,
            to_half_pair(values[0], values[1]),
            to_half_pair(values[2], values[3]),
            to_half_pair(values[4], values[5]),
            to_half_pair(values[6], values[7]),
        )
    else:
        store_8_of_2(
            gap,
            address,
            to_bfloat16_pair(values[0], values[1]),
            to_bfloat16_pair(values[2], values[3]),
            to_bfloat16_pair(values[4], values[5]),
            to_bfloat16_pair(values[6], values[7]),
        )

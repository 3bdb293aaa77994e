"""The table lookups of 8-bit states without gathers, 64 elements at a time, on processors with AVX-512 VBMI.

A table of 256 four-byte entries is kept as four planes of bytes; a plane is looked up for 64 codes at once by two
byte permutations of 128 entries each, and the planes are put together again.
"""

from __future__ import annotations

import llvmlite.binding
import numba
import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from cpu_kernels.device import FLOAT, I8, I32, I64, MAGNITUDE
from reference import create_dynamic_map, quantize_thresholds

BYTES, WORDS = ir.VectorType(I8, 64), ir.VectorType(ir.IntType(16), 32)
INTEGERS, FLOATS16 = ir.VectorType(I32, 16), ir.VectorType(FLOAT, 16)
GROUP = 64

# With a processor named by the user, code is generated for that one.
AVAILABLE = (
    all(llvmlite.binding.get_host_cpu_features().get(f"avx512{name}", False) for name in ("f", "bw", "vbmi"))
    and numba.config.CPU_NAME is None
    and numba.config.CPU_FEATURES is None
)

_QMAP = create_dynamic_map()
_THRESHOLDS = np.append(quantize_thresholds(_QMAP), np.float32(np.inf))


def _decades() -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Return what estimates a code from the magnitude of a value.

    Decade ``d`` of the map, 0 to 6, has ``2**d`` evenly spaced values: ``code - 127 = slope * x + offset``. The
    first table has an entry for the last five bits of the exponent, from 2**-23 to 1; added to the bits of a
    magnitude it gives the decade in the upper 9 bits, the mantissa carrying at the power of ten.
    """
    powers = [10.0 ** (d - 6) for d in range(7)]
    slopes = [2.0**d / (0.9 * power) for d, power in enumerate(powers)]
    offsets = [2.0**d - 0.5 - 0.1 * power * slope for d, (power, slope) in enumerate(zip(powers, slopes, strict=True))]
    entries = np.zeros(32, np.uint32)
    for exponent in range(104, 128):
        first = 2.0 ** (exponent - 127)
        decade = max(0, sum(first >= 0.1 * power for power in powers) - 1)
        carry = 0
        if decade < 6 and 0.1 * powers[decade + 1] < 2 * first:
            carry = int((2.0 - 0.1 * powers[decade + 1] / first) * 2**23)
        entries[exponent % 32] = (((decade - exponent) << 23) + carry) % 2**32
    return entries, np.array(slopes, np.float32), np.array(offsets, np.float32)


def _vector(item: ir.Type, values: npt.NDArray[np.generic]) -> ir.Constant:
    return ir.Constant(ir.VectorType(item, len(values)), values.tolist())


def _splat(item: ir.Type, value: float) -> ir.Constant:
    return ir.Constant(ir.VectorType(item, 16), [value] * 16)


def _call(builder: ir.IRBuilder, name: str, *args: ir.Value) -> ir.Value:
    signature = ir.FunctionType(args[0].type, [arg.type for arg in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, signature, f"llvm.x86.avx512.{name}"), args)


def _shuffle(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, order: list[int]) -> ir.Value:
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, len(order)), order))


def _concatenate(builder: ir.IRBuilder, vectors: list[ir.Value]) -> ir.Value:
    a, b, c, d = vectors
    order = list(range(2 * a.type.count))
    low, high = _shuffle(builder, a, b, order), _shuffle(builder, c, d, order)
    return _shuffle(builder, low, high, list(range(2 * len(order))))


def _unpack(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, upper: bool) -> ir.Value:
    """Interleave the lower or upper halves of all 16-byte lanes."""
    count = a.type.count
    lane = count // 4
    begin = lane // 2 if upper else 0
    order = [i for first in range(0, count, lane) for i in range(first + begin, first + begin + lane // 2)]
    return _shuffle(builder, a, b, [j for i in order for j in (i, i + count)])


def _lookup(builder: ir.IRBuilder, table: npt.NDArray[np.float32], codes: ir.Value) -> list[ir.Value]:
    """Return the entries of 64 codes, in four vectors of 16 float32."""
    # Putting the planes together works within lanes; this order of the codes makes up for that.
    quads = builder.bitcast(codes, INTEGERS)
    quads = _shuffle(builder, quads, quads, [4 * i + j for j in range(4) for i in range(4)])
    codes = builder.bitcast(quads, BYTES)
    upper_half = builder.icmp_signed("<", codes, ir.Constant(BYTES, [0] * 64))
    planes = []
    for plane in table.view(np.uint8).reshape(256, 4).T:
        parts = [_vector(I8, part) for part in plane.reshape(4, 64)]
        low, high = (_call(builder, "vpermi2var.qi.512", parts[i], codes, parts[i + 1]) for i in (0, 2))
        planes.append(builder.select(upper_half, high, low))
    vectors = []
    for upper in (False, True):
        low, high = (builder.bitcast(_unpack(builder, planes[i], planes[i + 1], upper), WORDS) for i in (0, 2))
        vectors += [builder.bitcast(_unpack(builder, low, high, half), FLOATS16) for half in (False, True)]
    return vectors


def _at(builder: ir.IRBuilder, address: ir.Value, offset: int, vector: ir.VectorType) -> ir.Value:
    return builder.inttoptr(builder.add(address, I64(offset)), vector.as_pointer())


@intrinsic
def dequantize_group(typingctx, codes, values):  # type: ignore[no-untyped-def]
    """dequantize_group(codes, values): write the dynamic map's float32 values of 64 codes; takes addresses."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        vectors = _lookup(builder, _QMAP, builder.load(_at(builder, args[0], 0, BYTES), align=1))
        for i, vector in enumerate(vectors):
            builder.store(vector, _at(builder, args[1], 64 * i, FLOATS16), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def quantize_group(typingctx, values, reciprocal, codes):  # type: ignore[no-untyped-def]
    """quantize_group(values, reciprocal, codes): write the dynamic map's codes of 64 float32; takes addresses.

    A code is estimated from the decade of its value: either right or one too low. One comparison with the threshold
    above the estimate tells which.
    """

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        entries, slopes, offsets = _decades()
        entries_low, entries_high = _vector(I32, entries[:16]), _vector(I32, entries[16:])
        slopes, offsets = (_vector(FLOAT, np.resize(lines, 16)) for lines in (slopes, offsets))
        first = builder.insert_element(ir.Constant(FLOATS16, ir.Undefined), args[1], I32(0))
        factor = _shuffle(builder, first, first, [0] * 16)
        quotients, estimates = [], []
        for i in range(4):
            x = builder.fmul(builder.load(_at(builder, args[0], 64 * i, FLOATS16), align=4), factor)
            bits = builder.bitcast(x, INTEGERS)
            magnitude = builder.and_(bits, _splat(I32, int(MAGNITUDE)))
            smallest = _splat(I32, 104 << 23)
            clamped = builder.select(builder.icmp_unsigned("<", magnitude, smallest), smallest, magnitude)
            exponent = builder.lshr(clamped, _splat(I32, 23))
            entry = _call(builder, "vpermi2var.d.512", entries_low, exponent, entries_high)
            decade = builder.lshr(builder.add(entry, clamped), _splat(I32, 23))
            slope, offset = (_call(builder, "permvar.sf.512", lines, decade) for lines in (slopes, offsets))
            sign = builder.and_(bits, _splat(I32, 1 << 31))
            offset = builder.bitcast(builder.xor(builder.bitcast(offset, INTEGERS), sign), FLOATS16)
            estimate = builder.fadd(builder.fadd(builder.fmul(x, slope), offset), _splat(FLOAT, 127.0))
            quotients.append(x)
            estimates.append(builder.trunc(builder.fptosi(estimate, INTEGERS), ir.VectorType(I8, 16)))
        estimate = _concatenate(builder, estimates)
        thresholds = _lookup(builder, _THRESHOLDS, estimate)
        above = [builder.fcmp_ordered(">", x, t) for x, t in zip(quotients, thresholds, strict=True)]
        correction = builder.sext(_concatenate(builder, above), BYTES)
        builder.store(builder.sub(estimate, correction), _at(builder, args[2], 0, BYTES), align=1)
        return context.get_dummy_value()

    return types.void(types.int64, types.float32, types.int64), codegen

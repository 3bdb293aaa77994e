"""The table lookups of 8-bit states without gathers, 64 elements at a time, on processors with AVX-512 VBMI.

A table of four-byte entries is kept as four planes of bytes; a plane is looked up for 64 codes at once by byte
permutations of 128 entries each, and the planes are put together again.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from lion.cpu_kernels.device import FEATURES, FLOAT, I1, I8, I16, I32, I64
from lion.cpu_kernels.vectors import at, call, constant, shuffle, splat, spread
from lion.reference import create_dynamic_map, quantize_thresholds

BYTES, WORDS = ir.VectorType(I8, 64), ir.VectorType(I16, 32)
INTEGERS, FLOATS16 = ir.VectorType(I32, 16), ir.VectorType(FLOAT, 16)
GROUP = 64

# Of 64 elements as they come, and of the even ones before the odd ones.
IN_ORDER = np.arange(GROUP)
PAIRED = np.append(IN_ORDER[::2], IN_ORDER[1::2])

NAME = "AVX-512 VBMI"
AVAILABLE = {"avx512f", "avx512bw", "avx512vbmi"} <= FEATURES

_QMAP = create_dynamic_map()
ZERO_CODE = 127
# Biased exponents of the magnitudes that are told apart: all thresholds lie between them.
_FIRST_EXPONENT, _LAST_EXPONENT = 104, 127


def _threshold_keys() -> npt.NDArray[np.uint32]:
    """Return the least keys of values beyond the 128 thresholds between 0 and 1, the same for both signs.

    The key of a value is its bits rotated left by one: the magnitude, then the sign. A tie goes to the lower code,
    which lies beyond the threshold where the sign is set.
    """
    thresholds = quantize_thresholds(_QMAP)
    positive = thresholds[ZERO_CODE:].view(np.uint32)
    negative = np.append(-thresholds[:ZERO_CODE][::-1], np.float32(1.0)).view(np.uint32)
    is_tie = negative == positive
    return 2 * positive + np.where(is_tie, 1, 2).astype(np.uint32)


def _buckets() -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.uint16], npt.NDArray[np.uint8]]:
    """Return the tables that find a code by the upper half of a key.

    Every octave is cut into so many buckets, a power of two, that none holds more than one threshold. With ``upper``
    less the first exponent, and the entries of the first two tables at what is left of the exponent, the bucket is
    ``(upper + addend) >> shift``. The third table has the code at the bucket's begin, of a positive value.
    """
    keys = _threshold_keys().astype(np.int64)
    addends, shifts = np.zeros(32, np.uint16), np.zeros(32, np.uint16)
    codes: list[int] = []
    for octave in range(_LAST_EXPONENT - _FIRST_EXPONENT + 1):
        for bits in range(9):
            starts = ((octave + _FIRST_EXPONENT) << 24) + (np.arange((1 << bits) + 1) << (24 - bits))
            below = np.searchsorted(keys, starts, side="right")
            if (np.diff(below) <= 1).all():
                break
        shifts[octave] = 8 - bits
        addends[octave] = ((len(codes) << (8 - bits)) - (octave << 8)) % 2**16
        # From 1 on no threshold is left; the last one lies below 1 and serves again.
        codes += [ZERO_CODE + min(int(n), 127) for n in below[:-1]]
    return addends, shifts, np.array(codes + [0] * (256 - len(codes)), np.uint8)


def _call(builder: ir.IRBuilder, name: str, *args: ir.Value) -> ir.Value:
    return call(builder, f"x86.avx512.{name}", args[0].type, *args)


def _concatenate(builder: ir.IRBuilder, vectors: list[ir.Value]) -> ir.Value:
    """Return two or four vectors as one."""
    while len(vectors) > 1:
        order = list(range(2 * vectors[0].type.count))
        vectors = [shuffle(builder, a, b, order) for a, b in zip(vectors[::2], vectors[1::2], strict=True)]
    return vectors[0]


def _unpack(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, upper: bool) -> ir.Value:
    """Interleave the lower or upper halves of all 16-byte lanes."""
    count = a.type.count
    lane = count // 4
    begin = lane // 2 if upper else 0
    order = [i for first in range(0, count, lane) for i in range(first + begin, first + begin + lane // 2)]
    return shuffle(builder, a, b, [j for i in order for j in (i, i + count)])


def _permute(builder: ir.IRBuilder, table: npt.NDArray[np.uint8], codes: ir.Value) -> ir.Value:
    """Return the bytes of a table of 128 entries, by the lower 7 bits of the codes."""
    return _call(builder, "vpermi2var.qi.512", constant(I8, table[:64]), codes, constant(I8, table[64:]))


def _lookup_bytes(builder: ir.IRBuilder, table: npt.NDArray[np.uint8], codes: ir.Value) -> ir.Value:
    """Return the bytes of a table of 128 or 256 entries."""
    if len(table) == 128:
        return _permute(builder, table, codes)
    upper_half = builder.icmp_signed("<", codes, splat(BYTES, 0))
    return builder.select(upper_half, _permute(builder, table[128:], codes), _permute(builder, table[:128], codes))


def _lookup(
    builder: ir.IRBuilder,
    table: npt.NDArray[np.generic],
    codes: ir.Value,
    order: npt.NDArray[np.int64] = IN_ORDER,
) -> list[ir.Value]:
    """Return the four-byte entries of 64 codes, put in an order, in four vectors of 16 integers."""
    # Putting the planes together works within lanes; turning rows into columns makes up for that.
    codes = shuffle(builder, codes, codes, order.reshape(4, 4, 4).swapaxes(0, 1).reshape(-1).tolist())
    planes = [_lookup_bytes(builder, plane, codes) for plane in table.view(np.uint8).reshape(-1, 4).T]
    vectors = []
    for upper in (False, True):
        low, high = (builder.bitcast(_unpack(builder, planes[i], planes[i + 1], upper), WORDS) for i in (0, 2))
        vectors += [builder.bitcast(_unpack(builder, low, high, half), INTEGERS) for half in (False, True)]
    return vectors


@intrinsic
def dequantize_group(typingctx, codes, values):  # type: ignore[no-untyped-def]
    """dequantize_group(codes, values): write the dynamic map's float32 values of 64 codes; takes addresses."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        vectors = _lookup(builder, _QMAP, builder.load(at(builder, args[0], 0, BYTES), align=1))
        for i, vector in enumerate(vectors):
            builder.store(vector, at(builder, args[1], 64 * i, INTEGERS), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def dequantize_pairs(typingctx, codes, even, odd):  # type: ignore[no-untyped-def]
    """dequantize_pairs(codes, even, odd): as dequantize_group, but the two values of a pair go to two places."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        vectors = _lookup(builder, _QMAP, builder.load(at(builder, args[0], 0, BYTES), align=1), PAIRED)
        for i, vector in enumerate(vectors):
            builder.store(vector, at(builder, args[1 + i // 2], 64 * (i % 2), INTEGERS), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


def _bucket_codes(builder: ir.IRBuilder, bits: list[ir.Value]) -> tuple[ir.Value, ir.Value]:
    """Return the codes at the begins of the buckets, and whether values are negative."""
    addends, shifts, codes = _buckets()
    buckets, negative = [], []
    for i in (0, 2):
        low, high = (builder.bitcast(b, WORDS) for b in bits[i : i + 2])
        upper = _call(builder, "vpermi2var.hi.512", low, constant(I16, np.arange(1, 64, 2)), high)
        negative.append(builder.icmp_signed("<", upper, splat(WORDS, 0)))
        upper = builder.shl(upper, splat(WORDS, 1))
        begin = splat(WORDS, _FIRST_EXPONENT << 8)
        upper = builder.sub(builder.select(builder.icmp_unsigned(">", upper, begin), upper, begin), begin)
        octave = builder.lshr(upper, splat(WORDS, 8))
        addend, shift = (_call(builder, "permvar.hi.512", constant(I16, table), octave) for table in (addends, shifts))
        buckets.append(_call(builder, "psrlv.w.512", builder.add(upper, addend), shift))
    low, high = (builder.bitcast(bucket, BYTES) for bucket in buckets)
    bucket = _call(builder, "vpermi2var.qi.512", low, constant(I8, np.arange(0, 128, 2)), high)
    return _lookup_bytes(builder, codes, bucket), _concatenate(builder, negative)


def _quantize(builder: ir.IRBuilder, addresses: list[ir.Value], reciprocal: ir.Value) -> ir.Value:
    """Return the codes of 16 values at each of four addresses.

    A value's bucket gives a code, either right or one too low. One comparison with the next threshold tells which.
    """
    factor = spread(builder, FLOATS16, reciprocal)
    values = [builder.load(at(builder, address, 0, FLOATS16), align=4) for address in addresses]
    bits = [builder.bitcast(builder.fmul(value, factor), INTEGERS) for value in values]
    codes, negative = _bucket_codes(builder, bits)
    thresholds = _lookup(builder, np.roll(_threshold_keys(), ZERO_CODE), codes)
    keys = [builder.or_(builder.shl(b, splat(INTEGERS, 1)), builder.lshr(b, splat(INTEGERS, 31))) for b in bits]
    beyond = [builder.icmp_unsigned(">=", key, t) for key, t in zip(keys, thresholds, strict=True)]
    codes = builder.sub(codes, builder.sext(_concatenate(builder, beyond), BYTES))
    # Codes of negative values are mirrored at that of 0; the map has no -1.
    last = splat(BYTES, 2 * ZERO_CODE)
    in_map = builder.select(builder.icmp_unsigned(">", codes, last), last, codes)
    return builder.select(negative, builder.sub(last, in_map), codes)


@intrinsic
def quantize_group(typingctx, values, reciprocal, codes):  # type: ignore[no-untyped-def]
    """quantize_group(values, reciprocal, codes): write the dynamic map's codes of 64 float32; takes addresses.

    Return True: all codes are right.
    """

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        values, reciprocal, address = args
        codes = _quantize(builder, [builder.add(values, I64(64 * i)) for i in range(4)], reciprocal)
        builder.store(codes, at(builder, address, 0, BYTES), align=1)
        return I1(1)

    return types.boolean(types.int64, types.float32, types.int64), codegen


@intrinsic
def quantize_pairs(typingctx, even, odd, reciprocal, codes):  # type: ignore[no-untyped-def]
    """quantize_pairs(even, odd, reciprocal, codes): as quantize_group, the two values of a pair from two places."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        even, odd, reciprocal, address = args
        addresses = [builder.add(values, I64(offset)) for values in (even, odd) for offset in (0, 64)]
        codes = _quantize(builder, addresses, reciprocal)
        codes = shuffle(builder, codes, codes, np.argsort(PAIRED).tolist())
        builder.store(codes, at(builder, address, 0, BYTES), align=1)
        return I1(1)

    return types.boolean(types.int64, types.int64, types.float32, types.int64), codegen

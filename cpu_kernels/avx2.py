"""The table lookups of 8-bit states by arithmetic, 32 elements at a time, on processors with AVX2.

``k``, the magnitude of a code (its distance from that of 0), is ``2**i + j`` in decade ``i``, and the map is linear in
``j``: the exponent of ``k`` as a float is the decade, its mantissa ``1 + j / 2**i``. A table with an entry a decade
lies in one register. What rounding makes of the linear functions is put right: one way by two bits a code, the other
way by leaving what is next to a threshold to a comparison with all thresholds.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from lion.cpu_kernels.device import FEATURES, FLOAT, I1, I8, I16, I32, I64
from lion.cpu_kernels.vectors import at, call, constant, shuffle, splat, spread
from lion.reference import create_dynamic_map, quantize_thresholds

Float32Array = npt.NDArray[np.float32]
Int32Array = npt.NDArray[np.int32]

NAME = "AVX2"
AVAILABLE = {"avx2", "fma"} <= FEATURES
GROUP = 32

BYTES, WORDS = ir.VectorType(I8, 32), ir.VectorType(I16, 16)
EIGHT_BYTES, EIGHT_WORDS = ir.VectorType(I8, 8), ir.VectorType(I16, 8)
INTEGERS, FLOATS8 = ir.VectorType(I32, 8), ir.VectorType(FLOAT, 8)

_QMAP = create_dynamic_map()
ZERO_CODE = 127
_DECADES = 7
_SIGN, _MAGNITUDE, _SIGN_AND_EXPONENT = -(1 << 31), 0x7FFFFFFF, -(1 << 23)


def _fit(decade: int, k: npt.NDArray[np.int64]) -> tuple[np.float32, np.float32, npt.NDArray[np.int32]]:
    """Return the first entry of a decade, its step, and what their linear function lacks of the map's entries.

    The entries are those of ``k``; what they lack is 0 to 3 units in the last place.
    """
    entries = _QMAP[ZERO_CODE + k].view(np.int32)
    scale = 10.0 ** (decade + 1 - _DECADES)
    first, step = (np.array([x * scale], np.float32) for x in (0.1 + 0.45 / k.size, 0.9 / k.size))
    for a in (first.view(np.int32) + np.arange(0, -4, -1, dtype=np.int32)).view(np.float32):
        for b in (step.view(np.int32) + np.arange(0, -8, -1, dtype=np.int32)).view(np.float32):
            # Exact in float64, and so rounded once, as a fused multiplication and addition.
            fused = (np.float64(a) + np.float64(b) * np.arange(k.size)).astype(np.float32)
            lacking = entries - fused.view(np.int32)
            # There is room for one bit only of the last four codes.
            if lacking.min() >= 0 and lacking.max() <= 3 and lacking[k >= 124].max(initial=0) <= 1:
                return a, b, lacking
    raise AssertionError(f"no linear function is close enough to the map in decade {decade}")


def _decoding_tables() -> tuple[Float32Array, Float32Array, Int32Array]:
    """Return the first entry over ``2**i`` and the step of each decade, by ``i + 127 & 7``, and the corrections.

    Those of ``k`` are bits ``k >> 2`` and ``(k >> 2) + 1`` of entry ``k & 7``. 0 needs none and 128, whose entry is 1,
    has a row of its own.
    """
    first, step, corrections = np.zeros(8, np.float32), np.zeros(8, np.float32), np.zeros(8, np.int64)
    for i in range(_DECADES):
        k = np.arange(1 << i, 2 << i)
        row = (i + 127) & 7
        first[row], step[row], lacking = _fit(i, k)
        first[row] /= 1 << i
        np.add.at(corrections, k & 7, lacking.astype(np.int64) << (k >> 2))
    first[(_DECADES + 127) & 7] = _QMAP[-1] / np.float32(128)
    return first, step, corrections.astype(np.uint32).view(np.int32)


_FIRST, _STEP, _CORRECTIONS = _decoding_tables()

# To quantize, magnitudes are put into classes: class i holds those of the codes 2**i to 2**(i + 1) - 1, class 0 that
# of 0 too. There u = a * slope + 8 / 9 is k / 2**i at the threshold below k. Only the last code's interval is twice as
# wide as the others; its upper half, beyond 2, is mirrored at 2. All tables go by 7 - i.
_THRESHOLDS = quantize_thresholds(_QMAP)[ZERO_CODE:]
_UNIT = 1 << 23
_OFFSET = np.float32((8 / 9 - 2) * _UNIT)
_LEAST, _GREATEST = np.float32(2.0**-23), np.float32(1 + 2.0**-20)  # what is smaller has the code 0


def _encoding_tables() -> tuple[Float32Array, Float32Array, npt.NDArray[np.int8]]:
    """Return the slopes and upper borders of the classes, and the class that holds the lower end of a range.

    The ranges are those of magnitudes whose upper byte has the same lower half, four-fold from 2**-23 on. The first of
    the 16 entries, which no magnitude finds, is 0: what is looked up for the other bytes of a magnitude.
    """
    slope = [1 / (9 * np.float64(_THRESHOLDS[0]))]
    slope += [1 / (0.9 * 10.0 ** (i + 1 - _DECADES)) for i in range(1, _DECADES)]
    slope += [0.115]  # u is just above 1 for the magnitudes of 128
    border = np.append(_THRESHOLDS[2 ** np.arange(1, _DECADES + 1) - 1], np.float32(np.inf))
    begins = (np.arange(0x34, 0x41, dtype=np.int32) << 24).view(np.float32)
    classes = np.searchsorted(border, begins, side="left")
    assert begins[0] == _LEAST and (np.diff(classes) <= 1).all(), "a range holds one border at most"
    shift = np.append(np.zeros(4, np.int8), (_DECADES - classes[:-1]).astype(np.int8))
    return np.array(slope, np.float32)[::-1] * np.float32(_UNIT), border[::-1], shift


_SLOPE, _BORDER, _SHIFT = _encoding_tables()


def _encoded(magnitude: Float32Array, k: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return what :func:`_encode` makes of magnitudes whose code is ``k``, by the same steps."""
    shift = _DECADES - np.maximum(np.frexp(k)[1] - 1, 0)
    # Exact in float64: the product is at least 2**17, so its last bit is worth at least 2**-29, and the sum is below
    # 2**24. So it is rounded once.
    u = (np.float64(magnitude) * _SLOPE[shift] + _OFFSET).astype(np.float32)
    return (np.rint(-np.abs(u)).astype(np.int64) + 2 * _UNIT + 1) >> shift


def _assert_that_encoding_is_exact() -> None:
    """Check both ends of the 129 intervals of magnitudes with the same code; what lies between follows.

    Within an interval ``u`` ascends, and so does what is made of it; only in the last code of a class it falls again,
    from the begin of the next code at most. So ``k`` is right or, where the fraction is 0, one too high.
    """
    k = np.arange(129)
    first = np.append(_LEAST, np.nextafter(_THRESHOLDS, np.float32(np.inf)))
    last = np.append(_THRESHOLDS, _GREATEST)
    for end in (first, last):
        encoded = _encoded(end, k)
        assert (encoded >= k << 16).all() and (encoded <= (k + 1) << 16).all()
    # A negative value on a threshold belongs to the next code where the threshold is exactly in the middle.
    negative = -quantize_thresholds(_QMAP)[:ZERO_CODE][::-1]
    is_tie = negative == _THRESHOLDS[:-1]
    assert np.where(is_tie, _encoded(last, k)[:-2] & 0xFFFF == 0, negative == first[1:-1]).all()


_assert_that_encoding_is_exact()


def _table8(builder: ir.IRBuilder, table: Float32Array | Int32Array, index: ir.Value) -> ir.Value:
    """Return entries of a table of 8, by the lower 3 bits of the index."""
    if table.dtype == np.float32:
        return call(builder, "x86.avx2.permps", FLOATS8, constant(FLOAT, table), index)
    return call(builder, "x86.avx2.permd", INTEGERS, constant(I32, table), index)


def _decode(builder: ir.IRBuilder, codes: ir.Value) -> ir.Value:
    """Return the bits of the map's entries of 8 codes, all integers."""
    distance = builder.sub(codes, splat(INTEGERS, ZERO_CODE))
    value = builder.sitofp(distance, FLOATS8)
    bits = builder.bitcast(value, INTEGERS)
    power = builder.bitcast(builder.and_(bits, splat(INTEGERS, _SIGN_AND_EXPONENT)), FLOATS8)
    row = builder.lshr(bits, splat(INTEGERS, 23))
    first = builder.fmul(power, _table8(builder, _FIRST, row))
    entry = call(builder, "fma.v8f32", FLOATS8, builder.fsub(value, power), _table8(builder, _STEP, row), first)
    k = call(builder, "abs.v8i32", INTEGERS, distance, I1(0))
    lacking = _shift_right(builder, _table8(builder, _CORRECTIONS, k), builder.lshr(k, splat(INTEGERS, 2)))
    return builder.add(builder.bitcast(entry, INTEGERS), builder.and_(lacking, splat(INTEGERS, 3)))


def _shift_right(builder: ir.IRBuilder, values: ir.Value, counts: ir.Value) -> ir.Value:
    """Return integers shifted by counts of their own; by 32 they become 0."""
    return call(builder, "x86.avx2.psrlv.d.256", INTEGERS, values, counts)


def _map_in_memory(builder: ir.IRBuilder) -> ir.Value:
    name = "lion_dynamic_map"
    if name not in builder.module.globals:
        values = ir.Constant(ir.ArrayType(I32, 256), _QMAP.view(np.int32).tolist())
        table = ir.GlobalVariable(builder.module, values.type, name)
        table.initializer, table.global_constant, table.linkage = values, True, "internal"
    return builder.module.globals[name]


def _look_up(builder: ir.IRBuilder, codes: ir.Value, places: range) -> list[ir.Value]:
    """Return the bits of the map's entries of some codes: in memory, by parts that arithmetic leaves idle."""
    table, entries = _map_in_memory(builder), []
    for i in places:
        code = builder.zext(builder.load(at(builder, codes, i, I8), align=1), I64)
        entries.append(builder.load(builder.gep(table, [I64(0), code]), align=4))
    return entries


@intrinsic
def dequantize_group(typingctx, codes, values):  # type: ignore[no-untyped-def]
    """dequantize_group(codes, values): write the dynamic map's float32 values of 32 codes; takes addresses.

    A quarter of them is looked up in memory.
    """

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        codes, values = args
        looked_up = _look_up(builder, codes, range(24, 32))
        eights = [builder.load(at(builder, codes, 8 * i, EIGHT_BYTES), align=1) for i in range(3)]
        for i, entry in enumerate(looked_up):
            builder.store(entry, at(builder, values, 96 + 4 * i, I32), align=4)
        for i, eight in enumerate(eights):
            decoded = _decode(builder, builder.zext(eight, INTEGERS))
            builder.store(decoded, at(builder, values, 32 * i, INTEGERS), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def dequantize_pairs(typingctx, codes, even, odd):  # type: ignore[no-untyped-def]
    """dequantize_pairs(codes, even, odd): as dequantize_group, but the two values of a pair go to two places.

    The second half of the odd ones is looked up in memory.
    """

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        codes, even, odd = args
        looked_up = _look_up(builder, codes, range(17, 32, 2))
        words = [builder.load(at(builder, codes, 16 * i, EIGHT_WORDS), align=1) for i in range(2)]
        pairs = [builder.zext(word, INTEGERS) for word in words]
        for i, entry in enumerate(looked_up):
            builder.store(entry, at(builder, odd, 32 + 4 * i, I32), align=4)
        for i, pair in enumerate(pairs):
            decoded = _decode(builder, builder.and_(pair, splat(INTEGERS, 0xFF)))
            builder.store(decoded, at(builder, even, 32 * i, INTEGERS), align=4)
        decoded = _decode(builder, builder.lshr(pairs[0], splat(INTEGERS, 8)))
        builder.store(decoded, at(builder, odd, 0, INTEGERS), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


def _encode(builder: ir.IRBuilder, values: list[ir.Value]) -> list[ir.Value]:
    """Return ``k`` of the values, in the upper half of integers, and 16 bits of fraction in the lower.

    Where the fraction is 0, ``k`` may be one too high.
    """

    def each(function: Callable[..., ir.Value], *vectors: list[ir.Value]) -> list[ir.Value]:
        """Apply a function to all vectors: in step, because each result takes its time to come."""
        return [function(*items) for items in zip(*vectors, strict=True)]

    least = splat(INTEGERS, int(_LEAST.view(np.int32)))
    bits = each(lambda v: builder.and_(builder.bitcast(v, INTEGERS), splat(INTEGERS, _MAGNITUDE)), values)
    bits = each(lambda b: builder.select(builder.icmp_signed(">", b, least), b, least), bits)
    upper = each(lambda b: builder.bitcast(builder.lshr(b, splat(INTEGERS, 24)), BYTES), bits)
    table = constant(I8, np.append(_SHIFT, _SHIFT))
    shift = each(lambda u: builder.bitcast(call(builder, "x86.avx2.pshuf.b", BYTES, table, u), INTEGERS), upper)
    border = each(lambda s: builder.bitcast(_table8(builder, _BORDER, s), INTEGERS), shift)
    above = each(lambda b, c: builder.sext(builder.icmp_signed(">", b, c), INTEGERS), bits, border)
    shift = each(builder.add, shift, above)
    slope = each(lambda s: _table8(builder, _SLOPE, s), shift)
    magnitude = each(lambda b: builder.bitcast(b, FLOATS8), bits)
    offset = splat(FLOATS8, float(_OFFSET))
    u = each(lambda m, s: call(builder, "fma.v8f32", FLOATS8, m, s, offset), magnitude, slope)
    u = each(lambda x: builder.or_(builder.bitcast(x, INTEGERS), splat(INTEGERS, _SIGN)), u)
    mirrored = each(lambda x: call(builder, "x86.avx.cvt.ps2dq.256", INTEGERS, builder.bitcast(x, FLOATS8)), u)
    fixed = each(lambda m: builder.add(m, splat(INTEGERS, 2 * _UNIT + 1)), mirrored)
    return each(lambda f, s: _shift_right(builder, f, s), fixed, shift)


def _upper_halves(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    """Return the upper halves of two vectors of integers, by turns. A shuffle would become more than this does."""
    a = builder.lshr(a, splat(INTEGERS, 16))
    return builder.bitcast(builder.or_(a, builder.and_(b, splat(INTEGERS, -(1 << 16)))), WORDS)


def _quantize(builder: ir.IRBuilder, addresses: list[ir.Value], reciprocal: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Return the codes of 8 values at each of four addresses, and whether all are right for sure.

    In each half of the bytes come codes of the first two addresses by turns, then of the others.
    """
    # With the sign changed, so that -127 is the end of the range of bytes where -128 is none of the map.
    factor = spread(builder, FLOATS8, builder.fneg(reciprocal))
    loaded = [builder.load(at(builder, address, 0, FLOATS8), align=4) for address in addresses]
    quotients = [builder.fmul(value, factor) for value in loaded]
    encoded = [builder.bitcast(e, WORDS) for e in _encode(builder, quotients)]
    # The upper word of a quotient has its sign; where that word is 0, so is k.
    signs = [builder.bitcast(quotient, WORDS) for quotient in quotients]
    signed = [call(builder, "x86.avx2.psign.w", WORDS, e, s) for e, s in zip(encoded, signs, strict=True)]
    halves = [_upper_halves(builder, *(builder.bitcast(s, INTEGERS) for s in signed[i : i + 2])) for i in (0, 2)]
    codes = builder.xor(call(builder, "x86.avx2.packsswb", BYTES, *halves), splat(BYTES, ZERO_CODE))
    least = functools.reduce(lambda a, b: builder.select(builder.icmp_unsigned("<", a, b), a, b), encoded)
    is_zero = builder.bitcast(builder.sext(builder.icmp_signed("==", least, splat(WORDS, 0)), WORDS), BYTES)
    # A bit of the mask for a byte, and so two for a fraction and two for the k that follows it.
    mask = builder.and_(call(builder, "x86.avx2.pmovmskb", I32, is_zero), I32(0x33333333))
    return codes, builder.icmp_signed("==", mask, I32(0))


def _store_codes(builder: ir.IRBuilder, codes: ir.Value, order: list[int], address: ir.Value) -> None:
    """Store bytes after putting groups of four of them in order."""
    quads = builder.bitcast(codes, INTEGERS)
    builder.store(shuffle(builder, quads, quads, order), at(builder, address, 0, INTEGERS), align=1)


# Where packed bytes belong: word t of vector v lies 2 * t + v % 2 words on in its half of a lane.
_ORDER_IN_LANES = [16 * lane + 8 * (v // 2) + 2 * t + v % 2 for lane in (0, 1) for v in range(4) for t in range(4)]
_ORDER_OF_QUADS = [0, 4, 1, 5, 2, 6, 3, 7]
_ORDER_OF_PAIRS = [0, 1, 4, 5, 2, 3, 6, 7]


@intrinsic
def quantize_group(typingctx, values, reciprocal, codes):  # type: ignore[no-untyped-def]
    """quantize_group(values, reciprocal, codes): write the dynamic map's codes of 32 float32; takes addresses.

    Return whether all codes are right for sure. They are not where a value is next to a threshold.
    """

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        values, reciprocal, address = args
        codes, sure = _quantize(builder, [builder.add(values, I64(32 * i)) for i in range(4)], reciprocal)
        _store_codes(builder, shuffle(builder, codes, codes, _ORDER_IN_LANES), _ORDER_OF_QUADS, address)
        return sure

    return types.boolean(types.int64, types.float32, types.int64), codegen


@intrinsic
def quantize_pairs(typingctx, even, odd, reciprocal, codes):  # type: ignore[no-untyped-def]
    """quantize_pairs(even, odd, reciprocal, codes): as quantize_group, the two values of a pair from two places."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        even, odd, reciprocal, address = args
        addresses = [builder.add(values, I64(offset)) for offset in (0, 32) for values in (even, odd)]
        codes, sure = _quantize(builder, addresses, reciprocal)
        _store_codes(builder, codes, _ORDER_OF_PAIRS, address)
        return sure

    return types.boolean(types.int64, types.int64, types.float32, types.int64), codegen

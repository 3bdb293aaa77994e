"""LLVM's instructions in NumPy, for intrinsics of instruction sets: their arithmetic on processors without them.

An intrinsic's code generator takes a builder. The one here computes each instruction at once, on real memory.
"""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir

from tests.comparing import Array

_DTYPES = {"i1": np.bool_, "i8": np.uint8, "i16": np.uint16, "i32": np.uint32, "i64": np.uint64, "float": np.float32}


class Value(NamedTuple):
    """A result: its type, and its items as unsigned integers or float32, 0-dim for a scalar."""

    type: ir.Type
    items: Array


class Pointer(NamedTuple):
    """Where an item or a vector lies."""

    item: ir.Type
    address: int


def run(intrinsic: Any, *args: int | np.float32) -> bool | None:
    """Call an intrinsic that takes addresses and float32.

    Args:
        intrinsic: What Numba's decorator made of it.
        args: Addresses as integers, and numbers.

    Returns:
        The boolean that it returns, if any.
    """
    _, generate = intrinsic._defn(None, *args)
    values = [
        Value(ir.FloatType(), arg) if isinstance(arg, np.float32) else Value(ir.IntType(64), np.uint64(arg))
        for arg in args
    ]
    context = SimpleNamespace(get_dummy_value=lambda: None)
    with np.errstate(all="ignore"):
        result = generate(context, Builder(), None, values)
    return None if result is None else bool(_items(result))


def _dtype(of: ir.Type) -> Any:
    return _DTYPES[str(getattr(of, "element", of))]


def _items(value: Value | ir.Constant) -> Array:
    if isinstance(value, Value):
        return value.items
    return np.array(_numbers(value)).astype(_dtype(value.type))


def _numbers(constant: Any) -> Any:
    if isinstance(constant, list | tuple):
        return [_numbers(item) for item in constant]
    if isinstance(constant, ir.Constant):
        return _numbers(constant.constant)
    return 0 if constant is ir.Undefined else constant


def _signed(value: Value | ir.Constant) -> Array:
    items = _items(value)
    return items.view(f"i{items.itemsize}")


class Builder:
    """What code generators use of ``ir.IRBuilder``."""

    def __init__(self) -> None:
        self.module = ir.Module()

    def inttoptr(self, address: Value, pointer: ir.PointerType) -> Pointer:
        return Pointer(pointer.pointee, int(_items(address)))

    def gep(self, table: ir.GlobalVariable, indices: list[Any]) -> Value:
        return Value(ir.IntType(32), _items(table.initializer)[_items(indices[1])])

    def load(self, source: Pointer | Value, align: int) -> Value:
        return Value(source.item, _memory(source).copy()) if isinstance(source, Pointer) else source

    def store(self, value: Value, target: Pointer, align: int) -> None:
        _memory(target)[...] = _items(value)

    def bitcast(self, value: Value, to: ir.Type) -> Value:
        return Value(to, np.ascontiguousarray(_items(value)).view(_dtype(to)))

    def zext(self, value: Value, to: ir.Type) -> Value:
        return Value(to, _items(value).astype(_dtype(to)))

    def sext(self, value: Value, to: ir.Type) -> Value:
        return Value(to, np.where(_items(value), np.array(-1).astype(_dtype(to)), _dtype(to)(0)))

    def sitofp(self, value: Value, to: ir.Type) -> Value:
        return Value(to, _signed(value).astype(_dtype(to)))

    def shuffle_vector(self, a: Value, b: Value, order: ir.Constant) -> Value:
        items = np.concatenate([_items(a), _items(b)])[_items(order)]
        return Value(ir.VectorType(a.type.element, items.size), items)

    def insert_element(self, vector: Value, item: Value, index: ir.Constant) -> Value:
        items = _items(vector).copy()
        items[_items(index)] = _items(item)
        return Value(vector.type, items)

    def select(self, condition: Value, a: Value, b: Value) -> Value:
        return Value(a.type, np.where(_items(condition), _items(a), _items(b)))

    def icmp_signed(self, operator: str, a: Value, b: Value) -> Value:
        return _compared(operator, a, _signed(a), _signed(b))

    def icmp_unsigned(self, operator: str, a: Value, b: Value) -> Value:
        return _compared(operator, a, _items(a), _items(b))

    def call(self, function: ir.Function, args: list[Any]) -> Value:
        return Value(function.ftype.return_type, _CALLS[function.name](*args))

    def __getattr__(self, name: str) -> Any:
        operation = _OPERATIONS[name]
        return lambda a, *others: Value(a.type, operation(*map(_items, (a, *others))))


_OPERATIONS = {
    "add": np.add,
    "sub": np.subtract,
    "and_": np.bitwise_and,
    "or_": np.bitwise_or,
    "xor": np.bitwise_xor,
    "shl": np.left_shift,
    "lshr": np.right_shift,
    "fmul": np.multiply,
    "fsub": np.subtract,
    "fneg": np.negative,
}
_COMPARISONS = {"<": np.less, ">": np.greater, "==": np.equal, ">=": np.greater_equal}


def _compared(operator: str, value: Value, a: Array, b: Array) -> Value:
    return Value(ir.VectorType(ir.IntType(1), a.size) if a.ndim else ir.IntType(1), _COMPARISONS[operator](a, b))


def _memory(pointer: Pointer) -> Array:
    count = pointer.item.count if isinstance(pointer.item, ir.VectorType) else 1
    dtype = np.dtype(_dtype(pointer.item))
    items = np.frombuffer((ctypes.c_char * (count * dtype.itemsize)).from_address(pointer.address), dtype)
    return items if isinstance(pointer.item, ir.VectorType) else items.reshape(())


def _fused(a: Value, b: Value, c: Value) -> Array:
    """Return ``a * b + c``, rounded once."""
    product, addend = _items(a).astype(np.float64) * _items(b), _items(c).astype(np.float64)
    total = product + addend
    # What the sum lacks makes its last bit odd: then a second rounding goes where a single one would have gone.
    back = total - product
    lacking = (product - (total - back)) + (addend - back)
    bits = total.view(np.int64)
    inexact = np.isfinite(total) & (lacking != 0) & (bits & 1 == 0)
    return (
        (bits + np.where(inexact, np.where((lacking > 0) == (total > 0), 1, -1), 0)).view(np.float64).astype(np.float32)
    )


def _byte_shuffle(table: Value, index: Value) -> Array:
    lanes, places = _items(table).reshape(-1, 16), _items(index).reshape(-1, 16)
    return np.where(places < 128, np.take_along_axis(lanes, places & 15, axis=1), 0).astype(np.uint8).reshape(-1)


def _pack(a: Value, b: Value) -> Array:
    lanes = [np.clip(_signed(x), -128, 127).astype(np.int8).view(np.uint8).reshape(-1, 8) for x in (a, b)]
    return np.concatenate(lanes, axis=1).reshape(-1)


def _shift_right(values: Value, counts: Value) -> Array:
    items, by = _items(values), _items(counts)
    bits = 8 * items.itemsize
    return np.where(by < bits, items >> np.minimum(by, bits - 1), 0).astype(items.dtype)


def _to_integer(value: Value) -> Array:
    rounded = np.rint(_items(value).astype(np.float64))
    return np.where(np.abs(rounded) < 2.0**31, rounded, -(2.0**31)).astype(np.int64).astype(np.uint32)


def _permute(table: Value, index: Value) -> Array:
    return _items(table)[_items(index) & (_items(table).size - 1)]


def _permute_two(first: Value, index: Value, second: Value) -> Array:
    table = np.concatenate([_items(first), _items(second)])
    return table[_items(index) & (table.size - 1)]


_CALLS = {
    "llvm.abs.v8i32": lambda a, _: np.abs(_signed(a)).view(np.uint32),
    "llvm.fma.v8f32": _fused,
    "llvm.x86.avx.cvt.ps2dq.256": _to_integer,
    "llvm.x86.avx2.packsswb": _pack,
    "llvm.x86.avx2.permd": _permute,
    "llvm.x86.avx2.permps": _permute,
    "llvm.x86.avx2.pmovmskb": lambda a: np.uint32(np.packbits(_items(a) >= 128, bitorder="little").view(np.uint32)[0]),
    "llvm.x86.avx2.pshuf.b": _byte_shuffle,
    "llvm.x86.avx2.psign.w": lambda a, b: (_signed(a) * np.sign(_signed(b))).view(np.uint16),
    "llvm.x86.avx2.psrlv.d.256": _shift_right,
    "llvm.x86.avx512.permvar.hi.512": _permute,
    "llvm.x86.avx512.psrlv.w.512": _shift_right,
    "llvm.x86.avx512.vpermi2var.hi.512": _permute_two,
    "llvm.x86.avx512.vpermi2var.qi.512": _permute_two,
}

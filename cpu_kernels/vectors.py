"""Vectors in LLVM's language: what the files for instruction sets share."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba.core import cgutils

from lion.cpu_kernels.device import I32, I64


def constant(item: ir.Type, values: npt.NDArray[np.generic]) -> ir.Constant:
    """Return a constant vector."""
    return ir.Constant(ir.VectorType(item, len(values)), values.tolist())


def splat(vector: ir.VectorType, value: float) -> ir.Constant:
    """Return a constant vector of one value."""
    return ir.Constant(vector, [value] * vector.count)


def spread(builder: ir.IRBuilder, vector: ir.VectorType, value: ir.Value) -> ir.Value:
    """Return a vector of one value."""
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), value, I32(0))
    return shuffle(builder, first, first, [0] * vector.count)


def shuffle(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, order: list[int]) -> ir.Value:
    """Return items of two vectors, counted through both."""
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, len(order)), order))


def call(builder: ir.IRBuilder, name: str, result: ir.Type, *args: ir.Value) -> ir.Value:
    """Return the result of one of LLVM's intrinsics."""
    signature = ir.FunctionType(result, [arg.type for arg in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, signature, f"llvm.{name}"), args)


def at(builder: ir.IRBuilder, address: ir.Value, offset: int, item: ir.Type) -> ir.Value:
    """Return the pointer to what lies so many bytes beyond an address."""
    return builder.inttoptr(builder.add(address, I64(offset)), item.as_pointer())

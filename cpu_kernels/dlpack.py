"""Where tensors are, what they hold and how they are laid out, by the C functions that DLPack lets libraries offer.

Python asks a tensor one question at a time; here one pass has all answers.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from lion.cpu_kernels.device import I32, I64, INTEGER, TABLE, inlined, kernel, load, stack

Int64Array = npt.NDArray[np.int64]

# Of a ``DLPackExchangeAPI``, which begins with its version: where the function is, in bytes.
_MAJOR_VERSION, _TENSOR_FROM_OBJECT = 1, 40
# A ``DLTensor``, in words of 8 bytes. The lower half of KIND is the number of dimensions, the upper one the dtype.
_DATA, _DEVICE, _KIND, _SHAPE, _STRIDES, _OFFSET = range(6)
_CACHE_LINE = 16  # items of 4 bytes, of which it takes 12
# What a kernel reports.
_USED, _MISSING, _REPORT_WORDS = range(3)
_CAPSULE_NAME = b"dlpack_exchange_api"
# Functions of our own: the types of those that ctypes.pythonapi keeps are set by other libraries, too.
_CAPSULE = ctypes.py_object, ctypes.c_char_p
_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, *_CAPSULE)(("PyCapsule_IsValid", ctypes.pythonapi))
_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, *_CAPSULE)(("PyCapsule_GetPointer", ctypes.pythonapi))


def function_of(capsule: object) -> int | None:
    """Return the address of the C function that tells about a tensor object of a library.

    Args:
        capsule: ``__dlpack_c_exchange_api__`` of the tensors' class.

    Returns:
        The address; None if the library has another version of DLPack, or no such function, or if Numba is not to
        compile what would call it.

    Source:
        https://dmlc.github.io/dlpack/latest/c_api.html
    """
    if numba.config.DISABLE_JIT or not _is_valid(capsule, _CAPSULE_NAME):
        return None
    api = _pointer(capsule, _CAPSULE_NAME)
    if ctypes.c_uint32.from_address(api).value != _MAJOR_VERSION:
        return None
    return ctypes.c_int64.from_address(api + _TENSOR_FROM_OBJECT).value or None


def describe(function: int, objects: Int64Array) -> tuple[Int64Array, bytes, bool] | None:
    """Return where tensors are and what tells their forms apart.

    Args:
        function: What :func:`function_of` returned.
        objects: The addresses of tensor objects of that library, which somebody else keeps alive.

    Returns:
        The addresses of the first elements, 0 without memory; devices, dtypes, shapes and strides, to be compared;
        whether a tensor that has elements has no memory. None if the library cannot describe one of them.
    """
    addresses = np.empty(len(objects), np.int64)
    report = np.zeros(_REPORT_WORDS, np.int64)
    forms = np.empty(8 * len(objects), np.int64)
    look = _look_kernel()
    look(report, function, objects, addresses, forms)
    if report[_USED] > len(forms):
        forms = np.empty(report[_USED], np.int64)
        look(report, function, objects, addresses, forms)
    if report[_USED] < 0:
        return None
    return addresses, forms[: report[_USED]].tobytes(), bool(report[_MISSING])


@intrinsic
def _fill(typingctx, function, address, tensor):  # type: ignore[no-untyped-def]
    """_fill(function, address, tensor): fill in a DLTensor; return whether that went well, and forget the exception."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        kind = ir.FunctionType(I32, [I64, I64])
        status = builder.call(builder.inttoptr(args[0], kind.as_pointer()), args[1:])
        failed = builder.icmp_signed("!=", status, I32(0))
        with builder.if_then(failed, likely=False):
            clear = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, clear, "PyErr_Clear"), [])
        return builder.not_(failed)

    return types.boolean(types.int64, types.int64, types.int64), codegen


@inlined
def _word(address: int, index: int) -> int:
    return np.int64(load("uint64", address, index))


@functools.cache
def _look_kernel() -> Any:
    # It works on Python's objects.
    @kernel("", INTEGER, TABLE, TABLE, TABLE, nogil=False)
    def look(report, function, objects, addresses, forms):  # type: ignore[no-untyped-def]
        tensor = stack(_CACHE_LINE)
        report[_USED] = report[_MISSING] = used = 0
        for number in range(objects.size):
            if not _fill(function, objects[number], tensor):
                report[_USED] = -1
                return
            data, device, kind = _word(tensor, _DATA), _word(tensor, _DEVICE), _word(tensor, _KIND)
            shape, strides = _word(tensor, _SHAPE), _word(tensor, _STRIDES)
            addresses[number] = data + _word(tensor, _OFFSET)
            dimensions = kind & 0xFFFFFFFF
            begin, used = used, used + 2 * (1 + dimensions)
            empty = False
            for i in range(dimensions):
                empty |= _word(shape, i) == 0
            if data == 0 and not empty:
                report[_MISSING] = 1
            if used <= forms.size:
                forms[begin], forms[begin + 1] = device, kind
                for i in range(dimensions):
                    forms[begin + 2 + i] = _word(shape, i)
                    forms[begin + 2 + dimensions + i] = _word(strides, i)
        report[_USED] = used

    return look

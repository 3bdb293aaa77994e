"""What a program may change about tensors without telling: which objects they are, where and in what form."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from lion.cpu_kernels import dlpack

_data_ptr = Tensor.data_ptr
_stride: Callable[[Tensor], tuple[int, ...]] = Tensor.stride
_dtype = attrgetter("dtype")
_nbytes = attrgetter("nbytes")
# Old releases of torch have none.
_capsule = getattr(Tensor, "__dlpack_c_exchange_api__", None)
_DESCRIBE = _capsule and dlpack.function_of(_capsule)


class Look(NamedTuple):
    """What tensors are like.

    Attributes:
        addresses: int64 array of shape (n,): where their first elements are; 0 without memory.
        forms: What tells dtypes, shapes and strides apart, one tensor after another: to be compared, as a whole or
            from some tensor on.
        missing: Whether one of them has elements, and no memory.
    """

    addresses: npt.NDArray[np.int64]
    forms: Sequence[Any]
    missing: bool


def look(tensors: Sequence[Tensor]) -> Look:
    """Return what tensors are like."""
    if _DESCRIBE:
        objects = np.fromiter(tensors, object, len(tensors))
        described = dlpack.describe(_DESCRIBE, np.frombuffer(objects, np.int64))
        if described is not None:
            return Look(*described)
    # With the sizes, the strides tell the shapes.
    sizes = list(map(_nbytes, tensors))
    forms = list(zip(map(_dtype, tensors), sizes, map(_stride, tensors), strict=True))
    addresses = list(map(_data_ptr, tensors))
    missing = not all(addresses) and any(size and not at for size, at in zip(sizes, addresses, strict=True))
    return Look(np.array(addresses, np.int64), forms, missing)


def identities(objects: Collection[object]) -> bytes:
    """Return the ids of objects, 8 bytes each, to be compared."""
    return np.fromiter(objects, object, len(objects)).tobytes()

"""The table lookups of 8-bit states on any processor, one load for each element."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lion.cpu_kernels.device import float_to_bits, inlined, load, store
from lion.reference import BLOCK_SIZE, create_dynamic_map, quantize_thresholds

NAME = "portable code"

# Tables are frozen into the kernels: as arguments they might alias the outputs, which stops vectorisation.
QMAP = create_dynamic_map()


def _bucket_table() -> npt.NDArray[np.uint32]:
    """Return the table that quantizes with one lookup.

    A bucket is the 2**17 float32 that share their upper 15 bits once their bits are made to ascend; the 16384
    buckets cover (-2, 2), and none holds more than one threshold. Those bits, shifted left by 7 and added to the
    bucket's entry, give the code in the upper 8 bits: the lower bits carry at the threshold.
    """
    bits = quantize_thresholds(QMAP).view(np.int32)
    order = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).astype(np.int64)
    starts = np.arange(-8192, 8192) << 17
    code = np.searchsorted(order, starts, side="left")
    last = np.searchsorted(order, starts + (1 << 17), side="left")
    assert (last - code <= 1).all()
    next_threshold = np.append(order, 0)[code]
    carry = np.where(last > code, (1 << 24) - ((next_threshold + 1 - starts) << 7), 0)
    return ((code << 24) + carry - (starts << 7)).astype(np.uint32)


BUCKETS = _bucket_table()

# In a block; a paired block has the even elements first, then the odd ones.
PAIRS = BLOCK_SIZE // 2


@inlined
def dequantize(codes: int, size: int, block: int) -> None:
    """Write the dynamic map's float32 values of codes; takes addresses."""
    for i in range(size):
        store("float32", block, i, QMAP[load("uint8", codes, i)])


@inlined
def dequantize_paired(codes: int, block: int) -> None:
    """Write the dynamic map's float32 values of a block's codes as a paired block; takes addresses."""
    for i in range(PAIRS):
        store("float32", block, i, QMAP[load("uint8", codes, 2 * i)])
        store("float32", block, PAIRS + i, QMAP[load("uint8", codes, 2 * i + 1)])


@inlined
def quantize(block: int, entries: int, size: int, reciprocal: np.float32, codes: int) -> None:
    """Write the dynamic map's codes of float32 times a factor; takes addresses.

    The table is looked up in a loop of its own that stores to the stack only: that loop becomes gathers, or stays
    scalar where gathers are slow, and the others vectorise either way.

    Args:
        block: Address of the float32 values, on the stack; destroyed.
        entries: Address of as many uint32 to work in, on the stack.
        size: Element count.
        reciprocal: The factor.
        codes: Address of the codes to write.
    """
    for i in range(size):
        bits = np.int32(float_to_bits(load("float32", block, i) * reciprocal))
        # Ascends with the value, as a signed integer.
        order = np.int32(bits ^ np.int32(np.int32(bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))
        store("uint32", block, i, np.uint32(order))
        store("uint32", entries, i, np.uint32(np.int32(order >> np.int32(17)) + np.int32(8192)))
    for i in range(size):
        store("uint32", entries, i, BUCKETS[load("uint32", entries, i)])
    for i in range(size):
        shifted = np.uint32(load("uint32", block, i) << np.uint32(7))
        store("uint8", codes, i, np.uint32(np.uint32(load("uint32", entries, i) + shifted) >> np.uint32(24)))


@inlined
def quantize_paired(block: int, entries: int, reciprocal: np.float32, codes: int) -> None:
    """Write the dynamic map's codes of a paired block, see :func:`quantize`."""
    quantize(block, entries, BLOCK_SIZE, reciprocal, codes)
    for i in range(BLOCK_SIZE):
        store("uint8", block, i, load("uint8", codes, i))
    for i in range(PAIRS):
        store("uint8", codes, 2 * i, load("uint8", block, i))
        store("uint8", codes, 2 * i + 1, load("uint8", block, PAIRS + i))

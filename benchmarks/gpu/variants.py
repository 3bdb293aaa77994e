"""Variants of the CUDA kernels that are timed beside each other: other ways to the same bits."""

from __future__ import annotations

from lion.cuda_kernels.tuning import DEFAULT, Tuning

VARIANTS: dict[str, Tuning] = {
    "as they are": DEFAULT,
    "eight elements together": Tuning(halves=False),
    # The fewest registers with which the compiler puts all loads before the arithmetic.
    "all loads first": Tuning(max_registers=(("update_32bit", 56), ("update_8bit_blockwise", 80))),
    # Five blocks of threads on a multiprocessor instead of four, at the price of some registers kept in memory.
    "48 registers": Tuning(max_registers=(("update_8bit_blockwise", 48),)),
    "next block ahead": Tuning(ahead=True),
}

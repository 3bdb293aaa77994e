"""What the kernels can do in more than one way, with the same bits: which is fastest, only a GPU can tell."""

from __future__ import annotations

from typing import NamedTuple


class Tuning(NamedTuple):
    """How the kernels are made; the defaults are what programs get.

    Attributes:
        halves: Whether a lane's eight elements are four and the four 128 further on where 4-byte values are stored, so
            that a warp's accesses are of whole sectors of 32 bytes (default: True). Otherwise they lie together.
        ahead: Whether a warp loads its next block before it stores this one (default: False).
        max_registers: Kernels' names, each with the most registers that a thread may have (default: none, the compiler
            decides).
    """

    halves: bool = True
    ahead: bool = False
    max_registers: tuple[tuple[str, int], ...] = ()

    def most_registers(self, kernel: str) -> int | None:
        """Return the most registers that a thread of a kernel may have.

        Args:
            kernel: The kernel's name.

        Returns:
            Their number; None where the compiler decides.
        """
        return dict(self.max_registers).get(kernel)


DEFAULT = Tuning()

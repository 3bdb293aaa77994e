"""Counts the sectors of memory that a warp's accesses ask for; it needs the simulator.

A warp's access asks for every sector of 32 bytes that one of its lanes touches. Of loads, the first to touch a sector
asks the L2 cache for it and the next finds it in the L1 cache; a store is sent on as it is, in as many sectors.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

from lion.cuda_kernels import device, launch, lion, quantization, rounding, simulator
from lion.cuda_kernels.tuning import Tuning
from tests.comparing import guarded
from tests.differential import cuda_cases as cases

ACCESSES = {
    **{f"{way}_{name}": size for way in ("load", "store") for name, size in (("2_words", 8), ("4_words", 16))},
    **{f"{way}_{name}": size for way in ("load", "store") for name, size in (("f32", 4), ("u32", 4), ("u16", 2))},
}
SECTOR = 32
KINDS = (
    cases.FLOAT32,
    cases.Kinds("bfloat16", "bfloat16"),
    *(cases.Kinds("bfloat16", "bfloat16", weights) for weights in cases.WEIGHTS),
)


class Count(NamedTuple):
    """What a warp does for one block of 256 elements.

    Attributes:
        requests: Accesses, each by all lanes or by one.
        sectors: Sectors that they ask for, in all.
        to_l2: Those of them that the L2 cache is asked for.
    """

    requests: int
    sectors: int
    to_l2: int


class _Buffer:
    def __init__(self, values: cases.Array) -> None:
        self.array, self.check = guarded(values, offset_bytes=0)
        self.address = self.array.ctypes.data

    def read(self) -> cases.Array:
        return self.array


class _Memory:
    """Keeps what is put, in order: the parts of the tensor come first."""

    resident_blocks = 1

    def __init__(self) -> None:
        self.buffers: list[_Buffer] = []

    def put(self, values: cases.Array, offset_bytes: int = 0) -> _Buffer:
        self.buffers.append(_Buffer(values))
        return self.buffers[-1]


def count(kind: str, kinds: cases.Kinds, tuning: Tuning) -> Count:
    """Return the count of an update, which is compared with the reference as well."""
    tensor = cases.make_tensor(kind, kinds, 256)
    counted = [list(tensor).index(name) for name in ("param", "grad", "momentum", "codes", "absmax", "low")]
    memory = _Memory()
    # By lane, the sectors of each of its accesses to each part, in the order of the program.
    seen: dict[tuple[int, bool], dict[int, list[set[int]]]] = defaultdict(lambda: defaultdict(list))

    def recorded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        size, stores = ACCESSES[name], name.startswith("store")

        def access(address: Any, *values: Any) -> Any:
            first = int(address)
            for part in counted:
                array = memory.buffers[part].array
                if array.ctypes.data <= first < array.ctypes.data + array.nbytes:
                    lane = simulator.thread_number()
                    seen[part, stores][lane].append({first // SECTOR, (first + size - 1) // SECTOR})
            return function(address, *values)

        return access

    modules: list[dict[str, Any]] = [vars(module) for module in (device, lion, quantization, rounding)]
    originals = [{name: module[name] for name in ACCESSES if name in module} for module in modules]
    tuned, launch.TUNING = launch.TUNING, tuning
    try:
        for module, names in zip(modules, originals, strict=True):
            module.update({name: recorded(name, function) for name, function in names.items()})
        cases.check_update(memory, kind, kinds, [tensor], (1e-3, (0.9, 0.99), 0.1), False)
    finally:
        launch.TUNING = tuned
        for module, names in zip(modules, originals, strict=True):
            module.update(names)
    requests = sectors = to_l2 = 0
    for (_, stores), lanes in seen.items():
        asked = [set().union(*(lane[i] for lane in lanes.values() if i < len(lane))) for i in range(len(lanes[0]))]
        requests += len(asked)
        sectors += sum(map(len, asked))
        to_l2 += sum(map(len, asked)) if stores else len(set().union(*asked))
    return Count(requests, sectors, to_l2)


def main() -> None:
    """Print the counts as JSON."""
    rows = [
        (kind, kinds.dtype, cases.way_of(kinds.weights), halves, *count(kind, kinds, Tuning(halves=halves)))
        for kind in ("update_32bit", "update_8bit_blockwise")
        for kinds in KINDS
        for halves in (False, True)
    ]
    json.dump(rows, sys.stdout)


if __name__ == "__main__":
    main()

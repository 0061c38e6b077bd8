"""Selection in rounds: find the best key of a warp, take it out, k times.

Lane j holds the entries j, j + 32, ... of a row in registers. A round finds the best key, then the
lowest index that has it: exact for any data, in a fixed number of steps.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Uint32

from cute_router.topk.config import WARP
from cute_router.topk.key import REMOVED
from cute_router.topk.network import greater, less

NOBODY = 0xFFFFFFFF


@cute.jit
def take_best(rKeys: cute.Tensor, lane: Int32) -> Int32:
    """The index of the warp's best key, the lowest among equals; its key becomes REMOVED."""
    best = rKeys[0]
    for i in cutlass.range_constexpr(1, cute.size(rKeys)):
        best = cutlass.select_(rKeys[i] > best, rKeys[i], best)
    top = cute.arch.warp_redux_sync(best, kind="umax")
    index = Uint32(NOBODY)
    for i in cutlass.range_constexpr(cute.size(rKeys) - 1, -1, -1):
        index = cutlass.select_(rKeys[i] == top, Uint32(lane + WARP * i), index)
    index = cute.arch.warp_redux_sync(index, kind="umin")
    for i in cutlass.range_constexpr(cute.size(rKeys)):
        taken = index == Uint32(lane + WARP * i)
        rKeys[i] = cutlass.select_(taken, Uint32(REMOVED), rKeys[i])
    return index.bitcast(Int32)


@cute.jit
def take_all(
    rKeys: cute.Tensor,
    rValues: cute.Tensor,
    count: cutlass.Constexpr,
    lane: Int32,
    unroll: cutlass.Constexpr = -1,
) -> tuple[Int32, Float32]:
    """(index, value) of the j-th best entry in lane j < `count`, (0, 0.0) in others.

    unroll: rounds that the code has one by one; -1 leaves that to the compiler.
    """
    chosen, value = Int32(0), Float32(0.0)
    for j in cutlass.range(count, unroll=unroll):
        index = take_best(rKeys, lane)
        found = rValues[0]
        for i in cutlass.range_constexpr(1, cute.size(rValues)):
            found = cutlass.select_(index // WARP == i, rValues[i], found)
        found = cute.arch.shuffle_sync(found, index % WARP)
        chosen = cutlass.select_(lane == j, index, chosen)
        value = cutlass.select_(lane == j, found, value)
    return chosen, value


@cute.jit
def take_best_of(rKeys: cute.Tensor, names: list[Uint32], lanes: cutlass.Constexpr) -> Uint32:
    """The name of the best key of some lanes, the lowest among equals; its key becomes REMOVED."""
    top = rKeys[0]
    for i in cutlass.range_constexpr(1, cute.size(rKeys)):
        top = greater(top, rKeys[i])
    for bit in cutlass.range_constexpr(lanes.bit_length() - 1):
        top = greater(top, cute.arch.shuffle_sync_bfly(top, offset=1 << bit))
    lowest = Uint32(NOBODY)
    for i in cutlass.range_constexpr(cute.size(rKeys)):
        name = cutlass.select_(rKeys[i] == top, names[i], Uint32(NOBODY))
        lowest = less(lowest, name)
    for bit in cutlass.range_constexpr(lanes.bit_length() - 1):
        lowest = less(lowest, cute.arch.shuffle_sync_bfly(lowest, offset=1 << bit))
    for i in cutlass.range_constexpr(cute.size(rKeys)):
        taken = lowest == names[i]
        rKeys[i] = cutlass.select_(taken, Uint32(REMOVED), rKeys[i])
    return lowest

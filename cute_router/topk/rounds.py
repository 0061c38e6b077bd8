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
def chosen_value(rValues: cute.Tensor, index: Int32) -> Float32:
    """The value of the warp's entry `index`, in every lane."""
    value = rValues[0]
    for i in cutlass.range_constexpr(1, cute.size(rValues)):
        value = cutlass.select_(index // WARP == i, rValues[i], value)
    return cute.arch.shuffle_sync(value, index % WARP)


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

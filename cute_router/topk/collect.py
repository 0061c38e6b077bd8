"""The entries of a slice that reach a threshold, into a list in shared memory.

Nearly all entries are told apart by one comparison of floats. Where a warp has one that may reach
the threshold, its lanes count exactly, take places by a prefix sum and one atomic addition, and
write. The list's order is that of events; the sort that follows does not depend on it.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Uint32, Uint64

from cute_router.topk.composite import composite
from cute_router.topk.config import WARP
from cute_router.topk.key import number
from cute_router.topk.ptx import reserve
from cute_router.topk.radix_config import INDEX_BITS
from cute_router.topk.row_slice import Batch

GROUP = 8  # entries of a lane that take their places together: more hold too many registers


class Collect:
    """Visitor: append the entries whose composite is at least `threshold` to the list."""

    def __init__(self, sList: cute.Tensor, sSize: cute.Tensor, threshold: Uint64, lane: Int32):
        self.sList = sList
        self.sSize = sSize
        self.threshold = threshold
        # Of a key that no number has this is NaN, which no entry is told to be below.
        self.bound = number(Uint32(threshold >> INDEX_BITS))
        self.lane = lane

    @cute.jit
    def visit(self, b: Batch) -> None:
        """Collect from a batch. All lanes of a warp call."""
        width, columns = cute.size(b.rEntries, mode=[0]), cute.size(b.rEntries, mode=[1])
        group = max(1, GROUP // width)
        for j in cutlass.range_constexpr(0, columns, group):
            self.visit_columns(b, j, min(j + group, columns))

    @cute.jit
    def visit_columns(self, b: Batch, low: cutlass.Constexpr, high: cutlass.Constexpr) -> None:
        """Collect from some columns of a batch."""
        width, sList = cute.size(b.rEntries, mode=[0]), self.sList
        near = Boolean(False)
        for j in cutlass.range_constexpr(low, high):
            some = Boolean(False)
            for i in cutlass.range_constexpr(width):
                some = some | (not (b.rEntries[i, j].to(Float32) < self.bound))
            near = near | (some & (b.start + j * b.stride < b.end))
        if cute.arch.vote_any_sync(near):
            mine = Int32(0)
            for j in cutlass.range_constexpr(low, high):
                for i in cutlass.range_constexpr(width):
                    reaches, _ = reaching(b, i, j, self.threshold)
                    mine = mine + Int32(reaches)
            through = mine
            for log in cutlass.range_constexpr(5):
                before = cute.arch.shuffle_sync_up(through, offset=1 << log, mask_and_clamp=0)
                through = cutlass.select_(self.lane >= 1 << log, through + before, through)
            place = Int32(0)
            if self.lane == WARP - 1:
                place = reserve(self.sSize.iterator, through)
            place = cute.arch.shuffle_sync(place, WARP - 1) + through - mine
            for j in cutlass.range_constexpr(low, high):
                for i in cutlass.range_constexpr(width):
                    reaches, entry = reaching(b, i, j, self.threshold)
                    if reaches:
                        sList[place] = entry
                    place = place + Int32(reaches)


@cute.jit
def reaching(b: Batch, i: cutlass.Constexpr, j: cutlass.Constexpr, threshold: Uint64):
    """Whether entry (i, j) of a batch reaches the threshold; its composite."""
    first = b.start + j * b.stride
    entry = composite(b.rEntries[i, j].to(Float32), first + i)
    return (entry >= threshold) & (first < b.end), entry

"""The search for a threshold: no fewer than k entries of the row reach it, few enough to sort.

    prefix = 0
    repeat: histogram, by their next digit, of the entries whose upper digits are the prefix
            prefix, digit = the one that the k-th best entry has
    until   the entries at or above the prefix are no more than the capacity

A digit is `bits` bits of the composite, from the top: the key's come first, then, for rows with
many ties, the index's. The last digit leaves exactly k entries: composites are all different.

A CTA counts its slice in sBins and adds that to sTotal of every CTA of its cluster; behind a
barrier all have the row's histogram, and search it each for themselves. sTotal has two halves, used
by turns: who has searched one clears it, and it is not added to again before the next barrier.
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Uint32, Uint64
from cutlass.memory import SmemAllocator

from cute_router.topk.composite import BITS, composite
from cute_router.topk.config import WARP
from cute_router.topk.key import key
from cute_router.topk.ptx import add_to_peer, count_one
from cute_router.topk.radix_config import RadixConfig
from cute_router.topk.row_slice import Batch, RowSlice, Slice


class Bins(NamedTuple):
    """Shared memory of the search."""

    sBins: cute.Tensor  # (bins): of the slice
    sTotal: cute.Tensor  # (bins, 2): of the row; in a cluster of 1 it is sBins
    sWarps: cute.Tensor  # (warps): entries in a warp's share of the bins
    sFound: cute.Tensor  # (3): bin, entries in higher bins, entries in it


class CountFirst:
    """Visitor: count entries by their first digit."""

    def __init__(self, sBins: cute.Tensor, bits: int):
        self.sBins = sBins
        self.bits = bits

    @cute.jit
    def visit(self, b: Batch) -> None:
        """Count a batch."""
        for j in cutlass.range_constexpr(cute.size(b.rEntries, mode=[1])):
            if b.start + j * b.stride < b.end:
                for i in cutlass.range_constexpr(cute.size(b.rEntries, mode=[0])):
                    k = key(b.rEntries[i, j].to(Float32), nan="first")
                    count_one(self.sBins.iterator + Int32(k >> Uint32(32 - self.bits)))


class CountNext:
    """Visitor: count entries of which (composite >> shift) - base is a digit, by that."""

    def __init__(self, sBins: cute.Tensor, base: Uint64, shift: Int32, digits: Uint64):
        self.sBins = sBins
        self.base = base
        self.shift = Uint64(shift)
        self.digits = digits

    @cute.jit
    def visit(self, b: Batch) -> None:
        """Count a batch."""
        for j in cutlass.range_constexpr(cute.size(b.rEntries, mode=[1])):
            first = b.start + j * b.stride
            if first < b.end:
                for i in cutlass.range_constexpr(cute.size(b.rEntries, mode=[0])):
                    entry = composite(b.rEntries[i, j].to(Float32), first + i)
                    digit = (entry >> self.shift) - self.base
                    if digit < self.digits:
                        count_one(self.sBins.iterator + Int32(digit))


class Search:
    """The search as one configuration does it."""

    def __init__(self, config: RadixConfig, rows: RowSlice):
        self.cfg = config
        self.rows = rows
        self.share = config.bins // config.threads  # bins of a thread

    def allocate(self, smem: SmemAllocator) -> Bins:
        """Shared memory of the search."""
        c = self.cfg
        sBins = smem.allocate_tensor(Int32, cute.make_layout(c.bins), 16)
        sTotal = sBins
        if c.cluster > 1:
            sTotal = smem.allocate_tensor(Int32, cute.make_layout((c.bins, 2)), 16)
        sWarps = smem.allocate_tensor(Int32, cute.make_layout(c.threads // WARP), 4)
        sFound = smem.allocate_tensor(Int32, cute.make_layout(3), 4)
        return Bins(sBins, sTotal, sWarps, sFound)

    @cute.jit
    def clear(self, m: Bins, tid: Int32) -> None:
        """Set all counters to 0."""
        c = self.cfg
        for i in cutlass.range_constexpr(self.share):
            m.sBins[tid + i * c.threads] = Int32(0)
            if cutlass.const_expr(c.cluster > 1):
                for half in cutlass.range_constexpr(2):
                    m.sTotal[tid + i * c.threads, half] = Int32(0)

    @cute.jit
    def threshold(
        self, m: Bins, s: Slice, length: Int32, k: Int32, rank: Int32, tid: Int32
    ) -> Uint64:
        """The least composite of entries to be sorted; 0 if the row has no more than k.

        All CTAs of a cluster call with the same length and k. When it returns, none of them adds to
        another's counters any more, and all have started.
        """
        c = self.cfg
        prefix, shift = Uint64(0), Int32(BITS)
        above, inside = Int32(0), length  # entries whose upper bits are above the prefix, equal it
        enough, half = k, Int32(0)  # at first: entries that need no histogram
        while above + inside > enough:
            lower = cutlass.max(shift - c.bits, 0)
            base = prefix << Uint64(shift - lower)
            if shift == BITS:
                self.rows.each(s, tid, CountFirst(m.sBins, c.bits).visit)
                if cutlass.const_expr(c.cluster > 1):
                    cute.arch.cluster_wait()  # the peers have cleared their counters
            else:
                digits = Uint64(1) << Uint64(shift - lower)
                self.rows.each(s, tid, CountNext(m.sBins, base, lower, digits).visit)
            cute.arch.sync_threads()
            if cutlass.const_expr(c.cluster > 1):
                self.add_up(m, half, rank, tid)
            self.find(m, half, k - above, tid)
            prefix = base + Uint64(m.sFound[0])
            above = above + m.sFound[1]
            inside = m.sFound[2]
            shift, enough, half = lower, Int32(c.capacity), half ^ 1
        if cutlass.const_expr(c.cluster > 1):
            if shift == BITS:
                cute.arch.cluster_wait()
        return prefix << Uint64(shift)

    @cute.jit
    def add_up(self, m: Bins, half: Int32, rank: Int32, tid: Int32) -> None:
        """Add this CTA's bins to all CTAs' totals, clear them, and wait for the others'."""
        c = self.cfg
        for i in cutlass.range_constexpr(self.share):
            b = tid + i * c.threads
            count = m.sBins[b]
            m.sBins[b] = Int32(0)
            if count > 0:
                for turn in cutlass.range_constexpr(c.cluster):
                    peer = (rank + turn) % c.cluster  # not all to the same one at once
                    add_to_peer(m.sTotal.iterator + half * c.bins + b, peer, count)
        cute.arch.cluster_arrive()
        cute.arch.cluster_wait()

    @cute.jit
    def find(self, m: Bins, half: Int32, k: Int32, tid: Int32) -> None:
        """Find the bin of the k-th best entry, into sFound, and clear the bins."""
        c = self.cfg
        warp, lane = tid // WARP, tid % WARP
        # From the top: thread 0 has the highest bins.
        first = c.bins - (tid + 1) * self.share
        if cutlass.const_expr(c.cluster > 1):
            first = first + half * c.bins
        rCounts = cute.make_rmem_tensor(self.share, Int32)
        mine = Int32(0)
        for i in cutlass.range_constexpr(self.share):
            rCounts[i] = m.sTotal[first + i]
            mine = mine + rCounts[i]
        for i in cutlass.range_constexpr(self.share):
            m.sTotal[first + i] = Int32(0)
        through = mine  # of the warp's lanes up to this one
        for log in cutlass.range_constexpr(5):
            before = cute.arch.shuffle_sync_up(through, offset=1 << log, mask_and_clamp=0)
            through = cutlass.select_(lane >= 1 << log, through + before, through)
        if lane == WARP - 1:
            m.sWarps[warp] = through
        cute.arch.sync_threads()
        higher = Int32(0)
        if lane < warp:
            higher = m.sWarps[lane]
        above = cute.arch.warp_redux_sync(higher, kind="add") + through - mine
        if above < k:
            if above + mine >= k:
                found = Boolean(False)
                for i in cutlass.range_constexpr(self.share - 1, -1, -1):
                    here = (not found) and above + rCounts[i] >= k
                    if here:
                        m.sFound[0] = first + i - half * (c.bins if c.cluster > 1 else 0)
                        m.sFound[1] = above
                        m.sFound[2] = rCounts[i]
                    found = found or here
                    above = above + rCounts[i]
        cute.arch.sync_threads()

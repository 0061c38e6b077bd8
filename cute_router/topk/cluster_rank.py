"""Places of the entries of a cluster's sorted lists in the order of all of them.

    place(x) = sum over the CTAs' lists of #{ y in list : y > x }

Each CTA gets a copy of every list and looks its own entries up in all of them, by binary search. So
the cluster sorts and writes in parallel; a merge in one CTA would take as long as all the rest.
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Uint64
from cutlass.memory import SmemAllocator

from cute_router.topk.ptx import store_long_to_peer, store_to_peer
from cute_router.topk.radix_config import RadixConfig


class Lists(NamedTuple):
    """Shared memory of the exchange."""

    sAll: cute.Tensor  # (capacity): the lists of all CTAs, one behind the other
    sSizes: cute.Tensor  # (cluster)
    sStarts: cute.Tensor  # (cluster)


class ClusterRank:
    """The exchange and the search in clusters of one configuration."""

    def __init__(self, config: RadixConfig):
        self.cfg = config
        self.parts = max(1, config.cluster // 4)  # lanes that share the lists of an entry
        self.entries = config.threads // self.parts  # of a CTA at a time

    def allocate(self, smem: SmemAllocator) -> Lists:
        """Shared memory of the exchange."""
        c = self.cfg
        sAll = smem.allocate_tensor(Uint64, cute.make_layout(c.capacity), 16)
        sSizes, sStarts = (
            smem.allocate_tensor(Int32, cute.make_layout(c.cluster), 4) for _ in range(2)
        )
        return Lists(sAll, sSizes, sStarts)

    @cute.jit
    def announce(self, m: Lists, size: Int32, rank: Int32, tid: Int32) -> None:
        """Tell the peers the size of this CTA's list; they have started. `share` takes it up."""
        if tid < self.cfg.cluster:
            store_to_peer(m.sSizes.iterator + rank, tid, size)
        cute.arch.sync_warp()
        cute.arch.cluster_arrive()

    @cute.jit
    def share(self, m: Lists, sList: cute.Tensor, size: Int32, rank: Int32, tid: Int32) -> None:
        """Send this CTA's sorted list to all of the cluster, and wait for theirs."""
        c = self.cfg
        cute.arch.cluster_wait()
        start = Int32(0)
        for r in cutlass.range_constexpr(c.cluster):
            if tid == r:
                m.sStarts[r] = start
            start = start + m.sSizes[r]
        cute.arch.sync_threads()
        start = m.sStarts[rank]
        for i in cutlass.range(tid, size, c.threads):
            entry = sList[i]
            for turn in cutlass.range_constexpr(c.cluster):
                peer = (rank + turn) % c.cluster  # not all to the same one at once
                store_long_to_peer(m.sAll.iterator + start + i, peer, entry)
        cute.arch.cluster_arrive()
        cute.arch.cluster_wait()

    @cute.jit
    def place(self, m: Lists, entry: Uint64, part: Int32) -> Int32:
        """The place of `entry`. All lanes of a warp call; adjacent ones are an entry's parts."""
        c = self.cfg
        lists = c.cluster // self.parts
        starts, sizes, found, longest = [], [], [], Int32(0)
        for q in cutlass.range_constexpr(lists):
            starts.append(m.sStarts[q * self.parts + part])
            sizes.append(m.sSizes[q * self.parts + part])
            found.append(Int32(0))
            longest = cutlass.max(longest, sizes[q])
        longest = cute.arch.warp_redux_sync(longest, kind="max")
        step = Int32(1) << (31 - cute.arch.clz(longest | 1))
        while step > 0:
            for q in cutlass.range_constexpr(lists):
                probe = found[q] + step
                inside = probe <= sizes[q]
                at = cutlass.select_(inside, starts[q] + probe - 1, 0)
                ahead = inside and m.sAll[at] > entry
                found[q] = cutlass.select_(ahead, probe, found[q])
            step = step >> 1
        place = Int32(0)
        for q in cutlass.range_constexpr(lists):
            place = place + found[q]
        for log in cutlass.range_constexpr(self.parts.bit_length() - 1):
            place = place + cute.arch.shuffle_sync_bfly(place, offset=1 << log)
        return place

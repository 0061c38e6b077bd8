"""The k best entries of long rows, in order: values, indices = top(scores, k).

    grid (rows x C)    cluster of C CTAs: adjacent slices of one row    k <= capacity

    1  search     histograms of the keys, digit by digit, until the entries at or above the prefix
                  of the k-th best are at most `capacity`: one digit for most data
    2  collect    these entries, as composites of key and index, into a list of each CTA
    3  sort       each CTA its list
    4  rank       C > 1: each CTA finds the places of its entries among all lists
    5  write      the first k: each value with its own bits, loaded again by its index

    cluster barrier    what is there after it
    start              all CTAs run and have cleared their counters
    each digit         the row's histogram in every CTA
    sizes              the sizes of all lists (the sort is between arrival and wait)
    lists              all lists in every CTA; nobody reaches into a peer any more

The order is that of composites, which are all different: key (topk.key, NaN first), then the lower
index. Nothing depends on the order of events but the order in the lists before they are sorted. A
row with a length has only its first `length` entries; past them the index is -1, the value -inf.
"""

from typing import Any

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Int32, Uint64
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor
from cutlass.memory import SmemAllocator

from cute_router.topk.bitonic import Bitonic
from cute_router.topk.cluster_rank import ClusterRank
from cute_router.topk.collect import Collect
from cute_router.topk.composite import index_of
from cute_router.topk.config import WARP
from cute_router.topk.histogram import Search
from cute_router.topk.radix_config import ITEM_BYTES, RadixConfig
from cute_router.topk.row_slice import RowSlice

TYPES = {
    "float32": cutlass.Float32,
    "float16": cutlass.Float16,
    "bfloat16": cutlass.BFloat16,
    "int64": cutlass.Int64,
    "int32": cutlass.Int32,
}
READS = 4  # values that a thread loads at once when it writes a list


class RadixKernel:
    """One configuration of the kernel, ready for `cute.compile`."""

    def __init__(self, config: RadixConfig):
        self.cfg = config
        self.rows = RowSlice(config)
        self.search = Search(config, self.rows)
        self.bitonic = Bitonic(config.threads, config.items)
        self.ranks = ClusterRank(config)

    @cute.jit
    def __call__(
        self,
        mScores: cute.Tensor,  # (rows, L)
        mLengths: cute.Tensor | None,  # (rows)
        mValues: cute.Tensor,  # (rows, k)
        mIndices: cute.Tensor,  # (rows, k)
        stream: cuda.CUstream,
    ):
        """Launch; traced into the kernel's host code."""
        c = self.cfg
        self.kernel.set_name_prefix("cute_router_topk", remove_cutlass_symbol=True)
        self.kernel(mScores, mLengths, mValues, mIndices).launch(
            grid=[cute.size(mScores, mode=[0]) * c.cluster, 1, 1],
            block=[c.threads, 1, 1],
            cluster=[c.cluster, 1, 1] if c.cluster > 1 else None,
            stream=stream,
            use_pdl=c.pdl,
            min_blocks_per_mp=c.blocks,
            preferred_smem_carveout=100,
        )

    @cute.kernel
    def kernel(
        self,
        mScores: cute.Tensor,
        mLengths: cute.Tensor | None,
        mValues: cute.Tensor,
        mIndices: cute.Tensor,
    ):
        """A CTA's part of one row."""
        c = self.cfg
        tid = cute.arch.thread_idx()[0]
        block = cute.arch.block_idx()[0]
        row, rank = block // c.cluster, block % c.cluster
        smem = SmemAllocator()
        sList = smem.allocate_tensor(Uint64, cute.make_layout(c.capacity), 16)
        sSize = smem.allocate_tensor(Int32, cute.make_layout(1), 4)
        bins = self.search.allocate(smem)
        if tid == 0:
            sSize[0] = Int32(0)
        self.search.clear(bins, tid)
        cute.arch.sync_threads()
        if cutlass.const_expr(c.cluster > 1):
            lists = self.ranks.allocate(smem)
            cute.arch.cluster_arrive()
        if cutlass.const_expr(c.pdl):
            cute.arch.griddepcontrol_launch_dependents()
            cute.arch.griddepcontrol_wait()

        length = self.length(mScores, mLengths, row)
        k = cutlass.min(cute.size(mValues, mode=[1]), length)
        slice_ = self.rows.open(mScores[(row, None)], length, rank, tid)
        threshold = self.search.threshold(bins, slice_, length, k, rank, tid)
        self.rows.each(slice_, tid, Collect(sList, sSize, threshold, tid % WARP).visit)
        cute.arch.sync_threads()
        found = sSize[0]
        mine = cutlass.min(found, k)  # of a list no more than k entries can be among the k best
        if cutlass.const_expr(c.cluster > 1):
            self.ranks.announce(lists, mine, rank, tid)
        self.bitonic.sort(sList, found, k, tid)

        gValues, gIndices = mValues[(row, None)], mIndices[(row, None)]
        if cutlass.const_expr(c.cluster > 1):
            self.ranks.share(lists, sList, mine, rank, tid)
            part = tid % self.ranks.parts
            for first in cutlass.range(0, mine, self.ranks.entries):
                i = first + tid // self.ranks.parts
                entry = sList[cutlass.min(i, mine - 1)]
                place = self.ranks.place(lists, entry, part)
                if part == 0 and i < mine and place < k:
                    gValues[place] = slice_.gRow[index_of(entry)]
                    gIndices[place] = index_of(entry).to(gIndices.element_type)
        else:
            self.write(slice_.gRow, sList, k, tid, gValues, gIndices)
        if cutlass.const_expr(c.lengths is not None):
            self.pad(k + rank * c.threads + tid, gValues, gIndices)

    @cute.jit
    def length(self, mScores: cute.Tensor, mLengths: Any, row: Int32) -> Int32:
        """The number of entries of a row; what `mLengths` says, as far as there are so many."""
        length = Int32(cute.size(mScores, mode=[1]))
        if cutlass.const_expr(mLengths is not None):
            given = mLengths[row]
            if given < length:
                length = cutlass.max(Int32(given), 0)
            if given < 0:
                length = Int32(0)
        return length

    @cute.jit
    def pad(self, first: Int32, gValues: cute.Tensor, gIndices: cute.Tensor) -> None:
        """Write what stands where a row has fewer than k entries, from this thread's `first` on."""
        c = self.cfg
        for i in cutlass.range(first, cute.size(gValues), c.threads * c.cluster):
            gValues[i] = TYPES[c.dtype](-float("inf"))
            gIndices[i] = TYPES[c.index](-1)

    @cute.jit
    def write(
        self,
        gRow: cute.Tensor,
        sList: cute.Tensor,
        k: Int32,
        tid: Int32,
        gValues: cute.Tensor,
        gIndices: cute.Tensor,
    ) -> None:
        """Write the first k entries of a list to the same places of the result."""
        c = self.cfg
        rIndices = cute.make_rmem_tensor(READS, Int32)
        rValues = cute.make_rmem_tensor(READS, gRow.element_type)
        for first in cutlass.range(tid, k, READS * c.threads):
            for j in cutlass.range_constexpr(READS):
                # Past k the last one again: no branch is between the loads.
                rIndices[j] = index_of(sList[cutlass.min(first + j * c.threads, k - 1)])
                rValues[j] = gRow[rIndices[j]]
            for j in cutlass.range_constexpr(READS):
                place = first + j * c.threads
                if place < k:
                    gValues[place] = rValues[j]
                    gIndices[place] = rIndices[j].to(gIndices.element_type)


def trace(config: RadixConfig) -> tuple[RadixKernel, tuple[Any, ...]]:
    """The kernel of `config` and stand-ins for its arguments, for `cute.compile`."""
    c, rows, L, k = config, cute.sym_int32(), cute.sym_int32(), cute.sym_int32()
    scores, index = TYPES[c.dtype], TYPES[c.index]
    stride, align = cute.sym_int64(divisibility=c.width), c.width * ITEM_BYTES[c.dtype]
    lengths = TYPES[c.lengths] if c.lengths else None
    return RadixKernel(config), (
        make_fake_tensor(scores, (rows, L), (stride, 1), assumed_align=align),
        make_fake_tensor(lengths, (rows,), (1,)) if lengths else None,
        make_fake_tensor(scores, (rows, k), (cute.sym_int64(), 1)),
        make_fake_tensor(index, (rows, k), (cute.sym_int64(), 1)),
        make_fake_stream(use_tvm_ffi_env_stream=True),
    )

"""A sort of 64-bit integers in shared memory by one CTA, the greatest first.

A bitonic sort of mirrored merges: to merge two sorted halves, entry i of one meets entry i from the
end of the other, and the greater one always goes to the front. So what stands past the last entry
stays there, and n need be no power of two: steps that would reach past it do nothing.

    runs of up to 32 * items   each by one warp, in registers: strides within a lane, then shuffles
    longer runs                strides of at least 32 * items through shared memory by all threads,
                               two at a time; the shorter ones by warps again
"""

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Uint64

from cute_router.topk.config import WARP


class Bitonic:
    """The sort by `threads` threads, of which a warp takes blocks of 32 * items entries."""

    def __init__(self, threads: int, items: int):
        self.threads = threads
        self.items = items
        self.block = WARP * items

    @cute.jit
    def sort(self, sList: cute.Tensor, n: Int32, k: Int32, tid: Int32) -> None:
        """Put the greatest k of the first n entries of `sList` to its front, in order.

        Its size is a power of two and at least a block. All threads call, after a barrier behind
        the list's last change; it ends with one.
        """
        self.sort_blocks(sList, n, tid)
        half = Int32(self.block)
        while half < n:
            stride = half >> 1
            if half == self.block:
                self.exchange(sList, n, half, 2 * half - 1, tid)
            else:
                self.exchange_two(sList, n, half, True, tid)
                stride = half >> 2
            if half >= k and 2 * half >= n:
                n = half  # the last merge: of the back half nothing is wanted
            while stride > self.block:
                self.exchange_two(sList, n, stride, False, tid)
                stride = stride >> 2
            if stride == self.block:
                self.exchange(sList, n, stride, stride, tid)
            self.merge_blocks(sList, n, tid)
            half = half << 1

    @cute.jit
    def sort_blocks(self, sList: cute.Tensor, n: Int32, tid: Int32) -> None:
        """Sort each block; what is past the n-th entry becomes 0."""
        lane, sLanes = tid % WARP, cute.zipped_divide(sList, (self.items,))
        r = cute.make_rmem_tensor(self.items, Uint64)
        for b in cutlass.range(tid // WARP, cute.ceil_div(n, self.block), self.threads // WARP):
            at = b * WARP + lane
            r.store(sLanes[(None, at)].load())
            for e in cutlass.range_constexpr(self.items):
                r[e] = cutlass.select_(at * self.items + e < n, r[e], Uint64(0))
            for log in cutlass.range_constexpr(1, self.block.bit_length()):
                mirror_step(r, 1 << log, lane)
                for below in cutlass.range_constexpr(log - 2, -1, -1):
                    stride_step(r, 1 << below, lane)
            sLanes[(None, at)].store(r.load())
        cute.arch.sync_threads()

    @cute.jit
    def merge_blocks(self, sList: cute.Tensor, n: Int32, tid: Int32) -> None:
        """The steps of a merge whose strides are within a block."""
        lane, sLanes = tid % WARP, cute.zipped_divide(sList, (self.items,))
        r = cute.make_rmem_tensor(self.items, Uint64)
        for b in cutlass.range(tid // WARP, cute.ceil_div(n, self.block), self.threads // WARP):
            at = b * WARP + lane
            r.store(sLanes[(None, at)].load())
            for below in cutlass.range_constexpr(self.block.bit_length() - 2, -1, -1):
                stride_step(r, 1 << below, lane)
            sLanes[(None, at)].store(r.load())
        cute.arch.sync_threads()

    @cute.jit
    def exchange(self, sList: cute.Tensor, n: Int32, half: Int32, mask: Int32, tid: Int32) -> None:
        """Entry i of every first half meets i ^ mask, in the second."""
        pairs = ((n + 2 * half - 1) & (-2 * half)) >> 1
        for p in cutlass.range(tid, pairs, self.threads):
            i = ((p & -half) << 1) | (p & (half - 1))
            if (i ^ mask) < n:
                a, b = sList[i], sList[i ^ mask]
                if b > a:
                    sList[i] = b
                    sList[i ^ mask] = a
        cute.arch.sync_threads()

    @cute.jit
    def exchange_two(
        self, sList: cute.Tensor, n: Int32, half: Int32, mirrored: cutlass.Constexpr, tid: Int32
    ) -> None:
        """A step between halves of 2 * half entries, and the one between the halves of these."""
        quarter = half >> 1
        fours = ((n + 2 * half - 1) & (-2 * half)) >> 2
        r = cute.make_rmem_tensor(4, Uint64)
        for p in cutlass.range(tid, fours, self.threads):
            first = ((p & -quarter) << 2) | (p & (quarter - 1))
            third = first + half
            if cutlass.const_expr(mirrored):
                third = (first ^ (2 * half - 1)) - quarter
            places = [first, first + quarter, third, third + quarter]
            for i in cutlass.range_constexpr(4):
                r[i] = cutlass.select_(places[i] < n, sList[places[i]], Uint64(0))
            if cutlass.const_expr(mirrored):
                order(r, 0, 3)
                order(r, 1, 2)
            else:
                order(r, 0, 2)
                order(r, 1, 3)
            order(r, 0, 1)
            order(r, 2, 3)
            for i in cutlass.range_constexpr(4):
                if places[i] < n:
                    sList[places[i]] = r[i]
        cute.arch.sync_threads()


@cute.jit
def mirror_step(r: cute.Tensor, size: cutlass.Constexpr, lane: Int32) -> None:
    """Entry i of every `size` meets entry size - 1 - i; entries go lane by lane."""
    items = cute.size(r)
    if cutlass.const_expr(size <= items):
        for e in cutlass.range_constexpr(items):
            if cutlass.const_expr(e < e ^ (size - 1)):
                order(r, e, e ^ (size - 1))
    else:
        lanes = size // items
        others = [
            cute.arch.shuffle_sync_bfly(r[items - 1 - e], offset=lanes - 1) for e in range(items)
        ]
        keep(r, others, (lane & (lanes // 2)) == 0)


@cute.jit
def stride_step(r: cute.Tensor, stride: cutlass.Constexpr, lane: Int32) -> None:
    """Entry i of every 2 * stride meets entry i + stride."""
    items = cute.size(r)
    if cutlass.const_expr(stride < items):
        for e in cutlass.range_constexpr(items):
            if cutlass.const_expr(e & stride == 0):
                order(r, e, e | stride)
    else:
        lanes = stride // items
        others = [cute.arch.shuffle_sync_bfly(r[e], offset=lanes) for e in range(items)]
        keep(r, others, (lane & lanes) == 0)


@cute.jit
def order(r: cute.Tensor, i: cutlass.Constexpr, j: cutlass.Constexpr) -> None:
    """The greater of two entries of a lane to place i."""
    a, b = r[i], r[j]
    r[i] = cutlass.select_(a > b, a, b)
    r[j] = cutlass.select_(a > b, b, a)


@cute.jit
def keep(r: cute.Tensor, others, front: cutlass.Boolean) -> None:
    """Of each entry and the other lane's, the greater one in front, the lesser one behind."""
    for e in cutlass.range_constexpr(cute.size(r)):
        r[e] = cutlass.select_((r[e] > others[e]) == front, r[e], others[e])

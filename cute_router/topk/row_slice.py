"""A CTA's slice of a row, and the passes over it.

    row     | chunk | chunk | ... | chunk | rest |    chunks of `width` entries, one load each
            |  rank 0   |  rank 1   |  ...       |    adjacent chunks a CTA; the last has the rest

A pass visits every entry once: `unroll` chunks of each thread at a time, then the rest. A resident
slice is loaded once and stays in registers; any other is loaded again, from the L2 if it is there.
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from cute_router.topk.ptx import opaque
from cute_router.topk.radix_config import RadixConfig


class Slice(NamedTuple):
    """Where a CTA's entries are, and those that a thread keeps."""

    gRow: cute.Tensor  # (L)
    first: Int32  # chunk
    chunks: Int32
    rest: Int32  # this thread's entry of the rest, if it is below
    end: Int32  # of the row; 0 in CTAs that have no rest
    rChunks: cute.Tensor  # (width, unroll)


class Batch(NamedTuple):
    """Entries that a thread has in registers: (i, j) is the one at start + j * stride + i.

    Column j exists if start + j * stride < end.
    """

    rEntries: cute.Tensor  # (width, n)
    start: Int32
    end: Int32
    stride: int


class RowSlice:
    """Slices of rows as one configuration cuts them."""

    def __init__(self, config: RadixConfig):
        self.cfg = config
        self.step = config.threads * config.unroll  # chunks that a CTA loads at a time

    @cute.jit
    def open(self, gRow: cute.Tensor, length: Int32, rank: Int32, tid: Int32) -> Slice:
        """The slice of CTA `rank`; its loads are under way if it is resident."""
        c = self.cfg
        chunks = length // c.width
        share = cute.ceil_div(chunks, c.cluster)
        first = cutlass.min(rank * share, chunks)
        rChunks = cute.make_rmem_tensor((c.width, c.unroll), gRow.element_type)
        s = Slice(
            gRow,
            first,
            cutlass.min(chunks - first, share),
            chunks * c.width + tid,
            cutlass.select_(rank == c.cluster - 1, length, Int32(0)),
            rChunks,
        )
        if cutlass.const_expr(c.resident):
            self.load(s, tid)
        return s

    @cute.jit
    def load(self, s: Slice, chunk: Int32) -> None:
        """Load every threads-th chunk of the slice from `chunk` on."""
        c = self.cfg
        gChunks = cute.zipped_divide(s.gRow, (c.width,))  # (width, chunks)
        for j in cutlass.range_constexpr(c.unroll):
            if chunk + j * c.threads < s.chunks:
                at = s.first + chunk + j * c.threads
                s.rChunks[(None, j)].store(gChunks[(None, at)].load())

    @cute.jit
    def each(self, s: Slice, tid: Int32, visit: cutlass.Constexpr) -> None:
        """One pass: `visit` gets all entries of the slice, a `Batch` at a time."""
        c = self.cfg
        end = (s.first + s.chunks) * c.width
        stride = c.threads * c.width
        if cutlass.const_expr(c.resident):
            # Else keys of all entries are computed once, before all passes, and spilled.
            rWords = cute.recast_tensor(s.rChunks, Int32)
            for i in cutlass.range_constexpr(cute.size(rWords)):
                rWords[i] = opaque(rWords[i])
            visit(Batch(s.rChunks, (s.first + tid) * c.width, end, stride))
        else:
            for step in cutlass.range(cute.ceil_div(s.chunks, self.step)):
                chunk = step * self.step + tid
                self.load(s, chunk)
                visit(Batch(s.rChunks, (s.first + chunk) * c.width, end, stride))
        if cutlass.const_expr(c.width > 1):
            rRest = cute.make_rmem_tensor((1, 1), s.gRow.element_type)
            if s.rest < s.end:
                rRest[0] = s.gRow[s.rest]
            visit(Batch(rRest, s.rest, s.end, 1))

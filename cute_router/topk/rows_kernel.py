"""topk of short rows: the k best entries of each row of scores, a few lanes of a warp to a row.

    scores -> registers -> `Sieve.pick` -> the chosen entries' own bits, and their indices

The grid is rows / (warps * rows of a warp). A row left in doubt is chosen again by its whole warp,
in rounds over whole keys, NaN first: each round takes all entries that have the best key.
"""

from typing import Any

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint32
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor
from cutlass.memory import SmemAllocator

from cute_router.topk.config import BLOCK, WARP, RowsConfig, dsl_type
from cute_router.topk.key import REMOVED, key
from cute_router.topk.sieve import Sieve


class RowsKernel:
    """One configuration of the kernel, ready for `cute.compile`."""

    def __init__(self, config: RowsConfig):
        self.cfg = config
        ragged = config.lengths is not None
        self.lay = Sieve(config.length, config.top_k, config.lanes, config.run, ragged)
        self.rows = WARP // config.lanes  # of a warp

    @cute.jit
    def __call__(
        self,
        mScores: cute.Tensor,  # (R, L)
        mLengths: cute.Tensor | None,  # (R)
        mValues: cute.Tensor,  # (R, k)
        mIndices: cute.Tensor,  # (R, k)
        stream: cuda.CUstream,
    ):
        """Launch; traced into the kernel's host code."""
        warps = self.cfg.warps
        self.kernel.set_name_prefix("cute_router_topk_rows", remove_cutlass_symbol=True)
        self.kernel(mScores, mLengths, mValues, mIndices).launch(
            grid=[cute.ceil_div(cute.size(mValues, mode=[0]), warps * self.rows), 1, 1],
            block=[WARP * warps, 1, 1],
            stream=stream,
            use_pdl=self.cfg.overlaps,
            min_blocks_per_mp=1,
        )

    @cute.kernel
    def kernel(
        self,
        mScores: cute.Tensor,
        mLengths: cute.Tensor | None,
        mValues: cute.Tensor,
        mIndices: cute.Tensor,
    ):
        """A few rows to a warp."""
        c, lay = self.cfg, self.lay
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        lane = cute.arch.lane_idx() % c.lanes
        first = (cute.arch.block_idx()[0] * c.warps + warp) * self.rows
        row = first + cute.arch.lane_idx() // c.lanes
        last = cute.size(mValues, mode=[0]) - 1
        layout = cute.make_layout((lay.capacity, self.rows, c.warps))
        sLists = SmemAllocator().allocate_tensor(Int32, layout, 16)[None, None, warp]
        if cutlass.const_expr(c.overlaps):
            cute.arch.griddepcontrol_launch_dependents()
            cute.arch.griddepcontrol_wait()

        source = cutlass.min(row, last)  # lanes without a row take the last, and do not store it
        gRow = mScores[source, None]
        rScores = self.load(gRow, self.length_of(mLengths, source), lane)
        choice = lay.pick(
            rScores, lambda index: gRow[index].to(Float32), sLists[None, row - first], lane
        )
        for slot in cutlass.range_constexpr(lay.slots):
            place = lane + slot * c.lanes
            if row <= last and place < c.top_k:
                mValues[row, place] = gRow[choice.indices[slot]]
                mIndices[row, place] = mIndices.element_type(choice.indices[slot])
        doubts = cute.arch.vote_ballot_sync(choice.doubtful and row <= last)
        if doubts != 0:
            cute.arch.sync_warp()  # what was stored of these rows goes first
            for i in cutlass.range(self.rows):
                if (doubts >> Uint32(i * c.lanes)) & Uint32(2**c.lanes - 1) != 0:
                    n = self.length_of(mLengths, first + i)
                    self.choose_again(
                        mScores[first + i, None],
                        n,
                        mValues[first + i, None],
                        mIndices[first + i, None],
                    )

    @cute.jit
    def length_of(self, mLengths: Any, row: Int32) -> Int32:
        """The entries of a row."""
        n = Int32(self.cfg.length)
        if cutlass.const_expr(mLengths is not None):
            n = Int32(cutlass.max(cutlass.min(Int64(mLengths[row]), Int64(n)), Int64(0)))
        return n

    @cute.jit
    def load(self, gRow: cute.Tensor, n: Int32, lane: Int32) -> cute.Tensor:
        """This lane's entries of a row, all on their way at once; -inf for those past the n-th."""
        c, lay = self.cfg, self.lay
        rRaw = cute.make_rmem_tensor(lay.entries, gRow.element_type)
        for part in cutlass.range_constexpr(lay.entries // lay.run):
            first = lay.first(0, part, lane)
            if cutlass.const_expr(c.vector):
                if cutlass.const_expr(not lay.whole(part * lay.run // BLOCK)):
                    first = cutlass.min(first, c.length - lay.run)
                run = cute.make_layout(lay.run)
                gRun = cute.make_tensor(gRow.iterator + cute.assume(first, divby=lay.run), run)
                cute.make_tensor(rRaw.iterator + part * lay.run, run).store(gRun.load())
            else:
                for i in cutlass.range_constexpr(lay.run):
                    rRaw[part * lay.run + i] = gRow[cutlass.min(first + i, c.length - 1)]
        rScores = cute.make_rmem_tensor(lay.entries, Float32)
        for e in cutlass.range_constexpr(lay.entries):
            x = rRaw[e].to(Float32)
            if cutlass.const_expr(c.lengths is not None or not lay.whole(e // BLOCK)):
                x = cutlass.select_(lane * lay.run + lay.offset(0, e) < n, x, -Float32.inf)
            rScores[e] = x
        return rScores

    @cute.jit
    def choose_again(
        self, gRow: cute.Tensor, n: Int32, gValues: cute.Tensor, gIndices: cute.Tensor
    ) -> None:
        """Choose a row by its whole keys. One warp calls."""
        k, lane = self.cfg.top_k, cute.arch.lane_idx()
        ahead = (Uint32(1) << Uint32(lane)) - Uint32(1)  # the lanes before this one
        rKeys = cute.make_rmem_tensor((self.cfg.length + WARP - 1) // WARP, Uint32)
        for i in cutlass.range_constexpr(cute.size(rKeys)):
            index = lane + i * WARP
            rKeys[i] = Uint32(REMOVED)
            if index < n:
                rKeys[i] = key(gRow[index].to(Float32), "first")
        taken = Int32(0)
        while taken < cutlass.min(n, k):
            best = rKeys[0]
            for i in cutlass.range_constexpr(1, cute.size(rKeys)):
                best = cutlass.max(best, rKeys[i])
            best = cute.arch.warp_redux_sync(best, kind="umax")
            for i in cutlass.range_constexpr(cute.size(rKeys)):
                alike = rKeys[i] == best
                lanes = cute.arch.vote_ballot_sync(alike)
                place = taken + Int32(cute.arch.popc(lanes & ahead))
                if alike and place < k:
                    gValues[place] = gRow[lane + i * WARP]
                    gIndices[place] = gIndices.element_type(lane + i * WARP)
                rKeys[i] = cutlass.select_(alike, Uint32(REMOVED), rKeys[i])
                taken = taken + Int32(cute.arch.popc(lanes))
        if n <= lane and lane < k:
            gValues[lane] = gValues.element_type(-float("inf"))
            gIndices[lane] = gIndices.element_type(-1)


def trace(config: RowsConfig) -> tuple[RowsKernel, tuple[Any, ...]]:
    """The kernel of `config` and stand-ins for its arguments, for `cute.compile`."""
    dtype, index = dsl_type(config.dtype), dsl_type(config.index)
    R, k = cute.sym_int32(), config.top_k
    stride = cute.sym_int64(divisibility=config.run if config.vector else 1)
    align = 16 if config.vector else dtype.width // 8
    lengths = None
    if config.lengths is not None:
        lengths = make_fake_tensor(dsl_type(config.lengths), (R,), (1,), assumed_align=4)
    return RowsKernel(config), (
        make_fake_tensor(dtype, (R, config.length), (stride, 1), assumed_align=align),
        lengths,
        make_fake_tensor(dtype, (R, k), (k, 1), assumed_align=dtype.width // 8),
        make_fake_tensor(index, (R, k), (k, 1), assumed_align=index.width // 8),
        make_fake_stream(use_tvm_ffi_env_stream=True),
    )

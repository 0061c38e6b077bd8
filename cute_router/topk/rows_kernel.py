"""topk of short rows: the k best entries of each row of scores, a few lanes of a warp to a row.

    scores -> shared memory -> keys, NaN first -> `Lanes.pick` -> the chosen entries' own bits

The grid is rows / (warps * rows of a warp). A row whose words leave the choice in doubt is chosen
again by its whole warp, in rounds over whole keys.
"""

from typing import Any

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Int64, Uint32
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor
from cutlass.memory import SmemAllocator

from cute_router.topk.config import WARP, RowsConfig, dsl_type
from cute_router.topk.key import REMOVED, key
from cute_router.topk.lanes import Lanes
from cute_router.topk.rounds import take_best
from cute_router.topk.staging import arrived, read, stage


class RowsKernel:
    """One configuration of the kernel, ready for `cute.compile`."""

    def __init__(self, config: RowsConfig):
        self.cfg = config
        exact = config.dtype != "float32"
        self.lay = Lanes(config.length, config.top_k, config.lanes, config.run, exact)
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
        layout = cute.make_layout((lay.room, self.rows, c.warps))
        sRows = SmemAllocator().allocate_tensor(mScores.element_type, layout, 16)[None, None, warp]
        sRow = sRows[None, row - first]
        if cutlass.const_expr(c.overlaps):
            cute.arch.griddepcontrol_launch_dependents()
            cute.arch.griddepcontrol_wait()

        source = cutlass.min(row, last)  # lanes without a row take the last, and do not store it
        stage(mScores[source, None], sRow, lay, lane, c.vector)
        n = self.length_of(mLengths, source)

        def keys(block):
            arrived(block, lay, c.vector)
            return self.keys(read(sRow, lay, block, lane), n, block, lane)

        pick = lay.pick(keys, lane)
        cute.arch.sync_warp()  # the entries of all lanes are staged
        settled = row <= last and not pick.doubtful
        self.store(pick.words, sRow, mValues, mIndices, row, lane, settled)
        if cutlass.const_expr(not lay.exact):
            doubts = cute.arch.vote_ballot_sync(pick.doubtful and row <= last and lane == 0)
            while doubts != 0:
                i = cute.arch.popc((doubts & -doubts) - 1) // c.lanes
                n = self.length_of(mLengths, first + i)
                self.choose_again(sRows[None, i], n, mValues, mIndices, first + i)
                doubts = doubts & (doubts - 1)

    @cute.jit
    def length_of(self, mLengths: Any, row: Int32) -> Int32:
        """The entries of a row."""
        n = Int32(self.cfg.length)
        if cutlass.const_expr(mLengths is not None):
            n = Int32(cutlass.max(cutlass.min(Int64(mLengths[row]), Int64(n)), Int64(0)))
        return n

    def keys(self, rScores: cute.Tensor, n: Int32, block: int, lane: Int32) -> list[Uint32]:
        """The keys of a lane's block; of entries that the row does not have, REMOVED."""
        words = [key(rScores[i].to(Float32), "first") for i in range(cute.size(rScores))]
        if self.lay.whole(block) and self.cfg.lengths is None:
            return words
        base = lane * self.lay.run
        return [
            cutlass.select_(base + self.lay.offset(block, i) < n, word, Uint32(REMOVED))
            for i, word in enumerate(words)
        ]

    @cute.jit
    def store(
        self,
        words: list[Uint32],
        sRow: cute.Tensor,
        mValues: cute.Tensor,
        mIndices: cute.Tensor,
        row: Int32,
        lane: Int32,
        settled: Boolean,
    ) -> None:
        """Write the chosen scores, with all their bits, and their indices."""
        c, lay = self.cfg, self.lay
        rKeys = cute.make_rmem_tensor(lay.slots, Uint32)
        rPlaces = cute.make_rmem_tensor(lay.slots, Int32)
        rIndices = cute.make_rmem_tensor(lay.slots, Int32)
        rValues = cute.make_rmem_tensor(lay.slots, mValues.element_type)
        for slot in cutlass.range_constexpr(lay.slots):
            word = lay.mine(words, slot, lane)
            real = word > Uint32(lay.low)
            rIndices[slot] = cutlass.select_(real, lay.index(word), Int32(0))
            rValues[slot] = sRow[rIndices[slot]]
            whole = key(rValues[slot].to(Float32), "first")
            rKeys[slot] = cutlass.select_(real, whole, Uint32(REMOVED))
        lay.places(words, rKeys, lane, rPlaces)
        for slot in cutlass.range_constexpr(lay.slots):
            if settled and lane + slot * c.lanes < c.top_k:
                real = rKeys[slot] != Uint32(REMOVED)
                missing = mValues.element_type(-float("inf"))
                mValues[row, rPlaces[slot]] = rValues[slot] if real else missing
                index = cutlass.select_(real, rIndices[slot], Int32(-1))
                mIndices[row, rPlaces[slot]] = mIndices.element_type(index)

    @cute.jit
    def choose_again(
        self, sRow: cute.Tensor, n: Int32, mValues: cute.Tensor, mIndices: cute.Tensor, row: Int32
    ) -> None:
        """Choose a row by its whole keys. One warp calls; the row has k entries or more."""
        c, lane = self.cfg, cute.arch.lane_idx()
        rKeys = cute.make_rmem_tensor((c.length + WARP - 1) // WARP, Uint32)
        for i in cutlass.range_constexpr(cute.size(rKeys)):
            entry = lane + i * WARP
            rKeys[i] = Uint32(REMOVED)
            if entry < n:
                rKeys[i] = key(sRow[entry].to(Float32), "first")
        mine = Int32(0)
        for place in cutlass.range(c.top_k):
            mine = cutlass.select_(lane == place, take_best(rKeys, lane), mine)
        if lane < c.top_k:
            mValues[row, lane] = sRow[mine]
            mIndices[row, lane] = mIndices.element_type(mine)


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

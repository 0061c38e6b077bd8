"""topk of short rows: the k best entries of each row of scores, a few lanes of a warp to a row.

    scores -> keys, NaN first -> `Lanes.pick` -> the chosen entries' own bits, read again -> out

The grid is rows / (warps * rows of a warp). A row whose words leave the choice in doubt is chosen
again by its whole warp, in k rounds over whole keys.
"""

from typing import Any

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, Uint32
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from cute_router.topk.block import BLOCK, read_block
from cute_router.topk.config import RowsConfig, dsl_type
from cute_router.topk.key import REMOVED, key
from cute_router.topk.lanes import Lanes
from cute_router.topk.rounds import WARP, take_best


class RowsKernel:
    """One configuration of the kernel, ready for `cute.compile`."""

    def __init__(self, config: RowsConfig):
        self.cfg = config
        exact = config.dtype != "float32"
        self.lay = Lanes(config.length, config.top_k, config.lanes, exact)
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
            use_pdl=self.cfg.pdl,
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
        c = self.cfg
        if cutlass.const_expr(c.pdl):
            cute.arch.griddepcontrol_launch_dependents()
            cute.arch.griddepcontrol_wait()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        lane = cute.arch.lane_idx() % c.lanes
        first = (cute.arch.block_idx()[0] * c.warps + warp) * self.rows
        row = first + cute.arch.lane_idx() // c.lanes
        last = cute.size(mValues, mode=[0]) - 1
        gRow = mScores[(cutlass.min(row, last), None)]  # lanes without a row do a copy of the last
        n = self.length_of(mLengths, cutlass.min(row, last))

        def fetch(block):
            return read_block(gRow, self.lay.first(block, lane), self.whole(block), c.vector)

        def keys(read, block):
            return self.keys(read, self.lay.first(block, lane), n, block)

        pick = self.lay.pick(fetch, keys, lane)
        self.store(pick.words, pick.doubtful, gRow, mValues, mIndices, row, lane, row <= last)
        if cutlass.const_expr(not self.lay.exact):
            doubts = cute.arch.vote_ballot_sync(pick.doubtful and row <= last and lane == 0)
            while doubts != 0:
                again = first + cute.arch.popc((doubts & -doubts) - 1) // c.lanes
                self.choose_again(mScores, mLengths, mValues, mIndices, again)
                doubts = doubts & (doubts - 1)

    @cute.jit
    def length_of(self, mLengths: cute.Tensor | None, row: Int32) -> Int32:
        """The entries of a row."""
        n = Int32(self.cfg.length)
        if cutlass.const_expr(mLengths is not None):
            given = cutlass.max(cutlass.min(Int64(mLengths[row]), Int64(n)), Int64(0))
            n = Int32(given)
        return n

    def whole(self, block: int) -> bool:
        """Whether no lane's block ends past the row."""
        return (block + 1) * self.cfg.lanes * BLOCK <= self.cfg.length

    def keys(self, rScores: cute.Tensor, first: Int32, n: Int32, block: int) -> list:
        """The keys of 8 scores; of entries that the row does not have, REMOVED."""
        keys = [key(rScores[i].to(cutlass.Float32), "first") for i in range(BLOCK)]
        if self.whole(block) and self.cfg.lengths is None:
            return keys
        return [
            cutlass.select_(first + i < n, word, Uint32(REMOVED)) for i, word in enumerate(keys)
        ]

    @cute.jit
    def store(
        self,
        words: list,
        doubtful: cutlass.Boolean,
        gRow: cute.Tensor,
        mValues: cute.Tensor,
        mIndices: cute.Tensor,
        row: Int32,
        lane: Int32,
        live: cutlass.Boolean,
    ) -> None:
        """Read the chosen scores again, for all their bits, and write them and their indices."""
        c, lay = self.cfg, self.lay
        rKeys = cute.make_rmem_tensor(lay.slots, Uint32)
        rPlaces = cute.make_rmem_tensor(lay.slots, Int32)
        rIndices = cute.make_rmem_tensor(lay.slots, Int32)
        rValues = cute.make_rmem_tensor(lay.slots, mValues.element_type)
        for slot in cutlass.range_constexpr(lay.slots):
            word = lay.mine(words, slot, lane)
            real = word > Uint32(lay.low)
            rIndices[slot] = cutlass.select_(real, lay.index(word), Int32(0))
            rValues[slot] = gRow[rIndices[slot]]
            whole = key(rValues[slot].to(cutlass.Float32), "first")
            rKeys[slot] = cutlass.select_(real, whole, Uint32(REMOVED))
        lay.places(words, rKeys, lane, rPlaces)
        for slot in cutlass.range_constexpr(lay.slots):
            if live and not doubtful and lane + slot * c.lanes < c.top_k:
                real = rKeys[slot] != Uint32(REMOVED)
                missing = mValues.element_type(-float("inf"))
                mValues[row, rPlaces[slot]] = rValues[slot] if real else missing
                index = cutlass.select_(real, rIndices[slot], Int32(-1))
                mIndices[row, rPlaces[slot]] = mIndices.element_type(index)

    @cute.jit
    def choose_again(
        self,
        mScores: cute.Tensor,
        mLengths: cute.Tensor | None,
        mValues: cute.Tensor,
        mIndices: cute.Tensor,
        row: Int32,
    ) -> None:
        """Choose a row by its whole keys. One warp calls; the row has k entries or more."""
        c, lane = self.cfg, cute.arch.lane_idx()
        n = self.length_of(mLengths, row)
        rKeys = cute.make_rmem_tensor((c.length + WARP - 1) // WARP, Uint32)
        for i in cutlass.range_constexpr(cute.size(rKeys)):
            entry = lane + i * WARP
            rKeys[i] = Uint32(REMOVED)
            if entry < n:
                rKeys[i] = key(mScores[row, entry].to(cutlass.Float32), "first")
        mine = Int32(0)
        for place in cutlass.range(c.top_k):
            mine = cutlass.select_(lane == place, take_best(rKeys, lane), mine)
        if lane < c.top_k:
            mValues[row, lane] = mScores[row, mine]
            mIndices[row, lane] = mIndices.element_type(mine)


def trace(config: RowsConfig) -> tuple[RowsKernel, tuple[Any, ...]]:
    """The kernel of `config` and stand-ins for its arguments, for `cute.compile`."""
    dtype, index = dsl_type(config.dtype), dsl_type(config.index)
    R, k = cute.sym_int32(), config.top_k
    unit = 16 * 8 // dtype.width if config.vector else 1
    stride = cute.sym_int64(divisibility=unit)
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

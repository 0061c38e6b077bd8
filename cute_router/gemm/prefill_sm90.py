"""The product of prefill on Hopper: WGMMA, accumulators in the registers of its warpgroups.

    L[n, e] += sum_k x[n, k] W[e, k]        tokens -> MMA-M (64 a warpgroup), experts -> MMA-N

Both operands come from shared memory (`gemm.wgmma`).
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32
from cutlass.cute.nvgpu import warpgroup

from cute_router.gemm.config import TILE_K
from cute_router.gemm.prefill_config import WARPGROUP, PrefillConfig
from cute_router.gemm.prefill_mainloop import Pieces, PrefillMainloop, Shared, Sink, Start, Tiles
from cute_router.gemm.prefill_sums import SplitSums, WholeSums
from cute_router.gemm.wgmma import WgmmaOperands
from cute_router.topk.ptx import opaque


class Place(NamedTuple):
    """Where the ring of stages is."""

    stage: Int32
    phase: Int32  # of the stage's barrier `full`


def trade(low: list[Float32], high: list[Float32], odd: Boolean) -> list[Float32]:
    """Of a lane and its neighbour: an even one gets the low pairs of both, an odd one the high."""
    kept = [Float32(cutlass.select_(odd, b, a)) for a, b in zip(low, high, strict=True)]
    sent = [Float32(cutlass.select_(odd, a, b)) for a, b in zip(low, high, strict=True)]
    got = [cute.arch.shuffle_sync_bfly(value, offset=1) for value in sent]
    front = [cutlass.select_(odd, b, a) for a, b in zip(kept, got, strict=True)]
    back = [cutlass.select_(odd, a, b) for a, b in zip(kept, got, strict=True)]
    return [Float32(value) for value in front + back]


class PrefillSm90(WgmmaOperands, PrefillMainloop):
    """WGMMA, issued by the epilogue's own warps."""

    rows, pieces = 2, 1

    def __init__(self, config: PrefillConfig):
        super().__init__(config)
        self.vector = config.run
        self.tile = (config.tile_tokens, config.tile_experts, TILE_K)
        self.sums = SplitSums() if config.splits_sums else WholeSums()

    def partition(self, atoms, sX: cute.Tensor, sW: cute.Tensor, tiles: Tiles):
        """The tiles as TMA sees them."""
        return self.seen_by_tma(atoms, sX, sW, None, tiles.e_part)

    def enter(self, s: Shared) -> None:
        """Nothing: accumulators are registers."""

    def accumulate(self, s: Shared, tid: Int32, tiles: Tiles, turn: Int32, sink: Sink) -> None:
        """Multiply; all of the thread's sums at once."""
        rSum = self.multiply(s, tid, turn)
        # Known before the product, places would take registers all through it.
        thr = self.tiled_mma().get_slice(opaque(tid))
        coords = thr.partition_C(cute.make_identity_tensor(self.tile[:2]))
        if self.vector == 2:
            at = [coords[i] for i in range(0, cute.size(rSum), 2)]
        else:
            rSum, at = self.pair(rSum, coords)
        sink.open(s, turn)
        sink.send(s, tiles, turn, Pieces(1, lambda _: (rSum, at)))

    def pair(self, rSum: cute.Tensor, coords: cute.Tensor) -> tuple[cute.Tensor, list[Start]]:
        """Runs of 4 experts, by a trade with the neighbouring lane, and where they start.

        A store of a warp then has 64 bytes of each of its rows, not 32: to peers it takes two
        thirds of the time. Of 16 experts lane 0 of a row has 0..3, 2 has 4..7, 1 8..11, 3 12..15.
        """
        rRuns = cute.make_rmem_tensor(cute.size(rSum), Float32)  # accumulators stay as they are
        odd = (cute.arch.lane_idx() & 1) != 0
        column = coords[0][1]  # 0, 2, 4 or 6
        first = cutlass.select_(odd, column + 6, column)
        at = []
        for start in range(0, cute.size(rSum), 8):
            low, high = ([rSum[start + 4 * g + j] for j in range(4)] for g in range(2))
            for row in range(2):
                pair = slice(2 * row, 2 * row + 2)
                for j, value in enumerate(trade(low[pair], high[pair], odd)):
                    rRuns[start + 4 * row + j] = value
                at.append((coords[2 * row][0], first + start // 4 * 8))
        return rRuns, at

    @cute.jit
    def multiply(self, s: Shared, tid: Int32, turn: Int32) -> cute.Tensor:
        """The product of a tile: a chain of WGMMAs, or several (`gemm.prefill_sums`)."""
        c = self.cfg
        mma = self.tiled_mma()
        # The operands are those of a whole warpgroup: their descriptors stay in uniform registers.
        thr = mma.get_slice(cute.arch.make_warp_uniform(tid // WARPGROUP) * WARPGROUP)
        tCrX = mma.make_fragment_A(thr.partition_A(s.sX))  # (MMA, MMA_M, MMA_K, STAGE)
        tCrW = mma.make_fragment_B(thr.partition_B(s.sW))  # (MMA, MMA_N, MMA_K, STAGE)
        rAcc = cute.make_rmem_tensor(thr.partition_shape_C(self.tile[:2]), Float32)
        rAcc.fill(0.0)  # never read, but dead before: the choice of experts needs the registers
        at = self.ring(turn * c.k_blocks)
        if cutlass.const_expr(c.chain == c.k_blocks):
            zero, whole = Int32(0), Int32(c.k_blocks)
            self.multiply_chain(s, rAcc, tCrX, tCrW, zero, whole, zero, at)
            return rAcc
        rSums = self.sums.begin(rAcc)
        start = Int32(0)
        while start < c.k_blocks:
            end = cutlass.min(start + c.chain, c.k_blocks)
            zero_at = self.sums.zero_at(start)
            at = self.multiply_chain(s, rAcc, tCrX, tCrW, start, end, zero_at, at)
            self.sums.add(rAcc, rSums, end == c.k_blocks)
            start = end
        return self.sums.total(rAcc, rSums)

    @cute.jit
    def multiply_chain(self, s: Shared, rAcc, tCrX, tCrW, start, end, zero_at, at: Place) -> Place:
        """Add the products of the K blocks `start` to `end` of a tile; where the ring is then.

        Block `zero_at` starts from 0, any other one adds to what the accumulators hold. That is
        known at run time only: MMAs of constant zeros would be waited for one by one.

        A stage is free again when the block behind it is under way. Little may stand between two
        blocks: the tensor cores have work queued for a few WGMMAs only.
        """
        last = at
        for block in cutlass.range(start, end):
            cute.arch.mbarrier_wait(s.full + at.stage, at.phase)
            warpgroup.fence()
            mma = self.tiled_mma()
            for k in cutlass.range_constexpr(cute.size(tCrX, mode=[2])):
                mma.set(warpgroup.Field.ACCUMULATE, True if k > 0 else block > zero_at)
                tCrX_k, tCrW_k = tCrX[None, None, k, at.stage], tCrW[None, None, k, at.stage]
                cute.gemm(mma, rAcc, tCrX_k, tCrW_k, rAcc)
            warpgroup.commit_group()
            warpgroup.wait_group(1)
            if block > start:
                self.release(s, last.stage, block - 1)
            last = at
            at = self.step(at)
        warpgroup.wait_group(0)
        self.settle(rAcc)
        self.release(s, last.stage, end - 1)
        return at

    def settle(self, rAcc: cute.Tensor) -> None:
        """Keep what reads the accumulators behind the wait for them."""
        for i in range(cute.size(rAcc)):
            rAcc[i] = opaque(rAcc[i].bitcast(Int32)).bitcast(Float32)

    def ring(self, block: Int32) -> Place:
        """Where the ring is at a block, counted over all tiles."""
        return Place(block % self.cfg.stages, block // self.cfg.stages % 2)

    def step(self, at: Place) -> Place:
        """Where it is at the next block."""
        wraps = at.stage == self.cfg.stages - 1
        return Place(
            cutlass.select_(wraps, Int32(0), at.stage + 1),
            cutlass.select_(wraps, at.phase ^ 1, at.phase),
        )

    @cute.jit
    def release(self, s: Shared, stage: Int32, block: Int32) -> None:
        """Free the stage of a tile's block that has been read, unless it is held."""
        c = self.cfg
        if cutlass.const_expr(c.held == 0) or block < c.k_blocks - c.held:
            self.free(s, stage)

    @cute.jit
    def free_held(self, s: Shared, turn: Int32) -> None:
        """Free the stages that are held."""
        for i in cutlass.range_constexpr(self.cfg.held):
            self.free(s, self.ring((turn + 1) * self.cfg.k_blocks - 1 - i).stage)
        if cutlass.const_expr(self.cfg.held):
            cute.arch.sync_warp()  # what follows takes whole warps

    @cute.jit
    def free(self, s: Shared, stage: Int32) -> None:
        """Tell the loads that a stage is free."""
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive(s.free + stage)

    def leave(self) -> None:
        """Nothing."""

    def issue(self, s: Shared, tiles: Tiles, warp: int) -> None:
        """Nothing: there is no such warp."""

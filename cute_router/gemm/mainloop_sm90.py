"""The product on Hopper: WGMMA, accumulators in the registers of the epilogue's warpgroups.

    L[e, n] += sum_k W[e, k] x[n, k]        experts -> MMA-M (64 a warpgroup), tokens -> MMA-N

Both operands come from shared memory (`gemm.wgmma`).
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32
from cutlass.cute.nvgpu import warpgroup

from cute_router.gemm.config import TILE_K, DecodeConfig
from cute_router.gemm.mainloop import Mainloop, Shared
from cute_router.gemm.wgmma import WgmmaOperands


class MainloopSm90(WgmmaOperands, Mainloop):
    """WGMMA, issued by the epilogue's own warps."""

    vector = 2
    mma_warp = False

    def __init__(self, config: DecodeConfig):
        super().__init__(config)
        self.tile = (config.tile_experts, config.tile_tokens, TILE_K)

    def partition(self, atoms, sW: cute.Tensor, sX: cute.Tensor, tile_e: Int32, tile_n: Int32):
        """The tiles as TMA sees them: shared (TMA, STAGE) and global (TMA, K_BLOCK)."""
        return self.seen_by_tma(atoms, sW, sX, tile_e, tile_n)

    @cute.jit
    def accumulate(self, s: Shared, tid: Int32):
        """The thread's sums over this CTA's K blocks, with their (expert, token) coordinates."""
        c = self.cfg
        mma = self.tiled_mma()
        thr = mma.get_slice(tid)
        tCrW = mma.make_fragment_A(thr.partition_A(s.sW))  # (MMA, MMA_M, MMA_K, STAGE)
        tCrX = mma.make_fragment_B(thr.partition_B(s.sX))  # (MMA, MMA_N, MMA_K, STAGE)
        rAcc = cute.make_rmem_tensor(thr.partition_shape_C(self.tile[:2]), Float32)
        mma.set(warpgroup.Field.ACCUMULATE, False)
        self.multiply_block(s, mma, rAcc, tCrW, tCrX, 0, first=True)
        if cutlass.const_expr(c.resident):
            for block in cutlass.range_constexpr(1, c.k_blocks):
                self.multiply_block(s, mma, rAcc, tCrW, tCrX, block)
        else:
            for block in cutlass.range(1, c.k_blocks):
                self.multiply_block(s, mma, rAcc, tCrW, tCrX, block)
                warpgroup.wait_group(1)  # the block before this one has been read
                with cute.arch.elect_one():
                    cute.arch.mbarrier_arrive(s.free + (block - 1) % c.stages)
        warpgroup.wait_group(0)
        return rAcc, thr.partition_C(cute.make_identity_tensor(self.tile[:2]))

    def multiply_block(self, s: Shared, mma, rAcc, tCrW, tCrX, block, first: bool = False) -> None:
        """The WGMMAs of one K block, once it is there."""
        stage = block % self.cfg.stages
        cute.arch.mbarrier_wait(s.full + stage, block // self.cfg.stages % 2)
        warpgroup.fence()
        for k in range(cute.size(tCrW, mode=[2])):
            tCrW_k, tCrX_k = tCrW[(None, None, k, stage)], tCrX[(None, None, k, stage)]
            cute.gemm(mma, rAcc, tCrW_k, tCrX_k, rAcc)
            if first:  # a run-time loop could not carry the change
                mma.set(warpgroup.Field.ACCUMULATE, True)
        warpgroup.commit_group()

    def issue(self, s: Shared, warp: int) -> None:
        """Nothing: there is no such warp."""

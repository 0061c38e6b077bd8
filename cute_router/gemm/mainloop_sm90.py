"""The product on Hopper: WGMMA, accumulators in the registers of the epilogue's warpgroups.

    L[e, n] += sum_k W[e, k] x[n, k]        experts -> MMA-M (64 a warpgroup), tokens -> MMA-N

Both operands come from shared memory, 128-byte swizzled, K innermost, as TMA left them.
"""

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as sm90
from cutlass import BFloat16, Float32, Int32
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup
from cutlass.tensor_utils import LayoutEnum

from cute_router.gemm.config import TILE_K
from cute_router.gemm.mainloop import Mainloop, Shared


class MainloopSm90(Mainloop):
    """WGMMA, issued by the epilogue's own warps."""

    vector = 2
    mma_warp = False

    def tiled_mma(self):
        """One WGMMA of 64 experts for each warpgroup."""
        c = self.cfg
        return sm90.make_trivial_tiled_mma(
            BFloat16,
            BFloat16,
            OperandMajorMode.K,
            OperandMajorMode.K,
            Float32,
            (c.tile_experts // 64, 1, 1),
            (64, c.tile_tokens),
        )

    def layouts(self):
        """Shared-memory layouts of the W tile and the x tile, (rows, TILE_K, STAGE)."""
        c = self.cfg
        tile = (c.tile_experts, c.tile_tokens, TILE_K)
        return (
            sm90.make_smem_layout_a(LayoutEnum.ROW_MAJOR, tile, BFloat16, c.stages),
            sm90.make_smem_layout_b(LayoutEnum.ROW_MAJOR, tile, BFloat16, c.stages),
        )

    def tma_atoms(self, mW: cute.Tensor, mX: cute.Tensor, layout_w, layout_x):
        """(atom, coordinate tensor) for W and for x."""
        c, op = self.cfg, cpasync.CopyBulkTensorTileG2SOp()
        stage_w, stage_x = (cute.select(layout, mode=[0, 1]) for layout in (layout_w, layout_x))
        return (
            cpasync.make_tiled_tma_atom(op, mW, stage_w, (c.tile_experts, TILE_K)),
            cpasync.make_tiled_tma_atom(op, mX, stage_x, (c.tile_tokens, TILE_K)),
        )

    def partition(self, atoms, sW: cute.Tensor, sX: cute.Tensor, tile_e: Int32, tile_n: Int32):
        """The tiles as TMA sees them: shared (TMA, STAGE) and global (TMA, K_BLOCK)."""
        c = self.cfg
        (atom_w, mW), (atom_x, mX) = atoms
        gW = cute.local_tile(mW, (c.tile_experts, TILE_K), (tile_e, None))  # (MT, KT, K_BLOCK)
        gX = cute.local_tile(mX, (c.tile_tokens, TILE_K), (tile_n, None))  # (NT, KT, K_BLOCK)
        return tuple(
            cpasync.tma_partition(
                atom, 0, cute.make_layout(1), cute.group_modes(s, 0, 2), cute.group_modes(g, 0, 2)
            )
            for atom, s, g in ((atom_w, sW, gW), (atom_x, sX, gX))
        )

    @cute.jit
    def accumulate(self, s: Shared, tid: Int32):
        """The thread's sums over this CTA's K blocks, with their (expert, token) coordinates."""
        c = self.cfg
        mma = self.tiled_mma()
        thr = mma.get_slice(tid)
        tCrW = mma.make_fragment_A(thr.partition_A(s.sW))  # (MMA, MMA_M, MMA_K, STAGE)
        tCrX = mma.make_fragment_B(thr.partition_B(s.sX))  # (MMA, MMA_N, MMA_K, STAGE)
        shape = (c.tile_experts, c.tile_tokens)
        rAcc = cute.make_rmem_tensor(thr.partition_shape_C(shape), Float32)
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
        return rAcc, thr.partition_C(cute.make_identity_tensor(shape))

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

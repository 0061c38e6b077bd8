"""The product on Blackwell: tcgen05, accumulators in tensor memory (TMEM).

    L[e, n] += sum_k W[e, k] x[n, k]        experts -> MMA-M (64 or 128), tokens -> MMA-N

One warp issues every MMA; the epilogue's four warps then read the accumulators, each its own lanes.
Operands, layouts and the TMA loads are those of the Hopper twin.
"""

import cutlass
import cutlass.cute as cute
import cutlass.utils.blackwell_helpers as sm100
from cutlass import BFloat16, Float32, Int32
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, tcgen05

from cute_router.gemm.config import TILE_K, DecodeConfig


class MainloopSm100:
    """The seam on sm_100: layouts, TMA atoms and partitions, and the accumulators at the end."""

    mma_warp = True  # a warp of its own issues the MMAs

    def __init__(self, config: DecodeConfig):
        self.cfg = config
        self.tile = (config.tile_experts, config.tile_tokens, TILE_K)
        # Token columns that lie side by side in a thread's registers once they leave TMEM.
        self.vector = 4 if config.tile_experts == 128 else 2

    def tiled_mma(self):
        """One CTA's MMA of the whole tile."""
        return sm100.make_trivial_tiled_mma(
            BFloat16,
            BFloat16,
            OperandMajorMode.K,
            OperandMajorMode.K,
            Float32,
            tcgen05.CtaGroup.ONE,
            self.tile[:2],
        )

    def layouts(self):
        """Shared-memory layouts of the W tile and the x tile, (MMA, MMA_MN, MMA_K, STAGE)."""
        mma, stages = self.tiled_mma(), self.cfg.stages
        return (
            sm100.make_smem_layout_a(mma, self.tile, BFloat16, stages),
            sm100.make_smem_layout_b(mma, self.tile, BFloat16, stages),
        )

    def tma_atoms(self, mW: cute.Tensor, mX: cute.Tensor, layout_w, layout_x):
        """(atom, coordinate tensor) for W and for x."""
        mma, op = self.tiled_mma(), cpasync.CopyBulkTensorTileG2SOp(tcgen05.CtaGroup.ONE)
        stage_w, stage_x = (cute.select(layout, mode=[0, 1, 2]) for layout in (layout_w, layout_x))
        cluster = (1, 1, 1, 1)
        return (
            cute.nvgpu.make_tiled_tma_atom_A(op, mW, stage_w, self.tile, mma, cluster),
            cute.nvgpu.make_tiled_tma_atom_B(op, mX, stage_x, self.tile, mma, cluster),
        )

    def partition(self, atoms, sW: cute.Tensor, sX: cute.Tensor, tile_e: Int32, tile_n: Int32):
        """The tiles as TMA sees them: shared (TMA, STAGE) and global (TMA, K_BLOCK)."""
        (atom_w, mW), (atom_x, mX) = atoms
        thr, coord = self.tiled_mma().get_slice(0), (tile_e, tile_n, None)
        gW = cute.local_tile(mW, self.tile, coord, proj=(1, None, 1))  # (MT, KT, K_BLOCK)
        gX = cute.local_tile(mX, self.tile, coord, proj=(None, 1, 1))  # (NT, KT, K_BLOCK)
        pairs = ((atom_w, sW, thr.partition_A(gW)), (atom_x, sX, thr.partition_B(gX)))
        return tuple(
            cpasync.tma_partition(
                atom, 0, cute.make_layout(1), cute.group_modes(s, 0, 3), cute.group_modes(g, 0, 3)
            )
            for atom, s, g in pairs
        )

    @property
    def tmem_columns(self) -> int:
        """TMEM columns of the accumulators; allocations are powers of two from 32."""
        return max(32, self.cfg.tile_tokens)

    def accumulators(self, tmem: cute.Pointer) -> cute.Tensor:
        """The accumulators in TMEM, (MMA, MMA_M, MMA_N)."""
        mma = self.tiled_mma()
        fragment = mma.make_fragment_C(mma.partition_shape_C(self.tile[:2]))
        return cute.make_tensor(tmem, fragment.layout)

    @cute.jit
    def multiply(
        self, tmem: cute.Pointer, sW: cute.Tensor, sX: cute.Tensor, full, free, done
    ) -> None:
        """Issue the MMAs of this CTA's K blocks; `done` completes with the last. One warp calls."""
        c, mma = self.cfg, self.tiled_mma()
        tCrW, tCrX = mma.make_fragment_A(sW), mma.make_fragment_B(sX)  # (MMA, MMA_MN, MMA_K, STAGE)
        tAcc = self.accumulators(tmem)
        mma.set(tcgen05.Field.ACCUMULATE, False)
        for block in cutlass.range_constexpr(c.k_blocks):
            stage = block % c.stages
            cute.arch.mbarrier_wait(full + stage, block // c.stages % 2)
            for k in cutlass.range_constexpr(cute.size(tCrW, mode=[2])):
                tCrW_k, tCrX_k = tCrW[(None, None, k, stage)], tCrX[(None, None, k, stage)]
                cute.gemm(mma, tAcc, tCrW_k, tCrX_k, tAcc)
                mma.set(tcgen05.Field.ACCUMULATE, True)
            if cutlass.const_expr(block < c.k_blocks - c.stages):
                with cute.arch.elect_one():
                    tcgen05.commit(free + stage)
        with cute.arch.elect_one():
            tcgen05.commit(done)

    @cute.jit
    def read(self, tid: Int32, tmem: cute.Pointer, done: cute.Pointer):
        """The thread's sums, out of TMEM, with their (expert, token) coordinates."""
        c = self.cfg
        tAcc = self.accumulators(tmem)[(None, None), 0, 0]
        if cutlass.const_expr(c.tile_experts == 128):
            op = tcgen05.Ld32x32bOp(tcgen05.Repetition(c.tile_tokens))  # a thread has a row
        else:
            op = tcgen05.Ld16x256bOp(tcgen05.Repetition(c.tile_tokens // 8))
        copy = tcgen05.make_tmem_copy(cute.make_copy_atom(op, Float32), tAcc)
        thr = copy.get_slice(tid)
        coords = thr.partition_D(cute.make_identity_tensor(self.tile[:2]))
        rAcc = cute.make_rmem_tensor(coords.shape, Float32)
        cute.arch.mbarrier_wait(done, 0)
        cute.arch.inline_ptx("tcgen05.fence::after_thread_sync;")
        cute.copy(copy, thr.partition_S(tAcc), rAcc)
        cute.arch.fence_view_async_tmem_load()
        return rAcc, coords

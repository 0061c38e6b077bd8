"""The product on Blackwell: tcgen05, accumulators in tensor memory (TMEM).

    L[e, n] += sum_k W[e, k] x[n, k]        experts -> MMA-M (64 or 128), tokens -> MMA-N

One warp issues every MMA; the epilogue's four warps then read the accumulators, each its own lanes.
Operands, layouts and the TMA loads are those of the Hopper twin.
"""

import cutlass
import cutlass.cute as cute
import cutlass.pipeline as pipeline
import cutlass.utils.blackwell_helpers as sm100
from cutlass import BFloat16, Float32, Int32
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, tcgen05
from cutlass.memory import TmemAllocator

from cute_router.gemm.config import TILE_K, DecodeConfig
from cute_router.gemm.mainloop import Mainloop, Shared

TMEM_BARRIER = 2  # named barrier of the MMA warp and the epilogue


class MainloopSm100(Mainloop):
    """tcgen05.mma, issued by one warp, which also owns the tensor memory."""

    mma_warp = True

    def __init__(self, config: DecodeConfig):
        super().__init__(config)
        self.tile = (config.tile_experts, config.tile_tokens, TILE_K)
        self.vector = 4 if config.tile_experts == 128 else 2
        # Accumulators are fp32 columns; TMEM is allocated in powers of two from 32.
        self.columns = max(32, config.tile_tokens)
        self.meet = pipeline.NamedBarrier(TMEM_BARRIER, config.epilogue_threads + 32)

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

    def allocator(self, s: Shared, warp: int) -> TmemAllocator:
        """The TMEM allocator: warp `warp` allocates and frees, the epilogue retrieves."""
        return TmemAllocator(s.tmem, barrier_for_retrieve=self.meet, allocator_warp_id=warp)

    def accumulators(self, tmem: cute.Pointer) -> cute.Tensor:
        """The accumulators in TMEM, (MMA, MMA_M, MMA_N)."""
        mma = self.tiled_mma()
        fragment = mma.make_fragment_C(mma.partition_shape_C(self.tile[:2]))
        return cute.make_tensor(tmem, fragment.layout)

    @cute.jit
    def issue(self, s: Shared, warp: cutlass.Constexpr) -> None:
        """Allocate, issue the MMAs of this CTA's K blocks, free what the epilogue has read."""
        tmem = self.allocator(s, warp)
        tmem.allocate(self.columns)
        tmem.wait_for_alloc()
        pointer = tmem.retrieve_ptr(Float32)
        self.multiply(s, self.accumulators(pointer))
        tmem.relinquish_alloc_permit()
        self.meet.arrive_and_wait()
        cute.arch.inline_ptx("tcgen05.fence::after_thread_sync;")  # the epilogue's reads are over
        tmem.free(pointer)

    @cute.jit
    def multiply(self, s: Shared, tAcc: cute.Tensor) -> None:
        """Every MMA of this CTA; `done` completes with the last."""
        c, mma = self.cfg, self.tiled_mma()
        tCrW = mma.make_fragment_A(s.sW)  # (MMA, MMA_M, MMA_K, STAGE)
        tCrX = mma.make_fragment_B(s.sX)  # (MMA, MMA_N, MMA_K, STAGE)
        mma.set(tcgen05.Field.ACCUMULATE, False)
        self.multiply_block(s, mma, tAcc, tCrW, tCrX, 0, first=True)
        if cutlass.const_expr(c.resident):
            for block in cutlass.range_constexpr(1, c.k_blocks):
                self.multiply_block(s, mma, tAcc, tCrW, tCrX, block)
        else:
            for block in cutlass.range(1, c.k_blocks):
                self.multiply_block(s, mma, tAcc, tCrW, tCrX, block)
        with cute.arch.elect_one():
            tcgen05.commit(s.done)

    def multiply_block(self, s: Shared, mma, tAcc, tCrW, tCrX, block, first: bool = False) -> None:
        """The MMAs of one K block, once it is there; in a ring its stage is then free."""
        stage = block % self.cfg.stages
        cute.arch.mbarrier_wait(s.full + stage, block // self.cfg.stages % 2)
        for k in range(cute.size(tCrW, mode=[2])):
            tCrW_k, tCrX_k = tCrW[(None, None, k, stage)], tCrX[(None, None, k, stage)]
            cute.gemm(mma, tAcc, tCrW_k, tCrX_k, tAcc)
            if first:  # a run-time loop could not carry the change
                mma.set(tcgen05.Field.ACCUMULATE, True)
        if not self.cfg.resident:
            with cute.arch.elect_one():
                tcgen05.commit(s.free + stage)

    @cute.jit
    def accumulate(self, s: Shared, tid: Int32):
        """The thread's sums, out of TMEM, with their (expert, token) coordinates."""
        c = self.cfg
        tmem = self.allocator(s, 0)
        tmem.wait_for_alloc()
        tAcc = self.accumulators(tmem.retrieve_ptr(Float32))[(None, None), 0, 0]
        if cutlass.const_expr(c.tile_experts == 128):
            op = tcgen05.Ld32x32bOp(tcgen05.Repetition(c.tile_tokens))  # a thread has a row
        else:
            op = tcgen05.Ld16x256bOp(tcgen05.Repetition(c.tile_tokens // 8))
        copy = tcgen05.make_tmem_copy(cute.make_copy_atom(op, Float32), tAcc)
        thr = copy.get_slice(tid)
        coords = thr.partition_D(cute.make_identity_tensor(self.tile[:2]))
        rAcc = cute.make_rmem_tensor(coords.shape, Float32)
        cute.arch.mbarrier_wait(s.done, 0)
        cute.arch.inline_ptx("tcgen05.fence::after_thread_sync;")
        cute.copy(copy, thr.partition_S(tAcc), rAcc)
        cute.arch.fence_view_async_tmem_load()
        cute.arch.inline_ptx("tcgen05.fence::before_thread_sync;")
        self.meet.arrive()  # the MMA warp may free the accumulators
        return rAcc, coords

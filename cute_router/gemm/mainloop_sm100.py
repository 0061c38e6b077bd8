"""The product on Blackwell: tcgen05, accumulators in tensor memory (TMEM).

    L[e, n] += sum_k W[e, k] x[n, k]        experts -> MMA-M (64 or 128), tokens -> MMA-N

One warp issues every MMA (`gemm.tcgen05`); the epilogue's four warps then read the accumulators,
each its own lanes.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32
from cutlass.cute.nvgpu import tcgen05

from cute_router.gemm.config import TILE_K, DecodeConfig
from cute_router.gemm.mainloop import Mainloop, Shared
from cute_router.gemm.ptx import wait_for_peers
from cute_router.gemm.tcgen05 import Tcgen05Operands


class MainloopSm100(Tcgen05Operands, Mainloop):
    """tcgen05.mma, issued by one warp, which also owns the tensor memory."""

    mma_warp = True

    def __init__(self, config: DecodeConfig):
        super().__init__(config)
        self.tile = (config.tile_experts, config.tile_tokens, TILE_K)
        self.ring = not config.resident
        self.vector = 4 if config.tile_experts == 128 else 2

    def partition(self, atoms, sW: cute.Tensor, sX: cute.Tensor, tile_e: Int32, tile_n: Int32):
        """The tiles as TMA sees them: shared (TMA, STAGE) and global (TMA, K_BLOCK)."""
        return self.seen_by_tma(atoms, sW, sX, tile_e, tile_n)

    @cute.jit
    def issue(self, s: Shared, warp: cutlass.Constexpr) -> None:
        """Allocate, issue the MMAs of this CTA's K blocks, free what the epilogue has read."""
        tmem = self.allocator(s.tmem, warp)
        tmem.allocate(self.tile_columns)
        wait_for_peers(self.cfg.split_k)
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

    @cute.jit
    def accumulate(self, s: Shared, tid: Int32):
        """The thread's sums, out of TMEM, with their (expert, token) coordinates."""
        c = self.cfg
        tmem = self.allocator(s.tmem, 0)
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

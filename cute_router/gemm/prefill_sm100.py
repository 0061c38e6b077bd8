"""The product of prefill on Blackwell: tcgen05, accumulators in tensor memory (TMEM).

    L[n, e] += sum_k x[n, k] W[e, k]        tokens -> MMA-M (128), experts -> MMA-N (up to 256)

One warp issues every MMA (`gemm.tcgen05`); the epilogue's four warps then read the accumulators, a
token each, and choose while the next tile is multiplied. Up to 128 experts, tiles take two buffers
of TMEM in turns: then the next one need not wait until this one has been read.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32
from cutlass.cute.nvgpu import tcgen05

from cute_router.gemm.config import TILE_K
from cute_router.gemm.prefill_config import PrefillConfig
from cute_router.gemm.prefill_mainloop import Pieces, PrefillMainloop, Shared, Sink, Tiles
from cute_router.gemm.ptx import wait_for_peers
from cute_router.gemm.tcgen05 import Tcgen05Operands

CHUNK = 32  # columns of TMEM that a thread has in registers at once


class PrefillSm100(Tcgen05Operands, PrefillMainloop):
    """tcgen05.mma, issued by one warp, which also owns the tensor memory."""

    vector, rows = 4, 1

    def __init__(self, config: PrefillConfig):
        super().__init__(config)
        self.tile = (config.tile_tokens, config.tile_experts, TILE_K)
        self.pieces = config.tile_experts // CHUNK

    def partition(self, atoms, sX: cute.Tensor, sW: cute.Tensor, tiles: Tiles):
        """The tiles as TMA sees them."""
        return self.seen_by_tma(atoms, sX, sW, None, tiles.e_part)

    @cute.jit
    def issue(self, s: Shared, tiles: Tiles, warp: cutlass.Constexpr) -> None:
        """Allocate, issue the MMAs of all tiles, free what the epilogue has read."""
        buffers = self.cfg.buffers
        tmem = self.allocator(s.tmem, warp)
        tmem.allocate(buffers * self.tile_columns)
        tmem.wait_for_alloc()
        pointer = tmem.retrieve_ptr(Float32)
        for turn in cutlass.range(tiles.count):
            if turn >= buffers:
                drained = s.drained + turn % buffers
                cute.arch.mbarrier_wait(drained, (turn // buffers - 1) % 2)
                cute.arch.inline_ptx("tcgen05.fence::after_thread_sync;")
            self.multiply(s, self.buffer(pointer, turn), turn)
            if turn == 0:
                wait_for_peers(self.cfg.cluster)
        tmem.relinquish_alloc_permit()
        self.meet.arrive_and_wait()
        cute.arch.inline_ptx("tcgen05.fence::after_thread_sync;")  # the epilogue's reads are over
        tmem.free(pointer)

    @cute.jit
    def multiply(self, s: Shared, tAcc: cute.Tensor, turn: Int32) -> None:
        """Every MMA of a tile; `done` completes with the last."""
        c, mma = self.cfg, self.tiled_mma()
        tCrX = mma.make_fragment_A(s.sX)  # (MMA, MMA_M, MMA_K, STAGE)
        tCrW = mma.make_fragment_B(s.sW)  # (MMA, MMA_N, MMA_K, STAGE)
        mma.set(tcgen05.Field.ACCUMULATE, False)
        first = turn * c.k_blocks
        self.multiply_block(s, mma, tAcc, tCrX, tCrW, first, first=True)
        for block in cutlass.range(first + 1, first + c.k_blocks):
            self.multiply_block(s, mma, tAcc, tCrX, tCrW, block)
        with cute.arch.elect_one():
            tcgen05.commit(s.done + turn % c.buffers)

    def enter(self, s: Shared) -> None:
        """Wait until there is tensor memory."""
        self.allocator(s.tmem, 0).wait_for_alloc()

    def accumulate(self, s: Shared, tid: Int32, tiles: Tiles, turn: Int32, sink: Sink) -> None:
        """A thread's token, out of TMEM in chunks."""
        shape = (self.cfg.tile_tokens, CHUNK)
        tmem = self.allocator(s.tmem, 0)
        tAcc = self.buffer(tmem.retrieve_ptr(Float32), turn)[(None, None), 0, 0]
        tChunks = cute.flat_divide(tAcc, shape)  # (NT, CHUNK, 1, CHUNKS)
        op = tcgen05.Ld32x32bOp(tcgen05.Repetition(CHUNK))
        copy = tcgen05.make_tmem_copy(cute.make_copy_atom(op, Float32), tChunks[None, None, 0, 0])
        thr = copy.get_slice(tid)
        coords = thr.partition_D(cute.make_identity_tensor(shape))
        sink.open(s, turn)
        buffers = self.cfg.buffers
        cute.arch.mbarrier_wait(s.done + turn % buffers, turn // buffers % 2)
        cute.arch.inline_ptx("tcgen05.fence::after_thread_sync;")

        def load(chunk: int):
            rAcc = cute.make_rmem_tensor(coords.shape, Float32)
            cute.copy(copy, thr.partition_S(tChunks[None, None, 0, chunk]), rAcc)
            cute.arch.fence_view_async_tmem_load()
            runs = [coords[i] for i in range(0, CHUNK, self.vector)]
            return rAcc, [(token, chunk * CHUNK + e) for token, e in runs]

        sink.send(s, tiles, turn, Pieces(self.pieces, load))
        cute.arch.inline_ptx("tcgen05.fence::before_thread_sync;")
        self.drained(s, turn)

    def buffer(self, tmem: cute.Pointer, turn: Int32) -> cute.Tensor:
        """The accumulators of a tile."""
        return self.accumulators(tmem + turn % self.cfg.buffers * self.tile_columns)

    @cute.jit
    def drained(self, s: Shared, turn: Int32) -> None:
        """This warp has read its accumulators."""
        cute.arch.sync_warp()
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive(s.drained + turn % self.cfg.buffers)

    def free_held(self, s: Shared, turn: Int32) -> None:
        """Nothing: none is held."""

    def leave(self) -> None:
        """The MMA warp may free the accumulators."""
        self.meet.arrive()

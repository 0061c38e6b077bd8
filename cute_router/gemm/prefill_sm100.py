"""The product of prefill on Blackwell: tcgen05, accumulators in tensor memory (TMEM).

    L[n, e] += sum_k x[n, k] W[e, k]        tokens -> MMA-M (128), experts -> MMA-N (up to 256)

One warp issues every MMA; the epilogue's four warps then read the accumulators, a token each, and
choose while the next tile is multiplied. Operands, layouts and the TMA loads are those of the
Hopper twin.
"""

import cutlass
import cutlass.cute as cute
import cutlass.pipeline as pipeline
import cutlass.utils.blackwell_helpers as sm100
from cutlass import BFloat16, Float32, Int32
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, tcgen05
from cutlass.memory import TmemAllocator

from cute_router.gemm.config import TILE_K
from cute_router.gemm.prefill_config import PrefillConfig
from cute_router.gemm.prefill_mainloop import PrefillMainloop, Shared, Sink, Tiles

TMEM_BARRIER = 2  # named barrier of the MMA warp and the epilogue
CHUNK = 32  # columns of TMEM that a thread has in registers at once


class PrefillSm100(PrefillMainloop):
    """tcgen05.mma, issued by one warp, which also owns the tensor memory."""

    vector, rows = 4, 1

    def __init__(self, config: PrefillConfig):
        super().__init__(config)
        self.tile = (config.tile_tokens, config.tile_experts, TILE_K)
        # Accumulators are fp32 columns; TMEM is allocated in powers of two from 32.
        self.columns = max(32, 1 << (config.tile_experts - 1).bit_length())
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
        """Shared-memory layouts of the x tile and the W tile, (MMA, MMA_MN, MMA_K, STAGE)."""
        mma, stages = self.tiled_mma(), self.cfg.stages
        return (
            sm100.make_smem_layout_a(mma, self.tile, BFloat16, stages),
            sm100.make_smem_layout_b(mma, self.tile, BFloat16, stages),
        )

    def tma_atoms(self, mX: cute.Tensor, mW: cute.Tensor, layout_x, layout_w):
        """(atom, coordinate tensor) for x and for W."""
        mma, op = self.tiled_mma(), cpasync.CopyBulkTensorTileG2SOp(tcgen05.CtaGroup.ONE)
        stage_x, stage_w = (cute.select(layout, mode=[0, 1, 2]) for layout in (layout_x, layout_w))
        cluster = (1, 1, 1, 1)
        return (
            cute.nvgpu.make_tiled_tma_atom_A(op, mX, stage_x, self.tile, mma, cluster),
            cute.nvgpu.make_tiled_tma_atom_B(op, mW, stage_w, self.tile, mma, cluster),
        )

    def partition(self, atoms, sX: cute.Tensor, sW: cute.Tensor, tiles: Tiles):
        """The tiles as TMA sees them."""
        (atom_x, mX), (atom_w, mW) = atoms
        thr, coord = self.tiled_mma().get_slice(0), (None, tiles.e_part, None)
        gX = cute.local_tile(mX, self.tile, coord, proj=(1, None, 1))  # (NT, KT, TILE, K_BLOCK)
        gW = cute.local_tile(mW, self.tile, coord, proj=(None, 1, 1))  # (ET, KT, K_BLOCK)
        pairs = ((atom_x, sX, thr.partition_A(gX)), (atom_w, sW, thr.partition_B(gW)))
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
    def issue(self, s: Shared, tiles: Tiles, warp: cutlass.Constexpr) -> None:
        """Allocate, issue the MMAs of all tiles, free what the epilogue has read."""
        tmem = self.allocator(s, warp)
        tmem.allocate(self.columns)
        tmem.wait_for_alloc()
        pointer = tmem.retrieve_ptr(Float32)
        for turn in cutlass.range(tiles.count):
            if turn > 0:
                cute.arch.mbarrier_wait(s.drained, (turn - 1) % 2)
                cute.arch.inline_ptx("tcgen05.fence::after_thread_sync;")
            self.multiply(s, self.accumulators(pointer), turn)
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
            tcgen05.commit(s.done)

    def multiply_block(self, s: Shared, mma, tAcc, tCrX, tCrW, block, first: bool = False) -> None:
        """The MMAs of one K block, counted over all tiles; its stage is free when they end."""
        stage = block % self.cfg.stages
        cute.arch.mbarrier_wait(s.full + stage, block // self.cfg.stages % 2)
        for k in range(cute.size(tCrX, mode=[2])):
            tCrX_k, tCrW_k = tCrX[(None, None, k, stage)], tCrW[(None, None, k, stage)]
            cute.gemm(mma, tAcc, tCrX_k, tCrW_k, tAcc)
            if first:  # a run-time loop could not carry the change
                mma.set(tcgen05.Field.ACCUMULATE, True)
        with cute.arch.elect_one():
            tcgen05.commit(s.free + stage)

    def enter(self, s: Shared) -> None:
        """Wait until there is tensor memory."""
        self.allocator(s, 0).wait_for_alloc()

    def accumulate(self, s: Shared, tid: Int32, tiles: Tiles, turn: Int32, sink: Sink) -> None:
        """A thread's token, out of TMEM in chunks."""
        shape = (self.cfg.tile_tokens, CHUNK)
        tAcc = self.accumulators(self.allocator(s, 0).retrieve_ptr(Float32))[(None, None), 0, 0]
        tChunks = cute.flat_divide(tAcc, shape)  # (NT, CHUNK, 1, CHUNKS)
        op = tcgen05.Ld32x32bOp(tcgen05.Repetition(CHUNK))
        copy = tcgen05.make_tmem_copy(cute.make_copy_atom(op, Float32), tChunks[None, None, 0, 0])
        thr = copy.get_slice(tid)
        coords = thr.partition_D(cute.make_identity_tensor(shape))
        sink.open(s, turn, tid)
        cute.arch.mbarrier_wait(s.done, turn % 2)
        cute.arch.inline_ptx("tcgen05.fence::after_thread_sync;")
        for chunk in range(self.cfg.tile_experts // CHUNK):
            rAcc = cute.make_rmem_tensor(coords.shape, Float32)
            cute.copy(copy, thr.partition_S(tChunks[None, None, 0, chunk]), rAcc)
            cute.arch.fence_view_async_tmem_load()
            runs = [coords[i] for i in range(0, CHUNK, self.vector)]
            sink.send(s, tiles, rAcc, [(token, chunk * CHUNK + e) for token, e in runs])
        cute.arch.inline_ptx("tcgen05.fence::before_thread_sync;")
        self.drained(s)

    @cute.jit
    def drained(self, s: Shared) -> None:
        """This warp has read its accumulators."""
        cute.arch.sync_warp()
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive(s.drained)

    def free_held(self, s: Shared, turn: Int32) -> None:
        """Nothing: none is held."""

    def leave(self) -> None:
        """The MMA warp may free the accumulators."""
        self.meet.arrive()

"""Operands of tcgen05.mma: tiles of A (MMA-M) and B (MMA-N) in shared memory, sums in TMEM.

One warp issues every MMA, and also owns the tensor memory (TMEM). Decode has W for A and x for B,
prefill the other way round. Swizzles and TMA loads are those of the Hopper twin (`gemm.wgmma`).
"""

from functools import cached_property
from typing import Any

import cutlass.cute as cute
import cutlass.pipeline as pipeline
import cutlass.utils.blackwell_helpers as sm100
from cutlass import BFloat16, Float32
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, tcgen05
from cutlass.memory import TmemAllocator

from cute_router.topk.config import WARP

TMEM_BARRIER = 2  # named barrier of the MMA warp and the epilogue
LEAST_COLUMNS = 32  # of TMEM, which is allocated in powers of two from there


class Tcgen05Operands:
    """What mainloops of Blackwell have in common."""

    cfg: Any
    tile: tuple[int, int, int]  # rows of A, rows of B, K
    ring = True  # whether stages are loaded again

    @property
    def tile_columns(self) -> int:
        """Columns of TMEM that a tile's accumulators take: of fp32, one for each row of B."""
        return max(LEAST_COLUMNS, 1 << (self.tile[1] - 1).bit_length())

    @cached_property
    def meet(self) -> pipeline.NamedBarrier:
        """Where the MMA warp and the epilogue meet."""
        return pipeline.NamedBarrier(TMEM_BARRIER, self.cfg.epilogue_threads + WARP)

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
        """Shared-memory layouts of the A tile and the B tile, (MMA, MMA_MN, MMA_K, STAGE)."""
        mma, stages = self.tiled_mma(), self.cfg.stages
        return (
            sm100.make_smem_layout_a(mma, self.tile, BFloat16, stages),
            sm100.make_smem_layout_b(mma, self.tile, BFloat16, stages),
        )

    def tma_atoms(self, mA: cute.Tensor, mB: cute.Tensor, layout_a, layout_b):
        """(atom, coordinate tensor) for A and for B."""
        mma, op = self.tiled_mma(), cpasync.CopyBulkTensorTileG2SOp(tcgen05.CtaGroup.ONE)
        stage_a, stage_b = (cute.select(layout, mode=[0, 1, 2]) for layout in (layout_a, layout_b))
        cluster = (1, 1, 1, 1)
        return (
            cute.nvgpu.make_tiled_tma_atom_A(op, mA, stage_a, self.tile, mma, cluster),
            cute.nvgpu.make_tiled_tma_atom_B(op, mB, stage_b, self.tile, mma, cluster),
        )

    def seen_by_tma(self, atoms, sA: cute.Tensor, sB: cute.Tensor, tile_a, tile_b):
        """A tile of A and one of B, or all for None, as TMA sees them: shared (TMA, STAGE), global
        (TMA, K_BLOCK) or (TMA, TILE, K_BLOCK)."""
        (atom_a, mA), (atom_b, mB) = atoms
        thr, coord = self.tiled_mma().get_slice(0), (tile_a, tile_b, None)
        gA = cute.local_tile(mA, self.tile, coord, proj=(1, None, 1))  # (rows, K, ...)
        gB = cute.local_tile(mB, self.tile, coord, proj=(None, 1, 1))
        pairs = ((atom_a, sA, thr.partition_A(gA)), (atom_b, sB, thr.partition_B(gB)))
        return tuple(
            cpasync.tma_partition(
                atom, 0, cute.make_layout(1), cute.group_modes(s, 0, 3), cute.group_modes(g, 0, 3)
            )
            for atom, s, g in pairs
        )

    def allocator(self, tmem: cute.Pointer, warp: int) -> TmemAllocator:
        """The TMEM allocator: warp `warp` allocates and frees, the epilogue retrieves."""
        return TmemAllocator(tmem, barrier_for_retrieve=self.meet, allocator_warp_id=warp)

    def accumulators(self, tmem: cute.Pointer) -> cute.Tensor:
        """The accumulators in TMEM, (MMA, MMA_M, MMA_N)."""
        mma = self.tiled_mma()
        fragment = mma.make_fragment_C(mma.partition_shape_C(self.tile[:2]))
        return cute.make_tensor(tmem, fragment.layout)

    def multiply_block(self, s: Any, mma, tAcc, tCrA, tCrB, block, first: bool = False) -> None:
        """The MMAs of one K block, once it is there; in a ring its stage is then free.

        first: whether they add to nothing.
        """
        stage = block % self.cfg.stages
        cute.arch.mbarrier_wait(s.full + stage, block // self.cfg.stages % 2)
        for k in range(cute.size(tCrA, mode=[2])):
            tCrA_k, tCrB_k = tCrA[(None, None, k, stage)], tCrB[(None, None, k, stage)]
            cute.gemm(mma, tAcc, tCrA_k, tCrB_k, tAcc)
            if first:  # a run-time loop could not carry the change
                mma.set(tcgen05.Field.ACCUMULATE, True)
        if self.ring:
            with cute.arch.elect_one():
                tcgen05.commit(s.free + stage)

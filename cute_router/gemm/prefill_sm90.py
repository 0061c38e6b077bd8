"""The product of prefill on Hopper: WGMMA, accumulators in the registers of its warpgroups.

    L[n, e] += sum_k x[n, k] W[e, k]        tokens -> MMA-M (64 a warpgroup), experts -> MMA-N

Both operands come from shared memory, 128-byte swizzled, K innermost, as TMA left them.
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as sm90
from cutlass import BFloat16, Float32, Int32
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup
from cutlass.tensor_utils import LayoutEnum

from cute_router.gemm.config import TILE_K
from cute_router.gemm.prefill_config import WARPGROUP, PrefillConfig
from cute_router.gemm.prefill_mainloop import PrefillMainloop, Shared, Sink, Tiles
from cute_router.gemm.ptx import arrive_relaxed_at_peer


class Place(NamedTuple):
    """Where the ring of stages is."""

    stage: Int32
    phase: Int32  # of the stage's barrier `full`


class PrefillSm90(PrefillMainloop):
    """WGMMA, issued by the epilogue's own warps."""

    vector, rows = 2, 2

    def __init__(self, config: PrefillConfig):
        super().__init__(config)
        self.tile = (config.tile_tokens, config.tile_experts, TILE_K)

    def tiled_mma(self):
        """One WGMMA of 64 tokens for each warpgroup."""
        c = self.cfg
        return sm90.make_trivial_tiled_mma(
            BFloat16,
            BFloat16,
            OperandMajorMode.K,
            OperandMajorMode.K,
            Float32,
            (c.tile_tokens // 64, 1, 1),
            (64, c.tile_experts),
        )

    def layouts(self):
        """Shared-memory layouts of the x tile and the W tile, (rows, TILE_K, STAGE)."""
        stages = self.cfg.stages
        return (
            sm90.make_smem_layout_a(LayoutEnum.ROW_MAJOR, self.tile, BFloat16, stages),
            sm90.make_smem_layout_b(LayoutEnum.ROW_MAJOR, self.tile, BFloat16, stages),
        )

    def tma_atoms(self, mX: cute.Tensor, mW: cute.Tensor, layout_x, layout_w):
        """(atom, coordinate tensor) for x and for W."""
        c, op = self.cfg, cpasync.CopyBulkTensorTileG2SOp()
        op_x = cpasync.CopyBulkTensorTileG2SMulticastOp() if c.multicast else op
        stage_x, stage_w = (cute.select(layout, mode=[0, 1]) for layout in (layout_x, layout_w))
        tile_x, tile_w = (c.tile_tokens, TILE_K), (c.tile_experts, TILE_K)
        return (
            cpasync.make_tiled_tma_atom(op_x, mX, stage_x, tile_x, num_multicast=c.loaders),
            cpasync.make_tiled_tma_atom(op, mW, stage_w, tile_w),
        )

    def partition(self, atoms, sX: cute.Tensor, sW: cute.Tensor, tiles: Tiles):
        """The tiles as TMA sees them; of those that are shared, this CTA's part."""
        c, e_part = self.cfg, tiles.e_part
        part = e_part if c.multicast else 0
        (atom_x, mX), (atom_w, mW) = atoms
        gX = cute.local_tile(mX, (c.tile_tokens, TILE_K), (None, None))  # (NT, KT, TILE, K_BLOCK)
        gW = cute.local_tile(mW, (c.tile_experts, TILE_K), (e_part, None))  # (ET, KT, K_BLOCK)
        return tuple(
            cpasync.tma_partition(
                atom, i, cute.make_layout(n), cute.group_modes(s, 0, 2), cute.group_modes(g, 0, 2)
            )
            for atom, i, n, s, g in ((atom_x, part, c.loaders, sX, gX), (atom_w, 0, 1, sW, gW))
        )

    def enter(self, s: Shared) -> None:
        """Nothing: accumulators are registers."""

    def accumulate(self, s: Shared, tid: Int32, tiles: Tiles, turn: Int32, sink: Sink) -> None:
        """Multiply; all of the thread's sums at once."""
        rSum = self.multiply(s, tid, tiles, turn)
        thr = self.tiled_mma().get_slice(tid)
        coords = thr.partition_C(cute.make_identity_tensor(self.tile[:2]))
        sink.open(s, turn, tid)
        sink.send(s, tiles, rSum, coords, 0)

    @cute.jit
    def multiply(self, s: Shared, tid: Int32, tiles: Tiles, turn: Int32) -> cute.Tensor:
        """The product of a tile: chains of WGMMAs, summed in fp32 registers."""
        c = self.cfg
        mma = self.tiled_mma()
        # The operands are those of a whole warpgroup: their descriptors stay in uniform registers.
        thr = mma.get_slice(cute.arch.make_warp_uniform(tid // WARPGROUP) * WARPGROUP)
        tCrX = mma.make_fragment_A(thr.partition_A(s.sX))  # (MMA, MMA_M, MMA_K, STAGE)
        tCrW = mma.make_fragment_B(thr.partition_B(s.sW))  # (MMA, MMA_N, MMA_K, STAGE)
        rAcc = cute.make_rmem_tensor(thr.partition_shape_C(self.tile[:2]), Float32)
        at = self.ring(turn * c.k_blocks)
        if cutlass.const_expr(c.chain == c.k_blocks):
            self.multiply_chain(s, rAcc, tCrX, tCrW, tiles, Int32(0), Int32(c.k_blocks), at)
            return rAcc
        rSum = cute.make_rmem_tensor_like(rAcc)
        rSum.fill(0.0)
        for start in cutlass.range(0, c.k_blocks, c.chain):
            end = cutlass.min(start + c.chain, c.k_blocks)
            at = self.multiply_chain(s, rAcc, tCrX, tCrW, tiles, start, end, at)
            rSum.store(rSum.load() + rAcc.load())
        return rSum

    @cute.jit
    def multiply_chain(self, s: Shared, rAcc, tCrX, tCrW, tiles: Tiles, start, end, at: Place):
        """Sum the products of the K blocks `start` to `end` of a tile; where the ring is then.

        A stage is free again when the block behind it is under way. Little may stand between two
        blocks: the tensor cores have work queued for a few WGMMAs only.
        """
        last = at
        for block in cutlass.range(start, end):
            cute.arch.mbarrier_wait(s.full + at.stage, at.phase)
            warpgroup.fence()
            mma = self.tiled_mma()
            for k in cutlass.range_constexpr(cute.size(tCrX, mode=[2])):
                mma.set(warpgroup.Field.ACCUMULATE, True if k > 0 else block > start)
                tCrX_k, tCrW_k = tCrX[None, None, k, at.stage], tCrW[None, None, k, at.stage]
                cute.gemm(mma, rAcc, tCrX_k, tCrW_k, rAcc)
            warpgroup.commit_group()
            warpgroup.wait_group(1)
            if block > start:
                self.release(s, tiles, last.stage, block - 1)
            last = at
            at = self.step(at)
        warpgroup.wait_group(0)
        self.release(s, tiles, last.stage, end - 1)
        return at

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
    def release(self, s: Shared, tiles: Tiles, stage: Int32, block: Int32) -> None:
        """Free the stage of a tile's block that has been read, unless it is held."""
        c = self.cfg
        if cutlass.const_expr(c.held == 0) or block < c.k_blocks - c.held:
            self.free(s, tiles, stage)

    @cute.jit
    def free_held(self, s: Shared, tiles: Tiles, turn: Int32) -> None:
        """Free the stages that are held."""
        for i in cutlass.range_constexpr(self.cfg.held):
            self.free(s, tiles, self.ring((turn + 1) * self.cfg.k_blocks - 1 - i).stage)

    @cute.jit
    def free(self, s: Shared, tiles: Tiles, stage: Int32) -> None:
        """Tell all who load parts of a block that its stage is free.

        Relaxed: tensor cores have read it, or all is behind a fence (`Exchange.close`).
        """
        c = self.cfg
        barrier = s.free + stage
        if cutlass.const_expr(c.loaders > 1):
            lane = cute.arch.lane_idx()
            if lane < c.loaders:
                arrive_relaxed_at_peer(barrier, tiles.k_part * c.split_e + lane)
        else:
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive(barrier)

    def leave(self) -> None:
        """Nothing."""

    def issue(self, s: Shared, tiles: Tiles, warp: int) -> None:
        """Nothing: there is no such warp."""

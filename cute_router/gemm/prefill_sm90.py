"""The product of prefill on Hopper: WGMMA, accumulators in the registers of its warpgroups.

    L[n, e] += sum_k x[n, k] W[e, k]        tokens -> MMA-M (64 a warpgroup), experts -> MMA-N

Both operands come from shared memory, 128-byte swizzled, K innermost, as TMA left them.
"""

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as sm90
from cutlass import BFloat16, Float32, Int32
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup
from cutlass.tensor_utils import LayoutEnum

from cute_router.gemm.config import TILE_K
from cute_router.gemm.prefill_config import PrefillConfig
from cute_router.gemm.prefill_mainloop import PrefillMainloop, Shared, Sink, Tiles
from cute_router.gemm.ptx import arrive_relaxed_at_peer


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
        shared = cpasync.CopyBulkTensorTileG2SMulticastOp()
        stage_x, stage_w = (cute.select(layout, mode=[0, 1]) for layout in (layout_x, layout_w))
        return (
            cpasync.make_tiled_tma_atom(
                shared if c.multicast else op,
                mX,
                stage_x,
                (c.tile_tokens, TILE_K),
                num_multicast=c.split_e if c.multicast else 1,
            ),
            cpasync.make_tiled_tma_atom(
                shared if c.team > 1 else op,
                mW,
                stage_w,
                (c.tile_experts, TILE_K),
                num_multicast=c.team,
            ),
        )

    def partition(self, atoms, sX: cute.Tensor, sW: cute.Tensor, tiles: Tiles):
        """The tiles as TMA sees them; of those that are shared, this CTA's part."""
        c, e_part = self.cfg, tiles.e_part
        (atom_x, mX), (atom_w, mW) = atoms
        gX = cute.local_tile(mX, (c.tile_tokens, TILE_K), (None, None))  # (NT, KT, TILE, K_BLOCK)
        gW = cute.local_tile(mW, (c.tile_experts, TILE_K), (e_part, None))  # (ET, KT, K_BLOCK)
        sharers = cute.make_layout(c.split_e if c.multicast else 1)
        return tuple(
            cpasync.tma_partition(
                atom, part, layout, cute.group_modes(s, 0, 2), cute.group_modes(g, 0, 2)
            )
            for atom, part, layout, s, g in (
                (atom_x, e_part if c.multicast else 0, sharers, sX, gX),
                (atom_w, tiles.member if c.team > 1 else 0, cute.make_layout(c.team), sW, gW),
            )
        )

    def enter(self, s: Shared) -> None:
        """Nothing: accumulators are registers."""

    def accumulate(self, s: Shared, tid: Int32, tiles: Tiles, turn: Int32, sink: Sink) -> None:
        """Multiply; all of the thread's sums at once."""
        rAcc = self.multiply(s, tid, tiles, turn)
        thr = self.tiled_mma().get_slice(tid)
        coords = thr.partition_C(cute.make_identity_tensor(self.tile[:2]))
        sink.open(s, turn)
        sink.send(s, tiles, rAcc, coords, 0)

    @cute.jit
    def multiply(self, s: Shared, tid: Int32, tiles: Tiles, turn: Int32) -> cute.Tensor:
        """The WGMMAs of a tile; a stage is free again when the block behind it is under way."""
        c = self.cfg
        mma = self.tiled_mma()
        thr = mma.get_slice(tid)
        tCrX = mma.make_fragment_A(thr.partition_A(s.sX))  # (MMA, MMA_M, MMA_K, STAGE)
        tCrW = mma.make_fragment_B(thr.partition_B(s.sW))  # (MMA, MMA_N, MMA_K, STAGE)
        rAcc = cute.make_rmem_tensor(thr.partition_shape_C(self.tile[:2]), Float32)
        mma.set(warpgroup.Field.ACCUMULATE, False)
        first = turn * c.k_blocks
        self.multiply_block(s, mma, rAcc, tCrX, tCrW, first, first=True)
        for block in cutlass.range(first + 1, first + c.k_blocks):
            self.multiply_block(s, mma, rAcc, tCrX, tCrW, block)
            warpgroup.wait_group(1)  # the block before this one has been read
            self.release(s, tiles, block - 1)
        warpgroup.wait_group(0)
        self.release(s, tiles, first + c.k_blocks - 1)
        return rAcc

    def multiply_block(self, s: Shared, mma, rAcc, tCrX, tCrW, block, first: bool = False) -> None:
        """The WGMMAs of one K block, counted over all tiles, once it is there."""
        stage = block % self.cfg.stages
        cute.arch.mbarrier_wait(s.full + stage, block // self.cfg.stages % 2)
        warpgroup.fence()
        for k in range(cute.size(tCrX, mode=[2])):
            tCrX_k, tCrW_k = tCrX[(None, None, k, stage)], tCrW[(None, None, k, stage)]
            cute.gemm(mma, rAcc, tCrX_k, tCrW_k, rAcc)
            if first:  # a run-time loop could not carry the change
                mma.set(warpgroup.Field.ACCUMULATE, True)
        warpgroup.commit_group()

    @cute.jit
    def release(self, s: Shared, tiles: Tiles, block: Int32) -> None:
        """Tell who loads that a block has been read; by tensor cores, and TMA writes there next."""
        c = self.cfg
        stage = s.free + block % c.stages
        if cutlass.const_expr(c.loaders > 1):
            lane = cute.arch.lane_idx()
            if lane < c.loaders:
                arrive_relaxed_at_peer(stage, self.loader(tiles, lane))
        else:
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive(stage)

    def leave(self) -> None:
        """Nothing."""

    def loader(self, tiles: Tiles, i: Int32) -> Int32:
        """The rank of the i-th CTA that loads parts of this one's x, itself too, or of its W."""
        c = self.cfg
        sharers = c.split_e if c.multicast else 1
        of_x = tiles.own(c) if sharers == 1 else tiles.k_part * c.split_e + i
        other = i - sharers  # team members but this one
        other = cutlass.select_(other >= tiles.member, other + 1, other)
        of_w = other * c.per_tile + tiles.own(c)
        return cutlass.select_(i < sharers, tiles.rank(c, of_x), of_w)

    def issue(self, s: Shared, tiles: Tiles, warp: int) -> None:
        """Nothing: there is no such warp."""

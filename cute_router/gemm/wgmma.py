"""Operands of WGMMA: how a tile of A (MMA-M) and one of B (MMA-N) lie in shared memory.

A warpgroup multiplies 64 rows of A with all of B's. Both are 128-byte swizzled, K innermost, as TMA
leaves them. Decode has W for A and x for B, prefill the other way round.
"""

from typing import Any

import cutlass.cute as cute
import cutlass.utils.hopper_helpers as sm90
from cutlass import BFloat16, Float32
from cutlass.cute.nvgpu import OperandMajorMode, cpasync
from cutlass.tensor_utils import LayoutEnum


class WgmmaOperands:
    """What mainloops of Hopper have in common."""

    cfg: Any
    tile: tuple[int, int, int]  # rows of A, rows of B, K

    def tiled_mma(self):
        """One WGMMA of 64 rows of A for each warpgroup."""
        rows_a, rows_b, _ = self.tile
        return sm90.make_trivial_tiled_mma(
            BFloat16,
            BFloat16,
            OperandMajorMode.K,
            OperandMajorMode.K,
            Float32,
            (rows_a // 64, 1, 1),
            (64, rows_b),
        )

    def layouts(self):
        """Shared-memory layouts of the A tile and the B tile, (rows, K, STAGE)."""
        stages = self.cfg.stages
        return (
            sm90.make_smem_layout_a(LayoutEnum.ROW_MAJOR, self.tile, BFloat16, stages),
            sm90.make_smem_layout_b(LayoutEnum.ROW_MAJOR, self.tile, BFloat16, stages),
        )

    def tma_atoms(self, mA: cute.Tensor, mB: cute.Tensor, layout_a, layout_b):
        """(atom, coordinate tensor) for A and for B."""
        op, (rows_a, rows_b, depth) = cpasync.CopyBulkTensorTileG2SOp(), self.tile
        stage_a, stage_b = (cute.select(layout, mode=[0, 1]) for layout in (layout_a, layout_b))
        return (
            cpasync.make_tiled_tma_atom(op, mA, stage_a, (rows_a, depth)),
            cpasync.make_tiled_tma_atom(op, mB, stage_b, (rows_b, depth)),
        )

    def seen_by_tma(self, atoms, sA: cute.Tensor, sB: cute.Tensor, tile_a, tile_b):
        """A tile of A and one of B, or all for None, as TMA sees them: shared (TMA, STAGE), global
        (TMA, K_BLOCK) or (TMA, TILE, K_BLOCK)."""
        (atom_a, mA), (atom_b, mB) = atoms
        rows_a, rows_b, depth = self.tile
        gA = cute.local_tile(mA, (rows_a, depth), (tile_a, None))  # (rows, K, ...)
        gB = cute.local_tile(mB, (rows_b, depth), (tile_b, None))
        return tuple(
            cpasync.tma_partition(
                atom, 0, cute.make_layout(1), cute.group_modes(s, 0, 2), cute.group_modes(g, 0, 2)
            )
            for atom, s, g in ((atom_a, sA, gA), (atom_b, sB, gB))
        )

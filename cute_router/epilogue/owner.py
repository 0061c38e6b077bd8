"""What an owner CTA has to decide."""

from typing import NamedTuple

from cutlass import Boolean, Int32

from cute_router.gemm.config import DecodeConfig


class Owner(NamedTuple):
    """The tokens of an owner CTA and its place among the expert tiles."""

    tid: Int32  # among the epilogue's threads
    tile: Int32  # which expert tile this CTA's cluster is
    first_token: Int32
    columns: Int32  # tokens from `first_token` on; at least one
    merging: Boolean  # whether the other tiles' results come here, or this one's go elsewhere

    def item(self, c: DecodeConfig, step: int) -> tuple[Int32, Int32, Int32]:
        """(expert of the tile, token column, part of the work) of this thread in pass `step`.

        A thread has the same expert in every pass; the column may be past `columns`.
        """
        index = step * (c.epilogue_threads // c.parts) + self.tid // c.parts
        return index % c.tile_experts, index // c.tile_experts, self.tid % c.parts

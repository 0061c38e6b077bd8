"""The sum over a cluster's K slices, by distributed shared memory, in a fixed order.

    L[e, n] = sum over ranks r = 0 .. S-1 of  partial_r[e, n]

CTA r of the cluster owns `owned` token columns. Every CTA sends its partial sums of a column to the
column's owner with st.async, which counts its bytes on the owner's barrier; the owner adds the S
partials as a tree over r, the same for every column: deterministic, and no CTA waits for a CTA to
which it does not send. Only columns that hold tokens are sent.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from cute_router.gemm.config import SKEW, DecodeConfig
from cute_router.gemm.ptx import wait_cluster


class SplitK:
    """Reduce-scatter of accumulators by token column over the CTAs of a cluster."""

    def __init__(self, config: DecodeConfig, vector: int):
        self.cfg = config
        self.vector = min(config.owned, vector)  # columns of one st.async, and of one sum

    def layout(self) -> cute.Layout:
        """Partial sums as an owner keeps them, (column, expert, rank).

        Ranks are half a line of banks apart, so that two lanes that share a sum do not collide.
        """
        c = self.cfg
        shape = (c.owned, c.tile_experts, c.split_k)
        return cute.make_layout(shape, stride=(1, c.owned, c.owned * c.tile_experts + SKEW))

    @cute.jit
    def expect(self, barrier: cute.Pointer, columns: Int32) -> None:
        """Arm an owner's barrier for the bytes that `columns` (> 0) of its columns will bring."""
        c = self.cfg
        sent = (columns + self.vector - 1) // self.vector * self.vector
        cute.arch.mbarrier_arrive_and_expect_tx(barrier, sent * (c.split_k * c.tile_experts * 4))

    @cute.jit
    def scatter(
        self,
        rAcc: cute.Tensor,
        coords: cute.Tensor,
        sPart: cute.Tensor,
        barrier: cute.Pointer,
        rank: Int32,
        columns: Int32,
    ) -> None:
        """Send the accumulators of the tile's first `columns` columns to their owners."""
        c, v = self.cfg, self.vector
        for i in cutlass.range_constexpr(cute.size(rAcc) // v):
            expert, token = coords[v * i]
            if token < columns:
                offset = cute.crd2idx((token % c.owned, expert, rank), sPart.layout)
                slot = sPart.iterator + cute.assume(offset, divby=v)
                words = tuple(rAcc[v * i + j].bitcast(Int32) for j in range(v))
                payload = words if cutlass.const_expr(v > 1) else words[0]
                owner = token // c.owned
                cute.arch.store_async_dsmem(slot.align(4 * v), payload, barrier, owner)

    @cute.jit
    def wait(self, barrier: cute.Pointer) -> None:
        """Wait until every partial sum of this owner's columns is here."""
        wait_cluster(barrier, 0)

    def sum(self, sPart: cute.Tensor, column: Int32, expert: Int32, part: Int32, parts: int):
        """One logit: the S partial sums, added as a balanced tree over the ranks.

        `parts` (1 or 2) adjacent lanes share the work; both get the result.
        """
        ranks = range(0, self.cfg.split_k, parts)
        terms = [sPart[column, expert, rank + part] for rank in ranks]
        while len(terms) > 1:
            terms = [a + b for a, b in zip(terms[::2], terms[1::2], strict=True)]
        total = terms[0]
        if parts == 2:
            total = total + cute.arch.shuffle_sync_bfly(total, offset=1)
        return total

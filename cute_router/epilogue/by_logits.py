"""Choice by all logits of a token: what softmax (a row's sum) and expert groups need.

The owner CTA that merges gathers every logit of its tokens in shared memory; then one warp a token
does the router's whole step (`epilogue.row`).
"""

from typing import Any, NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Uint32

from cute_router.epilogue.outputs import Outputs, bias_of_row, is_token, put_biases
from cute_router.epilogue.owner import Owner
from cute_router.epilogue.row import route_row
from cute_router.gemm.config import DecodeConfig
from cute_router.gemm.exchange import PACKET, packet, receive, send, word
from cute_router.topk.config import WARP


class Logits(NamedTuple):
    """Shared memory of the choice; c runs over the token columns of this CTA."""

    sLogits: cute.Tensor  # (E padded to whole tiles, c)
    sKeys: cute.Tensor  # (E padded to whole tiles, c) a warp's workspace
    sBias: cute.Tensor  # (E padded to whole tiles), or (the same, 2) with a second one


class ByLogits:
    """For every scoring and grouping."""

    def __init__(self, config: DecodeConfig, barrier):
        self.cfg = config
        self.barrier = barrier  # of the epilogue's threads
        self.padded = config.expert_tiles * config.tile_experts
        self.per_tile = config.tile_experts // PACKET  # packets of a tile's logits

    def allocate(self, smem) -> Logits:
        """Shared memory for the choice."""
        matrix = cute.make_layout((self.padded, self.cfg.owned))
        biases = cute.make_layout((self.padded, 2) if self.cfg.extras.second_bias else self.padded)
        return Logits(
            smem.allocate_tensor(Float32, matrix, 16),
            smem.allocate_tensor(Uint32, matrix, 16),
            smem.allocate_tensor(Float32, biases, 16),
        )

    @cute.jit
    def prepare(self, s: Logits, mBias: Any, tid: Int32, out: Outputs) -> None:
        """All biases to shared memory."""
        E, threads = self.cfg.spec.num_experts, self.cfg.epilogue_threads
        if cutlass.const_expr(self.cfg.extras.second_bias):
            put_biases(s.sBias, mBias, out.extra, E, tid, threads)
        else:
            expert = tid
            while expert < E:
                s.sBias[expert] = Float32(0.0)
                if cutlass.const_expr(mBias is not None):
                    s.sBias[expert] = mBias[expert]
                expert = expert + threads

    def look(self, s: Any, o: Owner, out: Outputs) -> None:
        """Nothing: a warp reads what extras say of its token when it comes to it."""

    @cute.jit
    def put(
        self, s: Logits, step: int, o: Owner, expert: Int32, column: Int32, logit, biases
    ) -> None:
        """Take in the logit of this thread's pass `step`: one of the tile's experts, one column."""
        s.sLogits[o.tile * self.cfg.tile_experts + expert, column] = logit

    @cute.jit
    def finish(self, s: Logits, mScratch: cute.Tensor, o: Owner, out: Outputs) -> None:
        """Exchange, choose, weigh. All logits are in and the threads have met."""
        c = self.cfg
        if o.merging:
            if cutlass.const_expr(c.expert_tiles > 1):
                self.collect(s, mScratch, o)
            self.barrier.arrive_and_wait()
            lane = cute.arch.lane_idx()
            column = o.tid // WARP
            while column < o.columns:
                token = o.first_token + column
                has_bias = c.spec.has_bias or c.extras.second_bias
                route_row(
                    s.sLogits[(None, column)],
                    bias_of_row(s.sBias, out, token) if cutlass.const_expr(has_bias) else None,
                    s.sKeys[(None, column)],
                    out.of_row(token),
                    is_token(out, token),
                    lane,
                    c.spec,
                )
                column = column + c.epilogue_threads // WARP
        else:
            self.send(s, mScratch, o)

    @cute.jit
    def send(self, s: Logits, mScratch: cute.Tensor, o: Owner) -> None:
        """Send this tile's logits, four to a packet."""
        c = self.cfg
        words = cute.make_rmem_tensor(PACKET, Int32)
        item = o.tid
        while item < self.per_tile * o.columns:
            slot, column = o.tile * self.per_tile + item % self.per_tile, item // self.per_tile
            for i in cutlass.range_constexpr(PACKET):
                words[i] = word(s.sLogits[slot * PACKET + i, column])
            to = packet(mScratch, self.index(o, column, slot))
            send(to, words[0], words[1], words[2], words[3])
            item = item + c.epilogue_threads

    @cute.jit
    def collect(self, s: Logits, mScratch: cute.Tensor, o: Owner) -> None:
        """Receive the logits of the other tiles."""
        c = self.cfg
        remote = (c.expert_tiles - 1) * self.per_tile
        words = cute.make_rmem_tensor(PACKET, Int32)
        item = o.tid
        while item < remote * o.columns:
            slot, column = item % remote, item // remote
            slot = cutlass.select_(slot >= o.tile * self.per_tile, slot + self.per_tile, slot)
            receive(packet(mScratch, self.index(o, column, slot)), words)
            for i in cutlass.range_constexpr(PACKET):
                s.sLogits[slot * PACKET + i, column] = words[i].bitcast(Float32)
            item = item + c.epilogue_threads

    def index(self, o: Owner, column: Int32, slot: Int32) -> Int32:
        """The number of a token's packet in the scratch."""
        return (o.first_token + column) * (self.padded // PACKET) + slot

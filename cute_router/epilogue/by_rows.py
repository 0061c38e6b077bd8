"""The choice of prefill: all logits of a token are in one CTA's shared memory.

    scorings of one logit      a few lanes to a token (`epilogue.by_threshold`); activations take
                               the place of logits
    softmax, expert groups,    a warp to a token (`epilogue.row`)
    tokens left in doubt

Where K was split, a logit comes as several partial sums. The lane that looks at it adds them, in
the order of the parts, and leaves the sum, or its activation, in the place of the first.
"""

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Uint32

from cute_router.epilogue.by_threshold import ByThreshold
from cute_router.epilogue.outputs import Outputs, bias_of_row, is_token, put_logits
from cute_router.epilogue.row import route_row
from cute_router.gemm.prefill_config import PrefillConfig
from cute_router.gemm.prefill_mainloop import Shared
from cute_router.topk.config import WARP
from cute_router.topk.ptx import lowest_bit, opaque
from cute_router.topk.staging import VECTOR_BYTES

BANKS = 32  # of shared memory, words that it gives at once


class ByRows:
    """Weights and ids of the tokens that a CTA owns."""

    def __init__(self, config: PrefillConfig):
        self.cfg = config
        self.lay = config.lay
        batch = 4 if self.lay.blocks <= 8 else 2  # of 16 to 32 logits; scores take registers too
        self.chooser = ByThreshold(config.spec, self.lay, batch)
        self.tokens = WARP // config.lanes  # of a warp

    @cute.jit
    def choose(self, s: Shared, sBias: Any, first_token: Int32, count: Int32, out: Outputs) -> None:
        """Route `count` owned tokens from `first_token` on; every warp takes some."""
        c, sLogits, sLists = self.cfg, s.sLogits, s.sLists
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        # What follows from a known lane would be kept in registers through the product.
        first, lane = warp * self.tokens, opaque(cute.arch.lane_idx())
        while first < count:
            if cutlass.const_expr(c.by_threshold):
                sList = sLists[None, lane // c.lanes, warp]
                doubts = self.route(sLogits, sBias, sList, first_token, first, count, lane, out)
            else:
                self.add(sLogits[None, first, None], lane)
                put_logits(out, first_token + first, sLogits[None, first, 0], lane, WARP)
                doubts = Int32(1)
            while doubts != 0:
                row = first + self.row(lowest_bit(doubts) // c.lanes)
                self.route_row(sLogits[None, row, 0], sBias, first_token + row, out)
                doubts = doubts & (doubts - 1)
            first = first + c.epilogue_threads // WARP * self.tokens
            cute.arch.sync_warp()  # others write next where lanes have read: the lists

    @cute.jit
    def route(
        self,
        sLogits: cute.Tensor,
        sBias: Any,
        sList: cute.Tensor,
        first_token: Int32,
        first: Int32,
        count: Int32,
        lane: Int32,
        out: Outputs,
    ) -> Int32:
        """Route the warp's tokens by a threshold; the bits of lanes whose token is in doubt."""
        c, lay = self.cfg, self.lay
        row, lane = first + self.row(lane // lay.lanes), lane % lay.lanes
        there = row < count  # lanes past the last token store nothing
        token = first_token + row
        source = cutlass.min(token, cute.size(out.mIds, mode=[0]) - 1)
        sBias, real = bias_of_row(sBias, out, source), is_token(out, source)
        sParts, sActs = sLogits[None, row, None], sLogits[None, row, 0]
        if cutlass.const_expr(c.extras.logits):
            self.add(sParts, lane)
            if there:
                put_logits(out, token, sActs, lane, lay.lanes)
            cute.arch.sync_warp()  # now activations may take their place
        parts = 1 if c.extras.logits else c.split_k

        rScores = self.chooser.scores(
            lambda block: self.take(sParts, parts, block, lane),
            None if sBias is None else lambda block: self.read(sBias, block, lane),
            lambda block, rActs: self.write(rActs, sActs, block, lane),
            lane,
        )
        choice = self.chooser.pick(rScores, sActs, sBias, sList, lane)
        doubtful = self.chooser.in_doubt(choice, lane, real)
        self.chooser.store(choice, sActs, out, token, lane, there and not doubtful, real)
        return cute.arch.vote_ballot_sync(doubtful and there and lane == 0)

    def row(self, i: Int32) -> Int32:
        """Which of its tokens the i-th lanes of a warp take.

        8 lanes load 128 bytes at once. Where these are of two tokens, their rows start 16 banks
        apart, of 32.
        """
        if self.cfg.lanes >= BANKS // 4:
            return i
        apart = BANKS // 2 // self.cfg.skew
        return i * apart % self.tokens + i * apart // self.tokens

    @cute.jit
    def add(self, sParts: cute.Tensor, lane: Int32) -> None:
        """Sum the K parts of a token in the place of the first. Every lane of the warp calls."""
        if cutlass.const_expr(self.cfg.split_k > 1):
            for block in cutlass.range_constexpr(self.lay.blocks):
                rLogits = self.take(sParts, self.cfg.split_k, block, lane)
                self.write(rLogits, sParts[None, 0], block, lane)
            cute.arch.sync_warp()

    def take(self, sParts: cute.Tensor, parts: int, block: int, lane: Int32) -> cute.Tensor:
        """The sums of the first `parts` of a lane's block; sParts: (expert, K part)."""
        rLogits = self.read(sParts[None, 0], block, lane)
        for part in range(1, parts):
            rLogits.store(rLogits.load() + self.read(sParts[None, part], block, lane).load())
        return rLogits

    def read(self, sRow: cute.Tensor, block: int, lane: Int32) -> cute.Tensor:
        """A lane's entries of a block; zeros past the end of the row."""
        run = self.lay.run
        rBlock = cute.make_rmem_tensor(self.lay.live(block), Float32)
        for part in range(self.lay.live(block) // run):
            first = self.lay.first(block, part, lane)
            rRun = cute.make_tensor(rBlock.iterator + part * run, cute.make_layout(run))
            self.load_run(sRow, first, rRun, self.lay.whole(block))
        return rBlock

    @cute.jit
    def load_run(
        self, sRow: cute.Tensor, first: Int32, rRun: cute.Tensor, whole: cutlass.Constexpr
    ) -> None:
        """The run from `first` on, if there is one."""
        if cutlass.const_expr(whole):
            rRun.store(self.run_at(sRow, first).load())
        else:
            rRun.fill(0.0)
            if first < self.cfg.padded:
                rRun.store(self.run_at(sRow, first).load())

    @cute.jit
    def write(
        self, rBlock: cute.Tensor, sRow: cute.Tensor, block: cutlass.Constexpr, lane: Int32
    ) -> None:
        """The reverse of `read`, which ends with the row."""
        run = self.lay.run
        for part in cutlass.range_constexpr(self.lay.live(block) // run):
            first = self.lay.first(block, part, lane)
            rRun = cute.make_tensor(rBlock.iterator + part * run, cute.make_layout(run))
            if cutlass.const_expr(self.lay.whole(block)) or first < self.cfg.padded:
                self.run_at(sRow, first).store(rRun.load())

    def run_at(self, sRow: cute.Tensor, first: Int32) -> cute.Tensor:
        """A run of a row, which is 16 bytes."""
        pointer = sRow.iterator.align(VECTOR_BYTES) + cute.assume(first, divby=self.lay.run)
        return cute.make_tensor(pointer, cute.make_layout(self.lay.run))

    @cute.jit
    def route_row(self, sRow: cute.Tensor, sBias: Any, token: Int32, out: Outputs) -> None:
        """Route one token by a warp. Its row is not needed afterwards: keys take its room."""
        sKeys = cute.make_tensor(cute.recast_ptr(sRow.iterator, dtype=Uint32), sRow.layout)
        route_row(
            cute.make_tensor(sRow.iterator, cute.make_layout(self.cfg.spec.num_experts)),
            bias_of_row(sBias, out, token),
            sKeys,
            out.of_row(token),
            is_token(out, token),
            cute.arch.lane_idx(),
            self.cfg.spec,
            activated=self.cfg.by_threshold,
        )

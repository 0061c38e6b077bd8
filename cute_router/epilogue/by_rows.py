"""The choice of prefill: all logits of a token are in one CTA's shared memory.

    scorings of one logit      a few lanes to a token (`epilogue.by_words`)
    softmax, expert groups,    a warp to a token (`epilogue.row`)
    tokens left in doubt

Where K was split, a logit comes as several partial sums. The lane that looks at it adds them, in
the order of the parts, and leaves the sum in the place of the first.
"""

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Uint32

from cute_router.epilogue.by_words import ByWords
from cute_router.epilogue.outputs import Outputs, bias_of_row, is_token, put_logits
from cute_router.epilogue.row import route_row
from cute_router.gemm.prefill_config import PrefillConfig
from cute_router.topk.config import BLOCK, WARP
from cute_router.topk.key import REMOVED
from cute_router.topk.staging import VECTOR_BYTES


class ByRows:
    """Weights and ids of the tokens that a CTA owns."""

    def __init__(self, config: PrefillConfig):
        self.cfg = config
        self.lay = config.lay
        self.words = ByWords(config.spec, config.lay)
        self.tokens = WARP // config.lanes  # of a warp

    @cute.jit
    def choose(
        self, sLogits: cute.Tensor, sBias: Any, first_token: Int32, count: Int32, out: Outputs
    ) -> None:
        """Route `count` owned tokens from `first_token` on; every warp takes some."""
        c = self.cfg
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        first, lane = warp * self.tokens, cute.arch.lane_idx()
        while first < count:
            if cutlass.const_expr(c.by_words):
                doubts = self.route(sLogits, sBias, first_token, first, count, out)
            else:
                self.add(sLogits, first)
                put_logits(out, first_token + first, sLogits[None, first, 0], lane, WARP)
                doubts = Int32(1)
            while doubts != 0:
                row = first + cute.arch.popc((doubts & -doubts) - 1) // c.lanes
                self.route_row(sLogits[None, row, 0], sBias, first_token + row, out)
                doubts = doubts & (doubts - 1)
            first = first + c.epilogue_threads // WARP * self.tokens

    @cute.jit
    def route(
        self,
        sLogits: cute.Tensor,
        sBias: Any,
        first_token: Int32,
        first: Int32,
        count: Int32,
        out: Outputs,
    ) -> Int32:
        """Route the warp's tokens by words; the bits of lanes whose token is left in doubt."""
        lay = self.lay
        lane = cute.arch.lane_idx() % lay.lanes
        row = first + cute.arch.lane_idx() // lay.lanes
        there = row < count  # lanes past the last token store nothing
        token = first_token + row
        source = cutlass.min(token, cute.size(out.mIds, mode=[0]) - 1)
        sBias, real = bias_of_row(sBias, out, source), is_token(out, source)

        def keys(block):
            # A large k has the lanes sort more than there is.
            if cutlass.const_expr(lay.offset(block, 0) >= self.cfg.padded):
                return [Uint32(REMOVED)] * BLOCK
            rLogits = self.take(sLogits[None, row, None], block, lane)
            rBias = None if sBias is None else self.read(sBias, block, lane)
            return self.words.keys(block, lane, rLogits, rBias)

        pick = lay.pick(keys, lane)
        cute.arch.sync_warp()  # the sums of all lanes are in place
        self.words.store(
            pick.words,
            sLogits[None, row, 0],
            sBias,
            out,
            token,
            lane,
            there and not pick.doubtful,
            real,
        )
        if there:
            put_logits(out, token, sLogits[None, row, 0], lane, lay.lanes)
        return cute.arch.vote_ballot_sync(pick.doubtful and there and lane == 0)

    @cute.jit
    def add(self, sLogits: cute.Tensor, row: Int32) -> None:
        """Sum the K parts of one token. One warp calls."""
        if cutlass.const_expr(self.cfg.split_k > 1):
            for block in cutlass.range_constexpr(-(-self.cfg.padded // (BLOCK * WARP))):
                self.take(sLogits[None, row, None], block, cute.arch.lane_idx())
            cute.arch.sync_warp()

    def take(self, sParts: cute.Tensor, block: int, lane: Int32) -> cute.Tensor:
        """A lane's logits of a block; sParts: (expert, K part)."""
        rLogits = self.read(sParts[None, 0], block, lane)
        for part in range(1, self.cfg.split_k):
            rLogits.store(rLogits.load() + self.read(sParts[None, part], block, lane).load())
        if self.cfg.split_k > 1:
            self.write(rLogits, sParts[None, 0], block, lane)
        return rLogits

    def read(self, sRow: cute.Tensor, block: int, lane: Int32) -> cute.Tensor:
        """A lane's entries of a block; zeros past the end of the row."""
        run = self.lay.run
        rBlock = cute.make_rmem_tensor(BLOCK, Float32)
        for part in range(BLOCK // run):
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
        for part in cutlass.range_constexpr(BLOCK // run):
            first = self.lay.first(block, part, lane)
            rRun = cute.make_tensor(rBlock.iterator + part * run, cute.make_layout(run))
            if first < self.cfg.padded:
                self.run_at(sRow, first).store(rRun.load())

    def run_at(self, sRow: cute.Tensor, first: Int32) -> cute.Tensor:
        """A run of a row, which is 16 bytes."""
        pointer = (sRow.iterator + first).align(VECTOR_BYTES)
        return cute.make_tensor(pointer, cute.make_layout(self.lay.run))

    @cute.jit
    def route_row(self, sRow: cute.Tensor, sBias: Any, token: Int32, out: Outputs) -> None:
        """Route one token by a warp. Its logits are not needed afterwards: keys take their room."""
        sKeys = cute.make_tensor(cute.recast_ptr(sRow.iterator, dtype=Uint32), sRow.layout)
        route_row(
            cute.make_tensor(sRow.iterator, cute.make_layout(self.cfg.spec.num_experts)),
            bias_of_row(sBias, out, token),
            sKeys,
            out.of_row(token),
            is_token(out, token),
            cute.arch.lane_idx(),
            self.cfg.spec,
        )

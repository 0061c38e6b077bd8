"""The choice of prefill from short lists: what may be among a token's k best, of every CTA's experts.

A few lanes to a token. Each has some entries (`epilogue.shortlist`) of every list; the best of all
is found and taken out, k times: exact for any data.
"""

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Uint32

from cute_router.epilogue.outputs import Outputs, is_token
from cute_router.epilogue.scoring import with_bias
from cute_router.epilogue.shortlist import NOBODY
from cute_router.epilogue.weights import put_choice
from cute_router.gemm.prefill_config import PrefillConfig
from cute_router.gemm.prefill_mainloop import Shared
from cute_router.topk.config import LIST, WARP
from cute_router.topk.key import REMOVED, key
from cute_router.topk.network import greater
from cute_router.topk.ptx import opaque
from cute_router.topk.rounds import take_best_of
from cute_router.topk.staging import VECTOR_BYTES


class ByLists:
    """Weights and ids of the tokens that a CTA owns."""

    def __init__(self, config: PrefillConfig):
        self.cfg = config
        self.lanes = config.lanes
        self.share = LIST // self.lanes  # entries of a list that a lane looks at
        self.slots = -(-config.spec.top_k // self.lanes)  # places of the result that a lane has

    @cute.jit
    def choose(
        self, s: Shared, sBias: Any, first_token: Int32, count: Int32, out: Outputs
    ) -> None:
        """Route `count` owned tokens from `first_token` on; every warp takes some."""
        c, tokens = self.cfg, WARP // self.lanes
        # What follows from a known lane would be kept in registers through the product.
        first, lane = opaque(cute.arch.warp_idx()) * tokens, opaque(cute.arch.lane_idx())
        while first < count:
            row = first + lane // self.lanes
            there = row < count  # lanes past the last token do what its own do, and store nothing
            row = cutlass.min(row, count - 1)
            self.route(s.sShort, sBias, first_token, row, there, lane % self.lanes, out)
            first = first + c.epilogue_threads // WARP * tokens

    @cute.jit
    def route(
        self, sShort: cute.Tensor, sBias: Any, first_token: Int32, row: Int32, there, lane, out
    ) -> None:
        """Route a warp's tokens, of which each is `row` to its lanes."""
        spec, lanes = self.cfg.spec, self.lanes
        token = first_token + row
        real = is_token(out, token)
        rActs, experts = self.entries(sShort, row, lane)
        rKeys = cute.make_rmem_tensor(len(experts), Uint32)
        for i in cutlass.range_constexpr(len(experts)):
            score = rActs[i]
            if cutlass.const_expr(sBias is not None):
                score = with_bias(score, sBias[cutlass.max(experts[i], 0)])
            rKeys[i] = cutlass.select_(experts[i] == NOBODY, Uint32(REMOVED), key(score))

        chosen = [Int32(0)] * self.slots
        rChosen = cute.make_rmem_tensor(self.slots, Float32)
        rChosen.fill(0.0)
        for place in cutlass.range_constexpr(spec.top_k):
            best = take_best_of(rKeys, experts, lanes)
            bits = Uint32(0)
            for i in cutlass.range_constexpr(len(experts)):
                bits = cutlass.select_(experts[i] == best, rActs[i].bitcast(Uint32), bits)
            for bit in cutlass.range_constexpr(lanes.bit_length() - 1):
                bits = greater(bits, cute.arch.shuffle_sync_bfly(bits, offset=1 << bit))
            slot, mine = place // lanes, lane == place % lanes
            chosen[slot] = Int32(cutlass.select_(mine, best, chosen[slot]))
            rChosen[slot] = cutlass.select_(mine, bits.bitcast(Float32), rChosen[slot])
        put_choice(chosen, rChosen, spec, out, token, lane, lanes, there, real)

    def entries(
        self, sShort: cute.Tensor, row: Int32, lane: Int32
    ) -> tuple[cute.Tensor, list[Int32]]:
        """(activation, expert) of this lane's share of all lists of a token."""
        share, parts = self.share, self.cfg.split_e
        rActs = cute.make_rmem_tensor(parts * share, Float32)
        experts = []
        rWords = cute.make_rmem_tensor(2 * share, Int32)
        for part in range(parts):
            start = cute.crd2idx((2 * share * lane, part, row), sShort.layout)
            source = sShort.iterator.align(VECTOR_BYTES) + cute.assume(start, divby=2 * share)
            rWords.store(cute.make_tensor(source, cute.make_layout(2 * share)).load())
            for i in range(share):
                rActs[part * share + i] = rWords[2 * i].bitcast(Float32)
                experts.append(Int32(rWords[2 * i + 1]))
        return rActs, experts

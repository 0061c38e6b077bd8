"""The choice of prefill from short lists: what may be among a token's k best, by every CTA's word.

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
from cute_router.topk.ptx import opaque
from cute_router.topk.rounds import take_best_of
from cute_router.topk.staging import VECTOR_BYTES


class ByLists:
    """Weights and ids of the tokens that a CTA owns."""

    def __init__(self, config: PrefillConfig):
        self.cfg = config
        self.lanes = config.lanes
        self.share = LIST // self.lanes  # entries of a list that a lane looks at
        self.places = LIST * config.split_e  # entries of a token's lists
        self.slots = -(-config.spec.top_k // self.lanes)  # places of the result that a lane has

    @cute.jit
    def choose(self, s: Shared, sBias: Any, first_token: Int32, count: Int32, out: Outputs) -> None:
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
        rKeys, names = self.entries(sShort, sBias, row, lane)
        rNames = cute.make_rmem_tensor(self.slots, Uint32)
        rNames.fill(0)
        for place in cutlass.range(spec.top_k, unroll=1):
            best = take_best_of(rKeys, names, lanes)
            for slot in cutlass.range_constexpr(self.slots):
                mine = lane + slot * lanes == place
                rNames[slot] = cutlass.select_(mine, best, rNames[slot])
        rChosen = cute.make_rmem_tensor(self.slots, Float32)
        for slot in cutlass.range_constexpr(self.slots):
            place = rNames[slot] % self.places
            at = 2 * Int32(place % LIST), Int32(place // LIST), row
            rChosen[slot] = sShort[at].bitcast(Float32)
        chosen = [Int32(rNames[slot] // self.places) for slot in range(self.slots)]
        put_choice(chosen, rChosen, spec, out, token, lane, lanes, there, real)

    def entries(
        self, sShort: cute.Tensor, sBias: Any, row: Int32, lane: Int32
    ) -> tuple[cute.Tensor, list[Int32]]:
        """(key, name) of this lane's share of all lists of a token.

        A name is the expert and where in the lists it is. Of NOBODY it is more than any other, as
        an unsigned number.
        """
        share, parts = self.share, self.cfg.split_e
        rKeys = cute.make_rmem_tensor(parts * share, Uint32)
        names = []
        rWords = cute.make_rmem_tensor(2 * share, Int32)
        for part in range(parts):
            start = cute.crd2idx((2 * share * lane, part, row), sShort.layout)
            source = sShort.iterator.align(VECTOR_BYTES) + cute.assume(start, divby=2 * share)
            rWords.store(cute.make_tensor(source, cute.make_layout(2 * share)).load())
            for i in range(share):
                score, expert = rWords[2 * i].bitcast(Float32), rWords[2 * i + 1]
                if sBias is not None:
                    score = with_bias(score, sBias[cutlass.max(expert, 0)])
                k = cutlass.select_(expert == NOBODY, Uint32(REMOVED), key(score))
                rKeys[part * share + i] = k
                names.append(Uint32(expert * self.places + part * LIST + lane * share + i))
        return rKeys, names

"""The choice of prefill from short lists: what may be among a token's k best, by every CTA's word.

A few lanes to a token. Each has some entries (`epilogue.shortlist`) of every list; the best of all
is found and taken out, k times: exact for any data.
"""

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Uint32

from cute_router.epilogue.outputs import Outputs, is_token
from cute_router.epilogue.scoring import score_of
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
        self.at_once = config.epilogue_threads // self.lanes  # tokens that all warps look at
        self.batch = min(2, -(-config.owned // self.at_once))  # of those, that a lane looks at

    @cute.jit
    def choose(self, s: Shared, sBias: Any, first_token: Int32, count: Int32, out: Outputs) -> None:
        """Route `count` owned tokens from `first_token` on; every warp takes some."""
        # What follows from a known lane would be kept in registers through the product.
        lane, tokens = opaque(cute.arch.lane_idx()), WARP // self.lanes
        first = opaque(cute.arch.warp_idx()) * tokens
        while first < count:
            rows = [first + lane // self.lanes + i * self.at_once for i in range(self.batch)]
            self.route(s.sShort, sBias, first_token, count, rows, lane % self.lanes, out)
            first = first + self.batch * self.at_once

    @cute.jit
    def route(
        self,
        sShort: cute.Tensor,
        sBias: Any,
        first_token: Int32,
        count: Int32,
        rows: list[Int32],
        lane: Int32,
        out: Outputs,
    ) -> None:
        """Route tokens, whose rounds hide each other's latency. Lanes past the last one do what its
        own do, and store nothing."""
        spec, lanes = self.cfg.spec, self.lanes
        theirs = [cutlass.min(row, count - 1) for row in rows]
        real = [is_token(out, first_token + row) for row in theirs]
        entries = [self.entries(sShort, sBias, row, lane) for row in theirs]
        rNames = cute.make_rmem_tensor((self.slots, len(rows)), Uint32)
        rNames.fill(0)
        for place in cutlass.range(spec.top_k, unroll=1):
            for i in cutlass.range_constexpr(len(rows)):
                best = take_best_of(*entries[i], lanes)
                for slot in cutlass.range_constexpr(self.slots):
                    mine = lane + slot * lanes == place
                    rNames[slot, i] = cutlass.select_(mine, best, rNames[slot, i])
        for i in cutlass.range_constexpr(len(rows)):
            experts, rActs = self.named(rNames[None, i], sShort[None, None, theirs[i]])
            there = rows[i] < count
            token = first_token + theirs[i]
            put_choice(experts, rActs, spec, out, token, lane, lanes, there, real[i])

    def named(self, rNames: cute.Tensor, sLists: cute.Tensor) -> tuple[list[Int32], cute.Tensor]:
        """Experts, and their activations, by their names in a token's lists."""
        rActs = cute.make_rmem_tensor(self.slots, Float32)
        for slot in range(self.slots):
            place = rNames[slot] % self.places
            rActs[slot] = sLists[2 * Int32(place % LIST), Int32(place // LIST)].bitcast(Float32)
        return [Int32(rNames[slot] // self.places) for slot in range(self.slots)], rActs

    def entries(
        self, sShort: cute.Tensor, sBias: Any, row: Int32, lane: Int32
    ) -> tuple[cute.Tensor, list[Uint32]]:
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
                activation, expert = rWords[2 * i].bitcast(Float32), rWords[2 * i + 1]
                score = score_of(activation, sBias, cutlass.max(expert, 0))
                k = cutlass.select_(expert == NOBODY, Uint32(REMOVED), key(score))
                rKeys[part * share + i] = k
                names.append(Uint32(expert * self.places + part * LIST + lane * share + i))
        return rKeys, names

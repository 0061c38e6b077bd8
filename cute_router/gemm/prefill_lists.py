"""The exchange of short lists: a CTA looks at its own experts before it sends anything.

    (activation, expert) x LIST, part of E, owned token

Threads that hold sums of a token make its list (`epilogue.shortlist`), and each sends its share.
"""

import cutlass
import cutlass.cute as cute
import cutlass.pipeline as pipeline
from cutlass import Float32, Int32

from cute_router.epilogue.shortlist import Entries, Row, Shortlist
from cute_router.gemm.prefill_config import PrefillConfig
from cute_router.gemm.prefill_exchange import Exchange
from cute_router.gemm.prefill_mainloop import PrefillMainloop, Shared, Start, Tiles
from cute_router.gemm.ptx import at_peer, store_async
from cute_router.topk.ptx import opaque
from cute_router.topk.staging import VECTOR_BYTES

ROWS_APART = 8  # tokens of a thread, of WGMMA's accumulators
PAIR = 4  # words of two entries, which are stored at once


class ListExchange(Exchange):
    """Short lists, of sums that need no other CTA's."""

    def __init__(self, config: PrefillConfig, mainloop: PrefillMainloop, meet: pipeline.NamedBarrier):
        super().__init__(config, mainloop, meet)
        c = config
        ragged = c.padded > c.spec.num_experts
        self.shortlist = Shortlist(c.spec, c.tile_experts, c.lanes, self.vector, ragged)

    @cute.jit
    def send(
        self, s: Shared, tiles: Tiles, turn: Int32, rAcc: cute.Tensor, at: list[Start]
    ) -> None:
        """Send the lists of a thread's tokens."""
        c = self.cfg
        lane, warp = opaque(cute.arch.lane_idx()), opaque(cute.arch.warp_idx())
        sDrafts = s.sDrafts[None, None, warp]
        end = tiles.tokens - (tiles.first + turn * tiles.step) * c.tile_tokens  # of the tile
        sBias = s.sBias if cutlass.const_expr(c.spec.has_bias) else None
        # A loop at run time: once the code is as much as the instruction cache likes.
        rLogits = self.logits(rAcc, 0)
        for row in cutlass.range(self.rows, unroll=1):
            token, expert = at[0]
            token = token + row * ROWS_APART
            first = tiles.e_part * c.tile_experts + expert
            of_row = Row(rLogits, first, lane % c.lanes, token < end)
            entries = self.shortlist.find(of_row, sBias, sDrafts)
            self.send_share(s, tiles, token, lane % c.lanes, entries)
            rLogits.store(self.logits(rAcc, self.rows - 1).load())

    def logits(self, rAcc: cute.Tensor, row: int) -> cute.Tensor:
        """(ENTRY) the sums of one of a thread's tokens."""
        v = self.vector
        rLogits = cute.make_rmem_tensor(self.shortlist.entries, Float32)
        for e in range(self.shortlist.entries):
            rLogits[e] = rAcc[(e // v * self.rows + row) * v + e % v]
        return rLogits

    @cute.jit
    def send_share(
        self,
        s: Shared,
        tiles: Tiles,
        token: Int32,
        lane: Int32,
        entries: Entries,
    ) -> None:
        """A lane's share of a list to the token's owner."""
        c, owner = self.cfg, token // self.cfg.owned
        start = (2 * self.shortlist.share * lane, tiles.e_part, token % c.owned)
        place = cute.assume(cute.crd2idx(start, s.sShort.layout), divby=PAIR)
        slot = (s.sShort.iterator + place).align(VECTOR_BYTES)
        words = []
        for i in cutlass.range_constexpr(self.shortlist.share):
            words += [entries.rActs[i].bitcast(Int32), entries.rExperts[i]]
        if cutlass.const_expr(not c.stores_own):
            self.store_async(s, slot, owner, words)
        elif cutlass.const_expr(c.cluster == 1) or owner == tiles.rank:
            self.store(slot, words)
        else:
            self.store_async(s, slot, owner, words)

    def store(self, slot: cute.Pointer, words: list[Int32]) -> None:
        """Store words to this CTA's own memory."""
        rWords = cute.make_rmem_tensor(len(words), Int32)
        for i, word in enumerate(words):
            rWords[i] = word
        cute.make_tensor(slot, cute.make_layout(len(words))).store(rWords.load())

    def store_async(
        self, s: Shared, slot: cute.Pointer, owner: Int32, words: list[Int32]
    ) -> None:
        """Store them to their owner's."""
        address, barrier = at_peer(slot, owner), at_peer(s.part, owner)
        for i in range(0, len(words), PAIR):
            store_async(address + 4 * i, tuple(words[i : i + PAIR]), barrier)

"""The exchange of short lists: a CTA looks at its own experts before it sends anything.

    (activation, expert) x LIST, part of E, owned token

Threads that hold sums of a token make its list (`epilogue.shortlist`), and each sends its share.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32
from cutlass.pipeline import NamedBarrier

from cute_router.epilogue.outputs import is_token
from cute_router.epilogue.shortlist import Entries, Row, Shortlist
from cute_router.gemm.prefill_config import PrefillConfig
from cute_router.gemm.prefill_exchange import Exchange
from cute_router.gemm.prefill_mainloop import Pieces, PrefillMainloop, Shared, Tiles
from cute_router.gemm.ptx import at_peer, store_async
from cute_router.topk.ptx import opaque
from cute_router.topk.staging import VECTOR_BYTES

ROWS_APART = 8  # tokens of a thread, of WGMMA's accumulators
PAIR = 4  # words of two entries, which are stored at once


class ListExchange(Exchange):
    """Short lists, of sums that need no other CTA's."""

    def __init__(self, config: PrefillConfig, mainloop: PrefillMainloop, meet: NamedBarrier):
        super().__init__(config, mainloop, meet)
        c = config
        self.shortlist = Shortlist(
            c.spec,
            c.tile_experts,
            c.sum_lanes,
            run=self.vector,
            pieces=mainloop.pieces,
            ragged=c.padded > c.spec.num_experts,
        )

    @cute.jit
    def send(self, s: Shared, tiles: Tiles, turn: Int32, pieces: Pieces) -> None:
        """Send the lists of a thread's tokens."""
        c = self.cfg
        # What follows from a known lane would be kept in registers through the product.
        lane, warp = opaque(cute.arch.lane_idx()) % c.sum_lanes, opaque(cute.arch.warp_idx())
        sDrafts = s.sDrafts[None, None, warp]
        tile = (tiles.first + turn * tiles.step) * c.tile_tokens
        sBias = s.sBias if cutlass.const_expr(c.spec.has_bias) else None
        token, expert = pieces.load(0)[1][0]
        first = tiles.e_part * c.tile_experts + expert
        if cutlass.const_expr(self.rows == 1):
            wanted = self.wanted(tiles, tile + token)
            row = Row(lambda piece: pieces.load(piece)[0], first, lane, wanted)
            self.send_share(s, tiles, token, lane, self.shortlist.find(row, sBias, sDrafts))
        else:
            # A loop at run time: once the code is as much as the instruction cache likes.
            rSums, _ = pieces.load(0)
            rLogits = self.tokens(rSums, 0)
            for i in cutlass.range(self.rows, unroll=1):
                token_i = token + i * ROWS_APART
                wanted = self.wanted(tiles, tile + token_i)
                row = Row(lambda _: rLogits, first, lane, wanted)
                self.send_share(s, tiles, token_i, lane, self.shortlist.find(row, sBias, sDrafts))
                rLogits.store(self.tokens(rSums, 1).load())

    @cute.jit
    def wanted(self, tiles: Tiles, row: Int32) -> Boolean:
        """Whether a row of x is a token."""
        N = cute.size(tiles.out.mIds, mode=[0])
        real = is_token(tiles.out, cutlass.min(row, N - 1))
        wanted = row < N
        if cutlass.const_expr(real is not None):
            wanted = wanted and real
        return wanted

    def tokens(self, rSums: cute.Tensor, i: int) -> cute.Tensor:
        """(ENTRY) the sums of one of a thread's tokens."""
        v, size = self.vector, cute.size(rSums) // self.rows
        rLogits = cute.make_rmem_tensor(size, Float32)
        for e in range(size):
            rLogits[e] = rSums[(e // v * self.rows + i) * v + e % v]
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

    def store_async(self, s: Shared, slot: cute.Pointer, owner: Int32, words: list[Int32]) -> None:
        """Store them to their owner's."""
        address, barrier = at_peer(slot, owner), at_peer(s.part, owner)
        for i in range(0, len(words), PAIR):
            store_async(address + 4 * i, tuple(words[i : i + PAIR]), barrier)

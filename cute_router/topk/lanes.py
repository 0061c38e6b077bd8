"""The k best entries of a row, by a few lanes of a warp that hold many entries each in registers.

    word = the upper bits of an entry's key, then the entry's index, inverted

    lane   blocks of 8 entries -> words -> sorted, W at a time -> the W best so far, sorted
    row    lanes merge their W best with a neighbour's, then with one twice as far, and so on:
           all end up with the same

Words order as entries do, (key descending, index ascending), except where keys differ only in bits
that had to make room for the index. That is looked for afterwards, and put right:

    among the chosen           `places` ranks them by their whole keys
    between chosen and others  `Pick.doubtful`: the row is chosen again in another way

Keys of 16-bit floats have no such bits.
"""

from collections.abc import Callable
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, Uint32

from cute_router.topk.block import BLOCK
from cute_router.topk.network import best_half, best_of_rest, greater, sort

FLIGHT = 8  # blocks whose reads are under way at once


class Pick(NamedTuple):
    """The best entries of a row; the same in all its lanes."""

    words: list  # of the k best and of what else the network holds, best first
    doubtful: Boolean  # whether the k-th may be no better than one that was left out


class Lanes:
    """How a row of `length` entries lies on `lanes` lanes, a power of two."""

    def __init__(self, length: int, top_k: int, lanes: int, exact: bool):
        self.top_k = top_k
        self.lanes = lanes
        self.exact = exact  # whether words hold all of a key that can differ
        self.width = max(BLOCK, 1 << (top_k - 1).bit_length())  # W
        per_sort = self.width // BLOCK
        self.blocks = -(-length // (BLOCK * lanes * per_sort)) * per_sort  # of a lane
        self.low = (1 << (BLOCK * self.blocks * lanes - 1).bit_length()) - 1  # a word's index
        self.slots = -(-top_k // lanes)  # places of the result that a lane writes

    def first(self, block: int, lane: Int32) -> Int32:
        """The first entry of a lane's block."""
        return lane * BLOCK + block * BLOCK * self.lanes

    def pick(self, fetch: Callable, keys: Callable, lane: Int32) -> Pick:
        """The best words of a row. `fetch(block)` reads, `keys(read, block)` gives 8 keys.

        Every lane of the warp calls; `lane` counts within the row.
        """
        best, rest = None, Uint32(0)
        pending = []
        for block in range(self.blocks):
            if block % FLIGHT == 0:
                reads = [fetch(b) for b in range(block, min(block + FLIGHT, self.blocks))]
            for i, key in enumerate(keys(reads[block % FLIGHT], block)):
                code = self.low ^ (block * BLOCK * self.lanes + i)  # the lane comes in below
                pending.append((key & Uint32(~self.low & 0xFFFFFFFF)) | Uint32(code))
            if len(pending) == self.width:
                batch, pending = sort(pending), []
                if best is None:
                    best = batch
                else:
                    best, rest = self._merge(best, batch, rest)
        best = [word ^ Uint32(lane * BLOCK) for word in best]
        offset = 1
        while offset < self.lanes:
            theirs = [cute.arch.shuffle_sync_bfly(word, offset=offset) for word in best]
            if self._tracks_rest:
                rest = greater(rest, cute.arch.shuffle_sync_bfly(rest, offset=offset))
            best, rest = self._merge(best, theirs, rest)
            offset *= 2
        if self.exact:
            return Pick(best, Boolean(False))
        following = rest if self._tracks_rest else best[self.top_k]
        return Pick(best, self._alike(best[self.top_k - 1], following))

    @property
    def _tracks_rest(self) -> bool:
        """Whether the network has no room for the (k+1)-th entry, and keeps its word aside."""
        return not self.exact and self.top_k == self.width

    def _merge(self, ours: list, theirs: list, rest: Uint32) -> tuple[list, Uint32]:
        if self._tracks_rest:
            rest = greater(rest, best_of_rest(ours, theirs))
        return best_half(ours, theirs), rest

    @cute.jit
    def _alike(self, a: Uint32, b: Uint32) -> Boolean:
        """Whether two words have the same part of a key, and `a` is a real entry's."""
        return ((a ^ b) <= Uint32(self.low)) and (a > Uint32(self.low))

    def index(self, word: Uint32) -> Int32:
        """The entry that a word stands for."""
        return Int32((word & Uint32(self.low)) ^ Uint32(self.low))

    def mine(self, words: list, slot: int, lane: Int32) -> Uint32:
        """The word of place `slot * lanes + lane`, of the k best; 0 past them."""
        first = slot * self.lanes
        word = Uint32(0)
        for i, candidate in enumerate(words[first : min(first + self.lanes, self.top_k)]):
            word = cutlass.select_(lane == i, candidate, word)
        return word

    @cute.jit
    def places(self, words: list, rKeys: cute.Tensor, lane: Int32, rPlaces: cute.Tensor) -> None:
        """The place of each entry that this lane writes. rKeys: (SLOT) their whole keys.

        Every lane of the warp calls.
        """
        for slot in cutlass.range_constexpr(self.slots):
            rPlaces[slot] = lane + slot * self.lanes
        if cutlass.const_expr(not self.exact and self.top_k > 1):
            tied = self._alike(words[0], words[1])
            for i in cutlass.range_constexpr(1, self.top_k - 1):
                tied = tied or self._alike(words[i], words[i + 1])
            if cute.arch.vote_any_sync(tied):
                self.rank(words, rKeys, lane, rPlaces)

    @cute.jit
    def rank(self, words: list, rKeys: cute.Tensor, lane: Int32, rPlaces: cute.Tensor) -> None:
        """Count for every entry of this lane the chosen ones ahead of it."""
        row = cute.arch.lane_idx() - lane
        for slot in cutlass.range_constexpr(self.slots):
            rPlaces[slot] = 0
        for i in cutlass.range_constexpr(self.top_k):
            theirs = cute.arch.shuffle_sync(rKeys[i // self.lanes], row + i % self.lanes)
            index = self.index(words[i])
            for slot in cutlass.range_constexpr(self.slots):
                ours = self.index(self.mine(words, slot, lane))
                ahead = (theirs > rKeys[slot]) or (theirs == rKeys[slot] and index < ours)
                rPlaces[slot] = cutlass.select_(ahead, rPlaces[slot] + 1, rPlaces[slot])

"""The k best entries of a row, by a few lanes of a warp.

    word = the upper bits of an entry's key, then the entry's index, inverted

    lane   blocks of 8 entries -> words -> sorted, W at a time -> the W best so far, sorted
    row    lanes merge their W best with a neighbour's, then with one twice as far, and so on:
           all end up with the same

Words order as entries do, (key descending, index ascending), except where keys differ only in bits
that had to make room for the index. That is looked for afterwards, and put right:

    among the chosen           `places` ranks them by their whole keys
    between chosen and others  `Pick.doubtful`: the row is chosen again in another way
"""

from collections.abc import Callable
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, Uint32

from cute_router.topk.config import BLOCK
from cute_router.topk.layout import Layout
from cute_router.topk.network import best_half, less, sort


class Pick(NamedTuple):
    """The best entries of a row; the same in all its lanes."""

    words: list[Uint32]  # of the k best and of what else the network holds, best first
    doubtful: Boolean  # whether the k-th may be no better than one that was left out


class Lanes(Layout):
    """The choice from a row of `length` entries."""

    def __init__(self, length: int, top_k: int, lanes: int, run: int):
        self.top_k = top_k
        self.width = max(BLOCK, 1 << (top_k - 1).bit_length())  # W
        per_sort = self.width // BLOCK
        super().__init__(length, lanes, run, -(-length // (BLOCK * lanes * per_sort)) * per_sort)
        self.low = (1 << (self.room - 1).bit_length()) - 1  # the index's bits of a word
        self.slots = -(-top_k // lanes)  # places of the result that a lane writes

    def pick(self, keys: Callable[[int], list[Uint32]], lane: Int32) -> Pick:
        """The best words of a row. `keys(block)` are those of this lane's entries.

        Every lane of the warp calls; `lane` counts within the row.
        """
        ours: list[Uint32] = []
        pending: list[Uint32] = []
        for block in range(self.blocks):
            for i, key in enumerate(keys(block)):
                code = self.low ^ self.offset(block, i)  # the lane comes in below
                pending.append(merge_bits(key, self.low, code))
            if len(pending) == self.width:
                batch, pending = sort(pending), []
                ours = best_half(ours, batch) if ours else batch
        best = ours = [word ^ Uint32(lane * self.run) for word in ours]
        distance = 1
        while distance < self.lanes:
            theirs = [cute.arch.shuffle_sync_bfly(word, offset=distance) for word in best]
            best = best_half(best, theirs)
            distance *= 2
        if self.top_k < self.width:
            doubtful = self.alike(best[self.top_k - 1], best[self.top_k])
        else:
            doubtful = self.crowded(ours, best[-1])
        return Pick(best, doubtful)

    @cute.jit
    def alike(self, a: Uint32, b: Uint32) -> Boolean:
        """Whether two words have the same part of a key, and `a` is a real entry's."""
        return ((a ^ b) <= Uint32(self.low)) and (a > Uint32(self.low))

    @cute.jit
    def crowded(self, ours: list[Uint32], last: Uint32) -> Boolean:
        """Whether more than k entries of the row are not below `last` in their part of a key.

        `ours` are the best of each lane. What a lane has left out counts as soon as nothing that it
        has kept is below.
        """
        floor = last & ~Uint32(self.low)
        count = Int32(0)
        for word in ours:
            count = cutlass.select_(word >= floor, count + 1, count)
        if cutlass.const_expr(self.blocks * BLOCK > self.width):
            count = cutlass.select_(count == self.width, count + 1, count)
        total = cute.arch.warp_reduction_sum(count, threads_in_group=self.lanes)
        return total > self.top_k and floor > Uint32(0)

    def index(self, word: Uint32) -> Int32:
        """The entry that a word stands for."""
        return Int32((word & Uint32(self.low)) ^ Uint32(self.low))

    def mine(self, words: list[Uint32], slot: int, lane: Int32) -> Uint32:
        """The word of place `slot * lanes + lane`, of the k best; 0 past them."""
        first = slot * self.lanes
        word = Uint32(0)
        for i, candidate in enumerate(words[first : min(first + self.lanes, self.top_k)]):
            word = cutlass.select_(lane == i, candidate, word)
        return word

    @cute.jit
    def places(
        self, words: list[Uint32], rKeys: cute.Tensor, lane: Int32, rPlaces: cute.Tensor
    ) -> None:
        """The place of each entry that this lane writes. rKeys: (SLOT) their whole keys.

        Every lane of the warp calls.
        """
        for slot in cutlass.range_constexpr(self.slots):
            rPlaces[slot] = lane + slot * self.lanes
        if cutlass.const_expr(self.top_k > 1):
            closest = words[0] ^ words[1]
            for i in cutlass.range_constexpr(1, self.top_k - 1):
                closest = less(closest, words[i] ^ words[i + 1])
            if cute.arch.vote_any_sync(closest <= Uint32(self.low)):
                self.rank(words, rKeys, lane, rPlaces)

    @cute.jit
    def rank(
        self, words: list[Uint32], rKeys: cute.Tensor, lane: Int32, rPlaces: cute.Tensor
    ) -> None:
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


@cute.jit
def merge_bits(upper: Uint32, low: cutlass.Constexpr, lower: cutlass.Constexpr) -> Uint32:
    """`upper` with its bits under the mask `low` replaced, in one instruction: & and | take two."""
    return cute.arch.inline_ptx(
        "lop3.b32 {$w0}, {$r0}, {$r1}, {$r2}, 0xBA;",  # a & ~b | c
        write_only_types=[Uint32],
        read_only_args=[upper, Uint32(low), Uint32(lower)],
    )

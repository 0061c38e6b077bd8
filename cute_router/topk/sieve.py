"""The k best entries of a row, by a few lanes of a warp: a threshold leaves few, which are sorted.

    lane   the maxima of a few groups of its entries, of which it keeps the best
    row    T, the k-th greatest of the lanes' maxima: k entries are no less, seldom many more
    lane   the indices of its entries that are not below T -> a list in shared memory
    lane   its share of the list -> words -> the k greatest words of the row, sorted

So an entry costs a maximum, a sum and a shift; what is dear is left for the few on the list. As
soon as k entries are not below some number, the k best of the row are among these, NaN first: T
decides how long the list is, not what is chosen. Where it is too long, T rises to the next maximum.

    word = the bits of (x - T) + U, shifted up, then the entry's index, inverted

The sum counts equal steps: U is a power of two of more than twice the greatest x - T, so that the
bits of the sum which are shifted out are always the same, and T and the greatest x are 2^21 steps
apart or more. The sum never falls as x rises. So words order as entries do, (x descending, index
ascending), unless two that differ are in one step, or one is NaN, or U under- or overflows; whether
that may have changed the choice or its order is looked for afterwards.
"""

from collections.abc import Callable
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Uint32

from cute_router.topk.config import BLOCK, capacity, width
from cute_router.topk.layout import Layout
from cute_router.topk.network import NUMBERS, WORDS, larger, sort
from cute_router.topk.ptx import shift_in
from cute_router.topk.warp_sort import WarpSort, other_lanes

BITS = 32  # of a word: entries that are marked in one


class Choice(NamedTuple):
    """What a lane knows of the k best entries of its row."""

    indices: list[Int32]  # of the entries whose places are lane, lane + lanes, ...
    doubtful: Boolean  # whether this lane has found a reason why the choice may be wrong


class Cut(NamedTuple):
    """Where a row is cut, and what is left of it."""

    minus_t: Float32  # -T, never -0: then x - T is not below 0 where x = T = 0, of any sign
    count: Int32  # entries that are left; 0 if they do not fit the list
    ahead: Int32  # those of them that are in lanes before this one


class Sieve(Layout):
    """The choice from a row of `length` entries.

    ragged: whether entries may be missing from a row, beyond those that no row has.
    """

    def __init__(self, length: int, top_k: int, lanes: int, run: int, ragged: bool):
        super().__init__(length, lanes, run, -(-length // (BLOCK * lanes)))
        self.top_k = top_k
        self.ragged = ragged or self.room > length
        self.width = width(top_k)
        self.capacity = capacity(top_k)
        self.span = min(lanes, self.capacity)  # lanes that share the list
        self.share = self.capacity // self.span
        groups = min(2 * self.share, self.entries)
        self.groups = 1 << (groups.bit_length() - 1)
        self.kept = min(self.share, self.groups)  # maxima of a lane
        self.last = length - 1
        self.low = (1 << self.last.bit_length()) - 1  # the index's bits of a word
        self.slots = -(-top_k // lanes)  # places of the result that a lane has

    def pick(
        self,
        rScores: cute.Tensor,
        score: Callable[[Int32], Float32],
        sList: cute.Tensor,
        lane: Int32,
    ) -> Choice:
        """The best entries of a row. rScores: (ENTRY) this lane's, -inf where there is none.

        `score(index)` is any entry's again; sList: (capacity) of the row, of a type that holds an
        index. Every lane of the warp calls; `lane` counts within the row.
        """
        maxima = WarpSort(self.span, self.width, NUMBERS).greatest(self.maxima(rScores), lane)
        rMarks = cute.make_rmem_tensor(-(-self.entries // BITS), Uint32)
        cut = self.cut(rScores, maxima, rMarks, lane)
        self.list_marked(rMarks, cut, sList, lane)
        cute.arch.sync_warp()

        greatest = self.at(maxima, Int32(0), lane)
        power = (greatest + cut.minus_t).bitcast(Uint32) & Uint32(0x7F800000)
        unit = power.bitcast(Float32) * Float32(4.0)
        scores, words = [], []
        for i in range(self.share):
            slot = (lane % self.span) * self.share + i
            real = slot < cut.count
            # Where the list has ended: the least word that an entry can have.
            code = Int32(cutlass.select_(real, Int32(sList[slot]), Int32(0)))
            x = Float32(cutlass.select_(real, score(Int32(self.last) - code), -cut.minus_t))
            step = ((x + cut.minus_t) + unit).bitcast(Uint32)
            scores.append(x)
            words.append(step * Uint32(self.low + 1) + Uint32(code))
        best = WarpSort(self.span, self.width, WORDS).greatest(words, lane)[: self.slots]
        indices = [Int32(self.last) - Int32(word & Uint32(self.low)) for word in best]
        chosen = [score(index) for index in indices]
        doubtful = self.disordered(chosen, lane) | self.left_out(chosen, best, scores, words, lane)
        return Choice(indices, doubtful | (cut.count < self.top_k))

    def maxima(self, rScores: cute.Tensor) -> list[Float32]:
        """The greatest entries of a lane's groups, best first. A group's are far apart in a row.

        Of lanes that share a list's slot, `span` apart, the groups are one.
        """
        maxima = []
        for group in range(self.groups):
            tree = [rScores[e] for e in range(group, self.entries, self.groups)]
            while len(tree) > 1:
                paired = len(tree) // 2 * 2
                halves = zip(tree[:paired:2], tree[1:paired:2], strict=True)
                tree = [larger(a, b) for a, b in halves] + tree[paired:]
            maxima += tree
        maxima = sort(maxima, NUMBERS)[: self.kept]
        apart = self.span
        while apart < self.lanes:
            maxima = [larger(x, other_lanes(x, apart)) for x in maxima]
            apart *= 2
        return maxima

    @cute.jit
    def at(self, maxima: list[Float32], place: Int32, lane: Int32) -> Float32:
        """One of the row's sorted maxima."""
        source = cute.arch.lane_idx() - lane + place % self.lanes
        value = cute.arch.shuffle_sync(maxima[0], source)
        for slot in cutlass.range_constexpr(1, self.slots):
            other = cute.arch.shuffle_sync(maxima[slot], source)
            value = cutlass.select_(place // self.lanes == slot, other, value)
        return value

    @cute.jit
    def cut(
        self, rScores: cute.Tensor, maxima: list[Float32], rMarks: cute.Tensor, lane: Int32
    ) -> Cut:
        """Find T, and mark this lane's entries that are left."""
        place = Int32(self.top_k - 1)
        minus_t = Float32(0.0)
        count = Int32(0)
        ahead = Int32(0)
        fits = Boolean(False)
        searching = Boolean(True)
        while searching:
            t = self.at(maxima, place, lane)
            minus_t = Float32(0.0) - t
            self.mark(rScores, minus_t, rMarks)
            count, ahead = self.count(rMarks, lane)
            fits = count <= self.capacity
            if cutlass.const_expr(self.ragged):  # a missing entry is not below -inf
                fits = fits and t > -Float32.inf
            searching = cute.arch.vote_any_sync(count > self.capacity and place > 0)
            place = cutlass.max(place - Int32(count > self.capacity), 0)
        return Cut(minus_t, Int32(cutlass.select_(fits, count, Int32(0))), ahead)

    def mark(self, rScores: cute.Tensor, minus_t: Float32, rMarks: cute.Tensor) -> None:
        """Mark the entries of this lane that are not below T, NaN among them, each by a bit."""
        half = BITS // 2
        for i in range(cute.size(rMarks)):
            size = min(BITS, cute.size(rScores) - i * BITS)
            marks = Uint32(0)
            for start in reversed(range(0, size, half)):  # two chains of dependent shifts
                below = Uint32(0)
                for e in reversed(range(start, min(start + half, size))):
                    below = shift_in(below, (rScores[i * BITS + e] + minus_t).bitcast(Uint32))
                marks = marks * Uint32(1 << half) + below
            rMarks[i] = marks ^ Uint32((1 << size) - 1)

    @cute.jit
    def count(self, rMarks: cute.Tensor, lane: Int32) -> tuple[Int32, Int32]:
        """(marks of the row, marks of the lanes ahead in it)."""
        total = Int32(0)
        for i in cutlass.range_constexpr(cute.size(rMarks)):
            total = total + Int32(cute.arch.popc(rMarks[i]))
        ahead = Int32(0)
        for bit in cutlass.range_constexpr(self.lanes.bit_length() - 1):
            theirs = cute.arch.shuffle_sync_bfly(total, offset=1 << bit)
            ahead = cutlass.select_((lane & (1 << bit)) != 0, ahead + theirs, ahead)
            total = total + theirs
        return total, Int32(ahead)

    @cute.jit
    def list_marked(self, rMarks: cute.Tensor, cut: Cut, sList: cute.Tensor, lane: Int32) -> None:
        """Write the marked entries of this lane to the list, their indices counted from the end."""
        slot = cut.ahead
        for i in cutlass.range_constexpr(cute.size(rMarks)):
            first = self.last - self.offset(i * BITS // BLOCK, 0) - lane * self.run
            between = self.run * (self.lanes - 1)  # entries of other lanes, from run to run
            marks = Uint32(cutlass.select_(cut.count > 0, rMarks[i], Uint32(0)))
            while marks != 0:
                e = Uint32(cute.arch.bfind(marks))
                marks = marks ^ (Uint32(1) << e)
                code = first - Int32(e) - Int32(e // self.run) * between
                sList[slot] = sList.element_type(code)
                slot = slot + 1

    @cute.jit
    def disordered(self, chosen: list[Float32], lane: Int32) -> Boolean:
        """Whether a chosen entry of this lane may not come before the next one."""
        following = cute.arch.lane_idx() - lane + (lane + 1) % self.lanes
        doubtful = Boolean(False)
        behind = [cute.arch.shuffle_sync(x, following) for x in chosen]
        for slot in cutlass.range_constexpr(self.slots):
            theirs = behind[slot]
            if cutlass.const_expr(slot + 1 < self.slots):
                theirs = cutlass.select_(lane == self.lanes - 1, behind[slot + 1], theirs)
            paired = lane + slot * self.lanes < self.top_k - 1
            doubtful = doubtful or (paired and not (chosen[slot] >= theirs))
        return doubtful

    @cute.jit
    def left_out(
        self,
        chosen: list[Float32],
        best: list[Uint32],
        scores: list[Float32],
        words: list[Uint32],
        lane: Int32,
    ) -> Boolean:
        """Whether an entry of this lane's part of the list may be better than the k-th."""
        slot, place = divmod(self.top_k - 1, self.lanes)
        source = cute.arch.lane_idx() - lane + place
        kth = cute.arch.shuffle_sync(chosen[slot], source)
        word = cute.arch.shuffle_sync(best[slot], source)
        doubtful = Boolean(False)
        for i in cutlass.range_constexpr(self.share):
            doubtful = doubtful or (words[i] < word and not (scores[i] <= kth))
        return doubtful

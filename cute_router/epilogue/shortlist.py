"""The experts of a token that may be among its k best, found while their logits are in registers.

    entry  a rough score, between  low = r (1 - u) + bias  and  high = r (1 + u) + bias
    T      the k-th greatest of the maxima of groups of `low`: k scores are no less
    list   the experts whose `high` is not below T, each with its exact activation

Of rough activations r only the relative error u is known (`scoring.rough`). Rounding is monotonic,
so that low <= score <= high holds of rounded numbers too, and the list has the k best for certain:
what is not on it is below k others. T costs a maximum for each expert, and exact activations are
made for those on the list alone.

A few lanes share a token, whose logits lie on them as `topk.layout` says. Tokens whose list would
be too long whatever T (many equals, NaN), or whose T is as small as activations that are 0 to
`rough`, have their k best taken one by one.
"""

from collections.abc import Callable
from functools import reduce
from typing import Any, NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Uint32

from cute_router.epilogue.scoring import FLUSHED, ROUGH, activate_all, rough, score_of
from cute_router.spec import RouterSpec
from cute_router.topk.config import LIST, WARP
from cute_router.topk.key import REMOVED, key
from cute_router.topk.network import NUMBERS, larger, merge, smaller, sort
from cute_router.topk.ptx import lowest_bit, push_marked
from cute_router.topk.rounds import take_all
from cute_router.topk.sieve import BITS, Sieve
from cute_router.topk.staging import VECTOR_BYTES
from cute_router.topk.warp_sort import other_lanes

NOBODY = -1  # the expert of an entry that a list does not have
MIN_T = FLUSHED * 2.0**30  # half a step of such numbers is more than what may be 0 to `rough`


class Row(NamedTuple):
    """A token, as the lanes that share it hold it."""

    load: Callable[[int], cute.Tensor]  # (ENTRY) this lane's logits, of a piece of them
    first: Int32  # expert of the first of them, of the router's
    lane: Int32  # of those lanes
    wanted: Boolean  # whether it is a token


class Cut(NamedTuple):
    """Where a row is cut."""

    minus_t: Float32  # -T
    count: Int32  # entries that are drafted; 0 if there is no room for all
    raised: Boolean  # whether T is more than the k-th maximum


class Entries(NamedTuple):
    """A lane's share of a list."""

    rActs: cute.Tensor  # exact activations
    rExperts: cute.Tensor  # NOBODY behind the end of the list


Halves = tuple[list[Float32], list[Float32]]  # of one half of the lanes, and of the other


class Shortlist:
    """Lists of LIST entries, from logits that come in one piece or, to single lanes, in several."""

    def __init__(
        self, spec: RouterSpec, experts: int, lanes: int, run: int, pieces: int, ragged: bool
    ):
        self.spec = spec
        self.pieces = pieces
        self.ragged = ragged  # whether some of the experts may not be there
        self.lay = Sieve(experts, spec.top_k, lanes, run, ragged)
        self.piece = experts // lanes // pieces  # entries of a lane, of one piece
        self.share = LIST // lanes  # entries of a list that a lane has in the end

    @cute.jit
    def find(self, row: Row, sBias: Any, sDrafts: cute.Tensor) -> Entries:
        """This lane's share of the row's list. Every lane of a warp calls.

        sDrafts: (2 * LIST words, token of the warp), of the warp's own.
        """
        rHigh, maxima = self.maxima(row, sBias)
        sDraft = sDrafts[None, cute.arch.lane_idx() // self.lay.lanes]
        cute.arch.sync_warp()  # the last drafts have been read
        cut = self.cut(row, sBias, rHigh, maxima, sDraft)
        cute.arch.sync_warp()
        entries = self.share_of(row, cut.count, sDraft)
        activate_all(entries.rActs, self.spec.scoring)
        doubtful = self.doubtful(row, cut, sBias, entries)
        self.settle(row, doubtful, sBias, sDrafts, entries)
        return entries

    @cute.jit
    def maxima(self, row: Row, sBias: Any) -> tuple[Any, Halves]:
        """`high` of the only piece, and the best maxima of groups of `low`, sorted."""
        rBest = cute.make_rmem_tensor(self.lay.groups, Float32)
        rBest.fill(-Float32.inf)  # the maximum of NaN alone, too
        rHigh, load = None, row.load
        if cutlass.const_expr(self.pieces == 1):
            rLow, rHigh = self.bounds(load(0), row.first, sBias)
            self.raise_maxima(rBest, rLow)
        else:
            for piece in cutlass.range(self.pieces, unroll=1):
                rLow, _ = self.bounds(load(piece), row.first + piece * self.piece, sBias)
                self.raise_maxima(rBest, rLow)
        best = sort([rBest[i] for i in range(self.lay.groups)], NUMBERS)[: self.lay.kept]
        return rHigh, halves_of(best, self.lay.lanes, self.lay.width)

    def raise_maxima(self, rBest: cute.Tensor, rLow: cute.Tensor) -> None:
        """Raise the maxima of groups to those of more entries."""
        for e in range(self.piece):
            group = e % self.lay.groups
            rBest[group] = larger(rBest[group], rLow[e])

    def bounds(
        self, rLogits: cute.Tensor, first: Int32, sBias: Any
    ) -> tuple[cute.Tensor, cute.Tensor]:
        """(ENTRY) `low` and `high`, -inf where there is no expert; `first` is that of entry 0."""
        rLow, rHigh = (cute.make_rmem_tensor(self.piece, Float32) for _ in range(2))
        u = ROUGH[self.spec.scoring]
        for e in range(self.piece):
            expert = first + self.lay.offset(0, e)
            about = rough(rLogits[e], self.spec.scoring)
            bias = Float32(0.0) if sBias is None else sBias[expert]
            low = cute.math.fma(about, Float32(1 - u), bias)
            high = cute.math.fma(about, Float32(1 + u), bias)
            if self.ragged:
                there = expert < self.spec.num_experts
                low, high = (cutlass.select_(there, x, -Float32.inf) for x in (low, high))
            rLow[e], rHigh[e] = low, high
        return rLow, rHigh

    @cute.jit
    def cut(self, row: Row, sBias: Any, rHigh: Any, maxima: Halves, sDraft: cute.Tensor) -> Cut:
        """Find T, and draft the list; where it is too long, raise T."""
        k, load = self.spec.top_k, row.load
        t, place = kth_of_two(maxima, k), Int32(k)
        minus_t, count = Float32(0.0), Int32(0)
        searching = Boolean(True)
        while searching:
            minus_t, count = Float32(0.0) - t, Int32(0)
            if cutlass.const_expr(self.pieces == 1):
                count = self.draft(rHigh, load(0), row.first, minus_t, row.lane, count, sDraft)
            else:
                for piece in cutlass.range(self.pieces, unroll=1):
                    first, rLogits = row.first + piece * self.piece, load(piece)
                    _, rBounds = self.bounds(rLogits, first, sBias)
                    count = self.draft(rBounds, rLogits, first, minus_t, row.lane, count, sDraft)
            too_long = count > LIST and place > 1 and row.wanted
            searching = cute.arch.vote_any_sync(too_long)
            if searching:
                place = place - Int32(too_long)
                for other in cutlass.range_constexpr(1, k):
                    t = cutlass.select_(place == other, kth_of_two(maxima, other), t)
        return Cut(minus_t, Int32(cutlass.select_(count > LIST, Int32(0), count)), place < k)

    def draft(
        self,
        rHigh: cute.Tensor,
        rLogits: cute.Tensor,
        first: Int32,
        minus_t: Float32,
        lane: Int32,
        count: Int32,
        sDraft: cute.Tensor,
    ) -> Int32:
        """Write logits and experts whose `high` is not below T behind the `count` of the draft,
        unless there is no room; how many it has, or would have, then."""
        rMarks = cute.make_rmem_tensor(-(-self.piece // BITS), Uint32)
        self.lay.mark(rHigh, minus_t, rMarks)
        more, ahead = self.lay.count(rMarks, lane)
        at = (sDraft.iterator + 2 * (count + ahead)).toint().to(Int32)
        count = count + more
        for e in range(self.piece):
            marks = cutlass.select_(count > LIST, Uint32(0), rMarks[e // BITS])
            expert = first + self.lay.offset(0, e)
            at = push_marked(at, marks, e % BITS, rLogits[e].bitcast(Int32), expert)
        return count

    def share_of(self, row: Row, count: Int32, sDraft: cute.Tensor) -> Entries:
        """This lane's share of a draft of `count` entries: logits in place of activations."""
        size = 2 * self.share
        rWords = cute.make_rmem_tensor(size, Int32)
        source = sDraft.iterator.align(VECTOR_BYTES) + cute.assume(row.lane * size, divby=size)
        rWords.store(cute.make_tensor(source, cute.make_layout(size)).load())
        entries = Entries(*(cute.make_rmem_tensor(self.share, t) for t in (Float32, Int32)))
        for i in range(self.share):
            there = row.lane * self.share + i < count
            logit, expert = rWords[2 * i].bitcast(Float32), rWords[2 * i + 1]
            entries.rActs[i] = cutlass.select_(there, logit, Float32(0.0))
            entries.rExperts[i] = cutlass.select_(there, expert, Int32(NOBODY))
        return entries

    @cute.jit
    def doubtful(self, row: Row, cut: Cut, sBias: Any, entries: Entries) -> Boolean:
        """Whether a token's list may not have its k best, or has no room for all that it needs."""
        k = self.spec.top_k
        doubtful = cut.count < k or not (cute.math.absf(cut.minus_t) >= Float32(MIN_T))
        if cute.arch.vote_any_sync(cut.raised):  # then nobody knows yet that k scores are no less
            reach = Int32(0)
            for i in cutlass.range_constexpr(self.share):
                expert = entries.rExperts[i]
                score = score_of(entries.rActs[i], sBias, cutlass.max(expert, 0))
                reach = reach + Int32(expert != NOBODY and score + cut.minus_t >= 0.0)
            reach = cute.arch.warp_reduction_sum(reach, threads_in_group=self.lay.lanes)
            doubtful = doubtful or (cut.raised and reach < k)
        return doubtful and row.wanted

    @cute.jit
    def settle(
        self, row: Row, doubtful: Boolean, sBias: Any, sDrafts: cute.Tensor, entries: Entries
    ) -> None:
        """Give doubtful tokens their k best, which the whole warp takes one by one.

        The warp's drafts have been read: the logits of a token take their place.
        """
        base = row.first - row.lane * self.lay.run  # of the experts that are looked at
        left = cute.arch.vote_ballot_sync(doubtful and row.lane == 0)
        sRow = cute.make_tensor(sDrafts.iterator, cute.make_layout(self.lay.length))
        first, start, load = row.lane * self.share, row.lane * self.lay.run, row.load
        while left != 0:
            token = Int32(lowest_bit(left)) // self.lay.lanes
            ours = cute.arch.lane_idx() // self.lay.lanes == token
            cute.arch.sync_warp()  # drafts have been read, or the row before this
            if cutlass.const_expr(self.pieces == 1):
                self.put_row(sRow, start, load(0), ours)
            else:
                for piece in cutlass.range(self.pieces, unroll=1):
                    self.put_row(sRow, start + piece * self.piece, load(piece), ours)
            cute.arch.sync_warp()
            expert, activation = self.best_of(sRow, base, sBias)
            for i in cutlass.range_constexpr(self.share):
                theirs = cute.arch.shuffle_sync(activation, first + i)
                entries.rActs[i] = cutlass.select_(ours, theirs, entries.rActs[i])
                theirs = cute.arch.shuffle_sync(expert, first + i)
                entries.rExperts[i] = cutlass.select_(ours, theirs, entries.rExperts[i])
            left = left & (left - 1)

    @cute.jit
    def put_row(self, sRow: cute.Tensor, start: Int32, rLogits: cute.Tensor, ours: Boolean) -> None:
        """Write a piece of this lane's logits, if they are `ours`."""
        if ours:
            for e in cutlass.range_constexpr(self.piece):
                sRow[start + self.lay.offset(0, e)] = rLogits[e].bitcast(Int32)

    @cute.jit
    def best_of(self, sRow: cute.Tensor, base: Int32, sBias: Any) -> tuple[Int32, Float32]:
        """(expert, activation) of a token's k best, the j-th one in lane j, NOBODY in others."""
        lane, E = cute.arch.lane_idx(), self.lay.length
        slots = -(-E // WARP)
        rActs = cute.make_rmem_tensor(slots, Float32)
        rKeys = cute.make_rmem_tensor(slots, Uint32)
        for i in cutlass.range_constexpr(slots):
            rActs[i] = sRow[cutlass.min(lane + WARP * i, E - 1)].bitcast(Float32)
        activate_all(rActs, self.spec.scoring)
        for i in cutlass.range_constexpr(slots):
            expert = lane + WARP * i
            there = expert < E and base + expert < self.spec.num_experts
            score = score_of(rActs[i], sBias, base + cutlass.min(expert, E - 1))
            rKeys[i] = cutlass.select_(there, key(score), Uint32(REMOVED))
        k = self.spec.top_k
        best, activation = take_all(rKeys, rActs, k, lane, unroll=1)
        chosen = cutlass.select_(lane < k, base + best, Int32(NOBODY))
        return Int32(chosen), activation


def halves_of(values: list[Float32], lanes: int, width: int) -> Halves:
    """Of each lane's values, sorted, the `width` best of both halves of the lanes."""
    if lanes == 1:
        return values, []
    for bit in range(lanes.bit_length() - 2):
        values = merge(values, [other_lanes(value, 1 << bit) for value in values], NUMBERS)[:width]
    return values, [other_lanes(value, lanes // 2) for value in values]


def kth_of_two(halves: Halves, k: int) -> Float32:
    """The k-th greatest of two sorted lists: k are no less, i of one and k - i of the other."""
    ours, theirs = halves
    best = []
    for i in range(max(0, k - len(theirs)), min(k, len(ours)) + 1):
        least = [half[n - 1] for half, n in ((ours, i), (theirs, k - i)) if n > 0]
        best.append(reduce(smaller, least))
    return reduce(larger, best)

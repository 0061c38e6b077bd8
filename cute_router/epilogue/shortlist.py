"""The experts of a token that may be among its k best, found while their logits are in registers.

    entry  a rough score, between  low = r (1 - u) + bias  and  high = r (1 + u) + bias
    T      the k-th greatest of the maxima of groups of `low`: k scores are no less
    list   the experts whose `high` is not below T, each with its exact activation

Of rough activations r only the relative error u is known (`scoring.rough`). Rounding is monotonic, so
that low <= score <= high holds of the rounded numbers too, and the list has the k best for certain:
what is not on it is below k others. T costs a maximum an entry, the list a few times k activations,
in place of one for every expert.

A few lanes share a token, whose logits lie on them as `topk.layout` says. Tokens whose list would be
too long whatever T (many equals, NaN), or whose T is as small as activations that are 0 to `rough`,
have their k best taken one by one.
"""

from typing import Any, NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Uint32

from cute_router.epilogue.scoring import FLUSHED, ROUGH, activate_all, rough, with_bias
from cute_router.spec import RouterSpec
from cute_router.topk.config import BLOCK, LIST
from cute_router.topk.key import REMOVED, key
from cute_router.topk.network import NUMBERS, greater, larger, less, smaller, sort
from cute_router.topk.ptx import push_marked
from cute_router.topk.sieve import BITS, Cut, Sieve

NOBODY = -1  # the expert of an entry that a list does not have
MIN_T = FLUSHED * 2.0**30  # half a step of such numbers is more than what may be 0 to `rough`


class Row(NamedTuple):
    """A token, as the lanes that share it hold it."""

    rLogits: cute.Tensor  # (ENTRY) this lane's
    first: Int32  # expert of the first of them, of the router's
    lane: Int32  # of those lanes
    wanted: Boolean  # whether it is a token


class Shortlist:
    """Lists of LIST entries; `experts` of the router are looked at, or what there is of them."""

    def __init__(self, spec: RouterSpec, experts: int, lanes: int, run: int, ragged: bool):
        self.spec = spec
        self.ragged = ragged  # whether some of the experts may not be there
        self.lay = Sieve(experts, spec.top_k, lanes, run, ragged)
        self.entries = experts // lanes  # that a lane has logits of
        self.share = LIST // lanes  # entries of a list that a lane has in the end

    def offset(self, entry: int) -> int:
        """From a lane's first expert to another one of it."""
        return self.lay.offset(0, entry)

    def find(self, row: Row, sBias: Any, sDraft: cute.Tensor) -> tuple[cute.Tensor, list[Int32]]:
        """(activation, expert) of this lane's share of the row's list. Every lane of a warp calls.

        sDraft: (LIST, 2) words of the row's own.
        """
        rHigh, maxima = self.bounds(row, sBias)
        rMarks = cute.make_rmem_tensor(-(-self.lay.entries // BITS), Uint32)
        cut = self.cut(rHigh, maxima, rMarks, row.lane)
        cute.arch.sync_warp()  # the last draft has been read
        self.put(row, cut, rMarks, sDraft)
        cute.arch.sync_warp()
        doubtful = self.doubtful(row, cut, sBias, sDraft)
        count = self.settle(row, cut.count, doubtful, sBias, sDraft)
        rActs, experts = self.share_of(row, count, sDraft)
        activate_all(rActs, self.spec.scoring)
        return rActs, experts

    def bounds(self, row: Row, sBias: Any) -> tuple[cute.Tensor, "Halves"]:
        """(ENTRY) `high`, -inf where there is no expert; best maxima of groups of `low`, sorted,
        of one half of the lanes and of the other."""
        rHigh = cute.make_rmem_tensor(self.lay.entries, Float32)
        rHigh.fill(-Float32.inf)
        maxima = [-Float32.inf] * self.lay.groups  # that of NaN alone, too
        for e in range(self.entries):
            about = rough(row.rLogits[e], self.spec.scoring)
            bias = self.bias(row, sBias, e)
            low = cute.math.fma(about, Float32(1 - ROUGH), bias)
            high = cute.math.fma(about, Float32(1 + ROUGH), bias)
            if self.ragged:
                there = row.first + self.offset(e) < self.spec.num_experts
                low, high = (cutlass.select_(there, x, -Float32.inf) for x in (low, high))
            rHigh[e] = high
            group = e % self.lay.groups
            maxima[group] = larger(maxima[group], low)
        return rHigh, merged(sort(maxima, NUMBERS)[: self.lay.kept], self.lay.lanes, self.lay.width)

    @cute.jit
    def cut(
        self, rHigh: cute.Tensor, maxima: Any, rMarks: cute.Tensor, lane: Int32
    ) -> Cut:
        """Find T, and mark this lane's entries that are left; where they are too many, raise T."""
        lay, k = self.lay, self.spec.top_k
        minus_t, count, ahead = self.try_cut(rHigh, kth_of_two(maxima, k), rMarks, lane)
        raised = Boolean(False)
        if cute.arch.vote_any_sync(count > LIST):
            place = Int32(k)
            t = -minus_t
            while cute.arch.vote_any_sync(count > LIST and place > 1):
                raised = raised or count > LIST
                place = place - Int32(count > LIST)
                for other in cutlass.range_constexpr(1, k):
                    t = cutlass.select_(place == other, kth_of_two(maxima, other), t)
                minus_t, count, ahead = self.try_cut(rHigh, t, rMarks, lane)
            count = cutlass.select_(count > LIST, Int32(0), count)
        return Cut(minus_t, Int32(count), ahead, raised)

    def try_cut(
        self, rHigh: cute.Tensor, t: Float32, rMarks: cute.Tensor, lane: Int32
    ) -> tuple[Float32, Int32, Int32]:
        """Mark this lane's entries that are not below t; -t, marks of the row and ahead in it."""
        minus_t = Float32(0.0) - t
        self.lay.mark(rHigh, minus_t, rMarks)
        return minus_t, *self.lay.count(rMarks, lane)

    def bias(self, row: Row, sBias: Any, entry: int) -> Float32:
        """The bias of one of this lane's experts."""
        return Float32(0.0) if sBias is None else sBias[row.first + self.offset(entry)]

    def put(self, row: Row, cut: Cut, rMarks: cute.Tensor, sDraft: cute.Tensor) -> None:
        """Write the logits and experts that are marked to the row's draft."""
        at = (sDraft.iterator + 2 * cut.ahead).toint().to(Int32)
        for e in range(self.entries):
            marks = cutlass.select_(cut.count > 0, rMarks[e // BITS], Uint32(0))
            expert = row.first + self.offset(e)
            at = push_marked(at, marks, e % BITS, row.rLogits[e].bitcast(Int32), expert)

    @cute.jit
    def doubtful(self, row: Row, cut: Cut, sBias: Any, sDraft: cute.Tensor) -> Boolean:
        """Whether a token's list may not have its k best, or has no room for all that it needs."""
        magnitude = cute.math.absf(cut.minus_t)
        doubtful = cut.count < self.spec.top_k or not (magnitude >= Float32(MIN_T))
        if cute.arch.vote_any_sync(cut.raised):  # then nobody knows yet that k scores are no less
            rActs, experts = self.share_of(row, cut.count, sDraft)
            activate_all(rActs, self.spec.scoring)
            reach = Int32(0)
            for i in cutlass.range_constexpr(self.share):
                score = self.score(rActs[i], sBias, experts[i])
                reach = reach + Int32(experts[i] != NOBODY and score + cut.minus_t >= 0.0)
            reach = sum_of_lanes(reach, self.lay.lanes)
            doubtful = doubtful or (cut.raised and reach < self.spec.top_k)
        return doubtful and row.wanted

    def score(self, activation: Float32, sBias: Any, expert: Int32) -> Float32:
        """The score of an expert of a list."""
        if sBias is None:
            return activation
        return with_bias(activation, sBias[cutlass.max(expert, 0)])

    @cute.jit
    def settle(
        self, row: Row, count: Int32, doubtful: Boolean, sBias: Any, sDraft: cute.Tensor
    ) -> Int32:
        """Make doubtful tokens' lists anew, of their k best; how many entries the row's has."""
        if cute.arch.vote_any_sync(doubtful):
            rKeys = cute.make_rmem_tensor(self.entries, Uint32)
            for start in cutlass.range_constexpr(0, self.entries, BLOCK):
                self.put_keys(row, sBias, start, min(BLOCK, self.entries - start), rKeys)
            cute.arch.sync_warp()  # the draft has been read
            for j in cutlass.range(self.spec.top_k):
                logit, expert, mine = self.take_best(row, rKeys)
                if doubtful and mine:
                    sDraft[2 * j], sDraft[2 * j + 1] = logit.bitcast(Int32), expert
            count = cutlass.select_(doubtful, Int32(self.spec.top_k), count)
            cute.arch.sync_warp()
        return count

    @cute.jit
    def take_best(self, row: Row, rKeys: cute.Tensor) -> tuple[Float32, Int32, Boolean]:
        """(logit, expert) of a row's best key, the first of equals, if it is `mine`; it is removed.

        Entries are named by their place in a lane, which takes no registers.
        """
        lanes, nobody = self.lay.lanes, Uint32(0xFFFFFFFF)
        top = rKeys[0]
        for e in cutlass.range_constexpr(1, self.entries):
            top = greater(top, rKeys[e])
        for bit in cutlass.range_constexpr(lanes.bit_length() - 1):
            top = greater(top, cute.arch.shuffle_sync_bfly(top, offset=1 << bit))
        entry = Int32(-1)
        for e in cutlass.range_constexpr(self.entries - 1, -1, -1):
            entry = cutlass.select_(rKeys[e] == top, Int32(e), entry)
        run = self.lay.run
        expert = row.first + entry // run * (run * lanes) + entry % run
        first = cutlass.select_(entry < 0, nobody, Uint32(expert))
        for bit in cutlass.range_constexpr(lanes.bit_length() - 1):
            first = less(first, cute.arch.shuffle_sync_bfly(first, offset=1 << bit))
        mine = entry >= 0 and first == Uint32(expert)
        entry = Int32(cutlass.select_(mine, entry, Int32(-1)))
        logit = row.rLogits[0]
        for e in cutlass.range_constexpr(self.entries):
            rKeys[e] = cutlass.select_(entry == e, Uint32(REMOVED), rKeys[e])
            logit = cutlass.select_(entry == e, row.rLogits[e], logit)
        return logit, expert, mine

    @cute.jit
    def put_keys(
        self,
        row: Row,
        sBias: Any,
        start: cutlass.Constexpr,
        size: cutlass.Constexpr,
        rKeys: cute.Tensor,
    ) -> None:
        """The keys of some of this lane's entries."""
        rActs = cute.make_rmem_tensor(size, Float32)
        for i in cutlass.range_constexpr(size):
            rActs[i] = row.rLogits[start + i]
        activate_all(rActs, self.spec.scoring)
        for i in cutlass.range_constexpr(size):
            k = key(with_bias(rActs[i], self.bias(row, sBias, start + i)))
            if cutlass.const_expr(self.ragged):
                there = row.first + self.offset(start + i) < self.spec.num_experts
                k = cutlass.select_(there, k, Uint32(REMOVED))
            rKeys[start + i] = k

    def share_of(
        self, row: Row, count: Int32, sDraft: cute.Tensor
    ) -> tuple[cute.Tensor, list[Int32]]:
        """(logit, expert) of this lane's share of a draft of `count` entries."""
        rLogits = cute.make_rmem_tensor(self.share, Float32)
        words = cute.make_rmem_tensor(2 * self.share, Int32)
        first = row.lane * self.share
        source = sDraft.iterator.align(16) + cute.assume(2 * first, divby=2 * self.share)
        words.store(cute.make_tensor(source, cute.make_layout(2 * self.share)).load())
        experts = []
        for i in range(self.share):
            there = first + i < count
            rLogits[i] = cutlass.select_(there, words[2 * i].bitcast(Float32), Float32(0.0))
            experts.append(Int32(cutlass.select_(there, words[2 * i + 1], Int32(NOBODY))))
        return rLogits, experts


Halves = tuple[list[Float32], list[Float32]]  # what is known of one half of the lanes, and the other


def merged(values: list[Float32], lanes: int, width: int) -> Halves:
    """Of each lane's values, sorted, the `width` best of both halves of the lanes."""
    for bit in range(lanes.bit_length() - 2):
        values = merge(values, other_lanes(values, 1 << bit))[:width]
    return values, other_lanes(values[:width], lanes // 2)


def other_lanes(values: list[Float32], mask: int) -> list[Float32]:
    """The values of the lane whose number differs in the bits of `mask`."""
    return [cute.arch.shuffle_sync_bfly(value, offset=mask) for value in values]


def merge(ours: list[Float32], theirs: list[Float32]) -> list[Float32]:
    """Two sorted lists of 2^n as one, by a bitonic network."""
    values, apart = ours + theirs[::-1], len(ours)
    while apart:
        for i in range(len(values)):
            if i & apart == 0:
                a, b = values[i], values[i + apart]
                values[i], values[i + apart] = larger(a, b), smaller(a, b)
        apart //= 2
    return values


def kth_of_two(halves: Halves, k: int) -> Float32:
    """The k-th greatest of two sorted lists: k are no less, i of one and k - i of the other."""
    ours, theirs = halves
    best = -Float32.inf
    for i in range(k + 1):
        least = [half[n - 1] for half, n in ((ours, i), (theirs, k - i)) if n > 0]
        if all(n <= len(half) for half, n in ((ours, i), (theirs, k - i))):
            best = larger(best, least[0] if len(least) == 1 else smaller(*least))
    return best


def sum_of_lanes(value: Int32, lanes: int) -> Int32:
    """The sum over `lanes` lanes."""
    for bit in range(lanes.bit_length() - 1):
        value = value + cute.arch.shuffle_sync_bfly(value, offset=1 << bit)
    return value

"""Choice by candidates: the k best of each group of 64 experts, then the k best of those.

    every owner CTA      logit -> activation, key -> rank among its group of 64 -> k candidates
    the one that merges  candidates of all groups -> rank among them -> ids, weights

An expert among a token's k best is among the k best of its group, so nothing else has to travel.
Both steps count (`topk.rank`). Candidates are kept in the order (group, place), in which equal keys
stand by ascending expert: at both steps a tie goes to the lower index.
"""

from typing import Any, NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Uint32

from cute_router.epilogue.outputs import Outputs, is_token, put_slot, second_bias
from cute_router.epilogue.owner import Owner
from cute_router.epilogue.scoring import activate
from cute_router.epilogue.weights import weight
from cute_router.extras import PLAIN
from cute_router.gemm.config import GROUP, DecodeConfig
from cute_router.gemm.exchange import packet, receive, send, word
from cute_router.topk.key import REMOVED, key
from cute_router.topk.rank import parts_for, rank


class Candidates(NamedTuple):
    """Shared memory of the choice; c runs over the token columns of this CTA."""

    sTileKeys: cute.Tensor  # (MT, c) keys of this tile's experts
    sKeys: cute.Tensor  # (M, c) keys of the candidates of all tiles
    sActs: cute.Tensor  # (M, c) their activations
    sIds: cute.Tensor  # (M, c) their experts
    sChosen: cute.Tensor  # (k, c) activations of the chosen ones
    rKeys: cute.Tensor  # (PASS) this thread's experts: in registers, not shared
    rActs: cute.Tensor  # (PASS)
    # Of launches with extras; else None.
    sNames: Any  # (k, c) ids of the chosen experts, as they are returned
    sReal: Any  # (c) whether a column is a token's
    rName: Any  # (1) this thread's expert's entry of the map
    rSecond: Any  # (PASS) whether a token has the second bias


class ByCandidates:
    """For scorings that look at one logit at a time, without expert groups."""

    def __init__(self, config: DecodeConfig, barrier):
        self.cfg = config
        self.barrier = barrier  # of the epilogue's threads
        self.per_tile = config.tile_experts // GROUP * config.spec.top_k
        self.real = config.expert_tiles * self.per_tile  # candidates of a token, unpadded

    def allocate(self, smem) -> Candidates:
        """Shared memory for the choice."""
        c = self.cfg

        def table(dtype, rows):
            return smem.allocate_tensor(dtype, cute.make_layout((rows, c.owned)), 16)

        extended, mapped, biased = (c.extras != PLAIN, c.extras.expert_map, c.extras.second_bias)
        return Candidates(
            table(Uint32, c.tile_experts),
            table(Uint32, c.candidates),
            table(Float32, c.candidates),
            table(Int32, c.candidates),
            table(Float32, c.spec.top_k),
            cute.make_rmem_tensor(c.passes, Uint32),
            cute.make_rmem_tensor(c.passes, Float32),
            sNames=table(Int32, c.spec.top_k) if extended else None,
            sReal=smem.allocate_tensor(Int32, cute.make_layout(c.owned), 16) if extended else None,
            rName=cute.make_rmem_tensor(1, Int32) if mapped else None,
            rSecond=cute.make_rmem_tensor(c.passes, Int32) if biased else None,
        )

    @cute.jit
    def prepare(self, s: Candidates, mBias: Any, tid: Int32, out: Outputs) -> None:
        """Rank the slots that round the candidates up to whole reads behind all others."""
        for column in cutlass.range_constexpr(self.cfg.owned):
            if tid < self.cfg.candidates - self.real:
                s.sKeys[self.real + tid, column] = Uint32(REMOVED)

    @cute.jit
    def look(self, s: Candidates, o: Owner, out: Outputs) -> None:
        """Read what extras say of the owned tokens, and this thread's expert: behind the wait for
        the kernel ahead, and long before any of it is needed."""
        c = self.cfg
        if cutlass.const_expr(c.extras.expert_map):
            expert = o.tile * c.tile_experts + o.item(c, 0)[0]
            s.rName[0] = -1
            if expert < c.spec.num_experts:
                s.rName[0] = out.extra.mMap[expert]
        if cutlass.const_expr(c.extras.second_bias):
            for step in cutlass.range_constexpr(c.passes):
                column = o.item(c, step)[1]
                s.rSecond[step] = 0
                if column < o.columns:
                    s.rSecond[step] = second_bias(out, o.first_token + column)
        if cutlass.const_expr(out.masks()):
            if o.tid < o.columns:
                s.sReal[o.tid] = Int32(is_token(out, o.first_token + o.tid))

    @cute.jit
    def put(
        self, s: Candidates, step: int, o: Owner, expert: Int32, column: Int32, logit, biases
    ) -> None:
        """Take in the logit of this thread's pass `step`: one of the tile's experts, one column.

        biases: the expert's bias, and its second one if there is one.
        """
        c = self.cfg
        bias = biases[0]
        if cutlass.const_expr(c.extras.second_bias):
            bias = cutlass.select_(s.rSecond[step] != 0, biases[1], bias)
        activation = activate(logit, c.spec.scoring)
        k = key(activation + bias)
        if cutlass.const_expr(c.spec.num_experts % c.tile_experts != 0):
            real = o.tile * c.tile_experts + expert < c.spec.num_experts
            k = cutlass.select_(real, k, Uint32(REMOVED))
        s.rActs[step], s.rKeys[step] = activation, k
        s.sTileKeys[expert, column] = k

    @cute.jit
    def finish(self, s: Candidates, mScratch: cute.Tensor, o: Owner, out: Outputs) -> None:
        """Rank, exchange, rank again, weigh. All logits are in and the threads have met."""
        for step in cutlass.range_constexpr(self.cfg.passes):
            self.offer(s, step, mScratch, o)
        if o.merging:
            if cutlass.const_expr(self.cfg.expert_tiles > 1):
                self.collect(s, mScratch, o)
            self.barrier.arrive_and_wait()
            self.choose(s, o, out)
            self.barrier.arrive_and_wait()
            self.weigh(s, o, out)

    @cute.jit
    def offer(self, s: Candidates, step: int, mScratch: cute.Tensor, o: Owner) -> None:
        """Rank this thread's expert of pass `step` in its group; the k best become candidates."""
        c, k = self.cfg, self.cfg.spec.top_k
        expert, column, part = o.item(c, step)
        mine, activation = s.rKeys[step], s.rActs[step]
        group = cute.local_tile(s.sTileKeys[(None, column)], (GROUP,), (expert // GROUP,))
        place = rank(group, expert % GROUP, mine, part, c.parts)
        if place < k and column < o.columns and part == 0:
            slot = o.tile * self.per_tile + expert // GROUP * k + place
            name = o.tile * c.tile_experts + expert
            if cutlass.const_expr(c.extras.expert_map):
                name = s.rName[0]
            if o.merging:
                s.sKeys[slot, column] = mine
                s.sActs[slot, column] = activation
                s.sIds[slot, column] = name
            else:
                to = packet(mScratch, (o.first_token + column) * self.real + slot)
                # No key is EMPTY, and no expert's number; an entry of the map may be: two halves.
                high = Int32(0)
                if cutlass.const_expr(c.extras.expert_map):
                    name, high = name & 0xFFFF, (name >> 16) & 0xFFFF
                send(to, mine.bitcast(Int32), word(activation), name, high)

    @cute.jit
    def collect(self, s: Candidates, mScratch: cute.Tensor, o: Owner) -> None:
        """Receive the candidates of the other tiles."""
        c = self.cfg
        remote = self.real - self.per_tile
        words = cute.make_rmem_tensor(4, Int32)
        # Backwards: with few columns the last threads had no expert to rank, and wait meanwhile.
        item = c.epilogue_threads - 1 - o.tid
        while item < remote * o.columns:
            slot, column = item % remote, item // remote
            slot = cutlass.select_(slot >= o.tile * self.per_tile, slot + self.per_tile, slot)
            receive(packet(mScratch, (o.first_token + column) * self.real + slot), words)
            s.sKeys[slot, column] = words[0].bitcast(Uint32)
            s.sActs[slot, column] = words[1].bitcast(Float32)
            s.sIds[slot, column] = words[2]
            if cutlass.const_expr(c.extras.expert_map):
                s.sIds[slot, column] = words[2] | (words[3] << 16)
            item = item + c.epilogue_threads

    @cute.jit
    def choose(self, s: Candidates, o: Owner, out: Outputs) -> None:
        """Rank the candidates of every column; the k best are the token's experts."""
        c = self.cfg
        parts = parts_for(self.real * c.owned, c.epilogue_threads)
        step = c.epilogue_threads // parts
        for first in cutlass.range_constexpr(0, self.real * c.owned, step):
            item = first + o.tid // parts
            column = cutlass.min(item // self.real, c.owned - 1)
            slot = item % self.real
            place = rank(s.sKeys[(None, column)], slot, s.sKeys[slot, column], o.tid % parts, parts)
            real = item < self.real * o.columns
            if real and place < c.spec.top_k and o.tid % parts == 0:
                s.sChosen[place, column] = s.sActs[slot, column]
                if cutlass.const_expr(c.extras == PLAIN):
                    out.mIds[o.first_token + column, place] = s.sIds[slot, column]
                else:
                    s.sNames[place, column] = s.sIds[slot, column]

    @cute.jit
    def weigh(self, s: Candidates, o: Owner, out: Outputs) -> None:
        """Write the weights of the chosen experts, their sum taken in the order of choice."""
        c, k = self.cfg, self.cfg.spec.top_k
        item = o.tid
        while item < k * o.columns:
            place, column = item % k, item // k
            total = Float32(0.0)
            for j in cutlass.range_constexpr(k):
                total = total + s.sChosen[j, column]
            share = weight(s.sChosen[place, column], total, out.factor, self.cfg.spec)
            if cutlass.const_expr(c.extras == PLAIN):
                out.mWeights[o.first_token + column, place] = share
            else:
                real = self.real_column(s, column, out)
                put_slot(out, (o.first_token + column, place), s.sNames[place, column], share, real)
            item = item + c.epilogue_threads
        if cutlass.const_expr(c.extras.shared > 0):
            self.share(s, o, out)

    @cute.jit
    def share(self, s: Candidates, o: Owner, out: Outputs) -> None:
        """Write the slots of the shared experts."""
        c, shared = self.cfg, self.cfg.extras.shared
        item = o.tid
        while item < shared * o.columns:
            place, column = item % shared, item // shared
            at = (o.first_token + column, c.spec.top_k + place)
            name, real = c.spec.num_experts + place, self.real_column(s, column, out)
            put_slot(out, at, name, out.extra.shared_weight, real)
            item = item + c.epilogue_threads

    def real_column(self, s: Candidates, column: Int32, out: Outputs) -> Boolean | None:
        """What `is_token` said of a column."""
        return s.sReal[column] != 0 if out.masks() else None

"""The router's step on tokens whose activations lie in shared memory, a few lanes to a token.

    a = activation(l);   s = a + bias;   ids = the k best of s;   w = a[ids] / sum(a[ids]) * factor

For scorings of one logit without groups. Each lane turns its logits into activations, which it
leaves in shared memory, and scores, of which `topk.sieve` takes the k best. Tokens that it leaves
in doubt are told, to be routed in another way.

A router puts NaN last, the sieve first. But a sieve is in doubt about every row with a NaN, which
no number is above: it is on the list, unless that is too long (in doubt). If it is chosen, it is
not in order with its neighbour among the chosen, or, where k = 1, not known to be as good as the
number T, which is on the list too; if it is left out, the k-th is not known to be as good.
"""

from collections.abc import Callable
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Uint32

from cute_router.epilogue.outputs import Outputs
from cute_router.epilogue.scoring import activate_all, score_of, with_bias
from cute_router.epilogue.weights import put_choice
from cute_router.spec import RouterSpec
from cute_router.topk.config import BLOCK
from cute_router.topk.sieve import Choice, Sieve

Block = Callable[[int], cute.Tensor]  # a block's number -> this lane's entries of it


class ByThreshold:
    """How lanes choose for a token; `lay` says which experts are whose.

    batch: blocks whose activations a lane works on at once; more take registers, and less time
    where few warps are there to hide latency.
    """

    def __init__(self, spec: RouterSpec, lay: Sieve, batch: int):
        self.spec = spec
        self.lay = lay
        self.batch = -(-lay.blocks // -(-lay.blocks // batch))  # all of about one size

    def scores(
        self,
        logits: Block,
        biases: Block | None,
        keep: Callable[[int, cute.Tensor], None],
        lane: Int32,
    ) -> cute.Tensor:
        """(ENTRY) this lane's scores, -inf past the last expert; `keep` stores its activations."""
        rScores = cute.make_rmem_tensor(self.lay.entries, Float32)
        for first in range(0, self.lay.blocks, self.batch):
            size = min(self.batch, self.lay.blocks - first)
            sizes = [self.lay.live(first + i) for i in range(size)]
            rActs = cute.make_rmem_tensor(sum(sizes), Float32)
            parts = [part_of(rActs, i, sizes[i]) for i in range(size)]
            for i in range(size):
                parts[i].store(logits(first + i).load().to(Float32))
            rBiases = [None if biases is None else biases(first + i) for i in range(size)]
            activate_all(rActs, self.spec.scoring)
            for i in range(size):
                rBlock = part_of(rScores, first + i, sizes[i])
                self.score_block(first + i, parts[i], rBiases[i], rBlock, lane)
                keep(first + i, parts[i])
        return rScores

    def score_block(
        self, block: int, rActs: cute.Tensor, rBias: Any, rScores: cute.Tensor, lane: Int32
    ) -> None:
        """The scores of a lane's block."""
        lay = self.lay
        for i in range(cute.size(rActs)):
            score = rActs[i] if rBias is None else with_bias(rActs[i], rBias[i])
            if not lay.whole(block):
                expert = lane * lay.run + lay.offset(block, i)
                score = cutlass.select_(expert < self.spec.num_experts, score, -Float32.inf)
            rScores[i] = score

    def pick(
        self, rScores: cute.Tensor, sActs: cute.Tensor, sBias: Any, sList: cute.Tensor, lane: Int32
    ) -> Choice:
        """The best experts of a token. Every lane of the warp calls.

        sList: (capacity) of the token, of a type that holds an expert.
        """

        def score(expert: Int32) -> Float32:
            return score_of(sActs[expert], sBias, expert)

        return self.lay.pick(rScores, score, sList, lane)

    @cute.jit
    def in_doubt(self, choice: Choice, lane: Int32, real: Any) -> Boolean:
        """Whether any lane of a token doubts its choice; what is no token needs none.

        real: what `is_token` says of the row. Every lane of the warp calls.
        """
        bits = cute.arch.vote_ballot_sync(choice.doubtful) >> Uint32(cute.arch.lane_idx() - lane)
        doubtful = bits & Uint32(2**self.lay.lanes - 1) != 0
        if cutlass.const_expr(real is not None):
            doubtful = doubtful and real
        return doubtful

    @cute.jit
    def store(
        self,
        choice: Choice,
        sActs: cute.Tensor,
        out: Outputs,
        token: Int32,
        lane: Int32,
        settled: Boolean,
        real: Any,
    ) -> None:
        """Weigh the chosen experts by their activations; write the results.

        real: what `is_token` says of the row; settled: whether it is to be written.
        """
        rActs = cute.make_rmem_tensor(self.lay.slots, Float32)
        for slot in cutlass.range_constexpr(self.lay.slots):
            rActs[slot] = sActs[choice.indices[slot]]
        lanes = self.lay.lanes
        put_choice(choice.indices, rActs, self.spec, out, token, lane, lanes, settled, real)


def part_of(rEntries: cute.Tensor, block: int, size: int) -> cute.Tensor:
    """A block of a lane's entries."""
    return cute.make_tensor(rEntries.iterator + block * BLOCK, cute.make_layout(size))

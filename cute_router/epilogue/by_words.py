"""The router's step on tokens whose logits lie in shared memory, a few lanes to a token.

    a = activation(l);   s = a + bias;   ids = the k best of s;   w = a[ids] / sum(a[ids]) * factor

For scorings of one logit without groups. Lanes turn logits into words (`topk.lanes`), find the k
best, read those logits again, and weigh them. Tokens that words leave in doubt are told.
"""

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Uint32

from cute_router.epilogue.outputs import Outputs, physical, put_shared, put_slot
from cute_router.epilogue.scoring import activate_all
from cute_router.epilogue.weights import weight
from cute_router.spec import RouterSpec
from cute_router.topk.key import REMOVED, key
from cute_router.topk.lanes import Lanes


class ByWords:
    """How lanes choose for a token; `lay` says which entries are whose."""

    def __init__(self, spec: RouterSpec, lay: Lanes):
        self.spec = spec
        self.lay = lay

    def keys(
        self, block: int, lane: Int32, rLogits: cute.Tensor, rBias: Any = None
    ) -> list[Uint32]:
        """The keys of a lane's block; REMOVED past the last expert. A NaN counts as -inf here.

        Should it be among the k best, or at the edge, with another one, whole keys decide.
        """
        words = []
        rScores = cute.make_rmem_tensor(cute.size(rLogits), Float32)
        rScores.store(rLogits.load().to(Float32))
        activate_all(rScores, self.spec.scoring)
        for i in range(cute.size(rLogits)):
            score = rScores[i]
            if rBias is not None:
                score = score + rBias[i]
            word = key(cute.arch.fmax(score, -Float32.inf), "first")
            if not self.lay.whole(block):
                expert = lane * self.lay.run + self.lay.offset(block, i)
                real = expert < self.spec.num_experts
                word = cutlass.select_(real, word, Uint32(REMOVED))
            words.append(word)
        return words

    def chosen(self, slot: int, lane: Int32) -> Boolean:
        """Whether the lane has a k-th best, or a better one, in this slot."""
        return lane + slot * self.lay.lanes < self.spec.top_k

    @cute.jit
    def store(
        self,
        words: list[Uint32],
        sRow: cute.Tensor,
        sBias: Any,
        out: Outputs,
        token: Int32,
        lane: Int32,
        settled: Boolean,
        real: Any,
    ) -> None:
        """Weigh the chosen experts by their activations, computed again; write the results.

        real: what `is_token` says of the row; settled: whether it is to be written.
        """
        spec, lay = self.spec, self.lay
        rKeys = cute.make_rmem_tensor(lay.slots, Uint32)
        rPlaces = cute.make_rmem_tensor(lay.slots, Int32)
        rIds = cute.make_rmem_tensor(lay.slots, Int32)
        rActs = cute.make_rmem_tensor(lay.slots, Float32)
        for slot in cutlass.range_constexpr(lay.slots):
            expert = lay.index(lay.mine(words, slot, lane))
            rIds[slot] = cutlass.select_(self.chosen(slot, lane), expert, Int32(0))
            rActs[slot] = sRow[rIds[slot]].to(Float32)
        names = [physical(out, rIds[slot]) for slot in range(lay.slots)]
        activate_all(rActs, spec.scoring)
        total = Float32(0.0)
        for slot in cutlass.range_constexpr(lay.slots):
            score = rActs[slot]
            if cutlass.const_expr(sBias is not None):
                score = score + sBias[rIds[slot]]
            rKeys[slot] = key(score)
            total = total + cutlass.select_(self.chosen(slot, lane), rActs[slot], Float32(0.0))
        lay.places(words, rKeys, lane, rPlaces)
        total = cute.arch.warp_reduction_sum(total, threads_in_group=lay.lanes)
        for slot in cutlass.range_constexpr(lay.slots):
            if settled and self.chosen(slot, lane):
                share = weight(rActs[slot], total, out.factor, spec)
                put_slot(out, (token, rPlaces[slot]), names[slot], share, real)
        if settled:
            put_shared(out.of_row(token), spec.top_k, spec.num_experts, lane, lay.lanes, real)

"""The router's step on given logits: weights, ids = renorm(topk(act(logits) + bias)).

scorings of one logit      a few lanes to a token (`lanes`): logits -> activation, bias -> words
                           -> the k best -> their logits, read again -> weights
softmax, expert groups,    a warp to a token (`epilogue.row`)
tokens left in doubt
"""

from typing import Any

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Uint32
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor
from cutlass.memory import SmemAllocator

from cute_router.epilogue.row import route_row
from cute_router.epilogue.scoring import activate
from cute_router.epilogue.weights import weight
from cute_router.topk.block import BLOCK, read_block
from cute_router.topk.config import GateConfig, dsl_type
from cute_router.topk.key import REMOVED, key
from cute_router.topk.lanes import Lanes
from cute_router.topk.rounds import WARP


class GateKernel:
    """One configuration of the kernel, ready for `cute.compile`."""

    def __init__(self, config: GateConfig):
        self.cfg = config
        spec = config.spec
        self.lay = Lanes(spec.num_experts, spec.top_k, config.lanes, exact=False)
        self.tokens = WARP // config.lanes  # of a warp
        self.padded = -(-spec.num_experts // WARP) * WARP

    @cute.jit
    def __call__(
        self,
        mLogits: cute.Tensor,  # (N, E)
        mBias: cute.Tensor | None,  # (E) fp32
        mWeights: cute.Tensor,  # (N, k) fp32
        mIds: cute.Tensor,  # (N, k) int32
        factor: Float32,
        stream: cuda.CUstream,
    ):
        """Launch; traced into the kernel's host code."""
        c = self.cfg
        self.kernel.set_name_prefix("cute_router_gate", remove_cutlass_symbol=True)
        self.kernel(mLogits, mBias, mWeights, mIds, factor).launch(
            grid=[cute.ceil_div(cute.size(mLogits, mode=[0]), c.warps * self.tokens), 1, 1],
            block=[WARP * c.warps, 1, 1],
            stream=stream,
            use_pdl=c.pdl,
        )

    @cute.kernel
    def kernel(
        self,
        mLogits: cute.Tensor,
        mBias: cute.Tensor | None,
        mWeights: cute.Tensor,
        mIds: cute.Tensor,
        factor: Float32,
    ):
        """A warp routes one token, or a few."""
        c = self.cfg
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        first = (cute.arch.block_idx()[0] * c.warps + warp) * self.tokens
        # Only expert groups put keys there.
        rows = self.padded if cutlass.const_expr(c.spec.n_group > 1) else 1
        sKeys = SmemAllocator().allocate_tensor(Uint32, cute.make_layout((rows, c.warps)), 16)
        if cutlass.const_expr(c.pdl):
            cute.arch.griddepcontrol_launch_dependents()
            cute.arch.griddepcontrol_wait()
        if cutlass.const_expr(c.by_words):
            doubts = self.route(mLogits, mBias, mWeights, mIds, factor, first)
        else:
            doubts = Int32(first < cute.size(mLogits, mode=[0]))
        while doubts != 0:
            token = first + cute.arch.popc((doubts & -doubts) - 1) // c.lanes
            route_row(
                mLogits[(token, None)],
                mBias,
                sKeys[(None, warp)],
                mWeights[(token, None)],
                mIds[(token, None)],
                factor,
                cute.arch.lane_idx(),
                c.spec,
            )
            doubts = doubts & (doubts - 1)

    @cute.jit
    def route(
        self,
        mLogits: cute.Tensor,
        mBias: cute.Tensor | None,
        mWeights: cute.Tensor,
        mIds: cute.Tensor,
        factor: Float32,
        first: Int32,
    ) -> Int32:
        """Route the warp's tokens by words; the bits of the lanes whose token is left in doubt."""
        c = self.cfg
        lane = cute.arch.lane_idx() % c.lanes
        token = first + cute.arch.lane_idx() // c.lanes
        last = cute.size(mLogits, mode=[0]) - 1
        gLogits = mLogits[(cutlass.min(token, last), None)]  # lanes without one repeat the last

        def fetch(block):
            start = self.lay.first(block, lane)
            rows = (gLogits,) if cutlass.const_expr(mBias is None) else (gLogits, mBias)
            return [read_block(row, start, self.whole(block), c.vector) for row in rows]

        def keys(read, block):
            return self.keys(self.lay.first(block, lane), self.whole(block), *read)

        pick = self.lay.pick(fetch, keys, lane)
        doubtful = pick.doubtful and token <= last
        settled = token <= last and not pick.doubtful
        self.store(pick.words, gLogits, mBias, mWeights, mIds, factor, token, lane, settled)
        return cute.arch.vote_ballot_sync(doubtful and lane == 0)

    def whole(self, block: int) -> bool:
        """Whether no lane's block ends past the experts."""
        return (block + 1) * self.cfg.lanes * BLOCK <= self.cfg.spec.num_experts

    def keys(self, start: Int32, whole: bool, rLogits: cute.Tensor, rBias: Any = None) -> list:
        """The keys of 8 experts; REMOVED past the last. A NaN counts as -inf until it is in doubt.

        Should two of them be among the k best or at the edge, whole keys tell them apart.
        """
        words = []
        for i in range(BLOCK):
            score = activate(rLogits[i].to(Float32), self.cfg.spec.scoring)
            if rBias is not None:
                score = score + rBias[i]
            word = key(cute.arch.fmax(score, -Float32.inf), "first")
            if not whole:
                real = start + i < self.cfg.spec.num_experts
                word = cutlass.select_(real, word, Uint32(REMOVED))
            words.append(word)
        return words

    @cute.jit
    def store(
        self,
        words: list,
        gLogits: cute.Tensor,
        mBias: cute.Tensor | None,
        mWeights: cute.Tensor,
        mIds: cute.Tensor,
        factor: Float32,
        token: Int32,
        lane: Int32,
        settled: Boolean,
    ) -> None:
        """Weigh the chosen experts by their activations, computed again, and write both."""
        c, lay = self.cfg, self.lay
        rKeys = cute.make_rmem_tensor(lay.slots, Uint32)
        rPlaces = cute.make_rmem_tensor(lay.slots, Int32)
        rIds = cute.make_rmem_tensor(lay.slots, Int32)
        rActs = cute.make_rmem_tensor(lay.slots, Float32)
        total = Float32(0.0)
        for slot in cutlass.range_constexpr(lay.slots):
            chosen = lane + slot * c.lanes < c.spec.top_k
            expert = lay.index(lay.mine(words, slot, lane))
            rIds[slot] = cutlass.select_(chosen, expert, Int32(0))
            activation = activate(gLogits[rIds[slot]].to(Float32), c.spec.scoring)
            score = activation
            if cutlass.const_expr(mBias is not None):
                score = score + mBias[rIds[slot]]
            rKeys[slot] = key(score)
            rActs[slot] = activation
            total = total + cutlass.select_(chosen, activation, Float32(0.0))
        lay.places(words, rKeys, lane, rPlaces)
        total = cute.arch.warp_reduction_sum(total, threads_in_group=c.lanes)
        for slot in cutlass.range_constexpr(lay.slots):
            if settled and lane + slot * c.lanes < c.spec.top_k:
                mWeights[token, rPlaces[slot]] = weight(rActs[slot], total, factor, c.spec)
                mIds[token, rPlaces[slot]] = rIds[slot]


def trace(config: GateConfig) -> tuple[GateKernel, tuple[Any, ...]]:
    """The kernel of `config` and stand-ins for its arguments, for `cute.compile`."""
    dtype = dsl_type(config.dtype)
    E, k, N = config.spec.num_experts, config.spec.top_k, cute.sym_int32()
    unit = 128 // dtype.width if config.vector else 1
    align = 16 if config.vector else dtype.width // 8
    bias_align = 16 if config.vector else 4
    bias = make_fake_tensor(Float32, (E,), (1,), assumed_align=bias_align)
    stride = cute.sym_int64(divisibility=unit)
    return GateKernel(config), (
        make_fake_tensor(dtype, (N, E), (stride, 1), assumed_align=align),
        bias if config.spec.has_bias else None,
        make_fake_tensor(Float32, (N, k), (k, 1), assumed_align=4),
        make_fake_tensor(Int32, (N, k), (k, 1), assumed_align=4),
        Float32(1.0),
        make_fake_stream(use_tvm_ffi_env_stream=True),
    )

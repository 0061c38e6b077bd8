"""The router's step on given logits: weights, ids = renorm(topk(act(logits) + bias)).

scorings of one logit      a few lanes to a token: logits -> activations, scores -> the k best
                           (`epilogue.by_threshold`) -> weights
softmax, expert groups,    a warp to a token (`epilogue.row`)
tokens left in doubt
"""

from typing import Any

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Uint16, Uint32
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor
from cutlass.memory import SmemAllocator

from cute_router.epilogue.by_threshold import ByThreshold
from cute_router.epilogue.outputs import (
    Outputs,
    bias_of_row,
    extra_of,
    fake_extra,
    fake_results,
    is_token,
    put_biases,
)
from cute_router.epilogue.row import route_row
from cute_router.topk.config import WARP, GateConfig, dsl_type
from cute_router.topk.ptx import lowest_bit
from cute_router.topk.sieve import Sieve
from cute_router.topk.staging import arrived, read, stage, write


class GateKernel:
    """One configuration of the kernel, ready for `cute.compile`."""

    def __init__(self, config: GateConfig):
        self.cfg = config
        spec = config.spec
        self.lay = Sieve(spec.num_experts, spec.top_k, config.lanes, config.run, ragged=False)
        self.chooser = ByThreshold(spec, self.lay, batch=1)
        self.tokens = WARP // config.lanes  # of a warp
        self.padded = -(-spec.num_experts // WARP) * WARP

    @cute.jit
    def __call__(
        self,
        mLogits: cute.Tensor,  # (N, E)
        mBias: cute.Tensor | None,  # (E) fp32
        mWeights: cute.Tensor | None,  # results, see `epilogue.outputs`
        mIds: cute.Tensor,
        factor: Float32,
        stream: cuda.CUstream,
        *extra,
    ):
        """Launch; traced into the kernel's host code."""
        c = self.cfg
        self.kernel.set_name_prefix("cute_router_gate", remove_cutlass_symbol=True)
        self.kernel(mLogits, mBias, mWeights, mIds, factor, extra_of(extra)).launch(
            grid=[cute.ceil_div(cute.size(mLogits, mode=[0]), c.warps * self.tokens), 1, 1],
            block=[WARP * c.warps, 1, 1],
            stream=stream,
            use_pdl=c.overlaps,
        )

    @cute.kernel
    def kernel(
        self,
        mLogits: cute.Tensor,
        mBias: cute.Tensor | None,
        mWeights: cute.Tensor | None,
        mIds: cute.Tensor,
        factor: Float32,
        extra: Any,
    ):
        """A warp routes one token, or a few."""
        c, out = self.cfg, Outputs(mWeights, mIds, factor, extra)
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        first = (cute.arch.block_idx()[0] * c.warps + warp) * self.tokens
        smem = SmemAllocator()
        has_bias = c.spec.has_bias or c.extras.second_bias
        sBias = self.load_bias(smem, mBias, extra) if cutlass.const_expr(has_bias) else None
        if cutlass.const_expr(c.overlaps):
            cute.arch.griddepcontrol_launch_dependents()
            cute.arch.griddepcontrol_wait()
        if cutlass.const_expr(c.by_threshold):
            doubts = self.route(smem, mLogits, sBias, out, first, warp)
            sKeys = None
        else:
            doubts = Int32(first < cute.size(mLogits, mode=[0]))
            sKeys = smem.allocate_tensor(Uint32, cute.make_layout((self.padded, c.warps)), 16)
            sKeys = sKeys[None, warp]
        while doubts != 0:
            token = first + lowest_bit(doubts) // c.lanes
            route_row(
                mLogits[token, None],
                bias_of_row(sBias, out, token),
                sKeys,
                out.of_row(token),
                is_token(out, token),
                cute.arch.lane_idx(),
                c.spec,
            )
            doubts = doubts & (doubts - 1)

    @cute.jit
    def load_bias(self, smem: SmemAllocator, mBias: Any, extra: Any) -> cute.Tensor:
        """The bias, or both, in shared memory. May be read before the wait for the kernel ahead."""
        tid, threads = cute.arch.thread_idx()[0], WARP * self.cfg.warps
        biases = (self.lay.room, 2) if self.cfg.extras.second_bias else self.lay.room
        sBias = smem.allocate_tensor(Float32, cute.make_layout(biases), 16)
        if cutlass.const_expr(self.cfg.extras.second_bias):
            put_biases(sBias, mBias, extra, self.cfg.spec.num_experts, tid, threads)
        else:
            for i in cutlass.range_constexpr(-(-cute.size(mBias) // threads)):
                if tid + i * threads < cute.size(mBias):
                    sBias[tid + i * threads] = mBias[tid + i * threads]
        cute.arch.sync_threads()
        return sBias

    @cute.jit
    def route(
        self,
        smem: SmemAllocator,
        mLogits: cute.Tensor,
        sBias: Any,
        out: Outputs,
        first: Int32,
        warp: Int32,
    ) -> Int32:
        """Route the warp's tokens by a threshold; the bits of lanes whose token is in doubt."""
        c, lay = self.cfg, self.lay
        lane = cute.arch.lane_idx() % c.lanes
        token = first + cute.arch.lane_idx() // c.lanes
        last = cute.size(mLogits, mode=[0]) - 1
        layout = cute.make_layout((lay.room, self.tokens, c.warps))
        sRow = smem.allocate_tensor(mLogits.element_type, layout, 16)[None, token - first, warp]
        sActs = sRow  # activations take the place of logits that have as many bits
        if cutlass.const_expr(mLogits.element_type is not Float32):
            sActs = smem.allocate_tensor(Float32, layout, 16)[None, token - first, warp]
        layout = cute.make_layout((lay.capacity, self.tokens, c.warps))
        sList = smem.allocate_tensor(Uint16, layout, 16)[None, token - first, warp]

        source = cutlass.min(token, last)  # lanes without a token take the last, and store nothing
        stage(mLogits[source, None], sRow, lay, lane, c.vector)
        sBias, real = bias_of_row(sBias, out, source), is_token(out, source)

        def logits(block):
            arrived(block, lay, c.vector)
            return read(sRow, lay, block, lane)

        rScores = self.chooser.scores(
            logits,
            None if sBias is None else lambda block: read(sBias, lay, block, lane),
            lambda block, rActs: write(rActs, sActs, lay, block, lane),
            lane,
        )
        choice = self.chooser.pick(rScores, sActs, sBias, sList, lane)
        there, doubtful = token <= last, self.chooser.in_doubt(choice, lane, real)
        self.chooser.store(choice, sActs, out, token, lane, there and not doubtful, real)
        return cute.arch.vote_ballot_sync(doubtful and there and lane == 0)


def trace(config: GateConfig) -> tuple[GateKernel, tuple[Any, ...]]:
    """The kernel of `config` and stand-ins for its arguments, for `cute.compile`."""
    dtype = dsl_type(config.dtype)
    E, k, N = config.spec.num_experts, config.spec.top_k, cute.sym_int32()
    stride = cute.sym_int64(divisibility=config.run if config.vector else 1)
    align = 16 if config.vector else dtype.width // 8
    return GateKernel(config), (
        make_fake_tensor(dtype, (N, E), (stride, 1), assumed_align=align),
        make_fake_tensor(Float32, (E,), (1,), assumed_align=4) if config.spec.has_bias else None,
        *fake_results(N, k, config.extras),
        Float32(1.0),
        make_fake_stream(use_tvm_ffi_env_stream=True),
        *fake_extra(N, E, config.extras),
    )

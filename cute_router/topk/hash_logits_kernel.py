"""Hash routing weighed by given logits: what softmax needs, and many tokens.

    a_j = activation(l[e_j]), of softmax over all E;   w = a / sum(a) * factor

The grid is (N / warps): one warp a token, lane j slot j.
"""

from typing import Any

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from cute_router.epilogue.scoring import activate, exp_nonpositive
from cute_router.topk.config import WARP
from cute_router.topk.hash_config import HashLogitsConfig
from cute_router.topk.hash_row import NO_EXPERT, fake_lookup, fake_outputs, look_up, store_row


class HashLogitsKernel:
    """One configuration of the kernel, ready for `cute.compile`."""

    def __init__(self, config: HashLogitsConfig):
        self.cfg = config

    @cute.jit
    def __call__(
        self,
        mTokens: cute.Tensor,  # (N) token ids
        mTable: cute.Tensor,  # (vocab, k)
        mLogits: cute.Tensor,  # (N, E) fp32
        mWeights: cute.Tensor,  # (N, k) fp32
        mIds: cute.Tensor,  # (N, k) int32
        factor: Float32,
        stream: cuda.CUstream,
    ):
        """Launch; traced into the kernel's host code."""
        warps = self.cfg.warps
        self.kernel.set_name_prefix("cute_router_hash_logits", remove_cutlass_symbol=True)
        self.kernel(mTokens, mTable, mLogits, mWeights, mIds, factor).launch(
            grid=[cute.ceil_div(cute.size(mTokens), warps), 1, 1],
            block=[WARP * warps, 1, 1],
            stream=stream,
        )

    @cute.kernel
    def kernel(
        self,
        mTokens: cute.Tensor,
        mTable: cute.Tensor,
        mLogits: cute.Tensor,
        mWeights: cute.Tensor,
        mIds: cute.Tensor,
        factor: Float32,
    ):
        """One warp routes one token."""
        c, lane = self.cfg, cute.arch.lane_idx()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        token = cute.arch.block_idx()[0] * c.warps + warp
        if token < cute.size(mTokens):
            E = mLogits.shape[1]
            row = mLogits.iterator + Int64(token) * mLogits.stride[0]
            gLogits = cute.make_tensor(row, cute.make_layout(E))
            expert = look_up(mTokens, mTable, token, E, lane)
            logit = Float32(0.0)
            if expert != NO_EXPERT:
                logit = gLogits[expert]
            if cutlass.const_expr(c.spec.scoring == "softmax"):
                activation = softmax_at(gLogits, logit, lane)
            else:
                activation = activate(logit, c.spec.scoring)
            store_row(expert, activation, mWeights, mIds, token, factor, lane, c.spec)


@cute.jit
def softmax_at(gLogits: cute.Tensor, logit: Float32, lane: Int32) -> Float32:
    """The softmax of `logit` in its row; NaN where the row has a NaN or +inf. One warp calls."""
    E = cute.size(gLogits)
    high = -Float32.inf
    for e in cutlass.range(lane, E, WARP):
        high = cute.arch.fmax(high, gLogits[e])
    high = cute.arch.warp_reduction_max(high)
    total = Float32(0.0)
    for e in cutlass.range(lane, E, WARP):
        total = total + exp_below(gLogits[e], high)
    return exp_below(logit, high) / cute.arch.warp_reduction_sum(total)


@cute.jit
def exp_below(logit: Float32, high: Float32) -> Float32:
    """exp(logit - high) for a logit that is not above `high`, NaN if either is none."""
    d = logit - high
    return cutlass.select_(d == d, exp_nonpositive(d), d)


def trace(config: HashLogitsConfig) -> tuple[HashLogitsKernel, tuple[Any, ...]]:
    """The kernel of `config` and stand-ins for its arguments, for `cute.compile`."""
    N = cute.sym_int32()
    logits = make_fake_tensor(
        Float32, (N, cute.sym_int32()), (cute.sym_int64(), 1), assumed_align=4
    )
    return HashLogitsKernel(config), (
        *fake_lookup(config, N),
        logits,
        *fake_outputs(config, N),
        Float32(1.0),
        make_fake_stream(use_tvm_ffi_env_stream=True),
    )

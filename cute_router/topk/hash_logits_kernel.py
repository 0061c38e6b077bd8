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

from cute_router.epilogue.outputs import Outputs, extra_of
from cute_router.epilogue.scoring import activate, exp_nonpositive
from cute_router.topk.config import WARP, dsl_type
from cute_router.topk.hash_config import HashLogitsConfig
from cute_router.topk.hash_row import (
    NO_EXPERT,
    fake_extras,
    fake_lookup,
    fake_outputs,
    is_real,
    look_up,
    store_row,
)


class HashLogitsKernel:
    """One configuration of the kernel, ready for `cute.compile`."""

    def __init__(self, config: HashLogitsConfig):
        self.cfg = config

    @cute.jit
    def __call__(
        self,
        mTokens: cute.Tensor | None,  # (N) token ids
        mTable: cute.Tensor,  # (vocab, k)
        mLogits: cute.Tensor,  # (N, E)
        mWeights: cute.Tensor | None,  # results, see `epilogue.outputs`
        mIds: cute.Tensor,
        factor: Float32,
        stream: cuda.CUstream,
        *extra,
    ):
        """Launch; traced into the kernel's host code."""
        warps = self.cfg.warps
        self.kernel.set_name_prefix("cute_router_hash_logits", remove_cutlass_symbol=True)
        self.kernel(mTokens, mTable, mLogits, mWeights, mIds, factor, extra_of(extra)).launch(
            grid=[cute.ceil_div(cute.size(mLogits, mode=[0]), warps), 1, 1],
            block=[WARP * warps, 1, 1],
            stream=stream,
        )

    @cute.kernel
    def kernel(
        self,
        mTokens: cute.Tensor | None,
        mTable: cute.Tensor,
        mLogits: cute.Tensor,
        mWeights: cute.Tensor | None,
        mIds: cute.Tensor,
        factor: Float32,
        extra: Any,
    ):
        """One warp routes one token."""
        c, lane = self.cfg, cute.arch.lane_idx()
        out = Outputs(mWeights, mIds, factor, extra)
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        token = cute.arch.block_idx()[0] * c.warps + warp
        if token < cute.size(mLogits, mode=[0]):
            E = mLogits.shape[1]
            row = mLogits.iterator + Int64(token) * mLogits.stride[0]
            gLogits = cute.make_tensor(row, cute.make_layout(E))
            expert = look_up(mTokens, mTable, token, E, lane)
            real = is_real(mTokens, mTable, token, out)
            logit = Float32(0.0)
            if expert != NO_EXPERT:
                logit = gLogits[expert].to(Float32)
            if cutlass.const_expr(c.spec.scoring == "softmax"):
                activation = softmax_at(gLogits, logit, lane)
            else:
                activation = activate(logit, c.spec.scoring)
            store_row(expert, activation, out, token, E, real, lane, c.spec)


@cute.jit
def softmax_at(gLogits: cute.Tensor, logit: Float32, lane: Int32) -> Float32:
    """The softmax of `logit` in its row; NaN where the row has a NaN or +inf. One warp calls."""
    E = cute.size(gLogits)
    high = -Float32.inf
    for e in cutlass.range(lane, E, WARP):
        high = cute.arch.fmax(high, gLogits[e].to(Float32))
    high = cute.arch.warp_reduction_max(high)
    total = Float32(0.0)
    for e in cutlass.range(lane, E, WARP):
        total = total + exp_below(gLogits[e].to(Float32), high)
    return exp_below(logit, high) / cute.arch.warp_reduction_sum(total)


@cute.jit
def exp_below(logit: Float32, high: Float32) -> Float32:
    """exp(logit - high) for a logit that is not above `high`, NaN if either is none."""
    d = logit - high
    return cutlass.select_(d == d, exp_nonpositive(d), d)


def trace(config: HashLogitsConfig) -> tuple[HashLogitsKernel, tuple[Any, ...]]:
    """The kernel of `config` and stand-ins for its arguments, for `cute.compile`."""
    N, dtype = cute.sym_int32(), dsl_type(config.dtype)
    shape, strides = (N, cute.sym_int32()), (cute.sym_int64(), 1)
    logits = make_fake_tensor(dtype, shape, strides, assumed_align=dtype.width // 8)
    return HashLogitsKernel(config), (
        *fake_lookup(config, N),
        logits,
        *fake_outputs(config, N),
        Float32(1.0),
        make_fake_stream(use_tvm_ffi_env_stream=True),
        *fake_extras(config, N),
    )

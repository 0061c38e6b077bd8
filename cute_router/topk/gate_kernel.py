"""The router's step on given logits: weights, ids = renorm(topk(act(logits) + bias)).

The grid is (N / warps): one warp a token (`epilogue.row`).
"""

from typing import Any

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Uint32
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor
from cutlass.memory import SmemAllocator

from cute_router.epilogue.row import WARP, route_row
from cute_router.topk.config import GateConfig


class GateKernel:
    """One configuration of the kernel, ready for `cute.compile`."""

    def __init__(self, config: GateConfig):
        self.cfg = config
        self.padded = -(-config.spec.num_experts // WARP) * WARP

    @cute.jit
    def __call__(
        self,
        mLogits: cute.Tensor,  # (N, E) fp32
        mBias: cute.Tensor | None,  # (E) fp32
        mWeights: cute.Tensor,  # (N, k) fp32
        mIds: cute.Tensor,  # (N, k) int32
        factor: Float32,
        stream: cuda.CUstream,
    ):
        """Launch; traced into the kernel's host code."""
        warps = self.cfg.warps
        self.kernel.set_name_prefix("cute_router_gate", remove_cutlass_symbol=True)
        self.kernel(mLogits, mBias, mWeights, mIds, factor).launch(
            grid=[cute.ceil_div(cute.size(mLogits, mode=[0]), warps), 1, 1],
            block=[WARP * warps, 1, 1],
            stream=stream,
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
        """One warp routes one token."""
        c = self.cfg
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        token = cute.arch.block_idx()[0] * c.warps + warp
        # Only expert groups put keys there.
        rows = self.padded if cutlass.const_expr(c.spec.n_group > 1) else 1
        sKeys = SmemAllocator().allocate_tensor(Uint32, cute.make_layout((rows, c.warps)), 16)
        if token < cute.size(mLogits, mode=[0]):
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


def trace(config: GateConfig) -> tuple[GateKernel, tuple[Any, ...]]:
    """The kernel of `config` and stand-ins for its arguments, for `cute.compile`."""
    E, k, N = config.spec.num_experts, config.spec.top_k, cute.sym_int32()
    return GateKernel(config), (
        make_fake_tensor(Float32, (N, E), (cute.sym_int64(), 1), assumed_align=4),
        make_fake_tensor(Float32, (E,), (1,), assumed_align=4) if config.spec.has_bias else None,
        make_fake_tensor(Float32, (N, k), (k, 1), assumed_align=4),
        make_fake_tensor(Int32, (N, k), (k, 1), assumed_align=4),
        Float32(1.0),
        make_fake_stream(use_tvm_ffi_env_stream=True),
    )

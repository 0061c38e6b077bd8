"""Kernels with a planted fault each, to show that the checks on compiled code can fail."""

from dataclasses import dataclass
from typing import Any

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int64
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor
from cutlass.memory import SmemAllocator

WORDS = 256


@dataclass(frozen=True)
class PlantedConfig:
    """fault: "none", "barrier" (a wait on one never initialised) or "local" (local memory)."""

    arch: str
    fault: str


class PlantedKernel:
    def __init__(self, config: PlantedConfig):
        self.cfg = config

    @cute.jit
    def __call__(self, mOut: cute.Tensor, stream: cuda.CUstream):
        self.kernel(mOut).launch(grid=[1, 1, 1], block=[32, 1, 1], stream=stream)

    @cute.kernel
    def kernel(self, mOut: cute.Tensor):
        barrier = SmemAllocator().allocate_array(Int64, 1, byte_alignment=8)
        if cutlass.const_expr(self.cfg.fault != "barrier"):
            with cute.arch.elect_one():
                cute.arch.mbarrier_init(barrier, 1)
            cute.arch.mbarrier_init_fence()
            cute.arch.sync_threads()
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive(barrier)
        cute.arch.mbarrier_wait(barrier, 0)
        lane = cute.arch.lane_idx()
        rOut = cute.make_rmem_tensor(WORDS, Float32)
        rOut.store(mOut.load())
        if cutlass.const_expr(self.cfg.fault == "local"):
            mOut[lane] = rOut[7 * lane]  # registers have no run-time index
        else:
            mOut[lane] = rOut[0] + rOut[WORDS - 1]


def trace(config: PlantedConfig) -> tuple[PlantedKernel, tuple[Any, ...]]:
    """As the tracers of `compile.TRACERS`."""
    return PlantedKernel(config), (
        make_fake_tensor(Float32, (WORDS,), (1,), assumed_align=16),
        make_fake_stream(use_tvm_ffi_env_stream=True),
    )

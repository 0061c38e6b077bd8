"""A kernel that does nothing, in a chain of its like: the floor under any launch of its grid."""

from functools import cache

import cuda.bindings.driver as cuda
import cutlass.cute as cute
import torch
from cutlass import Int32
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor
from timing import graph_us

CALLS = 40


class EmptyKernel:
    """Launches CTAs of `threads` threads under programmatic dependent launch."""

    def __init__(self, threads: int):
        self.threads = threads

    @cute.jit
    def __call__(self, place: cute.Tensor, ctas: Int32, stream: cuda.CUstream):
        """Launch `ctas` of them where `place` is."""
        self.kernel().launch(
            grid=[ctas, 1, 1], block=[self.threads, 1, 1], stream=stream, use_pdl=True
        )

    @cute.kernel
    def kernel(self):
        """Let the kernel behind start, and wait for the one ahead."""
        cute.arch.griddepcontrol_launch_dependents()
        cute.arch.griddepcontrol_wait()


@cache
def empty_kernel(threads: int):
    """The compiled kernel; launches on torch's current stream."""
    place = make_fake_tensor(Int32, (1,), (1,), assumed_align=4)
    stream = make_fake_stream(use_tvm_ffi_env_stream=True)
    entry = EmptyKernel(threads)
    compiled = cute.compile(entry, place, Int32(1), stream, options="--enable-tvm-ffi")
    return compiled.__tvm_ffi_object__()


def empty_us(ctas: int, threads: int) -> float:
    """Microseconds a launch."""
    kernel = empty_kernel(threads)
    place = torch.zeros(1, dtype=torch.int32, device="cuda")
    return graph_us(lambda _: kernel(place, ctas), CALLS)

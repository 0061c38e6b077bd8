"""The floor under every decode router, and the bandwidth that is the floor under many tokens.

Both are the time of a kernel that only reads: W once, or half a GiB. It has no programmatic
dependent launch, so of W what is measured is an upper bound of the floor: a kernel that begins to
load before its predecessor ends can come in under it.
"""

import torch
import triton
import triton.language as tl
from timing import graph_us
from torch import Tensor

BLOCKS = (1024, 2048, 4096, 8192)  # words a CTA reads
WORDS = 16  # a thread reads: four loads of 16 bytes
STREAMED_BYTES = 2**29  # so long, about 120 us on an H200, that a launch is no part of it


@triton.jit
def read_once(words, sink, count, BLOCK: tl.constexpr):
    """Read `count` 32-bit words."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.sum(tl.load(words + at, mask=at < count, other=0))
    # Almost never so, which the compiler cannot know: without a use it would drop the loads.
    if total == 0x5EED:
        tl.store(sink, total)


def bandwidth_tb_s() -> float:
    """The TB/s at which this GPU's memory can be read."""
    streamed = [torch.randn(STREAMED_BYTES // 4, device="cuda") for _ in range(2)]
    return STREAMED_BYTES / stream_us(streamed) / 1e6


def stream_us(tensors: list[Tensor]) -> float:
    """Microseconds to read one of these tensors of one size, by the best of a few block sizes."""
    words = [tensor.view(torch.int32).flatten() for tensor in tensors]
    sink = torch.zeros(1, dtype=torch.int32, device="cuda")
    count = words[0].numel()

    def us(block: int) -> float:
        grid, num_warps = (triton.cdiv(count, block),), block // WORDS // 32
        return graph_us(
            lambda i: read_once[grid](words[i], sink, count, BLOCK=block, num_warps=num_warps),
            len(words),
        )

    return min(us(block) for block in BLOCKS)

"""The table of times that a report ends with: CUDA graphs whose buffers come from memory."""

import math
import statistics
from collections.abc import Callable, Sequence

import torch

from cute_router import functional
from cute_router.selftest.cases import FACTOR

CALLS = 20  # in one graph, at least
REPLAYS = 30
PAST_L2 = 4 / 3  # of its size: what the buffers of a graph take together, at least


def table(sizes: Sequence[tuple[int, int, int]], device: torch.device) -> list[str]:
    """A line for each (E, K, N): the time of `dense_decode`, and the rate at which W is read."""
    lines = []
    for E, K, N in sizes:
        us = decode_us(E, K, N, device)
        rate = 2 * E * K / us / 1e6
        lines.append(f"N={N:<3} E={E} K={K} k=6 bf16 | {us:6.2f} us | W at {rate:.2f} TB/s")
    return lines


def decode_us(E: int, K: int, N: int, device: torch.device) -> float:
    """Median microseconds of `dense_decode` among others of its kind, as in a model's layers."""
    buffers = sets_past_l2(2 * E * K, device)
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    Ws = [(normal(E, K) * K**-0.5).bfloat16() for _ in range(buffers)]
    xs = [normal(N, K).bfloat16() for _ in range(buffers)]
    bias = normal(E) * 0.1
    weights = torch.empty(N, 6, device=device)
    ids = torch.empty(N, 6, dtype=torch.int32, device=device)
    torch.cuda.synchronize(device)  # kernels under programmatic dependent launch read W early

    def call(i: int) -> None:
        functional.dense_decode(
            xs[i % buffers],
            Ws[i % buffers],
            bias,
            routed_scaling_factor=FACTOR,
            out_weights=weights,
            out_ids=ids,
        )

    return graph_us(call, max(CALLS, buffers))


def sets_past_l2(nbytes: int, device: torch.device) -> int:
    """How many sets of this size a graph must rotate through for none to stay in the L2 cache."""
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, math.ceil(PAST_L2 * l2 / nbytes))


def graph_us(call: Callable[[int], None], calls: int) -> float:
    """Median microseconds of one of `calls` calls in a graph."""
    call(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            call(i)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times: list[float] = []
    for replay in range(3 + REPLAYS):
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if replay >= 3:  # the first ones bring the clocks up
            times.append(start.elapsed_time(end) * 1e3 / calls)
    return statistics.median(times)

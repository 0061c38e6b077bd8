"""dense_decode under load: every result is bit-equal to the one of a quiet GPU.

One link of a chain is

    a kernel that writes x  ->  dense_decode  ->  a kernel that reads its weights and ids

with one buffer x that every link overwrites, so that a read too early, a read too late or a write
too early gives another token's experts. Chains run as CUDA graphs and eagerly, on several streams
at once. The neighbours are torch's own kernels, or Triton ones that take part in programmatic
dependent launch and trigger at their first line, which leaves all of the ordering to the waits.
"""

from typing import Any, NamedTuple

import pytest
import torch
from cases import FLASH, PRO, Case
from oracle import assert_routing
from torch import Tensor

from cute_router import dense_decode

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU-only installation of torch
    triton = None

CALLS = 10_000
LINKS = 20  # in one graph
EAGER_LINKS = 5  # in a row on one stream, between two replays
VERSIONS = 4  # of the hidden states, which take turns from replay to replay


class Results(NamedTuple):
    """The routings of all links: [versions, links, N, k], or [links, N, k] of one replay."""

    weights: Tensor
    ids: Tensor


class Chain:
    """Links of write, decode, read over one x, with the results that a quiet GPU gave."""

    def __init__(
        self,
        case: Case,
        device: torch.device | str,
        links: int = LINKS,
        versions: int = VERSIONS,
        pdl_neighbours: bool = False,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device)

        self.case, self.links = case, links
        self.copy = pdl_copy if pdl_neighbours else plain_copy
        self.W = (normal(case.E, case.K) * case.K**-0.5).bfloat16()
        self.bias = normal(case.E) * 0.1
        self.versions = normal(versions, links, case.N, case.K).bfloat16()
        # What a graph reads: its addresses are fixed, so each replay gets its version copied in.
        self.source = self.versions[0].clone()
        self.x = torch.zeros_like(self.source[0])
        shape = (links, case.N, case.top_k)
        self.log = Results(
            torch.zeros(shape, device=device), torch.zeros(shape, dtype=torch.int32, device=device)
        )
        self.mismatches = torch.zeros((), dtype=torch.int64, device=device)
        self.expected = self.quiet()

    def quiet(self) -> Results:
        """Every result, from one synchronised call after another; held to the oracle."""
        weights, ids = [], []
        for x in self.versions.flatten(0, 1):
            routing = dense_decode(x, self.W, self.bias, **self.case.options)
            if x.is_cuda:
                torch.cuda.synchronize()
            weights.append(routing.weights)
            ids.append(routing.ids)
        assert_routing(routing, x, self.W, self.bias, **self.case.options)
        shape = (*self.versions.shape[:3], self.case.top_k)
        return Results(torch.stack(weights).view(shape), torch.stack(ids).view(shape))

    def run(self) -> None:
        """All links once; this is what graphs capture."""
        for source, log_weights, log_ids in zip(self.source, *self.log, strict=True):
            self.copy(source, self.x)
            routing = dense_decode(self.x, self.W, self.bias, **self.case.options)
            self.copy(routing.weights, log_weights)
            self.copy(routing.ids, log_ids)

    def replay(self, version: int, graph: Any = None) -> None:
        """Run or replay the chain on one version of x, and count the tokens that differ."""
        self.source.copy_(self.versions[version])
        if graph is None:
            self.run()
        else:
            graph.replay()
        differ = self.log.weights.view(torch.int32) != self.expected.weights[version].view(
            torch.int32
        )
        differ |= self.log.ids != self.expected.ids[version]
        self.mismatches += differ.any(-1).sum()


def plain_copy(source: Tensor, target: Tensor) -> None:
    """Copy by a kernel: `copy_` would be a copy engine's or the driver's."""
    torch.mul(source, 1, out=target)


def pdl_copy(source: Tensor, target: Tensor) -> None:
    """Copy by a kernel that lets its successor start at once, and itself starts early."""
    block = 1024
    grid = (triton.cdiv(source.numel(), block),)
    pdl_copy_kernel[grid](source, target, source.numel(), BLOCK=block, launch_pdl=True)


if triton is not None:

    @triton.jit
    def pdl_copy_kernel(source, target, count, BLOCK: tl.constexpr):
        tl.extra.cuda.gdc_launch_dependents()
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.extra.cuda.gdc_wait()
        tl.store(target + at, tl.load(source + at, mask=at < count), mask=at < count)


def captured(chain: Chain) -> torch.cuda.CUDAGraph:
    """The chain as a graph; it has run once before, so that nothing compiles in the capture."""
    chain.run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain.run()
    return graph


NEIGHBOURS = [
    pytest.param(False, id="torch_neighbours"),
    pytest.param(
        True,
        id="pdl_neighbours",
        marks=pytest.mark.skipif(triton is None, reason="needs Triton for kernels with PDL"),
    ),
]


@pytest.mark.gpu
@pytest.mark.parametrize("pdl_neighbours", NEIGHBOURS)
@pytest.mark.parametrize(("E", "K"), [FLASH, PRO])
@pytest.mark.parametrize("N", [1, 8, 64])
def test_a_captured_chain_gives_the_quiet_results_at_every_replay(E, K, N, pdl_neighbours):
    chain = Chain(Case("chain", E, K, N), "cuda", pdl_neighbours=pdl_neighbours)
    graph = captured(chain)
    for i in range(25):
        chain.replay(i % VERSIONS, graph)
    assert chain.mismatches.item() == 0, f"of {25 * LINKS * N} tokens"


@pytest.mark.gpu
@pytest.mark.parametrize("pdl_neighbours", NEIGHBOURS)
def test_graphs_and_eager_calls_on_six_streams_give_the_quiet_results(pdl_neighbours):
    graphs, eager = [], []
    for i, (E, K) in enumerate((FLASH, PRO)):
        in_graph = Case("graph", E, K, (8, 64)[i])
        graphs.append(Chain(in_graph, "cuda", pdl_neighbours=pdl_neighbours, seed=i))
        for N in ((3, 64), (1, 16))[i]:
            case = Case("eager", E, K, N)
            eager.append(Chain(case, "cuda", EAGER_LINKS, VERSIONS, pdl_neighbours, seed=N))
    work = [(chain, captured(chain)) for chain in graphs] + [(chain, None) for chain in eager]
    torch.cuda.synchronize()

    streams = [torch.cuda.Stream() for _ in work]
    calls = version = 0
    while calls < CALLS:
        for (chain, graph), stream in zip(work, streams, strict=True):
            with torch.cuda.stream(stream):
                chain.replay(version % VERSIONS, graph)
            calls += chain.links
        version += 1
    torch.cuda.synchronize()
    wrong = {
        f"{chain.case.id}, stream {i}": int(chain.mismatches)
        for i, (chain, _) in enumerate(work)
        if chain.mismatches
    }
    assert not wrong, f"tokens that differ, after {calls} calls: {wrong}"

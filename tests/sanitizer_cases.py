"""A few small calls of every kind of kernel, to be run under compute-sanitizer.

    bash scripts/sanitize.sh
    python tests/sanitizer_cases.py --max-cluster 8

Inputs are made and results are checked on the CPU, so that the sanitizer sees hardly any kernels
but ours.
"""

import argparse
import sys

import gate_cases
import topk_cases
import torch
from cases import Case, Inputs, draw
from gate_cases import Gate
from oracle import assert_gated, assert_routing
from topk_cases import BF16, F16, I32, I64, Size
from topk_oracle import assert_same_topk, expected_topk

from cute_router import (
    Routing,
    TopK,
    activation_topk,
    dense_decode,
    dense_prefill,
    hash_route,
    reference,
    topk,
)
from cute_router.gemm import decode, prefill
from cute_router.topk import radix

# Small, but with more than one CTA in a cluster, more than one cluster, and ragged ends.
CASES = [
    Case("one tile, K of two clusters' slices", 64, 2048, 3),
    Case("ragged in every dimension", 300, 1032, 17, top_k=8),
    Case("all logits exchanged", 160, 1024, 9, top_k=8, scoring="softmax", has_bias=False),
    Case("groups", 256, 1024, 8, 8, "sigmoid", True, 8, 4),
    Case("the most chosen, padded rows", 256, 512, 5, top_k=32, renormalize=False, padding=8),
    Case("several token tiles", 256, 512, 65),
    Case("one tuned shape", 256, 4096, 1),
    Case("short lists", 300, 72, 4500, top_k=8),
    Case("more K than shared memory holds", 256, 16384, 64),
    Case("token tiles in turns", 160, 200, 9000),
    Case("logits over the ring", 256, 512, 4000),
]

SIZES = [
    Size(37, 256, 6),  # rows that fill no CTA
    Size(9, 300, 17, lengths=I64, padding=1),
    Size(2503, 100, 8, BF16, I32),  # few lanes to a row
    Size(3, 1500, 1200),  # one CTA to a row
    Size(2, 5001, 600, F16, lengths=I32, padding=2),  # a cluster of 4, an odd end
    Size(1, 20000, 2000),  # a cluster of 16
]
# The last ones leave more candidates than a list takes, and the search goes on to the indices.
SCORES = ["normal", "near ties at the edge", "any bits", "all equal"]
GATES = [
    Gate(256),
    Gate(300, 16, "sigmoid", padding=1),
    Gate(256, 8, "sigmoid", n_group=8, topk_group=4),
    Gate(160, 8, "softmax", has_bias=False, dtype=BF16),
    Gate(256, N=2503),
]
LOGITS = ["normal", "nan", "all equal", "near ties at the edge"]
HASHES = [None, ("sqrtsoftplus", 1024), ("sigmoid", 5128), ("softmax", 264)]  # scoring and K


def main() -> int:
    """Run every case twice: the second call finds what the first one left in the scratch."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--max-cluster", type=int, choices=[8, 16], default=16)
    max_cluster = parser.parse_args().max_cluster
    if not torch.cuda.is_available():
        print("needs a CUDA device; there is none")
        return 1
    for module in (decode, prefill, radix):
        module.max_cluster = lambda device: max_cluster
    for run, cases in (
        (run_dense, CASES),
        (run_topk, SIZES),
        (run_gate, GATES),
        (run_hash, HASHES),
    ):
        for case in cases:
            run(case)
            print(f"{run.__name__} {getattr(case, 'id', case)}: passed", flush=True)
    return 0


def run_dense(case: Case) -> None:
    """dense_decode and dense_prefill."""
    inputs = draw(case, "cpu", kinds=["normal", "nan", "all equal"])
    on_gpu = Inputs(*(None if t is None else padded_as(t).cuda() for t in inputs))
    on_gpu = on_gpu._replace(x=on_gpu.x[:, : case.K])
    for function, launch in (
        (dense_decode, {}),
        (dense_decode, {"pdl": False}),
        (dense_decode, {"batch_invariant": True}),
        (dense_prefill, {}),
    ):
        for _ in range(2):
            weights, ids = function(*on_gpu, **case.options, **launch)
            torch.cuda.synchronize()
            assert_routing(Routing(weights.cpu(), ids.cpu()), *inputs, **case.options)


def run_topk(size: Size) -> None:
    """topk."""
    lengths = topk_cases.draw_lengths(size, "cpu")
    lengths_there = None if lengths is None else lengths.cuda()
    for kind in SCORES:
        scores = topk_cases.draw(size, kind, "cpu")
        there = padded_as(scores).cuda()[:, : size.L]
        values, indices = topk(there, size.k, lengths=lengths_there, index_dtype=size.index)
        torch.cuda.synchronize()
        found = TopK(values.cpu(), indices.cpu())
        assert_same_topk(found, expected_topk(scores, size.k, lengths))


def run_gate(gate: Gate) -> None:
    """activation_topk."""
    logits, bias = gate_cases.draw(gate, LOGITS, "cpu")
    there = padded_as(logits).cuda()[:, : gate.E]
    bias_there = None if bias is None else bias.cuda()
    for launch in ({}, {"batch_invariant": True}):
        weights, ids = activation_topk(there, bias_there, **gate.options, **launch)
        torch.cuda.synchronize()
        assert_gated(Routing(weights.cpu(), ids.cpu()), logits, bias, **gate.options)


def run_hash(gate: tuple[str, int] | None) -> None:
    """hash_route: equal weights, or those of a gate."""
    N, vocab, E, k = 9, 50, 64, 6
    token_ids = torch.randint(-5, vocab + 5, (N,))
    table = torch.randint(-5, E + 5, (vocab, k))
    options = {}
    if gate is not None:
        scoring, K = gate
        x, W = draw(Case("hash", E, K, N), "cpu")[:2]
        options = {"x": x, "W": W, "scoring": scoring}
    there = {name: o.cuda() if isinstance(o, torch.Tensor) else o for name, o in options.items()}
    weights, ids = hash_route(token_ids.cuda(), table.cuda(), **there)
    torch.cuda.synchronize()
    expected = reference.hash_route(token_ids, table, **options)
    assert torch.equal(ids.cpu(), expected.ids)
    assert ((weights.cpu() - expected.weights).abs() <= 1e-5).all()


def padded_as(t: torch.Tensor) -> torch.Tensor:
    """The rows of t with their padding: `cuda()` of a view would leave it out."""
    return t if t.is_contiguous() else t.as_strided((t.shape[0], t.stride(0)), (t.stride(0), 1))


if __name__ == "__main__":
    sys.exit(main())

"""A few small calls of every kind of kernel, to be run under compute-sanitizer.

    bash scripts/sanitize.sh
    python tests/sanitizer_cases.py --max-cluster 8

Inputs are made and results are checked on the CPU, so that the sanitizer sees hardly any kernels
but ours.
"""

import argparse
import sys

import torch
from cases import Case, Inputs, draw
from oracle import assert_routing

from cute_router import Routing, dense_decode
from cute_router.gemm import decode

# Small, but with more than one CTA in a cluster, more than one cluster, and ragged ends.
CASES = [
    Case("one tile, K of two clusters' slices", 64, 2048, 3),
    Case("ragged in every dimension", 300, 1032, 17, top_k=8),
    Case("all logits exchanged", 160, 1024, 9, top_k=8, scoring="softmax", has_bias=False),
    Case("groups", 256, 1024, 8, 8, "sigmoid", True, 8, 4),
    Case("the most chosen, padded rows", 256, 512, 5, top_k=32, renormalize=False, padding=8),
    Case("several token tiles", 256, 512, 65),
    Case("one tuned shape", 256, 4096, 1),
]


def main() -> int:
    """Run every case twice: the second call finds what the first one left in the scratch."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--max-cluster", type=int, choices=[8, 16], default=16)
    max_cluster = parser.parse_args().max_cluster
    if not torch.cuda.is_available():
        print("needs a CUDA device; there is none")
        return 1
    decode.max_cluster = lambda device: max_cluster
    for case in CASES:
        inputs = draw(case, "cpu", kinds=["normal", "nan", "all equal"])
        on_gpu = Inputs(*(None if t is None else padded_as(t).cuda() for t in inputs))
        on_gpu = on_gpu._replace(x=on_gpu.x[:, : case.K])
        for launch in ({}, {"pdl": False}, {"batch_invariant": True}):
            for _ in range(2):
                weights, ids = dense_decode(*on_gpu, **case.options, **launch)
                torch.cuda.synchronize()
                assert_routing(Routing(weights.cpu(), ids.cpu()), *inputs, **case.options)
        print(f"{case.id}: passed", flush=True)
    return 0


def padded_as(t: torch.Tensor) -> torch.Tensor:
    """The rows of t with their padding: `cuda()` of a view would leave it out."""
    return t if t.is_contiguous() else t.as_strided((t.shape[0], t.stride(0)), (t.stride(0), 1))


if __name__ == "__main__":
    sys.exit(main())

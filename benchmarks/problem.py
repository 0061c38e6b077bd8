"""What every router benchmark runs on: tensors in enough sets that none stays in the L2 cache."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from timing import buffers_for
from torch import Tensor

TOP_K, FACTOR = 6, 1.5
FLASH, PRO = (256, 4096), (384, 7168)  # DeepSeek-V4-Flash and -Pro: (E, K)

HIDDEN_BYTES = 2**30  # of hidden states, at most: 17 times an H200's L2

Call = Callable[[int], Any]  # of the number of a set; a router's returns (weights, ids)


@dataclass
class Problem:
    """The tensors of one shape and N, in as many sets as the calls rotate through."""

    E: int
    K: int
    N: int
    Ws: list[Tensor]
    xs: list[Tensor]
    bias: Tensor


def random_weights(E: int, K: int) -> list[Tensor]:
    """Enough sets of weights that each has left the L2 cache when its turn comes again."""
    sets = buffers_for(2 * E * K)
    return [(torch.randn(E, K, device="cuda") * K**-0.5).bfloat16() for _ in range(sets)]


def make_problem(Ws: list[Tensor], N: int) -> Problem:
    """Random hidden states of N tokens: a set for each set of weights, or as many as are enough.

    Enough is `HIDDEN_BYTES` of them, which push the weights of a set out of the L2 as well.
    """
    E, K = Ws[0].shape
    Ws = Ws[: max(2, HIDDEN_BYTES // (2 * N * K))]
    xs = [torch.randn(N, K, device="cuda").bfloat16() for _ in Ws]
    return Problem(E, K, N, Ws, xs, torch.randn(E, device="cuda") * 0.1)


def cublas_logits(problem: Problem, i: int) -> Tensor:
    """The GEMM alone, by cuBLAS: fp32 logits [N, E]."""
    return torch.mm(problem.xs[i], problem.Ws[i].t(), out_dtype=torch.float32)

"""Host entry of hash routing on CUDA: a plan for each kind of call, then one launch.

no x, W                   hash_kernel          equal weights
few tokens                hash_gate_kernel     k products a token, by fp32 FMAs
many tokens, or softmax   hash_logits_kernel   after `torch.mm` to all fp32 logits
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from cute_router import compile as compiler
from cute_router.arch import target_for
from cute_router.extras import PLAIN, Extras, ExtrasSpec
from cute_router.gemm.decode import row_strided
from cute_router.short_way import REFUSED, is_factor, routing_outputs
from cute_router.spec import HIDDEN_MULTIPLE, MAX_EXPERTS, Routing, Scoring, check_bool
from cute_router.topk.hash_config import HashConfig, HashGateConfig, HashLogitsConfig
from cute_router.validate import INT32_MAX, MAX_TOKENS, hash_spec

Kernel = Callable[..., None]

BITS = {torch.int32: 32, torch.int64: 64, None: 0}  # without token ids, row n is token n's
MAX_LOAD = 16  # bytes
# Gathering reads rows of W from the L2 for each token, where a dense product shares them between
# tokens; but it is one launch in place of two, and fewer products. On an H200 both take the same
# time at N = 1,050 for E=256 K=4096 and at 1,150 for E=384 K=7168, k = 6 (docs/perf_log.md).
DENSE_PER_GATHERED = 87
GATHERED_PER_LAUNCH = 13_200_000


def gathers(N: int, E: int, K: int, k: int, scoring: Scoring) -> bool:
    """Whether only the products of the chosen experts are computed."""
    if scoring == "softmax":
        return False
    return N * K * (k - E / DENSE_PER_GATHERED) <= GATHERED_PER_LAUNCH


def fast(
    token_ids: Tensor,
    table: Tensor,
    x: Tensor | None,
    W: Tensor | None,
    factor: float,
    scoring: Scoring,
    renormalize: bool,
    pdl: bool,
    out_weights: Tensor | None,
    out_ids: Tensor | None,
) -> Routing | None:
    """The call of an engine in one launch, by the `short_way`. None for any other call."""
    try:
        (N,) = token_ids.shape
        vocab, k = table.shape
        device = token_ids.get_device()
        if not (
            0 < N <= MAX_TOKENS
            and 0 < vocab <= INT32_MAX
            and table.stride(0) >= k
            and is_factor(factor)
        ):
            return None
        dtypes = token_ids.dtype, table.dtype
        products: tuple[Tensor, ...] = ()
        if x is not None and W is not None:
            E, K = W.shape
            if not (1 <= E <= MAX_EXPERTS and gathers(N, E, K, k, scoring)):
                return None
            kernel = gate_kernel(K, k, *dtypes, scoring, renormalize, pdl, device)
            products = x, W
        elif x is None and W is None:
            vector = aligned_vector(k, table.itemsize)
            kernel = uniform_kernel(k, *dtypes, vector, scoring, renormalize, pdl, device)
            factor = factor / k
        else:
            return None
        weights, ids = routing_outputs(N, k, device, out_weights, out_ids)
        kernel(token_ids, table, *products, weights, ids, factor)
    except REFUSED:
        return None
    return Routing(weights, ids)


def launch(
    token_ids: Tensor,
    table: Tensor,
    x: Tensor | None,
    W: Tensor | None,
    factor: float,
    scoring: Scoring,
    renormalize: bool,
    pdl: bool,
    weights: Tensor | None,
    ids: Tensor,
    extras: Extras | None = None,
) -> None:
    """Queue the routing on the current stream. Arguments are checked, N is not 0.

    Without weights, ids are packed words (`Extras`).
    """
    N, k, device = token_ids.shape[0], table.shape[1], token_ids.get_device()
    dtypes = token_ids.dtype, table.dtype
    form = PLAIN if extras is None else extras.spec
    more = () if extras is None else extras.arguments()
    # The stride of a dimension of size 1 can be anything, which the kernels do not take.
    token_ids, weights, ids = packed(token_ids), packed(weights), packed(ids)
    if x is None or W is None:
        vector = vector_for(table, weights, ids) if form == PLAIN else 1
        kernel = uniform_kernel(k, *dtypes, vector, scoring, renormalize, pdl, device, form)
        kernel(token_ids, table, weights, ids, factor / k, *more)
        return
    E, K = W.shape
    if gathers(N, E, K, k, scoring):
        kernel = gate_kernel(K, k, *dtypes, scoring, renormalize, pdl, device, form)
        kernel(token_ids, table, row_strided(x), row_strided(W), weights, ids, factor, *more)
        return
    logits = torch.mm(x.detach(), W.detach().t(), out_dtype=torch.float32)
    kernel = logits_kernel(k, *dtypes, scoring, renormalize, device, "float32", form)
    kernel(token_ids, table, logits, weights, ids, factor, *more)


def packed(t: Tensor | None) -> Any:
    """A contiguous tensor, with the strides that this has where no size is 1."""
    return None if t is None else t.as_strided(t.shape, (*t.shape[1:], 1))


def aligned_vector(k: int, itemsize: int) -> int:
    """Entries that a thread copies at once if the rows of the table follow one another."""
    vector = MAX_LOAD // itemsize
    while k % vector:
        vector //= 2
    return vector


def vector_for(table: Tensor, weights: Any, ids: Tensor) -> int:
    """The same for these tensors as they lie."""
    vector = aligned_vector(table.shape[1], table.itemsize)
    while vector > 1 and (
        table.stride(0) % vector
        or table.data_ptr() % (vector * table.itemsize)
        or (weights.data_ptr() | ids.data_ptr()) % (vector * weights.itemsize)
    ):
        vector //= 2
    return vector


# typed: without it True would find the plan of 1, and 6.0 that of 6.
@lru_cache(maxsize=None, typed=True)
def uniform_kernel(
    k: int,
    token_dtype: torch.dtype,
    table_dtype: torch.dtype,
    vector: int,
    scoring: Scoring,
    renormalize: bool,
    pdl: bool,
    device: int,
    extras: ExtrasSpec = PLAIN,
) -> Kernel:
    """The kernel of equal weights; scoring and renormalisation are checked, and change nothing."""
    check_bool("pdl", pdl)
    hash_spec(HIDDEN_MULTIPLE, k, scoring, renormalize)
    bits = BITS[token_dtype], BITS[table_dtype]
    return compiler.kernel(HashConfig(k, target_for(device)[1], *bits, vector, pdl, extras))


@lru_cache(maxsize=None, typed=True)
def gate_kernel(
    K: int,
    k: int,
    token_dtype: torch.dtype | None,
    table_dtype: torch.dtype,
    scoring: Scoring,
    renormalize: bool,
    pdl: bool,
    device: int,
    extras: ExtrasSpec = PLAIN,
) -> Kernel:
    """The kernel of the chosen products."""
    check_bool("pdl", pdl)
    spec = hash_spec(K, k, scoring, renormalize)
    bits = BITS[token_dtype], BITS[table_dtype]
    return compiler.kernel(HashGateConfig(spec, target_for(device)[1], *bits, pdl, extras))


@lru_cache(maxsize=None, typed=True)
def logits_kernel(
    k: int,
    token_dtype: torch.dtype | None,
    table_dtype: torch.dtype,
    scoring: Scoring,
    renormalize: bool,
    device: int,
    dtype: str = "float32",
    extras: ExtrasSpec = PLAIN,
) -> Kernel:
    """The kernel that follows `torch.mm`, or a call on logits of `dtype`."""
    spec = hash_spec(HIDDEN_MULTIPLE, k, scoring, renormalize)
    bits = BITS[token_dtype], BITS[table_dtype]
    return compiler.kernel(
        HashLogitsConfig(spec, target_for(device)[1], *bits, dtype=dtype, extras=extras)
    )

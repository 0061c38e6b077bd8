"""Host entry of the dense router for many tokens on CUDA: a kernel by N, then one launch."""

from collections.abc import Callable
from functools import cache, lru_cache

import torch
from torch import Tensor

from cute_router import compile as compiler
from cute_router.arch import max_cluster, target_for
from cute_router.extras import PLAIN, Extras, ExtrasSpec
from cute_router.gemm import decode, generic
from cute_router.gemm.prefill_config import can_implement
from cute_router.prefill_heuristics import prefill_config, token_bucket, with_extras
from cute_router.short_way import REFUSED, is_factor, routing_outputs
from cute_router.spec import RouterSpec, Routing, Scoring
from cute_router.tuning.store import tuned
from cute_router.validate import Options, spec_of

MAX_TOKENS = 1 << 21  # of one launch: what it writes stays within 32-bit offsets


def fast(
    x: Tensor,
    W: Tensor,
    bias: Tensor | None,
    factor: float,
    options: Options,
    out_weights: Tensor | None,
    out_ids: Tensor | None,
) -> Routing | None:
    """The call of an engine, by the `short_way`. None for any other call."""
    try:
        N, K = x.shape
        device = x.get_device()
        if options[-2] or not (0 < N <= MAX_TOKENS and is_factor(factor)):
            return None
        kernel = kernel_of(W.shape[0], K, bias is not None, *options, token_bucket(N), device)
        if kernel is None:
            return None
        weights, ids = routing_outputs(N, options[0], device, out_weights, out_ids)
        kernel(x, W, bias, weights, ids, factor)
    except REFUSED:
        return None
    return Routing(weights, ids)


def launch(
    x: Tensor,
    W: Tensor,
    bias: Tensor | None,
    weights: Tensor | None,
    ids: Tensor,
    spec: RouterSpec,
    factor: float,
    options: Options,
    extras: Extras | None = None,
) -> None:
    """Queue the router on the current stream of x's device. Arguments are checked, N is not 0.

    Without weights, ids are packed words (`Extras`).
    """
    N, device = x.shape[0], x.get_device()
    if options[-2]:  # batch-invariant: one kernel serves every N
        decode.launch(x, W, bias, weights, ids, spec, factor, options, extras)
        return
    router = (spec.num_experts, spec.hidden_size, spec.has_bias, *options)
    form = () if extras is None else (extras.spec,)
    kernel = kernel_of(*router, token_bucket(N), device, *form)
    if kernel is None:
        call = (x, W, bias, weights, ids, spec, factor)
        generic.launch(*call, batch_invariant=False, extras=extras)
        return
    W = decode.row_strided(W)
    for part, results, more in decode.portions(x, weights, ids, extras, MAX_TOKENS):
        kernel(part, W, bias, *results, factor, *more)


# typed: without it True would find the kernel of 1, and 6.0 that of 6.
@lru_cache(maxsize=None, typed=True)
def kernel_of(
    E: int,
    K: int,
    has_bias: bool,
    top_k: int,
    scoring: Scoring,
    renormalize: bool,
    n_group: int,
    topk_group: int,
    batch_invariant: bool,
    pdl: bool,
    bucket: int,
    device: int,
    extras: ExtrasSpec = PLAIN,
) -> Callable[..., None] | None:
    """Choose, compile and load; None where the device has no kernel of its own for the product."""
    router = (E, K, has_bias, top_k, scoring, renormalize, n_group, topk_group)
    spec = spec_of(*router, batch_invariant, pdl)
    backend, target = target_for(device)
    if backend == "generic":
        return None
    most = max_cluster(device)
    config = prefill_config(spec, bucket, target, sm_count(device), max_cluster=most, pdl=pdl)
    config = with_extras(tuned(config, bucket, device), extras)
    can_implement(config)
    return compiler.kernel(config)


@cache
def sm_count(device: int) -> int:
    """SMs of a device."""
    return torch.cuda.get_device_properties(device).multi_processor_count

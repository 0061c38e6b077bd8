"""Host entry of the dense router on CUDA: a plan for each kind of call, then one launch."""

from collections.abc import Callable, Iterator
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cute_router import compile as compiler
from cute_router.arch import max_cluster, target_for
from cute_router.extras import PLAIN, Extras, ExtrasSpec
from cute_router.gemm import generic
from cute_router.gemm.config import MAX_TOKEN_TILES, TICKETS, DecodeConfig, can_implement
from cute_router.heuristics import MAX_BUCKET, decode_config, token_bucket
from cute_router.short_way import REFUSED, is_factor, routing_outputs
from cute_router.spec import RouterSpec, Routing, Scoring
from cute_router.tuning.store import tuned
from cute_router.validate import Options, spec_of
from cute_router.workspace import Workspace

BUCKETS = [token_bucket(max(N, 1)) for N in range(MAX_BUCKET + 1)]


class Plan(NamedTuple):
    """What a launch needs to know of its configuration."""

    kernel: Callable[..., None]
    max_tokens: int  # of one launch
    token_words: int  # scratch words for each token
    scratch: Workspace


def fast(
    x: Tensor,
    W: Tensor,
    bias: Tensor | None,
    factor: float,
    options: Options,
    out_weights: Tensor | None,
    out_ids: Tensor | None,
) -> Routing | None:
    """The call of an engine, of few tokens, by the `short_way`. None for any other call."""
    try:
        N, K = x.shape
        device = x.get_device()
        if not (0 < N <= MAX_BUCKET and is_factor(factor)):
            return None
        plan = plan_of(W.shape[0], K, bias is not None, *options, BUCKETS[N], device)
        if plan is None:
            return None
        weights, ids = routing_outputs(N, options[0], device, out_weights, out_ids)
        # As torch.cuda.current_stream(device).cuda_stream, a microsecond faster.
        stream = torch._C._cuda_getCurrentRawStream(device)
        scratch = plan.scratch.slot(stream, TICKETS + N * plan.token_words)
        plan.kernel(x, W, bias, weights, ids, scratch, factor)
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
    bucket = BUCKETS[min(N, MAX_BUCKET)]
    router = (spec.num_experts, spec.hidden_size, spec.has_bias, *options)
    form = () if extras is None else (extras.spec,)
    plan = plan_of(*router, bucket, device, *form)
    if plan is None:
        call = (x, W, bias, weights, ids, spec, factor)
        generic.launch(*call, batch_invariant=options[-2], extras=extras)
        return
    run(plan, x, W, bias, weights, ids, factor, extras)


def run(
    plan: Plan,
    x: Tensor,
    W: Tensor,
    bias: Tensor | None,
    weights: Tensor | None,
    ids: Tensor,
    factor: float,
    extras: Extras | None = None,
) -> None:
    """Queue the kernel of `plan`, once for as many tokens as one launch takes."""
    W = row_strided(W)
    step = min(x.shape[0], plan.max_tokens)
    stream = torch._C._cuda_getCurrentRawStream(x.get_device())
    scratch = plan.scratch.slot(stream, TICKETS + step * plan.token_words)
    for part, results, more in portions(x, weights, ids, extras, step):
        plan.kernel(part, W, bias, *results, scratch, factor, *more)


def portions(
    x: Tensor, weights: Tensor | None, ids: Tensor, extras: Extras | None, step: int
) -> Iterator[tuple[Tensor, tuple[Tensor | None, Tensor], tuple[Any, ...]]]:
    """Of each launch over `step` tokens: hidden states, results, and what extras a kernel takes."""
    N = x.shape[0]
    for first in range(0, N, step):
        last = min(first + step, N)
        rows = slice(first, last)
        results = None if weights is None else weights[rows], ids[rows]
        own = extras if extras is None or step >= N else extras.rows(first, last)
        yield row_strided(x[rows]), results, () if own is None else own.arguments()


def row_strided(matrix: Tensor) -> Tensor:
    """`matrix` with a row stride that TMA takes: that of a single row says nothing."""
    K = matrix.shape[1]
    return matrix.as_strided((1, K), (K, 1)) if matrix.shape[0] == 1 else matrix


# typed: without it True would find the plan of 1, and 6.0 that of 6.
@lru_cache(maxsize=None, typed=True)
def plan_of(
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
) -> Plan | None:
    """Choose, compile and load; None where the device has no kernel of its own for the product."""
    router = (E, K, has_bias, top_k, scoring, renormalize, n_group, topk_group)
    spec = spec_of(*router, batch_invariant, pdl)
    backend, target = target_for(device)
    if backend == "generic":
        return None
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "this router has no kernel for this batch size yet, and none can be compiled or loaded"
            " inside a CUDA graph capture: call cute_router.warmup before it, or where there are"
            f" extras, make a call with them; {spec}"
        )
    config = decode_config(
        spec,
        bucket,
        target,
        max_cluster=max_cluster(device),
        batch_invariant=batch_invariant,
        pdl=pdl,
        extras=extras,
    )
    if not batch_invariant:
        config = tuned(config, bucket, device)
    return plan_for(config, device)


def plan_for(config: DecodeConfig, device: int) -> Plan:
    """Compile and load the kernel of `config`."""
    can_implement(config)
    kernel = compiler.kernel(config)
    return Plan(
        kernel, MAX_TOKEN_TILES * config.tile_tokens, config.packet_words, workspace(device)
    )


@cache
def workspace(device: int) -> Workspace:
    """The scratch of a device."""
    return Workspace(device, head=TICKETS)

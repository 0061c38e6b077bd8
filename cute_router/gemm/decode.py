"""Host entry of the dense router on CUDA: arguments that are already checked -> one launch."""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from cute_router import compile as compiler
from cute_router.arch import target_for
from cute_router.gemm import generic
from cute_router.gemm.config import MAX_CLUSTER, MAX_TOKEN_TILES, TICKETS, can_implement
from cute_router.heuristics import MAX_TOKEN_TILE, decode_config, token_bucket
from cute_router.spec import RouterSpec
from cute_router.workspace import Workspace


class Plan(NamedTuple):
    """What a launch needs to know of its configuration."""

    kernel: Callable[..., None]
    max_tokens: int  # of one launch
    token_words: int  # scratch words for each token


BUCKETS = [token_bucket(max(N, 1)) for N in range(MAX_TOKEN_TILE + 1)]
_plans: dict[tuple[RouterSpec, int, int, bool, bool], Plan] = {}


def launch(
    x: Tensor,
    W: Tensor,
    bias: Tensor | None,
    weights: Tensor,
    ids: Tensor,
    spec: RouterSpec,
    routed_scaling_factor: float,
    batch_invariant: bool,
    pdl: bool,
) -> None:
    """Queue the router on the current stream of x's device. N is at least 1."""
    N, device = x.shape[0], x.get_device()
    key = (spec, BUCKETS[N] if N <= MAX_TOKEN_TILE else MAX_TOKEN_TILE, device, batch_invariant, pdl)
    plan = _plans.get(key)
    if plan is None:
        if target_for(device)[0] == "generic":
            generic.launch(
                x, W, bias, weights, ids, spec, routed_scaling_factor, batch_invariant, pdl
            )
            return
        plan = _plans[key] = make_plan(*key)
    if N == 1 and x.stride(0) % 8:
        x = x.as_strided(x.shape, (spec.hidden_size, 1))  # the stride of a single row says nothing
    if spec.num_experts == 1 and W.stride(0) % 8:
        W = W.as_strided(W.shape, (spec.hidden_size, 1))
    # As torch.cuda.current_stream(device).cuda_stream, a microsecond faster.
    stream = torch._C._cuda_getCurrentRawStream(device)
    if N <= plan.max_tokens:
        scratch = workspace(device).slot(stream, TICKETS + N * plan.token_words)
        plan.kernel(x, W, bias, weights, ids, scratch, routed_scaling_factor)
        return
    scratch = workspace(device).slot(stream, TICKETS + plan.max_tokens * plan.token_words)
    for i in range(0, N, plan.max_tokens):
        rows = slice(i, i + plan.max_tokens)
        plan.kernel(x[rows], W, bias, weights[rows], ids[rows], scratch, routed_scaling_factor)


def make_plan(
    spec: RouterSpec, bucket: int, device: int, batch_invariant: bool, pdl: bool
) -> Plan:
    """Choose, compile and load; the first call of a configuration comes here."""
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "this router has no compiled kernel yet, and none can be made inside a CUDA graph"
            f" capture: call cute_router.warmup(spec, tokens) before it; spec={spec}"
        )
    config = decode_config(
        spec,
        bucket,
        target_for(device)[1],
        max_cluster=max_cluster(device),
        batch_invariant=batch_invariant,
        pdl=pdl,
    )
    can_implement(config)
    max_tokens = MAX_TOKEN_TILES * config.tile_tokens
    return Plan(compiler.kernel(config), max_tokens, config.packet_words)


@lru_cache(maxsize=None)
def workspace(device: int) -> Workspace:
    """The scratch of a device."""
    return Workspace(device, head=TICKETS)


@lru_cache(maxsize=None)
def max_cluster(device: int) -> int:
    """16 where clusters of 16 CTAs can start; 8, which always can, where they cannot (MIG)."""
    import cutlass.utils

    with torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()  # a context, which the query needs
        try:
            clusters = cutlass.utils.HardwareInfo(device).get_max_active_clusters(MAX_CLUSTER)
        except RuntimeError:
            clusters = 0
    return MAX_CLUSTER if clusters > 0 else 8

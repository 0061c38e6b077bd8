"""Host entry of the gate kernel: a kernel for each kind of call, then one launch."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from cute_router import compile as compiler
from cute_router.arch import target_for
from cute_router.extras import PLAIN, Extras, ExtrasSpec
from cute_router.short_way import REFUSED, is_factor, routing_outputs
from cute_router.spec import HIDDEN_MULTIPLE, RouterSpec, Routing
from cute_router.topk.config import GateConfig, dtype_name, gate_shape
from cute_router.topk.rows import (
    MAX_BUCKET,
    row_bucket,
    rows_are_vectors,
    starts_are_aligned,
    unit_rows,
    whole_runs,
)
from cute_router.validate import FLOATS, Options, spec_of


def fast(
    logits: Tensor,
    bias: Tensor | None,
    factor: float,
    options: Options,
    out_weights: Tensor | None,
    out_ids: Tensor | None,
) -> Routing | None:
    """The call of an engine, by the `short_way`. None for any other call."""
    try:
        N, E = logits.shape
        row_stride = E if N == 1 else logits.stride(0)  # that of a single row says nothing
        if not (N > 0 and row_stride >= E and is_factor(factor)):
            return None
        aligned, device = starts_are_aligned(logits, row_stride), logits.get_device()
        kernel = plan_of(E, bias is not None, logits.dtype, aligned, N, device, *options)
        weights, ids = routing_outputs(N, options[0], device, out_weights, out_ids)
        kernel(logits, bias, weights, ids, factor)
    except REFUSED:
        return None
    return Routing(weights, ids)


def launch(
    logits: Tensor,
    bias: Tensor | None,
    weights: Tensor | None,
    ids: Tensor,
    spec: RouterSpec,
    factor: float,
    *,
    batch_invariant: bool,
    pdl: bool,
    extras: Extras | None = None,
) -> None:
    """Queue the choice on the current stream of the logits' device. N is at least 1.

    Without weights, ids are packed words (`Extras`).
    """
    logits = unit_rows(logits)
    vector, bucket = rows_are_vectors(logits), bucket_of(logits.shape[0], batch_invariant)
    how = (spec, logits.dtype, vector, bucket, pdl, logits.get_device())
    if extras is None:
        kernel_of(*how)(logits, bias, weights, ids, factor)
    else:
        kernel_of(*how, extras.spec)(logits, bias, weights, ids, factor, *extras.arguments())


def bucket_of(N: int, batch_invariant: bool) -> int:
    """The number of tokens that a kernel for N is chosen by.

    How many lanes share a token decides in which order its weights are summed.
    """
    return MAX_BUCKET if batch_invariant else row_bucket(N)


# typed: without it True would find the kernel of 1, and 6.0 that of 6.
@lru_cache(maxsize=4096, typed=True)
def plan_of(
    E: int,
    has_bias: bool,
    dtype: torch.dtype,
    aligned: bool,
    N: int,
    device: int,
    *options: Any,
) -> Callable[..., None]:
    """The kernel of a call, by what the call says; raises where it says something wrong.

    options: those of `Options`, one by one, because the table tells types apart in no tuple.
    """
    spec = spec_of(E, HIDDEN_MULTIPLE, has_bias, *options)
    batch_invariant, pdl = options[-2:]
    if dtype not in FLOATS:
        raise TypeError(f"there is no kernel for logits of {dtype}")
    vector = aligned and whole_runs(E, dtype)
    return kernel_of(spec, dtype, vector, bucket_of(N, batch_invariant), pdl, device)


@cache
def kernel_of(
    spec: RouterSpec,
    dtype: torch.dtype,
    vector: bool,
    bucket: int,
    pdl: bool,
    device: int,
    extras: ExtrasSpec = PLAIN,
) -> Callable[..., None]:
    """The kernel for routers like `spec` on a device."""
    target = target_for(device)[1]
    any_hidden_size = replace(spec, hidden_size=HIDDEN_MULTIPLE)  # logits do not tell it
    config = GateConfig(
        any_hidden_size,
        target,
        dtype_name(dtype),
        vector,
        pdl=pdl,
        extras=extras,
    )
    if config.by_threshold:
        lanes, warps = gate_shape(bucket, spec.num_experts)
        config = replace(config, lanes=lanes, warps=warps)
    return compiler.kernel(config)

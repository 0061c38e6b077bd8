"""Host entry of the gate kernel: logits that are already checked -> one launch."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from cute_router import compile as compiler
from cute_router.arch import target_for
from cute_router.extras import PLAIN, Extras, ExtrasSpec
from cute_router.spec import HIDDEN_MULTIPLE, RouterSpec
from cute_router.topk.config import GateConfig, dtype_name, gate_shape
from cute_router.topk.rows import MAX_BUCKET, row_bucket, rows_are_vectors, unit_rows


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
    # How many lanes share a token decides in which order its weights are summed.
    bucket = MAX_BUCKET if batch_invariant else row_bucket(logits.shape[0])
    how = (spec, logits.dtype, rows_are_vectors(logits), bucket, pdl, logits.get_device())
    if extras is None:
        kernel_of(*how)(logits, bias, weights, ids, factor)
    else:
        kernel_of(*how, extras.spec)(logits, bias, weights, ids, factor, *extras.arguments())


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

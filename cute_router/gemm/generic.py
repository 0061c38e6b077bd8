"""The dense router on CUDA devices without kernels of their own: `torch.mm`, then our choice."""

import torch
from torch import Tensor

from cute_router.spec import RouterSpec
from cute_router.topk import gate


def launch(
    x: Tensor,
    W: Tensor,
    bias: Tensor | None,
    weights: Tensor,
    ids: Tensor,
    spec: RouterSpec,
    factor: float,
    *,
    batch_invariant: bool,
) -> None:
    """Queue `torch.mm` to fp32 logits and the selection kernel; arguments are already checked."""
    # A library GEMM may sum in another order at another batch size; one row's order is its own.
    step = 1 if batch_invariant else x.shape[0]
    for rows, rows_weights, rows_ids in zip(
        x.split(step), weights.split(step), ids.split(step), strict=True
    ):
        logits = torch.mm(rows, W.t(), out_dtype=torch.float32)
        gate.launch(
            logits,
            bias,
            rows_weights,
            rows_ids,
            spec,
            factor,
            batch_invariant=batch_invariant,
            pdl=True,
        )

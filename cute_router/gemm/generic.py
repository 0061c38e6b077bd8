"""The dense router on CUDA devices without kernels of their own: `torch.mm`, then our choice."""

import torch
from torch import Tensor

from cute_router.extras import Extras
from cute_router.spec import RouterSpec
from cute_router.topk import gate


def launch(
    x: Tensor,
    W: Tensor,
    bias: Tensor | None,
    weights: Tensor | None,
    ids: Tensor,
    spec: RouterSpec,
    factor: float,
    *,
    batch_invariant: bool,
    extras: Extras | None = None,
) -> None:
    """Queue `torch.mm` to fp32 logits and the selection kernel; arguments are already checked."""
    # A library GEMM may sum in another order at another batch size; one row's order is its own.
    N = x.shape[0]
    step = 1 if batch_invariant else N
    for first in range(0, N, step):
        rows = slice(first, first + step)
        own = extras if extras is None or step == N else extras.rows(first, first + step)
        logits = torch.mm(x[rows], W.t(), out_dtype=torch.float32)
        if own is not None and own.out_logits is not None:
            own.out_logits.copy_(logits)
            own = own.without("out_logits")
        gate.launch(
            logits,
            bias,
            None if weights is None else weights[rows],
            ids[rows],
            spec,
            factor,
            batch_invariant=batch_invariant,
            pdl=True,
            extras=own,
        )

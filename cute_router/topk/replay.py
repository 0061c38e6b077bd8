"""Host entry of a replay on CUDA: the weights of recorded ids (`Extras.fixed_ids`).

It is the gated form of hash routing in which the record is the table, and row n of it token n's:
`hash` says which kernel serves what. There are no token ids.
"""

import torch
from torch import Tensor

from cute_router.extras import Extras
from cute_router.gemm.decode import row_strided
from cute_router.spec import RouterSpec
from cute_router.topk.config import dtype_name
from cute_router.topk.hash import gate_kernel, gathers, logits_kernel, packed
from cute_router.topk.rows import unit_rows
from cute_router.validate import Options


def dense(
    x: Tensor,
    W: Tensor,
    weights: Tensor | None,
    ids: Tensor,
    spec: RouterSpec,
    factor: float,
    options: Options,
    extras: Extras,
) -> None:
    """Queue a replay of a dense function on the current stream. Arguments are checked, N is not 0.

    Only the products of the recorded experts are computed, where `hash.gathers` says so.
    """
    N, E, K = x.shape[0], spec.num_experts, spec.hidden_size
    *_, batch_invariant, pdl = options
    alone = batch_invariant and spec.scoring != "softmax"  # of one kernel, for every N
    if alone or gathers(N, E, K, spec.top_k, spec.scoring):
        table, own = recorded(extras)
        how = (spec.scoring, spec.renormalize, pdl, x.get_device(), own.spec)
        kernel = gate_kernel(K, spec.top_k, None, table.dtype, *how)
        results = packed(weights), packed(ids)
        kernel(None, table, row_strided(x), row_strided(W), *results, factor, *own.arguments())
        return
    # A library GEMM may sum in another order at another batch size; one row's order is its own.
    step = 1 if batch_invariant else N
    for first in range(0, N, step):
        rows = slice(first, first + step)
        logits = torch.mm(x[rows].detach(), W.detach().t(), out_dtype=torch.float32)
        results = None if weights is None else weights[rows], ids[rows]
        of_rows = extras if step == N else extras.rows(first, first + step)
        gate(logits, *results, spec, factor, of_rows)


def gate(
    logits: Tensor,
    weights: Tensor | None,
    ids: Tensor,
    spec: RouterSpec,
    factor: float,
    extras: Extras,
) -> None:
    """The same on given logits."""
    table, own = recorded(extras)
    how = (spec.scoring, spec.renormalize, logits.get_device(), dtype_name(logits.dtype), own.spec)
    kernel = logits_kernel(spec.top_k, None, table.dtype, *how)
    results = packed(weights), packed(ids)
    kernel(None, table, unit_rows(logits), *results, factor, *own.arguments())


def recorded(extras: Extras) -> tuple[Tensor, Extras]:
    """The record, as a table, and what of the extras has an effect beside it."""
    record = packed(extras.fixed_ids)
    return record, extras.without("fixed_ids", "second_bias", "second_bias_mask")

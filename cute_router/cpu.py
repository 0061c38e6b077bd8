"""The backend of CPU tensors: the fp64 specification, called as the CUDA backends are.

Arguments are checked, outputs are there. There is no launch to overlap: `pdl` has no effect.
"""

import torch
from torch import Tensor

from cute_router import reference
from cute_router.extras import Extras
from cute_router.spec import RouterSpec, Routing, Scoring
from cute_router.validate import Options


@torch.no_grad()
def dense(
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
    """`reference.route`."""
    batch_invariant, N = options[-2], x.shape[0]
    # A matrix product's order of summation can depend on its number of rows; one row's cannot.
    step = 1 if batch_invariant else N
    for first in range(0, N, step):
        rows = slice(first, first + step)
        logits = reference.logits(x[rows], W)
        own = None if extras is None else extras.rows(first, first + step)
        if own is not None and own.out_logits is not None:
            own.out_logits.copy_(logits)
        result = reference.route_logits(
            logits,
            bias,
            top_k=spec.top_k,
            routed_scaling_factor=factor,
            scoring=spec.scoring,
            renormalize=spec.renormalize,
            n_group=spec.n_group,
            topk_group=spec.topk_group,
            extras=own,
        )
        _write(result, None if weights is None else weights[rows], ids[rows])


@torch.no_grad()
def hash_route(
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
    """`reference.hash_route`."""
    result = reference.hash_route(
        token_ids,
        table,
        x=x,
        W=W,
        routed_scaling_factor=factor,
        scoring=scoring,
        renormalize=renormalize,
        extras=extras,
    )
    _write(result, weights, ids)


@torch.no_grad()
def gate(
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
    """`reference.route_logits`, which takes every row by itself."""
    result = reference.route_logits(
        logits,
        bias,
        top_k=spec.top_k,
        routed_scaling_factor=factor,
        scoring=spec.scoring,
        renormalize=spec.renormalize,
        n_group=spec.n_group,
        topk_group=spec.topk_group,
        extras=extras,
    )
    _write(result, weights, ids)


def _write(result: Routing, weights: Tensor | None, ids: Tensor) -> None:
    """A result into its outputs; packed ids hold the weights."""
    ids.copy_(result.ids)
    if weights is not None:
        weights.copy_(result.weights)


@torch.no_grad()
def topk(scores: Tensor, lengths: Tensor | None, values: Tensor, indices: Tensor) -> None:
    """`reference.topk`."""
    result = reference.topk(scores, values.shape[1], lengths)
    values.copy_(result.values)
    indices.copy_(result.indices)

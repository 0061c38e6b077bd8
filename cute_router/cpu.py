"""The backend of CPU tensors: the fp64 specification, called as the CUDA backends are.

Arguments are checked, outputs are there. There is no launch to overlap: `pdl` has no effect.
"""

import torch
from torch import Tensor

from cute_router import reference
from cute_router.spec import RouterSpec, Scoring
from cute_router.validate import Options


@torch.no_grad()
def dense(
    x: Tensor,
    W: Tensor,
    bias: Tensor | None,
    weights: Tensor,
    ids: Tensor,
    spec: RouterSpec,
    factor: float,
    options: Options,
) -> None:
    """`reference.route`."""
    batch_invariant = options[-2]
    # A matrix product's order of summation can depend on its number of rows; one row's cannot.
    step = 1 if batch_invariant else x.shape[0]
    for rows, rows_weights, rows_ids in zip(
        x.split(step), weights.split(step), ids.split(step), strict=True
    ):
        result = reference.route(
            rows,
            W,
            bias,
            top_k=spec.top_k,
            routed_scaling_factor=factor,
            scoring=spec.scoring,
            renormalize=spec.renormalize,
            n_group=spec.n_group,
            topk_group=spec.topk_group,
        )
        rows_weights.copy_(result.weights)
        rows_ids.copy_(result.ids)


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
    weights: Tensor,
    ids: Tensor,
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
    )
    weights.copy_(result.weights)
    ids.copy_(result.ids)


@torch.no_grad()
def gate(
    logits: Tensor,
    bias: Tensor | None,
    weights: Tensor,
    ids: Tensor,
    spec: RouterSpec,
    factor: float,
    *,
    batch_invariant: bool,
    pdl: bool,
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
    )
    weights.copy_(result.weights)
    ids.copy_(result.ids)


@torch.no_grad()
def topk(scores: Tensor, lengths: Tensor | None, values: Tensor, indices: Tensor) -> None:
    """`reference.topk`."""
    result = reference.topk(scores, values.shape[1], lengths)
    values.copy_(result.values)
    indices.copy_(result.indices)

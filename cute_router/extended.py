"""The public functions with `Extras`: every check, then the launch that the extras are part of.

As `eager`, which has the calls without any, this runs on tensors that are there: nothing is
recorded for autograd or traced. There is no short way: an engine that wants the host's time back
captures a CUDA graph, where none is spent. Nothing here waits for the device or reads from it.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from cute_router import cpu
from cute_router.eager import cuda, dense_backend
from cute_router.extras import Extras
from cute_router.reference import unpacked
from cute_router.spec import Routing, Scoring
from cute_router.validate import Options, check, check_hash, check_logits
from cute_router.validate_extras import (
    check_extras,
    check_gate_extras,
    check_hash_extras,
    outputs,
)


def dense(
    backend: str,
    x: Tensor,
    W: Tensor,
    bias: Tensor | None,
    factor: float,
    options: Options,
    out_weights: Tensor | None,
    out_ids: Tensor | None,
    extras: Extras,
) -> Routing:
    """A dense function; `backend` is the module of its kernels, "gemm.decode" or "gemm.prefill"."""
    N, spec = check(x, W, bias, factor, options)
    E, k, device = spec.num_experts, spec.top_k, x.device
    check_extras(extras, N, E, k, device, "x")
    weights, ids = outputs(extras, out_weights, out_ids, N, k, device, "x")
    if N > 0:
        call = (weights, ids, spec, float(factor), options, extras)
        if not x.is_cuda:
            cpu.dense(x, W, bias, *call)
        elif extras.fixed_ids is not None:
            cuda("topk.replay").dense(x, W, *call)
        else:
            cuda(backend).launch(x, W, bias, *call)
    return _routing(weights, ids)


def _dense_function(name: str, backend: Callable[[Any, Any], str]) -> Callable[..., Routing]:
    """The dense function `functional.<name>`, whose backend x and W decide."""

    def function(
        x: Tensor,
        W: Tensor,
        bias: Tensor | None = None,
        top_k: int = 6,
        routed_scaling_factor: float = 1.0,
        scoring: Scoring = "sqrtsoftplus",
        renormalize: bool = True,
        n_group: int = 1,
        topk_group: int = 1,
        batch_invariant: bool = False,
        pdl: bool = True,
        *,
        out_weights: Tensor | None = None,
        out_ids: Tensor | None = None,
        extras: Extras,
    ) -> Routing:
        options = (top_k, scoring, renormalize, n_group, topk_group, batch_invariant, pdl)
        call = (x, W, bias, routed_scaling_factor, options, out_weights, out_ids, extras)
        return dense(backend(x, W), *call)

    function.__name__ = function.__qualname__ = name
    return function


dense_decode = _dense_function("dense_decode", lambda x, W: "gemm.decode")
dense_prefill = _dense_function("dense_prefill", lambda x, W: "gemm.prefill")
route = _dense_function("route", dense_backend)


def activation_topk(
    logits: Tensor,
    bias: Tensor | None = None,
    top_k: int = 6,
    routed_scaling_factor: float = 1.0,
    scoring: Scoring = "sqrtsoftplus",
    renormalize: bool = True,
    n_group: int = 1,
    topk_group: int = 1,
    batch_invariant: bool = False,
    pdl: bool = True,
    *,
    out_weights: Tensor | None = None,
    out_ids: Tensor | None = None,
    extras: Extras,
) -> Routing:
    """`functional.activation_topk`."""
    options = (top_k, scoring, renormalize, n_group, topk_group, batch_invariant, pdl)
    spec = check_logits(logits, bias, routed_scaling_factor, options)
    (N, E), k, device = logits.shape, spec.top_k, logits.device
    check_gate_extras(extras, N, E, k, device)
    weights, ids = outputs(extras, out_weights, out_ids, N, k, device, "logits")
    if N > 0:
        how: dict[str, Any] = {"batch_invariant": batch_invariant, "pdl": pdl, "extras": extras}
        call = (weights, ids, spec, float(routed_scaling_factor))
        if not logits.is_cuda:
            cpu.gate(logits, bias, *call, **how)
        elif extras.fixed_ids is not None:
            cuda("topk.replay").gate(logits, *call, extras)
        else:
            cuda("topk.gate").launch(logits, bias, *call, **how)
    return _routing(weights, ids)


def hash_route(
    token_ids: Tensor,
    table: Tensor,
    x: Tensor | None = None,
    W: Tensor | None = None,
    routed_scaling_factor: float = 1.0,
    scoring: Scoring = "sqrtsoftplus",
    renormalize: bool = True,
    pdl: bool = True,
    *,
    out_weights: Tensor | None = None,
    out_ids: Tensor | None = None,
    extras: Extras,
) -> Routing:
    """`functional.hash_route`."""
    factor = routed_scaling_factor
    N, k = check_hash(token_ids, table, x, W, factor, scoring, renormalize, pdl)
    device = token_ids.device
    check_hash_extras(extras, N, None if W is None else W.shape[0], k, device)
    weights, ids = outputs(extras, out_weights, out_ids, N, k, device, "token_ids")
    if N > 0:
        launch = cuda("topk.hash").launch if token_ids.is_cuda else cpu.hash_route
        how = (float(factor), scoring, renormalize, pdl)
        launch(token_ids, table, x, W, *how, weights, ids, extras)
    return _routing(weights, ids)


def _routing(weights: Tensor | None, ids: Tensor) -> Routing:
    """What is returned; without weights the ids are packed words."""
    return unpacked(ids) if weights is None else Routing(weights, ids)

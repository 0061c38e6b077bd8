"""What the public functions do with tensors that are there: validate, allocate, launch.

Engines call these thousands of times a second, so on CUDA a call first takes the short way
(the `fast` of its backend), which leaves most checks to the kernel's compiled host code. A call
that is refused there, or is not of that kind, goes through every check and learns what is wrong
with it.

A backend is a module with a `launch`. Those of CUDA are imported at their first call: they bring
the kernel compiler with them. That of CPU tensors is the specification (`cpu`).

Arguments stand in the order of the public functions of the same name, which document them, and of
the torch ops. Here nothing is recorded for autograd or traced: a call always runs.
"""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from cute_router import cpu
from cute_router.crossover import ALWAYS, decode_tokens
from cute_router.heuristics import MAX_BUCKET
from cute_router.spec import Routing, Scoring, TopK
from cute_router.validate import (
    Options,
    check,
    check_hash,
    check_logits,
    check_plain,
    check_topk,
)


def dense_backend(x: Any, W: Any) -> str:
    """The CUDA backend that `route` runs for these arguments, which are not checked yet."""
    if not (isinstance(x, Tensor) and x.ndim == 2 and x.shape[0] > ALWAYS):
        return "gemm.decode"
    N, K = x.shape
    known = N <= MAX_BUCKET and isinstance(W, Tensor) and W.ndim == 2
    return "gemm.decode" if known and decode_tokens(W.shape[0], K) >= N else "gemm.prefill"


def dense(
    backend: str,
    x: Tensor,
    W: Tensor,
    bias: Tensor | None,
    factor: float,
    options: Options,
    out_weights: Tensor | None,
    out_ids: Tensor | None,
) -> Routing:
    """A dense function; `backend` is the module of its kernels, "gemm.decode" or "gemm.prefill"."""
    if isinstance(x, Tensor) and x.is_cuda:
        fast = cuda(backend).fast
        routing: Routing | None = fast(x, W, bias, factor, options, out_weights, out_ids)
        if routing is not None:
            return routing
    N, spec = check(x, W, bias, factor, options)
    weights = _output("out_weights", out_weights, (N, spec.top_k), torch.float32, x.device)
    ids = _output("out_ids", out_ids, (N, spec.top_k), torch.int32, x.device)
    if N > 0:
        launch = cuda(backend).launch if x.is_cuda else cpu.dense
        launch(x, W, bias, weights, ids, spec, float(factor), options)
    return Routing(weights, ids)


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
        out_weights: Tensor | None = None,
        out_ids: Tensor | None = None,
    ) -> Routing:
        options = (top_k, scoring, renormalize, n_group, topk_group, batch_invariant, pdl)
        factor = routed_scaling_factor
        return dense(backend(x, W), x, W, bias, factor, options, out_weights, out_ids)

    function.__name__ = function.__qualname__ = name
    return function


dense_decode = _dense_function("dense_decode", lambda x, W: "gemm.decode")
dense_prefill = _dense_function("dense_prefill", lambda x, W: "gemm.prefill")
route = _dense_function("route", dense_backend)


def hash_route(
    token_ids: Tensor,
    table: Tensor,
    x: Tensor | None = None,
    W: Tensor | None = None,
    routed_scaling_factor: float = 1.0,
    scoring: Scoring = "sqrtsoftplus",
    renormalize: bool = True,
    pdl: bool = True,
    out_weights: Tensor | None = None,
    out_ids: Tensor | None = None,
) -> Routing:
    """`functional.hash_route`."""
    call = (token_ids, table, x, W, routed_scaling_factor, scoring, renormalize, pdl)
    if isinstance(token_ids, Tensor) and token_ids.is_cuda:
        routing: Routing | None = cuda("topk.hash").fast(*call, out_weights, out_ids)
        if routing is not None:
            return routing
    shape, device = check_hash(*call), token_ids.device
    weights = _output("out_weights", out_weights, shape, torch.float32, device, "token_ids")
    ids = _output("out_ids", out_ids, shape, torch.int32, device, "token_ids")
    if shape[0] > 0:
        factor = float(routed_scaling_factor)
        launch = cuda("topk.hash").launch if token_ids.is_cuda else cpu.hash_route
        launch(token_ids, table, x, W, factor, scoring, renormalize, pdl, weights, ids)
    return Routing(weights, ids)


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
    out_weights: Tensor | None = None,
    out_ids: Tensor | None = None,
) -> Routing:
    """`functional.activation_topk`."""
    options = (top_k, scoring, renormalize, n_group, topk_group, batch_invariant, pdl)
    call = (logits, bias, routed_scaling_factor, options)
    if isinstance(logits, Tensor) and logits.is_cuda:
        routing: Routing | None = cuda("topk.gate").fast(*call, out_weights, out_ids)
        if routing is not None:
            return routing
    spec, device = check_logits(*call), logits.device
    shape = (logits.shape[0], top_k)
    weights = _output("out_weights", out_weights, shape, torch.float32, device, "logits")
    ids = _output("out_ids", out_ids, shape, torch.int32, device, "logits")
    if shape[0] > 0:
        launch = cuda("topk.gate").launch if logits.is_cuda else cpu.gate
        factor = float(routed_scaling_factor)
        launch(logits, bias, weights, ids, spec, factor, batch_invariant=batch_invariant, pdl=pdl)
    return Routing(weights, ids)


def topk(
    scores: Tensor,
    k: int,
    sorted: bool = True,
    lengths: Tensor | None = None,
    index_dtype: torch.dtype = torch.int64,
    out_values: Tensor | None = None,
    out_indices: Tensor | None = None,
) -> TopK:
    """`functional.topk`."""
    call = (scores, k, sorted, lengths, index_dtype)
    if isinstance(scores, Tensor) and scores.is_cuda:
        best: TopK | None = cuda("topk.standalone").fast(*call, out_values, out_indices)
        if best is not None:
            return best
    check_topk(*call)
    shape, device = (*scores.shape[:-1], k), scores.device
    values = _output("out[0]", out_values, shape, scores.dtype, device, "scores")
    indices = _output("out[1]", out_indices, shape, index_dtype, device, "scores")
    if values.numel() > 0:
        launch = cuda("topk.standalone").launch if scores.is_cuda else cpu.topk
        if scores.ndim == 2 and scores.stride(1) == 1 and not scores.requires_grad:
            launch(scores, lengths, values, indices)  # views would take the host 6 us
        else:
            rows = scores.detach().reshape(-1, scores.shape[-1])
            rows = rows if rows.stride(1) == 1 else rows.contiguous()
            counts = None if lengths is None else lengths.view(-1)
            launch(rows, counts, values.view(-1, k), indices.view(-1, k))
    return TopK(values, indices)


def _output(
    name: str,
    given: Tensor | None,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    where: str = "x",
) -> Tensor:
    """The caller's output tensor, checked, or a new one on the device of the argument `where`."""
    if given is None:
        return torch.empty(shape, dtype=dtype, device=device)
    check_plain(name, given, shape, dtype, device, where)
    return given


@cache
def cuda(name: str) -> Any:
    """A backend of CUDA tensors, by its module's name."""
    return import_module(f"cute_router.{name}")

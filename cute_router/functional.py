"""The public functions: what they mean, and which way a call goes.

    torch.compile, torch.export,   the torch op of the same name (`ops`), which tracers see whole
    fake tensors
    autograd records the call      the same op, for its gradient (`gradient`)
    the call has extras            `extended`, or its op; no gradient
    any other call                 `eager`, straight

Only the last way counts in time: engines call these thousands of times a second.
"""

from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.compiler import is_compiling

from cute_router import eager, extended
from cute_router.extras import Extras
from cute_router.gradient import recorded
from cute_router.reference import unpacked
from cute_router.spec import Routing, Scoring, TopK
from cute_router.validate import check, check_hash, check_logits, check_topk

ops = torch.ops.cute_router
SEQUENCES = (tuple, list)  # for `isinstance`: `tuple | list` would be made anew in each call


def dense_decode(
    x: Tensor,
    W: Tensor,
    bias: Tensor | None = None,
    *,
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
    extras: Extras | None = None,
) -> Routing:
    """Choose and weigh the experts of each token, from hidden states, in one kernel launch.

    With l = x Wᵀ and a = sqrt(softplus(l)) (or sigmoid, or softmax), a token's experts are the
    `top_k` of highest a + bias, equals by ascending id; their weights are
    a / sum(a) * routed_scaling_factor, the sum over the chosen ones. This is the gate of
    DeepSeek-V4 (of DeepSeek-V3 with `scoring="sigmoid"` and groups). `cute_router.reference` is the
    specification in fp64, NaN and infinities included. The kernel is tuned for N up to 128; any
    N works, and `route` picks another one for more.

    Args:
        x: hidden states, bf16 [N, K]; N may be 0. K is a multiple of 8.
        W: router weights, bf16 [E, K], on x's device; E from 1 to 1024. Of x and W the last
            dimension has unit stride, the base address is a multiple of 16 bytes, and the row
            stride is a multiple of 8 elements (of any value where there is one row).
        bias: fp32 [E], contiguous, or None; added for the choice only, never to the weights.
        top_k: experts per token, 1 to 32, at most E.
        routed_scaling_factor: multiplies every weight; finite and not negative. A run-time value:
            a new one compiles nothing.
        scoring: "sqrtsoftplus", "sigmoid" or "softmax" (over all E experts).
        renormalize: divide a token's weights by their sum; where that is 0 they are 0.
        n_group, topk_group: with `n_group` > 1, the experts fall into that many equal groups, and
            only those of the `topk_group` groups with the highest sum of two best scores (ties to
            the lower group) can be chosen.
        batch_invariant: fix the order of every sum by (E, K, architecture) alone, so that a
            token's bits do not depend on N or on the other tokens. Without it the bits are still
            the same from call to call with the same inputs.
        pdl: launch under programmatic dependent launch: the kernel may start before the one ahead
            of it in the stream has ended, and then waits for it before reading x and before
            writing anything. W and bias are read before that wait: pass False where the kernel
            immediately ahead writes either.
        out_weights, out_ids: where to write the result, contiguous fp32 and int32 [N, k] on x's
            device; allocated if None. They must not overlap the inputs, and cannot be given where
            autograd records the call.
        extras: what a serving engine may add (padding, a second bias, shared experts, an expert
            map, other forms of the result, the logits, a replay), or None; see `Extras`. Such a
            call cannot be recorded by autograd.

    Returns:
        Routing(weights fp32 [N, k], ids int32 [N, k]), columns by descending a + bias. The ids are
        distinct and in [0, E) whatever the input. The weights have a gradient with respect to x and
        W, that of the chosen experts' weights; the choice itself has none.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: a wrong shape, stride, alignment, device or value. Both name the argument, what
            was wanted and what was got, and are the same on every device.

    CUDA tensors run the kernels of `backend_for(x.device)`; CPU tensors run the fp64 reference.
    """
    if extras is None and not (_traced(x) or recorded(x, W)):
        options = (top_k, scoring, renormalize, n_group, topk_group, batch_invariant, pdl)
        factor, backend = routed_scaling_factor, "gemm.decode"
        return eager.dense(backend, x, W, bias, factor, options, out_weights, out_ids)
    rest = (scoring, renormalize, n_group, topk_group, batch_invariant, pdl)
    call = (x, W, bias, top_k, routed_scaling_factor, *rest)
    return _dense("dense_decode", call, out_weights, out_ids, extras)


def dense_prefill(
    x: Tensor,
    W: Tensor,
    bias: Tensor | None = None,
    *,
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
    extras: Extras | None = None,
) -> Routing:
    """Choose and weigh the experts of each token of a large batch, in one kernel launch.

    The mathematics, the arguments, the result and the errors are those of `dense_decode`; the
    kernel is another one, tuned for more tokens: tokens are on the wide side of its MMAs, and
    logits never leave the SMs. Any N works; `route` picks by it. A token's bits may differ in their
    last places from those of `dense_decode`, unless `batch_invariant` is set, which has both run
    the same kernel.
    """
    if extras is None and not (_traced(x) or recorded(x, W)):
        options = (top_k, scoring, renormalize, n_group, topk_group, batch_invariant, pdl)
        factor, backend = routed_scaling_factor, "gemm.prefill"
        return eager.dense(backend, x, W, bias, factor, options, out_weights, out_ids)
    rest = (scoring, renormalize, n_group, topk_group, batch_invariant, pdl)
    call = (x, W, bias, top_k, routed_scaling_factor, *rest)
    return _dense("dense_prefill", call, out_weights, out_ids, extras)


def route(
    x: Tensor,
    W: Tensor,
    bias: Tensor | None = None,
    *,
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
    extras: Extras | None = None,
) -> Routing:
    """Choose and weigh the experts of each token: `dense_decode` or `dense_prefill`, by the shape.

    The first serves up to 64, 96 or 128 tokens, by E and K, the second more: what a model fitted to
    an H200 says (docs/perf_log.md). With `batch_invariant` there is no difference. Arguments,
    result and errors are those of `dense_decode`.
    """
    if extras is None and not (_traced(x) or recorded(x, W)):
        options = (top_k, scoring, renormalize, n_group, topk_group, batch_invariant, pdl)
        factor, backend = routed_scaling_factor, eager.dense_backend(x, W)
        return eager.dense(backend, x, W, bias, factor, options, out_weights, out_ids)
    rest = (scoring, renormalize, n_group, topk_group, batch_invariant, pdl)
    call = (x, W, bias, top_k, routed_scaling_factor, *rest)
    return _dense("route", call, out_weights, out_ids, extras)


def hash_route(
    token_ids: Tensor,
    table: Tensor,
    *,
    x: Tensor | None = None,
    W: Tensor | None = None,
    routed_scaling_factor: float = 1.0,
    scoring: Scoring = "sqrtsoftplus",
    renormalize: bool = True,
    pdl: bool = True,
    out_weights: Tensor | None = None,
    out_ids: Tensor | None = None,
    extras: Extras | None = None,
) -> Routing:
    """Look the experts of each token up in a table by its token id, and weigh them.

    Without x and W, every weight is routed_scaling_factor / k. With both, as in the first layers of
    DeepSeek-V4, the table chooses and the gate weighs: with l = x Wᵀ and a = sqrt(softplus(l)) (or
    sigmoid, or softmax), weights are a / sum(a) * routed_scaling_factor, the sum over the token's
    slots. Of sqrtsoftplus and sigmoid only the k chosen products are computed, unless there are so
    many tokens that all products together take less time; in this a token's last bits may depend
    on N. `cute_router.reference.hash_route` is the specification in fp64.

    Args:
        token_ids: int32 or int64 [N], contiguous; N may be 0.
        table: int32 or int64 [vocab, k], on the same device, with contiguous rows; k from 1 to 32.
        x: hidden states, bf16 [N, K], as for `dense_decode`, or None.
        W: router weights, bf16 [E, K], as for `dense_decode`; given if and only if x is.
        routed_scaling_factor: multiplies every weight; finite and not negative. A run-time value.
        scoring: "sqrtsoftplus", "sigmoid" or "softmax" (over all E experts, whose products are then
            all computed). Of no effect without x and W, as is `renormalize`.
        renormalize: divide a token's weights by their sum; where that is 0 they are 0.
        pdl: launch under programmatic dependent launch; see `dense_decode`. The table is read
            before the wait for the kernel ahead: pass False where that writes it.
        out_weights, out_ids: where to write the result, as for `dense_decode`.
        extras: as for `dense_decode`, but for a second bias, logits and fixed ids, for which there
            is nothing here; and without x and W, shared experts, whose number is unknown. A row
            whose token id is outside the table is then invalid (see `Extras`), and without x and W
            an entry outside the expert map gives -1 and weight 0 in its slot.

    Returns:
        Routing(weights fp32 [N, k], ids int32 [N, k]), columns in the order of the table, repeated
        entries kept. A token id outside the table gives ids -1 and weights 0. With x and W so does
        an entry outside [0, E) in its slot, which has no part in the sum; without them entries are
        copied as they are. With x and W the weights have a gradient with respect to both.

    Raises:
        TypeError, ValueError: as `dense_decode`.
    """
    call = (token_ids, table, x, W, routed_scaling_factor, scoring, renormalize, pdl)
    if extras is not None:
        k = table.shape[-1] if _traced(table) else 0
        return _with_extras("hash_route", call, (x, W), k, out_weights, out_ids, extras)
    if _traced(token_ids):
        return _by_op(ops.hash_route, call, (x, W), out_weights, out_ids)
    if recorded(x, W):
        check_hash(*call)
        return _by_op(ops.hash_route, call, (x, W), out_weights, out_ids)
    return eager.hash_route(*call, out_weights, out_ids)


def activation_topk(
    logits: Tensor,
    bias: Tensor | None = None,
    *,
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
    extras: Extras | None = None,
) -> Routing:
    """Choose and weigh the experts of each token from its logits, in one kernel launch.

    What `dense_decode` does behind its product, for logits that come from elsewhere.
    `cute_router.reference.route_logits` is the specification in fp64.

    Args:
        logits: fp32, fp16 or bf16 [N, E]; N may be 0, E from 1 to 1024; rows of unit stride, any
            distance apart. All arithmetic is in fp32.
        bias: fp32 [E], contiguous, on the same device, or None.
        top_k, routed_scaling_factor, scoring, renormalize, n_group, topk_group: as for
            `dense_decode`.
        batch_invariant: let a token's bits depend on its own row alone, also where N differs.
        pdl: launch under programmatic dependent launch; see `dense_decode`. The bias is read before
            the wait for the kernel ahead, the logits behind it.
        out_weights, out_ids: where to write the result, as for `dense_decode`.
        extras: as for `dense_decode`, but for the logits, which are given here.

    Returns:
        Routing(weights fp32 [N, k], ids int32 [N, k]), as `dense_decode` does; the weights have a
        gradient with respect to the logits.

    Raises:
        TypeError, ValueError: as `dense_decode`.
    """
    options = (scoring, renormalize, n_group, topk_group, batch_invariant, pdl)
    call = (logits, bias, top_k, routed_scaling_factor, *options)
    if extras is not None:
        inputs = (logits,)
        return _with_extras("activation_topk", call, inputs, top_k, out_weights, out_ids, extras)
    if _traced(logits):
        return _by_op(ops.activation_topk, call, (logits,), out_weights, out_ids)
    if recorded(logits):
        check_logits(logits, bias, routed_scaling_factor, (top_k, *options))
        return _by_op(ops.activation_topk, call, (logits,), out_weights, out_ids)
    return eager.activation_topk(*call, out_weights, out_ids)


def topk(
    scores: Tensor,
    k: int,
    *,
    sorted: bool = True,
    lengths: Tensor | None = None,
    index_dtype: torch.dtype = torch.int64,
    out: tuple[Tensor, Tensor] | None = None,
) -> TopK:
    """The k largest entries along the last dimension, in the order of a stable descending sort.

    That is the order of `torch.sort(scores, descending=True, stable=True)`: NaNs first, then by
    descending value, -0 equal to +0, equals by ascending index. So the result is determined by the
    scores alone. One kernel launch, which overlaps the kernel ahead of it as far as it can.

    Args:
        scores: fp32, fp16 or bf16 [..., L], L from 1 to 2^20. A last dimension without unit stride,
            or leading ones that are no single dimension, are copied first.
        k: 1 to 4096, at most L.
        sorted: whether the order within a row matters to the caller. Results are sorted in either
            case; False promises no order, and may become faster.
        lengths: int32 or int64 [...], contiguous, on the same device: how many entries of each row
            there are, from its first on; taken as 0 or L where it is outside [0, L]. What lacks to
            k has index -1 and value -inf.
        index_dtype: torch.int64 or torch.int32.
        out: (values, indices) to write to, contiguous; allocated if None.

    Returns:
        TopK(values [..., k] of the scores' dtype, indices [..., k]). Values have their own bits:
        those of a NaN and of -0 too. The values have a gradient with respect to the scores.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: a wrong shape, device or value. Both name the argument, what was wanted and what
            was got.
    """
    values = indices = None
    if out is not None:
        if not (isinstance(out, SEQUENCES) and len(out) == 2):
            raise TypeError(f"out must be (values, indices) or None; got {out!r}")
        values, indices = out
    call = (scores, k, sorted, lengths, index_dtype)
    if not _traced(scores):
        if not recorded(scores):
            return eager.topk(*call, values, indices)
        check_topk(*call)
    if out is None:
        return TopK(*ops.topk.default(*call))
    _refuse_recording("out", scores)
    ops.topk.out(*call, out_values=values, out_indices=indices)
    return TopK(*out)


def _traced(t: Any) -> bool:
    """Whether a tracer calls: `t`, one of the arguments, has no values."""
    return is_compiling() or t.__class__ is FakeTensor


def _dense(
    name: str,
    call: tuple[Any, ...],
    out_weights: Tensor | None,
    out_ids: Tensor | None,
    extras: Extras | None,
) -> Routing:
    """A dense function's call that has extras, or goes by the torch op."""
    x, W, bias, top_k, factor, *options = call
    if extras is not None:
        return _with_extras(name, call, (x, W), top_k, out_weights, out_ids, extras)
    if not _traced(x):  # tracers have no values to check
        check(x, W, bias, factor, (top_k, *options))
    return _by_op(getattr(ops, name), call, (x, W), out_weights, out_ids)


def _by_op(
    op: Any,
    call: tuple[Any, ...],
    inputs: tuple[Tensor | None, ...],
    out_weights: Tensor | None,
    out_ids: Tensor | None,
) -> Routing:
    """The torch op, or its out variant; `inputs` are those of `call` that have a gradient."""
    given = out_ids if out_weights is None else out_weights
    if given is None:
        return Routing(*op.default(*call))
    _refuse_recording("out_weights and out_ids", *inputs)
    if out_weights is None:
        out_weights = torch.empty_like(given, dtype=torch.float32)
    if out_ids is None:
        out_ids = torch.empty_like(given, dtype=torch.int32)
    op.out(*call, out_weights=out_weights, out_ids=out_ids)
    return Routing(out_weights, out_ids)


def _refuse_recording(given: str, *inputs: Tensor | None) -> None:
    """Raise where autograd is to record a call whose outputs are given: it has no way to."""
    if recorded(*inputs):
        raise ValueError(
            f"{given} must be None where a gradient is recorded, because an input requires grad;"
            " call under torch.no_grad() for none"
        )


def _with_extras(
    name: str,
    call: tuple[Any, ...],
    inputs: tuple[Tensor | None, ...],
    k: int,
    out_weights: Tensor | None,
    out_ids: Tensor | None,
    extras: Extras,
) -> Routing:
    """The function `name` of `extended`, or for tracers its op, which writes to given outputs."""
    _refuse_recording("extras", *inputs)
    if not _traced(call[0]):
        function = getattr(extended, name)
        routing: Routing = function(*call, out_weights=out_weights, out_ids=out_ids, extras=extras)
        return routing
    shape, device = (call[0].shape[0], k + extras.shared_experts), call[0].device
    if out_ids is None:
        out_ids = torch.empty(shape, dtype=extras.ids_dtype, device=device)
    if out_weights is None and not extras.packed:
        out_weights = torch.empty(shape, dtype=torch.float32, device=device)
    given = extras.fields() | {"out_weights": out_weights, "out_ids": out_ids}
    getattr(ops, name).extras(*call, **given)
    return unpacked(out_ids) if out_weights is None else Routing(out_weights, out_ids)

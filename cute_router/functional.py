"""The public functions: validate, allocate, launch.

Engines call these thousands of times a second, so on CUDA a call first takes the short way
(`gemm.decode.fast`, `topk.hash.fast`), which leaves most checks to the kernel's compiled host code.
A call that is refused there, or is not of that kind, goes through every check and learns what is
wrong with it.
"""

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from cute_router import reference
from cute_router.spec import RouterSpec, Routing, Scoring
from cute_router.validate import Options, check, check_hash, check_plain


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
) -> Routing:
    """Choose and weigh the experts of each token, from hidden states, in one kernel launch.

    With l = x Wᵀ and a = sqrt(softplus(l)) (or sigmoid, or softmax), a token's experts are the
    `top_k` of highest a + bias, equals by ascending id; their weights are
    a / sum(a) * routed_scaling_factor, the sum over the chosen ones. This is the gate of
    DeepSeek-V4 (of DeepSeek-V3 with `scoring="sigmoid"` and groups). `cute_router.reference` is the
    specification in fp64, NaN and infinities included. The kernel is tuned for N up to 64; any N
    works.

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
            device; allocated if None. They must not overlap the inputs.

    Returns:
        Routing(weights fp32 [N, k], ids int32 [N, k]), columns by descending a + bias. The ids are
        distinct and in [0, E) whatever the input. No gradient flows through either.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: a wrong shape, stride, alignment, device or value. Both name the argument, what
            was wanted and what was got, and are the same on every device.

    CUDA tensors run the kernels of `backend_for(x.device)`; CPU tensors run the fp64 reference.
    """
    options = (top_k, scoring, renormalize, n_group, topk_group, batch_invariant, pdl)
    call = (x, W, bias, routed_scaling_factor, options)
    if isinstance(x, Tensor) and x.is_cuda:
        routing: Routing | None = _cuda().fast(*call, out_weights, out_ids)
        if routing is not None:
            return routing
    N, spec = check(*call)
    weights = _output("out_weights", out_weights, (N, top_k), torch.float32, x.device)
    ids = _output("out_ids", out_ids, (N, top_k), torch.int32, x.device)
    if N > 0:
        launch = _cuda().launch if x.is_cuda else _reference
        launch(x, W, bias, weights, ids, spec, float(routed_scaling_factor), options)
    return Routing(weights, ids)


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
        pdl: launch under programmatic dependent launch; see `dense_decode`. Nothing is read before
            the wait for the kernel ahead.
        out_weights, out_ids: where to write the result, as for `dense_decode`.

    Returns:
        Routing(weights fp32 [N, k], ids int32 [N, k]), columns in the order of the table, repeated
        entries kept. A token id outside the table gives ids -1 and weights 0. With x and W so does
        an entry outside [0, E) in its slot, which has no part in the sum; without them entries are
        copied as they are. No gradient flows through either.

    Raises:
        TypeError, ValueError: as `dense_decode`.
    """
    call = (token_ids, table, x, W, routed_scaling_factor, scoring, renormalize, pdl)
    if isinstance(token_ids, Tensor) and token_ids.is_cuda:
        routing: Routing | None = _cuda_hash().fast(*call, out_weights, out_ids)
        if routing is not None:
            return routing
    shape, device = check_hash(*call), token_ids.device
    weights = _output("out_weights", out_weights, shape, torch.float32, device, "token_ids")
    ids = _output("out_ids", out_ids, shape, torch.int32, device, "token_ids")
    if shape[0] > 0:
        factor = float(routed_scaling_factor)
        launch = _cuda_hash().launch if token_ids.is_cuda else _hash_reference
        launch(token_ids, table, x, W, factor, scoring, renormalize, pdl, weights, ids)
    return Routing(weights, ids)


def _output(
    name: str,
    given: Tensor | None,
    shape: tuple[int, int],
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
def _cuda() -> ModuleType:
    """The CUDA backend, imported at its first call: it brings the kernel compiler with it."""
    from cute_router.gemm import decode

    return decode


@cache
def _cuda_hash() -> ModuleType:
    """The same for `hash_route`."""
    from cute_router.topk import hash as hashing

    return hashing


@torch.no_grad()
def _reference(
    x: Tensor,
    W: Tensor,
    bias: Tensor | None,
    weights: Tensor,
    ids: Tensor,
    spec: RouterSpec,
    factor: float,
    options: Options,
) -> None:
    """The reference as a backend. There is no launch to overlap: `pdl` has no effect."""
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
def _hash_reference(
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
    """The reference as a backend; `pdl` has no effect."""
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

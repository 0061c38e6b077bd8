"""The gradient of the weights, for training and fine-tuning: exact for the experts chosen.

With g the gradient of the loss with respect to the weights w of a token, h with respect to the
logarithm of each chosen activation, and m = Σ g_i w_i / Σ w_i:

    h_j     = w_j (g_j - m)           renormalised: w = a / Σ a · factor
    h_j     = w_j g_j                 not: w = a · factor
    dL/dl_e = h_e · d log a_e / dl_e  = h_e σ(l_e) / (2 softplus(l_e))  sqrtsoftplus
                                      = h_e σ(-l_e)                     sigmoid
                                      = h_e - a_e Σ h                   softmax over all experts
    dL/dx   = Σ_e dL/dl_e W_e         dL/dW_e = Σ_tokens dL/dl_e x

Logarithms, because log a keeps a slope where a itself is too small for fp32. The choice of experts
is piecewise constant, so neither it nor the bias has a gradient. Sums are in fp32 or better, and
are rounded to an input's dtype at the end.

The second half saves and restores for each op of `ops` what this needs.
"""

from typing import Any

import torch
from torch import Tensor

from cute_router import reference
from cute_router.spec import Scoring

# Below it the slope of log sqrt(softplus) is 1/2 even in fp64, and softplus would underflow.
LOWEST_LOGIT = -30.0


def of_logits(
    grad: Tensor,
    weights: Tensor,
    ids: Tensor,
    logits: Tensor,
    scoring: Scoring,
    renormalize: bool,
) -> Tensor:
    """dL/dlogits [N, E], in the logits' dtype, of dL/dweights `grad` [N, k].

    weights, ids [N, k]: what the forward pass returned; a slot of id -1 has no part in anything.
    """
    nobody = ids < 0
    slots = ids.long().clamp(min=0)
    h = weights * grad
    if renormalize:
        total = weights.sum(-1, keepdim=True)
        h = h - weights * (h.sum(-1, keepdim=True) / total.masked_fill(total == 0, 1))
    if scoring == "softmax":
        h = h.masked_fill(nobody, 0)
        result = torch.zeros_like(logits).scatter_add(-1, slots, h.to(logits.dtype))
        if renormalize:
            return result  # Σ h is 0
        return result - torch.softmax(logits, -1) * h.sum(-1, keepdim=True).to(logits.dtype)
    h = h * log_slope(logits.gather(-1, slots), scoring)
    h = h.masked_fill(nobody, 0).to(logits.dtype)
    return torch.zeros_like(logits).scatter_add(-1, slots, h)


def log_slope(logit: Tensor, scoring: Scoring) -> Tensor:
    """d log a / dl of an activation that depends on its own logit only."""
    if scoring == "sigmoid":
        return torch.sigmoid(-logit)
    logit = logit.clamp(min=LOWEST_LOGIT)
    return torch.sigmoid(logit) / (2 * reference.softplus(logit))


def of_product(
    grad_logits: Tensor, x: Tensor, W: Tensor, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """(dL/dx, dL/dW) in the inputs' dtypes, where `wanted`, of dL/dlogits [N, E]."""
    wide = grad_logits.dtype
    grad_x = (grad_logits @ W.to(wide)).to(x.dtype) if wanted[0] else None
    grad_W = (grad_logits.T @ x.to(wide)).to(W.dtype) if wanted[1] else None
    return grad_x, grad_W


def logits_of(x: Tensor, W: Tensor) -> Tensor:
    """The logits [N, E] again, in fp32: bf16 products are exact there."""
    return x.float() @ W.float().T


def recorded(*inputs: Any) -> bool:
    """Whether autograd is to record a call on these inputs."""
    if torch.is_grad_enabled():
        for t in inputs:  # any() would take three times as long
            if getattr(t, "requires_grad", False):
                return True
    return False


# --- of the ops, as torch.library.register_autograd takes it --------------------------------------


def save_dense(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """For `dense_decode`."""
    x, W, _bias, _top_k, _factor, ctx.scoring, ctx.renormalize, *_ = inputs
    ctx.save_for_backward(x, W, *output)


def of_dense(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    """One gradient, or None, for each argument of `dense_decode`."""
    return *_of_saved_product(ctx, grad, ctx.needs_input_grad[:2]), *[None] * 9


def save_hash(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """For `hash_route`."""
    _token_ids, _table, x, W, _factor, ctx.scoring, ctx.renormalize, *_ = inputs
    ctx.save_for_backward(x, W, *output)


def of_hash(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    """One gradient, or None, for each argument of `hash_route`."""
    return None, None, *_of_saved_product(ctx, grad, ctx.needs_input_grad[2:4]), *[None] * 4


def _of_saved_product(
    ctx: Any, grad: Tensor, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    x, W, weights, ids = ctx.saved_tensors
    logits = logits_of(x, W)
    grad_logits = of_logits(grad, weights, ids, logits, ctx.scoring, ctx.renormalize)
    return of_product(grad_logits, x, W, wanted)


def save_gate(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """For `activation_topk`."""
    logits, _bias, _top_k, _factor, ctx.scoring, ctx.renormalize, *_ = inputs
    ctx.save_for_backward(logits, *output)


def of_gate(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    """One gradient, or None, for each argument of `activation_topk`."""
    logits, weights, ids = ctx.saved_tensors
    wide = of_logits(grad, weights, ids, logits.float(), ctx.scoring, ctx.renormalize)
    return wide.to(logits.dtype), *[None] * 9


def save_topk(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """For `topk`."""
    ctx.length = inputs[0].shape[-1]
    ctx.save_for_backward(output[1])


def of_topk(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    """One gradient, or None, for each argument of `topk`: each value is one of the scores."""
    (indices,) = ctx.saved_tensors
    grad = grad.masked_fill(indices < 0, 0)
    zeros = grad.new_zeros((*grad.shape[:-1], ctx.length))
    return zeros.scatter_add(-1, indices.long().clamp(min=0), grad), *[None] * 4

"""The router once more, in plain fp32 torch: what a machine without a GPU is checked against.

On the CPU the public functions run `cute_router.reference`, which cannot be its own judge. This is
a second opinion, with the same function names and none of its code.
"""

import torch
from torch import Tensor

from cute_router.spec import Routing, Scoring, TopK


def logits(x: Tensor, W: Tensor) -> Tensor:
    """x Wᵀ [N, E]."""
    return x.float() @ W.float().T


def activations(logit: Tensor, scoring: Scoring) -> Tensor:
    """The activation of each logit [N, E]."""
    if scoring == "softmax":
        return torch.softmax(logit.float(), -1)
    if scoring == "sigmoid":
        return torch.sigmoid(logit.float())
    return torch.nn.functional.softplus(logit.float()).sqrt()


def removed_by_groups(s: Tensor, n_group: int, topk_group: int) -> Tensor:
    """Which experts [N, E] the group limit removes."""
    groups = s.masked_fill(s.isnan(), -torch.inf).unflatten(-1, (n_group, -1))
    sums = groups.sort(dim=-1, descending=True).values[..., :2].sum(-1)
    kept = sums.sort(dim=-1, descending=True, stable=True).indices[..., :topk_group]
    removed = torch.ones_like(sums, dtype=torch.bool)
    for group in kept.unbind(-1):
        removed[torch.arange(len(s)), group] = False
    return removed.repeat_interleave(s.shape[-1] // n_group, -1)


def select(s: Tensor, top_k: int, n_group: int = 1, topk_group: int = 1) -> Tensor:
    """The ids [N, k] of the best scores, equals by ascending id, then NaN, then removed ones."""
    number = s.masked_fill(s.isnan(), torch.finfo(s.dtype).min)  # no score here is as low
    if n_group > 1:
        number = number.masked_fill(removed_by_groups(s, n_group, topk_group), -torch.inf)
    return number.sort(dim=-1, descending=True, stable=True).indices[..., :top_k]


def weigh(a: Tensor, ids: Tensor, factor: float, renormalize: bool) -> Tensor:
    """The weights [N, k] of the chosen experts."""
    chosen = torch.stack([a[n, row] for n, row in enumerate(ids)])
    if not renormalize:
        return factor * chosen
    total = chosen.sum(-1, keepdim=True)
    return torch.where(total == 0, 0.0, factor * (chosen / total))


def hash_route(
    token_ids: Tensor,
    table: Tensor,
    *,
    x: Tensor | None,
    W: Tensor | None,
    routed_scaling_factor: float,
) -> Routing:
    """Experts by token id, one token at a time; with x and W weighed by sqrtsoftplus."""
    vocab, k = table.shape
    a = None if x is None or W is None else activations(logits(x, W), "sqrtsoftplus")
    ids = torch.full((len(token_ids), k), -1, dtype=torch.int32)
    weights = torch.zeros(len(token_ids), k)
    for n, token in enumerate(token_ids.tolist()):
        if not 0 <= token < vocab:
            continue
        row = table[token]
        if a is None:
            ids[n], weights[n] = row, routed_scaling_factor / k
            continue
        there = (row >= 0) & (row < a.shape[1])
        ids[n, there] = row[there].int()
        chosen = a[n, row[there].long()]
        weights[n, there] = chosen / chosen.sum() * routed_scaling_factor
    return Routing(weights, ids)


def topk(scores: Tensor, k: int, lengths: Tensor | None = None) -> TopK:
    """The k first by integer keys that rise as the scores do and are all different in a row."""
    L = scores.shape[-1]
    column = torch.arange(L)
    bits = scores.float().view(torch.int32).long()  # exact for 16-bit floats
    key = torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)  # -0 gets the key of +0
    key = key.masked_fill(scores.isnan(), 1 << 31) * L - column
    if lengths is not None:
        key[column >= lengths[:, None]] = torch.iinfo(torch.int64).min
    indices = key.sort(dim=-1, descending=True).indices[:, :k]
    as_integers = torch.int32 if scores.itemsize == 4 else torch.int16  # keeps the bits of a NaN
    values = scores.view(as_integers).gather(-1, indices).view(scores.dtype)
    if lengths is not None:
        lacking = column[:k] >= lengths[:, None]
        values[lacking], indices[lacking] = -torch.inf, -1
    return TopK(values, indices)

"""The specification of the router, in fp64: one function per equation.

    l_e = sum_k x_k W_ek                          logits
    a_e = sqrt(softplus(l_e))                     activations (or sigmoid, or softmax)
    s_e = a_e + bias_e                            selection_scores
    ids = the k largest by (s, lowest id first)   select, after removed_by_groups
    w_j = a_ids[j] / sum a_ids * factor           weigh

The bias takes part in the choice only; the weights come from the unbiased activations.

    hash_route: ids from a table by token id (look_up), the same weights or equal ones

Every function takes any leading dimensions and any device, and computes in fp64 whatever it is
given. The kernels compute in fp32 and are held to this page: their logits lie within
`logit_error_bound` of these, and where that is not enough to tell two scores apart, either order is
right. An activation too small for fp32 (sqrtsoftplus of a logit below about -206, sigmoid of one
below about -103) is 0 for them and may still be a number here.
"""

import torch
from torch import Tensor

from cute_router.spec import Routing, Scoring, TopK, check_selection


def logits(x: Tensor, W: Tensor) -> Tensor:
    """l = x W^T: hidden states [..., K] and router weights [E, K] to fp64 logits [..., E]."""
    return x.double() @ W.double().T


def logit_error_bound(x: Tensor, W: Tensor) -> Tensor:
    """2^-20 sum_k |x_k W_ek|: how far an fp32-accumulated logit [..., E] may lie from `logits`."""
    return 2.0**-20 * logits(x.abs(), W.abs())


def softplus(logit: Tensor) -> Tensor:
    """log(1 + exp(l)) as max(l, 0) + log1p(exp(-|l|)): exp cannot overflow, log1p keeps tails."""
    return logit.clamp(min=0) + torch.log1p(torch.exp(-logit.abs()))


def activations(logit: Tensor, scoring: Scoring = "sqrtsoftplus") -> Tensor:
    """The activation a of each logit [..., E]; a softmax row with a NaN or +inf is all NaN."""
    logit = logit.double()
    if scoring == "sqrtsoftplus":
        return softplus(logit).sqrt()
    if scoring == "sigmoid":
        return torch.sigmoid(logit)
    if scoring == "softmax":
        e = torch.exp(logit - logit.amax(-1, keepdim=True))
        return e / e.sum(-1, keepdim=True)
    raise ValueError(f"scoring must be 'sqrtsoftplus', 'sigmoid' or 'softmax'; got {scoring!r}")


def selection_scores(a: Tensor, bias: Tensor | None = None) -> Tensor:
    """s = a + bias: what experts are chosen by."""
    return a if bias is None else a + bias.double()


def order(s: Tensor, removed: Tensor | None = None) -> Tensor:
    """All ids of the last dimension, best first: a total order, whatever the values.

    Numbers come by descending value, then NaNs, then the entries that `removed` marks. Equals come
    by ascending id, and -0 equals +0.
    """
    rank = s.isnan().long()  # 0: a number, 1: NaN, 2: removed
    if removed is not None:
        rank = rank.masked_fill(removed, 2)
    value = s.masked_fill(rank > 0, 0) + 0.0  # adding +0 turns -0 into +0
    by_value = value.argsort(dim=-1, descending=True, stable=True)
    by_rank = rank.gather(-1, by_value).argsort(dim=-1, stable=True)
    return by_value.gather(-1, by_rank)


def removed_by_groups(s: Tensor, n_group: int, topk_group: int) -> Tensor:
    """Which experts [..., E] the group limit removes (bool).

    The experts fall into `n_group` runs of neighbours; a group's score is the sum of its two best
    s. The `topk_group` best groups stay: ties go to the lower group, a NaN score ranks last.
    """
    groups = s.unflatten(-1, (n_group, -1))
    two_best = groups.gather(-1, order(groups)[..., :2])
    ranking = order(two_best.sum(-1))
    removed = torch.ones_like(ranking, dtype=torch.bool)
    removed.scatter_(-1, ranking[..., :topk_group], False)
    return removed.unsqueeze(-1).expand_as(groups).flatten(-2)


def select(s: Tensor, top_k: int, n_group: int = 1, topk_group: int = 1) -> Tensor:
    """The ids [..., k] of the k best experts, best first (int64)."""
    removed = removed_by_groups(s, n_group, topk_group) if n_group > 1 else None
    return order(s, removed)[..., :top_k]


def weigh(
    a: Tensor, ids: Tensor, routed_scaling_factor: float = 1.0, renormalize: bool = True
) -> Tensor:
    """The weights [..., k] of the chosen experts: a / sum(a) * factor, or a * factor.

    Where the sum is 0 the weights are 0; beyond that, inf and NaN follow IEEE arithmetic.
    """
    chosen = a.gather(-1, ids.long())
    if not renormalize:
        return chosen * routed_scaling_factor
    total = chosen.sum(-1, keepdim=True)
    return (chosen / total * routed_scaling_factor).masked_fill(total == 0, 0)


def route_logits(
    logits: Tensor,
    bias: Tensor | None = None,
    *,
    top_k: int = 6,
    routed_scaling_factor: float = 1.0,
    scoring: Scoring = "sqrtsoftplus",
    renormalize: bool = True,
    n_group: int = 1,
    topk_group: int = 1,
) -> Routing:
    """Logits [..., E] to the chosen experts: fp32 weights and int32 ids [..., k]."""
    check_selection(logits.shape[-1], top_k, scoring, n_group, topk_group)
    a = activations(logits, scoring)
    ids = select(selection_scores(a, bias), top_k, n_group, topk_group)
    weights = weigh(a, ids, routed_scaling_factor, renormalize)
    return Routing(weights.float(), ids.int())


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
) -> Routing:
    """Hidden states [..., K] to the chosen experts: fp32 weights and int32 ids [..., k].

    The arguments mean what they mean to `cute_router.dense_decode`; x and W may be of any
    floating dtype here.
    """
    return route_logits(
        logits(x, W),
        bias,
        top_k=top_k,
        routed_scaling_factor=routed_scaling_factor,
        scoring=scoring,
        renormalize=renormalize,
        n_group=n_group,
        topk_group=topk_group,
    )


def look_up(token_ids: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """The table's row of each token [N, k], and which token ids the table has [N].

    Where it has none the row is -1.
    """
    known = (token_ids >= 0) & (token_ids < table.shape[0])
    rows = table.long()[token_ids.long().masked_fill(~known, 0)]
    return rows.masked_fill(~known[:, None], -1), known


def hash_route(
    token_ids: Tensor,
    table: Tensor,
    *,
    x: Tensor | None = None,
    W: Tensor | None = None,
    routed_scaling_factor: float = 1.0,
    scoring: Scoring = "sqrtsoftplus",
    renormalize: bool = True,
) -> Routing:
    """Token ids [N] and a table [vocab, k] to the experts that the table names, in its order.

    The arguments mean what they mean to `cute_router.hash_route`. Without x and W the weights are
    factor / k; with them they are those of `weigh`, where a slot whose entry is no expert has id
    -1, weight 0 and no part in the sum.
    """
    ids, known = look_up(token_ids, table)
    k = table.shape[1]
    if x is None or W is None:
        share = torch.full(ids.shape, routed_scaling_factor / k, device=ids.device)
        return Routing(share.masked_fill(~known[:, None], 0), ids.int())
    a = activations(logits(x, W), scoring)
    E = a.shape[-1]
    nobody = (ids < 0) | (ids >= E)
    a = torch.cat([a, a.new_zeros(a.shape[0], 1)], -1)  # expert E, of activation 0, for nobody
    weights = weigh(a, ids.masked_fill(nobody, E), routed_scaling_factor, renormalize)
    return Routing(weights.masked_fill(nobody, 0).float(), ids.masked_fill(nobody, -1).int())


def topk(scores: Tensor, k: int, lengths: Tensor | None = None) -> TopK:
    """The k first of a stable descending sort of scores [..., L]: NaNs first, -0 equal to +0.

    Only the first `lengths` [...] entries of a row are there; what lacks to k is -inf, index -1.
    """
    L = scores.shape[-1]
    s = scores
    if lengths is not None:
        missing = torch.arange(L, device=scores.device) >= lengths.unsqueeze(-1)
        s = scores.masked_fill(missing, -torch.inf)  # behind every -inf that is there, by its index
    indices = s.argsort(dim=-1, descending=True, stable=True)[..., :k]
    # As integers: on its way through torch's CPU kernels a 16-bit NaN can change its payload.
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[scores.element_size()]
    values = scores.contiguous().view(bits).gather(-1, indices).view(scores.dtype)
    if lengths is not None:
        lacking = torch.arange(k, device=scores.device) >= lengths.unsqueeze(-1)
        values[lacking] = -torch.inf
        indices = indices.masked_fill(lacking, -1)
    return TopK(values, indices)

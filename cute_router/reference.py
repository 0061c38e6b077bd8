"""The specification of the router, in fp64: one function per equation.

    l_e = sum_k x_k W_ek                          logits
    a_e = sqrt(softplus(l_e))                     activations (or sigmoid, or softmax)
    s_e = a_e + bias_e                            selection_scores
    ids = the k largest by (s, lowest id first)   select, after removed_by_groups
    w_j = a_ids[j] / sum a_ids * factor           weigh

The bias takes part in the choice only; the weights come from the unbiased activations.

    hash_route: ids from a table by token id (look_up), the same weights or equal ones
    extras:     a second bias (bias_of_rows), given ids (weigh_given), the form of results (finish)

Every function takes any leading dimensions and any device, and computes in fp64 whatever it is
given. The kernels compute in fp32 and are held to this page: their logits lie within
`logit_error_bound` of these, and where that is not enough to tell two scores apart, either order is
right. An activation too small for fp32 (sqrtsoftplus of a logit below about -206, sigmoid of one
below about -103) is 0 for them and may still be a number here.
"""

from dataclasses import replace

import torch
from torch import Tensor

from cute_router.extras import Extras
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
    """s = a + bias: what experts are chosen by; the bias is [E], or that of each row [..., E]."""
    return a if bias is None else a + bias.double()


def bias_of_rows(bias: Tensor | None, extras: Extras | None) -> Tensor | None:
    """The bias of each row [N, E] where there is a second one; else the bias as it is."""
    if extras is None or extras.second_bias is None or extras.second_bias_mask is None:
        return bias
    first = torch.zeros_like(extras.second_bias) if bias is None else bias
    return torch.where(extras.second_bias_mask[:, None], extras.second_bias, first)


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


def weigh_given(
    a: Tensor, ids: Tensor, routed_scaling_factor: float = 1.0, renormalize: bool = True
) -> tuple[Tensor, Tensor]:
    """(weights, ids) [N, k] of ids that may be anything, from a table or a record.

    Where one is no expert of the activations [N, E] its slot has id -1, weight 0 and no part in the
    sum.
    """
    E = a.shape[-1]
    nobody = (ids < 0) | (ids >= E)
    a = torch.cat([a, a.new_zeros(a.shape[0], 1)], -1)  # expert E, of activation 0, for nobody
    weights = weigh(a, ids.masked_fill(nobody, E), routed_scaling_factor, renormalize)
    return weights.masked_fill(nobody, 0), ids.masked_fill(nobody, -1)


def finish(weights: Tensor, ids: Tensor, num_experts: int, extras: Extras | None) -> Routing:
    """Weights and ids [N, k] as a call returns them: mapped, with shared experts, masked, packed.

    `cute_router.Extras` says what each of its fields does. An id of -1 is mapped to itself.
    """
    if extras is None:
        return Routing(weights.float(), ids.int())
    N = ids.shape[0]
    if extras.expert_map is not None:
        mapped = extras.expert_map.long()[ids.long().clamp(min=0)]
        ids = torch.where(ids < 0, ids, mapped)
    shared = torch.arange(num_experts, num_experts + extras.shared_experts, device=ids.device)
    ids = torch.cat([ids.long(), shared.expand(N, -1)], -1)
    share = weights.new_full((N, extras.shared_experts), extras.shared_weight)
    weights = torch.cat([weights, share], -1)
    invalid = ~valid_rows(N, extras, ids.device)[:, None]
    weights, ids = weights.masked_fill(invalid, 0).float(), ids.masked_fill(invalid, -1)
    if extras.packed:
        return unpacked(pack(weights, ids))
    return Routing(weights, ids.to(extras.ids_dtype))


def valid_rows(N: int, extras: Extras, device: torch.device) -> Tensor:
    """Which of N rows are tokens, bool [N]."""
    valid = torch.ones(N, dtype=torch.bool, device=device)
    if extras.num_valid is not None:
        valid &= torch.arange(N, device=device) < extras.num_valid
    return valid if extras.valid is None else valid & extras.valid


def pack(weights: Tensor, ids: Tensor) -> Tensor:
    """id << 16 | bf16(weight), int32."""
    lower = weights.float().bfloat16().view(torch.int16).int() & 0xFFFF
    return (ids.int() << 16) | lower


def unpacked(words: Tensor) -> Routing:
    """The packed form as a call returns it: the words, and a bf16 view of their lower halves."""
    return Routing(words.view(torch.bfloat16)[..., ::2], words)


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
    extras: Extras | None = None,
) -> Routing:
    """Logits [..., E] to the chosen experts: fp32 weights and int32 ids [..., k].

    With extras, logits are [N, E]; their `out_logits` is not written: these are the logits.
    """
    check_selection(logits.shape[-1], top_k, scoring, n_group, topk_group)
    a = activations(logits, scoring)
    if extras is None or extras.fixed_ids is None:
        s = selection_scores(a, bias_of_rows(bias, extras))
        ids = select(s, top_k, n_group, topk_group)
        weights = weigh(a, ids, routed_scaling_factor, renormalize)
    else:
        weights, ids = weigh_given(a, extras.fixed_ids, routed_scaling_factor, renormalize)
    return finish(weights, ids, a.shape[-1], extras)


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
    extras: Extras | None = None,
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
        extras=extras,
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
    extras: Extras | None = None,
) -> Routing:
    """Token ids [N] and a table [vocab, k] to the experts that the table names, in its order.

    The arguments mean what they mean to `cute_router.hash_route`. Without x and W the weights are
    factor / k, and of an entry its lower 32 bits are copied; with them they are those of
    `weigh_given`. With extras, a row whose token id the
    table has not is invalid; and without x and W an entry that the expert map has not has id -1 and
    weight 0.
    """
    ids, known = look_up(token_ids, table)
    if x is None or W is None:
        share = torch.full(ids.shape, routed_scaling_factor / table.shape[1], device=ids.device)
        weights, E = share.masked_fill(~known[:, None], 0), 0
        if extras is not None and extras.expert_map is not None:
            nobody = (ids < 0) | (ids >= extras.expert_map.shape[0])
            weights, ids = weights.masked_fill(nobody, 0), ids.masked_fill(nobody, -1)
        ids = ids.int()
    else:
        a = activations(logits(x, W), scoring)
        weights, ids = weigh_given(a, ids, routed_scaling_factor, renormalize)
        E = a.shape[-1]
    if extras is not None:
        extras = replace(extras, valid=known if extras.valid is None else known & extras.valid)
    return finish(weights, ids, E, extras)


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

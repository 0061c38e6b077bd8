"""Holds a `Routing` to the fp64 specification, as closely as fp32 arithmetic can be held to it.

A kernel's logit may lie anywhere within `reference.logit_error_bound` of the exact one. Every score
is then an interval, and a choice is right if scores within the intervals lead to it:

    an expert may precede another       if its highest score reaches the other's lowest
    exact and equal scores              go by ascending id, always
    a group may stay, or surely stays   by the same rule over groups

Logits are exact where fp32 sums are: for integers, zeros, infinities and NaN. There the intervals
shrink to the error of the activation, so ties made on purpose are checked to the last id.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from cute_router import Routing, dense_decode, reference
from cute_router.spec import Scoring

ACTIVATION_ERROR = 1e-6  # relative
SUBNORMAL = 2.0**-148  # the same where fp32 activations are subnormal: absolute, two last places
ROUNDING = 2.0**-23  # relative, of an fp32 addition, doubled
WEIGHT_ERROR = 1e-5  # of the scaling factor

# Beyond these the allowed error of the logits alone moves weights by more than WEIGHT_ERROR.
ORDINARY_BOUND = 2.0**-12
ORDINARY_ACTIVATION = 2.0**-100
# Above this fp32 sums may overflow on the way, which no bound describes.
LARGEST_SUM = 1e37
# From here on neighbouring fp32 logits have different activations in fp64.
SMALLEST_APART = 2.0**-20


class Logits(NamedTuple):
    """Logits [N, E] of N tokens in fp64.

    value: the exact one. bound: how far a kernel's may lie from it. exact: whether experts of equal
    scores have equal ones in a kernel too. known: [N]; in a row that is not, which may overflow,
    well-formed ids are all that can be asked for.
    """

    value: Tensor
    bound: Tensor
    exact: Tensor
    known: Tensor


class Scores(NamedTuple):
    """What n candidates of N tokens are ranked by, each [N, n]; NaN and -inf as finite ranks.

    value: the exact score. low, high: where a kernel's may lie. exact: whether equal scores are
    equal in a kernel too, because the logits behind them are free of rounding.
    """

    value: Tensor
    low: Tensor
    high: Tensor
    exact: Tensor


class Activations(NamedTuple):
    """Activations [N, E] in fp64, and where a kernel's may lie."""

    value: Tensor
    low: Tensor
    high: Tensor


def check_decode(x: Tensor, W: Tensor, bias: Tensor | None, **options: object) -> Routing:
    """Call `dense_decode` into poisoned outputs and hold the result to the oracle."""
    shape = (x.shape[0], options.get("top_k", 6))
    weights = torch.full(shape, -123.0, device=x.device)
    ids = torch.full(shape, -7, dtype=torch.int32, device=x.device)
    routing = dense_decode(x, W, bias, out_weights=weights, out_ids=ids, **options)
    assert routing.weights is weights
    assert routing.ids is ids
    assert_routing(routing, x, W, bias, **options)
    return routing


def assert_routing(
    routing: Routing, x: Tensor, W: Tensor, bias: Tensor | None = None, **options: Any
) -> None:
    """Raise `AssertionError` unless the specification allows this routing of hidden states."""
    assert_routed(routing, logits_of_products(x, W), bias, **options)


def assert_gated(
    routing: Routing, logits: Tensor, bias: Tensor | None = None, **options: Any
) -> None:
    """Raise `AssertionError` unless the specification allows this routing of given logits."""
    assert_routed(routing, given_logits(logits), bias, **options)


def assert_routed(
    routing: Routing,
    logits: Logits,
    bias: Tensor | None,
    *,
    top_k: int = 6,
    routed_scaling_factor: float = 1.0,
    scoring: Scoring = "sqrtsoftplus",
    renormalize: bool = True,
    n_group: int = 1,
    topk_group: int = 1,
    batch_invariant: bool = False,
    pdl: bool = True,
) -> None:
    """Raise `AssertionError` unless the routing is one that the specification allows."""
    del batch_invariant, pdl  # how it was computed is no part of what is right
    logit, bound, exact, known = logits
    N, E = logit.shape
    assert_well_formed(routing, N, E, top_k)
    if N == 0:
        return
    ids = routing.ids.long()
    a = activation_intervals(logit, bound, scoring)
    s = score_intervals(a, bias, exact)
    assert_choice(ids, s, n_group, topk_group, known)
    ordinary = bound.amax(-1) <= ORDINARY_BOUND
    assert_weights(routing.weights, ids, a, routed_scaling_factor, renormalize, ordinary, known)


def assert_well_formed(routing: Routing, N: int, E: int, k: int) -> None:
    """Right shapes and dtypes; ids in range and distinct within a row."""
    weights, ids = routing
    assert weights.shape == ids.shape == (N, k), f"{weights.shape}, {ids.shape} for {(N, k)}"
    assert weights.dtype == torch.float32, weights.dtype
    assert ids.dtype == torch.int32, ids.dtype
    outside = (ids < 0) | (ids >= E)
    assert not outside.any(), f"ids out of range 0...{E - 1}: {first_row(ids, outside)}"
    in_order = ids.sort(-1).values
    repeated = in_order[:, 1:] == in_order[:, :-1]
    assert not repeated.any(), f"repeated ids: {first_row(ids, repeated)}"


def assert_choice(ids: Tensor, s: Scores, n_group: int, topk_group: int, known: Tensor) -> None:
    """No chosen expert [N, k] may precede one that must come before it; rows not known pass."""
    (N, k), E = ids.shape, s.value.shape[1]
    competes = torch.ones_like(s.exact)
    if n_group > 1:
        may_stay, competes = group_verdicts(s, n_group, topk_group)
        lost = ~may_stay.gather(1, ids) & known[:, None]
        assert not lost.any(), f"experts of a group that cannot stay: {first_row(ids, lost)}"

    slots = torch.arange(k, device=ids.device)
    position = torch.full((N, E), k, device=ids.device).scatter(1, ids, slots.expand(N, k))
    later = position[:, None, :] > slots[None, :, None]  # (token, slot, expert)
    experts = torch.arange(E, device=ids.device)
    chosen = Scores(*(t.gather(1, ids)[..., None] for t in s))
    others = Scores(*(t[:, None, :] for t in s))
    wrong = ~may_precede(chosen, others, ids[..., None], experts)
    wrong &= later & (competes | (position < k))[:, None, :] & known[:, None, None]
    if wrong.any():
        n, slot, rival = wrong.nonzero()[0].tolist()
        expert = int(ids[n, slot])
        raise AssertionError(
            f"token {n}, slot {slot}: expert {describe(s, n, expert)} is chosen"
            f" before {describe(s, n, rival)}; ids {ids[n].tolist()};"
            f" {int(wrong.any(-1).any(-1).sum())} of {N} tokens are wrong"
        )


def assert_weights(
    weights: Tensor,
    ids: Tensor,
    a: Activations,
    factor: float,
    renormalize: bool,
    ordinary: Tensor,
    known: Tensor,
) -> None:
    """The weights [N, k] are those of fp64 at the chosen ids; rows not known pass."""
    expected = reference.weigh(a.value, ids, factor, renormalize)
    value, low, high = (t.gather(1, ids) for t in a)
    tolerance = torch.full_like(expected, WEIGHT_ERROR * factor)
    if not renormalize:
        tolerance *= value.clamp(min=1)
    # What the allowed error of the logits can do to a weight, where it can do much.
    if renormalize:
        lowest = low / (low + high.sum(-1, keepdim=True) - high)
        highest = high / (high + low.sum(-1, keepdim=True) - low)
        moved = (highest.nan_to_num(0) - lowest.nan_to_num(0)) * factor
    else:
        moved = (high - low) * factor
    ordinary = ordinary & (value.amax(-1) >= ORDINARY_ACTIVATION)
    tolerance = torch.where(ordinary[:, None], tolerance, tolerance + moved)

    same = (weights == expected) | (weights.isnan() & expected.isnan())
    near = expected.isfinite() & ((weights - expected).abs() <= tolerance)
    wrong = ~(same | near) & known[:, None]
    if wrong.any():
        n, slot = wrong.nonzero()[0].tolist()
        raise AssertionError(
            f"token {n}, slot {slot}, expert {int(ids[n, slot])}: weight"
            f" {float(weights[n, slot])!r} for {float(expected[n, slot])!r}, allowed"
            f" ± {float(tolerance[n, slot]):.3g}; {int(wrong.sum())} weights are wrong"
        )


# --- intervals ----------------------------------------------------------------------------------


def logits_of_products(x: Tensor, W: Tensor) -> Logits:
    """The logits of hidden states, which a kernel sums up in fp32."""
    logit, magnitude = reference.logits(x, W), reference.logits(x.abs(), W.abs())
    exact = exact_logits(x, W, logit, magnitude)
    bound = reference.logit_error_bound(x, W).masked_fill(exact, 0)
    known = ~(magnitude.isfinite() & (magnitude > LARGEST_SUM)).any(-1)
    return Logits(logit, bound, exact, known)


def given_logits(logits: Tensor) -> Logits:
    """Logits that a kernel reads as they are."""
    logit = logits.double()
    # Of very small ones fp64 has equal activations, which fp32 need not round alike.
    exact = (logit == 0) | (logit.abs() >= SMALLEST_APART) | ~logit.isfinite()
    known = torch.ones(logit.shape[:1], dtype=torch.bool, device=logit.device)
    return Logits(logit, torch.zeros_like(logit), exact, known)


def exact_logits(x: Tensor, W: Tensor, logit: Tensor, magnitude: Tensor) -> Tensor:
    """Where [N, E] an fp32 sum in any order gives the exact logit: integers, zeros, inf, NaN."""
    whole_x, whole_W = ((t.double() == t.double().round()).all(-1) for t in (x, W))
    whole = whole_x[:, None] & whole_W & (magnitude < 2**24)
    return whole | (magnitude == 0) | ~logit.isfinite()


def activation_intervals(logit: Tensor, bound: Tensor, scoring: Scoring) -> Activations:
    """Activations [N, E] of logits that are known to ± bound, in fp32."""
    a = reference.activations(logit, scoring)
    if scoring == "softmax":
        # Errors of the other logits reach an activation through the sum.
        shift = bound + bound.amax(-1, keepdim=True)
        log_a = torch.log_softmax(logit, -1)
        low, high = torch.exp(log_a - shift), torch.exp(log_a + shift).clamp(max=1)
    else:
        low = reference.activations(logit - bound, scoring)
        high = reference.activations(logit + bound, scoring)
    slack = ACTIVATION_ERROR * a + SUBNORMAL
    settled = ~(logit.isfinite() & a.isfinite())  # limits and NaN are exact
    return Activations(
        a,
        torch.where(settled, a, (low - slack).clamp(min=0)),
        torch.where(settled, a, high + slack),
    )


def score_intervals(a: Activations, bias: Tensor | None, exact: Tensor) -> Scores:
    """Selection scores [N, E], with the rounding of the one addition."""
    value, low, high = (reference.selection_scores(t, bias) for t in a)
    return with_rounding(value, low, high, exact)


def with_rounding(value: Tensor, low: Tensor, high: Tensor, exact: Tensor) -> Scores:
    """Intervals widened by the rounding of a sum, where it is finite; inf and NaN are exact."""
    finite = value.isfinite()
    slack = ROUNDING * torch.maximum(low.abs(), high.abs())
    low = torch.where(finite, low - slack, value)
    high = torch.where(finite, high + slack, value)
    return Scores(*(ranked(t) for t in (value, low, high)), exact | ~finite)


def ranked(t: Tensor) -> Tensor:
    """The same order in comparable numbers: NaN becomes -inf, and -inf the lowest number."""
    lowest = torch.finfo(t.dtype).min
    return t.masked_fill(t == -torch.inf, lowest).masked_fill(t.isnan(), -torch.inf)


def may_precede(first: Scores, second: Scores, first_id: Tensor, second_id: Tensor) -> Tensor:
    """Whether a candidate may come before another."""
    tied = first.exact & second.exact & (first.value == second.value)
    return torch.where(tied, first_id < second_id, first.high >= second.low)


def group_verdicts(s: Scores, n_group: int, topk_group: int) -> tuple[Tensor, Tensor]:
    """Of each expert [N, E]: whether its group may be among those that stay, and surely is."""

    def two_best(t: Tensor) -> Tensor:
        # Undo `ranked`, so that -inf and NaN add as they do in the specification.
        t = t.masked_fill(t == -torch.inf, torch.nan)
        t = t.masked_fill(t == torch.finfo(t.dtype).min, -torch.inf).unflatten(1, (n_group, -1))
        return t.gather(-1, reference.order(t)[..., :2]).sum(-1)

    exact = s.exact.unflatten(1, (n_group, -1)).all(-1)
    g = with_rounding(two_best(s.value), two_best(s.low), two_best(s.high), exact)
    number = torch.arange(n_group, device=s.value.device)
    rows, columns = (Scores(*(t.unsqueeze(d) for t in g)) for d in (2, 1))
    # [token, group, rival]: may the group precede the rival, or the rival the group?
    leads = may_precede(rows, columns, number[:, None], number[None, :])
    trails = may_precede(columns, rows, number[None, :], number[:, None])
    itself = number[:, None] == number[None, :]
    may_stay = (~leads & ~itself).sum(-1) < topk_group
    surely_stays = (trails & ~itself).sum(-1) < topk_group
    size = s.value.shape[1] // n_group
    return may_stay.repeat_interleave(size, 1), surely_stays.repeat_interleave(size, 1)


# --- messages -----------------------------------------------------------------------------------


def describe(s: Scores, n: int, e: int) -> str:
    """An expert and its score, for a message."""
    return f"{e} (s = {float(s.value[n, e])!r} in [{float(s.low[n, e])}, {float(s.high[n, e])}])"


def first_row(ids: Tensor, wrong: Tensor) -> str:
    """The first token that is wrong, for a message."""
    n = int(wrong.any(-1).nonzero()[0])
    return f"token {n} has {ids[n].tolist()}"

"""Right or wrong: each function returns what is wrong with a result, or nothing.

    ids       those of the truth wherever scores differ by more than the error that fp32 logits may
              have (`reference.logit_error_bound`), and everywhere in rows that are free of rounding
    weights   within 1e-5 of the scaling factor, at the ids that were chosen
    topk      every bit

Results are on the CPU here. The truth is `cute_router.reference`, or `plain` for that itself.
"""

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cute_router.spec import Routing, TopK

WEIGHT_ERROR = 1e-5  # of the scaling factor
ACTIVATION_ERROR = 1e-6  # relative


class Logits(NamedTuple):
    """Logits [N, E], how far [N, E] a kernel's may lie from them, and which rows [N] are exact."""

    value: Tensor
    bound: Tensor
    exact: Tensor


def wrong_routing(
    got: Routing,
    truth: ModuleType,
    logits: Logits,
    bias: Tensor | None,
    *,
    top_k: int,
    scoring: str,
    renormalize: bool,
    n_group: int,
    topk_group: int,
    routed_scaling_factor: float,
) -> list[str]:
    """What is wrong with the experts that a router chose by these logits."""
    ids, E = got.ids.long(), logits.value.shape[1]
    malformed = wrong_ids(ids, E)
    if malformed:
        return malformed  # weights at such ids mean nothing
    a = truth.activations(logits.value, scoring)
    s = a if bias is None else a + bias
    # No activation is steeper than 1, so an error of the logit is at least as large as its own.
    error = (logits.bound + ACTIVATION_ERROR * s.abs()).amax(-1, keepdim=True)
    expected = truth.select(s, top_k, n_group, topk_group)
    clear = torch.ones_like(logits.exact)
    if n_group > 1:
        clear = logits.exact | groups_are_clear(s, n_group, topk_group, error)
        s = s.masked_fill(truth.removed_by_groups(s, n_group, topk_group), -torch.inf)
    # Scores that move by `error` move what stands in any place by no more; hence twice that.
    got_s, expected_s = s.gather(1, ids), s.gather(1, expected)
    near = (got_s - expected_s).abs() <= 2 * error
    same = ids == expected
    wrong = ~(same | (near & ~logits.exact[:, None])) & clear[:, None]
    faults = []
    if wrong.any():
        n, slot = first(wrong)
        faults.append(
            f"ids: token {n}, slot {slot}: got expert {ids[n, slot]} of score"
            f" {got_s[n, slot]:.7g}, wanted {expected[n, slot]} of {expected_s[n, slot]:.7g};"
            f" {int(wrong.sum())} of {wrong.numel()} are wrong"
        )
    wanted = truth.weigh(a, ids, routed_scaling_factor, renormalize)
    return faults + wrong_weights(got.weights, wanted, routed_scaling_factor)


def wrong_ids(ids: Tensor, E: int) -> list[str]:
    """Ids [N, k] out of range or repeated."""
    ordered = ids.sort(-1).values
    wrong = ((ids < 0) | (ids >= E)).any(-1) | (ordered[:, 1:] == ordered[:, :-1]).any(-1)
    if not wrong.any():
        return []
    (n,) = first(wrong)
    return [
        f"ids: token {n}: got {ids[n].tolist()}, wanted distinct ones from 0 to {E - 1};"
        f" {int(wrong.sum())} of {len(ids)} tokens are wrong"
    ]


def groups_are_clear(s: Tensor, n_group: int, topk_group: int, error: Tensor) -> Tensor:
    """Rows [N] whose groups that stay are beyond doubt. (A group's score is the sum of two.)"""
    if topk_group == n_group:
        return torch.ones(len(s), dtype=torch.bool)
    sums = s.unflatten(-1, (n_group, -1)).sort(dim=-1, descending=True).values[..., :2].sum(-1)
    sums = sums.sort(dim=-1, descending=True).values
    gap: Tensor = sums[:, topk_group - 1] - sums[:, topk_group]
    return gap > 4 * error[:, 0]


def wrong_weights(got: Tensor, wanted: Tensor, factor: float) -> list[str]:
    """Weights [N, k] that are off; infinities and NaN must be the same."""
    allowed = WEIGHT_ERROR * factor * wanted.abs().div(factor).nan_to_num().clamp(min=1)
    near = (got - wanted).abs() <= allowed
    wrong = ~(near | (got == wanted) | (got.isnan() & wanted.isnan()))
    if not wrong.any():
        return []
    at = n, slot = first(wrong)
    return [
        f"weights: token {n}, slot {slot}: got {got[at]:.7g}, wanted {wanted[at]:.7g}"
        f" ± {allowed[at]:.1g}; {int(wrong.sum())} of {wrong.numel()} are wrong"
    ]


def wrong_lookup(got: Routing, wanted: Routing, factor: float) -> list[str]:
    """What is wrong with experts taken from a table."""
    faults, wrong = [], got.ids != wanted.ids
    if wrong.any():
        at = n, slot = first(wrong)
        faults.append(
            f"ids: token {n}, slot {slot}: got {got.ids[at]}, wanted {wanted.ids[at]};"
            f" {int(wrong.sum())} of {wrong.numel()} are wrong"
        )
    return faults + wrong_weights(got.weights, wanted.weights, factor)


def wrong_topk(got: TopK, wanted: TopK) -> list[str]:
    """Entries whose index or bits differ."""
    wrong = (got.indices != wanted.indices) | (bits(got.values) != bits(wanted.values))
    if not wrong.any():
        return []
    at = row, place = first(wrong)
    return [
        f"row {row}, place {place}: got {got.values[at]:.9g} at {got.indices[at]}, wanted"
        f" {wanted.values[at]:.9g} at {wanted.indices[at]};"
        f" {int(wrong.sum())} of {wrong.numel()} are wrong"
    ]


def different_bits(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> list[str]:
    """Where two results that must be the same are not."""
    for name, a, b in zip(("weights or values", "ids or indices"), one, other, strict=True):
        wrong = bits(a) != bits(b)
        if wrong.any():
            at = first(wrong)
            return [
                f"{name} at {at}: {a[at].item()!r} the first time, {b[at].item()!r} this time;"
                f" {int(wrong.sum())} of {wrong.numel()} differ"
            ]
    return []


def bits(t: Tensor) -> Tensor:
    """The same memory as integers, in which NaN equals itself."""
    return t.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.itemsize])


def first(wrong: Tensor) -> Any:
    """The indices of the first True."""
    return tuple(wrong.nonzero()[0].tolist())

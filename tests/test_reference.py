"""The fp64 specification: its equations against independent formulas, its order on hard cases."""

import math

import numpy as np
import pytest
import torch

from cute_router import reference

INF, NAN = math.inf, math.nan


def rows(*values):
    """Logits or scores, one list for each token."""
    return torch.tensor(values, dtype=torch.float64)


def brute_force_order(s):
    """The total order of one row, spelled out: numbers, then NaN; descending; lowest id first."""

    def key(e):
        return (1, 0.0, e) if math.isnan(s[e]) else (0, -s[e], e)

    return sorted(range(len(s)), key=key)


# --- equations ----------------------------------------------------------------------------------


def test_logits_are_exact_products_summed_in_fp64():
    x, W = torch.randn(3, 264).bfloat16(), torch.randn(7, 264).bfloat16()
    expected = np.einsum("nk,ek->ne", x.double().numpy(), W.double().numpy())
    np.testing.assert_allclose(reference.logits(x, W).numpy(), expected, rtol=1e-12)


def test_logit_error_bound_is_two_to_minus_20_of_the_absolute_sum():
    x, W = torch.randn(3, 264).bfloat16(), torch.randn(7, 264).bfloat16()
    products = x.double()[:, None, :] * W.double()[None, :, :]
    expected = products.abs().sum(-1) / 2**20
    torch.testing.assert_close(reference.logit_error_bound(x, W), expected)


def test_fp32_logits_lie_within_the_error_bound():
    x, W = torch.randn(16, 4096).bfloat16(), torch.randn(32, 4096).bfloat16()
    error = (x.float() @ W.float().T).double() - reference.logits(x, W)
    assert (error.abs() <= reference.logit_error_bound(x, W)).all()


@pytest.mark.parametrize("logit", [-700.0, -100.0, -87.5, -16.7, -1.0, 0.0, 0.5, 20.0, 200.0, 1e4])
def test_sqrtsoftplus_keeps_full_precision_over_the_whole_range(logit):
    # log1p(exp(l)) holds the tail that log(1 + exp(l)) loses; above 30 softplus(l) is l.
    softplus = logit if logit > 30 else math.log1p(math.exp(logit))
    a = reference.activations(rows([logit]))
    assert a.item() == pytest.approx(math.sqrt(softplus), rel=1e-14)
    assert a.item() > 0


@pytest.mark.parametrize("logit", [-700.0, -30.0, 0.0, 3.0, 50.0])
def test_sigmoid_is_the_logistic_function(logit):
    a = reference.activations(rows([logit]), "sigmoid")
    assert a.item() == pytest.approx(1 / (1 + math.exp(-logit)), rel=1e-14)


def test_softmax_is_normalised_over_all_experts_and_cannot_overflow():
    logits = torch.randn(5, 300, dtype=torch.float64) * 10 + 1000
    a = reference.activations(logits, "softmax")
    torch.testing.assert_close(a, torch.softmax(logits, -1))
    torch.testing.assert_close(a.sum(-1), torch.ones(5, dtype=torch.float64))


@pytest.mark.parametrize(
    ("scoring", "at_minus_inf", "at_inf"), [("sqrtsoftplus", 0, INF), ("sigmoid", 0, 1)]
)
def test_activations_of_infinities_are_their_limits(scoring, at_minus_inf, at_inf):
    a = reference.activations(rows([-INF, INF, NAN]), scoring)[0]
    assert a[:2].tolist() == [at_minus_inf, at_inf]
    assert a[2].isnan()


@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_softmax_row_with_nan_or_inf_is_all_nan_and_takes_the_first_experts(bad):
    routing = reference.route_logits(
        rows([0, 1, bad, 3, 4], [4, 3, 2, 1, 0]), scoring="softmax", top_k=3
    )
    assert routing.ids.tolist() == [[0, 1, 2], [0, 1, 2]]
    assert routing.weights[0].isnan().all()
    assert routing.weights[1].isfinite().all()


def test_an_unknown_scoring_is_refused():
    with pytest.raises(ValueError, match=r"scoring must be .*; got 'relu'"):
        reference.activations(rows([0]), "relu")


# --- the order of selection ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("s", "best"),
    [
        ([1, 3, 2, 3], [1, 3, 2]),
        ([5, 5, 5, 5], [0, 1, 2]),
        ([-0.0, 0.0, -0.0, 0.0], [0, 1, 2]),
        ([-1, 0.0, -0.0, 1], [3, 1, 2]),
        ([NAN, -INF, NAN, 1], [3, 1, 0]),
        ([NAN, NAN, NAN, NAN], [0, 1, 2]),
        ([INF, 1, INF, NAN], [0, 2, 1]),
        ([-INF, -INF, 5e-324, 0], [2, 3, 0]),
        ([-1.5, -1, -2, -1], [1, 3, 0]),
    ],
    ids=str,
)
def test_selection_is_by_descending_score_then_ascending_id(s, best):
    assert reference.select(rows(s), 3).tolist() == [best]


@pytest.mark.parametrize("E", [1, 7, 256, 1024])
def test_the_order_is_total_on_rows_full_of_ties_and_special_values(E):
    pool = torch.tensor([NAN, INF, -INF, 0.0, -0.0, 1.0, 1.0, -1.0, 0.5], dtype=torch.float64)
    s = pool[torch.randint(len(pool), (20, E))]
    expected = [brute_force_order(row) for row in s.tolist()]
    assert reference.order(s).tolist() == expected


def test_removed_entries_rank_below_nan():
    s = rows([NAN, 9, -INF, 8])
    removed = torch.tensor([[False, True, False, True]])
    assert reference.order(s, removed).tolist() == [[2, 0, 1, 3]]


def test_bias_moves_the_choice_and_not_the_weights():
    logits, bias = rows([0, 1, 2, 3]), torch.tensor([10.0, 0, 0, 0])
    routing = reference.route_logits(logits, bias, top_k=2, renormalize=False)
    assert routing.ids.tolist() == [[0, 3]]
    expected = reference.activations(rows([0, 3])).float()
    torch.testing.assert_close(routing.weights, expected)


def test_experts_with_a_nan_bias_are_chosen_last():
    bias = torch.tensor([NAN, 0, NAN, -INF])
    assert reference.route_logits(rows([9, 1, 8, 0]), bias, top_k=3).ids.tolist() == [[1, 3, 0]]


@pytest.mark.parametrize("scoring", ["sqrtsoftplus", "sigmoid", "softmax"])
@pytest.mark.parametrize("k", [1, 6, 32])
def test_ids_are_distinct_and_in_range_whatever_the_logits(scoring, k):
    pool = torch.tensor([NAN, INF, -INF, 0.0, -0.0, 1e30, -1e30, 3.0])
    logits = pool[torch.randint(len(pool), (50, 40))]
    ids = reference.route_logits(logits, top_k=k, scoring=scoring).ids
    assert ids.dtype == torch.int32
    assert ((ids >= 0) & (ids < 40)).all()
    assert all(len(set(row)) == k for row in ids.tolist())


# --- groups -------------------------------------------------------------------------------------


def kept(s, n_group, topk_group):
    """The groups that stay, of one row."""
    removed = reference.removed_by_groups(rows(s), n_group, topk_group)[0]
    by_group = removed.unflatten(0, (n_group, -1))
    assert (by_group.all(-1) == by_group.any(-1)).all(), "a group stays or goes as a whole"
    return [g for g in range(n_group) if not by_group[g].any()]


def test_a_group_is_scored_by_the_sum_of_its_two_best():
    assert kept([9, 0, 0, 5, 5, 0], n_group=2, topk_group=1) == [1]


def test_group_ties_go_to_the_lower_group():
    assert kept([1, 2, 2, 1, 3, 0, 1, 2], n_group=4, topk_group=2) == [0, 1]


def test_a_group_with_a_nan_score_ranks_last():
    # One number and a NaN sum to NaN; inf and -inf do too; two numbers beside a NaN do not.
    assert kept([9, NAN, -5, -6], n_group=2, topk_group=1) == [1]
    assert kept([INF, -INF, -5, -6], n_group=2, topk_group=1) == [1]
    assert kept([9, NAN, 9, 0, 1, 2], n_group=2, topk_group=1) == [0]


def test_removed_groups_lose_even_to_nan():
    s = [5, NAN, 9, 9, 1, NAN]
    ids = reference.select(rows(s), 3, n_group=3, topk_group=2)
    assert ids.tolist() == [[2, 3, 0]]
    ids = reference.select(rows(s), 4, n_group=3, topk_group=2)
    assert ids.tolist() == [[2, 3, 0, 1]], "expert 1 is NaN, expert 4 is removed"


def test_grouped_selection_equals_a_loop_over_groups():
    s = torch.randn(30, 256, dtype=torch.float64)
    for row, ids in zip(s, reference.select(s, 8, n_group=8, topk_group=4), strict=True):
        score = [sum(sorted(group.tolist())[-2:]) for group in row.split(32)]
        best_groups = brute_force_order(score)[:4]
        allowed = [e for e in brute_force_order(row.tolist()) if e // 32 in best_groups]
        assert ids.tolist() == allowed[:8]


def test_a_nan_softmax_row_takes_the_first_experts_under_groups_too():
    logits = torch.full((1, 16), NAN)
    routing = reference.route_logits(logits, top_k=5, scoring="softmax", n_group=4, topk_group=2)
    assert routing.ids.tolist() == [[0, 1, 2, 3, 4]]


# --- weights ------------------------------------------------------------------------------------


def test_weights_are_renormalised_to_the_factor():
    weights = reference.route_logits(torch.randn(9, 64), routed_scaling_factor=1.5).weights
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.sum(-1), torch.full((9,), 1.5))


def test_without_renormalisation_weights_are_activations_times_the_factor():
    logits = torch.randn(9, 64)
    weights, ids = reference.route_logits(logits, renormalize=False, routed_scaling_factor=2.5)
    expected = torch.nn.functional.softplus(logits.double()).sqrt().gather(-1, ids.long()) * 2.5
    torch.testing.assert_close(weights, expected.float())


def test_weights_of_a_zero_sum_are_zero():
    logits = torch.full((1, 8), -INF)
    assert reference.route_logits(logits).weights.tolist() == [[0.0] * 6]


def test_very_negative_logits_still_share_the_whole_factor():
    # No epsilon in the division: one of 1e-20 would shrink these weights by 5 orders.
    weights = reference.route_logits(torch.full((1, 8), -120.0)).weights
    torch.testing.assert_close(weights, torch.full((1, 6), 1 / 6))


def test_a_factor_of_zero_gives_zero_weights():
    assert not reference.route_logits(torch.randn(3, 8), routed_scaling_factor=0.0).weights.any()


def test_non_finite_weights_stay_in_their_row():
    logits = torch.randn(3, 8)
    logits[1, 3] = INF
    weights, ids = reference.route_logits(logits, top_k=2)
    assert ids[1, 0] == 3
    assert weights[1, 0].isnan(), "inf / inf"
    assert weights[1, 1] == 0, "a number / inf"
    assert weights[[0, 2]].isfinite().all()


# --- whole router -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_of_any_dtype_are_routed_by_their_own_values(dtype):
    logits = torch.randn(5, 64).to(dtype)
    routing, exact = reference.route_logits(logits), reference.route_logits(logits.double())
    assert torch.equal(routing.ids, exact.ids)
    assert torch.equal(routing.weights, exact.weights)


def test_route_agrees_with_numpy():
    x, W = torch.randn(11, 264).bfloat16(), torch.randn(40, 264).bfloat16() / 16
    bias = torch.randn(40)
    weights, ids = reference.route(x, W, bias, top_k=6, routed_scaling_factor=1.5)
    a = np.sqrt(np.logaddexp(0, x.double().numpy() @ W.double().numpy().T))
    expected = np.argsort(-(a + bias.double().numpy()), axis=-1, kind="stable")[:, :6]
    chosen = np.take_along_axis(a, expected, -1)
    assert (ids.numpy() == expected).all()
    np.testing.assert_allclose(weights, 1.5 * chosen / chosen.sum(-1, keepdims=True), rtol=1e-6)


def test_route_takes_leading_dimensions_and_no_tokens():
    W = torch.randn(16, 64).bfloat16()
    assert reference.route(torch.randn(2, 3, 64).bfloat16(), W).ids.shape == (2, 3, 6)
    empty = reference.route(torch.empty(0, 64).bfloat16(), W, n_group=4, topk_group=2)
    assert empty.weights.shape == empty.ids.shape == (0, 6)


def test_more_experts_than_there_are_cannot_be_chosen():
    with pytest.raises(ValueError, match="top_k must be at most 4"):
        reference.route_logits(torch.randn(1, 4), top_k=5)

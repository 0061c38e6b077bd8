"""The oracle itself: it passes what the specification allows, and fails on every planted error.

The kernel tests are only as good as this. Their case runners are device-parametrised and run here
on the CPU, where `dense_decode` is the reference.
"""

import math
from dataclasses import replace

import pytest
import torch
from cases import NON_FINITE, OPTIONS, ROUTERS, ROWS, Case, Inputs, draw, draw_hostile, ids
from oracle import assert_routing, check_decode
from test_decode_stress import Chain

from cute_router import Routing, dense_decode, reference

PLAIN = Case("plain", 40, 264, 5)
GROUPED = Case("groups", 64, 264, 5, n_group=8, topk_group=3)
RAW = Case("raw weights", 40, 264, 5, renormalize=False)
# Here torch's own fp32 functions lose digits, or are 0 before fp32 is; the kernels' must not.
LOW = {"low", "lower", "lowest"}
SMALL = [case for case in ROUTERS if case.E * case.K <= 300 * 512 and case.N <= 200]


def routed(case: Case, **kwargs: object) -> tuple[Inputs, Routing]:
    """Inputs and their right routing."""
    inputs = draw(case, "cpu", **kwargs)
    return inputs, dense_decode(*inputs, **case.options)


def refused(routing: Routing, inputs: Inputs, case: Case, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        assert_routing(routing, *inputs, **case.options)


def fp32_router(x, W, bias, case, logit_error=0.0):
    """A router as kernels compute it: fp32 throughout, logits off by a part of the bound."""
    logit = x.float() @ W.float().T
    noise = torch.rand_like(logit) * 2 - 1
    logit = logit + logit_error * (noise * reference.logit_error_bound(x, W)).float().nan_to_num()
    if case.scoring == "sqrtsoftplus":
        a = (logit.clamp(min=0) + torch.log1p(torch.exp(-logit.abs()))).sqrt()
    elif case.scoring == "sigmoid":
        a = logit.sigmoid()
    else:
        a = logit.softmax(-1)
    s = a if bias is None else a + bias
    chosen = reference.select(s, case.top_k, case.n_group, case.topk_group)
    weights = reference.weigh(a, chosen, case.factor, case.renormalize)
    return Routing(weights.float(), chosen.int())


# --- what it passes -----------------------------------------------------------------------------


@pytest.mark.parametrize("case", SMALL + OPTIONS, ids=ids)
def test_the_reference_passes_on_ordinary_data(case):
    check_decode(*draw(case, "cpu"), **case.options)


@pytest.mark.parametrize("case", SMALL + OPTIONS, ids=ids)
@pytest.mark.parametrize("seed", range(3))
def test_the_reference_passes_on_hostile_data(case, seed):
    check_decode(*draw_hostile(case, "cpu", seed), **case.options)


@pytest.mark.parametrize("case", OPTIONS, ids=ids)
@pytest.mark.parametrize("kind", sorted(set(ROWS) - LOW - {"overflow"}))
def test_an_fp32_router_passes(case, kind):
    inputs = draw(case, "cpu", kinds=[kind], integer=kind == "ties")
    assert_routing(fp32_router(*inputs, case), *inputs, **case.options)


@pytest.mark.parametrize("case", OPTIONS, ids=ids)
def test_a_choice_from_logits_within_the_bound_passes(case):
    case = replace(case, N=200, K=64)
    inputs = draw(case, "cpu")
    near = fp32_router(*inputs, case, logit_error=0.9)
    weights = reference.weigh(
        reference.activations(reference.logits(inputs.x, inputs.W), case.scoring),
        near.ids,
        case.factor,
        case.renormalize,
    )
    assert_routing(Routing(weights.float(), near.ids), *inputs, **case.options)


@pytest.mark.parametrize(("scoring", "kind"), [("sqrtsoftplus", "lower"), ("sigmoid", "low")])
def test_activations_flushed_to_zero_too_early_fail(scoring, kind):
    case = Case("low", 40, 4096, 5, scoring=scoring, has_bias=False)
    inputs = draw(case, "cpu", kinds=[kind])
    assert_routing(dense_decode(*inputs, **case.options), *inputs, **case.options)
    with pytest.raises(AssertionError):
        assert_routing(fp32_router(*inputs, case), *inputs, **case.options)


def test_a_row_that_may_overflow_needs_well_formed_ids_only():
    inputs, (weights, ids) = routed(PLAIN, kinds=["overflow"])
    assert_routing(Routing(weights * math.nan, ids.flip(-1)), *inputs, **PLAIN.options)
    ids[0, 0] = ids[0, 1]
    refused(Routing(weights, ids), inputs, PLAIN, "repeated ids")


def test_no_tokens_pass():
    check_decode(*draw(replace(PLAIN, N=0), "cpu"), **PLAIN.options)


# --- what it fails ------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [PLAIN, GROUPED, RAW], ids=ids)
def test_two_swapped_experts_fail(case):
    inputs, (weights, ids) = routed(case)
    order = [1, 0, 2, 3, 4, 5]
    refused(Routing(weights[:, order], ids[:, order]), inputs, case, "token 0, slot 0: expert")


@pytest.mark.parametrize("case", [PLAIN, GROUPED], ids=ids)
def test_an_expert_that_others_beat_fails(case):
    inputs, (weights, ids) = routed(case)
    a = reference.activations(reference.logits(inputs.x, inputs.W))
    s = reference.selection_scores(a, inputs.bias)
    if case.n_group > 1:
        s = s.masked_fill(reference.removed_by_groups(s, case.n_group, case.topk_group), 9)
    ids[3, -1] = s[3].argmin()
    weights[3] = reference.weigh(a[3], ids[3], case.factor)
    refused(Routing(weights, ids), inputs, case, "token 3, slot 5: expert")


def test_an_expert_of_a_removed_group_fails():
    inputs, (weights, ids) = routed(GROUPED)
    s = reference.activations(reference.logits(inputs.x, inputs.W))
    s = reference.selection_scores(s, inputs.bias)
    removed = reference.removed_by_groups(s, GROUPED.n_group, GROUPED.topk_group)
    ids[2, 5] = removed[2].nonzero()[0]
    refused(Routing(weights, ids), inputs, GROUPED, "a group that cannot stay: token 2")


def test_groups_that_were_not_limited_fail():
    inputs, _ = routed(GROUPED)
    ungrouped = dense_decode(*inputs, **GROUPED.options | {"n_group": 1, "topk_group": 1})
    refused(ungrouped, inputs, GROUPED, "a group that cannot stay")


def test_a_gap_just_beyond_the_bound_fails_and_just_within_passes():
    # Two experts whose logits differ by a known part of the bound, in either order.
    x = torch.zeros(1, 64).bfloat16()
    x[0, :2] = 1
    for exponent, allowed in ((-12, False), (-22, True)):
        W = torch.zeros(2, 64).bfloat16()
        W[:, 0] = 1
        W[1, 1] = 2.0**exponent
        W[:, 2] = 0.3  # not whole, so that the rows do not count as exact
        for expert in (0, 1):
            weights = reference.weigh(
                reference.activations(reference.logits(x, W)), torch.tensor([[expert]])
            )
            routing = Routing(weights.float(), torch.tensor([[expert]], dtype=torch.int32))
            if expert == 1 or allowed:
                assert_routing(routing, x, W, top_k=1)
            else:
                with pytest.raises(AssertionError, match="is chosen before 1"):
                    assert_routing(routing, x, W, top_k=1)


@pytest.mark.parametrize(
    ("wrong_id", "message"), [(-1, "out of range"), (40, "out of range"), (-7, "out of range")]
)
def test_an_id_out_of_range_fails(wrong_id, message):
    inputs, (weights, ids) = routed(PLAIN)
    ids[4, 2] = wrong_id
    refused(Routing(weights, ids), inputs, PLAIN, f"{message} 0...39: token 4")


def test_a_repeated_id_fails():
    inputs, (weights, ids) = routed(PLAIN)
    ids[1, 5] = ids[1, 0]
    refused(Routing(weights, ids), inputs, PLAIN, "repeated ids: token 1")


@pytest.mark.parametrize("case", [PLAIN, GROUPED, RAW], ids=ids)
@pytest.mark.parametrize("wrong", [2e-5, -2e-5, math.nan, math.inf])
def test_a_wrong_weight_fails(case, wrong):
    inputs, (weights, ids) = routed(case)
    weights[2, 3] += wrong * case.factor * (1 if case.renormalize else 2)
    refused(Routing(weights, ids), inputs, case, "token 2, slot 3, expert .*: weight")


def test_weights_with_the_bias_in_them_fail():
    inputs, (_, ids) = routed(PLAIN)
    s = reference.activations(reference.logits(inputs.x, inputs.W)) + inputs.bias
    biased = Routing(reference.weigh(s, ids, PLAIN.factor).float(), ids)
    refused(biased, inputs, PLAIN, "weight")


def test_bf16_logits_fail():
    inputs = draw(replace(PLAIN, N=64), "cpu")
    logit = (inputs.x.float() @ inputs.W.float().T).bfloat16()
    rounded = reference.route_logits(logit, inputs.bias, **PLAIN.options)
    with pytest.raises(AssertionError):
        assert_routing(rounded, *inputs, **PLAIN.options)


@pytest.mark.parametrize("kind", ["ties", "all equal", *NON_FINITE])
@pytest.mark.parametrize("scoring", ["sqrtsoftplus", "sigmoid", "softmax"])
@pytest.mark.parametrize("groups", [(1, 1), (8, 3)])
def test_ties_in_the_other_order_fail(kind, scoring, groups):
    case = Case("ties", 64, 264, 9, scoring=scoring, n_group=groups[0], topk_group=groups[1])
    x, W, _ = draw(case, "cpu", kinds=[kind], integer=kind != "all equal")
    assert_routing(dense_decode(x, W, **case.options), x, W, **case.options)
    # The same experts with their ids counted from the other end: ties go to the highest id.
    weights, ids = dense_decode(x, W.flip(0), **case.options)
    with pytest.raises(AssertionError, match=r"is chosen before|cannot stay"):
        assert_routing(Routing(weights, case.E - 1 - ids), x, W, **case.options)


def test_unwritten_outputs_fail():
    inputs = draw(PLAIN, "cpu")
    shape = (PLAIN.N, PLAIN.top_k)
    untouched = Routing(torch.full(shape, -123.0), torch.full(shape, -7, dtype=torch.int32))
    refused(untouched, inputs, PLAIN, "out of range")


def test_a_column_too_few_or_a_wrong_dtype_fails():
    inputs, (weights, ids) = routed(PLAIN)
    refused(Routing(weights[:, :5], ids[:, :5]), inputs, PLAIN, "torch.Size")
    refused(Routing(weights, ids.long()), inputs, PLAIN, "int64")
    refused(Routing(weights.double(), ids), inputs, PLAIN, "float64")


# --- the data and the runners -------------------------------------------------------------------


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("K", [8, 264, 4096])
def test_rows_are_what_their_kind_says(kind, K):
    case = Case("rows", 64, K, 9, padding=8)
    inputs = draw(case, "cpu", kinds=["normal", kind])
    assert inputs.x.stride() == (K + 8, 1)
    assert inputs.x[::2].isfinite().all()
    assert inputs.x[1::2].isfinite().all() == (kind not in NON_FINITE)
    logit = reference.logits(inputs.x, inputs.W)[1::2]
    level = {"low": -95, "lower": -185, "lowest": -400, "high": 150}.get(kind)
    if level is not None and K > 8:
        assert (logit.mean() - level).abs() < 0.15 * abs(level)
    if kind == "ties":
        integer = draw(case, "cpu", kinds=[kind], integer=True)
        logit = reference.logits(integer.x, integer.W)
        assert torch.equal(logit, logit.round())
        assert all(row.unique().numel() < 20 for row in logit)


def test_the_routers_cover_every_size_that_the_kernel_treats_apart():
    assert {case.E for case in ROUTERS} >= {1, 7, 64, 144, 160, 256, 300, 384, 512, 1024}
    assert {case.K for case in ROUTERS} >= {8, 264, 4096, 5120, 6144, 7168, 7176, 16384, 32768}
    assert {case.top_k for case in ROUTERS} >= {1, 6, 8, 32}
    assert {case.N for case in ROUTERS} >= {1, 3, 17, 64, 65, 200, 1000}
    assert len({case.id for case in ROUTERS}) == len(ROUTERS)


def test_the_stress_chain_counts_every_difference():
    chain = Chain(Case("chain", 40, 264, 3), "cpu", links=4, versions=2)
    chain.replay(0)
    chain.replay(1)
    assert chain.mismatches.item() == 0
    chain.expected.ids[1, 2, 0, 0] += 1
    chain.replay(0)
    assert chain.mismatches.item() == 0
    chain.replay(1)
    assert chain.mismatches.item() == 1

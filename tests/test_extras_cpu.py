"""Extras on CPU tensors: what each adds, what goes together, and what is refused.

The checks run before any backend is chosen, so what is refused here is refused on a GPU too. What
is expected is said here by itself, and not by `reference.finish`.
"""

import math
from dataclasses import fields, replace

import pytest
import torch

from cute_router import Extras, activation_topk, dense_decode, hash_route, reference
from cute_router.extras import PLAIN, ExtrasSpec

N, E, K, TOP_K, FACTOR = 7, 40, 64, 4, 1.5
OPTIONS = {"top_k": TOP_K, "routed_scaling_factor": FACTOR}


def inputs():
    """Hidden states, weights and bias with logits of about unit variance."""
    x, W = torch.randn(N, K).bfloat16(), (torch.randn(E, K) * K**-0.5).bfloat16()
    return x, W, torch.randn(E) * 0.1


def by_product(x, W, bias, extras, **options):
    return dense_decode(x, W, bias, **OPTIONS, **options, extras=extras)


def by_logits(x, W, bias, extras, **options):
    # fp64 logits are no dtype of the gate; fp32 ones choose the same experts here
    logits = reference.logits(x, W).float()
    return activation_topk(logits, bias, **OPTIONS, **options, extras=extras)


def by_table(x, W, bias, extras, **options):
    plain = dense_decode(x, W, bias, **OPTIONS)
    tokens = torch.arange(N)
    factor = {"routed_scaling_factor": FACTOR}
    return hash_route(tokens, plain.ids, x=x, W=W, **factor, **options, extras=extras)


ROUTES = [by_product, by_logits, by_table]
every_route = pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.__name__)


def assert_same(result, weights, ids):
    assert torch.equal(result.ids, ids)
    torch.testing.assert_close(result.weights, weights, rtol=1e-6, atol=1e-7)


@pytest.fixture
def plain():
    """Inputs, and the routing without extras."""
    given = inputs()
    return given, dense_decode(*given, **OPTIONS)


# --- each by itself -----------------------------------------------------------------------------


@every_route
def test_no_extras_change_nothing(route, plain):
    given, routing = plain
    assert Extras().spec == PLAIN == ExtrasSpec()
    assert Extras().arguments() == ()
    assert_same(route(*given, Extras()), *routing)


@every_route
@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("count", [-3, 0, 1, 5, N, N + 9])
def test_rows_from_num_valid_on_are_padding(route, plain, shape, count):
    (x, W, bias), (weights, ids) = plain
    real = torch.arange(N)[:, None] < count
    x[max(count, 0) :] = math.nan
    result = route(x, W, bias, Extras(num_valid=torch.full(shape, count, dtype=torch.int32)))
    assert_same(result, weights.where(real, 0), ids.where(real, -1))


@every_route
def test_a_mask_and_a_number_both_have_to_call_a_row_a_token(route, plain):
    given, (weights, ids) = plain
    valid = torch.tensor([True, False, True, True, False, True, True])
    result = route(*given, Extras(valid=valid))
    assert_same(result, weights.where(valid[:, None], 0), ids.where(valid[:, None], -1))
    valid_of_five = valid & (torch.arange(N) < 5)
    result = route(*given, Extras(valid=valid, num_valid=torch.tensor(5, dtype=torch.int32)))
    real = valid_of_five[:, None]
    assert_same(result, weights.where(real, 0), ids.where(real, -1))


@pytest.mark.parametrize("route", ROUTES[:2])
@pytest.mark.parametrize("has_bias", [True, False])
def test_a_second_bias_replaces_the_first_where_its_mask_says(route, has_bias):
    x, W, bias = inputs()
    bias = bias if has_bias else None
    second, mask = torch.randn(E), torch.arange(N) % 3 == 1
    result = route(x, W, bias, Extras(second_bias=second, second_bias_mask=mask))
    first, other = route(x, W, bias, None), route(x, W, second, None)
    assert not torch.equal(first.ids, other.ids)
    chosen = mask[:, None]
    assert_same(
        result,
        torch.where(chosen, other.weights, first.weights),
        torch.where(chosen, other.ids, first.ids),
    )


@every_route
@pytest.mark.parametrize("count", [1, 2, 32])
def test_shared_experts_come_last_with_exactly_their_weight(route, plain, count):
    given, (weights, ids) = plain
    result = route(*given, Extras(shared_experts=count, shared_weight=0.3))
    assert_same(
        result._replace(weights=result.weights[:, :TOP_K], ids=result.ids[:, :TOP_K]), weights, ids
    )
    assert result.ids[:, TOP_K:].tolist() == [list(range(E, E + count))] * N
    assert torch.equal(result.weights[:, TOP_K:], torch.full((N, count), 0.3))


@every_route
def test_a_map_replaces_routed_ids_by_its_entries_as_they_are(route, plain):
    given, (weights, ids) = plain
    expert_map = torch.randint(-(2**31), 2**31, (E,)).int()
    result = route(*given, Extras(expert_map=expert_map, shared_experts=1))
    assert torch.equal(result.ids[:, :TOP_K], expert_map[ids.long()])
    assert (result.ids[:, TOP_K] == E).all()
    torch.testing.assert_close(result.weights[:, :TOP_K], weights)


def test_ties_go_by_logical_id():
    x, W = torch.zeros(N, K).bfloat16(), torch.randn(E, K).bfloat16()
    expert_map = torch.arange(E - 1, -1, -1).int()
    result = dense_decode(x, W, top_k=3, extras=Extras(expert_map=expert_map))
    assert result.ids.tolist() == [[E - 1, E - 2, E - 3]] * N


@every_route
def test_ids_can_be_64_bit(route, plain):
    given, (weights, ids) = plain
    result = route(*given, Extras(ids_dtype=torch.int64))
    assert result.ids.dtype == torch.int64
    assert_same(result, weights, ids.long())


@every_route
def test_packed_words_hold_the_id_above_the_rounded_weight(route, plain):
    given, (weights, ids) = plain
    valid = torch.arange(N) != 2
    packed = Extras(packed=True, valid=valid, shared_experts=1, shared_weight=0.3)
    rounded, words = route(*given, packed)
    assert (words.dtype, words.shape) == (torch.int32, (N, TOP_K + 1))
    assert rounded.data_ptr() == words.data_ptr()
    assert rounded.dtype == torch.bfloat16
    assert words[2].tolist() == [-65536] * (TOP_K + 1)
    assert torch.equal((words >> 16)[valid, :TOP_K], ids[valid])
    assert (words[valid, TOP_K] >> 16 == E).all()
    low = (words << 16).view(torch.float32)  # the lower half as a number
    assert torch.equal(low, rounded.float())
    torch.testing.assert_close(low[valid, :TOP_K], weights[valid], rtol=2**-8, atol=0)
    assert torch.equal(low[valid, TOP_K], torch.tensor(0.3).bfloat16().float().expand(N - 1))


def test_packed_words_go_into_the_given_ids():
    x, W, bias = inputs()
    words = torch.empty(N, TOP_K, dtype=torch.int32)
    result = dense_decode(x, W, bias, **OPTIONS, out_ids=words, extras=Extras(packed=True))
    assert result.ids is words
    assert torch.equal(words, dense_decode(x, W, bias, **OPTIONS, extras=Extras(packed=True)).ids)


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_logits_are_written_of_every_row(plain, batch_invariant):
    (x, W, bias), (weights, ids) = plain
    out = torch.empty(N, E)
    extras = Extras(out_logits=out, num_valid=torch.tensor(3, dtype=torch.int32))
    result = by_product(x, W, bias, extras, batch_invariant=batch_invariant)
    torch.testing.assert_close(out, x.float() @ W.float().T)
    real = torch.arange(N)[:, None] < 3
    assert_same(result, weights.where(real, 0), ids.where(real, -1))


@pytest.mark.parametrize("route", ROUTES[:2])
def test_recorded_ids_of_a_call_give_its_weights(route, plain):
    given, (weights, ids) = plain
    assert_same(route(*given, Extras(fixed_ids=ids)), weights, ids)


@pytest.mark.parametrize("route", ROUTES[:2])
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("scoring", ["sqrtsoftplus", "sigmoid", "softmax"])
def test_recorded_ids_are_kept_and_weighed_and_no_expert_has_no_part(route, scoring, renormalize):
    x, W, bias = inputs()
    record = torch.randint(E, (N, TOP_K)).int()
    record[0] = torch.tensor([3, -1, E, 3])
    record[1] = torch.tensor([-5, 2**31 - 1, -(2**31), -1])
    options = {"scoring": scoring, "renormalize": renormalize}
    weights, ids = route(x, W, bias, Extras(fixed_ids=record), **options)
    assert ids[:2].tolist() == [[3, -1, -1, 3], [-1] * 4]
    assert torch.equal(ids[2:], record[2:])
    assert (weights[ids < 0] == 0).all()
    a = reference.activations(reference.logits(x, W), scoring)
    share = a[2:].gather(1, record[2:].long())
    expected = share / share.sum(-1, keepdim=True) if renormalize else share
    torch.testing.assert_close(weights[2:], (expected * FACTOR).float())
    if renormalize:
        assert weights[0].tolist() == pytest.approx([FACTOR / 2, 0, 0, FACTOR / 2])


def test_hash_routing_without_a_gate_takes_masks_maps_and_forms():
    table = torch.tensor([[5, 1], [9, -2], [3, 7]])
    tokens = torch.tensor([2, 0, 99, 1])
    extras = Extras(valid=torch.tensor([True, False, True, True]), ids_dtype=torch.int64)
    weights, ids = hash_route(tokens, table, extras=extras)
    assert ids.tolist() == [[3, 7], [-1, -1], [-1, -1], [9, -2]], "entries are copied as they are"
    assert weights.tolist() == [[0.5, 0.5], [0, 0], [0, 0], [0.5, 0.5]]
    expert_map = torch.arange(100, 109).int()
    weights, ids = hash_route(tokens, table, extras=Extras(expert_map=expert_map))
    assert ids.tolist() == [[103, 107], [105, 101], [-1, -1], [-1, -1]]
    assert weights.tolist() == [[0.5, 0.5], [0.5, 0.5], [0, 0], [0, 0]]
    words = hash_route(tokens, table, extras=Extras(packed=True)).ids
    assert words[0].tolist() == [3 << 16 | 0x3F00, 7 << 16 | 0x3F00]


def test_an_unknown_token_id_is_padding_to_shared_experts_too():
    x, W, _ = inputs()
    table, tokens = torch.randint(E, (5, 3)), torch.arange(N) - 1
    weights, ids = hash_route(tokens, table, x=x, W=W, extras=Extras(shared_experts=2))
    assert ids[0].tolist() == ids[6].tolist() == [-1] * 5
    assert weights[0].tolist() == [0] * 5
    assert ids[1, 3:].tolist() == [E, E + 1]


def test_no_tokens_give_empty_tensors_of_the_wanted_form():
    _, W, bias = inputs()
    none = torch.empty(0, K).bfloat16()
    weights, ids = dense_decode(none, W, bias, extras=Extras(shared_experts=2, packed=True))
    assert weights.shape == ids.shape == (0, 8)


# --- what is refused ----------------------------------------------------------------------------

REFUSED = [
    ({"num_valid": 3}, TypeError, "extras.num_valid must be a torch.Tensor; got int"),
    ({"num_valid": torch.tensor(3)}, TypeError, "extras.num_valid must be torch.int32; got"),
    ({"num_valid": torch.ones(2).int()}, ValueError, r"num_valid must have shape \(\) or \(1,\)"),
    ({"valid": torch.ones(N)}, TypeError, "extras.valid must be torch.bool; got torch.float32"),
    ({"valid": torch.ones(N + 1).bool()}, ValueError, r"extras.valid must have shape \(7,\)"),
    ({"valid": torch.ones(2 * N).bool()[::2]}, ValueError, "extras.valid must be contiguous"),
    ({"valid": torch.ones(N).bool().to("meta")}, ValueError, "extras.valid must be on cpu"),
    ({"second_bias": torch.ones(E)}, ValueError, "second_bias_mask must be given with the other"),
    (
        {"second_bias_mask": torch.ones(N).bool()},
        ValueError,
        "extras.second_bias must be given with the other",
    ),
    (
        {"second_bias": torch.ones(E).double(), "second_bias_mask": torch.ones(N).bool()},
        TypeError,
        "extras.second_bias must be torch.float32",
    ),
    (
        {"second_bias": torch.ones(E), "second_bias_mask": torch.ones(E).bool()},
        ValueError,
        r"extras.second_bias_mask must have shape \(7,\); got \(40,\)",
    ),
    ({"shared_experts": 33}, ValueError, "extras.shared_experts must be from 0 to 32; got 33"),
    ({"shared_experts": -1}, ValueError, "extras.shared_experts must be from 0 to 32; got -1"),
    ({"shared_experts": True}, TypeError, "extras.shared_experts must be an int; got bool"),
    ({"shared_weight": math.nan}, ValueError, "extras.shared_weight must be finite"),
    ({"shared_weight": "1"}, TypeError, "extras.shared_weight must be a float; got str"),
    ({"expert_map": torch.arange(E)}, TypeError, "extras.expert_map must be torch.int32; got"),
    ({"expert_map": torch.arange(9).int()}, ValueError, r"expert_map must have shape \(40,\)"),
    ({"ids_dtype": torch.int16}, TypeError, "extras.ids_dtype must be torch.int32 or torch.int64"),
    ({"packed": 1}, TypeError, "extras.packed must be a bool; got int"),
    ({"packed": True, "ids_dtype": torch.int64}, ValueError, "ids_dtype must be torch.int32 with"),
    ({"out_logits": torch.ones(N, K)}, ValueError, r"out_logits must have shape \(7, 40\)"),
    ({"fixed_ids": torch.ones(N, 5).int()}, ValueError, r"fixed_ids must have shape \(7, 4\)"),
    ({"fixed_ids": torch.ones(N, 4).long()}, TypeError, "extras.fixed_ids must be torch.int32"),
    (
        {"fixed_ids": torch.ones(N, 4).int(), "out_logits": torch.ones(N, E)},
        ValueError,
        "extras.out_logits must be None with extras.fixed_ids",
    ),
]


@pytest.mark.parametrize(("given", "error", "message"), REFUSED, ids=[m for *_, m in REFUSED])
def test_what_does_not_fit_is_refused_by_name(given, error, message):
    with pytest.raises(error, match=message):
        dense_decode(*inputs(), **OPTIONS, extras=Extras(**given))


@pytest.mark.parametrize("route", ROUTES)
def test_extras_are_extras(route):
    with pytest.raises(TypeError, match=r"extras must be a cute_router\.Extras or None; got dict"):
        route(*inputs(), {"packed": True})


def test_outputs_have_the_form_that_is_asked_for():
    given = inputs()
    weights, ids = torch.empty(N, TOP_K), torch.empty(N, TOP_K, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"out_weights must have shape \(7, 5\)"):
        dense_decode(*given, **OPTIONS, out_weights=weights, extras=Extras(shared_experts=1))
    with pytest.raises(TypeError, match=r"out_ids must be torch\.int64"):
        dense_decode(*given, **OPTIONS, out_ids=ids, extras=Extras(ids_dtype=torch.int64))
    with pytest.raises(ValueError, match=r"out_weights must be None with extras\.packed"):
        dense_decode(*given, **OPTIONS, out_weights=weights, extras=Extras(packed=True))


@pytest.mark.parametrize(
    ("route", "name", "why"),
    [
        (by_logits, "out_logits", "activation_topk is given its logits"),
        (by_table, "second_bias", "chooses by its table"),
        (by_table, "out_logits", "computes only the logits it needs"),
        (by_table, "fixed_ids", "has its table for that"),
    ],
)
def test_a_function_says_why_it_has_no_such_extra(route, name, why):
    with pytest.raises(ValueError, match=f"extras.{name} must be None, because .*{why}"):
        route(*inputs(), Extras(**{name: torch.zeros(1)}))


def test_shared_experts_need_a_number_of_experts():
    table = torch.zeros(3, 2).int()
    with pytest.raises(ValueError, match=r"shared_experts must be 0, because without x and W"):
        hash_route(torch.arange(3), table, extras=Extras(shared_experts=1))


@pytest.mark.parametrize("route", ROUTES)
def test_a_gradient_is_refused(route):
    x, W, bias = inputs()
    x.requires_grad_()
    if route is by_logits:
        logits = torch.randn(N, E, requires_grad=True)
        with pytest.raises(ValueError, match="extras must be None where a gradient is recorded"):
            activation_topk(logits, bias, extras=Extras())
        return
    with pytest.raises(ValueError, match="extras must be None where a gradient is recorded"):
        route(x, W, bias, Extras())
    with torch.no_grad():
        route(x, W, bias, Extras())


# --- slices -------------------------------------------------------------------------------------


def test_the_extras_of_some_rows_are_those_of_the_call():
    x, W, bias = inputs()
    every = {
        "num_valid": torch.tensor(5, dtype=torch.int32),
        "valid": torch.arange(N) != 3,
        "second_bias": torch.randn(E),
        "second_bias_mask": torch.arange(N) % 2 == 0,
        "expert_map": torch.arange(E).int() + 7,
        "shared_experts": 1,
    }
    for given in (every, {**every, "valid": None}):
        whole = Extras(**given)
        expected = dense_decode(x, W, bias, **OPTIONS, extras=whole)
        for first, last in ((0, 4), (4, 6), (6, 7)):
            part = dense_decode(x[first:last], W, bias, **OPTIONS, extras=whole.rows(first, last))
            assert_same(part, expected.weights[first:last], expected.ids[first:last])


def test_a_spec_tells_apart_what_kernels_are_compiled_for():
    specs = {
        Extras(num_valid=torch.tensor(5)).spec,
        Extras(valid=torch.ones(1)).spec,
        Extras(second_bias=torch.ones(1)).spec,
        Extras(expert_map=torch.ones(1)).spec,
        Extras(out_logits=torch.ones(1)).spec,
        Extras(shared_experts=1).spec,
        Extras(ids_dtype=torch.int64).spec,
        Extras(packed=True).spec,
    }
    assert len(specs | {PLAIN}) == len(fields(ExtrasSpec)) + 1
    assert replace(Extras(shared_experts=1), shared_weight=2.0).spec in specs


@pytest.mark.parametrize("step", [2, 3, 7, 9])
def test_a_batch_of_several_launches_has_in_each_the_extras_of_its_rows(step):
    """As `dense_decode` and `dense_prefill` cut large batches on CUDA; the last part is shorter."""
    decode = pytest.importorskip("cute_router.gemm.decode")
    x, logits = torch.arange(N * K).view(N, K).bfloat16(), torch.empty(N, E)
    weights, ids = torch.empty(N, TOP_K), torch.empty(N, TOP_K, dtype=torch.int32)
    extras = Extras(num_valid=torch.tensor([5], dtype=torch.int32), out_logits=logits)
    parts = list(decode.portions(x, weights, ids, extras, step))
    assert torch.equal(torch.cat([part for part, _, _ in parts]), x)
    tokens = []
    for (part, results, ((num_valid, valid, *_, out_logits, _),)), first in zip(
        parts, range(0, N, step), strict=True
    ):
        assert len(part) == len(results[0]) == len(results[1]) == len(out_logits)
        assert results[0].data_ptr() == weights[first:].data_ptr()
        assert out_logits.data_ptr() == logits[first:].data_ptr()
        assert (num_valid is None) == (step < N)
        tokens += [int(num_valid) > row for row in range(N)] if valid is None else valid.tolist()
        assert valid is None or len(valid) == len(part)
    assert tokens == [1] * 5 + [0] * 2

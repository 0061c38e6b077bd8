"""hash_route's contract, on CPU tensors: what it accepts, returns and refuses.

The checks run before any backend is chosen, so what is refused here is refused on a GPU too.
"""

import inspect
import math

import pytest
import torch
from refused import (
    WEIGHING,
    X_AND_W,
    elsewhere,
    gapped,
    on_device,
    outputs,
    over_devices,
    over_options,
    over_tensors,
    padded,
    spoiled,
    transposed,
)

import cute_router
from cute_router import hash_route, reference, validate

INTEGERS = [torch.int32, torch.int64]


def inputs(N=5, vocab=20, k=6, E=40, K=64, device="cpu"):
    """Token ids, table, hidden states and weights."""
    token_ids, table = torch.randint(vocab, (N,)), torch.randint(E, (vocab, k))
    x, W = torch.randn(N, K).bfloat16(), (torch.randn(E, K) * K**-0.5).bfloat16()
    return tuple(t.to(device) for t in (token_ids, table, x, W))


def activation(logit, scoring):
    """sqrtsoftplus or sigmoid of one number, by the textbook."""
    return (
        math.log1p(math.exp(logit)) ** 0.5
        if scoring == "sqrtsoftplus"
        else 1 / (1 + math.exp(-logit))
    )


# --- what it returns ----------------------------------------------------------------------------


@pytest.mark.parametrize("token_dtype", INTEGERS)
@pytest.mark.parametrize("table_dtype", INTEGERS)
def test_without_a_gate_every_weight_is_an_equal_share_of_the_factor(token_dtype, table_dtype):
    token_ids, table = torch.tensor([2, 0, 2]), torch.tensor([[5, 1], [9, 9], [-3, 7]])
    weights, ids = hash_route(
        token_ids.to(token_dtype), table.to(table_dtype), routed_scaling_factor=1.5
    )
    assert (weights.dtype, ids.dtype) == (torch.float32, torch.int32)
    assert ids.tolist() == [[-3, 7], [5, 1], [-3, 7]], "entries are copied as they are"
    assert weights.tolist() == [[0.75, 0.75]] * 3


@pytest.mark.parametrize("scoring", ["sqrtsoftplus", "sigmoid"])
@pytest.mark.parametrize("renormalize", [True, False])
def test_the_table_chooses_and_the_gate_weighs(scoring, renormalize):
    token_ids, table, x, W = inputs(N=7)
    weights, ids = hash_route(
        token_ids,
        table,
        x=x,
        W=W,
        scoring=scoring,
        renormalize=renormalize,
        routed_scaling_factor=2.5,
    )
    assert torch.equal(ids.long(), table[token_ids])
    for n in range(7):
        a = [activation(float(x[n].double() @ W[e].double()), scoring) for e in ids[n]]
        total = sum(a) if renormalize else 1
        assert weights[n].tolist() == pytest.approx([2.5 * value / total for value in a], rel=1e-6)


@pytest.mark.parametrize("renormalize", [True, False])
def test_softmax_is_over_all_experts(renormalize):
    token_ids, table, x, W = inputs()
    weights, ids = hash_route(
        token_ids, table, x=x, W=W, scoring="softmax", renormalize=renormalize
    )
    expected = torch.softmax(x.double() @ W.double().T, -1).gather(1, ids.long())
    if renormalize:
        expected /= expected.sum(-1, keepdim=True)
    torch.testing.assert_close(weights, expected.float())


def test_a_softmax_row_with_an_infinity_anywhere_is_all_nan():
    token_ids, table, x, W = inputs()
    x[1] = 0
    x[1, 0], W[39] = math.inf, 0
    W[:39, 0], W[39, 0] = -1, 1
    table[:] = torch.arange(6)  # not expert 39, whose logit is +inf
    weights, ids = hash_route(token_ids, table, x=x, W=W, scoring="softmax")
    assert weights[1].isnan().all()
    assert weights[[0, 2, 3, 4]].isfinite().all()
    assert (ids == torch.arange(6)).all()


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bad", [-1, 20, 2**31 - 1, -(2**31)])
def test_a_token_id_outside_the_table_has_no_experts(gated, bad):
    token_ids, table, x, W = inputs()
    token_ids[3] = bad
    gate = {"x": x, "W": W} if gated else {}
    weights, ids = hash_route(token_ids, table, **gate)
    assert ids[3].tolist() == [-1] * 6
    assert weights[3].tolist() == [0.0] * 6
    others = [0, 1, 2, 4]
    assert torch.equal(ids[others].long(), table[token_ids[others]])
    torch.testing.assert_close(weights[others].sum(-1), torch.ones(4))


@pytest.mark.parametrize("scoring", ["sqrtsoftplus", "sigmoid", "softmax"])
def test_an_entry_that_is_no_expert_takes_no_part(scoring):
    token_ids, table, x, W = inputs(N=2, vocab=2)
    token_ids[:] = torch.tensor([0, 1])
    table[0] = torch.tensor([3, -1, 40, 4, 2**40, 3])
    table[1] = torch.tensor([3, 4, 3, 3, 4, 3])
    weights, ids = hash_route(token_ids, table, x=x, W=W, scoring=scoring)
    assert ids[0].tolist() == [3, -1, -1, 4, -1, 3]
    assert weights[0, [1, 2, 4]].tolist() == [0.0] * 3
    short = hash_route(
        token_ids[:1], table[:1, [0, 3, 5]].contiguous(), x=x[:1], W=W, scoring=scoring
    )
    torch.testing.assert_close(weights[0, [0, 3, 5]], short.weights[0])


def test_repeated_entries_are_kept_and_each_counts():
    _, _, x, W = inputs(N=1)
    weights, ids = hash_route(torch.tensor([0]), torch.tensor([[7, 7, 7, 7]]), x=x, W=W)
    assert ids.tolist() == [[7] * 4]
    torch.testing.assert_close(weights, torch.full((1, 4), 0.25))


def test_weights_of_a_zero_sum_are_zero():
    token_ids, table, x, W = inputs()
    x[2], W[:] = -math.inf, 1
    weights, _ = hash_route(token_ids, table, x=x, W=W)
    assert weights[2].tolist() == [0.0] * 6
    table[:] = -1
    assert not hash_route(token_ids, table, x=x, W=W).weights.any()


def test_nan_stays_in_its_row_and_out_of_slots_without_expert():
    token_ids, table, x, W = inputs()
    clean = hash_route(token_ids, table, x=x, W=W).weights
    token_ids[0], x[1, 3] = -1, math.nan
    x[0] = math.nan
    weights, _ = hash_route(token_ids, table, x=x, W=W)
    assert weights[0].tolist() == [0.0] * 6
    assert weights[1].isnan().all()
    assert torch.equal(weights[2:], clean[2:])


@pytest.mark.parametrize("gated", [False, True])
def test_no_tokens_give_empty_tensors(gated):
    token_ids, table, x, W = inputs(N=0, k=4)
    weights, ids = hash_route(token_ids, table, **({"x": x, "W": W} if gated else {}))
    assert weights.shape == ids.shape == (0, 4)
    assert (weights.dtype, ids.dtype) == (torch.float32, torch.int32)


def test_results_go_into_the_tensors_that_the_caller_gives():
    token_ids, table, x, W = inputs()
    weights, ids = torch.empty(5, 6), torch.empty(5, 6, dtype=torch.int32)
    result = hash_route(token_ids, table, x=x, W=W, out_weights=weights, out_ids=ids)
    expected = hash_route(token_ids, table, x=x, W=W)
    assert isinstance(result, cute_router.Routing)
    assert result.weights is weights
    assert result.ids is ids
    assert torch.equal(weights, expected.weights)
    assert torch.equal(ids, expected.ids)


def test_padded_rows_are_read_without_their_padding():
    token_ids, table, x, W = inputs()
    wide = torch.full((20, 9), 10**6)
    wide[:, :6] = table
    expected = hash_route(token_ids, table, x=x, W=W)
    result = hash_route(token_ids, wide[:, :6], x=padded(x, 72), W=padded(W, 264))
    assert torch.equal(result.ids, expected.ids)
    assert torch.equal(result.weights, expected.weights)


def test_more_slots_than_experts_are_fine():
    token_ids, table, x, W = inputs(k=32, E=3)
    weights, ids = hash_route(token_ids, table, x=x, W=W)
    assert torch.equal(ids.long(), table[token_ids])
    torch.testing.assert_close(weights.sum(-1), torch.ones(5))


def test_hash_route_and_the_reference_share_their_defaults():
    ours = inspect.signature(hash_route).parameters
    for name, parameter in inspect.signature(reference.hash_route).parameters.items():
        assert ours[name].default == parameter.default, name
        assert ours[name].kind == parameter.kind, name


# --- what it refuses ----------------------------------------------------------------------------

BAD_TENSORS = X_AND_W | {
    "token_ids no tensor": (
        {"token_ids": torch.Tensor.tolist},
        TypeError,
        "token_ids must be a torch.Tensor; got list",
    ),
    "token_ids in fp32": (
        {"token_ids": torch.Tensor.float},
        TypeError,
        "token_ids must be torch.int32 or torch.int64; got torch.float32",
    ),
    "token_ids in int16": (
        {"token_ids": torch.Tensor.short},
        TypeError,
        "token_ids must be torch.int32 or torch.int64; got torch.int16",
    ),
    "token_ids 2-D": (
        {"token_ids": lambda t: t[None]},
        ValueError,
        r"token_ids must be 1-D \(N,\); got 2-D \(1, 5\)",
    ),
    "token_ids with gaps": (
        {"token_ids": gapped},
        ValueError,
        r"token_ids must be contiguous; got strides \(2,\)",
    ),
    "token_ids on neither CUDA nor CPU": (
        {"token_ids": elsewhere},
        ValueError,
        "token_ids must be on a CUDA device or the CPU; got meta",
    ),
    "table no tensor": (
        {"table": lambda table: None},
        TypeError,
        "table must be a torch.Tensor; got NoneType",
    ),
    "table in bf16": (
        {"table": torch.Tensor.bfloat16},
        TypeError,
        "table must be torch.int32 or torch.int64; got torch.bfloat16",
    ),
    "table 1-D": (
        {"table": lambda table: table[0]},
        ValueError,
        r"table must be 2-D \(vocab, k\); got 1-D \(6,\)",
    ),
    "table of 33 columns": (
        {"table": lambda table: table.repeat(1, 6)[:, :33].contiguous()},
        ValueError,
        r"table must be .* k from 1 to 32; got \(20, 33\)",
    ),
    "table of no columns": (
        {"table": lambda table: table[:, :0]},
        ValueError,
        r"table must be .* k from 1 to 32; got \(20, 0\)",
    ),
    "table of no rows": (
        {"table": lambda table: table[:0]},
        ValueError,
        r"table must be .* vocab from 1 .*; got \(0, 6\)",
    ),
    "table transposed": (
        {"table": transposed},
        ValueError,
        r"table must be .* contiguous rows.*; got .* strides \(1, 20\)",
    ),
    "table expanded": (
        {"table": lambda table: table[:1].expand(20, 6)},
        ValueError,
        r"table must be .* k=6 elements or more apart; got .* strides \(0, 1\)",
    ),
    "table elsewhere": (
        {"table": elsewhere},
        ValueError,
        "table must be on (cpu|cuda:0) as token_ids is; got meta",
    ),
    "x alone": ({"W": lambda W: None}, ValueError, "W must be given with x"),
    "W alone": ({"x": lambda x: None}, ValueError, "x must be given with W"),
    "x of other tokens": (
        {"x": lambda x: x[:4]},
        ValueError,
        r"x must be \(N=5, K=64\) to match token_ids; got \(4, 64\)",
    ),
    "x and W elsewhere": (dict.fromkeys("xW", elsewhere), ValueError, "x must be on .*; got meta"),
}


@over_devices
@over_tensors(BAD_TENSORS)
def test_a_bad_tensor_is_refused_by_name(spoil, error, message, device):
    names = ("token_ids", "table", "x", "W")
    arguments = dict(zip(names, inputs(device=device), strict=True))
    with pytest.raises(error, match=message):
        hash_route(**spoiled(arguments, spoil))


@pytest.mark.parametrize("gated", [False, True])
@over_options([*WEIGHING, *outputs("token_ids")])
@over_devices
def test_a_bad_option_is_refused_by_name(options, error, message, gated, device):
    token_ids, table, x, W = inputs(device=device)
    gate = {"x": x, "W": W} if gated else {}
    hash_route(token_ids, table, **gate)  # so that a memoised good call can be mistaken for this
    with pytest.raises(error, match=message):
        hash_route(token_ids, table, **gate, **on_device(options, device))


def test_more_tokens_than_kernels_count_are_refused(monkeypatch):
    monkeypatch.setattr(validate, "MAX_TOKENS", 4)
    token_ids, table, _, _ = inputs()
    with pytest.raises(ValueError, match="token_ids must have at most 4 elements; got 5"):
        hash_route(token_ids, table)


# --- when all products are computed -------------------------------------------------------------


def test_few_tokens_gather_and_many_multiply():
    from cute_router.topk.hash import gathers

    assert gathers(8, 256, 4096, 6, "sqrtsoftplus")
    assert gathers(64, 384, 7168, 6, "sigmoid")
    assert not gathers(16384, 256, 4096, 6, "sqrtsoftplus")
    assert not gathers(1, 256, 4096, 6, "softmax")
    chosen = [gathers(N, 384, 7168, 8, "sigmoid") for N in (1, 100, 500, 2000, 10**6)]
    assert chosen == sorted(chosen, reverse=True)

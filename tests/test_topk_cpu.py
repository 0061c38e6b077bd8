"""The contract of topk and activation_topk, on CPU tensors: what they accept, return and refuse.

The checks run before any backend is chosen, so what is refused here is refused on a GPU too.
"""

import importlib
import inspect
import math
import pkgutil
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from gate_cases import GATES, LOGITS, draw
from gate_cases import ids as gate_ids
from oracle import assert_gated
from refused import (
    CHOOSING,
    WEIGHING,
    bias_beside,
    elsewhere,
    floats,
    on_device,
    outputs,
    over_devices,
    over_options,
    over_tensors,
    padded,
    spoiled,
    transposed,
)
from topk_cases import SCORES, Size
from topk_cases import draw as draw_scores
from topk_oracle import BITS, assert_same_topk, check_topk, expected_topk

import cute_router
from cute_router import TopK, activation_topk, dense_decode, reference, topk

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
INTEGERS = [torch.int32, torch.int64]
SUBMODULES = [m.name for m in pkgutil.iter_modules(sys.modules["cute_router.topk"].__path__)]


def by_the_book(row, k, length=None):
    """The order of topk in plain Python: the first k columns of one row."""
    row = row.tolist()[:length]

    def rank(column):
        value = row[column]
        return (1, -value) if value == value else (0, 0.0)  # NaN first

    return sorted(range(len(row)), key=rank)[:k]  # a stable sort: equals by column


def scores_on(device, *shape):
    return torch.randn(*shape).to(device)


# --- the order ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", SCORES)
def test_reference_and_oracle_both_order_by_the_book(kind, dtype):
    size = Size(4, 70, 33, dtype)
    scores = draw_scores(size, kind, "cpu")
    wanted = torch.tensor([by_the_book(row, size.k) for row in scores])
    bits = scores.contiguous().view(BITS[dtype])
    right = TopK(bits.gather(1, wanted).view(dtype), wanted)
    assert_same_topk(reference.topk(scores, size.k), right)
    assert_same_topk(expected_topk(scores, size.k), right)


@pytest.mark.parametrize("length", [0, 1, 3, 5, 9])
def test_reference_and_oracle_take_only_what_a_row_has(length):
    scores, k = torch.full((1, 9), -math.inf), 5
    scores[0, 7] = math.nan
    found = by_the_book(scores[0], k, length)
    lacking = k - len(found)
    indices = torch.tensor([found + [-1] * lacking])
    values = torch.tensor([[scores[0, i].item() for i in found] + [-math.inf] * lacking])
    lengths = torch.tensor([length])
    for result in (reference.topk(scores, k, lengths), expected_topk(scores, k, lengths)):
        assert torch.equal(result.indices, indices)
        assert torch.equal(result.values.isnan(), values.isnan())
        assert torch.equal(result.values.nan_to_num(), values.nan_to_num())


def test_the_oracle_notices_swapped_ties_wrong_values_and_lost_signs():
    scores = torch.tensor([[1.0, -0.0, 0.0, 1.0, math.nan]])
    values, indices = expected_topk(scores, 5)
    assert indices.tolist() == [[4, 0, 3, 1, 2]]
    swapped = TopK(values, indices[:, [0, 2, 1, 3, 4]])
    unsigned = TopK(values + 0.0, indices)
    payload = TopK(values.clone(), indices)
    payload.values[0, 0] = -math.nan
    for wrong in (swapped, unsigned, payload):
        with pytest.raises(AssertionError, match="wrong"):
            assert_same_topk(wrong, TopK(values, indices))


# --- what topk returns --------------------------------------------------------------------------


@pytest.mark.parametrize("index_dtype", INTEGERS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("L", "k"), [(1, 1), (7, 3), (33, 33), (1024, 32), (5000, 4096)])
def test_the_result_is_the_references(L, k, dtype, index_dtype):
    scores = torch.randn(3, L).to(dtype)
    result = topk(scores, k, index_dtype=index_dtype)
    assert isinstance(result, TopK)
    assert (result.values.dtype, result.indices.dtype) == (dtype, index_dtype)
    assert_same_topk(result, reference.topk(scores, k))


@pytest.mark.parametrize("shape", [(9,), (4, 9), (2, 3, 9), (2, 1, 3, 9), (1, 9)])
def test_leading_dimensions_are_kept(shape):
    scores = torch.randn(shape)
    result = check_topk(scores, 4)
    assert result.values.shape == (*shape[:-1], 4)
    lengths = torch.randint(0, 10, shape[:-1])
    check_topk(scores, 4, lengths)


@pytest.mark.parametrize("shape", [(0, 9), (3, 0, 9)])
def test_no_rows_give_empty_tensors(shape):
    values, indices = topk(
        torch.empty(shape), 4, lengths=torch.empty(shape[:-1], dtype=torch.int64)
    )
    assert values.shape == indices.shape == (*shape[:-1], 4)
    assert (values.dtype, indices.dtype) == (torch.float32, torch.int64)


def test_any_strides_are_taken():
    flat = torch.randint(4, (6, 4, 40)).float()
    views: list[Callable[[torch.Tensor], torch.Tensor]] = [
        lambda t: t[:, 1:3],
        lambda t: t[..., ::3],
        lambda t: t.transpose(0, 2),
        lambda t: t[0, 0].expand(5, 40),
        lambda t: t[..., 5:],
    ]
    for view in views:
        check_topk(view(flat), 3)


@pytest.mark.parametrize("dtype", INTEGERS)
def test_lengths_outside_the_row_count_as_none_or_all(dtype):
    info = torch.iinfo(dtype)
    lengths = torch.tensor([0, -1, 1, 6, 7, 8, 20, 21, info.min, info.max], dtype=dtype)
    scores = torch.randn(10, 20)
    values, indices = check_topk(scores, 7, lengths)
    assert (indices == -1).sum(1).tolist() == [7, 7, 6, 1, 0, 0, 0, 0, 7, 0]
    assert (values[indices == -1] == -math.inf).all()


def test_entries_past_the_length_are_not_seen_even_if_nan():
    scores = torch.tensor([[1.0, 2.0, math.nan, math.inf]])
    values, indices = topk(scores, 3, lengths=torch.tensor([2]))
    assert indices.tolist() == [[1, 0, -1]]
    assert values.tolist() == [[2.0, 1.0, -math.inf]]


def test_values_keep_their_own_bits():
    bits = torch.tensor([[0x7FC00123, -1, 0x7F800001, -(2**31), 0, 1]], dtype=torch.int32)
    values, indices = topk(bits.view(torch.float32), 6)
    assert indices.tolist() == [[0, 1, 2, 5, 3, 4]], "NaNs by index, the subnormal, -0 before +0"
    assert values.view(torch.int32).tolist() == [[0x7FC00123, -1, 0x7F800001, 1, -(2**31), 0]]


def test_without_an_order_the_same_entries_are_found():
    scores = torch.randint(5, (6, 50)).float()
    values, indices = topk(scores, 9, sorted=False)
    expected = topk(scores, 9)
    assert torch.equal(indices.sort(-1).values, expected.indices.sort(-1).values)
    assert torch.equal(values, scores.gather(-1, indices))


def test_results_go_into_the_tensors_that_the_caller_gives():
    scores, out = torch.randn(5, 9), (torch.empty(5, 4), torch.empty(5, 4, dtype=torch.int32))
    for given in (out, list(out)):
        result = topk(scores, 4, index_dtype=torch.int32, out=given)
        assert result.values is out[0]
        assert result.indices is out[1]
        assert_same_topk(result, topk(scores, 4))


def test_topk_and_the_reference_share_their_defaults():
    ours = inspect.signature(topk).parameters
    for name, parameter in inspect.signature(reference.topk).parameters.items():
        assert ours[name].default == parameter.default, name


@pytest.mark.parametrize("name", SUBMODULES)
def test_the_name_topk_stays_the_functions_whatever_is_imported_from_the_package(name):
    try:
        importlib.import_module(f"cute_router.topk.{name}")
    except ImportError:
        pytest.skip("needs the kernel compiler")
    assert cute_router.topk is topk
    assert inspect.isfunction(cute_router.topk)


def test_the_name_topk_is_the_functions_if_the_subpackage_is_imported_first():
    code = "import cute_router.topk.config, cute_router; print(cute_router.topk.__module__)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "cute_router.functional"


# --- what topk refuses --------------------------------------------------------------------------

BAD_SCORES = floats("scores") | {
    "no dimension": (
        {"scores": lambda s: s[0, 0]},
        ValueError,
        r"scores must be \(..., L\) with L from 1 to 1048576; got \(\)",
    ),
    "no entries": (
        {"scores": lambda s: s[:, :0]},
        ValueError,
        r"scores must be \(..., L\) with L from 1 to 1048576; got \(5, 0\)",
    ),
    "too many entries": (
        {"scores": lambda s: s[:1, :1].expand(1, 2**20 + 1)},
        ValueError,
        r"scores must be \(..., L\) with L from 1 to 1048576; got \(1, 1048577\)",
    ),
}
BAD_TOPK_OPTIONS = [
    ({"k": 0}, ValueError, "k must be from 1 to 40; got 0"),
    ({"k": -1}, ValueError, "k must be from 1 to 40; got -1"),
    ({"k": 41}, ValueError, "k must be from 1 to 40; got 41"),
    ({"k": 6.0}, TypeError, "k must be an int; got float"),
    ({"k": True}, TypeError, "k must be an int; got bool"),
    ({"k": torch.tensor(6)}, TypeError, "k must be an int; got Tensor"),
    ({"sorted": 1}, TypeError, "sorted must be a bool; got int"),
    ({"index_dtype": torch.int16}, TypeError, "index_dtype must be torch.int64 or .*; got .*int16"),
    ({"index_dtype": "int64"}, TypeError, "index_dtype must be torch.int64 or .*; got 'int64'"),
    ({"index_dtype": None}, TypeError, "index_dtype must be torch.int64 or .*; got None"),
    ({"lengths": [1] * 5}, TypeError, "lengths must be a torch.Tensor; got list"),
    ({"lengths": torch.ones(5)}, TypeError, "lengths must be torch.int32 or .*; got torch.float32"),
    (
        {"lengths": torch.ones(5, 1, dtype=torch.int32)},
        ValueError,
        r"lengths must be 1-D as scores without its last dimension; got 2-D \(5, 1\)",
    ),
    (
        {"lengths": torch.ones(4, dtype=torch.int32)},
        ValueError,
        r"lengths must have shape \(5,\); got \(4,\)",
    ),
    (
        {"lengths": torch.ones(10, dtype=torch.int64)[::2]},
        ValueError,
        r"lengths must be contiguous; got strides \(2,\)",
    ),
    (
        {"lengths": torch.ones(5, dtype=torch.int64, device="meta")},
        ValueError,
        "lengths must be on (cpu|cuda:0) as scores is; got meta",
    ),
    ({"out": torch.empty(5, 6)}, TypeError, r"out must be \(values, indices\) or None; got tensor"),
    ({"out": ()}, TypeError, r"out must be \(values, indices\) or None; got \(\)"),
    ({"out": (torch.empty(5, 6), [0])}, TypeError, r"out\[1\] must be a torch.Tensor; got list"),
    (
        {"out": (torch.empty(5, 6).half(), torch.empty(5, 6, dtype=torch.int64))},
        TypeError,
        r"out\[0\] must be torch.float32; got torch.float16",
    ),
    (
        {"out": (torch.empty(5, 6), torch.empty(5, 6, dtype=torch.int32))},
        TypeError,
        r"out\[1\] must be torch.int64; got torch.int32",
    ),
    (
        {"out": (torch.empty(5, 7), torch.empty(5, 6, dtype=torch.int64))},
        ValueError,
        r"out\[0\] must have shape \(5, 6\); got \(5, 7\)",
    ),
    (
        {"out": (torch.empty(5, 6), torch.empty(6, 5, dtype=torch.int64).T)},
        ValueError,
        r"out\[1\] must be contiguous; got strides \(1, 5\)",
    ),
    (
        {"out": (torch.empty(5, 6, device="meta"), torch.empty(5, 6, dtype=torch.int64))},
        ValueError,
        r"out\[0\] must be on (cpu|cuda:0) as scores is; got meta",
    ),
]


@over_devices
@over_tensors(BAD_SCORES)
def test_bad_scores_are_refused_by_name(spoil, error, message, device):
    with pytest.raises(error, match=message):
        topk(**spoiled({"scores": scores_on(device, 5, 40)}, spoil), k=6)


@over_devices
@over_options(BAD_TOPK_OPTIONS)
def test_a_bad_option_of_topk_is_refused_by_name(options, error, message, device):
    scores = scores_on(device, 5, 40)
    topk(scores, 1)  # so that a memoised good call is there to be mistaken for this one
    with pytest.raises(error, match=message):
        topk(scores, **({"k": 6} | on_device(options, device)))


@over_devices
def test_more_than_4096_results_are_refused(device):
    with pytest.raises(ValueError, match="k must be from 1 to 4096; got 4097"):
        topk(scores_on(device, 1, 5000), 4097)


@over_devices
def test_bad_options_are_refused_without_rows_too(device):
    with pytest.raises(ValueError, match="k must be from 1 to 40; got 41"):
        topk(scores_on(device, 0, 40), 41)


# --- what activation_topk returns ---------------------------------------------------------------


@pytest.mark.parametrize("gate", GATES, ids=gate_ids)
def test_the_routing_is_the_references(gate):
    logits, bias = draw(gate, ["normal"], "cpu")
    options = gate.options
    result = activation_topk(logits, bias, **options)
    del options["pdl"]
    expected = reference.route_logits(logits, bias, **options)
    assert isinstance(result, cute_router.Routing)
    assert (result.weights.dtype, result.ids.dtype) == (torch.float32, torch.int32)
    assert torch.equal(result.weights, expected.weights)
    assert torch.equal(result.ids, expected.ids)


@pytest.mark.parametrize("kind", LOGITS)
@pytest.mark.parametrize("gate", [g for g in GATES if g.N < 100 and g.E <= 256], ids=gate_ids)
def test_the_reference_is_what_the_oracle_allows(gate, kind):
    inputs = draw(gate, [kind], "cpu", bias="ties" if kind == "few values" else "normal")
    assert_gated(activation_topk(*inputs, **gate.options), *inputs, **gate.options)


def test_the_oracle_of_given_logits_notices_a_swapped_tie_and_a_wrong_weight():
    logits = torch.tensor([[1.0, 2.0, 2.0, 0.5]])
    weights, ids = activation_topk(logits, top_k=3)
    assert ids.tolist() == [[1, 2, 0]]
    swapped = cute_router.Routing(weights, ids[:, [1, 0, 2]].contiguous())
    with pytest.raises(AssertionError, match="is chosen"):
        assert_gated(swapped, logits, top_k=3)
    with pytest.raises(AssertionError, match="weights are wrong"):
        assert_gated(cute_router.Routing(weights + 1e-4, ids), logits, top_k=3)


def test_a_gate_is_the_step_of_dense_decode_behind_its_product():
    x = torch.eye(8).bfloat16()
    W = torch.randn(40, 8).bfloat16()
    bias = torch.randn(40)
    assert all(map(torch.equal, activation_topk(W.T.contiguous(), bias), dense_decode(x, W, bias)))


@pytest.mark.parametrize("stride", [41, 64])
def test_padded_rows_are_read_without_their_padding(stride):
    logits, bias = torch.randn(5, 40), torch.randn(40)
    assert all(
        map(
            torch.equal,
            activation_topk(padded(logits, stride), bias),
            activation_topk(logits, bias),
        )
    )


def test_no_tokens_give_empty_routings():
    weights, ids = activation_topk(torch.empty(0, 40), top_k=4)
    assert weights.shape == ids.shape == (0, 4)
    assert (weights.dtype, ids.dtype) == (torch.float32, torch.int32)


def test_routings_go_into_the_tensors_that_the_caller_gives():
    logits = torch.randn(5, 40)
    weights, ids = torch.empty(5, 6), torch.empty(5, 6, dtype=torch.int32)
    result = activation_topk(logits, out_weights=weights, out_ids=ids)
    assert result.weights is weights
    assert result.ids is ids
    assert all(map(torch.equal, result, activation_topk(logits)))


@pytest.mark.parametrize("N", [1, 3])
def test_a_batch_invariant_token_does_not_depend_on_its_company(N):
    logits = torch.randn(9, 40)
    alone = activation_topk(logits[:N], batch_invariant=True)
    together = activation_topk(logits, batch_invariant=True)
    assert torch.equal(alone.weights, together.weights[:N])
    assert torch.equal(alone.ids, together.ids[:N])


@pytest.mark.parametrize("other", [reference.route_logits, dense_decode])
def test_activation_topk_shares_its_defaults(other):
    ours = inspect.signature(activation_topk).parameters
    for name, parameter in inspect.signature(other).parameters.items():
        if name not in ("x", "W"):
            assert ours[name].default == parameter.default, name
            assert ours[name].kind == parameter.kind, name


# --- what activation_topk refuses ---------------------------------------------------------------

BAD_LOGITS = (
    floats("logits")
    | bias_beside("logits")
    | {
        "logits and bias on neither CUDA nor CPU": (
            {"logits": elsewhere, "bias": elsewhere},
            ValueError,
            "logits must be on a CUDA device or the CPU; got meta",
        ),
        "1-D": (
            {"logits": lambda t: t[0]},
            ValueError,
            r"logits must be 2-D \(N, E\); got 1-D \(40,\)",
        ),
        "3-D": ({"logits": lambda t: t[None]}, ValueError, "logits must be 2-D .*; got 3-D"),
        "E = 0": (
            {"logits": lambda t: t[:, :0]},
            ValueError,
            r"logits must be \(N, E\) with E from 1 to 1024; got \(5, 0\)",
        ),
        "E = 1025": (
            {"logits": lambda t: t[:, :1].repeat(1, 1025)},
            ValueError,
            r"logits must be \(N, E\) with E from 1 to 1024; got \(5, 1025\)",
        ),
        "transposed": (
            {"logits": transposed},
            ValueError,
            r"logits must be .* rows of unit stride, E=40 .*; got .* strides \(1, 5\)",
        ),
        "expanded": (
            {"logits": lambda t: t[:1].expand(5, 40)},
            ValueError,
            r"logits must be .* elements or more apart; got .* strides \(0, 1\)",
        ),
    }
)


@over_devices
@over_tensors(BAD_LOGITS)
def test_a_bad_tensor_is_refused_by_name(spoil, error, message, device):
    arguments = {"logits": scores_on(device, 5, 40), "bias": scores_on(device, 40)}
    with pytest.raises(error, match=message):
        activation_topk(**spoiled(arguments, spoil))


@over_devices
@over_options([*WEIGHING, *CHOOSING, *outputs("logits")])
def test_a_bad_option_of_a_gate_is_refused_by_name(options, error, message, device):
    logits = scores_on(device, 5, 40)
    activation_topk(logits, top_k=1)  # so that a memoised good call can be mistaken for this one
    with pytest.raises(error, match=message):
        activation_topk(logits, **on_device(options, device))


@over_devices
def test_a_bad_bias_is_refused_without_tokens_too(device):
    with pytest.raises(ValueError, match="bias must have shape"):
        activation_topk(scores_on(device, 0, 40), scores_on(device, 39))

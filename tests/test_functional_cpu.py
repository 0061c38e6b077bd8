"""The contract of the dense functions, on CPU tensors: what they accept, return and refuse.

The checks run before any backend is chosen, so what is refused here is refused on a GPU too.
"""

import inspect
import math

import pytest
import torch

import cute_router
from cute_router import dense_decode, dense_prefill, reference, route

DENSE = [dense_decode, dense_prefill, route]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu(capability=(8, 0)))]


def inputs(N=5, E=40, K=64, device="cpu"):
    """Hidden states, weights and bias with logits of about unit variance."""
    x = torch.randn(N, K).bfloat16()
    W = (torch.randn(E, K) * K**-0.5).bfloat16()
    return x.to(device), W.to(device), (torch.randn(E) * 0.1).to(device)


def misaligned(t):
    """The same values, 2 bytes past a 16-byte boundary."""
    storage = torch.empty(t.numel() + 8, dtype=t.dtype, device=t.device)
    start = 1 + (-storage.data_ptr() // t.element_size()) % 8
    moved = storage[start : start + t.numel()].view(t.shape)
    return moved.copy_(t)


def padded(t, stride):
    """The same values, in rows `stride` elements apart; what lies between them is NaN."""
    storage = torch.full((t.shape[0], stride), math.nan, dtype=t.dtype, device=t.device)
    storage[:, : t.shape[1]] = t
    return storage[:, : t.shape[1]]


# --- what it returns ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("N", "E", "K", "k"),
    [(1, 7, 264, 6), (3, 1, 8, 1), (64, 256, 512, 6), (17, 300, 264, 8), (2, 1024, 64, 32)],
)
@pytest.mark.parametrize("scoring", ["sqrtsoftplus", "sigmoid", "softmax"])
@pytest.mark.parametrize("dense", DENSE)
def test_the_result_is_the_references(dense, N, E, K, k, scoring):
    x, W, bias = inputs(N, E, K)
    options = {"top_k": k, "scoring": scoring, "routed_scaling_factor": 1.5}
    result, expected = dense(x, W, bias, **options), reference.route(x, W, bias, **options)
    assert isinstance(result, cute_router.Routing)
    assert (result.weights.dtype, result.ids.dtype) == (torch.float32, torch.int32)
    assert result.weights.shape == result.ids.shape == (N, k)
    assert torch.equal(result.weights, expected.weights)
    assert torch.equal(result.ids, expected.ids)


def test_groups_and_renormalize_reach_the_backend():
    x, W, bias = inputs(E=64)
    options = {"n_group": 8, "topk_group": 2, "renormalize": False}
    result, expected = dense_decode(x, W, bias, **options), reference.route(x, W, bias, **options)
    assert torch.equal(result.ids, expected.ids)
    assert torch.equal(result.weights, expected.weights)
    assert not torch.equal(result.ids, reference.route(x, W, bias).ids)


def test_no_bias_is_a_bias_of_zero():
    x, W, bias = inputs()
    without, with_zero = dense_decode(x, W), dense_decode(x, W, torch.zeros_like(bias))
    assert torch.equal(without.ids, with_zero.ids)
    assert torch.equal(without.weights, with_zero.weights)


def test_no_tokens_give_empty_tensors():
    x, W, bias = inputs(N=0)
    weights, ids = dense_decode(x, W, bias, top_k=4)
    assert weights.shape == ids.shape == (0, 4)
    assert (weights.dtype, ids.dtype) == (torch.float32, torch.int32)


def test_results_go_into_the_tensors_that_the_caller_gives():
    x, W, bias = inputs()
    weights, ids = torch.empty(5, 6), torch.empty(5, 6, dtype=torch.int32)
    result = dense_decode(x, W, bias, out_weights=weights, out_ids=ids)
    expected = dense_decode(x, W, bias)
    assert result.weights is weights
    assert result.ids is ids
    assert torch.equal(weights, expected.weights)
    assert torch.equal(ids, expected.ids)


def test_either_output_can_be_given_alone():
    x, W, bias = inputs()
    ids = torch.empty(5, 6, dtype=torch.int32)
    result = dense_decode(x, W, bias, out_ids=ids)
    assert result.ids is ids
    assert torch.equal(result.weights, dense_decode(x, W, bias).weights)


@pytest.mark.parametrize("stride", [72, 264])
def test_padded_rows_are_read_without_their_padding(stride):
    x, W, bias = inputs()
    expected = dense_decode(x, W, bias)
    result = dense_decode(padded(x, stride), padded(W, stride), bias)
    assert torch.equal(result.ids, expected.ids)
    assert torch.equal(result.weights, expected.weights)


def test_the_row_stride_of_a_single_row_is_ignored():
    x, W, _ = inputs(N=1, E=1)
    assert dense_decode(padded(x, 65), padded(W, 67), top_k=1).ids.tolist() == [[0]]


@pytest.mark.parametrize("N", [1, 3, 17])
def test_a_batch_invariant_row_does_not_depend_on_its_company(N):
    x, W, bias = inputs(N=20, E=256, K=4096)
    alone = dense_decode(x[:N], W, bias, batch_invariant=True)
    together = dense_decode(x, W, bias, batch_invariant=True)
    assert torch.equal(alone.weights, together.weights[:N])
    assert torch.equal(alone.ids, together.ids[:N])


@pytest.mark.parametrize("factor", [0, 2, 1.5, -0.0, torch.finfo(torch.float32).max])
def test_any_finite_factor_from_zero_is_accepted(factor):
    x, W, bias = inputs()
    weights, _ = dense_decode(x, W, bias, routed_scaling_factor=factor)
    torch.testing.assert_close(weights.double().sum(-1), torch.full((5,), float(factor)).double())


def test_the_dense_functions_share_their_signature_and_its_defaults_with_the_reference():
    ours = inspect.signature(dense_decode).parameters
    assert inspect.signature(dense_prefill).parameters == ours
    assert inspect.signature(route).parameters == ours
    for name, parameter in inspect.signature(reference.route).parameters.items():
        assert ours[name].default == parameter.default, name
        assert ours[name].kind == parameter.kind, name


# --- what it refuses ----------------------------------------------------------------------------

BAD_TENSORS = {
    "x is no tensor": (
        lambda x, W, b: ([[1.0]], W, b),
        TypeError,
        "x must be a torch.Tensor; got list",
    ),
    "W is no tensor": (
        lambda x, W, b: (x, None, b),
        TypeError,
        "W must be a torch.Tensor; got NoneType",
    ),
    "bias is no tensor": (
        lambda x, W, b: (x, W, 0.5),
        TypeError,
        "bias must be a torch.Tensor; got float",
    ),
    "x in fp16": (
        lambda x, W, b: (x.half(), W, b),
        TypeError,
        "x must be torch.bfloat16; got torch.float16",
    ),
    "W in fp32": (
        lambda x, W, b: (x, W.float(), b),
        TypeError,
        "W must be torch.bfloat16; got torch.float32",
    ),
    "bias in bf16": (
        lambda x, W, b: (x, W, b.bfloat16()),
        TypeError,
        "bias must be torch.float32; got torch.bfloat16",
    ),
    "x 1-D": (
        lambda x, W, b: (x[0], W, b),
        ValueError,
        r"x must be 2-D \(N, K=64\); got 1-D \(64,\)",
    ),
    "x 3-D": (
        lambda x, W, b: (x[None], W, b),
        ValueError,
        r"x must be 2-D \(N, K=64\); got 3-D \(1, 5, 64\)",
    ),
    "W 1-D": (
        lambda x, W, b: (x, W[0], b),
        ValueError,
        r"W must be 2-D \(E, K\); got 1-D \(64,\)",
    ),
    "K mismatch": (
        lambda x, W, b: (x[:, :56], W, b),
        ValueError,
        r"x must be \(N, K=64\) to match W; got \(5, 56\)",
    ),
    "K not a multiple of 8": (
        lambda x, W, b: (padded(x[:, :60], 64), padded(W[:, :60], 64), b),
        ValueError,
        r"W must be .* K a positive multiple of 8; got \(40, 60\)",
    ),
    "K = 0": (
        lambda x, W, b: (x[:, :0], W[:, :0], b),
        ValueError,
        r"W must be .* K a positive multiple of 8; got \(40, 0\)",
    ),
    "E = 0": (
        lambda x, W, b: (x, W[:0], None),
        ValueError,
        r"W must be .* E from 1 to 1024; got \(0, 64\)",
    ),
    "E = 1025": (
        lambda x, W, b: (x, torch.zeros(1025, 64).bfloat16(), None),
        ValueError,
        r"W must be .* E from 1 to 1024; got \(1025, 64\)",
    ),
    "x transposed": (
        lambda x, W, b: (x.T.contiguous().T, W, b),
        ValueError,
        r"x must be \(N, K=64\) with K contiguous .*; got .* strides \(1, 5\)",
    ),
    "W transposed": (
        lambda x, W, b: (x, W.T.contiguous().T, b),
        ValueError,
        r"W must be \(E, K\) with K contiguous .*; got .* strides \(1, 40\)",
    ),
    "x with a row stride of 65": (
        lambda x, W, b: (padded(x, 65), W, b),
        ValueError,
        r"x must be .* row stride that is a multiple of 8; got .* strides \(65, 1\)",
    ),
    "W with a row stride of 65": (
        lambda x, W, b: (x, padded(W, 65), b),
        ValueError,
        r"W must be .* row stride that is a multiple of 8; got .* strides \(65, 1\)",
    ),
    "x misaligned": (
        lambda x, W, b: (misaligned(x), W, b),
        ValueError,
        "x must start at a multiple of 16 bytes; got one plus 2 bytes",
    ),
    "W misaligned": (
        lambda x, W, b: (x, misaligned(W), b),
        ValueError,
        "W must start at a multiple of 16 bytes; got one plus 2 bytes",
    ),
    "x and W misaligned alike": (
        lambda x, W, b: (misaligned(x), misaligned(W), b),
        ValueError,
        "W must start at a multiple of 16 bytes",
    ),
    "x sparse": (
        lambda x, W, b: (x.to_sparse(), W, b),
        ValueError,
        "x must be a dense .* tensor; got layout torch.sparse_coo",
    ),
    "x and W on neither CUDA nor CPU": (
        lambda x, W, b: (x.to("meta"), W.to("meta"), b.to("meta")),
        ValueError,
        "x must be on a CUDA device or the CPU; got meta",
    ),
    "W elsewhere": (
        lambda x, W, b: (x, W.to("meta"), b),
        ValueError,
        "W must be on (cpu|cuda:0) as x is; got meta",
    ),
    "bias elsewhere": (
        lambda x, W, b: (x, W, b.to("meta")),
        ValueError,
        "bias must be on (cpu|cuda:0) as x is; got meta",
    ),
    "bias too short": (
        lambda x, W, b: (x, W, b[:-1]),
        ValueError,
        r"bias must have shape \(40,\); got \(39,\)",
    ),
    "bias 2-D": (
        lambda x, W, b: (x, W, b[None]),
        ValueError,
        r"bias must have shape \(40,\); got \(1, 40\)",
    ),
    "bias with gaps": (
        lambda x, W, b: (x, W, b.repeat_interleave(2)[::2]),
        ValueError,
        r"bias must be contiguous; got strides \(2,\)",
    ),
}

BAD_OPTIONS = [
    ({"top_k": 41}, ValueError, "top_k must be from 1 to 32; got 41"),
    ({"top_k": 0}, ValueError, "top_k must be from 1 to 32; got 0"),
    ({"top_k": 6.0}, TypeError, "top_k must be an int; got float"),
    ({"top_k": True}, TypeError, "top_k must be an int; got bool"),
    ({"top_k": [6]}, TypeError, "top_k must be an int; got list"),
    ({"routed_scaling_factor": -1.0}, ValueError, "routed_scaling_factor must be .*; got -1.0"),
    ({"routed_scaling_factor": math.nan}, ValueError, "routed_scaling_factor must be .*; got nan"),
    ({"routed_scaling_factor": math.inf}, ValueError, "routed_scaling_factor must be .*; got inf"),
    (
        {"routed_scaling_factor": 1e39},
        ValueError,
        "routed_scaling_factor must be .*; got 1e.39",
    ),
    ({"routed_scaling_factor": "1"}, TypeError, "routed_scaling_factor must be a float; got str"),
    ({"routed_scaling_factor": True}, TypeError, "routed_scaling_factor must be .*; got bool"),
    (
        {"routed_scaling_factor": torch.tensor(1.0)},
        TypeError,
        "routed_scaling_factor must be a float; got Tensor",
    ),
    ({"scoring": "relu"}, ValueError, "scoring must be one of .*; got 'relu'"),
    ({"scoring": ["sigmoid"]}, TypeError, "scoring must be one of .*; got list"),
    ({"renormalize": 1}, TypeError, "renormalize must be a bool; got int"),
    ({"n_group": 3}, ValueError, "n_group must divide .* got n_group=3 for 40 experts"),
    ({"n_group": 40}, ValueError, "n_group must leave at least 2 experts in a group"),
    ({"n_group": 4, "topk_group": 5}, ValueError, "topk_group must be from 1 to 4; got 5"),
    ({"n_group": 10}, ValueError, "top_k must be at most 4, .*; got 6"),
    ({"batch_invariant": None}, TypeError, "batch_invariant must be a bool; got NoneType"),
    ({"pdl": 1}, TypeError, "pdl must be a bool; got int"),
    (
        {"out_weights": torch.empty(5, 6, dtype=torch.float64)},
        TypeError,
        "out_weights must be torch.float32; got torch.float64",
    ),
    (
        {"out_ids": torch.empty(5, 6, dtype=torch.int64)},
        TypeError,
        "out_ids must be torch.int32; got torch.int64",
    ),
    (
        {"out_weights": torch.empty(5, 8)},
        ValueError,
        r"out_weights must have shape \(5, 6\); got \(5, 8\)",
    ),
    (
        {"out_ids": torch.empty(4, 6, dtype=torch.int32)},
        ValueError,
        r"out_ids must have shape \(5, 6\); got \(4, 6\)",
    ),
    (
        {"out_weights": torch.empty(5, 8)[:, :6]},
        ValueError,
        r"out_weights must be contiguous; got strides \(8, 1\)",
    ),
    (
        {"out_ids": torch.empty(5, 6, dtype=torch.int32, device="meta")},
        ValueError,
        "out_ids must be on (cpu|cuda:0) as x is; got meta",
    ),
    ({"out_weights": [0.0]}, TypeError, "out_weights must be a torch.Tensor; got list"),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", BAD_TENSORS)
@pytest.mark.parametrize("dense", DENSE)
def test_a_bad_tensor_is_refused_by_name(dense, case, device):
    spoil, error, message = BAD_TENSORS[case]
    with pytest.raises(error, match=message):
        dense(*spoil(*inputs(device=device)))


@pytest.mark.parametrize(
    ("options", "error", "message"), BAD_OPTIONS, ids=["+".join(case[0]) for case in BAD_OPTIONS]
)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dense", DENSE)
def test_a_bad_option_is_refused_by_name(dense, options, error, message, device):
    x, W, bias = inputs(device=device)
    for name, value in options.items():
        if isinstance(value, torch.Tensor) and not value.is_meta:
            moved = torch.empty_strided(
                value.shape, value.stride(), dtype=value.dtype, device=device
            )
            options = options | {name: moved}
    dense(x, W, bias)  # so that a memoised good call is there to be mistaken for this one
    with pytest.raises(error, match=message):
        dense(x, W, bias, **options)


def test_true_is_not_taken_for_the_memoised_1():
    x, W, bias = inputs()
    dense_decode(x, W, bias, top_k=1)
    with pytest.raises(TypeError, match="top_k must be an int; got bool"):
        dense_decode(x, W, bias, top_k=True)


def test_bad_input_is_refused_without_tokens_too():
    x, W, bias = inputs(N=0)
    with pytest.raises(ValueError, match="bias must have shape"):
        dense_decode(x, W, bias[1:])

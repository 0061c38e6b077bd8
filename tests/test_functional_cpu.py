"""The contract of the dense functions, on CPU tensors: what they accept, return and refuse.

The checks run before any backend is chosen, so what is refused here is refused on a GPU too.
"""

import inspect

import pytest
import torch
from refused import (
    CHOOSING,
    WEIGHING,
    X_AND_W,
    bias_beside,
    elsewhere,
    on_device,
    outputs,
    over_devices,
    over_options,
    over_tensors,
    padded,
    spoiled,
)

import cute_router
from cute_router import dense_decode, dense_prefill, reference, route

DENSE = [dense_decode, dense_prefill, route]


def inputs(N=5, E=40, K=64, device="cpu"):
    """Hidden states, weights and bias with logits of about unit variance."""
    x = torch.randn(N, K).bfloat16()
    W = (torch.randn(E, K) * K**-0.5).bfloat16()
    return x.to(device), W.to(device), (torch.randn(E) * 0.1).to(device)


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

BAD_TENSORS = (
    X_AND_W
    | bias_beside("x")
    | {
        "W None": ({"W": lambda W: None}, TypeError, "W must be a torch.Tensor; got NoneType"),
        "x and W on neither CUDA nor CPU": (
            {"x": elsewhere, "W": elsewhere, "bias": elsewhere},
            ValueError,
            "x must be on a CUDA device or the CPU; got meta",
        ),
    }
)


@over_devices
@over_tensors(BAD_TENSORS)
@pytest.mark.parametrize("dense", DENSE)
def test_a_bad_tensor_is_refused_by_name(dense, spoil, error, message, device):
    x, W, bias = inputs(device=device)
    with pytest.raises(error, match=message):
        dense(**spoiled({"x": x, "W": W, "bias": bias}, spoil))


@over_devices
@over_options([*WEIGHING, *CHOOSING, *outputs("x")])
@pytest.mark.parametrize("dense", DENSE)
def test_a_bad_option_is_refused_by_name(dense, options, error, message, device):
    x, W, bias = inputs(device=device)
    dense(x, W, bias)  # so that a memoised good call is there to be mistaken for this one
    with pytest.raises(error, match=message):
        dense(x, W, bias, **on_device(options, device))


def test_true_is_not_taken_for_the_memoised_1():
    x, W, bias = inputs()
    dense_decode(x, W, bias, top_k=1)
    with pytest.raises(TypeError, match="top_k must be an int; got bool"):
        dense_decode(x, W, bias, top_k=True)


def test_bad_input_is_refused_without_tokens_too():
    x, W, bias = inputs(N=0)
    with pytest.raises(ValueError, match="bias must have shape"):
        dense_decode(x, W, bias[1:])

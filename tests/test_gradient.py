"""The gradient of the weights is that of the mathematics, in fp64 and through every function."""

import pytest
import torch
from torch import Tensor

from cute_router import activation_topk, dense_decode, gradient, hash_route, reference, topk
from cute_router.validate import FLOATS

SCORINGS = ["sqrtsoftplus", "sigmoid", "softmax"]
BF16_ROUNDING = 2.0**-8


class Weights(torch.autograd.Function):
    """The reference's weights at given ids, with this package's gradient, in fp64."""

    @staticmethod
    def forward(ctx, logits, ids, factor, scoring, renormalize):
        weights = weights_at(logits, ids, factor, scoring, renormalize)
        ctx.options = scoring, renormalize
        ctx.save_for_backward(logits, ids, weights)
        return weights

    @staticmethod
    def backward(ctx, grad):
        logits, ids, weights = ctx.saved_tensors
        return gradient.of_logits(grad, weights, ids, logits, *ctx.options), *[None] * 4


def weights_at(logits: Tensor, ids: Tensor, factor=1.5, scoring="sqrtsoftplus", renormalize=True):
    """The reference's weights of chosen experts, which autograd can follow; 0 for id -1."""
    a = reference.activations(logits, scoring)
    a = torch.cat([a, a.new_zeros(a.shape[0], 1)], -1)
    return reference.weigh(a, ids.long() % a.shape[-1], factor, renormalize)


def close(got: Tensor, wanted: Tensor, rounding: float = 1e-5) -> None:
    """Equal to within a rounding of each value, and 2^-20 of the largest for sums that cancel."""
    slack = 2.0**-20 * float(wanted.abs().max())
    torch.testing.assert_close(got.double(), wanted, rtol=rounding, atol=slack)


def product_inputs(N=5, E=40, K=64, device="cpu"):
    x = torch.randn(N, K).bfloat16().to(device).requires_grad_()
    W = (torch.randn(E, K) * K**-0.5).bfloat16().to(device).requires_grad_()
    return x, W


# --- the formula --------------------------------------------------------------------------------


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("renormalize", [True, False])
def test_the_formula_is_the_derivative_in_fp64(scoring, renormalize):
    logits = (torch.randn(4, 9).double() * 3).requires_grad_()
    ids = torch.stack([torch.randperm(9)[:3] for _ in range(4)])
    call = logits, ids, 2.5, scoring, renormalize
    assert torch.autograd.gradcheck(Weights.apply, call)


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("renormalize", [True, False])
def test_slots_without_expert_have_no_gradient_and_repeated_ones_add_up(scoring, renormalize):
    logits = torch.randn(3, 9).double().requires_grad_()
    ids = torch.tensor([[4, 4, 4, 1], [0, -1, 8, 8], [-1, -1, -1, -1]])
    call = logits, ids, 2.5, scoring, renormalize
    assert torch.autograd.gradcheck(Weights.apply, call)
    Weights.apply(*call).sum().backward()
    assert not logits.grad[2].any()


@pytest.mark.parametrize("scoring", ["sqrtsoftplus", "sigmoid"])
@pytest.mark.parametrize("level", [-80.0, -20.0, 20.0, 80.0])
def test_the_slope_keeps_its_digits_where_activations_are_tiny_or_flat(scoring, level):
    logits = (level + torch.randn(100)).requires_grad_()
    wide = logits.detach().double().requires_grad_()
    log_activation = {
        "sqrtsoftplus": lambda logit: reference.softplus(logit).log() / 2,
        "sigmoid": torch.nn.functional.logsigmoid,
    }
    log_activation[scoring](wide).sum().backward()
    slope = gradient.log_slope(logits.detach(), scoring)
    torch.testing.assert_close(slope.double(), wide.grad, rtol=1e-5, atol=0)


def test_weights_of_a_zero_sum_have_a_zero_gradient():
    logits = torch.full((2, 8), -torch.inf).requires_grad_()
    activation_topk(logits, top_k=3).weights.sum().backward()
    assert not logits.grad.any()


# --- through the functions ----------------------------------------------------------------------


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu(capability=(8, 0)))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("renormalize", [True, False])
def test_dense_weights_have_the_gradient_of_eager_torch(scoring, renormalize, device):
    x, W = product_inputs(device=device)
    bias = torch.randn(40, device=device) * 0.1
    options = {"scoring": scoring, "renormalize": renormalize, "routed_scaling_factor": 1.5}
    weights, ids = dense_decode(x, W, bias, **options)
    g = torch.randn(5, 6, device=device)
    weights.backward(g)

    wide_x, wide_W = (t.detach().double().requires_grad_() for t in (x, W))
    weights_at(wide_x @ wide_W.T, ids, 1.5, scoring, renormalize).backward(g.double())
    assert (x.grad.dtype, W.grad.dtype) == (torch.bfloat16, torch.bfloat16)
    close(x.grad, wide_x.grad, BF16_ROUNDING)
    close(W.grad, wide_W.grad, BF16_ROUNDING)
    assert not ids.requires_grad


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("renormalize", [True, False])
def test_hash_weights_have_the_gradient_of_eager_torch(scoring, renormalize, device):
    x, W = product_inputs(device=device)
    table = torch.randint(40, (20, 6))
    table[3] = torch.tensor([7, 7, -1, 40, 2, 7])
    token_ids = torch.tensor([3, 20, 0, 3, 11])
    token_ids, table = token_ids.to(device), table.to(device)
    options = {"scoring": scoring, "renormalize": renormalize, "routed_scaling_factor": 1.5}
    weights, ids = hash_route(token_ids, table, x=x, W=W, **options)
    g = torch.randn(5, 6, device=device)
    weights.backward(g)

    wide_x, wide_W = (t.detach().double().requires_grad_() for t in (x, W))
    weights_at(wide_x @ wide_W.T, ids, 1.5, scoring, renormalize).backward(g.double())
    close(x.grad, wide_x.grad, BF16_ROUNDING)
    close(W.grad, wide_W.grad, BF16_ROUNDING)
    assert not x.grad[1].any(), "of a token that the table has not"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("renormalize", [True, False])
def test_weights_of_logits_have_the_gradient_of_eager_torch(scoring, renormalize, dtype, device):
    logits = torch.randn(7, 40, device=device).to(dtype).requires_grad_()
    options = {"scoring": scoring, "renormalize": renormalize, "n_group": 8, "topk_group": 4}
    weights, ids = activation_topk(logits, **options)
    g = torch.randn(7, 6, device=device)
    weights.backward(g)
    wide = logits.detach().double().requires_grad_()
    weights_at(wide, ids, 1.0, scoring, renormalize).backward(g.double())
    assert logits.grad.dtype == dtype
    close(logits.grad, wide.grad, 1e-5 if dtype is torch.float32 else torch.finfo(dtype).eps)


@pytest.mark.parametrize("device", DEVICES)
def test_values_of_topk_hand_their_gradient_to_their_scores(device):
    scores = torch.randn(2, 3, 50, device=device).requires_grad_()
    lengths = torch.tensor([[50, 2, 0], [1, 30, 4]], device=device)
    values, indices = topk(scores, 4, lengths=lengths)
    g = torch.randn(2, 3, 4, device=device)
    values.backward(g)
    expected = torch.zeros(2, 3, 51, device=device)  # a column more, for what is not there
    expected.scatter_add_(-1, indices % 51, g)
    assert torch.equal(scores.grad, expected[..., :50])


@pytest.mark.parametrize("wanted", ["x", "W"])
def test_only_what_requires_grad_gets_one(wanted):
    x, W = product_inputs()
    (W if wanted == "x" else x).requires_grad_(False)
    dense_decode(x, W).weights.square().sum().backward()
    assert (x.grad is not None, W.grad is not None) == (wanted == "x", wanted == "W")


def test_nothing_is_recorded_where_grad_mode_is_off():
    x, W = product_inputs()
    table = torch.randint(40, (20, 6))
    with torch.no_grad():
        assert not dense_decode(x, W).weights.requires_grad
        assert not hash_route(torch.arange(5), table, x=x, W=W).weights.requires_grad
        assert not activation_topk(torch.randn(2, 9).requires_grad_()).weights.requires_grad
        assert not topk(torch.randn(2, 9).requires_grad_(), 2).values.requires_grad


def test_the_result_is_the_same_with_a_gradient_as_without():
    x, W = product_inputs()
    recorded, plain = dense_decode(x, W), dense_decode(x.detach(), W.detach())
    assert torch.equal(recorded.weights, plain.weights)
    assert torch.equal(recorded.ids, plain.ids)


def test_given_outputs_are_refused_where_a_gradient_is_recorded():
    x, W = product_inputs()
    table, out = torch.randint(40, (20, 6)), {"out_weights": torch.empty(5, 6)}
    logits = torch.randn(5, 9).requires_grad_()
    pair = torch.empty(5, 2), torch.empty(5, 2, dtype=torch.int64)
    message = "must be None where a gradient is recorded"
    with pytest.raises(ValueError, match=f"out_weights and out_ids {message}"):
        dense_decode(x, W, **out)
    with pytest.raises(ValueError, match=f"out_weights and out_ids {message}"):
        hash_route(torch.arange(5), table, x=x, W=W, **out)
    with pytest.raises(ValueError, match=f"out_weights and out_ids {message}"):
        activation_topk(logits, **out)
    with pytest.raises(ValueError, match=f"out {message}"):
        topk(logits, 2, out=pair)
    with torch.no_grad():
        assert dense_decode(x, W, **out).weights is out["out_weights"]


def test_errors_are_the_same_where_a_gradient_is_recorded():
    x, W = product_inputs()
    with pytest.raises(TypeError, match="top_k must be an int; got float"):
        dense_decode(x, W, top_k=6.0)
    with pytest.raises(TypeError, match=r"x must be torch\.bfloat16; got torch\.float32"):
        dense_decode(x.float(), W)
    with pytest.raises(TypeError, match=r"token_ids must be a torch\.Tensor; got list"):
        hash_route([1], torch.zeros(4, 2).int(), x=x, W=W)
    with pytest.raises(ValueError, match="scoring must be one of"):
        activation_topk(torch.randn(2, 9).requires_grad_(), scoring="relu")
    with pytest.raises(ValueError, match="k must be from 1 to 9; got 10"):
        topk(torch.randn(2, 9).requires_grad_(), 10)

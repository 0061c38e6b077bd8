"""Routers of transformers, patched: they route as the oracle says."""

import copy

import pytest
import torch
from transformers_cases import (
    DEVICES,
    GATES,
    MATHEMATICS,
    ROUTERS,
    call_of,
    check_call,
    lone,
    model_of,
    recorded,
    routers,
    same,
    tiny,
    tokens_of,
)

import cute_router
from cute_router.integrations.transformers import patch


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("N", [1, 7, 64, 300])
@pytest.mark.parametrize("kind", ROUTERS)
def test_a_router_agrees_with_the_oracle_and_with_its_own_in_fp32(kind, N, device):
    router, options = lone(kind, device)
    own, args = copy.deepcopy(router), call_of(router, N, device)
    assert patch(router) == [type(own).__name__]
    check_call(own, args, router(*args), options)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", GATES)
def test_the_routers_of_a_model_agree_with_the_oracle_and_with_its_own_in_fp32(family, device):
    model, options = model_of(family, device), {"top_k": 4} | MATHEMATICS[family]
    own = copy.deepcopy(routers(model))
    assert patch(model) == GATES[family]
    calls = recorded(model, tokens_of(device))
    assert list(calls) == GATES[family]
    for name, (args, result) in calls.items():
        check_call(own[name], args, result, options)


@pytest.mark.parametrize("kind", ["V4", "V4 by token id"])
def test_a_router_of_v4_may_score_by_sigmoid(kind):
    router = tiny(kind, scoring_func="sigmoid")
    own, args = copy.deepcopy(router), call_of(router, 20)
    patch(router)
    options = {"top_k": 4, "routed_scaling_factor": 1.5, "scoring": "sigmoid"}
    check_call(own, args, router(*args), options)


def test_a_router_of_v3_may_leave_its_weights_as_they_are():
    router = tiny("V3", norm_topk_prob=False)
    own, args = copy.deepcopy(router), call_of(router, 20)
    patch(router)
    options = {"top_k": 4, "renormalize": False} | MATHEMATICS["V3"]
    check_call(own, args, router(*args), options)


def test_kernels_wait_for_whoever_writes_the_tensors_of_the_model(monkeypatch):
    calls = []
    for name in ("route", "hash_route"):
        function = getattr(cute_router, name)

        def spy(*args, function=function, **options):
            calls.append(options)
            return function(*args, **options)

        monkeypatch.setattr(f"cute_router.integrations.transformers.{name}", spy)
    model = model_of("V4")
    patch(model, batch_invariant=True)
    model(tokens_of())
    assert [call["pdl"] for call in calls] == [False] * 3
    assert [call.get("batch_invariant") for call in calls] == [None, True, True]


def test_a_new_factor_takes_effect():
    router, options = lone("V4")
    args = call_of(router, 5)
    patch(router)
    weights = router(*args)[1]
    router.routed_scaling_factor = 2 * options["routed_scaling_factor"]
    assert torch.equal(router(*args)[1], 2 * weights)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["V4", "V3"])
def test_batch_invariant_rows_do_not_depend_on_the_batch(kind):
    router, _ = lone(kind, "cuda")
    (x,) = call_of(router, 64, "cuda")
    patch(router, batch_invariant=True)
    _, weights, ids = router(x)
    for n in (0, 9, 63):
        assert same(router(x[:, n : n + 1])[1:], (weights[n : n + 1], ids[n : n + 1]))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ROUTERS)
def test_gradients_are_those_of_its_own_router_in_fp32(kind, device):
    router, _ = lone(kind, device)
    own = copy.deepcopy(router).float()
    x, *token_ids = call_of(router, 5, device)
    patch(router)
    router.register_forward_hook(lambda *_: None)  # for the logits
    grads = []
    for each, states in ((router, x.clone()), (own, x.float())):
        states.requires_grad_()
        logits, weights, _ = each(states, *token_ids)
        ((weights**2).sum() + (logits**2).mean()).backward()
        grads.append((states.grad.float(), each.weight.grad.float()))
    for actual, expected in zip(*grads, strict=True):
        largest = float(expected.abs().max())
        assert largest > 0
        torch.testing.assert_close(actual, expected, rtol=2**-6, atol=2**-8 * largest)

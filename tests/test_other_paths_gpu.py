"""The paths of dense_decode that an H200 does not take by itself, taken on purpose.

Devices without kernels of their own (a library GEMM, then the gate kernel), and GPUs where clusters
of 16 CTAs do not start. Also the activations by themselves, densely over their range.
"""

import pytest
import torch
from cases import FLASH, PRO, Case, draw, ids
from oracle import assert_routing

from cute_router import RouterSpec, Routing, reference
from cute_router.gemm import decode, generic
from cute_router.topk import gate

CASES = [
    Case("generic", *FLASH, 17),
    Case("generic", 300, 264, 5, 8, "softmax"),
    Case("generic", 256, 512, 9, 8, "sigmoid", True, 8, 4),
    Case("generic", 7, 64, 3, 2, renormalize=False, has_bias=False),
    Case("generic", 1024, 512, 2, 32),
]


@pytest.mark.gpu(capability=(8, 0))
@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("case", CASES, ids=ids)
def test_the_generic_backend_routes_as_the_oracle_does(case, batch_invariant):
    x, W, bias = draw(case, "cuda")
    weights = torch.full((case.N, case.top_k), -1.0, device="cuda")
    chosen = torch.full((case.N, case.top_k), -7, dtype=torch.int32, device="cuda")
    factor = case.options["routed_scaling_factor"]
    generic.launch(x, W, bias, weights, chosen, case.spec, factor, batch_invariant=batch_invariant)
    assert_routing(Routing(weights, chosen), x, W, bias, **case.options)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case", [Case("cluster of 8", *FLASH, 5), Case("cluster of 8", *PRO, 64)], ids=ids
)
def test_clusters_of_8_route_as_the_oracle_does(case, monkeypatch):
    monkeypatch.setattr(decode, "max_cluster", lambda device: 8)
    decode.plan_of.cache_clear()
    try:
        inputs = draw(case, "cuda")
        routing = decode.fast(
            *inputs, 1.5, (6, "sqrtsoftplus", True, 1, 1, False, True), None, None
        )
        assert routing is not None
        assert_routing(routing, *inputs, routed_scaling_factor=1.5)
    finally:
        decode.plan_of.cache_clear()


@pytest.mark.gpu(capability=(8, 0))
@pytest.mark.parametrize("scoring", ["sqrtsoftplus", "sigmoid"])
def test_activations_are_right_to_1e_6_over_their_range(scoring):
    logits = torch.linspace(-100, 200, 3_000_001, device="cuda").view(-1, 1)
    spec = RouterSpec(1, 8, 1, scoring, renormalize=False, has_bias=False)
    weights = torch.empty_like(logits)
    chosen = torch.empty_like(logits, dtype=torch.int32)
    gate.launch(logits, None, weights, chosen, spec, 1.0, batch_invariant=False, pdl=True)
    exact = reference.activations(logits.double(), scoring)
    error = (weights.double() - exact).abs()
    # Where fp32 itself is subnormal a result has fewer bits: half a last place there.
    assert (error <= 1e-6 * exact + 2.0**-150).all()


@pytest.mark.gpu(capability=(8, 0))
def test_activations_at_the_edges_are_those_of_the_limit():
    logits = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0, -0.0, -190.0])
    spec = RouterSpec(1, 8, 1, renormalize=False, has_bias=False)
    weights = torch.empty(6, 1, device="cuda")
    chosen = torch.empty(6, 1, dtype=torch.int32, device="cuda")
    gate.launch(
        logits.cuda().view(-1, 1), None, weights, chosen, spec, 1.0, batch_invariant=False, pdl=True
    )
    inf, zero, nan, at_0, at_minus_0, subnormal = weights.view(-1).tolist()
    assert inf == float("inf")
    assert zero == 0
    assert nan != nan
    assert at_0 == at_minus_0 == pytest.approx(0.6931471805599453**0.5, rel=1e-6)
    assert subnormal > 0  # exp(-95): no flush to zero where fp32 has a value

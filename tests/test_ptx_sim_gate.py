"""The gate kernel, simulated from its PTX: the oracle's choice for rows of every kind.

Its logits are given, and not computed: so they are exact, and nothing but the activation rounds.
"""

import math

import oracle
import pytest
import torch
from ptx_sim.launch_gate import simulate_gate
from torch import Tensor

from cute_router import Routing
from cute_router.spec import HIDDEN_MULTIPLE, RouterSpec
from cute_router.topk.config import GateConfig

FACTOR = 1.5
PADDING = 3  # logits between rows
ORDERS = ["eager", "lazy", "random0", "random1"]


def router(E: int, k: int, scoring: str = "sqrtsoftplus", **options) -> RouterSpec:
    return RouterSpec(E, HIDDEN_MULTIPLE, k, scoring, **options)


GROUPS = {"n_group": 8, "topk_group": 4}
ROUTERS = [
    router(256, 6),
    router(384, 6, has_bias=False),
    router(256, 8, "sigmoid", **GROUPS),
    router(300, 8, "softmax"),
    router(256, 8, "softmax", renormalize=False, **GROUPS),
    router(300, 6, n_group=12, topk_group=4, has_bias=False),
    router(64, 4, n_group=32, topk_group=3),
    router(7, 3, "sigmoid", renormalize=False, has_bias=False),
    router(1, 1),
    router(33, 32, "softmax", has_bias=False),
    router(1024, 32),
]
CONFIGS = [GateConfig(spec, "sm_100a") for spec in ROUTERS]
CONFIGS += [GateConfig(spec, arch) for spec in ROUTERS[2:4] for arch in ("sm_80", "sm_90a")]


def name_of(config: GateConfig) -> str:
    s = config.spec
    return f"{config.arch}-E{s.num_experts}-k{s.top_k}-{s.scoring}-{s.topk_group}of{s.n_group}"


def rows(E: int) -> Tensor:
    """Logits (N, E), a row of each kind; between rows is NaN, which no token may see."""
    generator = torch.Generator().manual_seed(E)
    normal = torch.randn(15, E, generator=generator)
    whole = (2 * normal).round()
    normal[1:5] = whole[1:5]  # tied, and tied with a bias
    normal[5] = 0.25
    normal[6] = math.nan
    normal[7, ::3] = math.nan
    normal[8, 1::5] = math.inf
    normal[9, : E // 2] = -math.inf
    normal[10] = -math.inf
    normal[11] = -60 + normal[11]  # the tail of softplus
    normal[12] *= 30
    normal[13] = torch.where(whole[13] > 0, 0.0, -0.0)
    apart = torch.full((len(normal), E + PADDING), math.nan)
    apart[:, :E] = normal
    return apart[:, :E]


def assert_gate(routing: Routing, spec: RouterSpec, logits: Tensor, bias: Tensor | None) -> None:
    """Raise `AssertionError` unless the specification allows it."""
    N = logits.shape[0]
    oracle.assert_well_formed(routing, N, spec.num_experts, spec.top_k)
    exact, all_rows = torch.ones_like(logits, dtype=torch.bool), torch.ones(N, dtype=torch.bool)
    a = oracle.activation_intervals(
        logits.double(), torch.zeros_like(logits, dtype=torch.double), spec.scoring
    )
    scores = oracle.score_intervals(a, bias, exact)
    ids = routing.ids.long()
    oracle.assert_choice(ids, scores, spec.n_group, spec.topk_group, all_rows)
    oracle.assert_weights(
        routing.weights, ids, a, FACTOR, spec.renormalize, ordinary=all_rows, known=all_rows
    )


def bias_of(spec: RouterSpec) -> Tensor | None:
    """Few values, so that scores tie."""
    if not spec.has_bias:
        return None
    return torch.randint(-2, 3, (spec.num_experts,)) / 8


@pytest.mark.parametrize("config", CONFIGS, ids=name_of)
def test_routes_rows_of_every_kind_as_the_oracle_does_in_every_order(config):
    spec = config.spec
    logits, bias = rows(spec.num_experts), bias_of(spec)
    first = simulate_gate(config, logits, bias, factor=FACTOR)
    assert_gate(first, spec, logits, bias)
    for order in ORDERS[1:]:
        again = simulate_gate(config, logits[:6], bias, factor=FACTOR, policy=order)
        assert again.ids.equal(first.ids[:6])
        assert again.weights.equal(first.weights[:6]), f"{order}: not the same bits"


@pytest.mark.parametrize("N", [1, 2, 5, 9])
def test_any_number_of_tokens(N):
    config = CONFIGS[2]
    logits, bias = rows(256)[:N], bias_of(config.spec)
    assert_gate(simulate_gate(config, logits, bias, factor=FACTOR), config.spec, logits, bias)


def test_another_choice_is_refused():
    config = CONFIGS[0]
    logits, bias = rows(256), bias_of(config.spec)
    weights, ids = simulate_gate(config, logits, bias, factor=FACTOR)
    with pytest.raises(AssertionError, match="slot 0"):
        assert_gate(Routing(weights, ids.flip(-1)), config.spec, logits, bias)
    with pytest.raises(AssertionError, match="weight"):
        assert_gate(Routing(weights * 1.001, ids), config.spec, logits, bias)

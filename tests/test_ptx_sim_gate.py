"""The gate kernel, simulated from its PTX: the oracle's choice for rows of every kind.

Its logits are given, and not computed: so they are exact, and nothing but the activation rounds.
"""

import math
from dataclasses import replace

import oracle
import pytest
import torch
from ptx_sim.launch_gate import simulate_gate
from ptx_sim.problem import options_of
from torch import Tensor

from cute_router import Routing, reference
from cute_router.spec import HIDDEN_MULTIPLE, RouterSpec
from cute_router.topk.config import GateConfig

FACTOR = 1.5
ORDERS = ["eager", "lazy", "random0", "random1"]


def router(E: int, k: int, scoring: str = "sqrtsoftplus", **options) -> RouterSpec:
    return RouterSpec(E, HIDDEN_MULTIPLE, k, scoring, **options)


def unless_vectors(config: GateConfig) -> GateConfig:
    """`config`, copying logits one by one where rows are no whole runs of 16 bytes."""
    whole = config.spec.num_experts % config.run == 0
    return replace(config, vector=config.vector and whole)


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
CONFIGS += [GateConfig(ROUTERS[3], "sm_100a", dtype) for dtype in ("float16", "bfloat16")]
CONFIGS += [GateConfig(spec, "sm_90a") for spec in ROUTERS[2:4]]
CONFIGS += [GateConfig(spec, "sm_80", pdl=False) for spec in (ROUTERS[0], *ROUTERS[2:4])]
FEW_LANES = [
    GateConfig(ROUTERS[0], "sm_100a", lanes=4),
    GateConfig(ROUTERS[0], "sm_90a", lanes=8, warps=2),
    GateConfig(ROUTERS[1], "sm_80", lanes=8, pdl=False),
    GateConfig(router(100, 9, "sigmoid"), "sm_100a", lanes=16),
    GateConfig(router(128, 8, "sigmoid"), "sm_100a", "bfloat16", lanes=4),
    GateConfig(router(128, 8, "sigmoid"), "sm_100a", "float16", vector=False, lanes=8),
    GateConfig(router(64, 32), "sm_100a", lanes=8),
    GateConfig(router(8, 8), "sm_90a", "bfloat16", lanes=4),
]
CONFIGS = [unless_vectors(c) for c in CONFIGS + FEW_LANES]
NEAR_TIES = [
    c
    for c in CONFIGS
    if c.spec.has_bias and 8 < c.spec.num_experts < 1024 and (c.lanes < 32 or c.arch == "sm_100a")
]


def name_of(config: GateConfig) -> str:
    s = config.spec
    router = f"E{s.num_experts}-k{s.top_k}-{s.scoring}-{s.topk_group}of{s.n_group}"
    return f"{config.arch}-{router}-{config.dtype}-{config.lanes}" + "-apart" * (not config.vector)


def rows(config: GateConfig) -> Tensor:
    """Logits (N, E), a row of each kind."""
    E = config.spec.num_experts
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
    return apart(config, normal)


def apart(config: GateConfig, logits: Tensor) -> Tensor:
    """Logits of the kernel's type; between rows is NaN, which no token may see."""
    N, E = logits.shape
    rows = torch.full((N, E + (config.run if config.vector else 3)), math.nan)
    rows[:, :E] = logits
    return rows.to(getattr(torch, config.dtype))[:, :E]


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
    logits, bias = rows(config), bias_of(spec)
    first = simulate_gate(config, logits, bias, factor=FACTOR)
    assert_gate(first, spec, logits, bias)
    for order in ORDERS[1:]:
        again = simulate_gate(config, logits[:6], bias, factor=FACTOR, policy=order)
        assert again.ids.equal(first.ids[:6])
        assert again.weights.equal(first.weights[:6]), f"{order}: not the same bits"


@pytest.mark.parametrize("N", [1, 2, 5, 9])
def test_any_number_of_tokens(N):
    config = CONFIGS[2]
    logits, bias = rows(config)[:N], bias_of(config.spec)
    assert_gate(simulate_gate(config, logits, bias, factor=FACTOR), config.spec, logits, bias)


def near_ties(config: GateConfig) -> tuple[Tensor, list[Tensor]]:
    """Logits (N, E), and biases for them that make scores tie or differ in their last bits.

    An activation plus a multiple of its last place is exact in fp32, as it is in fp64, while the
    exponent stays the same. So both order such scores alike, however far apart the words of `lanes`
    can tell them: those of equal logits, by the bias alone; the others are far apart.
    """
    spec, E, k = config.spec, config.spec.num_experts, config.spec.top_k
    generator = torch.Generator().manual_seed(E)

    def whole(high: int) -> Tensor:
        """Whole numbers from 0 up to `high`."""
        return torch.randint(0, high + 1, (E,), generator=generator)

    two = torch.where(whole(1) > 0, 1.5, 3.0)
    few = torch.where(whole(E) < k - 1, 3.0, 1.5)
    logits = torch.stack([torch.full((E,), 1.5), torch.full((E,), 3.0), two, few, *[two] * 5])
    logits[4, ::3] = math.nan
    logits[5, ::3] = -math.inf
    logits[6, whole(E) > k - 1] = math.nan  # about as many numbers as are chosen
    logits[7, whole(E) > k - 1] = -math.inf
    logits[8] = -math.inf

    a = reference.activations(logits, spec.scoring)
    highest = a[a.isfinite()].max().log2().floor()
    step = torch.exp2(highest - 23) * (4 if spec.n_group > 1 else 1)  # sums of two are exact too
    position, apart = torch.arange(E), 1024
    one_lane = position // config.run % config.lanes == 1
    lead = torch.where(whole(E) < k - 1, 2 * apart, 0)
    patterns = [
        *(whole(high) for high in (0, 1, 2, 30, apart, 4 * apart)),
        position,  # every expert better than those before
        E - position,
        lead + whole(1),
        lead + position,
        whole(2) + apart // 2 * whole(2),
        torch.where(one_lane, apart + whole(3), 0),  # the best are all one lane's
    ]
    biases = [(step * pattern).float() for pattern in patterns]
    assert (a + max(map(torch.max, biases))).nan_to_num().max().log2().floor() == highest
    special = biases[1].clone()
    special[::5], special[1::7], special[2::9] = math.inf, -math.inf, math.nan
    return logits, [*biases, special]


@pytest.mark.parametrize("config", NEAR_TIES, ids=name_of)
def test_scores_that_tie_or_differ_in_the_last_bit_are_ordered_exactly(config):
    spec = config.spec
    logits, biases = near_ties(config)
    logits = apart(config, logits)
    for i, bias in enumerate(biases):
        wanted = reference.route_logits(
            logits, bias, routed_scaling_factor=FACTOR, **options_of(spec)
        )
        order = ORDERS[i % len(ORDERS)]
        weights, ids = simulate_gate(config, logits, bias, factor=FACTOR, policy=order)
        wrong = (ids != wanted.ids).any(-1).nonzero()
        assert not len(wrong), f"bias {i}, {order}, tokens {wrong.flatten().tolist()}"
        torch.testing.assert_close(
            weights, wanted.weights, rtol=1e-5, atol=1e-5, equal_nan=True, msg=f"bias {i}"
        )


def test_another_choice_is_refused():
    config = CONFIGS[0]
    logits, bias = rows(config), bias_of(config.spec)
    weights, ids = simulate_gate(config, logits, bias, factor=FACTOR)
    with pytest.raises(AssertionError, match="slot 0"):
        assert_gate(Routing(weights, ids.flip(-1)), config.spec, logits, bias)
    with pytest.raises(AssertionError, match="weight"):
        assert_gate(Routing(weights * 1.001, ids), config.spec, logits, bias)

"""Kernels with extras, simulated from their PTX: the specification's results, whatever is added.

Simulated as in `test_ptx_sim.py`: functionally, on a CPU. Whatever a kernel touches outside an
array, or before it has waited for the kernel ahead, is an error there.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from extras_cases import BIASES, KINDS, LOGITS, draw_extras
from ptx_sim import launch_hash
from ptx_sim.launch import simulate
from ptx_sim.launch_gate import simulate_gate
from ptx_sim.launch_prefill import simulate_prefill
from ptx_sim.problem import WIDE, chosen, exact_inputs, options_of

from cute_router import Extras, Routing, reference
from cute_router.gemm.config import DecodeConfig
from cute_router.gemm.config import can_implement as can_implement_decode
from cute_router.gemm.prefill_config import PrefillConfig
from cute_router.gemm.prefill_config import can_implement as can_implement_prefill
from cute_router.prefill_heuristics import with_extras
from cute_router.spec import HIDDEN_MULTIPLE, MAX_EXPERTS, RouterSpec
from cute_router.topk.config import GateConfig
from cute_router.topk.hash_config import HashConfig, HashGateConfig, HashLogitsConfig

pytestmark = pytest.mark.filterwarnings("ignore:This static loop has")

FACTOR = 1.5
SOME = ["valid", "second_bias", "logits", "all", "all, packed"]
GROUPS = {"top_k": 8, "scoring": "sigmoid", "n_group": 8, "topk_group": 4}
SOFTMAX = {"scoring": "softmax", "top_k": 8}
NO_BIAS = {"has_bias": False}


def cases(configs: list[tuple[Any, int]], kinds: list[str]) -> list[Any]:
    """Every kind of extras on the first configuration, SOME on the others."""
    return [
        pytest.param(config, N, kind, id=f"{i}-{config.arch}-N{N}-{kind}")
        for i, (config, N) in enumerate(configs)
        for kind in (kinds if i == 0 else SOME)
        if kind in kinds
    ]


def assert_as_wanted(routing: Routing, wanted: Routing, extras: Extras) -> None:
    """Equal ids; weights as near as their form can hold them, and 0 exactly where ids are -1."""
    ids, expected = (r.ids >> 16 if extras.packed else r.ids for r in (routing, wanted))
    assert routing.ids.dtype == wanted.ids.dtype
    assert torch.equal(ids, expected)
    tolerance = 2.0**-7 if extras.packed else 1e-5
    torch.testing.assert_close(
        routing.weights.float(),
        wanted.weights.float(),
        rtol=tolerance,
        atol=1e-5,
        equal_nan=True,
    )
    if extras.shared_experts and not extras.packed:
        shares = {0.0, torch.tensor(extras.shared_weight).item()}
        assert set(routing.weights[:, -extras.shared_experts :].unique().tolist()) <= shares


def with_nan_padding(rows: torch.Tensor, extras: Extras) -> torch.Tensor:
    """The rows, NaN where they are no tokens."""
    valid = reference.valid_rows(rows.shape[0], extras, rows.device)
    return rows.masked_fill(~valid[:, None], torch.nan)


DECODE = [
    (chosen(256, 11), 11),
    (chosen(300, 19, {"n_group": 12, "topk_group": 4}, max_cluster=8), 19),
    (chosen(64, 9, SOFTMAX), 9),
    (chosen(384, 5, NO_BIAS), 5),
    (chosen(300, 50), 50),
    (chosen(300, 7, arch="sm_90a"), 7),
    (chosen(64, 18, GROUPS | NO_BIAS, arch="sm_90a"), 18),
    (DecodeConfig(RouterSpec(130, 8), "sm_100a", 64, 16, 2, 1, "start", False), 20),
]


@pytest.mark.parametrize(("config", "N", "kind"), cases(DECODE, list(KINDS)))
def test_decode(config, N, kind):
    spec = config.spec
    draws = [(False, "random0"), (True, "lazy")]
    if not WIDE and config != DECODE[0][0]:  # the kinds take turns
        draws = [draws[list(KINDS).index(kind) % len(draws)]]
    for ties, order in draws:
        extras = draw_extras(kind, N, spec.num_experts, seed=ties)
        config = replace(config, extras=extras.spec)
        can_implement_decode(config)
        x, W, bias = exact_inputs(spec, N, ties=ties)
        x = with_nan_padding(x, extras)
        routing = simulate(config, x, W, bias, policy=order, factor=FACTOR, extras=extras)
        options = {**options_of(spec), "routed_scaling_factor": FACTOR, "extras": extras}
        assert_as_wanted(routing, reference.route(x, W, bias, **options), extras)
        if extras.out_logits is not None:
            expected = reference.logits(x, W).float()
            torch.testing.assert_close(extras.out_logits, expected, rtol=0, atol=0, equal_nan=True)


V3 = {"n_group": 8, "topk_group": 4}
PREFILL = [
    (PrefillConfig(RouterSpec(300, 200), "sm_90a", 128, 2, 1, 2, 1), 150),
    (PrefillConfig(RouterSpec(64, 264), "sm_90a", 64, 1, 2, 2, 1), 100),
    (PrefillConfig(RouterSpec(144, 128, 32, has_bias=False), "sm_90a", 64, 4, 2, 2, 1, 8), 70),
    (PrefillConfig(RouterSpec(300, 200, 8, "softmax"), "sm_90a", 64, 2, 2, 2, lanes=32), 65),
    (PrefillConfig(RouterSpec(300, 264), "sm_100a", 128, 2, 2, 2, 1), 150),
    (PrefillConfig(RouterSpec(256, 72, 8, "softmax", **V3), "sm_100a", 128, lanes=32), 33),
    (PrefillConfig(RouterSpec(300, 72), "sm_90a", 128, 2, 1, 2, 1, 4, shortlists=True), 150),
    (PrefillConfig(RouterSpec(100, 72), "sm_100a", 128, 1, 1, 2, 1, 4, shortlists=True), 150),
]


@pytest.mark.parametrize(("config", "N", "kind"), cases(PREFILL, list(KINDS)))
def test_prefill(config, N, kind):
    spec = config.spec
    extras = draw_extras(kind, N, spec.num_experts)
    config = with_extras(config, extras.spec)
    can_implement_prefill(config)
    x, W, bias = exact_inputs(spec, N, ties=True)
    x = with_nan_padding(x, extras)
    routing = simulate_prefill(config, x, W, bias, policy="random0", factor=FACTOR, extras=extras)
    options = {**options_of(spec), "routed_scaling_factor": FACTOR, "extras": extras}
    assert_as_wanted(routing, reference.route(x, W, bias, **options), extras)
    if extras.out_logits is not None:
        expected = reference.logits(x, W).float()
        torch.testing.assert_close(extras.out_logits, expected, rtol=0, atol=0, equal_nan=True)


def router(E: int, k: int, scoring: str = "sqrtsoftplus", **options: Any) -> RouterSpec:
    return RouterSpec(E, HIDDEN_MULTIPLE, k, scoring, **options)


GATES = [
    (GateConfig(router(256, 6), "sm_100a", lanes=8), 15),
    (GateConfig(router(300, 6, has_bias=False), "sm_90a"), 9),
    (GateConfig(router(256, 8, "sigmoid", **V3), "sm_100a"), 7),
    (GateConfig(router(100, 8, "softmax"), "sm_80", pdl=False), 7),
    (GateConfig(router(128, 8), "sm_100a", "bfloat16", lanes=4), 20),
    (GateConfig(router(64, 32), "sm_100a", lanes=8), 9),
]


@pytest.mark.parametrize(
    ("config", "N", "kind"), cases(GATES, [kind for kind in KINDS if kind != "logits"])
)
def test_gate(config, N, kind):
    spec = config.spec
    extras = draw_extras(kind, N, spec.num_experts, without=LOGITS)
    config = replace(config, extras=extras.spec)
    whole = torch.randint(-6, 7, (N, spec.num_experts)) / 2  # tied often; equal scores leave doubts
    logits = with_nan_padding(whole, extras).to(getattr(torch, config.dtype))
    bias = torch.randint(-2, 3, (spec.num_experts,)) / 8 if spec.has_bias else None
    routing = simulate_gate(config, logits, bias, policy="lazy", factor=FACTOR, extras=extras)
    options = {**options_of(spec), "routed_scaling_factor": FACTOR, "extras": extras}
    assert_as_wanted(routing, reference.route_logits(logits, bias, **options), extras)


# --- by a table, or a record --------------------------------------------------------------------

OF_TABLES = [kind for kind in KINDS if kind not in ("second_bias", "logits")]
E, K, N = 40, 264, 15


def spec_of(scoring: str, renormalize: bool = True, k: int = 6, hidden: int = K) -> RouterSpec:
    return RouterSpec(MAX_EXPERTS, hidden, k, scoring, renormalize, has_bias=False)


def table_of(rows: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    """Experts, and everything that is none."""
    table = torch.randint(E, (rows, k), dtype=dtype)
    table[3] = table[3, 0]
    table[5] = -1
    table[6, -1], table[7, 0] = E, torch.iinfo(dtype).max
    table[8, 0] = (1 << 32) + 3 if dtype is torch.int64 else 3
    return table


HASH = [
    HashGateConfig(spec_of("sqrtsoftplus"), "sm_100a", 64, 32),
    HashGateConfig(spec_of("sigmoid", False, 32), "sm_90a", 32, 64),
    HashLogitsConfig(spec_of("softmax", False, 8, 8), "sm_90a", 64, 32),
]
REPLAY = [
    HashGateConfig(spec_of("sqrtsoftplus"), "sm_100a", 0, 32),
    HashGateConfig(spec_of("sigmoid", False, 1), "sm_90a", 0, 32),
    HashLogitsConfig(spec_of("softmax", True, 8, 8), "sm_100a", 0, 32),
    HashLogitsConfig(spec_of("sqrtsoftplus", True, 8, 8), "sm_80", 0, 32, dtype="bfloat16"),
]
INTEGERS = {32: torch.int32, 64: torch.int64}


def products(config: HashGateConfig | HashLogitsConfig) -> tuple[torch.Tensor, ...]:
    """x and W, or logits, as the kernel takes them."""
    if isinstance(config, HashGateConfig):
        x, W, _ = exact_inputs(RouterSpec(E, config.spec.hidden_size, 1), N, ties=False)
        return x, W
    return (torch.randn(N, E).to(getattr(torch, config.dtype)),)


@pytest.mark.parametrize("kind", OF_TABLES)
@pytest.mark.parametrize("config", HASH, ids=lambda c: f"{type(c).__name__}-{c.spec.scoring}")
def test_gated_hash_routing(config, kind):
    spec = config.spec
    extras = draw_extras(kind, N, E, without=LOGITS + BIASES)
    config = replace(config, extras=extras.spec)
    tokens = torch.arange(-2, N - 2, dtype=INTEGERS[config.token_bits])
    table = table_of(N - 4, spec.top_k, INTEGERS[config.table_bits])
    rows, *W = products(config)
    given = (with_nan_padding(rows, extras), *W)
    routing = launch_hash.simulate(config, tokens, table, *given, factor=FACTOR, extras=extras)
    # Of given logits too: those of the identity are themselves.
    x, W = given if W else (given[0], torch.eye(E))
    wanted = reference.hash_route(
        tokens,
        table,
        x=x.nan_to_num(7.0),  # of rows that do not count; the identity would spread their NaN
        W=W,
        routed_scaling_factor=FACTOR,
        scoring=spec.scoring,
        renormalize=spec.renormalize,
        extras=extras,
    )
    assert_as_wanted(routing, wanted, extras)


@pytest.mark.parametrize("kind", OF_TABLES)
@pytest.mark.parametrize(
    "config", REPLAY, ids=lambda c: f"{type(c).__name__}-{c.arch}-{c.spec.scoring}"
)
def test_a_replay_of_recorded_ids(config, kind):
    spec = config.spec
    extras = draw_extras(kind, N, E, without=LOGITS + BIASES)
    config = replace(config, extras=extras.spec)
    record = table_of(N, spec.top_k, torch.int32)
    rows, *W = products(config)
    rows = with_nan_padding(rows, extras)
    routing = launch_hash.simulate(config, None, record, rows, *W, factor=FACTOR, extras=extras)
    logits = reference.logits(rows, W[0]) if W else rows
    wanted = reference.route_logits(
        logits,
        top_k=spec.top_k,
        routed_scaling_factor=FACTOR,
        scoring=spec.scoring,
        renormalize=spec.renormalize,
        extras=replace(extras, fixed_ids=record),
    )
    assert_as_wanted(routing, wanted, extras)


@pytest.mark.parametrize("kind", [kind for kind in OF_TABLES if "shared" not in kind])
@pytest.mark.parametrize(
    ("arch", "k", "bits"), [("sm_100a", 6, 32), ("sm_90a", 1, 64), ("sm_80", 32, 32)]
)
def test_uniform_hash_routing(arch, k, bits, kind):
    extras = replace(draw_extras(kind, 2 * N, E, without=LOGITS + BIASES), shared_experts=0)
    config = HashConfig(k, arch, 64, bits, 1, arch != "sm_80", extras.spec)
    tokens, table = torch.arange(-2, 2 * N - 2), table_of(2 * N - 4, k, INTEGERS[bits])
    routing = launch_hash.simulate(config, tokens, table, factor=FACTOR, extras=extras)
    options = {"routed_scaling_factor": FACTOR, "extras": extras}
    assert_as_wanted(routing, reference.hash_route(tokens, table, **options), extras)

"""The sm_100a kernels, simulated from their PTX under eager, lazy and random asynchronous order.

Simulated means functionally, on a CPU, by the PTX ISA as `ptx_sim` reads it; no GPU takes part.
CUTE_ROUTER_PTX_SIM=wide runs more routers, and each under more random orders.
"""

import oracle
import pytest
import torch
from ptx_sim.launch import simulate
from ptx_sim.problem import WIDE, assert_same, chosen, exact_inputs, expected, options_of, shortened

from cute_router.gemm.config import DecodeConfig
from cute_router.spec import RouterSpec

RANDOM = [f"random{seed}" for seed in range(20 if WIDE else 2)]
ORDERS = ["eager", "lazy", *RANDOM]

V3_GROUPS = {"top_k": 8, "scoring": "sigmoid", "n_group": 8, "topk_group": 4}
SOFTMAX = {"scoring": "softmax", "top_k": 8}

# (E, N, options of the router, options of the heuristics): every bucket and every E, all that the
# heuristics choose there; N fills no tile.
CHOSEN = [
    *[(E, N, {}, {}) for E in (64, 256, 300, 384) for N in (3, 27, 61)],
    *[(E, N, {}, {}) for E, N in ((256, 45), (384, 90), (512, 90), (256, 101))],
    (144, 1, {"top_k": 1, "renormalize": False}, {}),
    (256, 13, {"top_k": 32}, {}),
    (256, 16, {"has_bias": False}, {"batch_invariant": True}),
    (256, 5, V3_GROUPS, {}),
    (256, 64, V3_GROUPS, {}),
    (300, 19, {"n_group": 12, "topk_group": 4}, {"max_cluster": 8}),
    (64, 9, SOFTMAX, {}),
    (384, 33, SOFTMAX, {}),
    (256, 11, {}, {"hidden_size": 16384, "max_cluster": 8}),  # a ring
    (256, 2, {}, {"hidden_size": 128}),  # a cluster of 2
    (256, 17, {}, {"hidden_size": 256}),  # a cluster of 4
]
if WIDE:
    CHOSEN += [
        (E, N, options, target)
        for E in (7, 64, 144, 256, 300, 384, 512)
        for N in (1, 4, 8, 15, 17, 32, 47, 64)
        for options in ({}, {"top_k": 4, "scoring": "softmax"}, {"scoring": "sigmoid"})
        for target in ({}, {"max_cluster": 8}, {"hidden_size": 16384, "max_cluster": 8})
    ]

# Configurations that can be asked for and that the heuristics do not choose: (config, N).
OTHERS = [
    (DecodeConfig(RouterSpec(256, 512), "sm_100a", 128, 16, 4, 2), 13),
    (DecodeConfig(RouterSpec(300, 512), "sm_100a", 128, 64, 4, 2), 50),
    (DecodeConfig(RouterSpec(256, 1000, **SOFTMAX), "sm_100a", 128, 32, 4, 2), 33),
    (DecodeConfig(RouterSpec(64, 1000), "sm_100a", 64, 64, 2, 3), 70),
    (DecodeConfig(RouterSpec(130, 8), "sm_100a", 64, 16, 2, 1, "start", False), 20),
]

# The same seam, epilogue and exchange around WGMMA: what can be compared with an H200.
HOPPER = [
    (chosen(256, 5, arch="sm_90a"), 5),
    (chosen(300, 29, arch="sm_90a"), 29),
    (chosen(64, 50, SOFTMAX, arch="sm_90a"), 50),
    (chosen(384, 61, arch="sm_90a"), 61),
    (chosen(512, 90, arch="sm_90a"), 90),
    (DecodeConfig(RouterSpec(256, 1000), "sm_90a", 128, 8, 4, 2), 7),
]


def name_of(case: tuple) -> str:
    parts = [f"E{case[0]}", f"N{case[1]}"]
    parts += [f"{key}={value}" for options in case[2:] for key, value in options.items()]
    return "-".join(parts)


def check_orders(config: DecodeConfig, N: int, orders: list[str]) -> None:
    """Right answers in every order, and the same bits in all.

    Orders alternate between tied and tie-free data; all run on both if there is time.
    """
    for ties in (False, True):
        inputs = exact_inputs(config.spec, N, ties=ties)
        wanted, first = expected(config.spec, *inputs), None
        for order in orders if WIDE else orders[ties::2]:
            routing = simulate(config, *inputs, policy=order)
            assert_same(routing, wanted)
            first = first or routing
            assert torch.equal(routing.weights, first.weights), f"{order}: not the same bits"


@pytest.mark.parametrize("case", CHOSEN, ids=name_of)
def test_chosen_configurations_are_right_in_every_order(case):
    E, N, options, target = case
    check_orders(chosen(E, N, options, **target), N, ORDERS)


@pytest.mark.parametrize(("config", "N"), OTHERS)
def test_other_configurations_are_right_in_every_order(config, N):
    check_orders(config, N, ORDERS)


@pytest.mark.parametrize(("config", "N"), HOPPER)
def test_sm_90a_builds_are_right_in_the_simulator(config, N):
    check_orders(config, N, ["eager", "lazy", "random0"])


@pytest.mark.parametrize("E", [256, 300])
def test_ordinary_data_is_within_the_specification(E):
    config = chosen(E, 24)
    x = torch.randn(24, config.spec.hidden_size).bfloat16()
    W = torch.randn(E, config.spec.hidden_size).bfloat16() / 32
    bias = torch.randn(E) / 8
    routing = simulate(config, x, W, bias, policy="random7", factor=2.5)
    options = options_of(config.spec)
    oracle.assert_routing(routing, x, W, bias, routed_scaling_factor=2.5, **options)


def test_nan_inf_and_zero_rows_are_within_the_specification():
    config = chosen(256, 6)
    x, W, bias = exact_inputs(config.spec, 6, ties=True)
    x[0, 3] = torch.nan
    x[1, 5] = torch.inf
    x[2] = 0
    x[3] = 1e4
    routing = simulate(config, x, W, bias, policy="lazy")
    oracle.assert_routing(routing, x, W, bias, **options_of(config.spec))


def test_full_hidden_size_of_a_tuned_router():
    config = shortened(chosen(256, 16), 7)  # K = 7168 - 24
    inputs = exact_inputs(config.spec, 9, ties=True)
    routing = simulate(config, *inputs, policy="random1")
    assert_same(routing, expected(config.spec, *inputs))

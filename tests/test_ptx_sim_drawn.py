"""Kernels of configurations that nobody chose, simulated from their PTX: drawn at random.

All that `can_implement` lets through is to be right, in eager order, which looks for races, and in
another one. CUTE_ROUTER_PTX_SIM=wide draws more; a seed is a configuration's name for good.
"""

import random

import pytest
import torch
from oracle import assert_gated
from ptx_sim.launch import simulate
from ptx_sim.launch_prefill import simulate_prefill
from ptx_sim.problem import WIDE, exact_inputs, options_of

from cute_router import reference
from cute_router.gemm.config import TILE_K, DecodeConfig, runs
from cute_router.gemm.config import can_implement as can_decode
from cute_router.gemm.prefill_config import PrefillConfig
from cute_router.gemm.prefill_config import can_implement as can_prefill
from cute_router.spec import RouterSpec

SEEDS = range(300 if WIDE else 4)
GROUPS = {"n_group": 8, "topk_group": 4}
SPLITS = [(e, k) for e in range(1, 9) for k in range(1, 17) if e * k <= 16]


def drawn_spec(draw: random.Random, k_blocks: int) -> RouterSpec:
    """A router whose K ends within the last of these blocks."""
    E = draw.choice([64, 96, 128, 144, 256, 300, 384, draw.randint(7, 400)])
    K = TILE_K * k_blocks - 8 * draw.randint(0, 7)
    top_k = draw.choice([1, 6, 6, 8, draw.randint(1, min(E, 32))])
    scoring = draw.choice(["sqrtsoftplus", "sqrtsoftplus", "sigmoid", "softmax"])
    groups = GROUPS if E % 8 == 0 and top_k <= E // 2 and draw.random() < 0.15 else {}
    flags = draw.random() < 0.8, draw.random() < 0.8
    return RouterSpec(E, K, min(E, top_k), scoring, *flags, **groups)


def drawn_prefill(draw: random.Random) -> PrefillConfig:
    """Whether it can be launched or not."""
    arch = draw.choice(["sm_90a", "sm_90a", "sm_100a"])
    split_e, split_k = draw.choice(SPLITS)
    return PrefillConfig(
        drawn_spec(draw, split_k * draw.randint(1, 5)),
        arch,
        draw.choice([64, 64, 128]),
        split_e,
        split_k,
        draw.randint(2, 4),
        clusters=1,
        lanes=draw.choice([4, 8, 16, 32]),
        overlay=draw.random() < 0.5,
        shortlists=draw.random() < 0.3,
    )


def drawn_decode(draw: random.Random) -> DecodeConfig:
    """Whether it can be launched or not."""
    split_k, k_blocks = draw.choice([2, 4, 8, 16]), draw.randint(1, 4)
    return DecodeConfig(
        drawn_spec(draw, split_k * k_blocks),
        draw.choice(["sm_90a", "sm_100a"]),
        draw.choice([64, 128]),
        draw.choice([8, 16, 32, 64]),
        split_k,
        draw.randint(1, k_blocks),
        draw.choice(["start", "wait", "product"]),
        exclusive=draw.random() < 0.2,
    )


def first_that_runs(make, can_implement, draw: random.Random):
    """The first configuration that can be launched."""
    while True:
        try:
            config = make(draw)
        except ValueError:  # no router is like that
            continue
        if runs(config, can_implement):
            return config


def check(simulated, config, N: int, draw: random.Random) -> None:
    """Right in eager order and in another, with the same bits.

    Among so many routers there are scores that are closer than fp32 can tell.
    """
    x, W, bias = exact_inputs(config.spec, N, ties=draw.random() < 0.5)
    other = draw.choice(["lazy", f"random{draw.randint(0, 99)}"])
    eager, again = (simulated(config, x, W, bias, policy=order) for order in ("eager", other))
    assert_gated(eager, reference.logits(x, W).float(), bias, **options_of(config.spec))
    assert all(map(torch.equal, eager, again)), f"{other}: not the same bits"


@pytest.mark.parametrize("seed", SEEDS)
def test_prefill_of_any_configuration(seed):
    draw = random.Random(seed)
    config = first_that_runs(drawn_prefill, can_prefill, draw)
    check(simulate_prefill, config, draw.randint(1, 5 * config.tile_tokens // 2), draw)


@pytest.mark.parametrize("seed", SEEDS)
def test_decode_of_any_configuration(seed):
    draw = random.Random(seed)
    config = first_that_runs(drawn_decode, can_decode, draw)
    check(simulate, config, draw.randint(1, 100), draw)

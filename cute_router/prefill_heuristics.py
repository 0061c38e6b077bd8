"""Which configuration serves a prefill: a pure function, by arithmetic that measurements correct.

Nothing here looks at a GPU: the caller says for which target, and how many SMs it has.

    cycles = turns * (K blocks * max(multiply, load) + exchange + choice) + start

of the CTA that has most to do. What wins is the configuration with the fewest; of equals the first.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from cute_router.gemm.config import MAX_SMEM, TILE_K, ceil_div
from cute_router.gemm.prefill_config import (
    MAX_MMA_EXPERTS,
    PrefillConfig,
    can_implement,
)
from cute_router.spec import RouterSpec
from cute_router.topk.config import WARP, at_most

SMS = 132
# Clusters that run at once, by their size, of CTAs that fill an SM each. An H200 says so for 2 and
# 8; for 4 it follows from where its SMs are. One cluster more would take a turn of its own.
AT_ONCE = {1: 132, 2: 66, 4: 30, 8: 15}
MAX_STAGES = 8
FEW_STAGES = 4  # with fewer, loads do not keep ahead

MACS = 2048  # of one SM in a cycle, bf16; on sm_90
INGRESS = 64  # bytes that an SM takes in a cycle
SUPPLY = 28  # bytes that the L2 gives in a cycle to each of SMS; multicast ones count once
EXCHANGED = 24  # bytes of logits that an SM sends in a cycle
CHOOSING = 0.3  # cycles for each logit that a CTA looks at
ADDING = 0.05  # cycles for each partial sum of one, beyond the first
START = 4000  # cycles: launch, first loads, last stores


def prefill_config(
    spec: RouterSpec, N: int, arch: str, sms: int = SMS, *, pdl: bool = True
) -> PrefillConfig:
    """The configuration of `dense_prefill` for N tokens on `arch`."""
    found = list(candidates(spec, arch, sms, pdl=pdl))
    return min(found, key=lambda config: cycles(config, N))


def token_bucket(N: int) -> int:
    """The batch sizes that share a configuration: a power of two from 64, or half way to it."""
    power = max(64, 1 << (N - 1).bit_length())
    less = power // 4 * 3
    return less if 64 < N <= less else power


def candidates(
    spec: RouterSpec, arch: str, sms: int = SMS, *, pdl: bool = True
) -> Iterator[PrefillConfig]:
    """Configurations worth measuring."""
    hopper = arch == "sm_90a"
    for tile_tokens, split_e, split_k, team in product(
        (128, 64) if hopper else (128,), (1, 2, 4, 8), (1, 2, 4, 8), (1, 2) if hopper else (1,)
    ):
        cluster = team * split_e * split_k
        if cluster not in AT_ONCE or split_k > ceil_div(spec.hidden_size, TILE_K):
            continue
        config = PrefillConfig(
            spec,
            arch,
            tile_tokens,
            split_e,
            split_k,
            stages=2,
            clusters=max(1, AT_ONCE[cluster] * sms // SMS),
            multicast=hopper and split_e > 1,
            team=team,
            pdl=pdl,
        )
        config = replace(config, lanes=lanes_of(config))
        if config.tile_experts <= MAX_MMA_EXPERTS and config.smem_bytes <= MAX_SMEM:
            config = deepest(config)
            can_implement(config)
            yield config


def lanes_of(config: PrefillConfig) -> int:
    """Lanes for each token: 8, or as many as there are while tokens are few."""
    if not config.by_words:
        return WARP
    fewest = ceil_div(WARP, config.owned)
    spare = min(WARP, config.epilogue_threads // config.owned)
    return max(fewest, at_most(max(8, spare), config.spec.num_experts))


def deepest(config: PrefillConfig) -> PrefillConfig:
    """`config` with as many stages as fit."""
    room = MAX_SMEM - replace(config, stages=0).smem_bytes
    return replace(config, stages=min(MAX_STAGES, room // config.tile_bytes))


def cycles(config: PrefillConfig, N: int) -> float:
    """An estimate of the time of a launch."""
    c = config
    turns = ceil_div(ceil_div(N, c.team * c.tile_tokens), c.clusters)
    multiply = c.tile_tokens * c.tile_experts * TILE_K / MACS
    x_bytes, w_bytes = (rows * TILE_K * 2 for rows in (c.tile_tokens, c.tile_experts))
    supply = x_bytes / (c.split_e if c.multicast else 1) + w_bytes / c.team
    active = min(c.clusters, ceil_div(N, c.team * c.tile_tokens)) * c.cluster
    load = max(c.tile_bytes / INGRESS, supply / (SUPPLY * SMS / active))
    block = max(multiply, load) * max(1.0, FEW_STAGES / c.stages)
    exchange = c.tile_tokens * c.tile_experts * 4 / EXCHANGED
    choice = c.owned * c.spec.num_experts * (CHOOSING + ADDING * (c.split_k - 1))
    return turns * (c.k_blocks * block + exchange + choice) + START

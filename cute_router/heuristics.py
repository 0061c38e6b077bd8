"""Which configuration serves a router at a batch size: a pure function, by measurement.

Nothing here looks at a GPU: the caller says for which target, and whether clusters of 16 start.
What was measured on the GPU at hand comes before it (`tuning`).
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from math import log2

from cute_router.arch import CLUSTERS_AT_ONCE, MAX_CLUSTER
from cute_router.extras import PLAIN, ExtrasSpec
from cute_router.gemm.config import (
    GROUP,
    MAX_SMEM,
    TILE_K,
    TRIGGERS,
    DecodeConfig,
    can_implement,
    ceil_div,
    runs,
)
from cute_router.spec import RouterSpec

TOKEN_BUCKETS = (2, 8, 16, 32, 48, 64, 96, 128)
FEWEST, MAX_BUCKET = TOKEN_BUCKETS[0], TOKEN_BUCKETS[-1]
ONE_TILE = 32  # tokens; more are worth several token tiles
WAVE_ALONE = 16 * CLUSTERS_AT_ONCE[16]  # CTAs at once in clusters of 16, each alone on its SM
SMALL_WEIGHTS = 4 << 20  # bytes of W

# The model of more than `ONE_TILE` tokens. All in cycles of an SM, or bytes in one.
RESERVED = 1 << 10  # bytes of shared memory of each CTA for the system
MOST_ON_AN_SM = 4  # CTAs
INGRESS = 34  # bytes of operands into a CTA
RING = 4 / 3  # times as long, where not all K blocks have room
EXCHANGED = 10  # bytes of partial sums out of a CTA
CROWD = 1.75  # of all that, for each cluster that runs beside one
OWNED = 200  # for each token that a CTA owns
START, CLUSTER_START = 2200, 360  # of a cluster, and for each doubling of it


def token_bucket(N: int) -> int:
    """The batch sizes that share a configuration, by the largest.

    Batches beyond the last take more tiles of it.
    """
    return next((bucket for bucket in TOKEN_BUCKETS if bucket >= N), MAX_BUCKET)


def decode_config(
    spec: RouterSpec,
    N: int,
    arch: str,
    *,
    max_cluster: int = MAX_CLUSTER,
    batch_invariant: bool = False,
    pdl: bool = True,
    extras: ExtrasSpec = PLAIN,
) -> DecodeConfig:
    """The configuration of `dense_decode` for N tokens on `arch`, with what calls have beside.

    With `batch_invariant` it does not depend on N: a token's sums are then always taken in the
    same order, whatever its batch. `max_cluster` is 16, or 8 where clusters of 16 do not start.
    """
    bucket = token_bucket(N)
    tile_tokens = 16 if batch_invariant else min(max(bucket, 8), ONE_TILE)
    if arch != "sm_90a":
        tile_tokens = max(tile_tokens, 16)  # tcgen05 with N = 8 is not relied upon
    most = largest_split(spec.hidden_size, max_cluster)
    config = fitting(DecodeConfig(spec, arch, 64, tile_tokens, most, 0, pdl=pdl))
    if bucket > ONE_TILE and not batch_invariant:
        config = min(several_tiles(config), key=lambda shape: cycles(shape, bucket))
    config = fitting(replace(config, extras=extras))  # chosen without: they change no sums
    return config if batch_invariant else beside_its_neighbours(config, bucket)


def fitting(config: DecodeConfig) -> DecodeConfig:
    """`config` with as many stages as fit; with fewer tokens where not even two do."""
    bare = replace(config, stages=0)
    while bare.smem_bytes + 2 * bare.tile_bytes > MAX_SMEM:  # many owned columns, large k
        bare = replace(bare, tile_tokens=bare.tile_tokens // 2)
    return resident(bare)


def several_tiles(own: DecodeConfig) -> list[DecodeConfig]:
    """`own`, and what else may suit several token tiles: wider or narrower ones, less split."""
    found = [own]
    for tile_tokens, split_k in product((16, 32, 64), (4, 8, 16)):
        shape = resident(replace(own, tile_tokens=tile_tokens, split_k=split_k))
        enough = shape.stages >= min(4, shape.k_blocks)
        if split_k <= own.split_k and enough and runs(shape, can_implement):
            found.append(shape)
    return found


def cycles(config: DecodeConfig, N: int) -> float:
    """An estimate of the time of a launch for more than `ONE_TILE` tokens.

    What counts most is that all clusters run at once. Fitted to a sweep on an H200, whose best
    times 20 of its 24 choices were within 3 % of (docs/perf_log.md).
    """
    c = config
    at_once = CLUSTERS_AT_ONCE[c.split_k]
    clusters = c.expert_tiles * ceil_div(N, c.tile_tokens)
    rounds = ceil_div(clusters, at_once * on_an_sm(c))
    crowd = max(0.0, clusters / (at_once * rounds) - 1)
    load = c.k_blocks * c.tile_bytes / INGRESS * (1 if c.resident else RING)
    exchange = c.tile_tokens * c.tile_experts * 4 * (1 - 1 / c.split_k) / EXCHANGED
    busy = (load + exchange) * (1 + CROWD * crowd) + OWNED * c.owned
    return rounds * (busy + START + CLUSTER_START * log2(c.split_k))


def on_an_sm(config: DecodeConfig) -> int:
    """CTAs that share an SM."""
    return min(MOST_ON_AN_SM, (MAX_SMEM + RESERVED) // (config.smem_bytes + RESERVED))


def largest_split(hidden_size: int, max_cluster: int) -> int:
    """CTAs to share K: doubled from 2 until each has a single K block or the cluster is full.

    Every doubling halves what a CTA loads and multiplies; the exchange costs the same.
    """
    split_k = 2
    while split_k < min(max_cluster, ceil_div(hidden_size, TILE_K)):
        split_k *= 2
    return split_k


def beside_its_neighbours(config: DecodeConfig, bucket: int) -> DecodeConfig:
    """`config` with what decides how it overlaps the kernels ahead of it and behind it.

    Measured in chains of routers (docs/perf_log.md). CTAs of two kernels on one SM disturb each
    other by 0.1 to 0.5 us, where there is room to keep apart. Where there is not, and in large
    batches, it helps if the loads of W behind do not meet this kernel's of x. The smallest batches
    want it later still.
    """
    if bucket > 64 or (bucket > ONE_TILE and config.tile_tokens > 16):
        return replace(config, trigger="wait")
    ctas = config.expert_tiles * config.split_k * ceil_div(bucket, config.tile_tokens)
    alone = ctas <= WAVE_ALONE
    small = config.spec.num_experts * config.spec.hidden_size * 2 <= SMALL_WEIGHTS
    if alone and bucket == FEWEST and small:
        trigger = "product"
    else:
        trigger = "start" if alone or bucket > ONE_TILE else "wait"
    return replace(config, exclusive=alone, trigger=trigger)


def resident(config: DecodeConfig) -> DecodeConfig:
    """`config` with as many stages as fit: all K blocks of a CTA, or a ring of fewer."""
    fixed = replace(config, stages=0, exclusive=False).smem_bytes
    room = (MAX_SMEM - fixed) // config.tile_bytes
    return replace(config, stages=min(config.k_blocks, room))


def candidates(
    spec: RouterSpec, N: int, arch: str, *, max_cluster: int = MAX_CLUSTER, pdl: bool = True
) -> Iterator[DecodeConfig]:
    """Configurations worth measuring for N tokens: that of `decode_config`, then those around it.

    shapes    half, once and twice its token tile and split of K; and 128 experts to a tile
    overlaps  every trigger, and each CTA alone on its SM or not, of every shape
    a ring    half of its stages

    Each is yielded once and can run. Where a CTA takes more than half of the SM's memory anyway,
    `exclusive` is no difference.
    """
    own = decode_config(spec, N, arch, max_cluster=max_cluster, pdl=pdl)
    widest = max(own.tile_tokens, token_bucket(N))  # a wider tile would hold no more tokens
    most = largest_split(spec.hidden_size, max_cluster)
    shapes = [
        resident(replace(own, tile_tokens=tile_tokens, split_k=split_k))
        for tile_tokens, split_k in product(around(own.tile_tokens), around(own.split_k))
        if tile_tokens <= widest and split_k <= most
    ]
    if spec.num_experts > GROUP:
        shapes.append(resident(replace(own, tile_experts=2 * GROUP)))
    overlaps = product(TRIGGERS if pdl else (own.trigger,), (False, True))
    found = [own]
    for shape, (trigger, exclusive) in product(shapes, overlaps):
        found.append(replace(shape, trigger=trigger, exclusive=exclusive))
    found.append(replace(own, stages=max(2, own.stages // 2)))
    seen = set()
    for config in found:
        shared = replace(config, exclusive=False)
        alike = shared if shared.smem_bytes == config.smem_bytes else config
        if alike not in seen and runs(config, can_implement):
            seen.add(alike)
            yield config


def around(n: int) -> tuple[int, int, int]:
    """A number, its half and its double."""
    return n, n // 2, 2 * n

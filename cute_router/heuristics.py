"""Which configuration serves a router at a batch size: a pure function, by measurement.

Nothing here looks at a GPU: the caller says for which target, and whether clusters of 16 start.
What was measured on the GPU at hand comes before it (`tuning`).
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from cute_router.arch import MAX_CLUSTER
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

MAX_BUCKET = 128
DECODE_TOKENS = 128  # up to so many the decode kernel is the faster one (docs/perf_log.md)
FEWEST = 2  # tokens of the smallest bucket
WAVE = 128  # CTAs that run at once on every GPU this serves
WAVE_ALONE = 112  # CTAs that do, in clusters of 16, each alone on its SM (H200: 7 clusters)
SMALL_WEIGHTS = 4 << 20  # bytes of W


def token_bucket(N: int) -> int:
    """The batch sizes that share a configuration: 2, or the power of two from 8 to 128 with N.

    Larger batches take more tiles of the largest.
    """
    return FEWEST if N <= FEWEST else min(max(8, 1 << (N - 1).bit_length()), MAX_BUCKET)


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
    tile_tokens = 16 if batch_invariant else min(max(bucket, 8), 64)
    if arch != "sm_90a":
        tile_tokens = max(tile_tokens, 16)  # tcgen05 with N = 8 is not relied upon
    split_k = largest_split(spec.hidden_size, max_cluster)
    # From 64 tokens on more CTAs beat wider tiles, as long as they start together.
    tiles = ceil_div(spec.num_experts, 64)
    if bucket == 128 and not batch_invariant:
        while split_k > 2 and 2 * tiles * split_k > WAVE:
            split_k //= 2
    elif tile_tokens == 64:
        if split_k >= 8 and tiles * 8 * 4 <= WAVE:
            tile_tokens, split_k = 16, 8
        else:
            tile_tokens = 32
    config = DecodeConfig(spec, arch, 64, tile_tokens, split_k, 0, pdl=pdl, extras=extras)
    while config.smem_bytes + 2 * config.tile_bytes > MAX_SMEM:  # many owned columns, large k
        config = replace(config, tile_tokens=config.tile_tokens // 2)
    config = resident(config)
    return config if batch_invariant else beside_its_neighbours(config, bucket)


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
    other by 0.1 to 0.5 us, where there is room to keep apart. Where there is not, it helps if the
    loads of W behind do not meet this kernel's of x, except in large batches, where the kernel
    behind needs all the time it can get. The smallest batches want it later still.
    """
    ctas = config.expert_tiles * config.split_k * ceil_div(bucket, config.tile_tokens)
    if bucket >= 64:
        return replace(config, trigger="start" if bucket == 64 else "wait")
    small = config.spec.num_experts * config.spec.hidden_size * 2 <= SMALL_WEIGHTS
    if ctas > WAVE_ALONE:
        trigger = "wait"
    else:
        trigger = "product" if bucket == FEWEST and small else "start"
    return replace(config, exclusive=ctas <= WAVE_ALONE, trigger=trigger)


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

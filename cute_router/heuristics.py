"""Which configuration serves a router at a batch size: a pure function, by measurement.

Nothing here looks at a GPU: the caller says for which target, and whether clusters of 16 start.
"""

from dataclasses import replace

from cute_router.gemm.config import MAX_CLUSTER, MAX_SMEM, TILE_K, DecodeConfig, ceil_div
from cute_router.spec import RouterSpec

MAX_TOKEN_TILE = 64
WAVE = 128  # CTAs that run at once on every GPU this serves
SMALL_WEIGHTS = 4 << 20  # bytes of W


def token_bucket(N: int) -> int:
    """The batch sizes that share a configuration: the power of two from 8 to 64 that holds N.

    Larger batches take several tiles of the largest.
    """
    return min(max(8, 1 << (N - 1).bit_length()), MAX_TOKEN_TILE)


def decode_config(
    spec: RouterSpec,
    N: int,
    arch: str,
    *,
    max_cluster: int = MAX_CLUSTER,
    batch_invariant: bool = False,
    pdl: bool = True,
) -> DecodeConfig:
    """The configuration of `dense_decode` for N tokens on `arch`.

    With `batch_invariant` it does not depend on N: a token's sums are then always taken in the
    same order, whatever its batch. `max_cluster` is 16, or 8 where clusters of 16 do not start.
    """
    tile_tokens = 16 if batch_invariant else token_bucket(N)
    if arch != "sm_90a":
        tile_tokens = max(tile_tokens, 16)  # tcgen05 with N = 8 is not relied upon
    split_k = largest_split(spec.hidden_size, max_cluster)
    # At 64 tokens more CTAs beat wider tiles, as long as they start together (H200: 132 SMs).
    if tile_tokens == 64:
        if split_k >= 8 and ceil_div(spec.num_experts, 64) * 8 * 4 <= WAVE:
            tile_tokens, split_k = 16, 8
        else:
            tile_tokens = 32
    trigger = trigger_for(spec, 16 if batch_invariant else token_bucket(N))
    config = DecodeConfig(spec, arch, 64, tile_tokens, split_k, 0, trigger, pdl)
    while config.smem_bytes + 2 * config.tile_bytes > MAX_SMEM:  # many owned columns, large k
        config = replace(config, tile_tokens=config.tile_tokens // 2)
    return resident(config)


def largest_split(hidden_size: int, max_cluster: int) -> int:
    """CTAs to share K: doubled from 2 until each has a single K block or the cluster is full.

    Every doubling halves what a CTA loads and multiplies; the exchange costs the same.
    """
    split_k = 2
    while split_k < min(max_cluster, ceil_div(hidden_size, TILE_K)):
        split_k *= 2
    return split_k


def trigger_for(spec: RouterSpec, bucket: int) -> str:
    """When to let the kernel behind start, so that its loads of W do not meet this one's of x.

    Measured in chains of routers: against "start", 0.1 to 0.4 us a call up to 32 tokens, though on
    one H200 of four "wait" was the slower one at 8; from there on the kernel behind needs all the
    time it can get (docs/perf_log.md).
    """
    if bucket == 64:
        return "start"
    large = spec.num_experts * spec.hidden_size * 2 > SMALL_WEIGHTS
    return "product" if large and bucket <= 16 else "wait"


def resident(config: DecodeConfig) -> DecodeConfig:
    """`config` with as many stages as fit: all K blocks of a CTA, or a ring of fewer."""
    room = (MAX_SMEM - replace(config, stages=0).smem_bytes) // config.tile_bytes
    return replace(config, stages=min(config.k_blocks, room))

"""Which configuration serves a router at a batch size: a pure function, by measurement.

Nothing here looks at a GPU: the caller says for which target, and whether clusters of 16 start.
"""

from dataclasses import replace

from cute_router.gemm.config import MAX_CLUSTER, MAX_SMEM, TILE_K, DecodeConfig, ceil_div
from cute_router.spec import RouterSpec

MAX_TOKEN_TILE = 64


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
    bucket = 16 if batch_invariant else token_bucket(N)
    if arch != "sm_90a":
        bucket = max(bucket, 16)  # tcgen05 with N = 8 is not relied upon: see `can_implement`
    # A second CTA on the K slices of a tile halves them as long as there is a K block for each.
    blocks = ceil_div(spec.hidden_size, TILE_K)
    split_k = 2
    while split_k < min(max_cluster, blocks):
        split_k *= 2
    config = DecodeConfig(spec, arch, 64, bucket, split_k, 1, pdl)
    while config.smem_bytes + config.tile_bytes > MAX_SMEM and config.tile_tokens > 16:
        config = replace(config, tile_tokens=config.tile_tokens // 2)
    return resident(config)


def resident(config: DecodeConfig) -> DecodeConfig:
    """`config` with as many stages as fit: all K blocks of a CTA, or a ring of fewer."""
    room = (MAX_SMEM - replace(config, stages=0).smem_bytes) // config.tile_bytes
    return replace(config, stages=min(config.k_blocks, room))

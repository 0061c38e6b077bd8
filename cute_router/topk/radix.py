"""Host entry of the kernel of long rows: scores that are already checked -> one launch.

Which configuration serves a call is a pure function of it; nothing here looks at the data.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

from torch import Tensor

from cute_router import compile as compiler
from cute_router.arch import max_cluster, target_for
from cute_router.gemm.config import ceil_div
from cute_router.topk.config import dtype_name
from cute_router.topk.radix_config import SERVERS, RadixConfig, can_implement
from cute_router.topk.rows import starts_are_aligned

# CTAs that run at once, each alone on its SM, by the size of their clusters (H200: 132 SMs, which
# hold 7 clusters of 16 and 15 of 8).
WAVES = {1: 132, 2: 128, 4: 128, 8: 120, 16: 112}
LEAST_SLICE = 1024  # entries that are worth a CTA
KEPT = 32  # entries that a thread can keep in registers without spilling others
LONG = 1 << 18  # entries of a row from where finer bins spare passes


def launch(scores: Tensor, lengths: Tensor | None, values: Tensor, indices: Tensor) -> None:
    """Queue the selection on the current stream of the scores' device.

    Args:
        scores: (rows, L), at least one of each, up to 2^20 entries a row, adjacent in memory.
        lengths: (rows), int32 or int64, contiguous; what is outside [0, L] counts as 0 or L.
        values: (rows, k), of the scores' dtype; rows of adjacent entries; k up to min(L, 4096).
        indices: (rows, k), int64 or int32; the same.
    """
    rows, length = scores.shape
    width = 16 // scores.element_size()
    if rows == 1:  # its stride says nothing
        scores = scores.as_strided((1, length), (ceil_div(length, width) * width, 1))
    kernel_of(
        rows,
        length,
        values.shape[1],
        dtype_name(scores.dtype),
        dtype_name(indices.dtype),
        None if lengths is None else dtype_name(lengths.dtype),
        starts_are_aligned(scores, scores.stride(0)),
        scores.get_device(),
    )(scores, lengths, values, indices)


@lru_cache(maxsize=4096)
def kernel_of(
    rows: int,
    length: int,
    k: int,
    dtype: str,
    index: str,
    lengths: str | None,
    vector: bool,
    device: int,
) -> Callable[..., None]:
    """The kernel for calls of this kind on a device."""
    arch = target_for(device)[1]
    config = radix_config(
        rows,
        length,
        k,
        arch,
        dtype=dtype,
        index=index,
        lengths=lengths,
        vector=vector,
        clusters=max_cluster(device) if arch.startswith(SERVERS) else 1,
    )
    can_implement(config)
    return compiler.kernel(config)


def radix_config(
    rows: int,
    length: int,
    k: int,
    arch: str,
    *,
    dtype: str = "float32",
    index: str = "int64",
    lengths: str | None = None,
    vector: bool = True,
    clusters: int = 16,
) -> RadixConfig:
    """The configuration for `rows` rows of `length` scores on `arch`.

    `clusters` is the largest cluster that starts on the device, where the target has any.
    """
    server = arch.startswith(SERVERS)
    cluster = 1
    # The k best of a slice are sent to the others: slices should be longer than that.
    while server and cluster < clusters and 2 * cluster * rows <= WAVES[2 * cluster]:
        if length < 2 * cluster * max(LEAST_SLICE, 2 * k):
            break
        cluster *= 2
    share = ceil_div(length, cluster)
    alone = rows * cluster <= WAVES[cluster]  # a CTA has its SM to itself
    threads = 256 if share <= 2048 else 1024 if alone else 512
    config = RadixConfig(
        dtype,
        arch,
        index,
        lengths,
        vector,
        threads,
        cluster,
        capacity=min(max(1 << (2 * k - 1).bit_length(), 1024), 8192),
        bits=12 if length >= LONG or 8192 <= length < 16 * k else 11,
        unroll=4 if vector else 8,
        blocks=1024 // threads,
        pdl=server,
    )
    chunks = config.chunks(length)
    if chunks * config.width > KEPT:
        return config
    unroll = 1 << max(chunks - 1, 0).bit_length()  # few kernels for rows of many lengths
    return replace(config, unroll=unroll, resident=True)

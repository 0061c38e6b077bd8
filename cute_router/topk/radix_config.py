"""Configurations of topk on long rows."""

from dataclasses import dataclass

from cute_router.gemm.config import ceil_div
from cute_router.spec import MAX_LENGTH

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
INDEX_BITS = (MAX_LENGTH - 1).bit_length()
SERVERS = ("sm_90", "sm_100", "sm_103")  # clusters of 16, dependent launch, and
LARGE_SMEM = 227 * 1024  # bytes of shared memory for a CTA
SMALL_SMEM = 99 * 1024  # on every other GPU from sm_80 on
RADIX_MISC = 512  # counters of the radix kernel, in bytes


@dataclass(frozen=True)
class RadixConfig:
    """One compiled kernel for long rows: the k best of L, for any k up to `capacity`.

    dtype:    of the scores, "float32", "float16" or "bfloat16".
    arch:     the compile target, "sm_80" or newer.
    index:    of the returned indices, "int64" or "int32".
    lengths:  type of the rows' lengths, "int64" or "int32"; None where every row is full.
    vector:   whether chunks of 16 bytes may be loaded: rows start at multiples of 16 bytes.
    threads:  of a CTA.
    cluster:  CTAs that share a row; 1 if not on `server`.
    capacity: candidates that are sorted, at least k. More leave more to sort, fewer need more
              passes over the row to be told.
    bits:     of a digit, one pass; 2^bits bins are at least as many as threads.
    unroll:   chunks that a thread loads at a time.
    resident: whether these are all of a CTA's, kept in registers from pass to pass; see `holds`.
    items:    candidates that a lane sorts in registers.
    blocks:   CTAs that an SM is to hold at once; it bounds their registers.
    pdl:      whether the launch may overlap the kernel ahead of it.
    """

    dtype: str
    arch: str
    index: str = "int64"
    lengths: str | None = None
    vector: bool = True
    threads: int = 512
    cluster: int = 1
    capacity: int = 4096
    bits: int = 11
    unroll: int = 4
    resident: bool = False
    items: int = 4
    blocks: int = 1
    pdl: bool = True

    @property
    def server(self) -> bool:
        """Whether the target has clusters and dependent launch."""
        return self.arch.startswith(SERVERS)

    @property
    def width(self) -> int:
        """Elements of a chunk."""
        return 16 // ITEM_BYTES[self.dtype] if self.vector else 1

    @property
    def bins(self) -> int:
        """Bins of a histogram."""
        return 1 << self.bits

    @property
    def smem_bytes(self) -> int:
        """Shared memory of a CTA: histograms, candidates, the cluster's, and small things."""
        shared = self.cluster > 1
        histograms = self.bins * 4 * (3 if shared else 1)
        return histograms + self.capacity * 8 * (2 if shared else 1) + RADIX_MISC

    def chunks(self, length: int) -> int:
        """Chunks of a thread, of a row of `length`; what is no whole chunk does not count."""
        slice_ = ceil_div(length // self.width, self.cluster)
        return ceil_div(slice_, self.threads)

    def holds(self, length: int) -> bool:
        """Whether rows of up to `length` can be served."""
        return length <= MAX_LENGTH and (not self.resident or self.chunks(length) <= self.unroll)


def can_implement(config: RadixConfig) -> None:
    """Raise `ValueError` with the reason if no kernel can be made of `config`."""
    c = config
    if c.dtype not in ITEM_BYTES:
        raise ValueError(f"dtype must be one of {tuple(ITEM_BYTES)}; got {c.dtype!r}")
    if c.index not in ("int64", "int32"):
        raise ValueError(f'index must be "int64" or "int32"; got {c.index!r}')
    if c.lengths not in (None, "int64", "int32"):
        raise ValueError(f'lengths must be None, "int64" or "int32"; got {c.lengths!r}')
    clusters = (1, 2, 4, 8, 16) if c.server else (1,)
    if c.cluster not in clusters:
        raise ValueError(f"cluster must be one of {clusters} on {c.arch}; got {c.cluster}")
    if c.pdl and not c.server:
        raise ValueError(f"{c.arch} has no programmatic dependent launch")
    if c.threads not in (64, 128, 256, 512, 1024):
        raise ValueError(f"threads must be a power of two from 64 to 1024; got {c.threads}")
    if not 8 <= c.bits <= 12 or c.bins < c.threads:
        raise ValueError(f"bits must be from 8 to 12, bins at least threads; got {c.bits}")
    if c.items not in (2, 4, 8):
        raise ValueError(f"items must be 2, 4 or 8; got {c.items}")
    if c.capacity < 32 * c.items or c.capacity & (c.capacity - 1):
        raise ValueError(
            f"capacity must be a power of two, at least {32 * c.items}; got {c.capacity}"
        )
    room = LARGE_SMEM if c.server else SMALL_SMEM
    if c.smem_bytes > room:
        raise ValueError(f"{c} needs {c.smem_bytes} bytes of shared memory; a CTA has {room}")

"""The configuration of a prefill kernel: what is compiled, and whether it can run.

A `PrefillConfig` is the compile key: everything that shapes the code is a field of it or follows
from its fields. Shared memory, registers and TMEM are budgeted here, because the compiler takes any
amount of shared memory without a word and the launch then fails.
"""

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from cute_router.arch import MAX_CLUSTER
from cute_router.extras import PLAIN, ExtrasSpec
from cute_router.gemm.config import MAX_SMEM, TILE_K, ceil_div
from cute_router.spec import RouterSpec
from cute_router.topk.config import LIST, WARP, capacity

if TYPE_CHECKING:
    from cute_router.topk.sieve import Sieve

MAX_MMA_EXPERTS = 256  # of one instruction, on MMA-N
MAX_CHAIN = 32  # K blocks: 2048 products of one chain
MAX_WHOLE_SUMS = 192  # experts: sums beside accumulators are twice 96 registers a thread, of 232
WARPGROUP = 128  # threads
# Of TMEM's 512. A CTA that waits for the kernel ahead, or for its cluster, holds them; one of that
# kernel on the same SM must find its own, or each would wait for the other.
MAX_COLUMNS = 256
MISC = 32  # what barriers and TMEM's address take beside their own bytes, for alignment


def round_up(a: int, b: int) -> int:
    """The least multiple of b not under a."""
    return ceil_div(a, b) * b


@dataclass(frozen=True)
class PrefillConfig:
    """One compiled prefill kernel.

    spec:        the router.
    arch:        the compile target, "sm_90a", "sm_100a" or "sm_100f".
    tile_tokens: tokens of a tile, on MMA-M: 64 (sm_90 only) or 128.
    split_e:     CTAs that share a tile's experts.
    split_k:     CTAs that share the K of the same experts; with split_e they are a cluster.
    stages:      K blocks that shared memory holds, a ring.
    clusters:    of a launch, at most; they take the token tiles in turns.
    lanes:       of a warp, that choose for one token; 32 unless `by_threshold`.
    overlay:     whether logits take the place of the ring, which then has more stages, but no loads
                 for the next tile under way while experts are chosen (sm_90 only: on sm_100 the
                 next tile is multiplied meanwhile).
    shortlists:  whether CTAs exchange only the experts that may be among the best of a token
                 (`epilogue.shortlist`), and not all logits.
    pdl:         whether the launch may overlap the kernel ahead of it.
    extras:      what calls have beside the defaults.
    """

    spec: RouterSpec
    arch: str
    tile_tokens: int = 128
    split_e: int = 2
    split_k: int = 1
    stages: int = 4
    clusters: int = 66
    lanes: int = 8
    overlay: bool = False
    shortlists: bool = False
    pdl: bool = True
    extras: ExtrasSpec = PLAIN

    @property
    def blackwell(self) -> bool:
        """Whether the product is tcgen05's and not WGMMA's."""
        return self.arch.startswith("sm_100")

    @property
    def cluster(self) -> int:
        """CTAs that share a token tile."""
        return self.split_e * self.split_k

    @property
    def tile_experts(self) -> int:
        """Experts of a CTA, on MMA-N; those past the last are zeros: TMA fills what is out of
        bounds."""
        grain = 32 if self.blackwell else 4 * self.run
        return round_up(ceil_div(self.spec.num_experts, self.split_e), grain)

    @property
    def k_blocks(self) -> int:
        """K blocks of one CTA. Blocks past K are zeros too."""
        return ceil_div(ceil_div(self.spec.hidden_size, TILE_K), self.split_k)

    @property
    def owned(self) -> int:
        """Tokens of a tile for which one of its CTAs chooses; the last ones may have fewer."""
        return ceil_div(self.tile_tokens, self.cluster)

    @property
    def rows(self) -> int:
        """Tokens whose logits an owner has room for: as many as its warps look at."""
        return round_up(self.owned, WARP // self.lanes)

    @property
    def mma_threads(self) -> int:
        """Threads that hold accumulators; on sm_90 a warpgroup for 64 tokens."""
        return self.tile_tokens if self.blackwell else 2 * self.tile_tokens

    @property
    def epilogue_threads(self) -> int:
        """Threads that choose, those that hold accumulators first."""
        return self.mma_threads if self.blackwell else 2 * WARPGROUP

    @property
    def buffers(self) -> int:
        """Tiles that there are accumulators for: on sm_100, where there is room, one is multiplied
        while the one before is read."""
        return 2 if self.blackwell and 2 * self.tile_experts <= MAX_COLUMNS else 1

    @property
    def threads(self) -> int:
        """All threads: the epilogue's, a warp of loads, and on sm_100 a warp that issues MMAs.

        On sm_90 the load warp gives registers to the epilogue: nine warps would leave every thread
        168 of them, for one quarter of the SM has three. They are traded by whole warpgroups; three
        warps of the loads' do nothing else.
        """
        return self.epilogue_threads + (2 * WARP if self.blackwell else WARPGROUP)

    @property
    def by_threshold(self) -> bool:
        """Whether a threshold decides. Softmax and groups need every logit of a token."""
        return self.spec.scores_are_independent

    @property
    def lay(self) -> "Sieve":
        """How a token's logits lie on the lanes that choose."""
        from cute_router.topk.sieve import Sieve  # which brings the compiler

        return Sieve(self.spec.num_experts, self.spec.top_k, self.lanes, run=4, ragged=False)

    @property
    def lists(self) -> tuple[int, int, int]:
        """Room for lists of experts (entry, token of a warp, warp)."""
        if self.shortlists or not self.by_threshold:
            return 0, 0, 0
        return capacity(self.spec.top_k), WARP // self.lanes, self.epilogue_threads // WARP

    @property
    def list_bytes(self) -> int:
        """Of an entry of those, which holds an expert; for larger ones there is often no room."""
        return 1 if self.spec.num_experts <= 256 else 2

    @property
    def logits(self) -> tuple[int, int, int]:
        """Words of the logits that an owner gets (expert, owned token, K part)."""
        return (0, 0, 0) if self.shortlists else (self.pitch, self.rows, self.split_k)

    @property
    def short_lists(self) -> tuple[int, int, int]:
        """Words of the lists that an owner gets (word, part of E, owned token)."""
        return (2 * LIST, self.split_e, self.rows) if self.shortlists else (0, 0, 0)

    @property
    def drafts(self) -> tuple[int, int, int]:
        """Words of the drafts of those (word, token of a warp, warp)."""
        if not self.shortlists:
            return 0, 0, 0
        return 2 * LIST, WARP // self.sum_lanes, self.mma_threads // WARP

    @property
    def sum_lanes(self) -> int:
        """Lanes of a warp that hold the sums of a token: of WGMMA's accumulators, or of TMEM."""
        return 1 if self.blackwell else 4

    @property
    def padded(self) -> int:
        """Experts of a tile, those past the last included."""
        return self.split_e * self.tile_experts

    @property
    def pitch(self) -> int:
        """Words from a token's logits to the next one's."""
        return round_up(self.padded, WARP) + self.skew

    @property
    def skew(self) -> int:
        """Words that keep apart the banks of the rows that one store of a warp writes.

        It writes 128 bytes at a time: rows of 4 runs from WGMMA's accumulators, of one from TMEM.
        """
        return (1 if self.blackwell else 4) * self.run

    @property
    def run(self) -> int:
        """Experts of a token that a thread stores at once."""
        alone = self.cluster == 1 or self.shortlists
        return 2 if alone and not self.blackwell else 4

    @property
    def stores_own(self) -> bool:
        """Whether a CTA stores what it owns itself, and does not send it like the rest.

        Where that is little, one way for all takes less time.
        """
        return self.cluster < 8

    @property
    def room_arrivals(self) -> int:
        """Arrivals that tell a CTA of room: of owners, or of all their warps that multiply."""
        return self.cluster * (self.mma_threads // WARP if self.overlay else 1)

    @property
    def token_bytes(self) -> int:
        """Bytes that are sent to a token's owner: of logits, parts of their sums, or lists."""
        sent = 2 * LIST if self.shortlists else self.tile_experts
        return (self.cluster - self.stores_own) * sent * 4

    @property
    def held(self) -> int:
        """Stages that are not free again before their tile's experts have been chosen."""
        return self.stages if self.overlay else 0

    @property
    def chain(self) -> int:
        """K blocks whose products are summed by the tensor cores alone, on sm_90.

        What those drop of every partial sum adds up: chains are summed by fp32 instructions.
        Softmax takes shorter ones: its weights follow the logits themselves, however large.
        """
        longest = MAX_CHAIN // 2 if self.spec.scoring == "softmax" else MAX_CHAIN
        return ceil_div(self.k_blocks, ceil_div(self.k_blocks, longest))

    @property
    def splits_sums(self) -> bool:
        """Whether the sums of chains share the accumulators' registers (`gemm.prefill_sums`)."""
        return self.tile_experts > MAX_WHOLE_SUMS

    @property
    def tile_bytes(self) -> int:
        """Shared memory of one stage: a K block of the x tile and of the W tile."""
        return (self.tile_tokens + self.tile_experts) * TILE_K * 2

    @property
    def smem_bytes(self) -> int:
        """Shared memory of a CTA."""
        ring = self.stages * self.tile_bytes
        logits = 4 * prod(self.logits)
        large = max(ring, logits) if self.overlay else ring + logits
        biases = self.padded * (8 if self.extras.second_bias else 4)
        lists = prod(self.lists) * self.list_bytes
        lists += 4 * (prod(self.short_lists) + prod(self.drafts))
        barriers = 2 * (self.stages + self.buffers + 1) * 8
        return large + biases + lists + barriers + MISC


def can_implement(config: PrefillConfig) -> None:
    """Raise `ValueError` with the reason if `config` cannot be built or launched."""
    c = config
    if c.arch not in ("sm_90a", "sm_100a", "sm_100f"):
        raise ValueError(f"arch must be sm_90a, sm_100a or sm_100f; got {c.arch!r}")
    tokens = (128,) if c.blackwell else (64, 128)
    if c.tile_tokens not in tokens:
        raise ValueError(f"tile_tokens must be one of {tokens} on {c.arch}; got {c.tile_tokens}")
    if not 1 <= c.cluster <= MAX_CLUSTER:
        raise ValueError(f"split_e * split_k must be 1 to {MAX_CLUSTER}; got {c.cluster}")
    # The accumulators are registers (128 of 224 at this size) or TMEM columns, a power of two.
    if c.tile_experts > MAX_MMA_EXPERTS:
        raise ValueError(
            f"a CTA can have {MAX_MMA_EXPERTS} experts; got {c.tile_experts} with"
            f" split_e={c.split_e}"
        )
    if c.stages < 2:  # a ring frees a stage one block late
        raise ValueError(f"stages must be at least 2; got {c.stages}")
    if c.clusters < 1:
        raise ValueError(f"clusters must be at least 1; got {c.clusters}")
    lanes = (4, 8, 16, 32) if c.by_threshold else (32,)
    if c.lanes not in lanes or WARP // c.lanes > c.owned:
        raise ValueError(
            f"lanes must be one of {lanes} and at least {WARP} / owned={c.owned}; got {c.lanes}"
        )
    if c.shortlists:
        can_list(c)
    if c.overlay and c.blackwell:
        raise ValueError(f"overlay is for sm_90a; got {c.arch}")
    if c.overlay and c.stages > c.k_blocks:  # loads for the next tile would meet logits
        raise ValueError(
            f"overlay takes at most k_blocks={c.k_blocks} stages; got stages={c.stages}"
        )
    if c.smem_bytes > MAX_SMEM:
        raise ValueError(
            f"the configuration needs {c.smem_bytes} bytes of shared memory;"
            f" a CTA has {MAX_SMEM}: {c}"
        )


def can_list(config: PrefillConfig) -> None:
    """Raise `ValueError` with the reason if CTAs cannot exchange short lists."""
    c = config
    if not c.by_threshold or c.extras.second_bias or c.extras.logits:
        raise ValueError(f"shortlists are for scores of one logit and one bias; got {c}")
    if c.split_k > 1 or c.overlay or c.lanes not in (4, 8):
        raise ValueError(
            "shortlists are for split_k=1, overlay=False and lanes=4 or 8;"
            f" got {c.split_k}, {c.overlay} and {c.lanes}"
        )
    fewest = c.spec.num_experts - (c.split_e - 1) * c.tile_experts
    if c.spec.top_k > LIST // 2 or fewest < 2 * LIST:
        raise ValueError(
            f"shortlists are for top_k up to {LIST // 2} and {2 * LIST} experts or more of a CTA;"
            f" got {c.spec.top_k} and {fewest}"
        )

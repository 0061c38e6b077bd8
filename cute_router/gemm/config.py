"""The configuration of a decode kernel: what is compiled, and whether it can run.

A `DecodeConfig` is the compile key: everything that shapes the code is a field of it or follows
from its fields. Shared memory and TMEM are budgeted here, because the compiler takes any amount
without a word and the launch then fails.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cute_router.arch import MAX_CLUSTER
from cute_router.extras import PLAIN, ExtrasSpec
from cute_router.spec import RouterSpec

TILE_K = 64  # bf16 elements of one 128-byte swizzled row: the depth of one TMA stage
GROUP = 64  # experts that are ranked together; each group offers its k best
SKEW = 16  # words between the partial sums of neighbouring ranks: see `gemm.split_k`
MAX_SMEM = 227 * 1024  # bytes of shared memory a CTA can have on sm_90 and sm_100
MAX_TOKEN_TILES = 256  # of one launch; a larger batch takes several
TICKETS = MAX_TOKEN_TILES * MAX_CLUSTER  # words at the head of the scratch, one for each owner CTA
EPILOGUE_MISC = 1024  # barriers, alignment, and a margin, in bytes
TRIGGERS = ("start", "wait", "product")  # when the kernel behind may start


def ceil_div(a: int, b: int) -> int:
    """The least integer not under a / b."""
    return -(-a // b)


def runs(config: Any, can_implement: Callable[[Any], None]) -> bool:
    """Whether a configuration can be built and launched, as `can_implement` of its kind says."""
    try:
        can_implement(config)
    except ValueError:
        return False
    return True


@dataclass(frozen=True)
class DecodeConfig:
    """One compiled decode kernel.

    spec:         the router.
    arch:         the compile target, "sm_90a", "sm_100a" or "sm_100f".
    tile_experts: experts of a CTA's tile, on MMA-M: 64 or 128.
    tile_tokens:  tokens of a CTA's tile, on MMA-N: 8 (sm_90 only), 16, 32 or 64.
    split_k:      CTAs of the cluster that shares a tile's K: 2, 4, 8 or 16.
    stages:       K blocks that shared memory holds; all of a CTA's, or a ring of fewer.
    trigger:      when the kernel behind may start: at the "start", after the "wait" for the kernel
                  ahead (its weight loads then stay out of the way of this one's x), or after the
                  "product".
    exclusive:    whether no other CTA may share the SM, by taking more than half of its memory.
    pdl:          whether the launch may overlap the kernel ahead of it.
    extras:       what calls have beside the defaults.
    """

    spec: RouterSpec
    arch: str
    tile_experts: int = 64
    tile_tokens: int = 8
    split_k: int = 16
    stages: int = 1
    trigger: str = "wait"
    exclusive: bool = False
    pdl: bool = True
    extras: ExtrasSpec = PLAIN

    @property
    def blackwell(self) -> bool:
        """Whether the product is tcgen05's and not WGMMA's."""
        return self.arch.startswith("sm_100")

    @property
    def k_blocks(self) -> int:
        """K blocks of one CTA. Blocks past K are zeros: TMA fills what is out of bounds."""
        return ceil_div(ceil_div(self.spec.hidden_size, TILE_K), self.split_k)

    @property
    def resident(self) -> bool:
        """Whether shared memory holds all of a CTA's K blocks; else the stages are a ring."""
        return self.stages == self.k_blocks

    @property
    def expert_tiles(self) -> int:
        """Clusters that share a token tile."""
        return ceil_div(self.spec.num_experts, self.tile_experts)

    @property
    def groups(self) -> int:
        """Groups of 64 experts, over all expert tiles: the last ones may be only padding."""
        return self.expert_tiles * (self.tile_experts // GROUP)

    @property
    def owned(self) -> int:
        """Token columns whose partial sums one CTA of the cluster gathers."""
        return max(1, self.tile_tokens // self.split_k)

    @property
    def epilogue_threads(self) -> int:
        """Threads that hold accumulators and select: a warpgroup, on sm_90 one for 64 experts."""
        return 128 if self.blackwell else 2 * self.tile_experts

    @property
    def threads(self) -> int:
        """All threads: the epilogue's, a warp of loads, and on sm_100 a warp that issues MMAs."""
        return self.epilogue_threads + (64 if self.blackwell else 32)

    @property
    def parts(self) -> int:
        """Adjacent lanes of an owner that share the work on one logit: 2 while threads abound."""
        return 2 if 2 * self.tile_experts * self.owned <= self.epilogue_threads else 1

    @property
    def passes(self) -> int:
        """Logits of an owner for each of its threads."""
        return ceil_div(self.parts * self.tile_experts * self.owned, self.epilogue_threads)

    @property
    def by_candidates(self) -> bool:
        """Whether k candidates a group decide. Softmax and groups need every logit of a token."""
        return self.spec.scores_are_independent

    @property
    def candidates(self) -> int:
        """Candidates a token has, padded to whole 16-byte reads of 4 lanes (see `topk.rank`)."""
        return ceil_div(self.groups * self.spec.top_k, 16) * 16

    @property
    def packet_words(self) -> int:
        """32-bit words of global scratch a token needs to bring its expert tiles together."""
        if self.expert_tiles == 1:
            return 0
        return self.groups * (4 * self.spec.top_k if self.by_candidates else GROUP)

    @property
    def tile_bytes(self) -> int:
        """Shared memory of one stage: a K block of the W tile and of the x tile."""
        return (self.tile_experts + self.tile_tokens) * TILE_K * 2

    @property
    def smem_bytes(self) -> int:
        """Shared memory of a CTA."""
        partials = (self.owned * self.tile_experts + SKEW) * self.split_k * 4
        if self.by_candidates:
            tile = self.owned * self.tile_experts * 4
            chosen = self.spec.top_k if self.extras == PLAIN else 2 * self.spec.top_k + 1
            selection = tile + self.owned * 4 * (3 * self.candidates + chosen)
        else:
            biases = 2 if self.extras.second_bias else 1
            selection = (2 * self.owned + biases) * self.groups * GROUP * 4
        used = self.stages * self.tile_bytes + partials + selection + EPILOGUE_MISC
        return max(used, MAX_SMEM // 2 + 1024) if self.exclusive else used


def can_implement(config: DecodeConfig) -> None:
    """Raise `ValueError` with the reason if `config` cannot be built or launched."""
    c = config
    if c.arch not in ("sm_90a", "sm_100a", "sm_100f"):
        raise ValueError(f"arch must be sm_90a, sm_100a or sm_100f; got {c.arch!r}")
    if c.tile_experts not in (64, 128):
        raise ValueError(f"tile_experts must be 64 or 128; got {c.tile_experts}")
    # M=128 with N=8 is in the PTX tables, but older ones ask for N >= 16: nobody here has run it.
    tokens = (16, 32, 64) if c.blackwell else (8, 16, 32, 64)
    if c.tile_tokens not in tokens:
        raise ValueError(f"tile_tokens must be one of {tokens} on {c.arch}; got {c.tile_tokens}")
    if c.split_k not in (2, 4, 8, 16):
        raise ValueError(f"split_k must be 2, 4, 8 or 16; got {c.split_k}")
    if c.trigger not in TRIGGERS:
        raise ValueError(f'trigger must be "start", "wait" or "product"; got {c.trigger!r}')
    if not min(2, c.k_blocks) <= c.stages <= c.k_blocks:  # a ring frees a stage one block late
        raise ValueError(f"stages must be from 2 to k_blocks={c.k_blocks}; got {c.stages}")
    if c.smem_bytes > MAX_SMEM:
        raise ValueError(
            f"the configuration needs {c.smem_bytes} bytes of shared memory;"
            f" a CTA has {MAX_SMEM}: {c}"
        )

"""Which configuration serves a prefill: a pure function, by a model fitted to measurements.

Nothing here looks at a GPU: the caller says for which target, and how many SMs it has.

    cycles = turns * (K blocks * max(multiply, load, wait) + chains + exchange + choice)
             + (turns - 1) * reload + start

Short lists take a share of exchange and choice, and no reload.

of the CTA that has most to do; its constants are a fit to 452 times on an H200 (docs/perf_log.md),
to choose well rather than to foretell: what it chooses took 0.5 % longer than the best of them on
average. What wins is the configuration with the fewest; of equals the first.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from math import log2

from cute_router.arch import CLUSTERS_AT_ONCE, MAX_CLUSTER
from cute_router.extras import ExtrasSpec
from cute_router.gemm.config import MAX_SMEM, TILE_K, ceil_div, runs
from cute_router.gemm.prefill_config import MAX_WHOLE_SUMS, PrefillConfig, can_implement
from cute_router.spec import RouterSpec
from cute_router.topk.config import WARP, fitted

SMS = 132
LISTS = (True, False)  # (shortlists, overlay)
FORMS = ((False, True), (False, False), LISTS)
MAX_STAGES = 8
LIST_LANES = 4  # for each token's short lists
MAX_ENTRIES = 96  # logits that a lane holds in registers
FEWEST_TOKENS = 64  # of the smallest bucket
MAX_BUCKET = 1 << 17  # with so many token tiles, more of them make no difference

# All in cycles of an SM, or bytes in one.
MMA_START = 8  # of each MMA of 64 tokens and 16 of K, beside half a cycle for an expert
INGRESS = 70  # bytes into an SM
LATENCY = 1950  # from a free stage to a full one
CHAIN = 690  # between two chains of MMAs
EXCHANGED = 9.7  # bytes of logits out of an SM
CHOOSING, ADDING = 0.63, 0.08  # for a logit, and for each of its partial sums beyond the first
CHOICE_START = 2000  # for each tile
LISTED = {64: 1.13, 128: 0.85}  # what short lists take of exchange and choice, by tokens of a tile
RELOAD = 2400  # for each tile but the last, whose logits no loads go beside
CLUSTER_START = 560  # for each doubling of the cluster


def prefill_config(
    spec: RouterSpec,
    N: int,
    arch: str,
    sms: int = SMS,
    *,
    max_cluster: int = MAX_CLUSTER,
    pdl: bool = True,
) -> PrefillConfig:
    """The configuration of `dense_prefill` for N tokens on `arch`."""
    found = list(candidates(spec, arch, sms, max_cluster=max_cluster, pdl=pdl))
    return min(found, key=lambda config: cycles(config, N))


def token_bucket(N: int) -> int:
    """The batch sizes that share a configuration: a power of two from 64, or half way to it."""
    N = min(N, MAX_BUCKET)
    power = max(FEWEST_TOKENS, 1 << (N - 1).bit_length())
    less = power // 4 * 3
    return less if FEWEST_TOKENS < N <= less else power


def candidates(
    spec: RouterSpec,
    arch: str,
    sms: int = SMS,
    *,
    max_cluster: int = MAX_CLUSTER,
    pdl: bool = True,
) -> Iterator[PrefillConfig]:
    """Configurations worth measuring. Three parts of K were never the best."""
    hopper = arch == "sm_90a"
    for tile_tokens, split_e, split_k, (shortlists, overlay) in product(
        (128, 64) if hopper else (128,),
        (1, 2, 3, 4, 8),
        (1, 2, 4, 8),
        FORMS,
    ):
        cluster = split_e * split_k
        if cluster not in CLUSTERS_AT_ONCE or cluster > max_cluster:
            continue
        if split_k > ceil_div(spec.hidden_size, TILE_K):
            continue
        config = PrefillConfig(
            spec,
            arch,
            tile_tokens,
            split_e,
            split_k,
            stages=MAX_STAGES,
            clusters=max(1, CLUSTERS_AT_ONCE[cluster] * sms // SMS),
            pdl=pdl,
        )
        if hopper and split_e > 1 and config.tile_experts > MAX_WHOLE_SUMS:
            continue  # of so many accumulators and E = 1024 some registers are spilled
        config = in_form(config, shortlists, overlay)
        if overlay and in_form(config, shortlists, False).stages == config.stages:
            continue  # there is room beside the ring
        if runs(config, can_implement):
            yield config


def in_form(config: PrefillConfig, shortlists: bool, overlay: bool) -> PrefillConfig:
    """`config` with what is exchanged in this form, and what follows from that."""
    config = replace(config, shortlists=shortlists, overlay=overlay)
    return deepest(replace(config, lanes=lanes_of(config)))


def with_extras(config: PrefillConfig, extras: ExtrasSpec) -> PrefillConfig:
    """`config` with extras, whose sums are the same; a second bias may take the room of a stage."""
    config = replace(config, extras=extras)
    if config.shortlists and not runs(config, can_implement):
        return with_logits(config)
    return replace(config, stages=min(config.stages, deepest(config).stages))


def with_logits(config: PrefillConfig) -> PrefillConfig:
    """`config` with logits exchanged; where there is no room for them, by more CTAs of a tile."""
    for split_e in range(config.split_e, MAX_CLUSTER + 1):
        clusters = max(1, config.clusters * config.split_e // split_e)
        wider = replace(config, split_e=split_e, clusters=clusters)
        forms = [in_form(wider, *form) for form in FORMS if form != LISTS]
        found = [form for form in forms if runs(form, can_implement)]
        if found:
            return max(found, key=lambda form: form.stages)
    raise ValueError(f"no form of this configuration has room for logits: {config}")


def lanes_of(config: PrefillConfig) -> int:
    """Lanes for each token: as many as let all warps choose once, where that is possible.

    A choice is a chain of dependent steps: two, one after the other, take twice as long.
    """
    if not config.by_threshold:
        return WARP
    if config.shortlists:
        return LIST_LANES
    spare = config.epilogue_threads // config.owned
    lanes = 1 << max(2, min(5, spare.bit_length() - 1))
    return fitted(lanes, config.spec.num_experts, MAX_ENTRIES)


def deepest(config: PrefillConfig) -> PrefillConfig:
    """`config` with as many stages as fit, and do not meet the logits over them."""
    stages = min(MAX_STAGES, max(2, config.k_blocks)) if config.overlay else MAX_STAGES
    while stages > 2 and replace(config, stages=stages).smem_bytes > MAX_SMEM:
        stages -= 1
    return replace(config, stages=stages)


def cycles(config: PrefillConfig, N: int) -> float:
    """An estimate of the time of a launch."""
    c = config
    tiles = ceil_div(N, c.tile_tokens)
    turns = ceil_div(tiles, c.clusters)
    multiply = c.tile_tokens / 64 * TILE_K / 16 * (c.tile_experts / 2 + MMA_START)
    block = max(multiply, c.tile_bytes / INGRESS, LATENCY / (c.stages - 1))
    chains = CHAIN * (ceil_div(c.k_blocks, c.chain) - 1)
    exchange = c.tile_tokens * c.tile_experts * 4 / EXCHANGED
    adding = ADDING * (c.split_k - 1)
    choice = c.owned * c.spec.num_experts * (CHOOSING + adding) + CHOICE_START
    ending = exchange + choice
    if c.shortlists:
        ending *= LISTED[c.tile_tokens]
    reload = RELOAD * (turns - 1) if c.overlay else 0
    start = CLUSTER_START * log2(c.cluster)
    return turns * (c.k_blocks * block + chains + ending) + reload + start

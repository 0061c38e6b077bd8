"""What the heuristics choose for prefill: always something that can run, and of the right size."""

from dataclasses import replace

import pytest
from refused import check_change, over_changes

from cute_router.arch import MAX_CLUSTER
from cute_router.extras import ExtrasSpec
from cute_router.gemm.config import MAX_SMEM, ceil_div
from cute_router.gemm.prefill_config import PrefillConfig, can_implement
from cute_router.prefill_heuristics import candidates, prefill_config, token_bucket, with_extras
from cute_router.spec import RouterSpec

ARCHES = ("sm_90a", "sm_100a", "sm_100f")
TOKENS = (1, 65, 129, 1000, 8192, 131072)
EXPERTS = (1, 7, 64, 144, 160, 256, 300, 384, 512, 1000, 1024)


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("E", EXPERTS)
def test_every_router_has_a_configuration_that_can_run(E, arch):
    for top_k in {1, min(E, 6), min(E, 32)}:
        for scoring in ("sqrtsoftplus", "softmax"):
            for K in (8, 264, 4096, 32768):
                spec = RouterSpec(E, K, top_k, scoring)
                for N in TOKENS:
                    for sms, most in ((20, 8), (132, 16)):
                        config = prefill_config(spec, N, arch, sms, max_cluster=most)
                        can_implement(config)
                        assert config.cluster <= most
                        assert config.clusters * config.cluster <= max(sms, config.cluster)


@pytest.mark.parametrize("arch", ARCHES)
def test_candidates_stay_within_shared_memory_and_clusters(arch):
    found = list(candidates(RouterSpec(384, 7168), arch))
    assert len(found) > 4
    for config in found:
        assert config.smem_bytes <= MAX_SMEM
        assert config.cluster <= MAX_CLUSTER
        assert config.tile_experts * config.split_e >= 384


@pytest.mark.parametrize("N", [1024, 2048, 4096, 8192, 16384])
@pytest.mark.parametrize(("E", "K"), [(256, 4096), (384, 7168)])
def test_the_tuned_shapes_keep_an_h200_busy(E, K, N):
    config = prefill_config(RouterSpec(E, K), N, "sm_90a", 132)
    clusters = min(config.clusters, ceil_div(N, config.tile_tokens))
    assert 64 <= clusters * config.cluster <= 132


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("E", [64, 160, 256, 300, 384, 512, 1000])
def test_extras_change_nothing_of_the_sums(E, arch):
    for N in (4096, 16384):
        chosen = prefill_config(RouterSpec(E, 4096), N, arch)
        for extras in ({"logits": True}, {"second_bias": True}, {"num_valid": True, "shared": 1}):
            config = with_extras(chosen, ExtrasSpec(**extras))
            can_implement(config)
            same = ("tile_tokens", "split_k", "k_blocks", "chain")
            assert all(getattr(config, name) == getattr(chosen, name) for name in same)
            assert config.cluster * config.clusters <= 132
            if "num_valid" in extras:
                assert config.shortlists == chosen.shortlists


def test_buckets_grow_with_n_and_hold_it():
    buckets = [token_bucket(N) for N in range(1, 5000)]
    assert buckets == sorted(buckets)
    assert all(bucket >= N for N, bucket in enumerate(buckets, 1))
    assert len(set(buckets)) < 20
    assert token_bucket(10**7) == token_bucket(131072)


HOPPER = PrefillConfig(RouterSpec(256, 4096), "sm_90a")
BLACKWELL = PrefillConfig(RouterSpec(256, 4096), "sm_100a")

LISTS = PrefillConfig(RouterSpec(256, 4096), "sm_90a", lanes=4, shortlists=True)

REFUSED = [
    (HOPPER, {"arch": "sm_80"}, "arch must be sm_90a, sm_100a or sm_100f; got 'sm_80'"),
    (HOPPER, {"tile_tokens": 32}, r"tile_tokens must be one of \(64, 128\) on sm_90a; got 32"),
    (BLACKWELL, {"tile_tokens": 64}, r"tile_tokens must be one of \(128,\) on sm_100a; got 64"),
    (HOPPER, {"split_e": 8, "split_k": 4}, r"split_e \* split_k must be 1 to 16; got 32"),
    (HOPPER, {"split_k": 0}, r"split_e \* split_k must be 1 to 16; got 0"),
    (HOPPER, {"spec": RouterSpec(1024, 64)}, "a CTA can have 256 experts; got 512 with split_e=2"),
    (HOPPER, {"stages": 1}, "stages must be at least 2; got 1"),
    (HOPPER, {"clusters": 0}, "clusters must be at least 1; got 0"),
    (HOPPER, {"lanes": 6}, r"lanes must be one of \(4, 8, 16, 32\) and at least .*; got 6"),
    (HOPPER, {"split_k": 8, "lanes": 2}, "lanes must be one of .*; got 2"),
    (HOPPER, {"split_e": 4, "split_k": 4, "tile_tokens": 64, "lanes": 4}, "at least 32 / owned=4"),
    (BLACKWELL, {"overlay": True}, "overlay is for sm_90a; got sm_100a"),
    (
        replace(HOPPER, overlay=True, stages=2),
        {"spec": RouterSpec(256, 128), "stages": 3},
        "overlay takes at most k_blocks=2 stages; got stages=3",
    ),
    (LISTS, {"split_k": 2}, "shortlists are for split_k=1, .*; got 2"),
    (LISTS, {"overlay": True}, "shortlists are for .*overlay=False and .*; got 1, True"),
    (LISTS, {"lanes": 16}, "shortlists are for .*lanes=4 or 8; got 1, False and 16"),
    (LISTS, {"spec": RouterSpec(256, 4096, 9)}, "shortlists are for top_k up to 8 .*; got 9 and"),
    (LISTS, {"split_e": 16, "lanes": 4}, "32 experts or more of a CTA; got 6 and 16"),
    (LISTS, {"spec": RouterSpec(256, 4096, 6, "softmax"), "lanes": 32}, "scores of one logit"),
    (LISTS, {"extras": ExtrasSpec(logits=True)}, "shortlists are for scores of one logit and one"),
    (LISTS, {"extras": ExtrasSpec(second_bias=True)}, "shortlists are for scores of one logit"),
    (HOPPER, {"stages": 6}, r"needs \d+ bytes of shared memory; a CTA has 232448"),
]


@over_changes(REFUSED)
def test_a_configuration_that_cannot_run_is_refused_with_the_reason(config, change, message):
    check_change(can_implement, config, change, message)

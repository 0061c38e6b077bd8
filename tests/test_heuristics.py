"""The choice of configurations is a pure function whose every result can be built and launched."""

import subprocess
import sys
from dataclasses import fields, replace
from itertools import product
from pathlib import Path

import pytest

from cute_router import RouterSpec
from cute_router.arch import CLUSTERS_AT_ONCE
from cute_router.extras import ExtrasSpec
from cute_router.gemm.config import MAX_SMEM, TILE_K, can_implement, ceil_div
from cute_router.heuristics import (
    MAX_BUCKET,
    candidates,
    decode_config,
    on_an_sm,
    resident,
    token_bucket,
)

ROOT = Path(__file__).parent.parent

ARCHES = ("sm_90a", "sm_100a", "sm_100f")
EXPERTS = (1, 2, 7, 63, 64, 65, 128, 144, 160, 256, 300, 384, 512, 640, 1000, 1024)
HIDDEN = (8, 64, 72, 128, 136, 264, 520, 1024, 2048, 4096, 5120, 6144, 7168, 7176, 16384, 65536)
TOP_K = (1, 2, 6, 8, 16, 31, 32)
TOKENS = (1, 2, 8, 9, 16, 17, 32, 33, 63, 64, 65, 200, 100_000)
FLASH, PRO = RouterSpec(256, 4096), RouterSpec(384, 7168)
EVERY = ExtrasSpec(num_valid=True, valid=True, second_bias=True, shared=1, logits=True)


def specs(E: int):
    """Routers over E experts: every scoring, with and without groups, to the limits of K and k."""
    groups = [(1, 1)] + [(8, 4)] * (E % 8 == 0 and E >= 16) + [(2, 2)] * (E % 2 == 0 and E >= 4)
    for K, k, scoring in product(HIDDEN, TOP_K, ("sqrtsoftplus", "sigmoid", "softmax")):
        for n_group, topk_group in groups:
            if k <= E // n_group * topk_group:
                yield RouterSpec(E, K, k, scoring, n_group=n_group, topk_group=topk_group)


@pytest.mark.parametrize("max_cluster", [8, 16])
@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("E", EXPERTS)
def test_every_router_within_the_limits_gets_a_configuration_that_can_run(E, arch, max_cluster):
    for spec in specs(E):
        for N in (1, 8, 16, 32, 64, 128):
            config = decode_config(spec, N, arch, max_cluster=max_cluster)
            can_implement(config)
            assert config.split_k <= max_cluster
            assert config.split_k * config.k_blocks * TILE_K >= spec.hidden_size


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("E", EXPERTS)
def test_every_router_gets_a_batch_invariant_configuration_that_can_run(E, arch):
    for spec in specs(E):
        can_implement(decode_config(spec, 1, arch, batch_invariant=True))


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("spec", [FLASH, PRO, RouterSpec(1024, 65536, 32, "softmax")], ids=str)
def test_a_batch_invariant_configuration_does_not_depend_on_the_batch(spec, arch):
    assert len({decode_config(spec, N, arch, batch_invariant=True) for N in TOKENS}) == 1


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("spec", [FLASH, PRO], ids=["flash", "pro"])
def test_batches_of_one_bucket_share_their_configuration(spec, arch):
    for N in range(1, 201):
        assert decode_config(spec, N, arch) == decode_config(spec, token_bucket(N), arch)


def test_a_bucket_holds_its_batches_and_never_shrinks_as_they_grow():
    buckets = [token_bucket(N) for N in range(1, 201)]
    assert buckets == sorted(buckets)
    assert set(buckets) == {2, 8, 16, 32, 48, 64, 96, 128}
    assert all(N <= token_bucket(N) < 2 * max(N, 8) for N in range(1, MAX_BUCKET + 1))
    assert set(buckets[MAX_BUCKET - 1 :]) == {MAX_BUCKET}


@pytest.mark.parametrize("N", [1, 64])
@pytest.mark.parametrize("arch", ARCHES)
def test_what_the_caller_says_is_in_the_configuration(arch, N):
    spec = RouterSpec(300, 5120, 7, "sigmoid", False, False)
    with_pdl = decode_config(spec, N, arch)
    assert (with_pdl.spec, with_pdl.arch, with_pdl.pdl) == (spec, arch, True)
    assert decode_config(spec, N, arch, pdl=False) == replace(with_pdl, pdl=False)


@pytest.mark.parametrize("K", HIDDEN)
def test_all_k_blocks_are_resident_where_they_fit_and_else_as_many_as_do(K):
    config = decode_config(RouterSpec(256, K), 8, "sm_90a")
    assert config == resident(config)
    if config.stages < config.k_blocks:
        assert config.smem_bytes + config.tile_bytes > MAX_SMEM


@pytest.mark.parametrize("N", [48, 64, 96])
@pytest.mark.parametrize(
    ("E", "K"), [(128, 2048), (160, 5120), (256, 4096), (256, 7168), (384, 7168)]
)
def test_the_clusters_of_several_token_tiles_run_at_once(E, K, N):
    config = decode_config(RouterSpec(E, K), N, "sm_90a")
    clusters = config.expert_tiles * ceil_div(N, config.tile_tokens)
    assert clusters <= CLUSTERS_AT_ONCE[config.split_k] * on_an_sm(config)


@pytest.mark.parametrize("N", [1, 48, 64, 128])
@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("spec", [FLASH, PRO], ids=["flash", "pro"])
def test_extras_change_no_sums(spec, arch, N):
    plain, more = decode_config(spec, N, arch), decode_config(spec, N, arch, extras=EVERY)
    assert (more.tile_tokens, more.split_k) == (plain.tile_tokens, plain.split_k)


def test_choosing_needs_neither_the_kernel_compiler_nor_a_gpu():
    code = """
import sys, torch
def refuse(*_): raise AssertionError("asked the driver")
torch._C._cuda_init = torch._C._cuda_getDeviceCount = torch.cuda.is_available = refuse
from cute_router.gemm.config import can_implement
from cute_router.heuristics import decode_config
from cute_router.spec import RouterSpec
for arch in ("sm_90a", "sm_100a", "sm_100f"):
    can_implement(decode_config(RouterSpec(256, 4096), 8, arch))
print(*({"cutlass", "tvm_ffi"} & set(sys.modules)))
"""
    imported = subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT)
    assert imported.split() == []


# --- candidates for tuning ------------------------------------------------------------------------


@pytest.mark.parametrize("max_cluster", [8, 16])
@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("E", [1, 7, 64, 160, 256, 384, 1024])
def test_every_candidate_can_run_and_the_first_is_the_heuristics_own(E, arch, max_cluster):
    for K, k, scoring in product((8, 264, 4096, 7168, 65536), (1, 6, 32), ("sigmoid", "softmax")):
        if k > E:
            continue
        spec = RouterSpec(E, K, k, scoring)
        for N in (1, 8, 16, 32, 64):
            found = list(candidates(spec, N, arch, max_cluster=max_cluster))
            assert found[0] == decode_config(spec, N, arch, max_cluster=max_cluster)
            assert len(set(found)) == len(found) <= 60
            for config in found:
                can_implement(config)
                assert (config.spec, config.arch, config.pdl) == (spec, arch, True)
                assert config.split_k <= max_cluster


def differing(config, own):
    """The fields in which a candidate differs from the heuristics' own, and how."""
    return {
        field.name: getattr(config, field.name)
        for field in fields(config)
        if getattr(config, field.name) != getattr(own, field.name)
    }


def test_candidates_vary_all_that_only_changes_the_speed():
    own, *others = candidates(FLASH, 16, "sm_90a")
    changes = [differing(config, own) for config in others]
    assert (own.tile_tokens, own.split_k, own.stages, own.exclusive) == (16, 16, 4, True)
    for change in (
        {"tile_tokens": 8},
        {"split_k": 8, "stages": 8},
        {"tile_tokens": 8, "split_k": 8, "stages": 8},
        {"tile_experts": 128},
        {"trigger": "wait"},
        {"trigger": "product"},
        {"exclusive": False},
        {"exclusive": False, "trigger": "wait"},
        {"stages": 2},
    ):
        assert change in changes, change


def test_without_dependent_launch_its_trigger_is_no_choice():
    found = list(candidates(FLASH, 16, "sm_90a", pdl=False))
    assert {config.trigger for config in found} == {found[0].trigger}
    assert not any(config.pdl for config in found)


def test_being_alone_on_an_sm_is_a_choice_only_where_there_is_room_for_another():
    for config in candidates(PRO, 64, "sm_90a"):
        alone = replace(config, exclusive=True)
        assert (
            not config.exclusive or config.smem_bytes > replace(config, exclusive=False).smem_bytes
        )
        assert alone.smem_bytes > MAX_SMEM // 2

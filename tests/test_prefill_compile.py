"""The prefill kernels that can be chosen compile for their targets, to the code they are meant to.

In the manner of `test_kernels_compile.py`, without a GPU.
"""

import re

import pytest

pytest.importorskip("cutlass")

from test_kernels_compile import build, over, tmem_columns, uses_local_memory

from cute_router.gemm.config import MAX_SMEM
from cute_router.gemm.prefill_config import MAX_COLUMNS, can_implement
from cute_router.prefill_heuristics import candidates, prefill_config
from cute_router.spec import RouterSpec

__all__ = ["build"]  # the fixture

pytestmark = pytest.mark.filterwarnings("ignore:This static loop has")

FLASH, PRO = RouterSpec(256, 4096), RouterSpec(384, 7168)
OTHERS = {
    "k32": RouterSpec(256, 4096, 32),
    "E1024-k8": RouterSpec(1024, 4096, 8),
    "groups": RouterSpec(256, 7168, 8, "sigmoid", n_group=8, topk_group=4),
    "softmax-E300-no-bias": RouterSpec(300, 264, 8, "softmax", False, False),
}

CHOSEN = {
    prefill_config(spec, N, arch): f"{arch}-E{spec.num_experts}-N{N}"
    for arch in ("sm_90a", "sm_100a")
    for spec in (FLASH, PRO)
    for N in (128, 1024, 2048, 4096, 8192, 16384)
} | {
    prefill_config(spec, 4096, arch): f"{arch}-{name}"
    for arch in ("sm_90a", "sm_100a")
    for name, spec in OTHERS.items()
}
ALONE = {
    config: f"{config.arch}-alone-{config.tile_tokens}-overlay{config.overlay:d}"
    for arch in ("sm_90a", "sm_100f")
    for config in candidates(RouterSpec(160, 4096), arch)
    if config.cluster == 1
}
PREFILL = CHOSEN | ALONE


@over(PREFILL)
def test_the_product_is_the_targets_own(build):
    assert re.search(rf"^\.target {build.config.arch}\b", build.ptx, re.M)
    assert ("tcgen05.mma" in build.ptx) == build.config.blackwell
    assert ("wgmma.mma_async" in build.ptx) != build.config.blackwell


@over(PREFILL)
def test_loads_are_tmas_and_logits_meet_in_the_cluster(build):
    assert "cp.async.bulk.tensor" in build.ptx
    c = build.config
    assert ("st.async.shared::cluster" in build.ptx) == (c.cluster > 1)


@over(PREFILL)
def test_the_kernel_waits_for_the_one_ahead_and_lets_the_next_start_behind_its_product(build):
    assert "griddepcontrol.wait" in build.ptx
    product = "tcgen05.ld" if build.config.blackwell else "wgmma.mma_async"
    assert build.ptx.rindex(product) < build.ptx.index("griddepcontrol.launch_dependents")


@over(PREFILL)
def test_nothing_is_spilled_or_kept_in_local_memory(build):
    assert not uses_local_memory(build)


@over(PREFILL)
def test_static_synchronisation_analysis_has_no_warning(build):
    assert build.warnings == []


@over(PREFILL)
def test_shared_memory_is_within_the_budget_and_the_budget_within_the_limit(build):
    can_implement(build.config)
    assert build.smem <= build.config.smem_bytes <= MAX_SMEM


@over({c: name for c, name in PREFILL.items() if c.blackwell})
def test_tensor_memory_holds_a_tile_or_two_and_half_of_it_is_left(build):
    c = build.config
    assert c.buffers == (2 if c.tile_experts <= 128 else 1)
    assert c.buffers * c.tile_experts <= tmem_columns(build.ptx) <= MAX_COLUMNS


@over({c: name for c, name in PREFILL.items() if not c.blackwell})
def test_registers_are_traded_and_there_are_enough(build):
    assert "setmaxnreg.inc" in build.ptx
    assert "setmaxnreg.dec" in build.ptx

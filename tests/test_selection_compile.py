"""The selection kernels compile for every target they are made for, to the code they are meant to.

In the manner of `test_kernels_compile.py`, without a GPU.
"""

import re

import pytest

pytest.importorskip("cutlass")

from ptx_sim import launch_gate, launch_rows
from test_kernels_compile import build, over, uses_local_memory

from cute_router.spec import MAX_EXPERTS, RouterSpec
from cute_router.topk.config import GateConfig, RowsConfig, dependent_launch
from cute_router.topk.hash_config import HashConfig, HashGateConfig, HashLogitsConfig

__all__ = ["build"]  # the fixture

pytestmark = pytest.mark.filterwarnings("ignore:This static loop has")

FP32 = ("float32", 32)
ARCHES = ("sm_80", "sm_90a", "sm_100a")


def spec_of(K: int, k: int, scoring: str = "sqrtsoftplus", renormalize: bool = True) -> RouterSpec:
    return RouterSpec(MAX_EXPERTS, K, k, scoring, renormalize, has_bias=False)


UNIFORM = {
    HashConfig(k, arch, token_bits, table_bits, vector): f"{arch}-hash-k{k}-{table_bits}x{vector}"
    for arch in ARCHES
    for k, token_bits, table_bits, vector in ((6, 64, 64, 2), (8, 32, 32, 4), (31, 32, 64, 1))
}
HASH_GATE = {
    HashGateConfig(spec_of(K, k, scoring, renormalize), arch): f"{arch}-hash-gate-K{K}-k{k}"
    for arch in ARCHES
    for K, k, scoring, renormalize in (
        (4096, 6, "sqrtsoftplus", True),
        (7168, 6, "sqrtsoftplus", True),
        (7168, 8, "sigmoid", False),
        (4096, 32, "sqrtsoftplus", True),
        (65544, 32, "sqrtsoftplus", True),  # many portions, ragged
    )
}
LOGITS = {
    HashLogitsConfig(spec_of(8, 6, scoring), arch): f"{arch}-hash-logits-{scoring}"
    for arch in ARCHES
    for scoring in ("sqrtsoftplus", "softmax")
}
HASH = UNIFORM | HASH_GATE | LOGITS
ROWS = {
    RowsConfig(
        L, k, dtype, arch, lengths=lengths, lanes=lanes, vector=vector, pdl=dependent_launch(arch)
    ): f"{arch}-rows-L{L}-k{k}-{dtype}-{lanes}"
    for arches, L, k, dtype, lanes, vector, lengths in (
        (ARCHES, 256, 6, "float32", 8, True, None),
        (ARCHES, 384, 8, "float32", 8, True, None),
        (ARCHES, 1024, 8, "float32", 32, True, None),
        (ARCHES, 128, 8, "bfloat16", 4, True, "int64"),
        (("sm_80",), 1023, 16, "float16", 8, False, "int32"),
        (("sm_90a",), 128, 32, "float32", 4, False, None),
        (("sm_100a",), 1024, 32, "float32", 32, True, None),
    )
    for arch in arches
}
GATE = {
    GateConfig(spec, arch, dtype, lanes=lanes, pdl=dependent_launch(arch)): f"{arch}-gate-{name}"
    for arches, name, spec, dtype, lanes in (
        (ARCHES, "E256-32", RouterSpec(256, 64), "float32", 32),
        (ARCHES, "E384-16", RouterSpec(384, 64), "float32", 16),
        (ARCHES, "E256-8", RouterSpec(256, 64, 8, "sigmoid"), "bfloat16", 8),
        (ARCHES, "groups", RouterSpec(256, 64, 8, "softmax", n_group=8, topk_group=4), *FP32),
        (("sm_80",), "E128-4", RouterSpec(128, 64, has_bias=False), "float16", 4),
        (("sm_100a",), "E1024-k32", RouterSpec(1024, 64, 32), *FP32),
    )
    for arch in arches
}
SELECTION = HASH | ROWS | GATE


@over(SELECTION)
def test_the_code_is_for_the_target_that_was_named(build):
    assert re.search(rf"^\.target {build.config.arch}\b", build.ptx, re.M)


@over(SELECTION)
def test_nothing_is_spilled_or_kept_in_local_memory(build):
    assert not uses_local_memory(build)


@over(SELECTION)
def test_static_synchronisation_analysis_has_no_warning(build):
    assert build.warnings == []


@over(UNIFORM | HASH_GATE | ROWS | GATE)
def test_the_kernel_meets_its_neighbours_where_the_target_knows_how(build):
    for instruction in ("griddepcontrol.wait", "griddepcontrol.launch_dependents"):
        assert (instruction in build.ptx) == (build.config.arch != "sm_80")


@over({c: name for c, name in UNIFORM.items() if c.vector > 1})
def test_entries_are_stored_by_vectors(build):
    c = build.config
    stores = re.findall(r"st\.global\.(?:v(\d)\.)?b(\d+)", build.ptx)
    assert [int(count or 1) * int(bits) for count, bits in stores] == [32 * c.vector] * 2


@over(HASH_GATE)
def test_rows_are_loaded_16_bytes_at_a_time(build):
    loads = re.findall(r"ld\.global\.(?:v(\d)\.)?b(\d+)", build.ptx)
    widths = [int(count or 1) * int(bits) for count, bits in loads]
    assert sum(width == 128 for width in widths) >= build.config.spec.top_k + 1
    assert sum(width != 128 for width in widths) == 2, "a token id and a table entry"


@over(GATE)
def test_copies_are_asynchronous_where_rows_are_whole_runs(build):
    c = build.config
    assert ("cp.async.cg.shared.global" in build.ptx) == (c.vector and c.by_threshold)


@over(ROWS)
def test_scores_are_loaded_16_bytes_at_a_time_where_rows_are_whole_runs(build):
    c = build.config
    wide = len(re.findall(r"ld\.global\.v4\.b32", build.ptx))
    assert wide == (-(-c.length // (c.lanes * c.run)) if c.vector else 0)


@over(ROWS | GATE)
def test_shared_memory_is_what_the_simulator_gives(build):
    launch = launch_rows if isinstance(build.config, RowsConfig) else launch_gate
    assert build.smem == launch.shared_bytes(build.config)

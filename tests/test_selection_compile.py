"""The selection kernels compile for every target they are made for, to the code they are meant to.

In the manner of `test_kernels_compile.py`, without a GPU.
"""

import re

import pytest

pytest.importorskip("cutlass")

from test_kernels_compile import build, over, uses_local_memory

from cute_router.spec import MAX_EXPERTS, RouterSpec
from cute_router.topk.hash_config import HashConfig, HashGateConfig, HashLogitsConfig

__all__ = ["build"]  # the fixture

pytestmark = pytest.mark.filterwarnings("ignore:This static loop has")

ARCHES = ("sm_80", "sm_90a", "sm_100a")


def spec_of(K: int, k: int, scoring: str = "sqrtsoftplus", renormalize: bool = True) -> RouterSpec:
    return RouterSpec(MAX_EXPERTS, K, k, scoring, renormalize, has_bias=False)


UNIFORM = {
    HashConfig(k, arch, token_bits, table_bits, vector): f"{arch}-hash-k{k}-{table_bits}x{vector}"
    for arch in ARCHES
    for k, token_bits, table_bits, vector in ((6, 64, 64, 2), (8, 32, 32, 4), (31, 32, 64, 1))
}
GATE = {
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
HASH = UNIFORM | GATE | LOGITS


@over(HASH)
def test_the_code_is_for_the_target_that_was_named(build):
    assert re.search(rf"^\.target {build.config.arch}\b", build.ptx, re.M)


@over(HASH)
def test_nothing_is_spilled_or_kept_in_local_memory(build):
    assert not uses_local_memory(build)


@over(HASH)
def test_static_synchronisation_analysis_has_no_warning(build):
    assert build.warnings == []


@over(UNIFORM | GATE)
def test_the_kernel_meets_its_neighbours_where_the_target_knows_how(build):
    for instruction in ("griddepcontrol.wait", "griddepcontrol.launch_dependents"):
        assert (instruction in build.ptx) == (build.config.arch != "sm_80")


@over({c: name for c, name in UNIFORM.items() if c.vector > 1})
def test_entries_are_stored_by_vectors(build):
    c = build.config
    stores = re.findall(r"st\.global\.(?:v(\d)\.)?b(\d+)", build.ptx)
    assert [int(count or 1) * int(bits) for count, bits in stores] == [32 * c.vector] * 2


@over(GATE)
def test_rows_are_loaded_16_bytes_at_a_time(build):
    loads = re.findall(r"ld\.global\.(?:v(\d)\.)?b(\d+)", build.ptx)
    widths = [int(count or 1) * int(bits) for count, bits in loads]
    assert sum(width == 128 for width in widths) >= build.config.spec.top_k + 1
    assert sum(width != 128 for width in widths) == 2, "a token id and a table entry"

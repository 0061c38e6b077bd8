"""Every kernel that can be chosen compiles for its target, to the code that it is meant to be.

Nothing here needs a GPU: targets are named. Kernels go through `compile.trace_and_compile`, as they
do when `dense_decode` is called.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
from refused import check_change, over_changes

pytest.importorskip("cutlass")

from planted_kernel import PlantedConfig

from cute_router import RouterSpec
from cute_router import compile as compiler
from cute_router.gemm.config import MAX_SMEM, DecodeConfig, can_implement
from cute_router.heuristics import decode_config, resident
from cute_router.topk.radix import radix_config
from cute_router.topk.radix_config import RadixConfig
from cute_router.topk.radix_config import can_implement as can_implement_radix

ARCHES = ("sm_90a", "sm_100a", "sm_100f")
FLASH, PRO = RouterSpec(256, 4096), RouterSpec(384, 7168)
MAX_TMEM = 512  # columns

# Advice on compile time: loops are unrolled on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:This static loop has")


def chosen() -> dict[DecodeConfig, str]:
    """Every configuration that serves 1 to 128 tokens of the two shapes, and its name."""
    configs: dict[DecodeConfig, str] = {}
    for arch in ARCHES:
        for spec in (FLASH, PRO):
            for invariant in (False, True):
                for N in range(1, 129):
                    c = decode_config(spec, N, arch, batch_invariant=invariant)
                    name = f"E{spec.num_experts}-K{spec.hidden_size}-tile{c.tile_tokens}"
                    configs[c] = f"{arch}-{name}-split{c.split_k}-{c.trigger}"
    return configs


def special(arch: str) -> dict[DecodeConfig, str]:
    """One configuration for each path that the two shapes do not take, and its name."""
    groups = RouterSpec(256, 4096, 8, "softmax", n_group=8, topk_group=4)
    odd = RouterSpec(300, 264, renormalize=False, has_bias=False)
    ring = decode_config(RouterSpec(256, 65536), 8, arch)
    assert ring.stages < ring.k_blocks
    wide = replace(decode_config(FLASH, 16, arch), tile_experts=128, stages=0)
    return {
        decode_config(groups, 8, arch): f"{arch}-softmax-groups",
        ring: f"{arch}-ring",
        decode_config(RouterSpec(1024, 4096, 32), 8, arch): f"{arch}-E1024-k32",
        resident(wide): f"{arch}-tile_experts128",
        decode_config(FLASH, 8, arch, max_cluster=8): f"{arch}-max_cluster8",
        decode_config(odd, 3, arch, pdl=False): f"{arch}-no-bias-no-pdl-E300-K264",
    }


DECODE = chosen() | special("sm_90a") | special("sm_100a") | special("sm_100f")
# (rows, L, k, options): every cluster, number of threads and capacity, kept in registers and not.
LONG_ROWS = [
    (1, 8192, 512, {}),
    (1, 131072, 2048, {}),
    (4, 32768, 2048, {}),
    (32, 8192, 1024, {}),
    (64, 32768, 512, {}),
    (64, 131072, 2048, {}),
    (256, 16384, 2048, {}),
    (1, 1 << 20, 4096, {}),
    (4096, 2048, 64, {}),
    (1, 1001, 400, {"vector": False, "index": "int32"}),
    (64, 32768, 4096, {"dtype": "bfloat16", "lengths": "int64"}),
    (999, 32768, 4096, {"dtype": "float16", "lengths": "int32"}),
    (300, 16384, 1024, {"dtype": "bfloat16", "vector": False}),
]
RADIX = {
    radix_config(rows, L, k, arch, **options): f"{arch}-rows{rows}-L{L}-k{k}"
    for arch in ("sm_80", "sm_90a", "sm_100a")
    for rows, L, k, options in LONG_ROWS
}


class Build(NamedTuple):
    """A compiled configuration, and what the compiler said."""

    config: Any
    ptx: str
    warnings: list[str]  # of the DSL's static analysis
    ptxas: str  # its account of registers and memory
    smem: int  # bytes of shared memory that a launch asks for


_built: dict[Any, Build] = {}


@pytest.fixture
def build(request, capfd, tmp_path) -> Iterator[Build]:
    """The build of the parameter; each configuration is compiled once for all tests."""
    config = request.param
    if config not in _built:
        # In this order: the analyses of the last of the two run, and those of "warnings" are all.
        options = f"--keep-ptx --dump-dir {tmp_path} remarks{{ptx}} warnings"
        compiled = compiler.trace_and_compile(config, options)
        said = re.sub(r"\x1b\[[0-9;]*m", "", capfd.readouterr().err)
        _built[config] = Build(
            config,
            compiled.__ptx__,
            re.findall(r"^warning: (.*)", said, re.M),
            said,
            launch_smem(str(compiled.ir_module)),
        )
    return _built[config]


def launch_smem(host: str) -> int:
    """Bytes of dynamic shared memory in the launch, from the MLIR of the host code.

    They are field 2 of cudaLaunchConfig_t, a constant that the DSL takes from what was allocated.
    """
    field = r"(%\w+) = llvm.getelementptr %\w+\[0, 2\] : .*struct<\(array<3 x i32>, array<3 x i32>"
    (slot,) = re.finditer(field, host)
    stored = re.compile(rf"llvm\.store (%\w+), {slot[1]} :").search(host, slot.end())
    assert stored
    constant = rf"{stored[1]} = llvm\.mlir\.constant\((\d+) : i64\)"
    return int(re.findall(constant, host[: slot.start()])[-1])  # names start anew in each function


def tmem_columns(ptx: str) -> int:
    """Columns that the one allocation of tensor memory asks for."""
    (allocation,) = re.finditer(r"tcgen05\.alloc\..*\s\[[^\]]+\], (%?\w+);", ptx)
    if allocation[1].isdecimal():
        return int(allocation[1])
    constant = rf"mov\.b32\s+{allocation[1]}, (\d+);"
    return int(re.findall(constant, ptx[: allocation.start()])[-1])


def uses_local_memory(build: Build) -> bool:
    """Whether some register array or spilled register lives in memory."""
    (stack,) = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", build.ptxas)
    return stack != ("0", "0") or re.search(r"\.local\b", build.ptx) is not None


def over(configs: dict[Any, str]) -> pytest.MarkDecorator:
    """Parametrise a test over the builds of `configs`."""
    return pytest.mark.parametrize("build", configs, ids=configs.values(), indirect=True)


@over({c: name for c, name in DECODE.items() if c.blackwell})
def test_the_sm_100_product_is_tcgen05s(build):
    for instruction in ("tcgen05.mma", "tcgen05.alloc", "tcgen05.dealloc", "tcgen05.ld"):
        assert instruction in build.ptx
    assert "wgmma" not in build.ptx


@over({c: name for c, name in DECODE.items() if not c.blackwell})
def test_the_sm_90_product_is_wgmmas(build):
    assert "wgmma.mma_async" in build.ptx
    assert "tcgen05" not in build.ptx


@over(DECODE)
def test_loads_are_tmas_and_the_cluster_sums_through_shared_memory(build):
    assert "cp.async.bulk.tensor" in build.ptx
    assert "st.async.shared::cluster" in build.ptx


@over(DECODE)
def test_the_kernel_waits_for_the_one_ahead_and_lets_the_next_start(build):
    assert "griddepcontrol.wait" in build.ptx
    assert "griddepcontrol.launch_dependents" in build.ptx


@over(DECODE | RADIX)
def test_the_code_is_for_the_target_that_was_named(build):
    assert re.search(rf"^\.target {build.config.arch}\b", build.ptx, re.M)


@over(DECODE | RADIX)
def test_nothing_is_spilled_or_kept_in_local_memory(build):
    assert not uses_local_memory(build)


@over(DECODE | RADIX)
def test_static_synchronisation_analysis_has_no_warning(build):
    assert build.warnings == []


@over(DECODE)
def test_shared_memory_is_within_the_budget_and_the_budget_within_the_limit(build):
    can_implement(build.config)
    assert build.smem <= build.config.smem_bytes <= MAX_SMEM


@over({c: name for c, name in DECODE.items() if c.blackwell})
def test_tensor_memory_is_a_legal_number_of_columns_that_holds_the_tile(build):
    columns = tmem_columns(build.ptx)
    assert columns in (32, 64, 128, 256, MAX_TMEM)
    assert columns >= build.config.tile_tokens


@over(RADIX)
def test_shared_memory_of_long_rows_is_within_the_budget_and_the_budget_within_the_limit(build):
    can_implement_radix(build.config)
    assert build.smem <= build.config.smem_bytes


@over(RADIX)
def test_long_rows_are_counted_without_results_and_shared_by_clusters_where_there_are_any(build):
    assert "red.relaxed.cta.shared::cta.add.u32" in build.ptx
    assert ("barrier.cluster" in build.ptx) == (build.config.cluster > 1)
    assert ("griddepcontrol.wait" in build.ptx) == build.config.pdl


# --- the checks can fail ------------------------------------------------------------------------


@pytest.fixture
def _planted(monkeypatch):
    monkeypatch.setitem(compiler.TRACERS, "PlantedConfig", "planted_kernel")


def planted(fault: str) -> pytest.MarkDecorator:
    return over({PlantedConfig(arch, fault): arch for arch in ("sm_90a", "sm_100a")})


@pytest.mark.usefixtures("_planted")
@planted("barrier")
def test_a_wait_on_a_barrier_that_is_never_initialised_is_warned_of(build):
    assert any("no statically-visible mbarrier.init" in warning for warning in build.warnings)
    assert not uses_local_memory(build)


@pytest.mark.usefixtures("_planted")
@planted("local")
def test_an_array_in_local_memory_is_noticed(build):
    assert uses_local_memory(build)
    assert build.warnings == []


@pytest.mark.usefixtures("_planted")
@planted("none")
def test_the_planted_kernel_without_its_fault_passes(build):
    assert build.warnings == []
    assert not uses_local_memory(build)
    assert build.smem >= 8


# --- what cannot be built is refused before it is -------------------------------------------------

HOPPER = decode_config(FLASH, 8, "sm_90a")
BLACKWELL = decode_config(FLASH, 8, "sm_100a")
RING = decode_config(RouterSpec(256, 65536), 8, "sm_90a")

REFUSED = [
    (HOPPER, {"arch": "sm_80"}, "arch must be sm_90a, sm_100a or sm_100f; got 'sm_80'"),
    (HOPPER, {"arch": "sm_100"}, "arch must be .*; got 'sm_100'"),
    (HOPPER, {"tile_experts": 32}, "tile_experts must be 64 or 128; got 32"),
    (HOPPER, {"tile_experts": 256}, "tile_experts must be 64 or 128; got 256"),
    (HOPPER, {"tile_tokens": 24}, r"tile_tokens must be one of \(8, .*\) on sm_90a; got 24"),
    (HOPPER, {"tile_tokens": 128}, "tile_tokens must be one of .*; got 128"),
    (BLACKWELL, {"tile_tokens": 8}, r"tile_tokens must be one of \(16, .*\) on sm_100a; got 8"),
    (HOPPER, {"split_k": 1}, "split_k must be 2, 4, 8 or 16; got 1"),
    (HOPPER, {"split_k": 3}, "split_k must be 2, 4, 8 or 16; got 3"),
    (HOPPER, {"split_k": 32}, "split_k must be 2, 4, 8 or 16; got 32"),
    (HOPPER, {"trigger": "later"}, 'trigger must be "start", "wait" or "product"; got \'later\''),
    (HOPPER, {"stages": 0}, "stages must be from 2 to k_blocks=4; got 0"),
    (HOPPER, {"stages": 1}, "stages must be from 2 to k_blocks=4; got 1"),
    (HOPPER, {"stages": 5}, "stages must be from 2 to k_blocks=4; got 5"),
    (RING, {"stages": RING.stages + 1}, r"needs \d+ bytes of shared memory; a CTA has 232448"),
]


@over_changes(REFUSED)
def test_a_configuration_that_cannot_run_is_refused_with_the_reason(config, change, message):
    check_change(can_implement, config, change, message)


ROWS = RadixConfig("float32", "sm_90a", cluster=16)
OLD = RadixConfig("float32", "sm_80", pdl=False)

REFUSED_ROWS = [
    (ROWS, {"dtype": "float64"}, "dtype must be one of .*; got 'float64'"),
    (ROWS, {"index": "int16"}, "index must be .*; got 'int16'"),
    (ROWS, {"lengths": "int16"}, "lengths must be None, .*; got 'int16'"),
    (ROWS, {"cluster": 3}, r"cluster must be one of \(1, 2, 4, 8, 16\) on sm_90a; got 3"),
    (ROWS, {"threads": 96}, "threads must be a power of two from 64 to 1024; got 96"),
    (ROWS, {"bits": 8}, "bits must be from 8 to 12, bins at least threads; got 8"),
    (ROWS, {"bits": 13}, "bits must be from 8 to 12, bins at least threads; got 13"),
    (ROWS, {"items": 3}, "items must be 2, 4 or 8; got 3"),
    (ROWS, {"capacity": 3000}, "capacity must be a power of two, at least 128; got 3000"),
    (ROWS, {"capacity": 64}, "capacity must be a power of two, at least 128; got 64"),
    (ROWS, {"capacity": 16384}, r"needs \d+ bytes of shared memory; a CTA has 232448"),
    (OLD, {"pdl": True}, "sm_80 has no programmatic dependent launch"),
    (OLD, {"cluster": 2}, r"cluster must be one of \(1,\) on sm_80; got 2"),
    (OLD, {"capacity": 16384}, r"needs \d+ bytes of shared memory; a CTA has 101376"),
]


@over_changes(REFUSED_ROWS)
def test_a_kernel_of_long_rows_that_cannot_run_is_refused_with_the_reason(config, change, message):
    check_change(can_implement_radix, config, change, message)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_100a", "sm_100f"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_long_rows_of_every_size_have_a_kernel(arch, dtype):
    for rows in (1, 3, 16, 60, 128, 1000):
        for L in (1, 2, 31, 1024, 1025, 5000, 8192, 100_001, 1 << 17, (1 << 20) - 1, 1 << 20):
            for k in {1, min(L, 100), min(L, 2048), min(L, 4096)}:
                for vector in (False, True):
                    c = radix_config(rows, L, k, arch, dtype=dtype, vector=vector)
                    can_implement_radix(c)
                    assert c.holds(L)
                    assert c.capacity >= k

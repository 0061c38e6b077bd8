"""Kernels in the cache are found and loaded without importing the compiler that made them."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("cutlass")

from cute_router import RouterSpec, load
from cute_router import compile as compiler
from cute_router.topk.config import GateConfig

ROOT = Path(__file__).parent.parent
GATE = GateConfig(RouterSpec(32, 64, top_k=2), "sm_80")  # the cheapest kernel there is to compile


def output(code: str) -> str:
    """What a new process prints."""
    return subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache folder, in a process that has loaded nothing yet."""
    monkeypatch.setenv(compiler.CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(compiler, "_loaded", {})
    return tmp_path


@pytest.fixture
def linkers():
    """No linker is remembered, before or after."""
    load.linker.cache_clear()
    yield
    load.linker.cache_clear()


# --- without the compiler -------------------------------------------------------------------------


def test_a_cached_kernel_is_loaded_without_the_compiler(cache):
    pytest.importorskip("tvm_ffi_orcjit")
    compiler.object_file(GATE)
    said = output("""
import sys
from cute_router import RouterSpec, compile as compiler
from cute_router.topk.config import GateConfig
kernel = compiler.kernel(GateConfig(RouterSpec(32, 64, top_k=2), "sm_80"))
try:
    kernel()
except TypeError as refusal:
    print("Tensor([n0, 32], float32)" in str(refusal))
print("cutlass" in sys.modules)
""")
    assert said.split() == ["True", "False"]


def test_choosing_and_finding_a_kernel_of_any_kind_needs_no_compiler():
    said = output("""
import sys
import cute_router
from cute_router import RouterSpec, compile as compiler
from cute_router.gemm import decode, generic, prefill
from cute_router.heuristics import decode_config
from cute_router.prefill_heuristics import prefill_config
from cute_router.topk import gate, hash, radix, rows, standalone
from cute_router.topk.config import GateConfig, RowsConfig
from cute_router.topk.hash_config import HashConfig, HashGateConfig, HashLogitsConfig
from cute_router.topk.radix_config import RadixConfig
from cute_router.tuning import tune
spec = RouterSpec(256, 4096)
configs = [
    decode_config(spec, 8, "sm_90a"),
    prefill_config(spec, 1024, "sm_100a"),
    GateConfig(spec, "sm_90a"),
    RowsConfig(256, 6, "float32", "sm_90a"),
    HashConfig(6, "sm_90a"),
    HashGateConfig(spec, "sm_90a"),
    HashLogitsConfig(spec, "sm_90a"),
    RadixConfig("float32", "sm_90a"),
]
assert {type(config).__name__ for config in configs} == set(compiler.TRACERS)
for config in configs:
    compiler.cached_file(config)
print(len({compiler.symbol(config) for config in configs}))
print(*{"cutlass", "tvm_ffi"} & set(sys.modules))
""")
    assert said.split() == ["8"]


def test_where_the_object_loader_is_not_installed_the_dsl_loads(cache, linkers, monkeypatch):
    monkeypatch.setitem(sys.modules, "tvm_ffi_orcjit", None)
    assert load.linker() is None
    with pytest.raises(TypeError, match=r"Tensor\(\[n0, 32\], float32\)"):
        compiler.kernel(GATE)()


# --- the flavour ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("installed", "driver", "chosen"),
    [
        ((12, 13), 12, 12),
        ((12, 13), 13, 13),
        ((12, 13), 14, 13),
        ((12, 13), None, 13),
        ((12,), 13, 12),
    ],
)
def test_the_flavour_is_the_newest_that_the_driver_knows(monkeypatch, installed, driver, chosen):
    monkeypatch.setattr(load, "runtimes", lambda: dict.fromkeys(installed, Path("runtime.so")))
    monkeypatch.setattr(load, "driver_generation", lambda: driver)
    assert load.flavour.__wrapped__() == chosen


def test_where_no_flavour_serves_the_error_says_what_is_there(monkeypatch):
    monkeypatch.setattr(load, "runtimes", lambda: {13: Path("runtime.so")})
    monkeypatch.setattr(load, "driver_generation", lambda: 12)
    with pytest.raises(RuntimeError, match=r"must be installed .* driver, 12, .*; got \[13\]"):
        load.flavour.__wrapped__()


def test_where_the_runtime_is_not_where_it_was_the_compiler_says_what_it_is(
    cache, linkers, monkeypatch
):
    import cutlass

    monkeypatch.setattr(load, "PACKAGE", "no_such_package")
    assert load.flavour.__wrapped__() == cutlass.CUDA_VERSION.major
    assert load.linker() is None
    assert callable(compiler.kernel(GATE))


def test_the_flavour_is_that_of_the_compiler():
    import cutlass

    assert load.flavour() == cutlass.CUDA_VERSION.major
    assert all(path.is_file() for path in load.runtimes().values())


def test_another_compiler_than_that_of_the_flavour_compiles_nothing(cache, monkeypatch):
    monkeypatch.setattr(compiler, "flavour", lambda: 99)
    with pytest.raises(RuntimeError, match="the compiler must be that for CUDA 99"):
        compiler.trace_and_compile(GATE)


def test_without_a_driver_there_is_no_generation(monkeypatch):
    def absent(name):
        raise OSError(name)

    monkeypatch.setattr(load.ctypes, "CDLL", absent)
    assert load.driver_generation() is None

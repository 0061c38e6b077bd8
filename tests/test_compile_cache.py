"""The kernel cache: compiled at most once, found by any process, never fooled by a bad file.

Nothing here needs a GPU. The routers are tiny: what is under test is the cache, not the kernels.
"""

import hashlib
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("cutlass")

from cute_router import RouterSpec
from cute_router import __main__ as cli
from cute_router import compile as compiler
from cute_router.arch import TARGETS
from cute_router.crossover import decode_tokens
from cute_router.gemm.config import DecodeConfig
from cute_router.heuristics import decode_config
from cute_router.prefill_heuristics import prefill_config
from cute_router.topk.config import GateConfig

ROOT = Path(__file__).parent.parent


def gate(E: int = 32) -> GateConfig:
    """The cheapest kernel there is to compile."""
    return GateConfig(RouterSpec(E, 64, top_k=2), "sm_80")


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Iterator[Path]:
    """An empty cache folder, in a process that has loaded nothing yet."""
    folder = tmp_path / "cache"
    monkeypatch.setenv(compiler.CACHE_VARIABLE, str(folder))
    monkeypatch.setattr(compiler, "_loaded", {})
    yield folder
    assert [path.name for path in folder.glob("build-*")] == []  # no test leaves half a build


@pytest.fixture
def compiled(monkeypatch) -> list[Any]:
    """The configurations that are compiled from now on."""
    configs: list[Any] = []
    compile_it = compiler.trace_and_compile

    def counting(config: Any, options: str = "") -> Any:
        configs.append(config)
        return compile_it(config, options)

    monkeypatch.setattr(compiler, "trace_and_compile", counting)
    return configs


def entries(folder: Path) -> list[str]:
    """What stands in a cache folder."""
    return sorted(path.name for path in folder.iterdir())


def is_sound(path: Path) -> bool:
    """Whether a file's name holds the digest of its contents."""
    return path.stem.split("-")[1] == hashlib.sha256(path.read_bytes()).hexdigest()[:24]


def signature(function: Callable[..., None]) -> str:
    """The arguments of a loaded kernel, from its refusal of one that is none of them."""
    with pytest.raises(Exception, match=r"calling: `__call__\(") as refusal:
        function()
    return str(refusal.value)


PROLOGUE = """
import os, sys
from cute_router import RouterSpec, compile as compiler
from cute_router.topk.config import GateConfig
config = GateConfig(RouterSpec(32, 64, top_k=2), "sm_80")
"""


def start(code: str) -> "subprocess.Popen[str]":
    """A new process on the same cache, running `code` after PROLOGUE."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", PROLOGUE + code], text=True, cwd=ROOT, **pipes)


# --- found again ---------------------------------------------------------------------------------


def test_a_second_call_returns_the_same_function_and_compiles_nothing(cache, compiled):
    first = compiler.kernel(gate())
    assert compiler.kernel(gate()) is first
    assert compiled == [gate()]
    assert len(entries(cache)) == 1


def test_a_new_process_finds_what_another_compiled(cache, compiled):
    compiler.kernel(gate())
    process = start("""
def poison(*_): raise AssertionError("compiled again")
compiler.trace_and_compile = poison
print(compiler.object_file(config), callable(compiler.kernel(config)))
""")
    out, err = process.communicate()
    assert out.split() == [str(compiler.object_file(gate())), "True"], err
    assert compiled == [gate()]


def test_the_cache_is_where_the_variable_says(cache, tmp_path, monkeypatch):
    assert compiler.cache_dir() == cache
    assert compiler.object_file(gate()).parent == cache
    monkeypatch.setenv(compiler.CACHE_VARIABLE, "~/kernels")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert compiler.cache_dir() == tmp_path / "kernels"
    monkeypatch.delenv(compiler.CACHE_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert compiler.cache_dir() == tmp_path / "xdg" / "cute_router"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert compiler.cache_dir() == tmp_path / ".cache" / "cute_router"


# --- the key -------------------------------------------------------------------------------------


def test_every_field_of_a_configuration_is_in_its_key():
    spec = RouterSpec(64, 1024, n_group=2, topk_group=2)
    specs = [
        spec,
        replace(spec, num_experts=66),
        replace(spec, hidden_size=1032),
        replace(spec, top_k=7),
        replace(spec, scoring="sigmoid"),
        replace(spec, renormalize=False),
        replace(spec, has_bias=False),
        replace(spec, n_group=4),
        replace(spec, topk_group=1),
    ]
    config = DecodeConfig(spec, "sm_90a")
    configs = [
        *(DecodeConfig(changed, "sm_90a") for changed in specs),
        replace(config, arch="sm_100a"),
        replace(config, arch="sm_100f"),
        replace(config, tile_experts=128),
        replace(config, tile_tokens=16),
        replace(config, split_k=8),
        replace(config, stages=2),
        replace(config, trigger="start"),
        replace(config, pdl=False),
        *(GateConfig(changed, "sm_90a") for changed in specs),
        GateConfig(spec, "sm_80"),
        GateConfig(spec, "sm_90a", warps=8),
    ]
    assert len({compiler.symbol(config) for config in configs}) == len(configs)
    assert len({compiler.symbol(config), compiler.symbol(replace(config))}) == 1


def test_the_key_changes_with_the_sources_of_kernels_and_only_those(tmp_path, monkeypatch):
    for folder in ("epilogue", "gemm", "topk"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "kernel.py").write_text("one = 1\n")
    monkeypatch.setattr(compiler, "__file__", str(tmp_path / "compile.py"))
    toolchain = compiler._toolchain.__wrapped__
    before = toolchain()
    (tmp_path / "heuristics.py").write_text("two = 2\n")
    assert toolchain() == before
    seen = {before}
    for folder in ("epilogue", "gemm", "topk"):
        (tmp_path / folder / "kernel.py").write_text("one = 2\n")
        seen.add(toolchain())
    (tmp_path / "topk" / "kernel.py").rename(tmp_path / "topk" / "renamed.py")
    seen.add(toolchain())
    assert len(seen) == 5


def test_the_key_changes_with_the_versions_of_the_tools(monkeypatch):
    toolchain = compiler._toolchain.__wrapped__
    version = compiler.importlib.metadata.version
    seen = {toolchain()}
    for tool in ("nvidia-cutlass-dsl", "apache-tvm-ffi"):
        with monkeypatch.context() as changed:
            changed.setattr(
                compiler.importlib.metadata,
                "version",
                lambda name, tool=tool: "0.0.1" if name == tool else version(name),
            )
            seen.add(toolchain())
    monkeypatch.setattr(compiler, "flavour", lambda: 11)
    assert len({*seen, toolchain()}) == 4


# --- bad files -----------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip_a_bit(path: Path) -> None:
    contents = bytearray(path.read_bytes())
    contents[len(contents) // 2] ^= 1
    path.write_bytes(contents)


def replace_with_another_kernel(path: Path) -> None:
    path.write_bytes(compiler.object_file(gate(E=40)).read_bytes())


@pytest.mark.parametrize("damage", [truncate, empty, flip_a_bit, replace_with_another_kernel])
def test_a_file_that_is_not_what_its_name_says_is_compiled_again(cache, compiled, damage):
    path = compiler.object_file(gate())
    damage(path)
    compiled.clear()
    again = compiler.object_file(gate())
    assert compiled == [gate()]
    assert is_sound(again)
    assert "Tensor([n0, 32], float32)" in signature(compiler.kernel(gate()))
    assert compiler.object_file(gate()) == again
    assert compiled == [gate()]


def test_a_foreign_file_is_absent_even_under_a_name_of_the_right_form(cache, compiled):
    cache.mkdir()
    name = compiler.symbol(gate())
    (cache / f"{name}-{'0' * 24}.o").write_bytes(b"not a kernel")
    (cache / f"{name}-{'1' * 24}.o").mkdir()
    (cache / f"{name}-{'2' * 24}.o").symlink_to(cache / "nowhere")
    assert is_sound(compiler.object_file(gate()))
    assert callable(compiler.kernel(gate()))
    assert compiled == [gate()]


def test_a_build_that_is_killed_leaves_no_entry(cache, compiled):
    """Killed at the worst moment: the file is whole, but not yet published."""
    process = start("""
compiler.os.replace = lambda *_: os.kill(os.getpid(), 9)
compiler.kernel(config)
""")
    _, err = process.communicate()
    assert process.returncode == -9, err
    (left,) = cache.glob("*")
    assert left.name.startswith("build-")  # nobody was there to remove it; it is never looked at
    assert callable(compiler.kernel(gate()))
    assert compiled == [gate()]
    for path in left.iterdir():
        path.unlink()
    left.rmdir()


def test_a_failed_compilation_leaves_nothing_and_is_not_remembered(cache, monkeypatch):
    def fail(config: Any, options: str = "") -> Any:
        raise RuntimeError("no compiler today")

    with monkeypatch.context() as broken:
        broken.setattr(compiler, "trace_and_compile", fail)
        with pytest.raises(RuntimeError, match="no compiler today"):
            compiler.kernel(gate())
    assert not cache.exists() or entries(cache) == []
    assert callable(compiler.kernel(gate()))


# --- folders that take no file --------------------------------------------------------------------


def below_a_file(tmp_path: Path) -> Path:
    (tmp_path / "file").write_text("")
    return tmp_path / "file" / "cache"


def read_only(tmp_path: Path) -> Path:
    return Path("/proc")  # even root makes no file there


@pytest.fixture
def fallback(tmp_path, monkeypatch) -> Iterator[Path]:
    """Where temporary folders go; the process has not warned yet."""
    for cached in (compiler._warn_once, compiler._fallback_dir):
        cached.cache_clear()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield tmp_path
    compiler._fallback_dir.cache_clear()  # it goes with tmp_path


@pytest.mark.parametrize("unusable", [below_a_file, read_only])
def test_a_folder_that_takes_no_file_costs_one_warning(
    cache, compiled, fallback, monkeypatch, unusable
):
    folder = unusable(fallback)
    monkeypatch.setenv(compiler.CACHE_VARIABLE, str(folder))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        functions = [compiler.kernel(gate(E)) for E in (32, 40, 32)]
    assert functions[0] is functions[2]
    assert compiled == [gate(32), gate(40)]
    warned = [str(w.message) for w in caught if issubclass(w.category, RuntimeWarning)]
    assert len(warned) == 1, warned
    assert f"cannot keep compiled kernels in {folder}" in warned[0]


# --- processes and threads at once ----------------------------------------------------------------


def test_two_processes_that_start_cold_on_one_cache_both_succeed(cache, compiled):
    code = """
import cutlass
print("ready", flush=True)
sys.stdin.readline()
print(callable(compiler.kernel(config)))
"""
    processes = [start(code) for _ in range(2)]
    for process in processes:
        assert process.stdout.readline() == "ready\n", process.stderr.read()
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        out, err = process.communicate()
        assert (out, process.returncode) == ("True\n", 0), err
    assert all(is_sound(cache / name) for name in entries(cache))
    assert callable(compiler.kernel(gate()))
    assert compiled == []


def in_threads(configs: list[Any]) -> list[Callable[..., None]]:
    """The kernels of `configs`, each asked for by a thread of its own, all at once."""
    together = threading.Barrier(len(configs))

    def ask(config: Any) -> Callable[..., None]:
        together.wait()
        return compiler.kernel(config)

    with ThreadPoolExecutor(len(configs)) as pool:
        return list(pool.map(ask, configs))


def test_threads_that_ask_for_one_kernel_share_one_compilation(cache, compiled):
    functions = in_threads([gate()] * 4)
    assert all(function is functions[0] for function in functions)
    assert compiled == [gate()]


def test_threads_that_ask_for_different_kernels_each_get_their_own(cache, compiled):
    experts = (32, 40, 48, 56)
    functions = in_threads([gate(E) for E in experts])
    for E, function in zip(experts, functions, strict=True):
        assert f"Tensor([n0, {E}], float32)" in signature(function)
    assert sorted(config.spec.num_experts for config in compiled) == list(experts)
    assert len(entries(cache)) == 4


# --- without a GPU -------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", sorted(TARGETS.values()))
def test_a_kernel_for_any_target_loads_and_refuses_tensors_of_the_cpu(cache, arch):
    E, K, k, N = 64, 128, 6, 3
    kernel = compiler.kernel(decode_config(RouterSpec(E, K, k), N, arch))
    assert callable(kernel)
    with pytest.raises(ValueError, match="expected device_type=cuda"):
        kernel(
            torch.zeros(N, K, dtype=torch.bfloat16),
            torch.zeros(E, K, dtype=torch.bfloat16),
            torch.zeros(E),
            torch.zeros(N, k),
            torch.zeros(N, k, dtype=torch.int32),
            torch.zeros(8192, dtype=torch.int32),
            1.0,
        )


# --- the command line -----------------------------------------------------------------------------

ROUTER = ["compile", "--arch", "sm_90a", "--experts", "64", "--hidden", "128", "--top-k", "6"]


def test_the_command_builds_what_dense_decode_will_ask_for(cache, compiled, capsys):
    asked = [*ROUTER, "--tokens", "1", "32"]
    assert cli.main(asked) == 0
    lines = capsys.readouterr().out.splitlines()
    configs = [decode_config(RouterSpec(64, 128, 6), N, "sm_90a") for N in (1, 32)]
    assert compiled == configs
    for line, N, config in zip(lines, (1, 32), configs, strict=True):
        assert line.startswith(f"tokens {N} ")
        assert f"tile {config.tile_experts}x{config.tile_tokens} " in line
        assert f"split {config.split_k} " in line
        assert f"stages {config.stages} " in line
        assert f"smem {config.smem_bytes:>6} B" in line
        assert line.endswith(f" KiB  {compiler.object_file(config)}")
        assert "cached" not in line

    assert cli.main(asked) == 0
    again = capsys.readouterr().out.splitlines()
    assert all("cached" in line for line in again)
    assert [line.split()[-1] for line in again] == [line.split()[-1] for line in lines]
    assert compiled == configs


def test_the_commands_options_reach_the_configuration(cache, monkeypatch, tmp_path, capsys):
    built: list[DecodeConfig] = []
    (tmp_path / "kernel.o").write_bytes(b"")

    def build(config: DecodeConfig) -> Path:
        built.append(config)
        return tmp_path / "kernel.o"

    monkeypatch.setattr(compiler, "object_file", build)
    options = ["--scoring", "sigmoid", "--no-bias", "--no-renormalize", "--no-pdl"]
    groups = ["--n-group", "4", "--topk-group", "2", "--batch-invariant"]
    cli.main([*ROUTER, *options, *groups])
    spec = RouterSpec(64, 128, 6, "sigmoid", False, False, 4, 2)
    assert built == [decode_config(spec, 1, "sm_90a", batch_invariant=True, pdl=False)]
    assert capsys.readouterr().out.startswith("tokens 1-128 ")

    built.clear()
    cli.main(ROUTER)
    spec, few = RouterSpec(64, 128, 6), decode_tokens(64, 128)
    served = [decode_config(spec, N, "sm_90a") for N in range(1, few + 1)]
    served += [prefill_config(spec, N, "sm_90a") for N in (96, 128) if few < N]
    assert built == list(dict.fromkeys(served))


@pytest.mark.parametrize(
    ("numbers", "text"),
    [([1], "1"), ([1, 2, 3], "1-3"), ([1, 8, 9, 16], "1,8-9,16"), (range(1, 65), "1-64")],
)
def test_batch_sizes_are_shown_as_ranges(numbers, text):
    assert cli.ranges(numbers) == text


def test_the_command_builds_prefill_kernels_for_larger_batches(monkeypatch, tmp_path, capsys):
    built = []
    (tmp_path / "kernel.o").touch()
    monkeypatch.setattr(compiler, "cached_file", lambda config: None)
    monkeypatch.setattr(
        compiler, "object_file", lambda config: built.append(config) or tmp_path / "kernel.o"
    )
    cli.main([*ROUTER, "--tokens", "64", "129", "1000"])
    spec = RouterSpec(64, 128, 6)
    wanted = [decode_config(spec, 64, "sm_90a")]
    wanted += [prefill_config(spec, bucket, "sm_90a") for bucket in (192, 1024)]
    assert built == list(dict.fromkeys(wanted))
    assert "tokens 64 " in capsys.readouterr().out


BAD = [
    (["--arch", "sm_75"], "argument --arch: invalid choice: 'sm_75'"),
    (["--experts", "0"], "num_experts must be from 1 to 1024; got 0"),
    (["--experts", "many"], "argument --experts: invalid int value: 'many'"),
    (["--hidden", "100"], "hidden_size must be a multiple of 8; got 100"),
    (["--top-k", "65"], "top_k must be from 1 to 32; got 65"),
    (["--n-group", "3"], "n_group must divide the number of experts"),
    (["--scoring", "relu"], "argument --scoring: invalid choice: 'relu'"),
    (["--tokens", "0"], "argument --tokens: must be a positive integer; got '0'"),
    (["--tokens"], "argument --tokens: expected at least one argument"),
    (["--fast"], "unrecognized arguments: --fast"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[" ".join(change) for change, _ in BAD])
def test_bad_arguments_exit_with_2_and_say_why(cache, capsys, change, message):
    with pytest.raises(SystemExit) as stop:
        cli.main([*ROUTER, *change])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not cache.exists()


def test_the_module_runs_as_a_command_and_shows_no_traceback():
    command = [sys.executable, "-m", "cute_router"]
    bad = subprocess.run(
        [*command, *ROUTER, "--hidden", "100"], cwd=ROOT, capture_output=True, text=True
    )
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr.splitlines()[-1].endswith(
        "error: hidden_size must be a multiple of 8; got 100"
    )
    assert "Traceback" not in bad.stderr
    bare = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert bare.returncode == 2
    assert "COMMAND" in bare.stderr

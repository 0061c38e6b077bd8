"""The one place that compiles: configuration in, callable kernel out.

    kernel(config)    in this process?  ->  in the disk cache?  ->  compile, publish  ->  load

What is in the cache is found and loaded (`load`) without importing the compiler. A configuration is
a frozen dataclass and is the key of both caches. Kernels are exported as object files and loaded
back as raw tvm-ffi functions, the shortest launch path there is; so a cache filled on a machine
without a GPU, for any target, serves one that has it.

A cached file carries the digest of its contents in its name and appears by an atomic rename: one
that is torn, corrupt or foreign does not match its name, and counts as absent.
"""

import atexit
import hashlib
import importlib
import importlib.metadata
import os
import platform
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from cute_router.load import flavour, load
from cute_router.spec import RouterSpec

CACHE_VARIABLE = "CUTE_ROUTER_CACHE_DIR"
FLAGS = "--enable-tvm-ffi"  # of every compilation, beside its target

# The DSL's compiler is not thread-safe: two at once abort the process.
_lock = threading.RLock()
_loaded: dict[Any, Callable[..., None]] = {}

# Where the kernel of a configuration class is traced: module, holding `trace(config)`.
TRACERS = {
    "DecodeConfig": "cute_router.gemm.decode_kernel",
    "PrefillConfig": "cute_router.gemm.prefill_kernel",
    "GateConfig": "cute_router.topk.gate_kernel",
    "RowsConfig": "cute_router.topk.rows_kernel",
    "HashConfig": "cute_router.topk.hash_kernel",
    "HashGateConfig": "cute_router.topk.hash_gate_kernel",
    "HashLogitsConfig": "cute_router.topk.hash_logits_kernel",
    "RadixConfig": "cute_router.topk.radix_kernel",
}


def kernel(config: Any) -> Callable[..., None]:
    """The kernel of `config`, a raw tvm-ffi function; compiled at most once in a cache's life."""
    function = _loaded.get(config)
    if function is None:
        with _lock:
            function = _loaded.get(config)
            if function is None:
                if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
                    raise RuntimeError(
                        "this call has no kernel yet, and none can be compiled or loaded inside a"
                        f" CUDA graph capture: make such a call once before it; {config}"
                    )
                function = _loaded[config] = load(object_file(config), symbol(config))
    return function


def object_file(config: Any) -> Path:
    """The object file of `config`'s kernel, from the disk cache or newly compiled into it."""
    with _lock:
        return cached_file(config) or _compile(config)


def cached_file(config: Any) -> Path | None:
    """The object file of `config`'s kernel, if the disk cache has it."""
    return _find(cache_dir(), symbol(config))


def symbol(config: Any) -> str:
    """The kernel's name: it changes with anything that can change its code."""
    text = f"{_toolchain()}|{config!r}"
    return f"cute_router_{hashlib.sha256(text.encode()).hexdigest()[:24]}"


def cache_dir() -> Path:
    """Where compiled kernels are kept: $CUTE_ROUTER_CACHE_DIR, or in the user's cache folder."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "cute_router"


@cache
def _toolchain() -> str:
    """All that goes into a kernel beside its configuration: versions, sources, the host's kind."""
    root = Path(__file__).parent
    sources = hashlib.sha256()
    for folder in ("epilogue", "gemm", "topk"):  # all that is traced; the rest only chooses
        for path in sorted((root / folder).glob("*.py")):
            sources.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    parts = (
        *(importlib.metadata.version(name) for name in ("nvidia-cutlass-dsl", "apache-tvm-ffi")),
        flavour(),  # of the DSL's libraries
        platform.machine(),  # an object file holds native host code
        FLAGS,
        sources.hexdigest(),
    )
    return "|".join(map(str, parts))


def _find(folder: Path, name: str) -> Path | None:
    """A file of kernel `name` whose contents match the digest in its file name."""
    for path in sorted(folder.glob(f"{name}-*.o")):
        try:
            if path.name == _file_name(name, path.read_bytes()):
                return path
        except OSError:
            continue
    return None


def _file_name(name: str, contents: bytes) -> str:
    return f"{name}-{hashlib.sha256(contents).hexdigest()[:24]}.o"


def _compile(config: Any) -> Path:
    """Compile `config` into the cache; into a temporary folder where the cache takes no file."""
    compiled = trace_and_compile(config)
    name = symbol(config)
    for choose in (cache_dir, _fallback_dir):  # the second is made only where the first fails
        folder = choose()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder, prefix="build-") as build:
                draft = Path(build) / "kernel.o"
                compiled.export_to_c(str(draft), function_name=name)
                target = folder / _file_name(name, draft.read_bytes())
                os.replace(draft, target)
            return target
        except OSError as error:
            _warn_once(folder, error.strerror or str(error))
    raise RuntimeError(f"no folder takes the compiled kernel of {config}")


def trace_and_compile(config: Any, options: str = "") -> Any:
    """Compile `config` with extra compiler `options`; what the cache does without any."""
    import cutlass
    import cutlass.cute as cute

    if cutlass.CUDA_VERSION.major != flavour():  # the kernel would be kept under a wrong name
        raise RuntimeError(
            f"the compiler must be that for CUDA {flavour()}, which suits this driver; got that for"
            f" CUDA {cutlass.CUDA_VERSION}"
        )
    with _lock:
        entry, arguments = importlib.import_module(TRACERS[type(config).__name__]).trace(config)
        return cute.compile(
            entry, *arguments, options=f"--gpu-arch {config.arch} {FLAGS} {options}"
        )


@cache
def _fallback_dir() -> Path:
    """A folder for this process alone, removed when it ends."""
    folder = tempfile.TemporaryDirectory(prefix="cute_router-", ignore_cleanup_errors=True)
    atexit.register(folder.cleanup)
    return Path(folder.name)


@cache
def _warn_once(folder: Path, reason: str) -> None:
    message = f"cute_router cannot keep compiled kernels in {folder}: {reason}"
    warnings.warn(message, RuntimeWarning, stacklevel=2)


def warmup(
    spec: RouterSpec,
    tokens: Iterable[int] = (1, 8, 16, 32, 48, 64, 96, 128),
    device: torch.device | str = "cuda",
    *,
    batch_invariant: bool = False,
    pdl: bool = True,
) -> None:
    """Compile and load the kernels of `route` for `spec`, and run each once on zeros.

    Call it before capturing CUDA graphs: nothing can be compiled or loaded inside a capture. On
    the CPU there is nothing to do.

    Args:
        spec: the router.
        tokens: batch sizes N that will be used; sizes that share a kernel cost nothing more.
        device: the CUDA device, "cuda" for the current one.
        batch_invariant, pdl: as they will be given to `route`.
    """
    from cute_router.functional import route

    device = torch.device(device)
    if device.type == "cpu":
        return
    W = torch.zeros(spec.num_experts, spec.hidden_size, dtype=torch.bfloat16, device=device)
    bias = torch.zeros(spec.num_experts, device=device) if spec.has_bias else None
    for N in tokens:
        route(
            W.new_zeros(N, spec.hidden_size),
            W,
            bias,
            top_k=spec.top_k,
            scoring=spec.scoring,
            renormalize=spec.renormalize,
            n_group=spec.n_group,
            topk_group=spec.topk_group,
            batch_invariant=batch_invariant,
            pdl=pdl,
        )
    torch.cuda.synchronize(device)

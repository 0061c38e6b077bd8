"""Loads compiled kernels, without the compiler: object file in, callable kernel out.

The compiler takes its time to import, and a process that finds all its kernels in the cache never
needs it. An object file refers to tvm-ffi and to the DSL's runtime library, as programs do that are
built with the DSL ahead of time. tvm-ffi's loader of object files, the wheel
`apache-tvm-ffi-orcjit`, links the three in this process. Where it is not installed, or that library
is not where it is known to be, the DSL's own loader does, and brings the compiler along.

The DSL has a runtime library for each CUDA generation, and takes the newest that the driver knows:
its `flavour`. Kernels compiled by one are loaded by the same.
"""

import ctypes
import importlib.util
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

RUNTIME = "cu{}/lib/libcute_dsl_runtime.so"  # in the package, by flavour
PACKAGE = "nvidia_cutlass_dsl"

Kernel = Callable[..., None]


def load(path: Path, name: str) -> Kernel:
    """The kernel `name` of an object file: a raw tvm-ffi function."""
    session = linker()
    if session is None:
        import cutlass.cute as cute

        module = cute.runtime.load_module(str(path), enable_tvm_ffi=True)
    else:
        module = session.load_module(path, keep_module_alive=True)
    function: Kernel = module[name]
    return function


@cache
def linker() -> Any | None:
    """What links object files in this process; None where that is left to the DSL.

    Without the platform's lifecycle: a kernel lives as long as the process, whose end frees what it
    has on the device, and its destructor could only run when the driver is gone.
    """
    try:
        from tvm_ffi_orcjit import ExecutionSession
    except ImportError:
        return None
    runtime = runtimes().get(flavour())
    if runtime is None:
        return None
    ctypes.CDLL(str(runtime), mode=ctypes.RTLD_GLOBAL)
    return ExecutionSession(orc_rt=None)


@cache
def flavour() -> int:
    """The CUDA generation of the DSL's libraries that serve here: 12, 13, ..."""
    installed, newest = runtimes(), driver_generation()
    if not installed:
        import cutlass

        return int(cutlass.CUDA_VERSION.major)
    usable = [found for found in installed if newest is None or found <= newest]
    if not usable:
        raise RuntimeError(
            f"nvidia-cutlass-dsl must be installed for the CUDA generation of the driver, {newest},"
            f" or an earlier one; got {sorted(installed)}"
        )
    return max(usable)


def runtimes() -> dict[int, Path]:
    """The DSL's runtime libraries that are installed, by flavour."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = spec.submodule_search_locations if spec is not None else None
    found: dict[int, Path] = {}
    for folder in map(Path, folders or ()):
        for path in folder.glob(RUNTIME.format("[0-9]*")):
            found[int(path.relative_to(folder).parts[0].removeprefix("cu"))] = path
    return found


def driver_generation() -> int | None:
    """The newest CUDA generation that the driver knows; None where there is no driver."""
    version = ctypes.c_int()
    try:
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)) != 0:
            return None
    except OSError:
        return None
    return version.value // 1000

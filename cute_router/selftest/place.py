"""Where a report comes from: device, driver, versions, backend."""

import importlib.metadata
import platform
import subprocess

import torch

import cute_router
from cute_router.arch import backend_for, max_cluster, target_for

PACKAGES = ("torch", "nvidia-cutlass-dsl", "apache-tvm-ffi", "apache-tvm-ffi-orcjit", "cuda-python")


def describe(device: torch.device) -> list[str]:
    """Lines that tell this machine from others. Raises `ValueError` where no backend serves it."""
    versions = [f"{name} {version(name)}" for name in PACKAGES]
    lines = [
        f"versions  cute_router {cute_router.__version__}, {', '.join(versions)},"
        f" Python {platform.python_version()}",
        f"host      {platform.system()} {platform.machine()}",
    ]
    if device.type != "cuda":
        return [*lines, f"device    {device.type}", f"backend   {backend_for(device)}"]
    index = torch.device(device).index or 0
    about = torch.cuda.get_device_properties(index)
    lines += [
        f"device    {about.name}, compute capability {about.major}.{about.minor},"
        f" {about.multi_processor_count} SMs, L2 {about.L2_cache_size / 2**20:.0f} MiB,"
        f" memory {about.total_memory / 2**30:.0f} GiB",
        f"driver    {driver()}, torch built for CUDA {torch.version.cuda}",
    ]
    backend, target = target_for(index)
    clusters = "" if backend == "generic" else f", clusters of up to {max_cluster(index)}"
    return [*lines, f"backend   {backend}, compiled for {target}{clusters}"]


def version(package: str) -> str:
    """The installed version of a distribution, or "absent"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def driver() -> str:
    """The version of the NVIDIA driver, as nvidia-smi says it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return "unknown (nvidia-smi does not say)"
    return said.stdout.partition("\n")[0].strip()

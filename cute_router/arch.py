"""Which kernels a device runs, for which target they are compiled, and how wide they can be."""

from functools import cache, partial

import torch

from cute_router.driver import result_of

# Compute capability -> target. 10.3 runs the code of the family sm_100f, not that of sm_100a.
TARGETS = {(9, 0): "sm_90a", (10, 0): "sm_100a", (10, 3): "sm_100f"}
# Clusters that run at once, by their size, of CTAs that fill an SM each, as an H200 says
# (cuOccupancyMaxActiveClusters). One cluster more would take a turn of its own.
CLUSTERS_AT_ONCE = {1: 132, 2: 66, 3: 39, 4: 30, 6: 17, 8: 15, 16: 7}
MAX_CLUSTER = 16  # CTAs; beyond 8 a cluster is non-portable, and a device may refuse it
NOTHING = b".version 7.8\n.target sm_90\n.address_size 64\n.visible .entry nothing() { ret; }\n\0"


def backend_for(device: torch.device | str | int) -> str:
    """What runs a router whose tensors are on `device`.

    Returns:
        "sm_100": the tcgen05 kernels, on compute capability 10.0 and 10.3;
        "sm_90": the WGMMA kernels, on 9.0;
        "generic": `torch.mm` to fp32 logits and a selection kernel, on any other CUDA device;
        "reference": the fp64 specification, on the CPU.

    Raises:
        ValueError: no backend serves the device.
    """
    device = torch.device(device)
    if device.type == "cpu":
        return "reference"
    if device.type != "cuda":
        raise ValueError(f"device must be a CUDA device or the CPU; got {device}")
    index = torch.cuda.current_device() if device.index is None else device.index
    return target_for(index)[0]


@cache
def target_for(index: int) -> tuple[str, str]:
    """(backend, compile target) of a CUDA device."""
    capability = torch.cuda.get_device_capability(index)
    target = TARGETS.get(capability)
    if target is not None:
        return ("sm_90" if target == "sm_90a" else "sm_100"), target
    if capability < (8, 0):
        raise ValueError(
            "cute_router needs a CUDA device of compute capability 8.0 or newer;"
            f" device {index} has {capability[0]}.{capability[1]}"
        )
    return "generic", f"sm_{capability[0]}{capability[1]}"


@cache
def max_cluster(device: int) -> int:
    """16 where clusters of 16 CTAs can start; 8, which always can, where they cannot (MIG)."""
    with torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()  # a context, which the query needs
        return MAX_CLUSTER if active_clusters(MAX_CLUSTER) > 0 else 8


def active_clusters(size: int) -> int:
    """How many clusters of `size` CTAs run at once on the current device, each CTA alone on its SM.

    The driver says so of a kernel. This one does nothing, and the driver itself assembles it: to
    ask in the language of the others would take their compiler.
    """
    from cuda.bindings import driver

    from cute_router.gemm.config import MAX_SMEM  # with so many a CTA is alone on its SM

    module = _check(driver.cuModuleLoadData(NOTHING))
    function = _check(driver.cuModuleGetFunction(module, b"nothing"))
    attribute = driver.CUfunction_attribute
    memory = attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    _check(driver.cuFuncSetAttribute(function, memory, MAX_SMEM))
    larger = attribute.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED
    _check(driver.cuFuncSetAttribute(function, larger, 1))
    cluster = driver.CUlaunchAttribute()
    cluster.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
    cluster.value.clusterDim.x = size
    cluster.value.clusterDim.y = cluster.value.clusterDim.z = 1
    launch = driver.CUlaunchConfig()
    launch.gridDimX, launch.blockDimX = size, 128
    launch.gridDimY = launch.gridDimZ = launch.blockDimY = launch.blockDimZ = 1
    launch.sharedMemBytes = MAX_SMEM
    launch.attrs, launch.numAttrs = [cluster], 1
    status, clusters = driver.cuOccupancyMaxActiveClusters(function, launch)
    _check(driver.cuModuleUnload(module))
    if status == driver.CUresult.CUDA_ERROR_INVALID_CLUSTER_SIZE:
        return 0
    _check((status,))
    return int(clusters)


_check = partial(result_of, purpose="when asked for its clusters")

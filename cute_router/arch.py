"""Which kernels a device runs, for which target they are compiled, and how wide they can be."""

from functools import cache

import torch

# Compute capability -> target. 10.3 runs the code of the family sm_100f, not that of sm_100a.
TARGETS = {(9, 0): "sm_90a", (10, 0): "sm_100a", (10, 3): "sm_100f"}
MAX_CLUSTER = 16  # CTAs; beyond 8 a cluster is non-portable, and a device may refuse it


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
    import cutlass.utils

    with torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()  # a context, which the query needs
        try:
            clusters = cutlass.utils.HardwareInfo(device).get_max_active_clusters(MAX_CLUSTER)
        except RuntimeError as error:
            if "INVALID_CLUSTER_SIZE" not in str(error):
                raise
            clusters = 0
    return MAX_CLUSTER if clusters > 0 else 8

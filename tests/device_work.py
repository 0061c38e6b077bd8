"""What a call does on a GPU beyond its results: kernels, copies, fills, allocations, waits."""

from collections.abc import Callable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile


def device_work(call: Callable[[], object]) -> list[str]:
    """The names of everything the GPU did for `call`: kernels, copies, fills."""
    for _ in range(2):  # the profiler may miss what happens while it starts for the first time
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
            call()
            torch.cuda.synchronize()
    return [event.name for event in trace.events() if event.device_type == DeviceType.CUDA]


def assert_one_kernel(call: Callable[[], object]) -> None:
    """Each of five calls is one launch, of the same kernel, and nothing else."""
    work = device_work(lambda: [call() for _ in range(5)])
    assert len(work) == 5, work
    assert len(set(work)) == 1, work


def assert_neither_allocates_nor_waits(call: Callable[[], object]) -> None:
    """The call takes no memory from the allocator, and the CPU does not wait for the GPU."""
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before

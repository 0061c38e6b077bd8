"""How everything here is timed, and the record of where.

Device time: one CUDA graph of at least 20 calls, replayed 30 times; the median time of a replay
over its number of calls. The calls rotate through buffers that together exceed the L2 cache, as the
weights of a model's layers do. Contenders take turns, 10 replays at a time, and the card rests
before each: after some 40 ms of large products an H200 holds itself to its power limit, at up to
1.2 times the time, and whoever comes next would pay for it. Host time: the wall clock over batches
of calls that nothing waits for in between, each short enough to fit the launch queue.
"""

import datetime
import importlib.metadata
import math
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

import cute_router

CALLS = 20  # in one graph, at least
ROUNDS, REPLAYS = 3, 10  # of every graph in each round
REST = 0.1  # seconds before each turn: twice what has been seen to be enough
ROTATED_BYTES = 80 * 2**20  # an H200's L2 holds 60 MB
HOST_CALLS = 200  # in one batch; the launch queue holds about 1,000
HOST_BATCHES = 30

METHOD = (
    f"one CUDA graph of at least {CALLS} calls, replayed {REPLAYS} times in each of {ROUNDS} rounds"
    f" in which contenders take turns, {REST} s of rest before each; median time per call;"
    f" buffers rotate through at least {ROTATED_BYTES // 2**20} MiB"
)
PACKAGES = ("torch", "nvidia-cutlass-dsl", "apache-tvm-ffi", "triton")


def buffers_for(nbytes: int) -> int:
    """How many buffers of this size the calls must rotate through."""
    return max(2, math.ceil(ROTATED_BYTES / nbytes))


class Captured(NamedTuple):
    """Calls to be replayed."""

    graph: torch.cuda.CUDAGraph
    calls: int


def captured(call: Callable[[int], object], buffers: int) -> Captured:
    """A graph of `call(i)`, with i rotating through range(buffers)."""
    calls = max(buffers, CALLS)
    # Whatever compiles or allocates once does so here: in a capture it could not. A side stream,
    # because libraries keep workspaces for each stream and captures use another one too.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(buffers):
            call(i)
    torch.cuda.synchronize()

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            call(i % buffers)
    return Captured(graph, calls)


def replay_us(*contenders: Captured) -> list[float]:
    """Median microseconds of a call of each; they take turns, with a card that has rested."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times: list[list[float]] = [[] for _ in contenders]
    for _ in range(ROUNDS):
        for (graph, calls), mine in zip(contenders, times, strict=True):
            time.sleep(REST)
            for _ in range(3):
                graph.replay()
            for _ in range(REPLAYS):
                start.record()
                graph.replay()
                end.record()
                end.synchronize()
                mine.append(start.elapsed_time(end) * 1e3 / calls)
    return [statistics.median(mine) for mine in times]


def graph_us(call: Callable[[int], object], buffers: int) -> float:
    """Median microseconds of `call(i)` by itself, with i rotating through range(buffers)."""
    return replay_us(captured(call, buffers))[0]


def host_us(*calls: Callable[[], object]) -> list[float]:
    """Median microseconds that the calling thread spends in each call.

    Batches take turns: for seconds at a time a processor may be 1.5 times slower.
    """
    times: list[list[float]] = [[] for _ in calls]
    for batch in range(1 + HOST_BATCHES):
        for call, mine in zip(calls, times, strict=True):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(HOST_CALLS):
                call()
            if batch > 0:
                mine.append((time.perf_counter() - start) * 1e6 / HOST_CALLS)
    torch.cuda.synchronize()
    return [statistics.median(mine) for mine in times]


def environment(commit: str | None = None) -> dict[str, str | bool | None]:
    """Where and on what the numbers were measured.

    `commit` names the source where git does not know it, as in a copy of the tree; there is then no
    telling whether the files were changed, and `dirty` is None.
    """
    versions = {name.replace("-", "_"): version(name) for name in PACKAGES}
    head, status = git("rev-parse", "HEAD"), git("status", "--porcelain")
    return {
        "gpu": torch.cuda.get_device_name(),
        "sm_clock": sm_clock_under_load(),
        "driver": nvidia_smi("driver_version"),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        **versions,
        "cute_router": cute_router.__version__,
        "commit": commit or head,
        "dirty": None if commit or head is None else bool(status),
        "date": datetime.date.today().isoformat(),
    }


def version(package: str) -> str:
    """The installed version of a distribution, or "absent"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def sm_clock_under_load() -> str | None:
    """The SM clock while the GPU works; an idle one reads a fraction of it."""
    a = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
    b = torch.empty_like(a)
    for _ in range(400):  # about half a second on an H200, longer than the query takes
        torch.mm(a, a, out=b)
    clock = nvidia_smi("clocks.sm")
    torch.cuda.synchronize()
    return clock


def nvidia_smi(field: str) -> str | None:
    """One field of what nvidia-smi says of the current device."""
    index = str(torch.cuda.current_device())
    text = output_of("nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader", "-i", index)
    return text or None


def git(*arguments: str) -> str | None:
    """What git says of this checkout, or None."""
    return output_of("git", "-C", str(Path(__file__).parent), *arguments)


def output_of(*command: str) -> str | None:
    """What a program prints, or None where it is absent or fails."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()

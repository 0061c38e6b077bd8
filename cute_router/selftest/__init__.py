"""`python -m cute_router selftest`: whether this package is right on this machine, and how fast.

For every case of `cases`, on the device that is there:

    a call into poisoned outputs      held to the fp64 reference, computed on the CPU (`verdict`)
    the call again                    the same bits
    a CUDA graph of it, replayed      the same bits

then the times of `timing`, if `dense_decode` was right. Everything is printed as it happens, the
name of a case ahead of its result: where a kernel hangs, the last line says which. A case that
fails does not keep the others from running.

Without a GPU no kernel runs: the reference is then held to a second opinion (`plain`), which tells
that the installation works and nothing more.
"""

import math
import os
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor

from cute_router import reference
from cute_router.selftest import cases, place, plain, timing
from cute_router.selftest.cases import Case, Trial
from cute_router.selftest.verdict import different_bits

POISON = -77
HUNG_AFTER = 300.0  # seconds: a case takes less than one, and its kernel a few to compile

Result = tuple[Tensor, Tensor]


def run(device: torch.device, quick: bool) -> int:
    """Check, time and report; returns 0 if all is right and 1 if not."""
    start = time.perf_counter()
    on_gpu = device.type == "cuda"
    say(f"cute_router selftest{' --quick' if quick else ''}\n")
    try:
        say("\n".join(place.describe(device)))
    except (ImportError, RuntimeError, ValueError) as error:
        say(f"\nFAILED: this device cannot be used: {error}")
        return 1
    if not on_gpu:
        say("\nNO KERNEL IS RUN: this is the CPU. What follows holds the fp64 reference to plain")
        say("fp32 torch. It says nothing of any GPU.")
    say("")

    truth = reference if on_gpu else plain
    wanted = cases.QUICK if quick else cases.QUICK + cases.MORE
    failed = [case.name for case in wanted if not passes(case, device, truth)]
    timed = not on_gpu or print_times(device, failed)

    seconds = math.ceil(time.perf_counter() - start)
    say("")
    if failed or not timed:
        say(f"FAILED: {len(failed)} of {len(wanted)} checks, in {seconds} s")
        for name in failed:
            say(f"  {name}")
        if not timed:
            say("  the times")
        return 1
    say(f"PASSED: {len(wanted)} checks, in {seconds} s")
    if not on_gpu:
        say("No kernel was run.")
    return 0


def passes(case: Case, device: torch.device, truth: ModuleType) -> bool:
    """Examine a case and print what came of it."""
    say(f"{case.name} ... ", end="")
    with watched(case.name):
        try:
            faults = examine(case.trial(device, truth), device)
        except Exception as error:  # whatever it is, it is reported and the next case runs
            where = traceback.extract_tb(error.__traceback__)[-1]
            at = f"{os.path.basename(where.filename)}:{where.lineno}"
            faults = [f"raised {type(error).__name__} at {at}: {error}"]
    say("FAILED" if faults else "ok")
    for fault in faults:
        say(f"    {fault}")
    return not faults


def examine(trial: Trial, device: torch.device) -> list[str]:
    """What is wrong with a call, with the same call again, and with a graph of it."""
    first = called(trial, device)
    faults = trial.judge(*first)
    again = different_bits(first, called(trial, device))
    faults += [f"two calls differ: {difference}" for difference in again]
    if device.type == "cuda":
        replayed = different_bits(first, graphed(trial, device))
        faults += [f"a CUDA graph's replay differs: {difference}" for difference in replayed]
    return faults


def called(trial: Trial, device: torch.device) -> Result:
    """The result of a call, on the CPU."""
    out = poisoned(trial, device)
    trial.call(*out)
    return out[0].cpu(), out[1].cpu()


def graphed(trial: Trial, device: torch.device) -> Result:
    """The result of a graph's second replay, on the CPU."""
    out = poisoned(trial, device)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        trial.call(*out)
    graph.replay()
    for tensor in out:
        tensor.fill_(POISON)
    graph.replay()
    return out[0].cpu(), out[1].cpu()


def poisoned(trial: Trial, device: torch.device) -> Result:
    """Outputs that hold what no kernel writes."""
    first, second = (
        torch.full(shape, POISON, dtype=dtype, device=device) for shape, dtype in trial.outputs
    )
    return first, second


def print_times(device: torch.device, failed: list[str]) -> bool:
    """Print the table of times; False if there should be one and it could not be made."""
    say("")
    if any(name.startswith("dense_decode") for name in failed):
        say("not timed: dense_decode is wrong here")
        return True
    say("times of dense_decode, CUDA graphs, weights from memory:")
    with watched("the times"):
        try:
            say("\n".join(timing.table(cases.TIMED, device)))
        except Exception as error:  # reported as any other fault
            say(f"    raised {type(error).__name__}: {error}")
            return False
    return True


@contextmanager
def watched(name: str) -> Iterator[None]:
    """End the process, with status 1 and a word why, where a kernel never ends.

    Nothing less does: the thread that waits for the device cannot be interrupted.
    """

    def give_up() -> None:
        say(f"FAILED\n    no answer within {HUNG_AFTER:.0f} s\n\nFAILED: {name} hangs")
        os._exit(1)

    timer = threading.Timer(HUNG_AFTER, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def say(text: str, end: str = "\n") -> None:
    """Print at once, so that nothing is lost where a kernel takes the process with it."""
    print(text, end=end, flush=True)

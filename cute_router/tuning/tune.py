"""The choice of configurations by measurement: `cute_router.tune`.

For each kernel and bucket of batch sizes that was asked for:

    candidates   the heuristics' own configuration first, then those around it
    right?       a candidate that is wrong, or cannot be launched, is dropped with a line
    fast?        the fastest is timed once more beside the heuristics' own, and takes its place if
                 that time is less by more than MARGIN

What is chosen is stored (`store`), and serves from the next call on, in this process too.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch

from cute_router import compile as compiler
from cute_router import heuristics, prefill_heuristics
from cute_router.arch import backend_for, target_for
from cute_router.crossover import decode_tokens
from cute_router.gemm import decode, prefill
from cute_router.gemm.config import DecodeConfig
from cute_router.gemm.prefill_config import PrefillConfig
from cute_router.spec import RouterSpec, check_bool, check_int, type_name
from cute_router.tuning import store
from cute_router.tuning.bench import Bench, Launch, Launcher
from cute_router.tuning.report import Progress, in_words, say
from cute_router.tuning.store import Choice, Config, Gpu, Key, Table

MARGIN = 0.02  # of the time: less is noise


class Job(NamedTuple):
    """A kernel and a bucket of batch sizes, whose configuration is to be chosen."""

    kernel: str
    tokens: int


class Maker(NamedTuple):
    """How one kernel is tuned: its candidates, and what launches one of them."""

    candidates: Callable[[RouterSpec, int, str, Gpu, bool], list[Any]]
    launcher: Launcher


class Runner(Protocol):
    """What `choose` asks about configurations: `Bench` on a GPU."""

    def faults(self, config: Any) -> list[str]:
        """What is wrong with its results."""

    def us(self, config: Any) -> float:
        """How long it takes."""

    def settle(self) -> None:
        """Raise where nothing can be run any more."""


def tune(
    spec: RouterSpec,
    Ns: Iterable[int] = (1, 8, 16, 32, 64),
    device: torch.device | str = "cuda",
    *,
    pdl: bool = True,
) -> Table:
    """Time the configurations that may suit a router on this GPU, and use the best from now on.

    Every candidate is held to the fp64 reference before it is timed. The choice is stored beside
    the compiled kernels, for this GPU model and these versions of the package and the compiler:
    later processes find it there. It changes times and, like every other configuration, the order
    of sums; so tune before results are to be repeated bit by bit. Calls with `batch_invariant`
    ignore it. CUDA graphs keep the kernels they were captured with: tune, then `warmup`, then
    capture.

    It takes about a second for each candidate that is not compiled yet, 10 to 50 for each size.
    The GPU should have nothing else to do. Progress is shown on stderr, if that is a terminal.

    Args:
        spec: the router.
        Ns: batch sizes; sizes of one bucket share the choice, which is measured at the largest.
            They are tuned for the kernel that `route` runs for them.
        device: the CUDA device, "cuda" for the current one.
        pdl: as it will be given to `route`.

    Returns:
        What was chosen, by kernel, router, bucket and `pdl`: the knobs of the configuration, its
        microseconds, and those of the heuristics' own.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what was got; also for a
            device that has no kernels to choose from.
        RuntimeError: no candidate is right.
    """
    if not isinstance(spec, RouterSpec):
        raise TypeError(f"spec must be a RouterSpec; got {type_name(spec)}")
    check_bool("pdl", pdl)
    jobs = jobs_of(spec, Ns)
    index = device_index(device)
    choices: Table = {}
    with torch.cuda.device(index):
        gpu, target = store.gpu_of(index), target_for(index)[1]
        plan = {
            job: MAKERS[job.kernel].candidates(spec, job.tokens, target, gpu, pdl) for job in jobs
        }
        with Progress(sum(map(len, plan.values()))) as progress:
            for job, candidates in plan.items():
                there, launcher = torch.device("cuda", index), MAKERS[job.kernel].launcher
                bench = Bench(spec, job.tokens, there, launcher)
                key = Key(job.kernel, spec, job.tokens, pdl)
                choices[key] = choose(job, candidates, bench, progress)
                store.keep(gpu, {key: choices[key]})
                use()
    return choices


def use() -> None:
    """Let calls to come choose anew; kernels that are loaded stay so."""
    decode.plan_of.cache_clear()
    prefill.kernel_of.cache_clear()


def jobs_of(spec: RouterSpec, Ns: Any) -> list[Job]:
    """The kernels and buckets that serve these batch sizes, each once."""
    if not isinstance(Ns, Iterable):
        raise TypeError(f"Ns must be batch sizes; got {type_name(Ns)}")
    jobs = []
    for N in Ns:
        check_int("Ns", N, 1)
        if decode_tokens(spec.num_experts, spec.hidden_size) >= N:
            jobs.append(Job("decode", heuristics.token_bucket(N)))
        else:
            jobs.append(Job("prefill", prefill_heuristics.token_bucket(N)))
    if not jobs:
        raise ValueError("Ns must hold at least one batch size; got none")
    return list(dict.fromkeys(jobs))


def device_index(device: torch.device | str) -> int:
    """The index of a CUDA device that has kernels to choose from."""
    wanted = "a CUDA device of compute capability 9.0, 10.0 or 10.3"
    try:
        device = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device must be {wanted}; got {device!r}") from None
    if device.type != "cuda":
        raise ValueError(f"device must be {wanted}; got {device}")
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (device.index or 0) >= found:
        raise ValueError(f"device must be {wanted}; got {device}; there are {found}")
    index = torch.cuda.current_device() if device.index is None else device.index
    if backend_for(index) == "generic":
        capability = "{}.{}".format(*torch.cuda.get_device_capability(index))
        raise ValueError(f"device must be {wanted}; got {device}, which has {capability}")
    return index


# --- the choice -----------------------------------------------------------------------------------


def choose(job: Job, candidates: Sequence[Config], runner: Runner, progress: Progress) -> Choice:
    """The best of the candidates, of which the first is the heuristics' own."""
    own = candidates[0]
    times: dict[Config, float] = {}
    for config in candidates:
        progress.step(f"{job.kernel} N={job.tokens} {in_words(store.knobs_of(config))}")
        us = measured(job, config, runner)
        if us is not None:
            times[config] = us
    if not times:
        raise RuntimeError(f"no configuration of {job.kernel} is right at N={job.tokens}")
    best = min(times, key=lambda config: times[config])
    if own not in times:
        return Choice(store.knobs_of(best), times[best], None)
    if best != own:  # the least of many times is least by luck too: both once more, side by side
        times[own], times[best] = runner.us(own), runner.us(best)
    if times[best] >= times[own] * (1 - MARGIN):
        best = own
    return Choice(store.knobs_of(best), times[best], times[own])


def measured(job: Job, config: Config, runner: Runner) -> float | None:
    """The time of a candidate; None, and a line, if it is wrong or does not run."""
    try:
        faults = runner.faults(config)
        if not faults:
            return runner.us(config)
        reason = f"wrong: {faults[0]}"
    except Exception as error:  # whatever keeps a candidate from running, the others may be fine
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
    say(f"dropped {job.kernel} N={job.tokens} {in_words(store.knobs_of(config))}: {reason}")
    runner.settle()
    return None


# --- the kernels ----------------------------------------------------------------------------------


def decode_candidates(
    spec: RouterSpec, tokens: int, target: str, gpu: Gpu, pdl: bool
) -> list[DecodeConfig]:
    """Of the decode kernel."""
    return list(heuristics.candidates(spec, tokens, target, max_cluster=gpu.max_cluster, pdl=pdl))


def prefill_candidates(
    spec: RouterSpec, tokens: int, target: str, gpu: Gpu, pdl: bool
) -> list[PrefillConfig]:
    """Of the prefill kernel."""
    own = prefill_heuristics.prefill_config(
        spec, tokens, target, gpu.sms, max_cluster=gpu.max_cluster, pdl=pdl
    )
    others = prefill_heuristics.candidates(
        spec, target, gpu.sms, max_cluster=gpu.max_cluster, pdl=pdl
    )
    return list(dict.fromkeys((own, *others)))


def decode_launcher(config: DecodeConfig, device: int) -> Launch:
    """A launch of the decode kernel."""
    return partial(decode.run, decode.plan_for(config, device))


def prefill_launcher(config: PrefillConfig, device: int) -> Launch:
    """A launch of the prefill kernel."""
    return compiler.kernel(config)


MAKERS = {
    "decode": Maker(decode_candidates, decode_launcher),
    "prefill": Maker(prefill_candidates, prefill_launcher),
}

"""The command line of cute_router.

    python -m cute_router compile --arch sm_100a --experts 256 --hidden 4096 --top-k 6

builds the kernels of a router ahead of time, into the cache that `route` reads. It needs no
GPU: the target is named.

    python -m cute_router tune --experts 256 --hidden 4096 --top-k 6

times the configurations of a router on this machine's GPU, and keeps the best for `dense_decode`.

    python -m cute_router selftest --quick

checks the kernels on this machine's GPU, times them, and prints a report.
"""

import argparse
import sys
import time
from collections.abc import Iterable, Sequence

import torch

from cute_router import compile as compiler
from cute_router import selftest
from cute_router.arch import MAX_CLUSTER, TARGETS
from cute_router.crossover import decode_tokens
from cute_router.gemm.config import DecodeConfig, can_implement
from cute_router.gemm.prefill_config import PrefillConfig
from cute_router.heuristics import MAX_BUCKET, decode_config
from cute_router.prefill_heuristics import prefill_config
from cute_router.prefill_heuristics import token_bucket as prefill_bucket
from cute_router.spec import SCORINGS, RouterSpec


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status, or exits with 2 on bad arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m cute_router", description="Tools for MoE-router kernels."
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    add_compile(commands)
    add_tune(commands)
    add_selftest(commands)
    options = parser.parse_args(arguments)
    status: int = options.run(options)
    return status


def add_compile(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The command that builds ahead of time."""
    parser = commands.add_parser(
        "compile",
        help="build the kernels of a router into the cache; needs no GPU",
        description="Build the kernels of cute_router.route into the cache, without a GPU."
        f" The cache is ${compiler.CACHE_VARIABLE}, or else a folder in the user's cache.",
    )
    add = parser.add_argument
    add("--arch", required=True, choices=sorted(set(TARGETS.values())), help="compile target")
    add_router(parser, required=True)
    add(
        "--tokens",
        type=token_count,
        nargs="+",
        default=range(1, MAX_BUCKET + 1),
        metavar="N",
        help=f"batch sizes to serve (default: 1 to {MAX_BUCKET})",
    )
    add("--batch-invariant", action="store_true", help="as batch_invariant=True of dense_decode")
    add(
        "--max-cluster",
        type=int,
        choices=(8, MAX_CLUSTER),
        default=MAX_CLUSTER,
        help="8 for a GPU, or a slice of one, that does not start clusters of 16",
    )
    add("--no-pdl", action="store_true", help="as pdl=False of dense_decode")
    parser.set_defaults(run=run_compile, error=parser.error)


def add_router(parser: argparse.ArgumentParser, required: bool) -> None:
    """The arguments that say which router."""
    add = parser.add_argument
    add("--experts", required=required, type=int, metavar="E", help="number of experts")
    add("--hidden", required=required, type=int, metavar="K", help="hidden size")
    add("--top-k", required=required, type=int, metavar="k", help="experts chosen per token")
    add("--scoring", choices=SCORINGS, default="sqrtsoftplus", help="default: %(default)s")
    add("--no-bias", action="store_true", help="the router has no selection bias")
    add("--no-renormalize", action="store_true", help="weights are not divided by their sum")
    add("--n-group", type=int, default=1, metavar="G", help="expert groups (default: no groups)")
    add("--topk-group", type=int, default=1, metavar="g", help="groups chosen per token")


def router(options: argparse.Namespace) -> RouterSpec:
    """The router of these arguments; raises `ValueError` where there is none like it."""
    return RouterSpec(
        options.experts,
        options.hidden,
        options.top_k,
        options.scoring,
        not options.no_renormalize,
        not options.no_bias,
        options.n_group,
        options.topk_group,
    )


def run_compile(options: argparse.Namespace) -> int:
    """Build what the heuristics choose, and print a line for each kernel."""
    try:
        plan = choose(options)
    except ValueError as error:  # one from the compiler would be a fault of ours, and is shown
        options.error(str(error))
    for config, tokens in plan.items():
        cached = compiler.cached_file(config) is not None
        start = time.perf_counter()
        path = compiler.object_file(config)
        took = "cached" if cached else f"{time.perf_counter() - start:.1f} s"
        print(
            f"tokens {ranges(tokens):<6}"
            f"  tile {config.tile_experts}x{config.tile_tokens:<2}  split {config.split_k:<2}"
            f"  stages {config.stages:<2}  smem {config.smem_bytes:>6} B"
            f"  {took:>6}  {path.stat().st_size / 1024:.0f} KiB  {path}",
            flush=True,
        )
    return 0


def choose(options: argparse.Namespace) -> dict[DecodeConfig | PrefillConfig, list[int]]:
    """The configurations that serve the asked batch sizes, each with those that it serves."""
    spec, arch, invariant = router(options), options.arch, options.batch_invariant
    shared = {"max_cluster": options.max_cluster, "pdl": not options.no_pdl}
    plan: dict[DecodeConfig | PrefillConfig, list[int]] = {}
    for N in sorted(set(options.tokens)):
        config: DecodeConfig | PrefillConfig
        if invariant or decode_tokens(spec.num_experts, spec.hidden_size) >= N:
            config = decode_config(spec, N, arch, batch_invariant=invariant, **shared)
            can_implement(config)
        else:  # of a GPU with as many SMs as an H200
            config = prefill_config(spec, prefill_bucket(N), arch, **shared)
        plan.setdefault(config, []).append(N)
    return plan


def add_tune(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The command that measures which configurations are best."""
    parser = commands.add_parser(
        "tune",
        help="time a router's configurations on this machine's GPU, and keep the best",
        description="Time the configurations that may suit a router, drop those that are wrong,"
        " and keep the best for this GPU model beside the compiled kernels. The GPU should have"
        " nothing else to do.",
    )
    add_router(parser, required=False)
    add = parser.add_argument
    add(
        "--tokens",
        type=token_count,
        nargs="+",
        default=(1, 8, 16, 32, 64),
        metavar="N",
        help="batch sizes to choose for (default: one of each kind up to 64)",
    )
    add("--no-pdl", action="store_true", help="as pdl=False of dense_decode")
    add("--device", type=device, default="cuda", help="default: %(default)s")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--show", action="store_true", help="show what was chosen before, on any GPU; time nothing"
    )
    instead.add_argument(
        "--clear", action="store_true", help="forget what was chosen for this GPU; time nothing"
    )
    parser.set_defaults(run=run_tune, error=parser.error)


def run_tune(options: argparse.Namespace) -> int:
    """Measure and print what was chosen, or show or forget what was chosen before."""
    from cute_router.tuning import report, store, tune

    if options.show:
        for path in store.files():
            print(path)
            for line in report.stored(path):
                print(f"  {line}")
        return 0
    names = {"--experts": options.experts, "--hidden": options.hidden, "--top-k": options.top_k}
    missing = [name for name, value in names.items() if value is None]
    try:
        if not options.clear:
            if missing:
                raise ValueError(f"the following arguments are required: {', '.join(missing)}")
            spec = router(options)
        index = tune.device_index(options.device)
    except ValueError as error:
        options.error(str(error))
    gpu = store.gpu_of(index)
    if options.clear:
        gone = store.forget(gpu)
        print("nothing was stored for this GPU" if gone is None else f"removed {gone}")
        return 0
    try:
        choices = tune.tune(spec, options.tokens, f"cuda:{index}", pdl=not options.no_pdl)
    except RuntimeError as error:
        print(f"FAILED: {error}", file=sys.stderr)
        return 1
    for key, choice in choices.items():
        print(report.line(key, choice))
    path = store.file_of(gpu)
    if choices.items() <= store.read(path, gpu).items():
        print(f"kept in {path}")
    return 0


def add_selftest(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The command that proves the package on a machine, or disproves it."""
    parser = commands.add_parser(
        "selftest",
        help="check and time the kernels on this machine's GPU; exits with 1 if any is wrong",
        description="Check every kernel against the fp64 reference, time the router, and print a"
        " report for a bug tracker. Without a GPU the reference is checked, and no kernel.",
    )
    parser.add_argument("--quick", action="store_true", help="few kernels, less than a minute")
    parser.add_argument("--device", type=device, help='default: "cuda" if there is one, or "cpu"')
    parser.set_defaults(run=run_selftest, error=parser.error)


def run_selftest(options: argparse.Namespace) -> int:
    """Run the self-test with the chosen device as the current one."""
    found = torch.cuda.is_available()
    chosen = options.device or torch.device("cuda" if found else "cpu")
    if chosen.type == "cpu":
        return selftest.run(chosen, options.quick)
    if not found or (chosen.index or 0) >= torch.cuda.device_count():
        options.error(f"argument --device: there is no {chosen}")
    index = torch.cuda.current_device() if chosen.index is None else chosen.index
    with torch.cuda.device(index):
        return selftest.run(torch.device("cuda", index), options.quick)


def device(text: str) -> torch.device:
    """A CUDA device or the CPU, from the command line."""
    try:
        chosen = torch.device(text)
    except RuntimeError:
        chosen = None
    if chosen is None or chosen.type not in ("cuda", "cpu"):
        raise argparse.ArgumentTypeError(f'must be "cuda", "cuda:N" or "cpu"; got {text!r}')
    return chosen


def token_count(text: str) -> int:
    """A batch size, from the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer; got {text!r}")
    return int(text)


def ranges(numbers: Iterable[int]) -> str:
    """Ascending numbers, runs of neighbours as ranges: "1-8,16"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)


if __name__ == "__main__":
    sys.exit(main())
